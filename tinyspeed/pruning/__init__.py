"""Which visual rows a fast step sees: the plugins, and the one door to all of them.

    index = pruning.select("divprune", features, keep=0.1)        # (B, N, D) -> (B, K) int64, ascending, unique
    kept = pruning.choose("tome", features, keep=0.1)             # the same index, and kept.weight (B, K, N)
    rows = kept.weight @ features                                 # what a merging plugin puts in their place

A plugin answers one question, "which K of these N rows?", from features, and from signals of the vision tower if it
declares that it needs some (`register`). One that merges also says what each of the K stands for: a weight map, with
which the K rows are sums over all N; the index is then where in the picture they belong. A plugin never touches the
sequence, the labels or the projector's gradient: it sees features without a graph, in fp32 (in bf16 DivPrune shares
only half of its picks with fp32), `choosing.py` does the sums and `rows.py` the cutting. The door owns everything that
must hold for every plugin: K = int(keep * N + 1e-6) and at least 1 (57 of 576, as DualSpeed's code has it; official
DivPrune rounds to 58), ascending order, masks, errors.

Images of different size share a batch through `mask`; then each has its own K, and the index rows are filled up with
-1, which no gather accepts silently.

One file a plugin; each is written from its paper's description.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..util.errors import NotFinite, UserError
from . import attended, controls, coverage, divprune, dpp, dynamicvit, pool, tokenlearner, tome, visionzip  # noqa: F401
from .registry import draws, entry, learned, merges, names, needs, pairs, register, signals_of, works_with

__all__ = ["Kept", "choose", "draws", "keep_count", "learned", "make", "merges", "names", "needs", "pairs"]
__all__ += ["register", "select", "works_with"]


@dataclass(frozen=True)
class Kept:
    """What a plugin makes of a batch of images."""

    index: Tensor  # (B, K) int64, ascending; -1 beyond an image's count
    counts: Tensor  # (B,)
    weight: Tensor | None = None  # (B, K, N): row k is weight[k] @ features; None: it is the row at index[k] itself
    loss: Tensor | None = None  # (B,) a learned plugin's own loss, to be added to the step's


def keep_count(keep: float, n: int) -> int:
    """K for an image of n candidate rows. The 1e-6 undoes float dust: 0.1 * 30 must give 3."""
    return max(1, int(keep * n + 1e-6))


@torch.no_grad()
def select(name: str, features: Tensor, **how) -> Tensor | tuple[Tensor, Tensor]:
    """The rows that plugin `name` keeps of each image: (B, K), or ((B, K), counts (B,)) when a mask is given. Of one
    that merges: the rows in whose place it puts its sums. Settings as for `choose`."""
    kept = choose(name, features, **how)
    return kept.index if how.get("mask") is None else (kept.index, kept.counts)


def choose(
    name: str,
    features: Tensor,
    *,
    keep: float | None = None,
    count: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    seed: int = 0,
    signals: Mapping[str, Tensor] | None = None,
    square: bool = True,
    module: nn.Module | None = None,
) -> Kept:
    """What plugin `name` makes of each image.

    Give either `keep`, a share, or `count`, an exact number (one for all images, or one an image with `mask`).
    `mask` (B, N) marks the rows that may be kept. `seed` matters to plugins that draw. `signals`, each (B, N) or
    (B, N, C), are what some plugins need beside the features; those that this one does not look at are left alone.
    `square`: m * m rows are one picture, m by m, and not several in one list. `module`: a learned plugin that `make`
    made; without it, an untrained one.
    """
    found = entry(name)
    features = features.detach()
    if features.dim() != 3 or not features.is_floating_point() or 0 in features.shape:
        raise UserError(f"features must be a float tensor (images, rows, width), got {tuple(features.shape)}")
    features = _checked(features.float())
    batch, n, width = features.shape
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, n)):
        raise UserError(f"mask must be bool, ({batch}, {n}) as the features are; got {mask.dtype}, {tuple(mask.shape)}")
    heard = _heard(name, signals or {}, (batch, n))
    candidates = [n] * batch if mask is None else mask.sum(1).tolist()
    counts = _counts(keep, count, candidates)
    if mask is None and len(set(counts)) > 1:
        raise UserError("images with different counts need a mask: their index rows have different lengths")
    most, counts_ = max(counts), torch.tensor(counts, device=features.device)
    late = torch.arange(most, device=features.device) >= counts_[:, None]
    valid = features.new_ones(batch, n, dtype=torch.bool) if mask is None else mask
    every = valid.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # the first candidates
    whole = [count == of for count, of in zip(counts, candidates, strict=True)]
    if all(whole):
        return Kept(every.masked_fill(late, -1), counts_)
    if found.learned and module is None:
        module = make(name, width, most).to(features.device).eval()
    learns = found.learned and torch.is_grad_enabled()
    # Autocast would put the products back into half precision.
    with torch.autocast(features.device.type, enabled=False), torch.set_grad_enabled(learns):
        how = {"sizes": [*zip(candidates, counts, strict=True)], "square": square, "seed": seed, **heard}
        plugin = functools.partial(_in_fp32, module) if found.learned else found.plugin
        made = plugin(features, most=most, valid=valid, counts=counts_, **how)
        index, weight, loss = (made, None, None) if isinstance(made, Tensor) else made
        if weight is not None and not found.merges:
            raise UserError(f'the plugin {name!r} returns weights: register it with merges="features"')
        if weight is not None and any(whole):  # an image of which every row stays, beside others
            stays = torch.tensor(whole, device=index.device)[:, None]
            index = index.where(~stays, every)
            themselves = torch.zeros_like(weight).scatter_(2, every[:, :, None], 1.0)
            weight = weight.where(~stays[:, :, None], themselves)
        index, order = index.masked_fill(late, n).sort(dim=1)  # beyond an image's count: n sorts last ...
        index = index.masked_fill(late, -1)  # ... and -1 cannot be gathered by mistake
        if weight is not None:
            weight = weight.gather(1, order[:, :, None].expand_as(weight)).masked_fill(late[:, :, None], 0)
    return Kept(index, counts_, weight, loss)


def _in_fp32(module: nn.Module, features: Tensor, **how):
    """A learned plugin, whatever precision it is kept or was gathered in (a sharded one comes in half)."""
    parameters = {name: p.float() for name, p in module.named_parameters()}
    return torch.func.functional_call(module, parameters, (features,), how)


def make(name: str, width: int, most: int, seed: int = 0) -> nn.Module | None:
    """A learned plugin's parameters, at their initial values, for features of this width and at most so many rows that
    stay; None for a plugin that has none."""
    if not learned(name):
        return None
    with torch.random.fork_rng(devices=[]):  # nobody else's random numbers are shifted ...
        torch.default_generator.manual_seed(seed)  # ... nor a GPU's, which `torch.manual_seed` would seed too
        return entry(name).plugin(width, most)


def _heard(name: str, signals: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """The signals that plugin `name` looks at, in fp32."""
    absent = [signal for signal in needs(name) if signal not in signals]
    if absent:
        raise UserError(
            f"the plugin {name!r} needs {' and '.join(absent)} beside the features; "
            f"without: {', '.join(works_with(signals))}"
        )
    heard = {signal: signals[signal].detach().float() for signal in signals_of(name) if signal in signals}
    for signal, values in [*heard.items()]:
        if values.shape[:2] != shape or values.dim() > 3:
            raise UserError(f"{signal} must be {shape} as the features are, got {tuple(values.shape)}")
        heard[signal] = _checked(values.reshape(*shape, -1)).view_as(values)
    return heard


def _checked(features: Tensor) -> Tensor:
    """Finite features, and none so large or small that its square leaves fp32: such an image is scaled by a power of
    two, which is exact and which no plugin can tell."""
    largest = torch.maximum(features.amax((1, 2)), -features.amin((1, 2)))  # NaN wins in both
    exponents = [math.frexp(x)[1] if math.isfinite(x) else None for x in largest.tolist()]
    if None in exponents:
        said = "the image features hold NaN or infinite values: the vision tower or projector has diverged"
        raise NotFinite(said, exponents.index(None))
    if all(-30 <= e <= 30 for e in exponents):
        return features
    return torch.ldexp(features, -torch.tensor(exponents, device=features.device).clamp(-126, 126)[:, None, None])


def _counts(keep: float | None, count: int | Sequence[int] | None, candidates: list[int]) -> list[int]:
    if (keep is None) == (count is None):
        raise UserError("give either keep (a share) or count (a number of rows), not both")
    if 0 in candidates:
        raise UserError(f"image {candidates.index(0)} of the batch has no row that may be kept")
    if keep is not None:
        if not (math.isfinite(keep) and 0 < keep <= 1):
            raise UserError(f"keep = {keep}: the share of visual rows must be above 0 and at most 1")
        return [keep_count(keep, n) for n in candidates]
    counts = list(count) if isinstance(count, Sequence) else [count] * len(candidates)
    if not all(isinstance(c, int) for c in counts):
        raise UserError(f"count = {count}: must be a whole number, or one an image")
    if len(counts) != len(candidates):
        raise UserError(f"{len(counts)} counts for {len(candidates)} images")
    for wanted, n in zip(counts, candidates, strict=True):
        if not 1 <= wanted <= n:
            raise UserError(f"count = {wanted}: an image with {n} rows can keep 1 to {n} of them")
    return counts
