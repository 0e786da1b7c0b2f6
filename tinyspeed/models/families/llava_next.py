"""LLaVA-NeXT: an image is its base view and a grid of crops, unpadded, with a newline row after each line."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ...util import UserError
from .base import Family


class LlavaNext(Family):
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

    def project(self, tower_features: Tensor, image_sizes: Tensor | None, plan_mode: str) -> list[Tensor]:
        with self._newline_for(plan_mode):
            return self._packed(self.projector(tower_features), image_sizes, self.newline)

    def pack(self, values: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        return self._packed(values, image_sizes, values.new_zeros(values.shape[-1]))

    def _packed(self, values: Tensor, image_sizes: Tensor, newline: Tensor) -> list[Tensor]:
        shape = (self.config.image_grid_pinpoints, self.config.vision_config.image_size)
        crops = values.split([image_size_to_num_patches(size, *shape) for size in image_sizes])
        strategy = self.config.vision_feature_select_strategy
        return self.model.model.pack_image_features(crops, image_sizes, strategy, image_newline=newline)[0]

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

    def prunable(self, features: Tensor) -> Tensor:
        """Newline rows are structure. They are copies of the newline, so comparing finds them wherever they were put,
        and nothing else: a projected patch has other numbers."""
        return (features != self.newline.to(features.dtype)).any(-1)
