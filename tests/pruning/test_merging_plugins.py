"""Plugins that merge rows, and those that learn: against naive code in float64, torch's own pooling, and transformers'
forward of the rows put together by hand. Which rows they keep obeys the laws of `test_pruning.py` as well."""

import copy
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import tiny
from support.features import SEED, beside, distinct, pictures, row_counts, scatter_images, seeds
from torch import Tensor
from torch.nn import functional as F

from tinyspeed import DualSpeed, UserError, pruning
from tinyspeed.scheduler import Plan

MERGING = ["pool", "pool_bilinear", "tokenlearner", "tome", "visionzip"]
LEARNED = ["dynamicvit", "tokenlearner"]
every_merging = pytest.mark.parametrize("name", MERGING)
KEEP = 0.4
FAST, SLOW, FULL = Plan("fast", keep=KEEP), Plan("slow", keep=KEEP, distill=1.0), Plan("full")


def choose(name: str, features: Tensor, module=None, **how) -> pruning.Kept:
    if pruning.entry(name).learned and module is None:
        module = pruning.make(name, features.shape[2], features.shape[1], SEED).eval()
    return pruning.choose(name, features, module=module, **{"seed": SEED, "signals": beside(name, features), **how})


def test_the_lists_above_are_whole():
    """A plugin that merges or learns is tested here by being registered."""
    features = distinct(0, 1, 12, 4)
    merging = [name for name in pruning.names() if choose(name, features, count=11).weight is not None]
    assert sorted({*merging, *LEARNED}) == sorted({*MERGING, *LEARNED})
    assert [name for name in pruning.names() if pruning.entry(name).learned] == LEARNED


# Laws of every weight map


@every_merging
@given(pictures(), st.data())
def test_merged_rows_are_sums_with_weights_that_sum_to_one(name, features, data):
    count = data.draw(st.integers(1, features.shape[1]))
    kept = choose(name, features, count=count)
    if count == features.shape[1]:
        assert kept.weight is None  # every row as it is
        return
    assert kept.weight.shape == (len(features), count, features.shape[1])
    assert (kept.weight >= 0).all()
    total = kept.weight.sum(2)
    # VisionZip's merged rows are a row and a mean of others.
    wanted = total.round() if name == "visionzip" else torch.ones_like(total)
    torch.testing.assert_close(total, wanted, atol=1e-5, rtol=0)
    assert ((wanted == 1) | (wanted == 2)).all()
    if name != "tokenlearner":  # whose glances have no place of their own
        assert (kept.weight.gather(2, kept.index[:, :, None]) > 0).all()


@every_merging
@given(seeds, st.lists(st.integers(2, 24), min_size=1, max_size=4), st.integers(0, 6), st.floats(0.05, 1))
def test_a_ragged_batch_merges_each_image_as_it_would_alone(name, seed, sizes, padding, keep):
    images = [distinct(seed + i, n, 6) for i, n in enumerate(sizes)]
    features, mask, places = scatter_images(images, max(sizes) + padding, seed)
    module = pruning.make(name, 6, max(sizes), SEED)
    kept = choose(name, features, module, keep=keep, mask=mask)
    if kept.weight is None:
        assert kept.counts.tolist() == sizes  # every row as it is
        return
    assert (kept.weight.sum(2)[kept.index < 0] == 0).all()
    assert (kept.weight * ~mask[:, None, :] == 0).all()
    for b, (image, place) in enumerate(zip(images, places, strict=True)):
        alone = choose(name, image[None], module, keep=keep)
        count = int(kept.counts[b])
        assert torch.equal(kept.index[b, :count], place[alone.index[0]])
        rows = image[None] if alone.weight is None else alone.weight @ image
        mine = kept.weight[b, :count] @ features[b]
        torch.testing.assert_close(mine, rows[0], atol=1e-5, rtol=1e-5)


@every_merging
@given(pictures(), st.integers(-20, 20), st.data())
def test_scaling_the_features_by_a_power_of_two_scales_what_they_merge_to(name, features, exponent, data):
    count = data.draw(row_counts(features))
    assume(count < features.shape[1])
    module = pruning.make(name, features.shape[2], count, SEED)
    signals = beside(name, features)
    plain = choose(name, features, module, count=count)
    scaled = choose(name, features * 2.0**exponent, module, count=count, signals=signals)
    assert torch.equal(scaled.weight, plain.weight)


@pytest.mark.parametrize("name", [*MERGING, "dynamicvit"])
def test_an_image_that_keeps_all_its_rows_keeps_them_as_they_are_beside_others(name):
    features, mask, places = scatter_images([distinct(0, 4, 6), distinct(1, 9, 6)], 12, 0)
    kept = choose(name, features, mask=mask, count=[4, 5])
    assert kept.index[0].tolist() == [*places[0].tolist(), -1]
    if kept.weight is not None:
        torch.testing.assert_close(kept.weight[0, :4] @ features[0], features[0, places[0]])
    alone = choose(name, features[:1], mask=mask[:1], count=4)
    assert alone.weight is None
    assert alone.index[0].tolist() == places[0].tolist()


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_plugin_kept_in_half_precision_learns_and_chooses_in_fp32(name):
    """As sharding gathers it: its weights are rounded, its arithmetic is not."""
    features, module = distinct(0, 2, 12, 6), pruning.make(name, 6, 5, SEED).bfloat16().eval()
    whole = pruning.make(name, 6, 5, SEED).eval()
    whole.load_state_dict({key: value.float() for key, value in module.state_dict().items()})
    for one in (module, whole):
        kept = choose(name, features, one, count=5)
        ((kept.weight @ features).square().sum() + (0 if kept.loss is None else kept.loss.sum())).backward()
    assert torch.equal(choose(name, features, module, count=5).index, choose(name, features, whole, count=5).index)
    for rounded, exact in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(rounded.grad.float(), exact.grad, rtol=0.01, atol=1e-6)


def test_making_a_learned_plugin_shifts_nobodys_random_numbers(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    first, again, other = (pruning.make("dynamicvit", 6, 5, seed).within.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


# Pooling, against torch's


@given(st.integers(2, 12), st.integers(1, 12), seeds)
def test_pools_of_square_pictures_are_torchs(side, lines, seed):
    assume(lines < side)
    picture = distinct(seed, 2, 3, side, side)
    features = picture.flatten(2).mT
    for name, theirs in (
        ("pool", F.adaptive_avg_pool2d(picture, lines)),
        ("pool_bilinear", F.interpolate(picture, size=(lines, lines), mode="bilinear", align_corners=False)),
    ):
        kept = choose(name, features, count=lines * lines)
        torch.testing.assert_close(kept.weight @ features, theirs.flatten(2).mT, atol=1e-5, rtol=1e-5)


@given(st.integers(2, 60), st.data())
def test_a_list_of_rows_that_is_no_square_is_pooled_along_its_order(n, data):
    assume(math.isqrt(n) ** 2 != n)
    count = data.draw(st.integers(1, n - 1))
    features = distinct(n, 1, n, 5)
    line = features.mT
    for name, theirs in (
        ("pool", F.adaptive_avg_pool1d(line, count)),
        ("pool_bilinear", F.interpolate(line, size=count, mode="linear", align_corners=False)),
    ):
        torch.testing.assert_close(
            choose(name, features, count=count).weight @ features, theirs.mT, atol=1e-4, rtol=1e-4
        )


@given(st.integers(2, 8), st.data())
def test_several_pictures_in_one_list_are_not_taken_for_a_square_one(side, data):
    """LLaVA-NeXT's base view and crops of a portrait have 48 * 48 rows, and no line of 48."""
    count = data.draw(st.integers(1, side * side - 1))
    features = distinct(side, 1, side * side, 5)
    kept = choose("pool", features, count=count, square=False)
    torch.testing.assert_close(kept.weight @ features, F.adaptive_avg_pool1d(features.mT, count).mT, atol=1e-4, rtol=0)
    gaps = pruning.select("grid", features, count=count, square=False)[0].diff()
    assert count == 1 or gaps.max() - gaps.min() <= 1


@given(st.integers(3, 12), st.data())
def test_every_patch_is_in_some_pool(side, data):
    count = data.draw(st.integers(1, side * side - 1))
    weight = choose("pool", distinct(0, 1, side * side, 2), count=count).weight
    assert (weight.sum(1) > 0).all()


# ToMe, against its description, one pair at a time


def merged_by_hand(features: Tensor, count: int) -> list[list[int]]:
    """The clusters, by the place of the row that stands for each; assume() sorts ties out."""
    clusters = [([i], i) for i in range(len(features))]  # members, place
    rows = features.double()
    while len(clusters) > count:
        means = [rows[members].mean(0) for members, _ in clusters]
        pairs = []
        for i in range(0, len(clusters), 2):
            likeness = [float(F.cosine_similarity(means[i], means[j], dim=0)) for j in range(1, len(clusters), 2)]
            order = sorted(range(len(likeness)), key=lambda j: -likeness[j])
            assume(len(order) < 2 or likeness[order[0]] - likeness[order[1]] > 1e-5)
            pairs.append((likeness[order[0]], i, 2 * order[0] + 1))
        pairs.sort(reverse=True)
        merges = min(len(clusters) - count, len(pairs))
        assume(merges == len(pairs) or pairs[merges - 1][0] - pairs[merges][0] > 1e-5)
        gone = {i: j for _, i, j in pairs[:merges]}
        for i, j in gone.items():
            clusters[j] = (clusters[j][0] + clusters[i][0], clusters[j][1])
        clusters = [c for i, c in enumerate(clusters) if i not in gone]
    return clusters


@given(seeds, st.integers(2, 24), st.integers(2, 8), st.data())
def test_tome_merges_the_most_similar_pairs_round_by_round(seed, n, width, data):
    features, count = distinct(seed, 1, n, width), data.draw(st.integers(1, n - 1))
    clusters = merged_by_hand(features[0], count)
    kept = choose("tome", features, count=count)
    assert kept.index[0].tolist() == [place for _, place in clusters]
    for weight, (members, _) in zip(kept.weight[0], clusters, strict=True):
        wanted = torch.zeros(n)
        wanted[members] = 1 / len(members)
        torch.testing.assert_close(weight, wanted)


@given(pictures(), st.data())
def test_the_clusters_of_tome_divide_the_picture_between_them(features, data):
    """So their sizes sum to N, and the mean of all rows, by size, is the mean of the picture."""
    count = data.draw(row_counts(features))
    assume(count < features.shape[1])
    weight = choose("tome", features, count=count).weight
    assert ((weight > 0).sum(1) == 1).all()
    sizes = (weight > 0).sum(2, keepdim=True)
    mean = (sizes * (weight @ features)).sum(1) / features.shape[1]
    torch.testing.assert_close(mean, features.mean(1), atol=1e-5, rtol=1e-5)


def test_rows_that_cancel_each_other_are_merged_like_any():
    """A cluster of opposite rows has no direction, and float rounding may give it a negative square."""
    for seed in range(300):
        signs = (distinct(seed, 1, 16, 1) > 0) * 0.2 - 0.1
        kept = choose("tome", signs, count=2)
        assert kept.weight.isfinite().all()
        assert ((kept.weight > 0).sum(1) == 1).all()


# VisionZip, against its description


@given(seeds, st.integers(8, 40), st.data())
def test_visionzip_keeps_what_cls_looks_at_and_merges_the_rest(seed, n, data):
    features, count = distinct(seed, 1, n, 6), data.draw(st.integers(1, n - 1))
    attention, keys = distinct(seed + 1, 1, n).abs(), distinct(seed + 2, 1, n, 5)
    few = int(count * 10 / 64)
    dominant = sorted(range(n), key=lambda i: -float(attention[0, i]))[: count - few]
    rest = [i for i in range(n) if i not in dominant]
    targets = rest[:: max(1, len(rest) // few)][:few] if few else []
    goes = {target: [] for target in targets}
    for i in rest if few else []:
        if i not in targets:
            goes[
                max(targets, key=lambda t: float(F.cosine_similarity(keys[0, i].double(), keys[0, t].double(), 0)))
            ] += [i]
    wanted = {i: features[0, i] for i in dominant}
    wanted |= {t: features[0, t] + (features[0, of].mean(0) if of else 0) for t, of in goes.items()}
    signals = {"cls_attention": attention, "keys": keys, "tower": features}
    kept = choose("visionzip", features, count=count, signals=signals)
    assert kept.index[0].tolist() == sorted(wanted)
    rows = torch.stack([wanted[i] for i in sorted(wanted)])
    torch.testing.assert_close(kept.weight[0] @ features[0], rows, atol=1e-5, rtol=1e-5)


# What is learned


@given(seeds, st.integers(2, 20), st.data())
def test_glances_are_the_means_that_their_network_asks_for(seed, n, data):
    count = data.draw(st.integers(1, n - 1))
    features, module = distinct(seed, 2, n, 6), pruning.make("tokenlearner", 6, count, seed)
    kept = choose("tokenlearner", features, module, count=count)
    state = {name: p.double() for name, p in module.state_dict().items()}
    for image, rows in zip(features, kept.weight @ features, strict=True):
        unit = image.double() / image.double().norm(dim=1, keepdim=True) * math.sqrt(6)
        inner = F.gelu(unit @ state["hidden.weight"].T + state["hidden.bias"])
        maps = torch.softmax(inner @ state["glances.weight"].T + state["glances.bias"], dim=0)
        torch.testing.assert_close(rows.double(), maps.T @ image.double(), atol=1e-5, rtol=1e-4)


def chance(module: torch.nn.Module, image: Tensor) -> Tensor:
    """DynamicViT's p of each row, by hand."""
    unit = image / image.norm(dim=1, keepdim=True) * math.sqrt(image.shape[1])
    inner = F.gelu(module.within(unit))
    local, whole = inner[:, : inner.shape[1] // 2], inner[:, inner.shape[1] // 2 :]
    return torch.sigmoid(module.out(torch.cat([local, whole.mean(0).expand_as(local)], dim=1))[:, 0])


@given(seeds, st.integers(2, 20), st.data())
def test_dynamicvit_keeps_the_likeliest_rows_and_pays_for_a_wrong_share(seed, n, data):
    count = data.draw(st.integers(1, n - 1))
    features, module = distinct(seed, 2, n, 6), pruning.make("dynamicvit", 6, count, seed).eval()
    kept = choose("dynamicvit", features, module, count=count)
    for image, index, loss in zip(features, kept.index, kept.loss, strict=True):
        p = chance(module, image)
        best = p.argsort(descending=True)
        assume(p[best[count - 1]] - p[best[count]] > 1e-4)
        assert index.tolist() == sorted(best[:count].tolist())
        torch.testing.assert_close(loss, 2 * (p.mean() - count / n) ** 2)


@given(seeds, st.integers(2, 12), st.data())
def test_a_row_that_dynamicvit_keeps_is_itself_and_tells_its_chance_what_it_was_worth(seed, n, data):
    """d loss / d logit_i = (1 - p_i) <d loss / d row_i, row_i> for rows that stay, and nothing for the others."""
    count = data.draw(st.integers(1, n - 1))
    features, module = distinct(seed, 1, n, 6), pruning.make("dynamicvit", 6, count, seed).train()
    kept = choose("dynamicvit", features, module, count=count)
    rows = kept.weight @ features
    torch.testing.assert_close(rows[0], features[0, kept.index[0]])
    slope = distinct(seed + 1, count, 6)
    found = torch.autograd.grad((rows[0] * slope).sum(), module.out[-1].bias, retain_graph=True)[0]
    p = chance(module, features[0])[kept.index[0]]
    wanted = ((1 - p) * (slope * features[0, kept.index[0]]).sum(1)).sum()
    torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=1e-4)


def test_the_noise_of_dynamicvit_follows_the_seed_and_gives_every_row_its_chance():
    """Of two rows with chances p and q one stays; the first one as often as  log-odds + logistic noise  says."""
    features, module = distinct(3, 1, 2, 6), pruning.make("dynamicvit", 6, 1, 3)
    with torch.no_grad():
        module.out[-1].weight.mul_(8)
    p, q = chance(module, features[0]).detach().logit()
    first = [int(choose("dynamicvit", features, module.train(), count=1, seed=s).index) == 0 for s in range(3000)]
    again = [int(choose("dynamicvit", features, module.train(), count=1, seed=s).index) == 0 for s in range(50)]
    assert again == first[:50]
    u = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = u.log() - (-u).log1p()
    share = (p + noise[:, 0] > q + noise[:, 1]).double().mean()
    assert 0.05 < share < 0.95
    assert abs(sum(first) / len(first) - share) < 4 * math.sqrt(0.25 / 3000)


# In a model


def features_of(net, batch: dict) -> list[Tensor]:
    given = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
    return list(net.get_image_features(**given).pooler_output)


def by_hand(net, batch: dict, plugin: str, positions: str, module) -> tuple[Tensor, float]:
    """The summed loss of a fast step without isolator, by transformers: embeddings put together one row at a time. And
    the plugin's own loss, of each image once for each answer beside it."""
    total, more = 0.0, 0.0
    next_image = iter(features_of(net, batch))
    attention = batch["attention_mask"]
    for line in range(len(attention)):
        ids = batch["input_ids"][line][attention[line].bool()]
        labels = batch["labels"][line][attention[line].bool()]
        rows, targets, places, i = [], [], [], 0
        while i < len(ids):
            target = int(labels[i + 1]) if i + 1 < len(ids) else -100
            if ids[i] != tiny.IMAGE:
                rows, targets, places = [*rows, net.get_input_embeddings()(ids[i])], [*targets, target], [*places, i]
                i += 1
                continue
            image = next(next_image)
            newline = getattr(net.model, "image_newline", None)
            mask = torch.ones(len(image), dtype=torch.bool) if newline is None else (image != newline).any(1)
            kept = choose(plugin, image[None], module, keep=KEEP, mask=mask[None])
            if kept.loss is not None:
                more += float(kept.loss.detach()) * int((labels[1:] != -100).sum())
            of = image if kept.weight is None else kept.weight[0] @ image
            for k, index in enumerate(kept.index[0].tolist()):
                rows, places = [*rows, of[k if kept.weight is not None else index]], [*places, i + index]
            last = int(labels[i + len(image)]) if i + len(image) < len(ids) else -100
            targets += [-100] * (len(kept.index[0]) - 1) + [last]
            i += len(image)
        place = torch.tensor(places if positions == "original" else range(len(places)))[None]
        hidden = net.model.language_model(inputs_embeds=torch.stack(rows)[None], position_ids=place).last_hidden_state
        total = total + F.cross_entropy(net.lm_head(hidden)[0], torch.tensor(targets), reduction="sum")
    return total, more


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("plugin", ["pool", "tome", "tokenlearner", "dynamicvit"])
def test_a_fast_step_sees_the_merged_rows_in_their_places(family, plugin, positions):
    net, batch = tiny.model(family), tiny.batch(family)
    model = DualSpeed(copy.deepcopy(net), plugin=plugin, keep=KEEP, isolator=0, positions=positions, seed=SEED).train()
    module = copy.deepcopy(model.chooser.learned)
    if module is not None:  # noise is another test's; here both draw none
        model.chooser.eval(), module.eval()
    model.step = 0
    out = model(**batch, plan=FAST)
    answers, ce = out.metrics["answers"], out.metrics["ce"] * out.metrics["answers"]
    oracle = tiny.twin(net)
    wanted, more = by_hand(oracle, batch, plugin, positions, module)
    torch.testing.assert_close(ce, wanted.detach(), atol=1e-3, rtol=1e-5)
    assert (more > 1e-3) == (plugin == "dynamicvit")
    torch.testing.assert_close(out.loss.detach() * answers, wanted.detach() + more, atol=1e-3, rtol=1e-5)
    (out.loss * answers).backward()
    wanted.backward()
    got, want = (m.multi_modal_projector.linear_1.weight.grad for m in (model.vlm.model.model, oracle.model))
    assert not tiny.difference(got, want, rel=1e-4)


def test_visionzip_merges_before_the_projector(family):
    """The same step with a plugin that puts ready-made rows, projected by hand, where VisionZip's belong."""
    net, batch = tiny.model(family), tiny.batch(family)
    model = DualSpeed(copy.deepcopy(net), plugin="visionzip", keep=0.9, seed=SEED).train()
    seen, original = [], pruning.choose

    def listen(name, features, **how):
        seen.append((original(name, features, **how), how["signals"]["tower"]))
        return seen[-1][0]

    patch = pytest.MonkeyPatch()
    patch.setattr(pruning, "choose", listen)
    pruned = model(**batch, plan=Plan("fast", keep=0.9))
    patch.undo()
    kept, tower = seen[0]
    assert (kept.weight.sum(2) > 1.5).any()
    images = [image.detach().clone() for image in features_of(net, batch)]
    for image, index, weight, features in zip(images, kept.index, kept.weight, tower, strict=True):
        for k, place in enumerate(index.tolist()):
            if place >= 0:
                image[place] = net.model.multi_modal_projector(weight[k] @ features)

    @pruning.register("ready")
    def ready(features, *, most, **_):
        return kept.index.clamp(min=0)

    try:
        other = DualSpeed(copy.deepcopy(net), plugin="ready", keep=0.9, seed=SEED).train()
        other.vlm.features, other.vlm.rowwise = lambda *given: {"image": images}, False
        wanted = other(**batch, plan=Plan("fast", keep=0.9))
    finally:
        del pruning.registry.PLUGINS["ready"]
    torch.testing.assert_close(pruned.loss, wanted.loss)


@pytest.mark.parametrize("plugin", LEARNED)
def test_a_fast_step_teaches_the_plugin_and_no_other_step_touches_it(family, plugin):
    net, batch = tiny.model(family), tiny.batch(family)
    model = DualSpeed(net, plugin=plugin, keep=KEEP, seed=SEED).train()
    model.step = 3
    for plan in (SLOW, FULL):
        model(**batch, plan=plan).loss.backward()
        assert all(p.grad is None for p in model.chooser.parameters())
    model.zero_grad()
    model(**batch, plan=FAST).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.chooser.parameters())
    model.zero_grad()
    model(**tiny.batch(family, outlines=((7,), (4,))), plan=FAST).loss.backward()  # nothing to prune: zeros, not None
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.chooser.parameters())
    with torch.no_grad():
        plain = tiny.twin(net).eval()(**batch).logits
        torch.testing.assert_close(model.eval()(**batch).logits, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plugin", ["dynamicvit", "tokenlearner", "tome"])
def test_cutting_a_batch_changes_nothing(family, plugin):
    net, samples = tiny.model(family), tiny.samples(family)
    found = []
    for cuts in ([samples], [[one] for one in samples], [samples[:2], samples[2:]]):
        model = DualSpeed(copy.deepcopy(net), plugin=plugin, keep=KEEP, seed=SEED).train()
        model.step, total = 5, 0.0
        answers = int((tiny.collate(samples)["labels"][:, 1:] != tiny.IGNORE).sum())
        for part in cuts:
            loss = model(**tiny.collate(part), plan=FAST, num_items_in_batch=answers).loss
            loss.backward()
            total += loss.detach()
        found.append({"loss": total, **tiny.gradients(model)})
    assert not tiny.difference(found[1], found[0])
    assert not tiny.difference(found[2], found[0])


def test_a_teacher_draws_no_noise(llava):
    """Its loss is that of the pruned picture that the plugin thinks best, whatever the step."""
    model, batch, found = DualSpeed(llava, plugin="dynamicvit", keep=KEEP, seed=SEED).train(), tiny.batch("llava"), []
    for step in range(4):
        model.step = step
        found.append(float(model(**batch, plan=SLOW).metrics["ce_teacher"]))
        assert model.chooser.learned.training
    assert len({*found}) == 1
    fast = set()
    for step in range(4):
        model.step = step
        fast.add(float(model(**batch, plan=FAST).metrics["ce"].detach()))
    assert len(fast) > 1


@pytest.mark.parametrize("plugin", ["tokenlearner", "dynamicvit", "visionzip"])
def test_the_largest_picture_there_is_can_be_pruned(llava_next, plugin):
    """2,928 rows with its newlines, 2,880 without, which is what is counted."""
    sample = tiny.sample("llava_next", (2, tiny.IMG, 6), 12)
    assert sample["sizes"] == [(48, 48)]
    model = DualSpeed(llava_next, plugin=plugin, keep=0.9).train()
    model.step = 0
    assert model(**tiny.collate([sample]), plan=Plan("fast", keep=0.9)).loss.isfinite()


def test_a_tower_that_trains_learns_from_merged_rows(llava):
    llava.model.vision_tower.requires_grad_(True)
    model = DualSpeed(llava, plugin="visionzip", keep=0.9).train()
    model(**tiny.batch("llava"), plan=Plan("fast", keep=0.9)).loss.backward()
    assert max(float(p.grad.abs().max()) for p in llava.model.vision_tower.parameters() if p.grad is not None) > 0


def test_a_learned_plugin_refuses_more_rows_than_it_was_made_for_and_a_change_of_plugin(llava):
    model = DualSpeed(llava, plugin="tokenlearner", keep=0.2).train()
    with pytest.raises(UserError, match="was made for 1 tokens"):
        model(**tiny.batch("llava"), plan=Plan("fast", keep=0.9))
    with pytest.raises(UserError, match="the same in all stages"):
        model.chooser.switch("divprune")
