"""Everything a training step knows about model classes; `loading.py` knows how they come from disk.

A `Family` is a thin adapter over a Hugging Face vision-language model whose processor marks images and videos with
placeholder ids. DualSpeed asks it for five things: features of the images, embeddings of the ids, which feature rows
may be pruned, hidden states of a list of rows, and logits. A new model family is one small subclass and a line in
`FAMILIES`; one whose positions are not a single number a row (Qwen-VL) overrides `hidden`.

The LLM runs with the attention function of `attention.py`, which is told a step's layout instead of guessing it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..rows import Layout
from ..util.errors import UserError
from . import attention


class Family:
    """LLaVA-1.5, and the base of the others."""

    square = True  # an image's rows are one square picture
    rowwise = True  # each feature is the projector's of one row of what it reads

    def __init__(self, model: nn.Module):
        # peft wraps the model; its base is the same modules with adapters in place.
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.model.config
        self.language_model.set_attn_implementation(attention.NAME)

    @property
    def tower(self) -> nn.Module:
        return self.model.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def placeholders(self) -> dict[str, int]:
        """The token that stands for one feature row, by kind, in the order of the table."""
        return {"image": self.config.image_token_id}

    @property
    def hidden_size(self) -> int:
        return self.config.text_config.hidden_size

    @property
    def most_rows(self) -> int:
        """Feature rows of the largest image."""
        return (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2

    def connector(self) -> list[nn.Parameter]:
        """The parameters between tower and LLM: what stage 1 trains, with the isolator."""
        return list(self.projector.parameters())

    def features(self, visual: dict[str, Tensor], plan_mode: str) -> dict[str, list[Tensor]]:
        """Projected features of the images and videos in a processor's batch."""
        features = {kind: [] for kind in self.placeholders}
        if "tower_features" in visual:
            features["image"] = self.project(visual["tower_features"], visual.get("image_sizes"), plan_mode)
        elif len(visual.get("pixel_values", ())):
            more = {name: visual[name] for name in ("batch_num_images",) if name in visual}
            features["image"] = self.encode(visual["pixel_values"], visual.get("image_sizes"), plan_mode, **more)
        if len(visual.get("pixel_values_videos", ())):
            if "video" not in features:
                raise UserError(f"a {self.config.model_type!r} model takes no videos, but the batch has some")
            features["video"] = self.encode_videos(visual["pixel_values_videos"], plan_mode)
        return features

    def encode(self, pixel_values: Tensor, image_sizes: Tensor | None, plan_mode: str, **more) -> list[Tensor]:
        """Projected features, one (rows, hidden) tensor an image."""
        return list(self.model.get_image_features(pixel_values=pixel_values).pooler_output)

    @property
    def looks_at(self) -> tuple:
        """Which of the tower's hidden states the projector reads."""
        return self.config.vision_feature_layer, self.config.vision_feature_select_strategy

    def look(self, pixel_values: Tensor, image_sizes: Tensor | None) -> Tensor:
        """What the projector reads of images (crops, patches, width): all that a frozen tower ever says about them."""
        read = []
        hook = self.projector.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        try:
            self.encode(pixel_values, image_sizes, "fast")
        finally:
            hook.remove()
        return read[0]

    def project(self, looked: Tensor, image_sizes: Tensor | None, plan_mode: str) -> list[Tensor]:
        """The rest of `encode`, for what `look` returned."""
        return list(self.projector(looked))

    def pack(self, values: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        """Values (crops, patches, C) beside what `look` sees, an image's as (rows, C) in the places of its features."""
        return list(values)

    def idle(self, features: dict[str, list[Tensor]], plan_mode: str) -> list[Tensor]:
        """Rows of the table that nothing picks, made of the connector's parts that the batch may not use: gradients
        are then zeros instead of missing, and which parameters a step touches depends on its plan alone."""
        if any(features.values()):
            return []
        like = self.model.get_input_embeddings().weight  # not the projector's: a 4-bit one stores bytes
        read = self.config.vision_feature_layer
        width = self.config.vision_config.hidden_size * (len(read) if isinstance(read, list | tuple) else 1)
        return [self.projector(torch.zeros(1, 1, width, dtype=like.dtype, device=like.device))[0]]

    def prunable(self, features: Tensor) -> Tensor:
        """Which feature rows of an image are pictures, and not structure."""
        return torch.ones(len(features), dtype=torch.bool, device=features.device)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(input_ids)

    def hidden(self, embeddings: Tensor, layout: Layout, layers: tuple[int, ...] | None) -> Tensor:
        """Last hidden states (slots, hidden) of rows laid out as `layout` says, through the LLM layers of the plan."""
        with self._running(layers):
            # Any 4-D mask keeps transformers from making one of its own; `rows_attention` does not look at it.
            out = self.language_model(
                inputs_embeds=embeddings.view(*layout.position.shape, -1),
                attention_mask=embeddings.new_ones(1, 1, 1, 1, dtype=torch.bool),
                position_ids=layout.position,
                use_cache=False,
                rows=layout,
            )
        return out.last_hidden_state.flatten(0, 1)

    @contextmanager
    def _running(self, layers: tuple[int, ...] | None) -> Iterator[None]:
        """The LLM with only these layers. They are skipped outside their own call, so no hook of theirs fires."""
        if layers is None:
            yield
            return
        every = self.language_model.layers
        if layers[-1] >= len(every):
            raise UserError(f"the plan runs layer {layers[-1]}, and the LLM has layers 0 to {len(every) - 1}")
        self.language_model.layers = nn.ModuleList(every[i] for i in layers)
        try:
            yield
        finally:
            self.language_model.layers = every

    def recompute(self, on: bool) -> None:
        """Whether forwards that follow recompute the LLM's activations, once checkpointing is enabled."""
        for layer in self.language_model.layers:
            layer.gradient_checkpointing = on

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)


class LlavaNext(Family):
    """LLaVA-NeXT: an image is its base view and a grid of crops, unpadded, with a newline row behind each line."""

    square = False

    @property
    def newline(self) -> nn.Parameter:
        return self.model.model.image_newline

    @property
    def most_rows(self) -> int:
        pixels = max(high * wide for high, wide in self.config.image_grid_pinpoints)
        return super().most_rows * (1 + pixels // self.config.vision_config.image_size**2)

    def connector(self) -> list[nn.Parameter]:
        return [*super().connector(), self.newline]

    def encode(self, pixel_values: Tensor, image_sizes: Tensor | None, plan_mode: str, **more) -> list[Tensor]:
        if image_sizes is None:
            raise UserError(f"a {self.config.model_type!r} model needs image_sizes: pass the processor's whole batch")
        with self._newline_for(plan_mode):
            out = self.model.get_image_features(pixel_values=pixel_values, image_sizes=image_sizes, **more)
        return list(out.pooler_output)

    def project(self, looked: Tensor, image_sizes: Tensor | None, plan_mode: str) -> list[Tensor]:
        with self._newline_for(plan_mode):
            return self._packed(self.projector(looked), image_sizes, self.newline)

    def pack(self, values: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        return self._packed(values, image_sizes, values.new_zeros(values.shape[-1]))

    def _packed(self, values: Tensor, image_sizes: Tensor, newline: Tensor) -> list[Tensor]:
        shape = (self.config.image_grid_pinpoints, self.config.vision_config.image_size)
        crops = values.split([image_size_to_num_patches(size, *shape) for size in image_sizes])
        strategy = self.config.vision_feature_select_strategy
        return self.model.model.pack_image_features(crops, image_sizes, strategy, image_newline=newline)[0]

    @contextmanager
    def _newline_for(self, plan_mode: str) -> Iterator[None]:
        """Fast plans drop every newline row, so the newline is no part of their graph."""
        was = self.newline.requires_grad
        self.newline.requires_grad_(was and plan_mode != "fast")
        try:
            yield
        finally:
            self.newline.requires_grad_(was)

    def idle(self, features: dict[str, list[Tensor]], plan_mode: str) -> list[Tensor]:
        more = [] if plan_mode == "fast" else [self.newline[None]]  # a video may have none
        return super().idle(features, plan_mode) + more

    def prunable(self, features: Tensor) -> Tensor:
        """Newline rows are structure. They are copies of the newline, so equality finds them wherever packing put them,
        and nothing else: a projected patch has other numbers."""
        return (features != self.newline.to(features.dtype)).any(-1)


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT with videos: pooled frames end to end, no newlines. (A learned pooling, which no published model has,
    would stay frozen.) And LLaVA-OneVision: it scales large images down, does not cut one of several in a sample into
    crops, and ends these and videos with a newline, in functions of its own."""

    rowwise = False  # some pool behind the projector

    @property
    def placeholders(self) -> dict[str, int]:
        return {**super().placeholders, "video": self.config.video_token_id}

    def encode_videos(self, pixel_values_videos: Tensor, plan_mode: str) -> list[Tensor]:
        """Projected features, one (rows, hidden) tensor a video."""
        with self._newline_for(plan_mode):
            out = self.model.get_video_features(pixel_values_videos=pixel_values_videos)
        return [video.reshape(-1, self.hidden_size) for video in out.pooler_output]


FAMILIES: dict[str, type[Family]] = {
    "llava": Family,
    "llava_next": LlavaNext,
    "llava_next_video": LlavaNextVideo,
    "llava_onevision": LlavaNextVideo,
}


def family(model: nn.Module) -> Family:
    """The adapter for a model, by its config's model_type."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UserError(f"tinyspeed cannot train a {kind!r} model yet; it knows {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind](model)
