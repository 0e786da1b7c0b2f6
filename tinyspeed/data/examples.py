"""An `Example` is one conversation, tokenized, with its pictures; a `Source` has many of them; `collate` makes a batch.

The text that stands for a picture is already there, with an image token for each of its features. Labels are IGNORE
outside of answers.

Families put pictures into a batch in different ways: side by side (LLaVA), patch behind patch (Qwen), tile behind tile
(InternVL), filled up to the largest (Mistral). All of these are one rule: tensors stand end to end along their first
dimension, filled up with zeros in all others. SmolVLM and Idefics3 have a line of tiles for each sample instead, also
for one without pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ..rows import IGNORE

Sample = tuple[int, list[int], int]  # the lengths of an example: text tokens, visual tokens by picture, tokens to learn


@dataclass(frozen=True)
class Example:
    input_ids: Tensor  # (S,)
    labels: Tensor  # (S,)
    visual: Mapping[str, Tensor] = field(default_factory=dict)  # what the model gets of the pictures, by name


LINES = "pixel_attention_mask"  # a batch that has this has a line of tiles for each sample


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
    visual = [e.visual for e in examples if e.visual]
    if any(LINES in of for of in visual):
        none = {name: t[:1, :0] for name, t in visual[0].items()}
        visual = [e.visual or none for e in examples]
    return batch | (joined(visual) if visual else {})


def of_pictures(pictures: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a sample with these pictures, from those of each alone."""
    return joined(pictures, dim=int(LINES in pictures[0]))


def joined(parts: Sequence[Mapping[str, Tensor]], dim: int = 0) -> dict[str, Tensor]:
    """The tensors of each name end to end, filled up with zeros to the largest in every other dimension."""
    return {name: _joined([part[name] for part in parts], dim) for name in parts[0]}


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    largest = [max(sides) for sides in zip(*(t.shape for t in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        missing = [most - side for most, side in zip(largest, tensor.shape, strict=True)]
        missing[dim] = 0
        behind = [n for side in reversed(missing) for n in (0, side)]
        filled.append(functional.pad(tensor, behind) if any(missing) else tensor)
    return torch.cat(filled, dim)
