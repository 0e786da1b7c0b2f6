"""Replays: training steps of true shapes on a pretend GPU without numbers (`pretend_cuda.py`).

    found = replay(recipe, "train", "fast", config, sample, samples=8, recompute=False)
    found.peak, found.parts        bytes, and of what
    found.tensors                  activations at the peak, the largest first, with the lines that made them
    found.operations               every kernel, with its FLOPs and bytes
    deeper(two, three, 32)         the same of 32 layers, without tensors, from replays of two and of three

A model of three layers makes what one of two layers makes, from the same lines, and the most that is alive when a line
makes something grows by the same number of bytes with each layer. So each line is continued by itself, and the largest
is the peak: no phase of a step needs a name. One layer is no beginning: it is the first and the last at once.

Left out: the CUDA context, what kernels need inside (the workspace of cuBLAS), gaps between the allocator's blocks.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from support import pretend_cuda
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tinyspeed.bench import baselines, step
from tinyspeed.bench.baselines import batch_of
from tinyspeed.bench.random_examples import RandomExamples, random_weights
from tinyspeed.data.examples import Sample
from tinyspeed.models import precision, published
from tinyspeed.models.families import family
from tinyspeed.recipe import Recipe
from tinyspeed.rows import plan_rows
from tinyspeed.training import build
from tinyspeed.training.loop import StageRun, Totals

aten = torch.ops.aten
pretend_cuda.NOT_THE_CAUSE += (__file__,)


@dataclass(frozen=True)
class Operation:
    """A kernel: how often it ran, with how many FLOPs and bytes each time."""

    name: str
    flops: float
    bytes: int
    half: bool  # whether its numbers have 16 bits


class Recorder(pretend_cuda.Device):
    """A pretend GPU that writes down what is made and freed, and the operations."""

    def __init__(self, data: bool = False):
        super().__init__(data)
        self.events: list[tuple[int, int, tuple]] = []  # of each storage that is made or freed (negative bytes)
        self.operations: Counter[Operation] = Counter()

    def _hold(self, inner, func):
        before = len(self._held)
        super()._hold(inner, func)
        key = inner.untyped_storage()._cdata
        if len(self._held) > before and self._held[key][0]:
            self.events.append((key, *self._held[key]))

    def _free(self, key):
        if self._held.get(key, (0,))[0]:
            self.events.append((key, -self._held[key][0], ()))
        super()._free(key)

    def run(self, func, args, kwargs):
        out = super().run(func, args, kwargs)
        if (done := _operation(func, args, kwargs, out)) is not None:
            self.operations[done] += 1
        return out

    def size(self, tensor: Tensor) -> int:
        return self._held.get(tensor.inner.untyped_storage()._cdata, (0,))[0]


# Operations

NO_KERNEL = {aten._unsafe_view.default, aten.detach.default, aten._local_scalar_dense.default, aten.is_pinned.default}
GATHERS = {aten.index_select.default, aten.embedding.default, aten.index.Tensor, aten.gather.default}
ATTENTION = ("flash_attention", "efficient_attention", "_varlen_attn")


def _operation(func, args, kwargs, out) -> Operation | None:
    """What an operation costs; None if no kernel runs."""
    name, returns = func.name().removeprefix("aten::"), func._schema.returns
    views = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    if func in NO_KERNEL or views or name.startswith(("empty", "new_empty")):
        return None
    made = [x for x in tree_leaves(out) if isinstance(x, pretend_cuda.Pretend)]
    made = made or pretend_cuda._written(func, args, kwargs)
    if func in GATHERS:
        moved = 2 * sum(map(_size, made))
    else:
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, pretend_cuda.Pretend)]
        read = [x for x in read if func is not aten.copy_.default or x is not args[0]]
        moved = sum(map(_size, {id(x): x for x in [*read, *made]}.values()))
        moved += sum(_size(x) for x in made if any(x is y for y in read))  # read and written
    flops = (
        _attention(func, args, kwargs)
        if any(word in name for word in ATTENTION)
        else _products(func, args, kwargs, out)
    )
    first = next((x for x in [*tree_leaves(args), *made] if isinstance(x, Tensor) and x.is_floating_point()), None)
    return Operation(name, flops, moved, first is not None and first.itemsize == 2)


def _size(x: Tensor) -> int:
    return min(x.numel() * x.itemsize, x.inner.untyped_storage().nbytes())


def _products(func, args, kwargs, out) -> float:
    if func.name() == "bitsandbytes::gemm_4bit":  # x, packed weights, and their true shape (out, in)
        return 2 * args[0].numel() * args[2][0]
    count = flop_registry.get(func._overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0


def _attention(func, args, kwargs) -> float:
    """Two products, and five in the backward; of half of the pairs if it is causal."""
    given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | kwargs
    products = 5 if "backward" in func.name() else 2
    q, k = given["query"], given["key"]
    if "varlen" in func.name():  # (rows of all samples, heads, width); ours are causal
        borders = given["cu_seq_q"].inner.tolist()
        return products * sum((b - a) ** 2 for a, b in itertools.pairwise(borders)) * q.shape[1] * q.shape[2]
    causal = 0.5 if given.get("is_causal") else 1
    return products * 2 * causal * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]


# A step


@dataclass
class Replay:
    layers: int
    held: dict[str, int]  # bytes of weights, gradients and moments
    sites: dict[tuple, dict[str, int]]  # when a line makes something and the most is alive, what that is
    tensors: list[tuple[int, int, tuple]] = field(
        repr=False
    )  # what else is alive at the peak: bytes, how many, of what
    operations: Counter = field(repr=False)

    @property
    def parts(self) -> dict[str, int]:
        """The peak. Activations are made in the forward and alive when it is over; all else is transient."""
        return self.held | max(self.sites.values(), key=lambda beside: sum(beside.values()))

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def deeper(one: Replay, two: Replay, layers: int) -> Replay:
    """A replay of so many layers: what is alive at each line grows with the layers, in a straight line."""
    times = (layers - two.layers) // (two.layers - one.layers)
    along = lambda a, b: {part: n + times * (n - a[part]) for part, n in b.items()}
    sites = {site: along(one.sites[site], beside) for site, beside in two.sites.items() if site in one.sites}
    return Replay(layers, along(one.held, two.held), sites, [], Counter())


def _sites(events: list[tuple[int, int, tuple]], forward: int) -> tuple[dict, list]:
    """What a step has made and freed: the sites, and the tensors at the peak. `forward`: when the forward was over."""
    freed = [len(events)] * len(events)  # when each thing was
    made: dict[int, int] = {}
    for number, (key, n, _) in enumerate(events):
        if n > 0:
            made[key] = number
        elif key in made:
            freed[made.pop(key)] = number
    stays = [number < forward <= freed[number] for number in range(len(events))]
    made, sites, alive, most = {}, {}, {"activations": 0, "transient": 0}, (0, 0)
    for number, (key, n, what) in enumerate(events):
        if n < 0:
            began = made.pop(key, number)  # of what was there before the step, nothing is freed
            alive["activations" if stays[began] else "transient"] += n
            continue
        made[key] = number
        alive["activations" if stays[number] else "transient"] += n
        if sum(alive.values()) > sum(sites.get(what[:2], {}).values()):
            sites[what[:2]] = dict(alive)
        most = max(most, (sum(alive.values()), number))
    size, count = Counter(), Counter()
    for number, (_, n, what) in enumerate(events[: most[1] + 1]):
        if n > 0 and freed[number] > most[1]:
            size[what] += n
            count[what] += 1
    return sites, [(n, count[what], what) for what, n in size.most_common()]


@contextmanager
def gpu_without_numbers() -> Iterator[Recorder]:
    """A pretend GPU for true shapes. bitsandbytes' paged moments are none of its bytes."""
    paged = {"get_paged": lambda *shape, dtype, device: torch.empty(0, dtype=dtype), "fill": lambda *given: None}
    paging = mock.patch.multiple("bitsandbytes.functional", **paged)
    codes = mock.patch.dict("bitsandbytes.functional.name2qmap")  # kept from one call to the next
    with mock.patch.object(pretend_cuda, "Device", Recorder), pretend_cuda.device(data=False) as gpu, paging, codes:
        yield gpu


def replay(
    recipe: Recipe, stage: str, mode: str, config, sample: Sample, *, samples: int, recompute: bool
) -> Replay:  # fmt: skip
    """The forward and backward of a micro-batch of so many samples like this one, beside gradients and moments."""
    how = {"checkpointing": "on" if recompute else "off"}
    recipe = recipe.replaced(run={"device": "cuda"}, dualspeed={"isolator_from": ""}, **{stage: how})
    with gpu_without_numbers() as gpu:
        device = torch.device("cuda")
        dtype = precision.DTYPES[precision.resolve(recipe.model.precision, device)]
        plain = random_weights(config, dtype, device)
        if recipe.model.quantise != "none":
            in_four_bits(plain, dtype)
        source, model = RandomExamples(config, [sample] * samples), build.wrap(recipe, plain)
        held = {}
        run = StageRun(recipe, model, source, stage, 0, getattr(recipe, stage), Totals())
        state = [t for of in run.optimizer.state.values() for t in of.values() if isinstance(t, pretend_cuda.Pretend)]
        held["moments"] = sum(gpu.size(t) for t in {id(t): t for t in state}.values())
        held["weights"] = gpu.alive - held["moments"]
        for p in run.names:
            p.grad = torch.zeros_like(p)
        held["gradients"] = gpu.alive - held["moments"] - held["weights"]
        batch, plan = batch_of(run, range(samples)), step.PLANS[mode]
        rows = [plan_rows(*sample[:2], plan, recipe.dualspeed.isolator)] * samples
        forward, backward = [], Tensor.backward
        gpu.events.clear()
        gpu.operations.clear()

        def noted(loss: Tensor) -> None:
            forward.append(len(gpu.events))
            backward(loss)

        run.model.step = 0
        with mock.patch.object(Tensor, "backward", noted):
            run._micro_batch(batch, rows, plan, samples * sample[2])
        sites, tensors = _sites(gpu.events, forward[0])
        return Replay(config.text_config.num_hidden_layers, held, sites, tensors, gpu.operations)


def steps(size: str, family: str, layers: int, samples: int, text: str) -> dict[str, Counter]:
    """The operations of whole steps of `tinyspeed bench step`, with the optimizer's: ours, and transformers' own."""
    config, found = cut(published.config_of(size, family), layers), {}
    with gpu_without_numbers() as gpu, mock.patch.object(published, "config_of", return_value=config):
        recipe, model = step.random_model(size, family, "lora", samples, 0, torch.device("cuda"), "off")
        source = RandomExamples(config, step.samples_of(text, samples, family))
        run = StageRun(recipe, model, source, "train", 0, recipe.train, Totals())
        with mock.patch.object(baselines, "find_spec", return_value=None):
            theirs = baselines.baselines(run, samples)
        for name, do in {**theirs, **{mode: step.our_step(run, mode) for mode in step.PLANS}}.items():
            gpu.operations.clear()
            do()
            found[name] = gpu.operations.copy()
    return found


def cut(config, layers: int):
    """The same model with fewer layers in its LLM."""
    config = type(config).from_dict(config.to_dict())
    config.text_config.num_hidden_layers = layers
    return config


def in_four_bits(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns the LLM's linear layers into those of bitsandbytes."""
    import bitsandbytes as bnb

    model.is_loaded_in_4bit = True  # peft looks there

    how = {"compress_statistics": True, "quant_type": "nf4"}
    for module in list(family(model).language_model.layers.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is nn.Linear:
                made = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=dtype, **how)
                made.out_features, made.in_features = linear.weight.shape
                packed, state = bnb.functional.quantize_4bit(linear.weight.detach(), **how)
                made.weight = nn.Parameter(packed, requires_grad=False)
                vars(made.weight).update(how, quant_state=state, bnb_quantized=True, blocksize=64)
                made.quant_state = state
                setattr(module, name, made)
