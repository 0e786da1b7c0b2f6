"""Mistral3 and Ministral 3: pictures of any size, with a text token behind every line of their rows.

The breaks are words of the text, so they stay when their line is pruned. They are few: one for each line of rows.
"""

import torch
from torch import Tensor

from ...util import UserError
from .base import Family


class Mistral3(Family):
    square = rowwise = False  # four patches make a row

    @property
    def most_rows(self) -> int:
        return super().most_rows // self.config.spatial_merge_size**2

    def encode(self, visual: dict[str, Tensor], plan_mode: str) -> list[Tensor]:
        if "image_sizes" not in visual:
            raise UserError(f"a {self.config.model_type!r} model needs image_sizes: pass the processor's whole batch")
        sizes = visual["image_sizes"].tolist()
        return list(self.model.get_image_features(visual["pixel_values"], sizes).pooler_output)

    def _projected_zeros(self, like: Tensor) -> Tensor:
        side = self.config.spatial_merge_size
        width, pixels = self.config.vision_config.hidden_size, side * self.config.vision_config.patch_size
        zeros = torch.zeros(side**2, width, dtype=like.dtype, device=like.device)
        return self.projector(zeros, [(pixels, pixels)])
