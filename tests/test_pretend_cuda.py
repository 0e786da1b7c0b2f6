"""The pretend GPU of the tests: it refuses, waits and remembers as a real one does."""

import pytest
import torch
from support import pretend_cuda
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(bool(pretend_cuda.unavailable()), reason=pretend_cuda.unavailable() or "available")
HERE, INDEX = torch.arange(6.0).view(2, 3), torch.tensor([1, 0])


@pytest.fixture
def gpu():
    with pretend_cuda.device() as gpu:
        yield gpu


def there(tensor):
    """On the GPU, sent without waiting."""
    return tensor.pin_memory().to("cuda", non_blocking=True)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + HERE,
        lambda x: x.mul_(HERE),
        lambda x: HERE.clone().add_(x),
        lambda x: x @ HERE.T,
        lambda x: torch.cat([x, HERE]),
        lambda x: torch.stack([x[0], HERE[0]]),
        lambda x: torch.where(HERE > 1, x, 0.0),
        lambda x: x.masked_fill(HERE > 1, 0.0),
        lambda x: x.index_select(0, INDEX),
        lambda x: x.gather(1, INDEX[:, None]),
        lambda x: x[INDEX],  # a real GPU would copy the index, and the copy would wait
        lambda x: x.__setitem__(INDEX, 0.0),
        lambda x: F.embedding(INDEX, x),
        lambda x: F.cross_entropy(x, INDEX),
        lambda x: F.layer_norm(x, (3,), torch.ones(3)),
        lambda x: F.scaled_dot_product_attention(x[None], HERE[None], x[None]),
    ],
)
def test_tensors_of_two_devices_are_refused(gpu, mix):
    with pytest.raises(pretend_cuda.Mixed, match=r"test_pretend_cuda.py.* on cuda:0 and on the CPU"):
        mix(there(HERE))


def test_numbers_on_the_cpu_are_allowed(gpu):
    x, two = there(HERE), torch.tensor(2.0)
    assert torch.equal((x * two + 1).cpu(), HERE * two + 1)
    assert torch.equal(x.masked_fill(x > 3, two).cpu(), HERE.masked_fill(HERE > 3, two))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 1).all()),
        lambda x: int(x.max()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: HERE.clone().copy_(x),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.__setitem__(x > 1, 0.0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x[0].long().bincount(),
        lambda x: x[0].repeat_interleave(x[0].long()),
        lambda x: torch.arange(6).to("cuda"),
        lambda x: torch.arange(6).to("cuda", non_blocking=True),  # not pinned
        lambda x: torch.arange(6).pin_memory().to("cuda"),
        lambda x: torch.tensor([1, 2], device="cuda"),
        lambda x: x[[1, 0]],
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_a_wait_is_counted_with_its_line(gpu, wait):
    x = there(HERE)
    assert not gpu.waits
    wait(x)
    assert sum(gpu.waits.values()) == 1
    assert "test_pretend_cuda.py" in next(iter(gpu.waits))


def test_what_a_gpu_does_by_itself_is_no_wait(gpu):
    x = there(HERE).requires_grad_()
    picked = x.index_select(0, there(INDEX)).topk(2).values + x.argsort(dim=1)[:, :2]
    loss = F.dropout(picked, 0.5).where(picked > 0, 0.0).cumsum(0).sum() + torch.arange(3, device="cuda").sum()
    loss.backward()
    optimizer = torch.optim.AdamW([x], fused=True)
    nn.utils.clip_grad_norm_([x], 1.0)
    optimizer.step()
    x.detach()[0].repeat_interleave(2)
    loss.detach().to("cpu", non_blocking=True)
    assert not gpu.waits


def test_the_same_numbers_as_on_a_cpu_with_dropout_in_half_precision_and_packed(gpu):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 2))
    gradients = []
    for place in (lambda t: t, lambda t: t.to("cuda")):
        torch.manual_seed(1)
        net.zero_grad()
        net = place(net)
        net(place(HERE)).square().sum().backward()
        gradients.append([p.grad.cpu().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# As CUDA does it


@pytest.fixture
def shapes():
    with pretend_cuda.device(data=False) as gpu:
        yield gpu


def grown(gpu, work) -> tuple[int, object]:
    """How many bytes stay, and what keeps them."""
    before = gpu.alive
    made = work()
    return gpu.alive - before, made


def test_shapes_have_no_numbers_but_integers_do(shapes):
    x = torch.randn(1000, 1000, 1000, device="cuda")  # 4 GB, of which there is nothing
    assert shapes.alive == 4 * 1000**3
    counts = torch.arange(4, device="cuda")
    assert (x[:4, 0, 0] * counts).shape == (4,)
    assert counts.repeat_interleave(counts).tolist() == [1, 2, 2, 3, 3, 3]
    del x
    assert shapes.alive == 512
    assert shapes.peak > 4 * 1000**3


def test_dropout_keeps_a_byte_for_each_number(shapes):
    x = torch.empty(1024, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kept, _out = grown(shapes, lambda: F.dropout(x, 0.1))
    assert kept == (2 + 1) * 1024**2


def test_attention_keeps_a_number_for_each_row(shapes):
    q, k, v = (torch.empty(1, 8, 4096, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    kept, out = grown(shapes, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert kept == pytest.approx(8 * 4096 * (64 * 2 + 4), rel=0.001)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_autocast_follows_cudas_lists(shapes):
    x, net = torch.empty(2, 8, device="cuda"), nn.Linear(8, 8).to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = net(x)
        assert half.dtype == torch.bfloat16
        for whole in (F.layer_norm(half, (8,)), half.softmax(1), half.sum(), half.exp(), half.pow(2), half.cumsum(0)):
            assert whole.dtype == torch.float32  # on a CPU, all of these stay in bf16


def test_adamw_keeps_two_moments(shapes):
    p = nn.Parameter(torch.empty(1024, 1024, device="cuda"))
    p.grad = torch.empty_like(p)
    optimizer = torch.optim.AdamW([p], fused=True)
    kept, _ = grown(shapes, optimizer.step)
    assert kept == pytest.approx(8 * 1024**2, rel=0.001)


@pytest.mark.parametrize("data", [True, False])
def test_weights_in_4_bits(data):
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    x = torch.randn(3, 256)
    with torch.no_grad():
        want = layer.to("cpu")(x)
    with pretend_cuda.device(data) as gpu:
        kept, moved = grown(gpu, lambda: layer.to("cuda"))
        assert kept < 0.6 * 256 * 128
        out = moved(x.to("cuda").requires_grad_())
        out.sum().backward()
        assert out.shape == want.shape
        if data:
            assert torch.equal(out.cpu(), want)


def test_the_line_that_made_a_tensor_is_known(shapes):
    made = torch.empty(2**20, device="cuda")
    (size, count, (line, *_)), *_ = shapes.breakdown()
    assert (size, count) == (made.nbytes, 1)
    assert "test_pretend_cuda.py" in line


def test_afterwards_torch_is_as_it_was():
    with pretend_cuda.device() as gpu:
        torch.ones(2, device="cuda")
        assert gpu.alive == 0
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.ones(2, device="cuda")
    assert torch.ones(2, requires_grad=True).sum().backward() is None
