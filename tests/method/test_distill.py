"""The answer loss against its definition, written out in float64 with loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyspeed.distill import answer_loss


def case(seed: int, answers: int, width: int = 6, vocabulary: int = 11, scale: float = 1.0):
    """(head, student's hidden, targets, teacher's hidden)."""
    g = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    head.weight.data.normal_(0, 1, generator=g)
    hidden = (torch.randn(answers, width, generator=g) * scale).requires_grad_()
    teacher = torch.randn(answers, width, generator=g) * scale
    return head, hidden, torch.randint(vocabulary, (answers,), generator=g), teacher


def by_definition(head, hidden, target, teacher, temperature) -> tuple[float, float]:
    """Summed -log p(target), and summed T^2 * sum_v q(v) * (log q(v) - log p(v)) at temperature T."""

    def logp(row, t):
        logits = (head.weight.detach().double() @ row.detach().double() / t).tolist()
        top = max(logits)
        norm = top + math.log(sum(math.exp(z - top) for z in logits))
        return [z - norm for z in logits]

    ce = kl = 0.0
    for i in range(len(target)):
        ce -= logp(hidden[i], 1.0)[int(target[i])]
        p, q = logp(hidden[i], temperature), logp(teacher[i], temperature)
        kl += temperature**2 * sum(math.exp(b) * (b - a) for a, b in zip(p, q, strict=True))
    return ce, kl


seeds = st.integers(0, 2**31)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 7.0])


@given(seeds, st.integers(1, 9), temperatures, st.integers(1, 12), st.sampled_from([0.1, 1.0, 5.0]))
def test_the_loss_is_its_definition(seed, answers, temperature, chunk, scale):
    head, hidden, target, teacher = case(seed, answers, scale=scale)
    *got, each, taught = answer_loss(head, hidden, target, teacher=teacher, temperature=temperature, chunk=chunk)
    want = by_definition(head, hidden, target, teacher, temperature)
    for g, w in zip(got, want, strict=True):  # fp32 sums of numbers up to about 50
        assert g.item() == pytest.approx(w, rel=1e-5, abs=2e-5 * temperature**2)
    rows = [by_definition(head, hidden[i : i + 1], target[i : i + 1], teacher, 1.0)[0] for i in range(answers)]
    assert each.tolist() == pytest.approx(rows, rel=1e-5, abs=2e-5)
    assert not each.requires_grad
    alone = by_definition(head, teacher, target, teacher, 1.0)[0]  # its cross-entropy knows no temperature
    assert taught.item() == pytest.approx(alone, rel=1e-5, abs=2e-5)
    assert not taught.requires_grad


@given(seeds, st.integers(1, 9), temperatures)
def test_divergence_is_never_negative_and_zero_for_equal_logits(seed, answers, temperature):
    head, hidden, target, teacher = case(seed, answers)
    apart = answer_loss(head, hidden, target, teacher=teacher, temperature=temperature)[1]
    same = answer_loss(head, hidden, target, teacher=hidden, temperature=temperature)[1]
    assert apart.item() > 0  # two random teachers are never equal
    assert same.item() == 0  # both sides are the same arithmetic, so exactly


@given(seeds, st.integers(0, 13), st.integers(1, 15), temperatures)
def test_chunk_size_changes_neither_values_nor_gradients(seed, answers, chunk, temperature):
    outcomes = []
    for size in (chunk, 1_000):
        head, hidden, target, teacher = case(seed, answers)
        ce, kl, *_ = answer_loss(head, hidden, target, teacher=teacher, temperature=temperature, chunk=size)
        (ce + 0.5 * kl).backward()
        outcomes.append((ce.detach(), kl.detach(), hidden.grad, head.weight.grad))
    for a, b in zip(*outcomes, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # the order of fp32 sums


@pytest.mark.parametrize("taught", [False, True])
def test_no_answer_rows_give_zero_with_a_graph_that_reaches_every_parameter(taught):
    head, hidden, target, teacher = case(0, 0)
    ce, kl, *_ = answer_loss(head, hidden, target, teacher=teacher if taught else None)
    assert ce.item() == 0
    assert kl.item() == 0
    (ce + kl).backward()
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))  # zeros, not None: the step touched the head
    assert hidden.grad is not None


@given(seeds, temperatures)
def test_the_teacher_gets_no_gradient(seed, temperature):
    head, hidden, target, _ = case(seed, 4)
    teaching = torch.randn(4, 6, requires_grad=True)
    ce, kl, *_ = answer_loss(head, hidden, target, teacher=teaching, temperature=temperature)
    (ce + kl).backward()
    assert teaching.grad is None
    # And none by way of the head that both share: the gradient is that of fixed teacher probabilities.
    fixed = torch.softmax(head(teaching).detach() / temperature, -1)
    logits = head(hidden.detach())
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    loss = loss - temperature**2 * (fixed * torch.log_softmax(logits / temperature, -1)).sum()
    (want,) = torch.autograd.grad(loss, head.weight)
    torch.testing.assert_close(head.weight.grad, want, rtol=1e-5, atol=1e-5 * temperature**2)


@given(seeds, st.integers(1, 9))
def test_without_a_teacher_there_is_no_divergence_and_the_same_cross_entropy(seed, answers):
    head, hidden, target, teacher = case(seed, answers)
    ce, kl, _, taught = answer_loss(head, hidden, target)
    assert (kl.item(), taught.item()) == (0, 0)
    assert ce.item() == answer_loss(head, hidden, target, teacher=teacher)[0].item()


@given(seeds, st.integers(1, 9), st.integers(1, 10))
def test_values_are_the_same_without_grad(seed, answers, chunk):
    head, hidden, target, teacher = case(seed, answers)
    with torch.no_grad():
        plain = answer_loss(head, hidden, target, teacher=teacher, chunk=chunk)
    graph = answer_loss(head, hidden, target, teacher=teacher, chunk=chunk)
    assert [x.tolist() for x in plain] == [x.tolist() for x in graph]


def test_logits_exist_for_one_chunk_of_rows_at_a_time():
    """The peak of memory is one chunk's logits: the head never sees more rows, in forward or in backward."""
    head, hidden, target, teacher = case(0, 10)
    seen = []
    head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    ce, kl, *_ = answer_loss(head, hidden, target, teacher=teacher, chunk=4)
    assert max(seen) == 4
    assert sum(seen) == 20
    (ce + kl).backward()
    assert max(seen) == 4


def test_low_precision_hidden_states_give_an_fp32_loss():
    head, hidden, target, teacher = case(0, 5)
    ce, kl, *_ = answer_loss(head.bfloat16(), hidden.bfloat16(), target, teacher=teacher.bfloat16())
    assert ce.dtype == kl.dtype == torch.float32
