"""An `Example` is one conversation, tokenized, with its pictures; a `Source` has many of them; `collate` makes a batch.

Each picture's placeholder is already repeated once for each of its features. Labels are IGNORE outside of answers.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..rows import IGNORE

Sample = tuple[int, list[int], int]  # the lengths of an example: text tokens, visual tokens by picture, tokens to learn


@dataclass(frozen=True)
class Example:
    input_ids: Tensor  # (S,)
    labels: Tensor  # (S,)
    pixel_values: Tensor | None = None  # (images, 3, H, W), of LLaVA-NeXT (images, crops, 3, H, W)
    image_sizes: Tensor | None = None  # (images, 2), of LLaVA-NeXT: height and width before it was cut into crops
    tower_features: Tensor | None = None  # (images' crops, patches, width), instead of pixels: see feature_cache.py


class Source(Protocol):
    """Where examples come from. Example i must not depend on which others were made before it."""

    fingerprint: str  # changes with the data, so that a run is never resumed on other data by mistake

    def __len__(self) -> int: ...

    def lengths(self, i: int) -> Sample:
        """Known without decoding a picture: they decide how batches are cut and what losses are divided by."""

    def text(self, i: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of example i, without decoding a picture."""

    def example(self, i: int) -> Example: ...

    def where(self, i: int) -> str:
        """How the user calls example i, for errors."""


def collate(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """A batch such as transformers' processors make, padded on the right."""
    batch = {
        "input_ids": pad_sequence([e.input_ids for e in examples], batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(e.input_ids) for e in examples], batch_first=True),
        "labels": pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORE),
    }
    pictures = [picture for e in examples if e.pixel_values is not None for picture in e.pixel_values]
    if pictures:  # an image with fewer crops than another is filled up with black ones, which the model leaves out
        alike = len({picture.shape for picture in pictures}) == 1
        batch["pixel_values"] = torch.stack(pictures) if alike else pad_sequence(pictures, batch_first=True)
    for name in ("image_sizes", "tower_features"):
        parts = [getattr(e, name) for e in examples if getattr(e, name) is not None]
        if parts:
            batch[name] = torch.cat(parts)
    return batch
