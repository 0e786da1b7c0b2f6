"""The gather against a pure-Python account of what it should do: lists of rows, one sample at a time."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tinyspeed import UserError, rows
from tinyspeed.rows import IGNORE

IMAGE, VIDEO, TEXT, PAD = 9, 8, 1, 0
KINDS = {"image": IMAGE, "video": VIDEO}


@dataclass(frozen=True)
class Row:
    """What the oracle says of one row. `source` is ("text", place in the batch), ("image", nth feature row of all
    images), ("video", nth feature row of all videos) or ("isolator", nth)."""

    source: tuple[str, int]
    target: int
    position: int
    image: int  # nth of all images, then of all videos; -1 for text


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    lengths: dict[str, list[int]]  # feature rows of each image and of each video
    kept: Tensor  # (V,) bool
    samples: list[list[Row]]  # every row, sample by sample: the oracle's full rows


@st.composite
def batches(draw) -> Batch:
    """Text, images and videos in any order (images may touch, or open or close a sample), padded on either side or not
    at all.

    Labels are random, at the first token of a sample too. Placeholders are no answers and their labels are ignored;
    padding is none either, though its label says otherwise."""
    segment = st.tuples(st.sampled_from(["text", *KINDS]), st.integers(1, 5))
    outlines = draw(st.lists(st.lists(segment, min_size=1, max_size=5), min_size=1, max_size=4))
    padding, extra = draw(st.sampled_from(["left", "right"])), draw(st.integers(0, 3))
    width = max(sum(n for _, n in outline) for outline in outlines) + extra
    label = st.one_of(st.just(IGNORE), st.integers(10, 99))
    lengths = {kind: [n for outline in outlines for k, n in outline if k == kind] for kind in KINDS}
    image = {"image": 0, "video": len(lengths["image"])}  # the next of each kind
    feature = dict.fromkeys(KINDS, 0)
    ids, mask, labels, samples = [], [], [], []
    for b, outline in enumerate(outlines):
        tokens = []  # (kind, image)
        for kind, n in outline:
            tokens += [(kind, image.get(kind, -1))] * n
            if kind in KINDS:
                image[kind] += 1
        fill = width - len(tokens)
        before, after = (fill, 0) if padding == "left" else (0, fill)
        of = [draw(label) if kind == "text" else IGNORE for kind, _ in tokens]
        ids.append([PAD] * before + [KINDS.get(kind, TEXT) for kind, _ in tokens] + [PAD] * after)
        mask.append([0] * before + [1] * len(tokens) + [0] * after)
        labels.append([PAD] * before + of + [PAD] * after)
        samples.append([])
        for i, ((kind, nth), target) in enumerate(zip(tokens, [*of[1:], IGNORE], strict=True)):
            source = (kind, b * width + before + i if kind == "text" else feature[kind])
            samples[-1].append(Row(source, target, i, nth))
            if kind in KINDS:
                feature[kind] += 1
    kept = []
    for n in itertools.chain(*lengths.values()):  # a plugin keeps at least one row of an image
        kept += draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    attention_mask = torch.tensor(mask)
    if attention_mask.all() and draw(st.booleans()):
        attention_mask = None
    return Batch(
        torch.tensor(ids), attention_mask, torch.tensor(labels), lengths, torch.tensor(kept, dtype=torch.bool), samples
    )


def pruned(batch: Batch, isolator: int, positions: str) -> list[list[Row]]:
    """The oracle's rows of a fast step, sample by sample."""
    result = []
    for sample in batch.samples:
        out: list[Row] = []
        for i, row in enumerate(sample):
            if row.image < 0:
                out.append(row)
                continue
            first = i == 0 or sample[i - 1].image != row.image
            last = i + 1 == len(sample) or sample[i + 1].image != row.image
            if first:
                out += [Row(("isolator", j), IGNORE, row.position, row.image) for j in range(isolator)]
            if batch.kept[table(batch, row.source) - batch.input_ids.numel()]:
                out.append(replace(row, target=IGNORE))
            if last:  # what the whole image predicts, its last row left predicts
                out[-1] = replace(out[-1], target=row.target)
        if positions == "compact":
            out = [replace(row, position=i) for i, row in enumerate(out)]
        result.append(out)
    return result


def table(batch: Batch, source: tuple[str, int], kept: Tensor | None = None) -> int:
    """Where the table [words | image features | video features | isolator] holds a row, if only these features are in
    it."""
    kind, i = source
    tokens, stays = batch.input_ids.numel(), [True] * len(batch.kept) if kept is None else kept.tolist()
    if kind in KINDS:
        return tokens + sum(stays[: i + sum(batch.lengths["image"]) * (kind == "video")])
    return i if kind == "text" else tokens + sum(stays) + i


def read(got: rows.Rows) -> list[tuple[int, ...]]:
    fields = (got.sample, got.source, got.target, got.position, got.image)
    return list(zip(*(field.tolist() for field in fields), strict=True))


def expected(batch: Batch, samples: list[list[Row]], kept: Tensor | None = None) -> list[tuple[int, ...]]:
    every = [(b, row) for b, sample in enumerate(samples) for row in sample]
    return [(b, table(batch, row.source, kept), row.target, row.position, row.image) for b, row in every]


def full(batch: Batch) -> rows.Rows:
    return rows.full(batch.input_ids, batch.attention_mask, batch.labels, KINDS, batch.lengths)


def prune(batch: Batch, kept: Tensor, isolator: int, positions: str) -> rows.Rows:
    return rows.prune(full(batch), kept, isolator, batch.input_ids.numel(), positions)


isolators = st.integers(0, 4)
both_positions = st.sampled_from(rows.POSITIONS)


@given(batches())
def test_full_rows_are_every_token_that_is_not_padding_with_the_next_ones_label(batch):
    got = full(batch)
    assert read(got) == expected(batch, batch.samples)
    assert got.samples == len(batch.samples)


@given(batches(), isolators, both_positions)
def test_pruned_rows_are_the_text_the_isolators_and_the_kept_rows_in_order(batch, isolator, positions):
    wanted = expected(batch, pruned(batch, isolator, positions), batch.kept)
    assert read(prune(batch, batch.kept, isolator, positions)) == wanted


@given(batches(), isolators, both_positions)
def test_pruning_never_drops_or_reorders_a_text_row(batch, isolator, positions):
    before, after = full(batch), prune(batch, batch.kept, isolator, positions)
    assert torch.equal(after.source[after.image < 0], before.source[before.image < 0])
    assert torch.equal(after.target[after.image < 0], before.target[before.image < 0])


@given(batches(), isolators, both_positions)
def test_pruning_loses_no_target_of_an_answer(batch, isolator, positions):
    """Placeholders are no answers, so every answer token is still predicted, by the same sample, in the same order."""
    before, after = full(batch), prune(batch, batch.kept, isolator, positions)
    for of in ("target", "sample"):
        assert torch.equal(getattr(before, of)[before.target != IGNORE], getattr(after, of)[after.target != IGNORE])


@given(batches(), both_positions)
def test_keeping_all_without_an_isolator_is_the_identity(batch, positions):
    everything = torch.ones_like(batch.kept)
    assert read(prune(batch, everything, 0, positions)) == read(full(batch))


@given(batches(), isolators)
def test_original_positions_are_those_of_the_full_rows(batch, isolator):
    before = dict(zip(full(batch).source.tolist(), full(batch).position.tolist(), strict=True))
    got, words = prune(batch, batch.kept, isolator, "original"), batch.input_ids.numel()
    left = [*range(words), *(words + batch.kept.nonzero()[:, 0]).tolist()]  # where they were in the full table
    for source, position in zip(got.source.tolist(), got.position.tolist(), strict=True):
        assert source >= len(left) or position == before[left[source]]


@given(batches(), isolators, both_positions, st.booleans())
def test_looking_up_only_the_words_that_are_read_changes_no_row(batch, isolator, positions, whole):
    selected = full(batch) if whole else prune(batch, batch.kept, isolator, positions)
    words, behind = torch.arange(batch.input_ids.numel()), torch.arange(1000, 1000 + len(batch.kept) + isolator)
    index, lesser = rows.used_words(selected, len(words))
    assert torch.equal(torch.cat([words[index], behind])[lesser.source], torch.cat([words, behind])[selected.source])
    assert index.tolist() == sorted(set(selected.source.tolist()) & set(words.tolist()))
    assert read(replace(lesser, source=selected.source)) == read(selected)


@given(batches(), isolators)
def test_compact_positions_count_each_samples_rows(batch, isolator):
    got = prune(batch, batch.kept, isolator, "compact")
    for b in range(len(batch.samples)):
        position = got.position[got.sample == b]
        assert torch.equal(position, torch.arange(len(position)))


# Layouts


@given(batches(), isolators, both_positions, st.booleans())
def test_a_padded_layout_places_every_row_once_and_left_aligned(batch, isolator, positions, whole):
    got = full(batch) if whole else prune(batch, batch.kept, isolator, positions)
    layout = rows.lay_out(got, "padded")
    lengths = [int((got.sample == b).sum()) for b in range(got.samples)]
    assert layout.longest == max(lengths)
    assert layout.cu_seqlens is None
    assert layout.position.shape == (got.samples, layout.longest)
    assert layout.index.shape == (layout.position.numel(),)
    assert layout.slot.tolist() == [b * layout.longest + i for b, n in enumerate(lengths) for i in range(n)]
    assert torch.equal(layout.index[layout.slot], got.source)
    assert torch.equal(layout.position.flatten()[layout.slot], got.position)
    assert layout.index.min() >= 0  # padding gathers some real row, which nothing reads


@given(batches(), isolators, both_positions, st.booleans())
def test_a_packed_layout_is_the_rows_end_to_end_with_their_borders(batch, isolator, positions, whole):
    got = full(batch) if whole else prune(batch, batch.kept, isolator, positions)
    layout = rows.lay_out(got, "packed")
    assert torch.equal(layout.index, got.source)
    assert torch.equal(layout.position, got.position[None])
    assert layout.slot.tolist() == list(range(len(got)))
    assert layout.cu_seqlens.dtype == torch.int32  # what the varlen kernels take
    borders = layout.cu_seqlens.tolist()
    assert borders[0] == 0
    assert borders[-1] == len(got)
    assert len(borders) == got.samples + 1
    for b, (start, end) in enumerate(itertools.pairwise(borders)):
        assert (got.sample[start:end] == b).all()
    assert layout.longest == max(b - a for a, b in itertools.pairwise(borders))


def test_a_sample_that_is_all_padding_has_no_rows_and_shifts_nobody():
    ids = torch.tensor([[1, 1], [PAD, PAD], [1, 1]])
    mask = torch.tensor([[1, 1], [0, 0], [1, 1]])
    got = rows.full(ids, mask, ids, {"image": IMAGE}, {"image": []})
    assert got.sample.tolist() == [0, 0, 2, 2]
    assert rows.lay_out(got, "packed").cu_seqlens.tolist() == [0, 2, 2, 4]
    assert rows.lay_out(got, "padded").slot.tolist() == [0, 1, 4, 5]


# What is refused


@given(batches(), st.sampled_from([*KINDS]), st.integers(0, 3))
def test_a_mismatch_of_placeholders_and_features_is_refused_with_both_counts(batch, kind, more):
    lengths = batch.lengths[kind]
    held = sum(lengths)
    lengths = [*lengths, more] if more else lengths[:-1]
    assume(sum(lengths) != held)  # a batch without images has none to take away
    with pytest.raises(UserError, match=rf"{held} {kind} placeholder.*{sum(lengths)} feature rows"):
        rows.full(batch.input_ids, batch.attention_mask, batch.labels, KINDS, {**batch.lengths, kind: lengths})


def test_unknown_positions_and_layouts_are_refused_with_the_nearest_known_one():
    ids = torch.ones(1, 2, dtype=torch.long)
    some = rows.full(ids, None, ids, {"image": IMAGE}, {"image": []})
    with pytest.raises(UserError, match="did you mean 'original'"):
        rows.prune(some, torch.zeros(0, dtype=torch.bool), 0, 2, "orignal")
    with pytest.raises(UserError, match="did you mean 'packed'"):
        rows.lay_out(some, "pack")
