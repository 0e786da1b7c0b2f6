"""Pruning is one gather.

A *row* is a token's place in the sequence that the LLM runs on: the input embedding at i, and as its target the token
at i + 1, if that is part of an answer. Everything that can be an input is in one table

    table = [ embeddings of the token ids (B * S) | image features, then video features (V) | isolator (L) ]

and a step is a list of indices into it. Placeholder tokens point at the features of their image, pruned rows are left
out, and the isolator rows come in front of each image. So one `index_select` inserts the features, prunes them and adds
the isolator, for any model that marks images with placeholder tokens. The step builds only the part of the table that
it reads: the embeddings of its words, the features that it keeps, and the isolator. (`index_select` and not
`table[index]`: all images use the same isolator rows, and the backward of indexing adds up the gradients of a repeated
index in an order that varies.)

A whole video counts as one image, with placeholders of its own kind. The table has all images before all videos and the
text may mix them, so an image's number says where its features are in the table, and not which image of the text it is.
Text may stand amid an image's rows (line breaks, the names of tiles); the isolator comes in front of the first of them.

Targets are shifted before any row is dropped, so pruning cannot misalign labels. One row needs care: the last row of an
image may predict the first answer token (a caption right behind it). Its target moves to the last row before it that
stays.

Positions: with `original`, kept rows and the text after them keep their positions in the full sequence, and isolator
rows have the position of their image's first row. `compact` numbers the rows that are left 0, 1, 2 ... With `original`
the rotary distance between a question and an image token is the same in fast and full mode. With `compact` it is not,
and that is most of what the two modes disagree about. A position is one number, or three (time, height, width).

The CPU computes the rows, so that no step waits for a GPU. It knows how many features of each image a plugin keeps, and
the table has these side by side. Which ones they are matters only for `original` positions, so those alone are looked
up on the device; and for images with text between their rows, for which the CPU waits.

Layouts: `padded` is (B, S') with padding on the right. `packed` is (1, R), all samples end to end, and `cu_seqlens`
says where each begins. Attention is causal within a sample in both. So a padded batch needs no mask: padding comes
last, and no real row looks ahead.

What differs from the official code: it cuts and joins embeddings and labels in a Python loop over samples, and its
positions are `compact`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pruning import keep_count
from .scheduler import Plan
from .util import UserError, require, require_known
from .util.sending import to_device

IGNORE = -100
POSITIONS = ("compact", "original")
LAYOUTS = ("auto", "padded", "packed")  # auto: `attention.choose_layout` decides


@dataclass(frozen=True)
class Rows:
    """A list of R rows, sample after sample, in order."""

    source: Tensor  # (R,) index into the table
    target: Tensor  # (R,) token to predict, or IGNORE
    position: Tensor  # (R,) or (R, 3) rotary position; on the device if it depends on what a plugin chose
    sample: Tensor  # (R,) which sample of the batch
    image: Tensor  # (R,) which image of the table, -1 for text
    samples: int
    weight: Tensor | None = None  # (R,), on the device: what attention adds to this row's scores as a key; None: 0

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> Tensor:
        """(samples,): the number of rows of each."""
        return torch.bincount(self.sample, minlength=self.samples)


def full(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    placeholders: dict[str, int],
    lengths: dict[str, list[int]],
    positions: Tensor | None = None,
) -> Rows:
    """All rows of a batch (B, S) without its padding, which may be on either side.

    `placeholders` has the placeholder token of each kind of image, `lengths` the number of feature rows of each image,
    by kind and in order. Two images may stand side by side, so the lengths say where one ends, and their sum must be
    the number of placeholders. Without `positions` (B, S) or (B, S, 3), each sample is numbered 0, 1, 2 ...
    """
    batch, width = input_ids.shape
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    real = mask.flatten().nonzero()[:, 0]
    token = input_ids.flatten()[real]
    source = real.clone()
    image = torch.full_like(source, -1)
    row, number = batch * width, 0  # the next feature row and image of the table
    for kind, placeholder in placeholders.items():
        labels = labels.masked_fill(input_ids == placeholder, IGNORE)  # a placeholder is never an answer
        visual = (token == placeholder).nonzero()[:, 0]
        sizes = torch.tensor(lengths[kind], dtype=torch.long)
        given = f"its {len(sizes)} {kind}(s) give {sizes.sum()} feature rows"
        what = f"the batch holds {len(visual)} {kind} placeholder tokens, but {given}"
        require(len(visual) == int(sizes.sum()), f"{what}; was the text truncated, or made by another processor?")
        source[visual] = torch.arange(row, row + len(visual))
        image[visual] = torch.arange(number, number + len(sizes)).repeat_interleave(sizes)
        row, number = row + len(visual), number + len(sizes)
    target = torch.full_like(labels, IGNORE)
    target[:, :-1] = labels[:, 1:].masked_fill(~mask[:, 1:], IGNORE)
    positions = mask.long().cumsum(1) - 1 if positions is None else positions
    return Rows(source, target.flatten()[real], positions.flatten(0, 1)[real], real // width, image, batch)


def skip_answers(rows: Rows, labels: Tensor, stays: Tensor, positions: str) -> Rows:
    """The rows of a step that skips answer tokens (`regate.py`): those with `stays` (B, S) = False.

    `rows` comes from `full` with the labels of the tokens that stay. The row that predicts a skipped token is removed
    if its own token is an answer too. If that is part of the question or an image, the row stays and only its target
    is gone. So an answer of n tokens can lose n - 1 rows.
    """
    if stays.shape != labels.shape:
        raise UserError(f"which answers stay has shape {tuple(stays.shape)}, the labels {tuple(labels.shape)}")
    answer = labels != IGNORE
    skipped = torch.zeros_like(answer)
    skipped[:, :-1] = answer[:, :-1] & answer[:, 1:] & ~stays[:, 1:]
    text = rows.image < 0
    left = (~(text & skipped.flatten()[rows.source.where(text, 0)])).nonzero()[:, 0]
    return _take(rows, left, positions)


def prune(
    rows: Rows, kept: Tensor, isolator: int, words: int, positions: str, chosen: Tensor | None = None,
    weight: Tensor | None = None,
) -> Rows:  # fmt: skip
    """The rows of a fast step, as indices into a smaller table: [ `words` embeddings | kept features | isolator ].

    `kept` (V,) says which features stay. All text rows stay. `isolator` rows come in front of each image's rows. If
    only the device knows which features stay, `kept` says how many of each image do, any of them, and `chosen` (K,)
    has, on the device, those that do, in ascending order. `weight` (K,), there too: see `Rows`. Where text stands amid
    an image's rows, the order of the rows depends on which stay, so the CPU has to wait for `chosen`.
    """
    visual = (rows.image >= 0).nonzero()[:, 0]
    number = rows.image[visual]
    begins = torch.ones_like(number, dtype=torch.bool)
    begins[1:] = number[1:] != number[:-1]
    first = torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, visual[begins], True)  # of each image
    if chosen is not None and (visual.diff() > 1)[~begins[1:]].any():
        kept, chosen = torch.zeros_like(kept).index_fill_(0, chosen.cpu(), True), None
    in_table = torch.cat([kept.new_ones(words), kept])
    stays, rank = in_table[rows.source], in_table.cumsum(0) - 1

    # How often each row is written: once if it stays, and an image's first row once more for each isolator row.
    times = stays.long() + first * isolator
    origin = torch.arange(len(rows)).repeat_interleave(times)
    nth = torch.arange(len(origin)) - (times.cumsum(0) - times)[origin]
    isolating = first[origin] & (nth < isolator)
    run = _take(rows, origin, positions)
    source = torch.where(isolating, words + kept.sum() + nth, rank[run.source])
    target = run.target.masked_fill(run.image >= 0, IGNORE)
    shown = visual[rows.target[visual] != IGNORE]  # an image's last row, if an answer follows
    target[times.cumsum(0)[shown] - 1] = rows.target[shown]
    position = run.position
    if chosen is not None and len(chosen) and positions == "original":
        feature = (source - words).clamp(0, len(chosen) - 1)
        place = position.new_zeros(len(kept), *position.shape[1:])  # of each feature in its sample
        place[rows.source[visual] - words] = rows.position[visual]
        sent = (to_device(x, chosen.device) for x in (place, feature, (run.image >= 0) & ~isolating, position))
        place, feature, is_feature, position = sent
        position = place[chosen][feature].where(is_feature.view(-1, *[1] * (position.dim() - 1)), position)
    if weight is not None:
        weight = torch.cat([weight.new_zeros(words), weight, weight.new_zeros(isolator)])
        weight = weight.index_select(0, to_device(source, weight.device))
    return replace(run, source=source, target=target, position=position, weight=weight)


def _take(rows: Rows, index: Tensor, positions: str) -> Rows:
    """The rows at `index`, with the positions that they have, or numbered 0, 1, 2 ... in each sample."""
    require_known("positions", positions, POSITIONS)
    position, sample = rows.position[index], rows.sample[index]
    if positions == "compact":
        lengths = torch.bincount(sample, minlength=rows.samples)
        position = torch.arange(len(sample)) - (lengths.cumsum(0) - lengths)[sample]
    return Rows(rows.source[index], rows.target[index], position, sample, rows.image[index], rows.samples)


def used_words(rows: Rows, words: int) -> tuple[Tensor, Rows]:
    """Which of the `words` token ids these rows read, and the rows as indices into a table with no other embeddings."""
    text = rows.source < words
    index = rows.source[text]
    return index, replace(rows, source=torch.where(text, text.cumsum(0) - 1, rows.source + (len(index) - words)))


def answers_per_image(rows: Rows, images: int) -> Tensor:
    """(images,): the number of answer tokens in the sample of each image."""
    answers = torch.bincount(rows.sample[rows.target != IGNORE], minlength=rows.samples)
    visual = rows.image >= 0
    sample = torch.zeros(images, dtype=torch.long)
    return answers[sample.scatter_(0, rows.image[visual], rows.sample[visual])]


@dataclass(frozen=True)
class Layout:
    """Where each row is in the tensors that the LLM sees. Of the tensors, `slot` alone is on the CPU."""

    index: Tensor  # (slots,) what to gather from the table
    position: Tensor  # (1 or B, slots per line) or (1 or B, slots per line, 3)
    slot: Tensor  # (R,) the place of each row in the flattened (slots,)
    cu_seqlens: Tensor | None  # (B + 1,) int32, packed only
    longest: int  # rows of the longest sample
    borders: list[int] | None  # cu_seqlens on the CPU
    weight: Tensor | None = None  # (1 or B, slots per line), of each row's `Rows.weight`
    deep: tuple[Tensor, Tensor] | None = None  # slots, and for each what is added to it behind the first layers
    image: Tensor | None = None  # (B, slots per line), 0 or 1 + the slot's image, if an image's rows see each other
    token: Tensor | None = None  # (1 or B, slots per line), the token of a slot of text, if layers look it up again


def lay_out(rows: Rows, layout: str, device: torch.device | None = None, images: bool = False) -> Layout:
    """Arranges rows as (B, longest), padded on the right, or as (1, R), packed; by default, on the CPU. With `images`,
    a padded layout also says which image each row belongs to, the isolator's rows included."""
    require_known("layout", layout, LAYOUTS[1:])
    send = lambda of: to_device(of, device or of.device)
    lengths = rows.lengths
    longest = int(lengths.max())
    starts = lengths.cumsum(0) - lengths
    slot = torch.arange(len(rows))
    if layout == "packed":
        cu_seqlens = torch.cat([starts, lengths.sum()[None]]).int()
        borders = cu_seqlens.tolist()
        weight = None if rows.weight is None else rows.weight[None]
        return Layout(send(rows.source), send(rows.position)[None], slot, send(cu_seqlens), longest, borders, weight)
    slot += rows.sample * longest - starts[rows.sample]
    # Padding gathers row 0 of the table at position 0. Nothing reads the result, so its gradient is zero.
    index = torch.zeros(rows.samples * longest, dtype=torch.long).scatter_(0, slot, rows.source)
    index, there = send(index), to_device(slot, device or slot.device)
    shape = (rows.samples, longest)
    spread = lambda of: of.new_zeros(len(index), *of.shape[1:]).index_copy_(0, there, of).unflatten(0, shape)
    weight = None if rows.weight is None else spread(rows.weight)
    image = spread(send(rows.image + 1)) if images else None
    return Layout(index, spread(send(rows.position)), slot, None, longest, None, weight, image=image)


def plan_rows(text: int, images: list[int], plan: Plan, isolator: int) -> int:
    """The number of rows that the LLM runs on for one sample; in a slow step the student's, not its teacher's."""
    if plan.mode != "fast":
        return text + sum(images)
    return text + sum(keep_count(plan.keep, n) + isolator for n in images)
