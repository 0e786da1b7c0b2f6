"""Records -> examples -> batches of tensors.

An `Example` is one conversation, tokenised, with its pictures: placeholders already expanded to one id a feature row,
labels IGNORE wherever the model is not asked to speak.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..rows import IGNORE


@dataclass(frozen=True)
class Example:
    input_ids: Tensor  # (S,)
    labels: Tensor  # (S,)
    pixel_values: Tensor | None = None  # (images, 3, H, W), of LLaVA-NeXT (images, crops, 3, H, W)
    image_sizes: Tensor | None = None  # (images, 2), of LLaVA-NeXT: height and width before it was cut into crops
    tower_features: Tensor | None = None  # (images' crops, patches, width), instead of pixels: see `features.py`


class Source(Protocol):
    """Where examples come from. Example i must not depend on which others were made before it."""

    fingerprint: str  # changes when the data does: a run must not resume on other data in silence

    def __len__(self) -> int: ...

    def lengths(self, i: int) -> tuple[int, list[int], int]:
        """Text rows, visual rows of each image, and tokens to learn, without decoding a picture: micro-batches are cut
        by the rows, and losses divided by the tokens."""

    def text(self, i: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of example i, without decoding a picture."""

    def example(self, i: int) -> Example: ...

    def where(self, i: int) -> str:
        """How the user calls example i, in an error."""


def collate(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """Examples to a processor-style batch, padded to the right."""
    width = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), width), pad)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        ids[row, :n], labels[row, :n], mask[row, :n] = example.input_ids, example.labels, 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    pictures = [picture for e in examples if e.pixel_values is not None for picture in e.pixel_values]
    if pictures:  # an image with fewer crops than another is filled up with black ones, which the model leaves out
        alike = len({picture.shape for picture in pictures}) == 1
        batch["pixel_values"] = torch.stack(pictures) if alike else pad_sequence(pictures, batch_first=True)
    for name in ("image_sizes", "tower_features"):
        parts = [getattr(e, name) for e in examples if getattr(e, name) is not None]
        if parts:
            batch[name] = torch.cat(parts)
    return batch


Sample = tuple[int, list[int], int]  # text rows, visual rows of each image, tokens to learn
