"""InternVL3 and 3.5, SmolVLM2 and Idefics3: an image is cut into crops, and the text says which belong together.

The processors' batches do not say how many crops an image has. InternVL writes all rows of an image in one run, between
`<img>` and `</img>`. SmolVLM and Idefics3 write a run for each crop, behind its name (`<row_1_col_2>`), and the whole
picture last (`<global-img>`): as a batch ends with such a run, the token before it is the name of the whole picture.

Crops are pruned together, as the views of a LLaVA-NeXT image are: K counts over the whole image, and the isolator comes
once. (Transformers drops SmolVLM's black crops from a batch, since padding looks the same.)
"""

import torch
from torch import Tensor

from ...util.sending import to_device
from .base import Family


def runs(input_ids: Tensor, placeholder: int) -> tuple[Tensor, Tensor]:
    """Of each run of placeholders in a batch (B, S): the token before it, or -1, and its length."""
    before = torch.nn.functional.pad(input_ids, (1, 0), value=-1)[:, :-1][input_ids == placeholder]
    begins = (before != placeholder).nonzero()[:, 0]
    ends = torch.cat([begins[1:], begins.new_tensor([len(before)])])
    return before[begins], ends - begins


class InternVL(Family):
    square = rowwise = False  # the crops' patches are shuffled before the projector

    @property
    def most_rows(self) -> int:
        return 13 * self._crop_rows  # of the published processors' 12 crops and the whole picture

    @property
    def _crop_rows(self) -> int:
        vision = self.config.vision_config
        side = vision.image_size[0] // vision.patch_size[0]
        return int(side**2 * self.config.downsample_ratio**2)

    def grouped(self, features: list[Tensor], input_ids: Tensor) -> list[Tensor]:
        return _joined(features, runs(input_ids, self.config.image_token_id)[1].tolist())

    def _zeros(self) -> tuple[int, ...]:
        return 1, 1, int(self.config.vision_config.hidden_size / self.config.downsample_ratio**2)


class SmolVLM(Family):
    tower_name, projector_name, language_name = "vision_model", "connector", "text_model"
    square = rowwise = False

    @property
    def most_rows(self) -> int:
        return 17 * self._crop_rows  # 4 x 4 crops and the whole picture

    @property
    def _crop_rows(self) -> int:
        return super().most_rows // self.config.scale_factor**2

    def encode(self, visual: dict[str, Tensor], plan_mode: str) -> list[Tensor]:
        pixels, mask = visual["pixel_values"], visual.get("pixel_attention_mask")
        mask = None if mask is None else to_device(mask, pixels.device)
        return list(self.model.get_image_features(pixels, mask).pooler_output)

    def grouped(self, features: list[Tensor], input_ids: Tensor) -> list[Tensor]:
        before, sizes = runs(input_ids, self.config.image_token_id)
        lasts = (before == before[-1:]).nonzero()[:, 0]
        return _joined(features, sizes.cumsum(0)[lasts].diff(prepend=sizes.new_zeros(1)).tolist())

    def _zeros(self) -> tuple[int, ...]:
        return 1, self.config.scale_factor**2, self.config.vision_config.hidden_size


def _joined(features: list[Tensor], sizes: list[int]) -> list[Tensor]:
    rows = torch.cat([part.flatten(0, -2) for part in features])
    # `rows.full` refuses a text that does not fit.
    return list(rows.split(sizes)) if sum(sizes) == len(rows) else features
