"""LLaVA-NeXT-Video and LLaVA-OneVision: images and videos in any order, through the same gather as everything else.

The laws and oracles are those of `test_model.py`; here are those that videos, or newlines in new places, could break.
"""

import copy
import inspect

import pytest
import torch
from PIL import Image
from support import tiny
from support.forwards import FAST, FULL, KEEP, SLOW, answers_of, backward, fast_by_hand, of_net, wrap
from support.tiny import IMG, VID
from torch.nn import functional as F
from transformers import LlavaOnevisionImageProcessor

from tinyspeed import DualSpeed, UserError
from tinyspeed.models import families, loading, lora, precision, stages

MIXES = {
    "images": ((2, IMG, 6), (7,), (3, IMG, IMG, 4), (3, IMG)),
    "videos": ((2, VID, 3), (5,), (VID, VID, 4)),
    "mixed": ((2, IMG, VID, IMG, 5), (3, VID, 2, IMG, 4), (6,), (1, IMG, 3), (4, VID)),
    "text": ((4,), (6,)),
}

every_plan = pytest.mark.parametrize("plan", [FULL, FAST, SLOW], ids=lambda plan: plan.mode)
every_mix = pytest.mark.parametrize("mix", MIXES)
every_layout = pytest.mark.parametrize("layout", ["padded", "packed"])


@pytest.fixture(params=tiny.VIDEO_FAMILIES)
def family(request) -> str:
    return request.param


def batch_of(family: str, mix: str = "mixed", **how) -> dict[str, torch.Tensor]:
    return tiny.batch(family, outlines=MIXES[mix], **how)


@every_mix
@every_layout
def test_a_full_step_has_the_loss_logits_and_gradients_of_transformers(family, mix, layout):
    net, batch = tiny.model(family), batch_of(family, mix, padding="left" if layout == "packed" else "right")
    hf = tiny.twin(net)
    model = wrap(net, layout=layout)
    want, want_gradients = backward(hf, batch)
    got, got_gradients = backward(model, batch, plan=FULL)
    assert not tiny.difference(got, want)
    # What a mix does not use is touched with a zero weight here, and not at all by transformers.
    idle = {name: g for name, g in of_net(got_gradients).items() if name not in want_gradients}
    assert all("projector" in name or "newline" in name for name in idle)
    assert not tiny.difference(
        of_net(got_gradients), want_gradients | {name: torch.zeros_like(g) for name, g in idle.items()}
    )
    out = model(**batch, plan=FULL, return_logits=True)
    logits, targets = answers_of(hf(**batch).logits, batch["labels"])
    assert not tiny.difference(out.logits, logits)
    assert torch.equal(out.targets, targets)


@every_mix
def test_evaluation_is_the_wrapped_model_exactly(family, mix):
    net, batch = tiny.model(family), batch_of(family, mix)
    hf, model = tiny.twin(net).eval(), wrap(net).eval()
    with torch.no_grad():
        got, want = model(**batch), hf(**batch)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("mix", ["images", "videos", "mixed"])
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("isolator", [0, 4])
def test_a_fast_step_has_the_logits_of_its_sequence_put_together_by_hand(family, mix, positions, isolator):
    net, batch = tiny.model(family), batch_of(family, mix)
    hf = tiny.twin(net)
    model = wrap(net, positions=positions, isolator=isolator)
    out = model(**batch, plan=FAST, return_logits=True)
    logits, targets = fast_by_hand(hf, batch, model.isolator.weight, positions)
    assert torch.equal(out.targets, targets)
    assert not tiny.difference(out.logits, logits)
    assert not tiny.difference(out.loss, F.cross_entropy(logits, targets))


@pytest.mark.parametrize("plan", [FAST, SLOW], ids=lambda plan: plan.mode)
def test_packed_and_padded_layouts_have_the_same_loss_and_gradients(family, plan):
    net, batch = tiny.model(family), batch_of(family)
    padded, packed = (
        backward(wrap(copy.deepcopy(net), layout=layout), batch, plan=plan) for layout in ("padded", "packed")
    )
    assert not tiny.difference(packed[0], padded[0])
    assert not tiny.difference(packed[1], padded[1])


@every_plan
def test_cutting_a_batch_into_micro_batches_changes_nothing(family, plan):
    data, model = tiny.samples(family, outlines=MIXES["mixed"]), wrap(tiny.model(family))
    answers = sum(label != tiny.IGNORE for s in data for label in s["labels"])
    whole, gradients = backward(model, tiny.collate(data), plan=plan)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for part in (data[:1], data[1:3], data[3:4], data[4:]):  # the last two: an image and no video, and the reverse
        loss = model(**tiny.collate(part), plan=plan, num_items_in_batch=answers).loss
        loss.backward()
        total += loss.detach()
    assert not tiny.difference(total, whole)
    assert not tiny.difference(tiny.gradients(model), gradients)


# What is pruned


def test_k_counts_pictures_of_an_image_or_a_whole_video_and_each_has_one_isolator(family):
    isolator, data = 4, tiny.samples(family, outlines=MIXES["mixed"])
    model = wrap(tiny.model(family), isolator=isolator)
    newline, seen = model.vlm.newline, []

    def count(module, args, kwargs):
        rows = kwargs["inputs_embeds"]
        seen.append([int((rows == row).all(-1).sum()) for row in (newline, *model.isolator.weight)])

    model.vlm.language_model.register_forward_pre_hook(count, with_kwargs=True)
    fast, full = (model(**tiny.collate(data), plan=plan).metrics for plan in (FAST, FULL))
    images = [
        tiny.image_rows(family, size, cropped=family == "llava_next_video" or len(s["sizes"]) == 1)
        for s in data
        for size in s["sizes"]
    ]
    images += [tiny.video_rows(family)] * sum(len(s["videos"]) for s in data)
    text = sum(token not in (tiny.IMAGE, tiny.VIDEO) for s in data for token in s["ids"])
    assert seen == [[0, *[len(images)] * isolator], [sum(newlines for _, newlines in images), *[0] * isolator]]
    assert fast["rows_kept"] == text + sum(int(KEEP * pictures + 1e-6) + isolator for pictures, _ in images)
    assert full["rows_kept"] == full["rows_full"] == text + sum(map(sum, images))


@pytest.mark.parametrize("how", ["fp32", "bf16"])
def test_structural_rows_are_those_that_change_with_the_newline(family, how):
    """An account that does not ask which rows equal the newline. In a bf16 model it is fp32, since it trains."""
    net, batch = tiny.model(family).to(precision.DTYPES[how]), batch_of(family)
    stages.set_trainable(net, "align")
    adapter = families.family(net)
    visual = {name: value for name, value in batch.items() if "image" in name or "pixel" in name}
    with torch.no_grad(), precision.autocast(how, torch.device("cpu")):
        before = [image for images in adapter.features(visual, "full").values() for image in images]
        lengths = {kind: [len(image) for image in of] for kind, of in adapter.features(visual, "full").items()}
        shown = adapter.shown(visual, lengths)
        adapter.newline.add_(1)
        after = [image for images in adapter.features(visual, "full").values() for image in images]
    for mask, a, b in zip(shown, before, after, strict=True):
        assert torch.equal(mask, (a == b).all(-1))


def test_onevision_reads_the_batch_of_its_image_processor():
    adapter = families.family(tiny.model("llava_onevision"))
    process = LlavaOnevisionImageProcessor(size={"height": 24, "width": 24}, image_grid_pinpoints=tiny.PINPOINTS)
    image = Image.linear_gradient("L").resize((70, 50)).convert("RGB")
    batch = process([[image], [image, image]], return_tensors="pt")
    lengths = [len(image) for image in adapter.features(batch, "fast")["image"]]
    shown = adapter.shown(batch, {"image": lengths, "video": []})
    rows = [tiny.image_rows("llava_onevision", (50, 70), cropped) for cropped in (True, False, False)]
    found = [(int(mask.sum()), n) for mask, n in zip(shown, lengths, strict=True)]
    assert found == [(n, n + m) for n, m in rows]


def test_onevision_takes_each_image_for_the_only_one_of_its_sample_unless_told():
    """A batch without `batch_num_images`, as processors make for flat lists of images."""
    net, batch = tiny.model("llava_onevision"), tiny.batch("llava_onevision", outlines=((2, IMG, 6), (VID, 1, IMG, 3)))
    model = wrap(net)
    told = model(**batch, plan=FAST).loss
    assert (batch.pop("batch_num_images") == 1).all()
    assert torch.equal(model(**batch, plan=FAST).loss, told)


# Which parameters a step touches


@every_plan
def test_every_mix_touches_the_same_parameters(family, plan):
    """Which gradients exist depends on the plan and not on the data, or ranks would wait for each other forever."""
    model = wrap(tiny.model(family))
    touched = {mix: backward(model, batch_of(family, mix), plan=plan)[1].keys() for mix in MIXES}
    assert len(set(map(frozenset, touched.values()))) == 1
    names = touched["videos"]
    assert ("model.model.image_newline" in names) == (plan.mode != "fast")
    assert ("isolator.weight" in names) == (plan.mode == "fast")
    assert not any("vision_tower" in name for name in names)
    assert any("projector" in name for name in names)


@pytest.mark.parametrize("mix", ["images", "videos", "mixed"])
def test_a_slow_step_leaves_the_isolators_gradient_alone_and_a_fast_step_moves_it(family, mix):
    model, batch = wrap(tiny.model(family)), batch_of(family, mix)
    backward(model, batch, plan=SLOW)
    assert model.isolator.weight.grad is None
    backward(model, batch, plan=FAST)
    assert model.isolator.weight.grad.abs().min() > 0  # every row of it


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_stage_trains_the_connector_and_the_llm_or_the_connector_alone(family, stage):
    model = wrap(tiny.model(family))
    stages.set_trainable(model.model, stage)
    full, fast = (backward(model, batch_of(family), plan=plan)[1].keys() for plan in (FULL, FAST))
    parts = ["multi_modal_projector", "image_newline", "isolator"]
    parts += ["language_model", "lm_head"] if stage == "train" else []
    assert full | fast == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


@pytest.mark.parametrize("stage", [None, *stages.STAGES])
def test_lora_adapts_the_llms_linear_layers_and_nothing_else(family, stage):
    adapted = lora.add_lora(tiny.model(family), rank=2)
    if stage:
        stages.set_trainable(adapted, stage)
    model = wrap(adapted)
    for plan in (FULL, FAST):
        names = backward(model, batch_of(family), plan=plan)[1].keys()
        adapters = {name for name in names if "lora_" in name}
        assert len(adapters) == (0 if stage == "align" else 3 * 7 * 2)  # 3 layers of 7 linear ones, A and B
        assert all("language_model.layers" in name for name in adapters)
        # Beside adapters the newline stays as it is: they cannot carry it.
        projector = {name for name in names if "multi_modal_projector" in name}
        assert names - adapters == projector | ({"isolator.weight"} if plan.mode == "fast" else set())
        assert bool(projector) == (stage is not None)


# From disk


def test_a_checkpoint_loads_and_trains_in_full_precision_and_in_4_bits(family, tmp_path):
    """Loading in 4 bits checks for itself that the LLM's layers are quantised, and nothing else is."""
    tiny.model(family).save_pretrained(tmp_path)
    batch = batch_of(family)
    losses = []
    for quantise in ("none", "nf4"):
        net = lora.add_lora(loading.load_model(str(tmp_path), quantise=quantise), rank=2)
        stages.set_trainable(net, "train")
        loss, gradients = backward(wrap(net), batch, plan=FULL)
        losses.append(loss.item())
        assert any("lora_A" in name for name in gradients)
    want = tiny.twin(tiny.model(family))(**batch).loss.item()
    assert losses == [pytest.approx(want, rel=1e-5), pytest.approx(want, rel=0.5)]
    assert losses[0] != losses[1]


# Drop-in


def test_forward_names_every_key_of_a_batch(family):
    """transformers.Trainer drops the columns that it does not find in the signature."""
    known = inspect.signature(DualSpeed.forward).parameters.keys()
    theirs = inspect.signature(tiny.MODELS[family].forward).parameters.keys()
    assert batch_of(family).keys() <= known
    assert {name for name in theirs if "pixel" in name or "sizes" in name or "num_images" in name} <= known


# What is refused


@every_plan
@pytest.mark.parametrize("kind", ["image", "video"])
def test_truncated_placeholders_are_refused_with_both_counts(family, plan, kind):
    token = {"image": tiny.IMAGE, "video": tiny.VIDEO}[kind]
    model, batch = wrap(tiny.model(family)), batch_of(family)
    rows = int((batch["input_ids"] == token).sum())
    batch["input_ids"][tuple((batch["input_ids"] == token).nonzero()[0])] = tiny.TEXT
    with pytest.raises(UserError, match=rf"{rows - 1} {kind} placeholder.* {rows} feature rows"):
        model(**batch, plan=plan)


@every_plan
def test_pixels_without_placeholders_and_placeholders_without_pixels_are_refused(family, plan):
    model, batch = wrap(tiny.model(family)), batch_of(family)
    frames = batch.pop("pixel_values_videos")
    with pytest.raises(UserError, match="video placeholder tokens, but its 0 video"):
        model(**batch, plan=plan)
    with pytest.raises(UserError, match="holds 0 video placeholder tokens, but its 3 video"):
        model(**batch_of(family, "images"), pixel_values_videos=frames, plan=plan)


def test_a_model_without_videos_refuses_them(llava_next):
    with pytest.raises(UserError, match="'llava_next' model takes no videos"):
        wrap(llava_next)(**tiny.batch("llava_next"), pixel_values_videos=torch.zeros(1, 2, 3, 24, 24), plan=FULL)


def test_nan_frames_are_refused_before_they_reach_the_llm(family):
    model, batch = wrap(tiny.model(family)), batch_of(family)
    batch["pixel_values_videos"][0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        model(**batch, plan=FAST)


def test_images_without_their_sizes_are_refused(family):
    batch = batch_of(family)
    del batch["image_sizes"]
    with pytest.raises(UserError, match=rf"{family}.*image_sizes"):
        wrap(tiny.model(family))(**batch, plan=FULL)
