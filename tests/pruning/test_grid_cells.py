"""A picture of K cells laid over one of N patches: `grid` and both pools at any K, against cells dealt one by one, in
fractions."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.features import distinct, select

from tinyspeed import pruning

Span = tuple[Fraction, Fraction]


def dealt(side: int, count: int) -> list[tuple[Span, Span]]:
    """(from top to bottom, from left to right) of each cell, in patches: about sqrt(K) lines of equal height, over
    which the cells are dealt so that the first i lines have floor(i K / lines)."""
    lines, cells, before = round(math.sqrt(count)), [], 0
    for line in range(lines):
        here = (line + 1) * count // lines - before
        before += here
        down = Fraction(line * side, lines), Fraction((line + 1) * side, lines)
        cells += [(down, (Fraction(i * side, here), Fraction((i + 1) * side, here))) for i in range(here)]
    assert len(cells) == count
    return cells


def touched(side: int, span: Span) -> list[int]:
    return [patch for patch in range(side) if span[0] < patch + 1 and patch < span[1]]


def between(side: int, span: Span) -> list[tuple[int, float]]:
    """The patches whose centres the middle of a span lies between, and how much each counts; at a border the last."""
    middle = min(max(sum(span) / 2 - Fraction(1, 2), Fraction(0)), Fraction(side - 1))
    below = math.floor(middle)
    return [(below, 1 - float(middle - below)), (min(below + 1, side - 1), float(middle - below))]


@given(st.integers(2, 14), st.floats(0, 1))
@example(24, 0.1)
@example(12, 0.1)
def test_cells_are_dealt_evenly_and_grid_and_pools_read_them(side, share):
    count = min(pruning.keep_count(share, side * side), side * side - 1)
    features = distinct(side + count, 1, side * side, 3)
    rows, means, samples = [], [], []
    for down, across in dealt(side, count):
        rows.append(math.floor(sum(down) / 2) * side + math.floor(sum(across) / 2))
        window = [features[0, y * side + x] for y in touched(side, down) for x in touched(side, across)]
        means.append(torch.stack(window).double().mean(0))
        around = [
            (wy * wx, features[0, y * side + x].double())
            for y, wy in between(side, down)
            for x, wx in between(side, across)
        ]
        samples.append(sum(weight * patch for weight, patch in around))
    assert select("grid", features, count=count)[0].tolist() == sorted(rows)
    for name, wanted in (("pool", means), ("pool_bilinear", samples)):
        kept = pruning.choose(name, features, count=count)
        assert kept.index[0].tolist() == rows
        torch.testing.assert_close((kept.weight @ features)[0].double(), torch.stack(wanted), atol=1e-4, rtol=1e-4)


SELECTING, MERGING, LAWS = "test_selecting_plugins.py", "test_merging_plugins.py", "test_laws.py"
GREEDY = (SELECTING, "test_a_greedy_plugin_equals_its_definition_where_there_are_no_ties")
CELLS = ("test_grid_cells.py", "test_cells_are_dealt_evenly_and_grid_and_pools_read_them")
ORACLES = {
    "cls_topk": (SELECTING, "test_cls_topk_keeps_the_rows_with_most_attention"),
    "divprune": (LAWS, "test_divprune_equals_its_definition_where_there_are_no_ties"),
    "dynamicvit": (MERGING, "test_dynamicvit_keeps_the_likeliest_rows_and_pays_for_a_wrong_share"),
    "random": (LAWS, "test_random_keeps_every_row_and_every_pair_of_neighbours_equally_often"),
    "tokenlearner": (MERGING, "test_glances_are_the_means_that_their_network_asks_for"),
    "tome": (MERGING, "test_tome_merges_the_most_similar_pairs_round_by_round"),
    "vispruner": (SELECTING, "test_vispruner_equals_its_definition"),
    "visionzip": (MERGING, "test_visionzip_keeps_what_cls_looks_at_and_merges_the_rest"),
    **dict.fromkeys(("coverage", "divprune_centred", "dpp", "dpp_centred"), GREEDY),
    **dict.fromkeys(("grid", "pool", "pool_bilinear"), CELLS),
}


@pytest.mark.parametrize("name", pruning.names())
def test_every_plugin_has_an_oracle_of_its_own(name):
    """The laws hold for `grid`, too: that a plugin is what it says, only its own test can tell."""
    file, test = ORACLES[name]
    assert f"def {test}(" in (Path(__file__).parent / file).read_text()
    assert file != SELECTING or test != GREEDY[1] or f'"{name}"' in (Path(__file__).parent / file).read_text()
