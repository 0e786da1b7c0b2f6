"""What a training step needs to know about a model class: the base of all families, as LLaVA-1.5 needs it.

A `Family` is a thin adapter over a Hugging Face vision-language model whose processor marks images and videos with
placeholder ids. What DualSpeed needs of it above all: features of the images, which feature rows may be pruned, the
positions of the tokens, hidden states of a list of rows, and logits.

Features may be wider than the LLM: what stands behind the first `hidden_size` columns is added to the row's hidden
state behind the LLM's first layers (Qwen3-VL's deepstack). So whatever picks or merges rows does it to both.

The LLM runs with the attention function of `attention.py`, which is told a step's layout instead of guessing it.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...rows import Layout
from ...util import UserError, require
from .. import attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION = {"full_attention", "sliding_attention"}  # the kinds of layers that `attention.py` keeps to a sample


class Family:
    tower_name, projector_name, language_name = "vision_tower", "multi_modal_projector", "language_model"
    square = True  # the rows of an image form one square picture
    rowwise = True  # the projector makes each feature from a single row of its input
    whole_images = False  # the rows of an image see all of it, also what comes after them
    filler: int | None = None  # the token of a row that is none, where the LLM's layers look up the tokens
    first_layers = 0  # how many layers of the LLM may not be skipped, because features are added behind them

    def __init__(self, model: nn.Module):
        # peft wraps the model; its base is the same modules with adapters in place.
        self.model: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config: PreTrainedConfig = self.model.config
        self.hidden_size: int = self.config.text_config.hidden_size
        self.tower: PreTrainedModel = self.model.model.get_submodule(self.tower_name)
        self.projector: nn.Module = self.model.model.get_submodule(self.projector_name)
        self.language_model: PreTrainedModel = self.model.model.get_submodule(self.language_name)
        self.language_model.set_attn_implementation(attention.NAME)

    @classmethod
    def unquantised(cls) -> list[str]:
        """The modules that stay as they are when the LLM's layers are quantised."""
        return [f"model.{cls.tower_name}", f"model.{cls.projector_name}", "lm_head"]

    @property
    def placeholders(self) -> dict[str, int]:
        """The token that stands for one feature row, by kind, in the order of the table."""
        return {"image": self.config.image_token_id}

    @property
    def most_rows(self) -> int:
        """The number of feature rows of the largest image."""
        return (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2

    @property
    def projectors(self) -> list[nn.Module]:
        """The modules between tower and LLM."""
        return [self.projector]

    def connector(self) -> list[nn.Parameter]:
        """The parameters between tower and LLM: stage 1 trains these and the isolator."""
        return [parameter for module in self.projectors for parameter in module.parameters()]

    def frozen_tower(self) -> list[nn.Parameter]:
        """The tower's parameters, less those of a projector that is part of its module."""
        trained = {id(parameter) for parameter in self.connector()}
        return [parameter for parameter in self.tower.parameters() if id(parameter) not in trained]

    def features(
        self, visual: dict[str, Tensor], plan_mode: str, input_ids: Tensor | None = None
    ) -> dict[str, list[Tensor]]:
        """The projected features of the images and videos in a processor's batch."""
        features = {kind: [] for kind in self.placeholders}
        if "tower_features" in visual:
            features["image"] = self.project(visual["tower_features"], visual.get("image_sizes"), plan_mode)
        elif len(visual.get("pixel_values", ())):
            features["image"] = self.grouped(self.encode(visual, plan_mode), input_ids)
        if len(visual.get("pixel_values_videos", ())):
            require("video" in features, f"a {self.config.model_type!r} model takes no videos, but the batch has some")
            features["video"] = self.encode_videos(visual, plan_mode)
        return features

    def encode(self, visual: dict[str, Tensor], plan_mode: str) -> list[Tensor]:
        """Returns the projected features of each image as a (rows, hidden) tensor."""
        return list(self.model.get_image_features(pixel_values=visual["pixel_values"]).pooler_output)

    def grouped(self, features: list[Tensor], input_ids: Tensor | None) -> list[Tensor]:
        """Joins what `encode` returned to one tensor for each image, if it did not."""
        return features

    @property
    def feature_source(self) -> tuple:
        """Which of the tower's hidden states the projector reads, and whether CLS is among its rows."""
        return self.config.vision_feature_layer, self.config.vision_feature_select_strategy

    def tower_features(self, pixel_values: Tensor, image_sizes: Tensor | None) -> Tensor:
        """Returns the projector's input (crops, patches, width): all that a frozen tower says about the images."""
        read = []
        hook = self.projector.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        try:
            self.encode({"pixel_values": pixel_values, "image_sizes": image_sizes}, "fast")
        finally:
            hook.remove()
        return read[0]

    def project(self, tower_features: Tensor, image_sizes: Tensor | None, plan_mode: str) -> list[Tensor]:
        """Does the rest of `encode`, from what `tower_features` returned."""
        return list(self.projector(tower_features))

    def pack(self, values: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        """Arranges values (crops, patches, C) as the features of each image are arranged: (rows, C) per image."""
        return list(values)

    def zero_gradient_rows(self, features: dict[str, list[Tensor]], plan_mode: str) -> list[Tensor]:
        """Table rows that nothing picks, made by those parts of the connector that the batch may not use. These parts
        then get zeros as gradients instead of none, and which parameters a step touches depends on its plan alone."""
        if any(features.values()):
            return []
        like = self.model.get_input_embeddings().weight  # not the projector's: a 4-bit one stores bytes
        return [self._projected_zeros(like)]

    def _projected_zeros(self, like: Tensor) -> Tensor:
        """A row or more (rows, hidden) that the projectors make of zeros."""
        return self.projector(torch.zeros(*self._zeros(), dtype=like.dtype, device=like.device))[0]

    def _zeros(self) -> tuple[int, ...]:
        """The shape of the least that the projector reads."""
        layer = self.config.vision_feature_layer
        return 1, 1, self.config.vision_config.hidden_size * (len(layer) if isinstance(layer, list | tuple) else 1)

    def shown(self, visual: dict[str, Tensor], lengths: dict[str, list[int]]) -> list[Tensor]:
        """Which feature rows of each image show the picture; the others mark its structure. Known on the CPU, from
        `lengths`, the number of rows of each image by kind, and the sizes in a processor's batch."""
        return [torch.ones(n, dtype=torch.bool) for of in lengths.values() for n in of]

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, visual: dict[str, Tensor]) -> Tensor | None:
        """The positions (B, S, 3) of a batch's tokens, on the CPU; None if they are numbered 0, 1, 2 ..."""
        return None

    @property
    def why_padded(self) -> str:
        """Why samples may not stand end to end in one sequence of this LLM; "" if they may."""
        others = {*(getattr(self.config.text_config, "layer_types", None) or ())} - ATTENTION
        carry = "would carry what they know of one sample into the next"
        return f"the {', '.join(sorted(others))} layers of this LLM {carry}" if others else ""

    def layout_for(self, layout: str) -> str:
        """The layout to use where this one is asked for."""
        why = self.why_padded
        require(layout != "packed" or not why, f'layout = "packed": {why}; choose "padded" or "auto"')
        return "padded" if why else layout

    def hidden(self, embeddings: Tensor, layout: Layout, layers: tuple[int, ...] | None, **more) -> Tensor:
        """Returns the last hidden states (slots, hidden) of rows in this layout, after the LLM layers of the plan."""
        position = layout.position
        with self._only_layers(layers):
            out = self.language_model(
                inputs_embeds=embeddings.view(*position.shape[:2], -1),
                attention_mask=self.mask(layout),
                position_ids=position.movedim(2, 0) if position.dim() == 3 else position,
                use_cache=False,
                rows=layout,
                **more,
            )
        return out.last_hidden_state.flatten(0, 1)

    def mask(self, layout: Layout) -> Tensor | dict[str, Tensor]:
        """What the LLM is given as its mask. With any 4-D mask transformers makes none of its own; `rows_attention`
        ignores this one."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.index.device)

    @contextmanager
    def _only_layers(self, layers: tuple[int, ...] | None) -> Iterator[None]:
        """Runs the LLM with these layers only. The others are not called at all, so none of their hooks fires."""
        every = self.language_model.layers
        if layers is not None:
            if layers[-1] >= len(every):
                raise UserError(f"the plan runs layer {layers[-1]}, and the LLM has layers 0 to {len(every) - 1}")
            self.require_skippable({*range(len(every))} - {*layers})
            self.language_model.layers = nn.ModuleList(every[i] for i in layers)
        try:
            yield
        finally:
            self.language_model.layers = every

    def require_skippable(self, layers: Collection[int]) -> None:
        """Refuses to skip one of these layers if others would then do another layer's work."""
        kinds = {*(getattr(self.config.text_config, "layer_types", None) or ())}
        what = (
            f"the layers of a {self.config.model_type!r} model's LLM are of several kinds ({', '.join(sorted(kinds))})"
        )
        require(len(kinds) < 2 or not layers, f"{what}, and such layers cannot be skipped: set sts.skip = 0")
        what = f"the first {self.first_layers} layers of the LLM take in what the tower's earlier layers see"
        safe = min(layers, default=self.first_layers) >= self.first_layers
        require(safe, f"{what}: set sts.protect_first = {self.first_layers}, or sts.skip = 0")

    def recompute(self, on: bool) -> None:
        """Sets whether the next forwards recompute the LLM's activations; checkpointing must have been enabled."""
        for layer in self.language_model.layers:
            layer.gradient_checkpointing = on

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)
