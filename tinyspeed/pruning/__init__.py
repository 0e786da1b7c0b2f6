"""Which visual tokens a fast step sees: the plugins, and `select` and `choose`, which call them.

    index = pruning.select("divprune", features, keep=0.1)        # (B, N, D) -> (B, K) int64, ascending, unique
    kept = pruning.choose("tome", features, keep=0.1)             # the same index, and kept.weight (B, K, N)
    tokens = kept.weight @ features                               # what a merging plugin puts in their place

A plugin answers one question, "which K of these N tokens?", from the features, and from signals of the vision tower if
it declares that it needs some (`registry.py`). A merging plugin also returns a weight map: the K tokens are sums over
all N, and the index says where in the image they belong. A plugin never sees the sequence or the labels. Its features
are fp32 (in bf16 DivPrune picks only half of the same tokens) and have no graph. `chooser.py` computes the sums, and
`rows.py` cuts the sequence. What must hold for every plugin is done here: K = int(keep * N + 1e-6) and at least 1 (57
of 576, as in DualSpeed's code; official DivPrune rounds to 58), ascending order, masks and errors.

Images of different sizes share a batch by means of `mask`. Then each has its own K, and shorter lines of the index are
filled up with -1, which no gather accepts.

Each plugin has its own file, or shares one with its variants, and is written from its paper's description. The authors'
code is for non-commercial use only (DivPrune, ToMe), MIT (DynamicViT), or Apache-2.0 (CDPruner, FasterVLM, MMTok,
TokenLearner, VisionZip, VisPruner).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..util import NotFinite, UserError, require, require_known
from ..util.sending import to_device
from . import cls_attention, coverage, divprune, dpp, dynamicvit, pool, random_and_grid, tokenlearner, tome, visionzip  # noqa: F401
from .registry import Entry, entry, names, register, works_with
from .weights import WEIGHTS, cells, sizes

__all__ = [
    "WEIGHTS", "Kept", "cells", "choose", "entry", "keep_count", "make", "names", "register", "select", "works_with",
]  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What a plugin makes of a batch of images."""

    index: Tensor  # (B, K) int64, ascending; -1 beyond an image's count
    counts: Tensor  # (B,)
    weight: Tensor | None = None  # (B, K, N): token k is weight[k] @ features; None: token index[k] as it is
    loss: Tensor | None = None  # (B,) a learned plugin's own loss, to be added to the step's
    sizes: Tensor | None = None  # (B, K): how many tokens each stands for; None: 1


def keep_count(keep: float, n: int) -> int:
    """K for an image of n candidate tokens. The 1e-6 undoes rounding: 0.1 * 30 must give 3."""
    return max(1, int(keep * n + 1e-6))


@torch.no_grad()
def select(name: str, features: Tensor, **how) -> Tensor | tuple[Tensor, Tensor]:
    """The tokens that plugin `name` keeps of each image: (B, K), or ((B, K), counts (B,)) if there is a mask. If it
    merges, the tokens whose places its sums take. The settings are those of `choose`."""
    kept = choose(name, features, **how)
    return kept.index if how.get("mask") is None else (kept.index, kept.counts)


def choose(
    name: str,
    features: Tensor,
    *,
    keep: float | None = None,
    count: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    candidates: Sequence[int] | None = None,
    seed: int = 0,
    signals: Mapping[str, Tensor] | None = None,
    square: bool = True,
    module: nn.Module | None = None,
    weights: str = "none",
) -> Kept:
    """What plugin `name` makes of each image.

    Give either `keep`, a share, or `count`, an exact number (one for all images, or one for each, with `mask`).
    `mask` (B, N) says which tokens may be kept. `seed` is for plugins that draw. `signals`, each (B, N) or (B, N, C),
    are what some plugins need beside the features; a plugin ignores those that it did not declare. `square`: m * m
    tokens are one picture, m by m, and not several in one list. `module`: the learned plugin, by default a new one.
    `weights`: what the tokens that stay stand for (`weights.py`).

    `candidates`: how many tokens of each image the mask allows. A caller who knows need not wait for a GPU, and has to
    find out otherwise whether features or signals there are NaN or infinite.
    """
    found = entry(name)
    features = features.detach()
    shape = tuple(features.shape)
    fits = features.dim() == 3 and features.is_floating_point() and 0 not in shape
    require(fits, f"features must be a float tensor (images, tokens, width), got {shape}")
    require_known("kind of weights", weights, WEIGHTS)
    checked = candidates is None or features.device.type == "cpu"
    features = _in_range(features, checked)
    batch, n, width = shape
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, n)):
        raise UserError(f"mask must be bool, ({batch}, {n}) as the features are; got {mask.dtype}, {tuple(mask.shape)}")
    beside = _signals_for(name, signals or {}, (batch, n), checked)
    if candidates is None:
        candidates = [n] * batch if mask is None else mask.sum(1).tolist()
    counts = _counts(keep, count, [*candidates])
    if mask is None and len(set(counts)) > 1:
        raise UserError("images with different counts need a mask: the lines of their index have different lengths")
    most, counts_ = max(counts), to_device(torch.tensor(counts), features.device)
    beyond = torch.arange(most, device=features.device) >= counts_[:, None]
    valid = features.new_ones(batch, n, dtype=torch.bool) if mask is None else mask
    first = valid.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # the first candidates of each image
    keeps_all = [count == of for count, of in zip(counts, candidates, strict=True)]
    if all(keeps_all):
        return Kept(first.masked_fill(beyond, -1), counts_)
    plugin = found.plugin
    if found.learned:
        if module is None:
            module = _initialised(found, width, most, 0).to(features.device).eval()
        plugin = functools.partial(_in_fp32, module)
    # Autocast would compute the products in half precision.
    graph = found.learned and torch.is_grad_enabled()
    with torch.autocast(features.device.type, enabled=False), torch.set_grad_enabled(graph):
        how = {"sizes": [*zip(candidates, counts, strict=True)], "square": square, "seed": seed, **beside}
        made = plugin(features, most=most, valid=valid, counts=counts_, **how)
        index, weight, loss, *own = (made, None, None) if isinstance(made, Tensor) else made
        if weight is not None:
            require(bool(found.merges), f'the plugin {name!r} returns weights: register it with merges="features"')
            if any(keeps_all):  # the others are merged; these keep every token as it is
                stays = to_device(torch.tensor(keeps_all), index.device)[:, None]
                index = index.where(~stays, first)
                themselves = torch.zeros_like(weight).scatter_(2, first[:, :, None], 1.0)
                weight = weight.where(~stays[:, :, None], themselves)
        index, order = index.masked_fill(beyond, n).sort(dim=1)  # n sorts last ...
        index = index.masked_fill(beyond, -1)  # ... and -1 cannot be gathered by mistake
        if weight is not None:
            weight = weight.gather(1, order[:, :, None].expand_as(weight)).masked_fill(beyond[:, :, None], 0)
        if weights == "none":
            return Kept(index, counts_, weight, loss)
        if own and weights == "cells":
            stands_for = own[0].detach().gather(1, order).masked_fill(beyond, 0)
        else:
            stands_for = sizes(weights, features, valid, index, None if weight is None else weight.detach())
    return Kept(index, counts_, weight, loss, stands_for)


def _in_fp32(module: nn.Module, features: Tensor, **how):
    """Calls a learned plugin with fp32 copies of its parameters: those of a sharded model arrive in half precision."""
    parameters = {name: p.float() for name, p in module.named_parameters()}
    return torch.func.functional_call(module, parameters, (features,), how)


def make(name: str, width: int, most: int, seed: int = 0) -> nn.Module | None:
    """The parameters of a learned plugin at their initial values, for features of this width and images that keep at
    most so many tokens; None for a plugin without parameters."""
    found = entry(name)
    return _initialised(found, width, most, seed) if found.learned else None


def _initialised(found: Entry, width: int, most: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # leaves everybody else's random numbers as they were
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would also seed the GPUs
        return found.plugin(width, most)


def _signals_for(name: str, signals: Mapping[str, Tensor], shape: tuple[int, int], checked: bool) -> dict[str, Tensor]:
    """The signals that plugin `name` declared, in fp32."""
    found = entry(name)
    if missing := [signal for signal in found.needs if signal not in signals]:
        needs, others = " and ".join(missing), ", ".join(works_with(signals))
        raise UserError(f"the plugin {name!r} needs {needs} beside the features; without: {others}")
    beside = {}
    for signal in (*found.needs, *found.takes):
        if signal in signals:
            values = signals[signal].detach().float()
            fits = values.shape[:2] == shape and values.dim() <= 3
            require(fits, f"{signal} must be {shape} as the features are, got {tuple(values.shape)}")
            beside[signal] = _in_range(values.reshape(*shape, -1), checked).view_as(values)
    return beside


def _in_range(features: Tensor, checked: bool) -> Tensor:
    """The features in fp32. If squares of some would leave its range, each image is scaled by a power of two. That is
    exact, and no plugin's choice depends on the scale. If `checked`, NaN and infinite features are refused."""
    largest = torch.maximum(features.amax((1, 2)), -features.amin((1, 2))).float()  # NaN wins in both
    for image, size in enumerate(largest.tolist() if checked else ()):
        if not math.isfinite(size):
            said = "the image features hold NaN or infinite values: the vision tower or projector has diverged"
            raise NotFinite(said, image)
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    exponent = exponent.where((exponent.abs() > 30).any(), 0)
    return features.to(torch.float32, copy=True).ldexp_(-exponent[:, None, None])


def _counts(keep: float | None, count: int | Sequence[int] | None, candidates: list[int]) -> list[int]:
    if 0 in candidates:
        raise UserError(f"image {candidates.index(0)} of the batch has no token that may be kept")
    if keep is not None and count is None:
        require(0 < keep <= 1, f"keep = {keep}: the share of visual tokens must be above 0 and at most 1")
        return [keep_count(keep, n) for n in candidates]
    if keep is not None or count is None:
        raise UserError("give either keep (a share) or count (a number of tokens), not both")
    counts = list(count) if isinstance(count, Sequence) else [count] * len(candidates)
    require(all(isinstance(c, int) for c in counts), f"count = {count}: must be a whole number, or one for each image")
    require(len(counts) == len(candidates), f"{len(counts)} counts for {len(candidates)} images")
    for wanted, n in zip(counts, candidates, strict=True):
        require(1 <= wanted <= n, f"count = {wanted}: an image with {n} tokens can keep 1 to {n} of them")
    return counts
