"""Pruning is one gather.

A *row* is (input embedding at i, target = token i + 1). Every row a step could use lives in one table

    table = [ embeddings of the ids (B * S) | image features, then video features (V) | isolator rows (L) ]

and a step is a list of indices into it: placeholders point at their image's features, pruned rows are left out,
isolator rows are put in front of each image. One `index_select` scatters, prunes and inserts at once, for any model
that marks image tokens with placeholder ids. What nobody points at is never made: a table holds the words that a step
reads and the feature rows that stay. (`index_select` and not `table[index]`: every image picks the same
isolator rows, and the backward of fancy indexing with repeats adds in a racing order.)

A whole video is one image here, with placeholders of its own kind. The table holds kind after kind and the text has
them in any order, so an image's number says where its features are, not which image of the text it is.

Targets are shifted before anything is dropped, so dropping rows cannot misalign labels. One row needs care: the last
row of an image may predict the first answer token (a caption right behind the picture). Its target belongs to
whichever row of that image is left last.

Positions: `original` leaves every kept row, and the text behind it, at its full-sequence position, isolator rows at
their image's first; `compact` renumbers kept rows 0, 1, 2 ... (the official code). With `original` the rotary distance
between a question and a patch is the same in fast and in full mode, which is most of what the modes disagree about.

Layouts: `padded` (B, S') to the right; `packed` (1, R), all samples end to end, with `cu_seqlens` saying where each
begins. In both the attention is causal within a sample, so a padded batch needs no mask: what is padded comes last and
no real row looks back at it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pruning import keep_count
from .scheduler import Plan
from .util.errors import UserError, unknown

IGNORE = -100
POSITIONS = ("compact", "original")
LAYOUTS = ("auto", "padded", "packed")  # auto: `attention.choose_layout` decides


@dataclass(frozen=True)
class Rows:
    """A list of R rows, sample after sample, in order."""

    source: Tensor  # (R,) into the table
    target: Tensor  # (R,) token to predict, or IGNORE
    position: Tensor  # (R,) rotary position
    sample: Tensor  # (R,) which sample of the batch
    image: Tensor  # (R,) which image of the table, -1 for text
    samples: int

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> Tensor:
        """(samples,): the rows of each."""
        return torch.bincount(self.sample, minlength=self.samples)

    @property
    def padded(self) -> int:
        """Slots of all samples, each as long as the longest."""
        return self.samples * int(self.lengths.max())


def full(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    placeholders: dict[str, int],
    lengths: dict[str, list[int]],
) -> Rows:
    """Every row of a batch (B, S), padding left out, wherever the padding was.

    `placeholders` is the token of each kind of image, `lengths` are the feature rows of each image of a kind, in order:
    images are cut apart by them, since two images may stand side by side. Their sum must equal the number of
    placeholders.
    """
    batch, width = input_ids.shape
    device = input_ids.device
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    real = mask.flatten().nonzero()[:, 0]
    token = input_ids.flatten()[real]
    source = real.clone()
    image = torch.full_like(source, -1)
    row, number = batch * width, 0  # of the table
    for kind, placeholder in placeholders.items():
        labels = labels.masked_fill(input_ids == placeholder, IGNORE)  # nobody is asked to say a placeholder
        visual = (token == placeholder).nonzero()[:, 0]
        sizes = torch.tensor(lengths[kind], dtype=torch.long)
        if len(visual) != sizes.sum():
            raise UserError(
                f"the batch holds {len(visual)} {kind} placeholder tokens, but its {len(sizes)} {kind}(s) give "
                f"{sizes.sum()} feature rows; was the text truncated, or made by another processor?"
            )
        source[visual] = torch.arange(row, row + len(visual), device=device)
        image[visual] = torch.arange(number, number + len(sizes)).repeat_interleave(sizes).to(device)
        row, number = row + len(visual), number + len(sizes)
    target = torch.full_like(labels, IGNORE)
    target[:, :-1] = labels[:, 1:].masked_fill(~mask[:, 1:], IGNORE)
    position = (mask.long().cumsum(1) - 1).flatten()[real]
    return Rows(source, target.flatten()[real], position, real // width, image, batch)


def elide(rows: Rows, labels: Tensor, stays: Tensor, positions: str) -> Rows:
    """The rows of a step that skips answer tokens (ReGATE, see `gating.py`): those with stays (B, S) = False.

    `rows` is `full` of the labels that stay. The row that predicts a skipped token leaves: it is no query, no key and
    has no loss. Where that row's own token is of the question (or a picture: a caption right behind it), the row stays
    and only its loss is gone, since nobody skips questions. So an answer of n tokens can lose n - 1 rows.

    The paper lets inactive tokens by-pass every block through the residual, neither queries nor keys. For the rows that
    are left that is the same, if all layers do it and positions are `original`. What differs: we take no loss of the
    by-passed rows, which would be the head on a bare embedding (whether the paper does, nobody says).
    """
    if stays.shape != labels.shape:
        raise UserError(f"which answers stay has shape {tuple(stays.shape)}, the labels {tuple(labels.shape)}")
    answer = labels != IGNORE
    gone = torch.zeros_like(answer)
    gone[:, :-1] = answer[:, :-1] & answer[:, 1:] & ~stays[:, 1:]
    text = rows.image < 0
    left = (~(text & gone.flatten()[rows.source.where(text, 0)])).nonzero()[:, 0]
    sample = rows.sample[left]
    position = rows.position[left] if positions == "original" else _counted(sample, rows.samples)
    return Rows(rows.source[left], rows.target[left], position, sample, rows.image[left], rows.samples)


def _counted(sample: Tensor, samples: int) -> Tensor:
    """0, 1, 2 ... in each sample."""
    lengths = torch.bincount(sample, minlength=samples)
    return torch.arange(len(sample), device=sample.device) - (lengths.cumsum(0) - lengths)[sample]


def answers_beside(rows: Rows, images: int) -> Tensor:
    """(images,): how many answer tokens the sample of each has."""
    answers = torch.bincount(rows.sample[rows.target != IGNORE], minlength=rows.samples)
    visual = rows.image >= 0
    sample = torch.zeros(images, dtype=torch.long, device=answers.device)
    return answers[sample.scatter_(0, rows.image[visual], rows.sample[visual])]


def prune(rows: Rows, kept: Tensor, isolator: int, words: int, positions: str) -> Rows:
    """The rows of a fast step, out of a table of what stays: [ `words` ids | kept feature rows | isolator rows ].

    `kept` (V,) says which feature rows stay; text rows always do. `isolator` rows are put in front of each image's.
    """
    if positions not in POSITIONS:
        raise unknown("positions", positions, POSITIONS)
    visual = rows.image >= 0
    begins = visual.clone()
    begins[1:] &= rows.image[1:] != rows.image[:-1]
    left = torch.cat([kept.new_ones(words), kept])
    stays, rank = left[rows.source], left.cumsum(0) - 1

    # How often each row is written: itself if it stays, and before an image's first row the isolator.
    times = stays.long() + begins * isolator
    origin = torch.arange(len(rows), device=times.device).repeat_interleave(times)
    nth = torch.arange(len(origin), device=times.device) - (times.cumsum(0) - times)[origin]
    isolating = begins[origin] & (nth < isolator)
    source = torch.where(isolating, words + kept.sum() + nth, rank[rows.source[origin]])
    image, sample = rows.image[origin], rows.sample[origin]

    # The target of an image's last row goes to the row of that image that is left last.
    ends = visual.clone()
    ends[:-1] &= rows.image[1:] != rows.image[:-1]
    image_target = rows.target[ends]
    nth_image = begins.cumsum(0) - 1  # of the text
    last = image >= 0
    last[:-1] &= image[1:] != image[:-1]
    target = rows.target[origin].masked_fill(image >= 0, IGNORE)
    target[last] = image_target[nth_image[origin[last]]]

    position = rows.position[origin] if positions == "original" else _counted(sample, rows.samples)
    return Rows(source, target, position, sample, image, rows.samples)


def looked_up(rows: Rows, words: int) -> tuple[Tensor, Rows]:
    """Which of the `words` ids these rows embed, and the rows as indices into a table that begins with those alone."""
    text = rows.source < words
    index = rows.source[text]
    return index, replace(rows, source=torch.where(text, text.cumsum(0) - 1, rows.source + (len(index) - words)))


@dataclass(frozen=True)
class Layout:
    """Where each row sits in the tensors the LLM sees."""

    index: Tensor  # (slots,) what to gather from the table
    position: Tensor  # (1 or B, slots per line)
    slot: Tensor  # (R,) where row r came to lie in the flattened (slots,)
    cu_seqlens: Tensor | None  # (B + 1,) int32, packed only
    longest: int  # rows of the longest sample


def lay_out(rows: Rows, layout: str) -> Layout:
    """Rows to (B, longest), padded to the right, or to (1, R), packed."""
    lengths = rows.lengths
    longest = int(lengths.max())
    starts = lengths.cumsum(0) - lengths
    if layout == "packed":
        slot = torch.arange(len(rows), device=lengths.device)
        cu_seqlens = torch.cat([starts, lengths.sum()[None]]).int()
        return Layout(rows.source, rows.position[None], slot, cu_seqlens, longest)
    if layout != "padded":
        raise unknown("layout", layout, ("packed", "padded"))
    slot = torch.arange(len(rows), device=lengths.device) - starts[rows.sample] + rows.sample * longest
    # Padding gathers table row 0 and sits at position 0: nothing reads what becomes of it, so its gradient is zero.
    index = torch.zeros(rows.samples * longest, dtype=torch.long, device=lengths.device).scatter_(0, slot, rows.source)
    position = torch.zeros_like(index).scatter_(0, slot, rows.position).view(rows.samples, longest)
    return Layout(index, position, slot, None, longest)


def plan_rows(text: int, images: list[int], plan: Plan, isolator: int) -> int:
    """Rows that the LLM sees of one sample, gradient or not: the larger of student and teacher."""
    if plan.mode != "fast":
        return text + sum(images)
    return text + sum(keep_count(plan.keep, n) + isolator for n in images)
