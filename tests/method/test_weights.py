"""A kept token counts for those that it stands for: a row of weight log n is n copies of it, in every layout."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from support.forwards import FAST, FULL, SLOW, backward, fast_by_hand, features_of, kept_of, wrap

from tinyspeed import UserError, pruning, recipe
from tinyspeed.bench import estimate
from tinyspeed.models import attention
from tinyspeed.models.memory import MicroBatch, Settings, Step
from tinyspeed.pruning import registry
from tinyspeed.pruning.weights import sizes
from tinyspeed.recipe.schedules import schedule_of
from tinyspeed.rows import Rows, lay_out
from tinyspeed.scheduler import Combined, FastSchedule, LateWeights, Plan


def naive(q, k, v, copies: list[list[int]], scale: float):
    """Attention (1, heads, rows, width) of each sample among copies of its rows, one score at a time, in float64."""
    out, begin, groups = torch.zeros_like(q), 0, q.shape[1] // k.shape[1]
    for counts in copies:
        rows = range(begin, begin + len(counts))
        for head, row in itertools.product(range(q.shape[1]), rows):
            seen = [r for r in rows if r <= row for _ in range(counts[r - begin])]
            scores = torch.stack([scale * (q[0, head, row] * k[0, head // groups, r]).sum() for r in seen])
            share = scores.softmax(0)
            out[0, head, row] = sum(share[i] * v[0, head // groups, r] for i, r in enumerate(seen))
        begin += len(counts)
    return out


class Module:
    training = False

    def __init__(self, groups: int):
        self.num_key_value_groups = groups


copies = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=3)


@given(
    copies=copies, kv=st.integers(1, 2), groups=st.integers(1, 2), width=st.sampled_from([2, 4, 6, 8]),
    layout=st.sampled_from(["packed", "padded"]), scale=st.sampled_from([None, 0.3]), seed=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.parametrize("form", ["as on a CPU", "as on a GPU"])
def test_a_row_of_weight_log_n_is_n_copies_of_it(form, copies, kv, groups, width, layout, scale, seed):
    """Results and gradients, in float64: with the weights in a mask, and in columns of the heads."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(counts) for counts in copies]
    total = sum(lengths)
    make = lambda heads: torch.randn(1, heads, total, width, generator=generator, dtype=torch.float64).requires_grad_()
    q, k, v = make(kv * groups), make(kv), make(kv)
    weight = torch.tensor([n for counts in copies for n in counts], dtype=torch.float64).log()
    sample = torch.arange(len(copies)).repeat_interleave(torch.tensor(lengths))
    index = torch.arange(total)
    placed = lay_out(Rows(index, index, index, sample, index, len(copies), weight), layout)
    flat = lambda x: x[0][:, placed.index].unflatten(1, placed.position.shape).transpose(0, 1)
    given, how = (flat(q), flat(k), flat(v)), {"scaling": scale}
    if form == "as on a GPU":
        how = {"scaling": scale or width**-0.5}
        given, placed = attention.weigh(*given, placed.weight / how["scaling"]), replace(placed, weight=None)
    made, _ = attention.rows_attention(Module(groups), *given, None, **how, rows=placed)
    made = made[..., :width]
    made = made.flatten(0, 1)[placed.slot].transpose(0, 1)[None]
    want = naive(q, k, v, copies, scale or width**-0.5)
    torch.testing.assert_close(made, want, rtol=1e-9, atol=1e-11)
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (made, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@given(weight=st.lists(st.floats(-7, 7), min_size=1, max_size=9), width=st.sampled_from([8, 12, 64, 128]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_does_not_round_a_weight_away(dtype, weight, width):
    w, scale = torch.tensor(weight)[None], width**-0.5
    zero = torch.zeros(1, 1, len(weight), width, dtype=dtype)
    q, k, v = attention.weigh(zero, zero, zero, w / scale)
    assert q.dtype == k.dtype == v.dtype == dtype
    assert q.shape == k.shape == v.shape
    assert q.shape[-1] % 8 == 0
    added = scale * (q.double() @ k.double().mT)
    torch.testing.assert_close(added[0, 0], w.double().expand_as(added[0, 0]), rtol=2e-5, atol=1e-5)


def naive_cells(features, valid, index):
    """Sizes by the definition, image by image."""
    found = torch.zeros(index.shape)
    for b, picks in enumerate(index.tolist()):
        kept = [pick for pick in picks if pick >= 0]
        unit = [x / max(float(x.norm()), 1e-12) for x in features[b].double()]
        for i in valid[b].nonzero()[:, 0].tolist():
            likeness = [float(unit[i] @ unit[pick]) for pick in kept]
            first = next(k for k, near in enumerate(likeness) if near > max(likeness) - 5e-6)
            found[b, kept.index(i) if i in kept else first] += 1
    return found


@given(data=st.data(), batch=st.integers(1, 3), n=st.integers(2, 12), kinds=st.integers(1, 12))
def test_cells_are_the_nearest_kept_tokens(data, batch, n, kinds):
    """Also among equal tokens, zeros and tokens that may not be kept."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    all_kinds = torch.randn(kinds, 4, generator=generator)
    all_kinds[0] *= data.draw(st.integers(0, 1))
    features = all_kinds[torch.randint(kinds, (batch, n), generator=generator)]
    valid = torch.tensor(
        [[True, *data.draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))] for _ in range(batch)]
    )
    chosen = [data.draw(st.permutations(v.nonzero()[:, 0].tolist())) for v in valid]
    chosen = [sorted(some[: data.draw(st.integers(1, len(some)))]) for some in chosen]
    most = max(map(len, chosen))
    index = torch.tensor([some + [-1] * (most - len(some)) for some in chosen])
    made = sizes("cells", features, valid, index, None)
    torch.testing.assert_close(made, naive_cells(features, valid, index))
    assert torch.equal(made.sum(1), valid.sum(1).float()), "each token is in one cell"
    assert torch.equal(made > 0, index >= 0), "a kept token is in its own"
    alone = [sizes("cells", features[b : b + 1], valid[b : b + 1], index[b : b + 1], None) for b in range(batch)]
    assert torch.equal(made, torch.cat(alone)), "an image's cells do not depend on its batch"


PLUGINS = pruning.works_with(["cls_attention", "keys", "tower"])


@given(keep=st.floats(0.05, 1), seed=st.integers(0, 99), many=st.integers(1, 3))
@pytest.mark.parametrize("kind", ["uniform", "cells"])
@pytest.mark.parametrize("name", PLUGINS)
def test_sizes_of_an_image_add_up_to_its_tokens(name, kind, keep, seed, many):
    generator = torch.Generator().manual_seed(seed)
    features, mask = torch.randn(many, 16, 8, generator=generator), torch.ones(many, 16, dtype=torch.bool)
    mask[-1, 9:] = False
    signals = {"cls_attention": torch.rand(many, 16, generator=generator), "keys": features, "tower": features}
    how = {"keep": keep, "mask": mask, "signals": signals, "square": False}
    made, plain = pruning.choose(name, features, weights=kind, **how), pruning.choose(name, features, **how)
    assert plain.sizes is None
    assert torch.equal(made.index, plain.index)
    if torch.equal(made.counts, mask.sum(1)):
        assert made.sizes is None, "every token stands for itself"
        return
    assert torch.equal(made.sizes > 0, made.index >= 0)
    torch.testing.assert_close(made.sizes.sum(1), mask.sum(1).float())


def test_a_plugin_may_say_itself_what_its_tokens_stand_for(monkeypatch):
    """In the order of its picks, whichever that is."""
    own = lambda features, *, most, **_: (torch.tensor([[2, 0]]), None, None, torch.tensor([[5.0, 3.0]]))
    monkeypatch.setitem(registry.PLUGINS, "own", replace(registry.entry("grid"), plugin=own))
    made = pruning.choose("own", torch.randn(1, 8, 4), count=2, weights="cells")
    assert made.index.tolist() == [[0, 2]]
    assert made.sizes.tolist() == [[3.0, 5.0]]
    assert pruning.choose("own", torch.randn(1, 8, 4), count=2, weights="uniform").sizes.tolist() == [[4.0, 4.0]]


# The model


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("kind", "power"), [("cells", 1.0), ("cells", 0.5), ("uniform", 1.0)])
def test_a_fast_step_is_transformers_with_the_weights_in_a_mask(family, layout, kind, power):
    net, batch = tiny.model(family), tiny.batch(family)
    hf, model = tiny.twin(net), wrap(net, layout=layout, weights=kind, power=power)
    weights = []
    for image, stays in zip(images := features_of(hf, batch), kept_of(hf, images), strict=True):
        newline = getattr(hf.model, "image_newline", None)
        places = [i for i, row in enumerate(image) if newline is None or not torch.equal(row, newline)]
        index = torch.tensor([[places.index(i) for i in range(len(image)) if stays[i]]])
        every = torch.ones(1, len(places), dtype=torch.bool)
        of = naive_cells(image[places][None].detach(), every, index)[0]
        of = of if kind == "cells" else torch.full_like(of, len(places) / len(of))
        weights.append((power * of.log()).tolist())
    logits, targets = fast_by_hand(hf, batch, model.isolator.weight.detach(), "original", weights)
    plain, _ = fast_by_hand(hf, batch, model.isolator.weight.detach(), "original")
    out = model(**batch, plan=FAST, return_logits=True)
    assert torch.equal(out.targets, targets)
    assert not tiny.difference(out.logits, logits)
    assert tiny.difference(out.logits, plain), "weights matter"


@pytest.mark.parametrize("plan", [FAST, SLOW], ids=["fast", "slow"])
def test_layouts_agree_about_weighted_rows_and_their_gradients(family, plan):
    """Also those of a slow step, whose teacher is weighted."""
    batch, found = tiny.batch(family), []
    for layout in ("padded", "packed"):
        found.append(backward(wrap(tiny.model(family), layout=layout, weights="cells"), batch, plan=plan))
    (one, its), (other, others) = found
    assert not tiny.difference(one, other)
    assert not tiny.difference(its, others)
    plain, _ = backward(wrap(tiny.model(family)), batch, plan=plan)
    assert not torch.equal(plain, one)


@pytest.mark.parametrize(
    ("how", "plan"),
    [
        ({"weights": "cells", "power": 0.0}, FAST),
        ({"weights": "cells"}, replace(FAST, weigh=False)),
        ({"weights": "cells"}, Plan("fast", keep=1.0)),
        ({"weights": "cells"}, FULL),
        ({"weights": "cells"}, replace(SLOW, distill=0.0)),
    ],
)
def test_where_there_are_no_weights_no_bit_changes(family, how, plan):
    batch = tiny.batch(family)
    one, its = backward(wrap(tiny.model(family), **how), batch, plan=plan)
    other, others = backward(wrap(tiny.model(family)), batch, plan=plan)
    assert torch.equal(one, other)
    assert all(torch.equal(its[name], others[name]) for name in others)


def test_what_is_exported_and_evaluated_has_no_weights(family):
    net, batch = tiny.model(family), tiny.batch(family)
    hf = tiny.twin(net).eval()
    assert torch.equal(wrap(net, weights="cells").eval()(**batch).loss, hf(**batch).loss)


def test_late_weights_come_at_their_step():
    schedule = Combined(FastSchedule(0.1), LateWeights(3))
    assert [schedule.plan(step).weigh for step in range(5)] == [False, False, False, True, True]
    made = recipe.read("digits", ["dualspeed.weights=cells", "dualspeed.weights_after=7"])
    plans = [schedule_of(made, stage, 2).plan(6).weigh for stage in ("align", "train")]
    assert plans == [True, False]


@pytest.mark.parametrize(("changes", "more"), [(["weights=cells"], True), (["weights=cells", "power=0"], False)])
def test_memory_counts_weights_where_there_are_some(changes, more):
    """In fast steps, without a teacher's. That the number is right is in tests/slow/test_replays_of_all_layers.py."""
    plain, made = (recipe.read("digits", [f"dualspeed.{c}" for c in of]) for of in ([], changes))
    shape, peaks = estimate.shape_of(plain), {}
    for mode in ("fast", "slow", "full"):
        settings = (Settings.of(r, "train", "bf16") for r in (plain, made))
        of = [Step(shape, s, MicroBatch.of(mode, 20, [144], 2, s, 32), recompute=False).peak for s in settings]
        peaks[mode] = of[1] - of[0]
    assert (peaks["fast"] > 0) == more
    assert peaks["slow"] == peaks["full"] == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("dualspeed.weights=cell", "unknown dualspeed.weights 'cell'; did you mean 'cells'"),
        ("dualspeed.power=1.5", "dualspeed.power = 1.5: must be at most 1"),
        ("dualspeed.weights_after=-1", "dualspeed.weights_after = -1: must not be negative"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(UserError, match=re.escape(says)):
        recipe.read("digits", [change])
