"""LLaVA-NeXT: an image is its base view and a grid of crops, unpadded, with a newline row after each line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ...util import UserError
from ...util.sending import to_device
from .base import Family


class LlavaNext(Family):
    square = False

    @property
    def newline(self) -> nn.Parameter:
        return self.model.model.image_newline

    @property
    def _patches(self) -> int:
        """The number of feature rows of a crop."""
        return super().most_rows

    @property
    def most_rows(self) -> int:
        pixels = max(high * wide for high, wide in self.config.image_grid_pinpoints)
        return self._patches * (1 + pixels // self.config.vision_config.image_size**2)

    def connector(self) -> list[nn.Parameter]:
        return [*super().connector(), self.newline]

    def encode(self, visual: dict[str, Tensor], plan_mode: str) -> list[Tensor]:
        given = {name: visual.get(name) for name in ("pixel_values", "image_sizes")}
        if given["image_sizes"] is None:
            raise UserError(f"a {self.config.model_type!r} model needs image_sizes: pass the processor's whole batch")
        more = {name: visual[name] for name in ("batch_num_images",) if name in visual}
        with self._newline_for(plan_mode), self._packing():
            return list(self.model.get_image_features(**given, **more).pooler_output)

    def project(self, tower_features: Tensor, image_sizes: Tensor | None, plan_mode: str) -> list[Tensor]:
        with self._newline_for(plan_mode):
            return self._packed([self.projector(tower_features)], image_sizes, self.newline)

    def pack(self, values: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        return self._packed([values], image_sizes, values.new_zeros(values.shape[-1]))

    def _packed(self, crops: list[Tensor], image_sizes: Tensor, newline: Tensor) -> list[Tensor]:
        """Packs values (crops, patches, C) as transformers does, with one gather. Its own packing copies each image
        several times, and waits for the device."""
        table = torch.cat([newline[None].to(crops[0]), *(crop.flatten(0, 1) for crop in crops)])
        places = self._places(image_sizes)
        rows = table.index_select(0, to_device(torch.cat(places), table.device))
        return list(rows.split([len(place) for place in places]))

    def _places(self, image_sizes: Tensor) -> list[Tensor]:
        """For each row of each image, on the CPU: 0 for a newline, or 1 + its place among the patches of all crops.
        Transformers' own packing of these numbers says so."""
        shape = (self.config.image_grid_pinpoints, self.config.vision_config.image_size)
        crops, patches = [image_size_to_num_patches(size, *shape) for size in image_sizes], self._patches
        numbers = torch.arange(1, sum(crops) * patches + 1).view(-1, patches, 1).split(crops)
        how = (self.config.vision_feature_select_strategy, torch.zeros(1, dtype=torch.long))
        inner = self.model.model
        packed = type(inner).pack_image_features(inner, numbers, image_sizes, *how)[0]  # not `_packing`'s
        return [image[:, 0] for image in packed]

    @contextmanager
    def _packing(self) -> Iterator[None]:
        """Transformers' `get_image_features` calls `_packed` inside."""
        inner = self.model.model
        inner.pack_image_features = lambda crops, sizes, *more, **how: (self._packed(crops, sizes, self.newline), None)
        try:
            yield
        finally:
            del inner.pack_image_features

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
        images = [place > 0 for place in self._places(visual["image_sizes"])] if lengths["image"] else []
        return [*images, *super().shown(visual, lengths)[len(images) :]]
