"""Models with random weights, and examples of any length for them: pictures of noise, and random words.

Speed and memory depend on how many rows a sample has, and on nothing else. How many rows a LLaVA-NeXT picture has
follows from its size, so a size with the wanted number is searched. Where there is none, the picture is the next
smaller one, with more text to make up for it.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.models.llava_next import modeling_llava_next as anyres

from ..data.examples import Example, Sample
from ..rows import IGNORE
from ..util import UserError, require


def random_weights(config, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Returns an untrained model with this configuration."""
    torch.manual_seed(0)
    with device:
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)


class RandomExamples:
    """A `Source` of samples of these lengths, each with one picture or none."""

    def __init__(self, config, samples: list[Sample]):
        if config.model_type not in ("llava", "llava_next"):
            raise UserError(f"benchmarks know LLaVA-1.5 and NeXT, not {config.model_type}")
        self.config = config
        pictures = _picture_sizes(config)
        self.samples, self.sizes = zip(*(_fit(sample, pictures) for sample in samples), strict=True)

    def __len__(self) -> int:
        return len(self.samples)

    def lengths(self, i: int) -> Sample:
        return self.samples[i]

    def text(self, i: int) -> tuple[Tensor, Tensor]:
        (text, images, answers), image = self.samples[i], self.config.image_token_id
        words = self.config.text_config.vocab_size - 1
        ids = torch.randint(words, (text + sum(images),), generator=torch.Generator().manual_seed(i))
        ids += ids >= image  # the placeholder is no word
        ids[1 : sum(images) + 1] = image
        labels = ids.clone()
        labels[:-answers] = IGNORE
        return ids, labels

    def example(self, i: int) -> Example:
        size, side = self.sizes[i], self.config.vision_config.image_size
        if size is None:
            return Example(*self.text(i))
        crops, sizes = (), {}
        if self.config.model_type == "llava_next":
            crops = (anyres.image_size_to_num_patches(size, self.config.image_grid_pinpoints, side),)
            sizes = {"image_sizes": torch.tensor([size])}
        pixels = torch.randn(1, *crops, 3, side, side, generator=torch.Generator().manual_seed(i))
        return Example(*self.text(i), {"pixel_values": pixels, **sizes})


Picture = tuple[int, tuple[int, int]]  # its rows; its height and width


def _fit(sample: Sample, pictures: list[Picture]) -> tuple[Sample, tuple[int, int] | None]:
    """Returns the sample with a picture that exists, and that picture's size."""
    text, images, answers = sample
    if not images:
        return sample, None
    rows, size = max((picture for picture in pictures if picture[0] <= sum(images)), default=(0, None))
    require(rows > 0, f"no picture has {sum(images):,} rows or fewer")
    return (text + sum(images) - rows, [rows], answers), size


def _picture_sizes(config) -> list[Picture]:
    """Returns sizes with every possible number of rows: as large as a grid of crops, or smaller in one direction."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    grids = getattr(config, "image_grid_pinpoints", None) or [(side, side)]
    lower = {(less, width) for height, width in grids for less in range(height, 0, -patch)}
    sizes = lower | {(height, less) for height, width in grids for less in range(width, 0, -patch)}
    return [(visual_rows(config, *size), size) for size in sizes]


def visual_rows(config, height: int, width: int) -> int:
    """Returns the rows of a picture of this size."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if config.model_type == "llava":
        return side**2
    lines, columns = anyres.get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, vision.image_size)
    unpadded = anyres.unpad_image(torch.empty(1, side * lines, side * columns, device="meta"), (height, width))
    return side**2 + unpadded.shape[1] * (unpadded.shape[2] + 1)  # with a newline after each line
