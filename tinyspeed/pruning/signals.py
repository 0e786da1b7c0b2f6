"""What a vision tower knows beside its features: the signals that some plugins need (`registry.py`).

    cls_attention_i = mean over heads of softmax_j( q_cls k_j / sqrt(d) )_i,  without [CLS] itself         (patches,)
    keys            = mean over heads of k_j                                                               (patches, d)
    tower           = what the projector reads                                                             (patches, C)

Hooks record all of them during the step's own forward: on q_proj and k_proj of one block, the one whose output the
projector reads, and on the projector. The tower is never asked for its attention maps, because then all of its blocks
would have to run eager attention. The attention of [CLS] is one row of one block: O(N C), where a block costs O(N C^2).

Each crop of an image (LLaVA-NeXT) has its own [CLS], and the rows of all crops are ranked together. So a crop of plain
sky has as much attention to distribute as a crop with the object, and as the base view, which shows both. The values go
through the model family's own packing, so that they are unpadded and in the same places as the features.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import pruning
from ..util import UserError

if TYPE_CHECKING:  # the models import the pruning room, and not the other way round
    from ..models.families import Family

KNOWN = ("cls_attention", "keys", "tower")
OF_ATTENTION = ("cls_attention", "keys")  # the tower must run for these


def require_signals(vlm: "Family", plugin: str) -> None:
    """Refuses a plugin that needs signals which this model does not have."""
    available = signals_of_model(vlm)
    missing = [signal for signal in pruning.entry(plugin).needs if signal not in available]
    if missing:
        reason = _why_no_attention(vlm) or "no vision tower has such a signal"
        if missing == ["tower"]:
            reason = "this model's features are not projected row by row"
        needs, others = " and ".join(missing), ", ".join(pruning.works_with(available))
        raise UserError(f"the plugin {plugin!r} needs {needs}, and {reason}; plugins that do without: {others}")


def signals_of_model(vlm: "Family") -> tuple[str, ...]:
    return ("tower",) * vlm.rowwise if _why_no_attention(vlm) else KNOWN


def _why_no_attention(vlm: "Family") -> str:
    """The reason why this model has no signals of attention; "" if it has them."""
    kind = vlm.config.vision_config.model_type
    if kind != "clip_vision_model":
        return f"a {kind!r} tower has no [CLS] whose attention is known here"
    layer, strategy = vlm.feature_source
    if not isinstance(layer, int) or _block(vlm) < 0:
        return f"the projector reads layers {layer}, not the output of one block"
    return "" if strategy == "default" else "the projector reads [CLS] as a row of the picture"


def _block(vlm: "Family") -> int:
    """The block whose output the projector reads. Hidden state 0 is the embeddings."""
    layer, blocks = vlm.feature_source[0], vlm.config.vision_config.num_hidden_layers
    return (layer if layer >= 0 else layer + blocks + 1) - 1


@contextmanager
def recording(vlm: "Family", visual: dict[str, Tensor], needs: Collection[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Records the signals `needs` of the forward that runs inside. When that is done the dictionary has each of them:
    for every image a (rows, C) tensor, with the rows of its features."""
    found: dict[str, list[Tensor]] = {}
    if not needs:
        yield found
        return
    of_attention = [name for name in needs if name in OF_ATTENTION]
    if of_attention and "tower_features" in visual:
        names, others = " and ".join(of_attention), ", ".join(pruning.works_with(("tower",)))
        mend = f"set data.feature_cache_gb = 0, or dualspeed.plugin to one of: {others}"
        raise UserError(f"the plugin needs {names}, which features that are cached on disk do not have: {mend}")
    if len(visual.get("pixel_values_videos", ())):
        names, others = " and ".join(needs), ", ".join(pruning.works_with(()))
        raise UserError(f"the plugin needs {names}, which videos do not have here; plugins that need none: {others}")
    recorded: dict[str, Tensor] = {}
    hooks = [vlm.projector.register_forward_pre_hook(lambda _, given: recorded.update(tower=given[0]))]
    if of_attention:
        block = getattr(vlm.tower, "vision_model", vlm.tower).encoder.layers[_block(vlm)].self_attn
        hooks += [
            block.q_proj.register_forward_hook(lambda _, given, out: recorded.update(q=out.detach()[:, :1])),
            block.k_proj.register_forward_hook(lambda _, given, out: recorded.update(k=out.detach())),
        ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    for name in needs:
        found[name] = []
        if not recorded:  # a batch without images
            continue
        if name == "tower":
            values = recorded["tower"]
        elif name == "keys":
            values = recorded["k"][:, 1:].unflatten(2, (block.num_heads, -1)).mean(2)
        else:
            values = cls_attention(recorded["q"], recorded["k"], block.num_heads)[..., None]
        packed = vlm.pack(values, visual.get("image_sizes"))
        found[name] = [image[:, 0] for image in packed] if name == "cls_attention" else packed


def cls_attention(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """(crops, patches): the attention of [CLS] to each patch, averaged over the heads. `q` (crops, 1, C) has the
    queries of [CLS], `k` (crops, 1 + patches, C) all keys."""
    q, k = (x.float().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
    with torch.autocast(q.device.type, enabled=False):
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0, 1:]
