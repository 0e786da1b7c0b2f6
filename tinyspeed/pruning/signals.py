"""What a vision tower knows beside its features: signals for the plugins that need some (`pruning/registry.py`).

    cls_attention_i = mean over heads of softmax_j( q_cls k_j / sqrt(d) )_i,  [CLS] itself left out        (patches,)
    keys            = mean over heads of k_j                                                               (patches, d)
    tower           = what the projector reads                                                             (patches, C)

All are overheard while the step's own forward runs: hooks on q_proj and k_proj of one block, the one whose output the
projector reads, and on the projector. The tower is never asked for its attention maps: that would force eager attention
on all of its blocks, and [CLS] has one row of one block, O(N C) beside a block's O(N C^2).

Of an image's crops (LLaVA-NeXT), each has a [CLS] of its own, and all their rows are ranked together: a crop of plain
sky has about as much attention to give as one with the object in it, and as the base view, which sees both. The values
go through the family's own packing, and so come unpadded and in the places of the features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import pruning
from ..util.errors import UserError

if TYPE_CHECKING:  # the rooms above know this one, not the other way round
    from ..models.families import Family

KNOWN = ("cls_attention", "keys", "tower")
ATTENDED = ("cls_attention", "keys")  # which need the tower to run


def require_signals(vlm: "Family", plugin: str) -> None:
    """Refuse a plugin whose signals this model cannot give."""
    given = gives(vlm)
    missing = [signal for signal in pruning.needs(plugin) if signal not in given]
    unknown = [signal for signal in missing if signal not in KNOWN]
    if unknown:
        raise UserError(f"the plugin {plugin!r} needs {unknown[0]}, which is no signal of a vision tower")
    if missing:
        needs, others = " and ".join(missing), ", ".join(pruning.works_with(given))
        reason = "this model's features are not projected row by row" if missing == ["tower"] else _lacks(vlm)
        raise UserError(f"the plugin {plugin!r} needs {needs}, and {reason}; plugins that do without: {others}")


def gives(vlm: "Family") -> tuple[str, ...]:
    """The signals of this model."""
    return ("tower",) * vlm.rowwise if _lacks(vlm) else KNOWN


def _lacks(vlm: "Family") -> str:
    """Why nobody can be heard attending in this model; "" if they can."""
    layer, strategy = vlm.feature_source
    kind = vlm.config.vision_config.model_type
    if kind != "clip_vision_model":
        return f"a {kind!r} tower has no [CLS] whose attention is known here"
    if not isinstance(layer, int) or _block(vlm) < 0:
        return f"the projector reads layers {layer}, not the output of one block"
    return "" if strategy == "default" else "the projector reads [CLS] as a row of the picture"


def _block(vlm: "Family") -> int:
    """The block whose output the projector reads. Hidden states are numbered from the embeddings on."""
    layer, blocks = vlm.feature_source[0], vlm.config.vision_config.num_hidden_layers
    return (layer if layer >= 0 else layer + blocks + 1) - 1


@contextmanager
def heard(vlm: "Family", visual: dict[str, Tensor], needs: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The signals `needs` of the forward that runs inside, there once it has: of each image a (rows, C) tensor with the
    rows of its features."""
    found: dict[str, list[Tensor]] = {}
    if not needs:
        yield found
        return
    attended = [name for name in needs if name in ATTENDED]
    if attended and "tower_features" in visual:
        raise UserError(
            f"the plugin needs {' and '.join(attended)}, and features kept on disk come without: set "
            "data.feature_cache_gb = 0, or dualspeed.plugin to one of: " + ", ".join(pruning.works_with(("tower",)))
        )
    if len(visual.get("pixel_values_videos", ())):
        raise UserError(
            f"the plugin needs {' and '.join(needs)}, which videos do not have here; "
            f"plugins that need none: {', '.join(pruning.works_with(()))}"
        )
    said: dict[str, Tensor] = {}
    hooks = [vlm.projector.register_forward_pre_hook(lambda _, given: said.update(tower=given[0]))]
    if attended:
        attention = getattr(vlm.tower, "vision_model", vlm.tower).encoder.layers[_block(vlm)].self_attn
        hooks.append(attention.q_proj.register_forward_hook(lambda _, given, out: said.update(q=out.detach()[:, :1])))
        hooks.append(attention.k_proj.register_forward_hook(lambda _, given, out: said.update(k=out.detach())))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    for name in needs:  # nothing is said of a batch without pictures
        found[name] = []
        if said and name == "cls_attention":
            rows = cls_attention(said["q"], said["k"], attention.num_heads)[..., None]
            found[name] = [r[:, 0] for r in vlm.pack(rows, visual.get("image_sizes"))]
        elif said:
            rows = said["k"][:, 1:].unflatten(2, (attention.num_heads, -1)).mean(2) if name == "keys" else said["tower"]
            found[name] = vlm.pack(rows, visual.get("image_sizes"))


def cls_attention(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """(crops, patches): how much of its attention [CLS], of queries q (crops, 1, C), pays each patch behind it, of keys
    k (crops, 1 + patches, C), on the average of its heads."""
    q, k = (x.float().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
    with torch.autocast(q.device.type, enabled=False):
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0, 1:]
