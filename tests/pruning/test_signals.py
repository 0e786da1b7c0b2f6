"""Recorded signals against transformers' own eager attention maps, and what a step keeps by them."""

import copy

import pytest
import torch
from support import tiny
from torch import Tensor, nn
from transformers import SiglipVisionModel

from tinyspeed import DualSpeed, UserError, pruning, recipe
from tinyspeed.models.families import family as adapter
from tinyspeed.pruning import signals
from tinyspeed.scheduler import Plan

KEEP = 0.4
BOTH = ("cls_attention", "tower")
FAST, SLOW, FULL = Plan("fast", keep=KEEP), Plan("slow", keep=KEEP, distill=1.0), Plan("full")


def seen(family: str, batch: dict) -> Tensor:
    """The crops that the tower sees, without those that fill up a batch."""
    pixels = batch["pixel_values"]
    if family == "llava":
        return pixels
    shape = (tiny.PINPOINTS, tiny.SIDE)
    sizes = batch["image_sizes"].tolist()
    return torch.cat([p[: tiny.image_size_to_num_patches(s, *shape)] for p, s in zip(pixels, sizes, strict=True)])


@torch.no_grad()
def eager(net: nn.Module, pixels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """By transformers, asked for its attention maps: (crops, patches) of [CLS], and (crops, patches, width) behind."""
    tower = copy.deepcopy(net.model.vision_tower).eval()
    tower.set_attn_implementation("eager")
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    return out.attentions[block].mean(1)[:, 0, 1:], out.hidden_states[block + 1][:, 1:]


def by_hand(net: nn.Module, family: str, batch: dict, block: int = 1) -> list[tuple[list[int], Tensor]]:
    """Of each image: which of its feature rows are picture, and the attention that [CLS] pays them. A row's crop and
    patch are found by projecting all patches and looking for it."""
    attention, tower = eager(net, seen(family, batch), block)
    with torch.no_grad():
        every = net.model.multi_modal_projector(tower).flatten(0, 1)
        given = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
        images = net.get_image_features(**given).pooler_output
    newline = getattr(net.model, "image_newline", None)
    found = []
    for image in images:
        places = [i for i, row in enumerate(image) if newline is None or not torch.equal(row, newline)]
        distance = torch.cdist(image[places].double(), every.double())
        assert distance.min(1).values.max() < 1e-4
        found.append((places, attention.flatten()[distance.argmin(1)]))
    return found


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_next_video"])
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_what_is_recorded_is_what_eager_attention_says(family, layer):
    net, batch = tiny.model(family).eval(), tiny.batch(family)
    net.config.vision_feature_layer = layer
    block = layer + 3 if layer < 0 else layer - 1  # of three, whose hidden states are numbered from the embeddings on
    vlm = adapter(net)
    with torch.no_grad(), signals.recording(vlm, batch, BOTH) as recorded:
        features = vlm.features(batch, "fast")["image"]
    wanted = by_hand(net, family, batch, block)
    for image, rows, tower, (places, attention) in zip(features, *(recorded[n] for n in BOTH), wanted, strict=True):
        assert rows.shape == image.shape[:1]
        torch.testing.assert_close(rows[places], attention, atol=1e-6, rtol=1e-5)
        assert (attention > 0).all()
        torch.testing.assert_close(vlm.projector(tower[places]), image[places], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [-2, 1])
def test_the_keys_are_those_of_the_block_that_the_projector_reads(layer, llava):
    """By the block's own layers, from its input as transformers says it."""
    llava.eval().config.vision_feature_layer = layer
    vlm, batch = adapter(llava), tiny.batch("llava")
    with torch.no_grad(), signals.recording(vlm, batch, ("keys",)) as recorded:
        vlm.features(batch, "fast")
        into = layer + 3 if layer < 0 else layer - 1
        hidden = vlm.tower(batch["pixel_values"], output_hidden_states=True).hidden_states[into]
        block = getattr(vlm.tower, "vision_model", vlm.tower).encoder.layers[into]
        keys = torch.nn.functional.linear(
            block.layer_norm1(hidden), block.self_attn.k_proj.weight, block.self_attn.k_proj.bias
        )
    heads = keys.chunk(block.self_attn.num_heads, dim=-1)
    wanted = (sum(head.double() for head in heads) / len(heads))[:, 1:]  # without [CLS]
    assert len(heads) > 1
    torch.testing.assert_close(torch.stack(recorded["keys"]).double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("plan", [FAST, SLOW], ids=lambda plan: plan.mode)
def test_a_step_keeps_the_rows_with_most_attention(family, plan):
    """The same loss and gradients as with a plugin that knows beforehand which rows they are."""
    net, batch = tiny.model(family), tiny.batch(family)
    images = by_hand(net, family, batch)

    @pruning.register("known")
    def known(features, *, most, counts, **_):
        picks = torch.zeros(len(images), most, dtype=torch.long)
        for row, (places, attention), count in zip(picks, images, counts.tolist(), strict=True):
            row[:count] = torch.tensor(places)[attention.topk(count).indices]
        return picks

    found = []
    try:
        for plugin in ("cls_topk", "known", "divprune"):
            model = DualSpeed(copy.deepcopy(net), plugin=plugin, keep=KEEP).train()
            loss = model(**batch, plan=plan).loss
            loss.backward()
            found.append({"loss": loss, **tiny.gradients(model)})
    finally:
        del pruning.registry.PLUGINS["known"]
    assert not tiny.difference(found[0], found[1])
    assert tiny.difference(found[0], found[2])  # it does matter which rows are kept


def hooks_of(net: nn.Module) -> list[tuple[str, int]]:
    hooks = [(name, [*module._forward_hooks, *module._forward_pre_hooks]) for name, module in net.named_modules()]
    return [(name, hook) for name, of in hooks for hook in of]


@pytest.mark.parametrize("plugin", ["cls_topk", "vispruner", "visionzip"])
def test_nothing_stays_hooked_and_full_steps_record_nothing(plugin, family, monkeypatch):
    net, batch = tiny.model(family), tiny.batch(family)
    model = DualSpeed(net, plugin=plugin, keep=KEEP).train()
    recorded, original = [], pruning.choose
    monkeypatch.setattr(pruning, "choose", lambda *a, **how: recorded.append(how["signals"]) or original(*a, **how))
    model(**batch, plan=FULL)
    before = hooks_of(net)  # transformers' own
    for plan in (FAST, FULL, SLOW):
        assert model(**batch, plan=plan).loss.isfinite()
    assert [set(signals) for signals in recorded] == [set(pruning.entry(plugin).needs)] * 2
    text = tiny.batch(family, outlines=((7,), (4,)))
    assert model(**text, plan=FAST).loss.isfinite()
    model.vlm.projector.forward = None  # a step that dies within the forward that is recorded
    with pytest.raises(TypeError):
        model(**batch, plan=FAST)
    assert hooks_of(net) == before


def refusal(make) -> str:
    with pytest.raises(UserError) as caught:
        make()
    return str(caught.value)


def test_a_tower_without_cls_is_refused_and_the_plugins_that_work_are_named():
    net = tiny.model("llava_onevision")
    said = refusal(lambda: DualSpeed(net, plugin="cls_topk"))
    assert "'siglip_vision_model' tower has no [CLS]" in said
    others = [name for name in pruning.names() if name not in ("cls_topk", "vispruner", "visionzip")]
    assert ", ".join(others) in said
    assert "vispruner" not in said
    DualSpeed(net, plugin="coverage")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"vision_feature_layer": [-2, -1]}, "layers"),
        ({"vision_feature_layer": 0}, "layers"),
        ({"vision_feature_select_strategy": "full"}, "reads"),
    ],
    ids=str,
)
def test_what_the_projector_reads_must_be_the_patches_of_one_block(change, why, llava):
    for name, value in change.items():
        setattr(llava.config, name, value)
    assert why in refusal(lambda: DualSpeed(llava, plugin="cls_topk"))


def test_features_kept_on_disk_come_without_attention(family, tmp_path):
    net, batch = tiny.model(family), tiny.batch(family)
    model = DualSpeed(net, plugin="cls_topk").train()
    batch["tower_features"] = model.vlm.tower_features(batch.pop("pixel_values"), batch.get("image_sizes"))
    said = refusal(lambda: model(**batch, plan=FAST))
    assert "data.feature_cache_gb = 0" in said
    assert "divprune" in said
    file = tmp_path / "mine.toml"
    file.write_text(
        '[model]\npath = "m"\n[data]\nkind = "chat"\nfile = "f"\nfeature_cache_gb = 1\n[train]\nsteps = 1\n'
        '[dualspeed]\nplugin = "vispruner"\n'
    )
    assert "data.feature_cache_gb" in refusal(lambda: recipe.read(str(file)))
    assert recipe.read(str(file), ["dualspeed.plugin=coverage"]).dualspeed.plugin == "coverage"
    assert recipe.read(str(file), ["data.feature_cache_gb=0"]).dualspeed.plugin == "vispruner"


def test_videos_have_no_signals():
    batch = tiny.batch("llava_next_video", outlines=((2, tiny.VID, 6),))
    model = DualSpeed(tiny.model("llava_next_video"), plugin="cls_topk").train()
    assert "videos" in refusal(lambda: model(**batch, plan=FAST))


def test_a_users_signal_that_no_tower_gives_is_refused(llava):
    pruning.register("psychic", needs=("the_answer",))(lambda features, **_: features)
    try:
        assert "the_answer" in refusal(lambda: DualSpeed(llava, plugin="psychic"))
    finally:
        del pruning.registry.PLUGINS["psychic"]


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava without CLS"])
def test_what_the_projector_reads_can_be_recorded_without_cls_and_by_both_modes(kind):
    """By a plugin of a user's: the rows that a projector makes of what it is given are the features."""
    net, batch, recorded = tiny.model(kind.split()[0]), tiny.batch(kind.split()[0]), []
    if "without" in kind:
        vision = tiny.config("llava_onevision").vision_config
        net.config.vision_config, net.config.vision_feature_select_strategy = vision, "full"
        net.model.vision_tower = SiglipVisionModel(vision).requires_grad_(False)

    def reads(features, *, most, tower, **others):
        assert "cls_attention" not in others
        recorded.append((features, tower))
        return torch.arange(most, device=features.device).expand(len(features), -1)

    pruning.register("reads", needs=("tower",), takes=("cls_attention",))(reads)
    try:
        model = DualSpeed(net, plugin="reads", keep=KEEP).train()
        for plan in (FAST, SLOW):
            assert model(**batch, plan=plan).loss.isfinite()
        other = tiny.model("llava_onevision")  # which pools behind the projector
        assert "not projected row by row; plugins that do without: coverage" in refusal(
            lambda: DualSpeed(other, plugin="reads")
        )
    finally:
        del pruning.registry.PLUGINS["reads"]
    assert len(recorded) == 2
    for features, tower in recorded:
        assert features.shape[:2] == tower.shape[:2]
        if kind != "llava_next":  # whose packing adds rows that no projector made
            torch.testing.assert_close(model.vlm.projector(tower), features, atol=1e-4, rtol=1e-4)
    assert torch.equal(recorded[0][1], recorded[1][1])
