"""performance.md says what benchmarks printed: its tables are those of the committed JSON. What it promises of a GPU is
arithmetic, done here again."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyspeed.bench import data, estimate, harness, levers, loss, pruning, savings, scaling, step
from tinyspeed.data import llava_mix
from tinyspeed.models import published
from tinyspeed.models.memory import Settings, Shape
from tinyspeed.util import tables

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "tutorials" / "results" / "performance.md"
RESULTS = sorted((ROOT / "tutorials" / "results").glob("bench-*.json"))
BENCHMARKS = {
    module.__name__.split(".")[-1]: module for module in (data, levers, loss, pruning, savings, scaling, step)
}
SHAPES = {
    "LLaVA-1.5-7B": ("7b", "1.5"),
    "LLaVA-1.5-13B": ("13b", "1.5"),
    "LLaVA-NeXT-7B": ("7b", "next"),
}


def printed(result: dict) -> str:
    return BENCHMARKS[result["bench"]].describe(result)


def promised() -> str:
    """hf, recomputing, over ours, packed and not recomputing, in FLOPs."""
    lines = []
    for name, (size, family) in SHAPES.items():
        shape, samples = Shape(published.config_of(size, family)), llava_mix.mix(1024, 0, family)
        padded = []
        for first in range(0, len(samples), 8):
            batch = samples[first : first + 8]
            longest = max(text + sum(images) for text, images, _ in batch)
            padded += [(longest - sum(images), images, answers) for _, images, answers in batch]
        for tuned, rank in (("LoRA, rank 64", 64), ("in full", 0)):
            s = Settings("bf16", rank=rank)
            ours = {m: sum(estimate.flops(shape, s, m, sample, False) for sample in samples) for m in step.PLANS}
            mixes = [(1 - r) * ours["fast"] + r * ours["slow"] for r in step.MIXES.values()]
            for pads, theirs in (("eight at random", padded), ("nothing", samples)):
                hf = sum(estimate.flops(shape, s, "full", sample, True) for sample in theirs)
                lines.append([name, tuned, pads, *(f"{hf / flops:.1f}x" for flops in (ours["full"], *mixes))])
    return tables.table(["shape", "trained", "hf pads", "full", *step.MIXES], lines)


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_table_is_what_the_benchmark_printed(file):
    result, page = json.loads(file.read_text()), PAGE.read_text(encoding="utf-8")
    assert f"<!-- {file.name} -->\n\n{printed(result)}\n\n" in page
    said = result["command"].removeprefix("python -m ").replace("tutorials/results/", "")
    before = page[: page.index(f"<!-- {file.name} -->")].split("-->")[-1]  # from the table before it to this one
    assert f"`{said}`" in re.sub(r"\s+", " ", before)


@given(
    st.dictionaries(
        st.sampled_from(["one", "two", "three"]),
        st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0.1, 1e4)), min_size=1, unique_by=lambda bar: bar[0]),
        min_size=1,
    )
)
@settings(max_examples=10)
def test_a_bar_is_as_long_as_its_number(panels):
    fig = harness.bar_chart(
        {title: [harness.Bar(*bar, dark=bar[1] / 2) for bar in of] for title, of in panels.items()}, "ms"
    )
    names = list(dict.fromkeys(name for of in panels.values() for name, _ in of))
    assert len(fig.axes) == len(panels)
    for ax, (title, of) in zip(fig.axes, panels.items(), strict=True):
        assert ax.get_title(loc="left") == title
        drawn = {(names[round(bar.get_y() + bar.get_height() / 2)], bar.get_width()) for bar in ax.patches}
        assert drawn == {(name, length * part) for name, length in of for part in (1, 0.5)}


def test_every_table_has_its_numbers():
    named = re.findall(r"<!-- (bench-.*) -->", PAGE.read_text(encoding="utf-8"))
    assert sorted(named) == [file.name for file in RESULTS]


def test_the_promises_are_arithmetic():
    assert f"<!-- promises -->\n\n{promised()}\n\n" in PAGE.read_text(encoding="utf-8")
