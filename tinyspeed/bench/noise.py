"""Examples of any length, for models that nobody has trained: pictures of noise, and words at random.

Speed and memory ask how many rows there are, and nothing else. A LLaVA-NeXT picture has the rows that its size gives
it, so a size is looked for; where no picture has just so many rows it is the next smaller one, and more text.
"""

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from ..data.examples import Example, Sample
from ..rows import IGNORE
from ..util.errors import UserError


class Noise:
    """A `Source` of samples of these lengths, with one picture each, or none."""

    fingerprint = "noise"

    def __init__(self, config, samples: list[Sample]):
        if config.model_type not in ("llava", "llava_next"):
            raise UserError(f"benchmarks know LLaVA-1.5 and NeXT, not {config.model_type}")
        self.config = config
        pictures = _pictures(config)
        self.samples, self.sizes = zip(*(_fitted(sample, pictures) for sample in samples), strict=True)

    def __len__(self) -> int:
        return len(self.samples)

    def lengths(self, i: int) -> Sample:
        return self.samples[i]

    def text(self, i: int) -> tuple[Tensor, Tensor]:
        (text, images, answers), image = self.samples[i], self.config.image_token_id
        words = self.config.text_config.vocab_size - 1
        ids = torch.randint(words, (text + sum(images),), generator=torch.Generator().manual_seed(i))
        ids += ids >= image  # nobody says a placeholder
        ids[1 : sum(images) + 1] = image
        labels = ids.clone()
        labels[:-answers] = IGNORE
        return ids, labels

    def example(self, i: int) -> Example:
        size, side = self.sizes[i], self.config.vision_config.image_size
        if size is None:
            return Example(*self.text(i))
        draw = torch.Generator().manual_seed(i)
        if self.config.model_type == "llava":
            return Example(*self.text(i), torch.randn(1, 3, side, side, generator=draw))
        crops = image_size_to_num_patches(size, self.config.image_grid_pinpoints, side)
        return Example(*self.text(i), torch.randn(1, crops, 3, side, side, generator=draw), torch.tensor([size]))


Picture = tuple[int, tuple[int, int]]  # its rows; its height and width


def _fitted(sample: Sample, pictures: list[Picture]) -> tuple[Sample, tuple[int, int] | None]:
    """What such a sample can be, and the size of its picture."""
    text, images, answers = sample
    if not images:
        return sample, None
    rows, size = max((picture for picture in pictures if picture[0] <= sum(images)), default=(0, None))
    if not rows:
        raise UserError(f"no picture has {sum(images):,} rows or fewer")
    return (text + sum(images) - rows, [rows], answers), size


def _pictures(config) -> list[Picture]:
    """Of every number of rows: as large as the crops, or less in one direction."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    grids = getattr(config, "image_grid_pinpoints", None) or [(side, side)]
    lower = {(less, width) for height, width in grids for less in range(height, 0, -patch)}
    sizes = lower | {(height, less) for height, width in grids for less in range(width, 0, -patch)}
    return [(visual_rows(config, *size), size) for size in sizes]


def visual_rows(config, height: int, width: int) -> int:
    """Of a picture of this size."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if config.model_type == "llava":
        return side**2
    lines, columns = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, vision.image_size)
    left = unpad_image(torch.empty(1, side * lines, side * columns, device="meta"), (height, width))
    return side**2 + left.shape[1] * (left.shape[2] + 1)  # and a newline behind each line
