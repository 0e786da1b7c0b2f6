"""LLaVA-NeXT: an image is its base view and a grid of crops, unpadded, with a newline row after each line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ...util import UserError
from .base import Family


class LlavaNext(Family):
    square = False
    _how_packed = "vision_feature_select_strategy"  # a setting that transformers' packing asks for

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

    def project(self, tower_features: Tensor, image_sizes: Tensor | None, plan_mode: str) -> list[Tensor]:
        with self._newline_for(plan_mode):
            return self._packed(self.projector(tower_features), image_sizes, self.newline)

    def pack(self, values: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        return self._packed(values, image_sizes, values.new_zeros(values.shape[-1]))

    def _crops(self, visual: dict[str, Tensor]) -> list[int]:
        """The number of crops of each image."""
        shape = (self.config.image_grid_pinpoints, self.config.vision_config.image_size)
        return [image_size_to_num_patches(size, *shape) for size in visual["image_sizes"]]

    def _packed(
        self, values: Tensor, image_sizes: Tensor, newline: Tensor, crops: list[int] | None = None
    ) -> list[Tensor]:
        crops = values.split(crops or self._crops({"image_sizes": image_sizes}))
        how = {self._how_packed: getattr(self.config, self._how_packed), "image_newline": newline}
        return self.model.model.pack_image_features(crops, image_sizes, **how)[0]

    @contextmanager
    def _newline_for(self, plan_mode: str) -> Iterator[None]:
        """Keeps the newline out of a fast plan's graph, since fast plans drop every newline row."""
        was = self.newline.requires_grad
        self.newline.requires_grad_(was and plan_mode != "fast")
        try:
            yield
        finally:
            self.newline.requires_grad_(was)

    def zero_gradient_rows(self, features: dict[str, list[Tensor]], plan_mode: str) -> list[Tensor]:
        newline = [] if plan_mode == "fast" else [self.newline[None]]  # a batch of videos may have no newline
        return super().zero_gradient_rows(features, plan_mode) + newline

    def shown(self, visual: dict[str, Tensor], lengths: dict[str, list[int]]) -> list[Tensor]:
        """Newline rows are structure. Packing zeros of one channel with a newline of one shows where they are put."""
        masks = super().shown(visual, lengths)
        if lengths["image"]:
            crops, sizes = self._crops(visual), visual["image_sizes"]
            packed = self._packed(torch.zeros(sum(crops), super().most_rows, 1), sizes, torch.ones(1), crops)
            masks[: len(packed)] = [image[:, 0] == 0 for image in packed]
        return masks
