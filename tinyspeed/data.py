"""Records -> examples -> batches of tensors.

An `Example` is one conversation, tokenised, with its pictures: placeholders already expanded to one id a feature row,
labels IGNORE wherever the model is not asked to speak.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .rows import IGNORE


@dataclass(frozen=True)
class Example:
    input_ids: Tensor  # (S,)
    labels: Tensor  # (S,)
    pixel_values: Tensor | None = None  # (images, 3, H, W)


class Source(Protocol):
    """Where examples come from. Example i must not depend on which others were made before it."""

    def __len__(self) -> int: ...

    def lengths(self, i: int) -> tuple[int, list[int]]:
        """Text rows, and visual rows of each image, without making the example: batches are cut by them."""

    def example(self, i: int) -> Example: ...


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
    pictures = [e.pixel_values for e in examples if e.pixel_values is not None]
    if pictures:
        batch["pixel_values"] = torch.cat(pictures)
    return batch
