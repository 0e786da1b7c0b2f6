"""Numbers that are not finite are found wherever they are, and nothing else is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyspeed.util import finite

poisons = st.sampled_from([math.nan, math.inf, -math.inf])
shapes = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@given(shapes, dtypes, poisons, st.integers(0, 2**31), st.data())
def test_one_number_among_all_is_found_and_named(shapes, dtype, poison, seed, data):
    draw = torch.Generator().manual_seed(seed)
    named = {str(i): torch.randn(shape, generator=draw).to(dtype) for i, shape in enumerate(shapes)}
    named["whole numbers"] = torch.arange(3)
    assert math.isfinite(finite.norm(named.values()))
    assert finite.first_bad(named.items()) is None
    if full := [name for name, t in named.items() if t.numel() and t.is_floating_point()]:
        name = data.draw(st.sampled_from(full))
        t = named[name]
        t.view(-1)[data.draw(st.integers(0, t.numel() - 1))] = poison
        assert not math.isfinite(finite.norm(named.values()))
        count = f"1 of {t.numel():,} numbers, " if t.numel() > 1 else ""
        assert finite.first_bad(named.items()) == f"{name} ({count}{poison})"


def test_what_is_only_large_has_no_name():
    """Its squares overflow, in half precision soon; it is finite all the same."""
    large = [("a", torch.tensor([1.0, -3e38])), ("b", torch.full((99,), 6e4, dtype=torch.float16))]
    assert finite.first_bad(large) is None
    assert [float(n) for n in finite.norms([torch.tensor([[3.0, -4.0]]), large[1][1]])] == pytest.approx(
        [5, 6e4 * 99**0.5]
    )
    assert finite.norm([torch.zeros(0)]) == 0


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": [1, {"b": [0.5, math.nan]}]}, "a.1.b.1 is nan"),
        ({"x": (1, -math.inf)}, "x.1 is -inf"),
        ({"a": [1, 2.0], "b": "inf", "c": None, "d": True}, None),
    ],
)
def test_plain_numbers_are_found_by_their_place(state, said):
    assert finite.bad_number(state) == said
