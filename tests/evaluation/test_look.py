"""A look draws what `pruning.select` keeps of the features that training sees, and draws it in the right place."""

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tinyspeed import UserError, pruning
from tinyspeed.data import digits, digits_model, images
from tinyspeed.evaluation.look import DIM, GRID, PATCH, encode, look, melt, patches, shade
from tinyspeed.models import families, loading

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 24, "patch_size": 8}
COLOUR = (200, 100, 40)
LOOKED = [name for name in pruning.works_with(()) if not pruning.entry(name).learned]
CLIP_MEAN, CLIP_STD = (
    torch.tensor([0.48145466, 0.4578275, 0.40821073]),
    torch.tensor([0.26862954, 0.26130258, 0.27577711]),
)


@pytest.fixture
def photo(tmp_path):
    """Coloured noise, wider than high, large grains: 60 x 40 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 15, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((60, 40), Image.Resampling.NEAREST).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def plain(tmp_path):
    Image.new("RGB", (50, 50), COLOUR).save(tmp_path / "plain.png")
    return tmp_path / "plain.png"


def rough(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that tokens differ: with the usual 0.02 they hardly do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def expected(features: torch.Tensor, keep: float) -> dict[str, list[int]]:
    return {name: pruning.select(name, features, keep=keep)[0].tolist() for name in LOOKED}


# Which cells are kept


def test_without_a_tower_the_features_are_patches_of_pixels_less_their_mean(photo, tmp_path):
    features, shown, grid = patches(images.decode(photo, "photo"))
    assert grid == (GRID, GRID)
    assert shown.shape == (GRID * PATCH, GRID * PATCH, 3)
    line, column = 5, 17
    patch = shown[line * PATCH : (line + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    every = shown.reshape(GRID, PATCH, GRID, PATCH, 3).mean((0, 2))
    np.testing.assert_allclose(features[line * GRID + column].view(PATCH, PATCH, 3), patch - every, atol=1e-5)
    assert look(photo, tmp_path / "out.png", keep=0.1) == expected(features[None], 0.1)


def test_a_llava_is_looked_at_through_tower_and_projector(photo, tmp_path):
    folder = tiny.checkpoint("llava", tmp_path / "llava")
    batch = tiny.processor("llava").image_processor(images=Image.open(photo), return_tensors="pt")
    model = families.family(loading.load_model(str(folder)).eval())
    with torch.no_grad():
        full = torch.stack(model.encode(batch, "full"))
    assert full.shape == (1, 9, 32)
    features, shown, grid, _ = encode(images.decode(photo, "photo"), str(folder))
    assert grid == (3, 3)
    assert torch.equal(features, full[0])
    mean, std = (np.array(getattr(tiny.processor("llava").image_processor, f"image_{k}")) for k in ("mean", "std"))
    np.testing.assert_allclose((shown - mean) / std, batch["pixel_values"][0].permute(1, 2, 0), atol=1e-3)
    kept = look(photo, tmp_path / "out.png", tower=str(folder), keep=0.4)
    assert {name: kept[name] for name in LOOKED} == expected(full, 0.4)


def test_of_llava_next_the_base_view_is_looked_at(photo, tmp_path):
    folder = tiny.checkpoint("llava_next", tmp_path / "next")
    batch = tiny.processor("llava_next").image_processor(images=Image.open(photo), return_tensors="pt")
    pixels = batch["pixel_values"]
    assert pixels.shape[1] > 1  # there are crops to leave out
    inner = loading.load_model(str(folder)).eval().model
    with torch.no_grad():
        base = inner.vision_tower(pixels[:, 0], output_hidden_states=True).hidden_states[-2][:, 1:]
        base = inner.multi_modal_projector(base)
    features, shown, grid, _ = encode(images.decode(photo, "photo"), str(folder))
    assert grid == (3, 3)
    assert shown.shape == (24, 24, 3)
    torch.testing.assert_close(features, base[0], atol=1e-5, rtol=1e-5)
    kept = look(photo, tmp_path / "out.png", tower=folder, keep=0.4)
    assert {name: kept[name] for name in LOOKED} == expected(base, 0.4)


def test_the_digits_model_works_with_and_without_an_image_processor(tmp_path):
    """Its features are those of the last layer; without a processor the picture is normalised as CLIP's are."""
    model = rough(digits_model.build_model(0, width=32, layers=1, tower_width=16, tower_layers=2))
    model.save_pretrained(tmp_path / "model")
    canvas, _ = digits.picture(np.random.default_rng(0), "eval")
    Image.fromarray(canvas).save(tmp_path / "canvas.png")

    def features(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            tokens = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-1][:, 1:]
            return model.model.multi_modal_projector(tokens)

    for_clip = (torch.from_numpy(canvas).float() / 255 - CLIP_MEAN[:, None, None]) / CLIP_STD[:, None, None]
    bare = look(tmp_path / "canvas.png", tmp_path / "out.png", tower=tmp_path / "model")
    assert {name: bare[name] for name in LOOKED} == expected(features(for_clip), 0.1)
    assert len(bare["divprune"]) == 14

    images = type(tiny.processor("llava").image_processor)
    side = {"height": 96, "width": 96}
    images(size={"shortest_edge": 96}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        tmp_path / "model"
    )
    kept = look(tmp_path / "canvas.png", tmp_path / "out.png", tower=tmp_path / "model")
    assert {name: kept[name] for name in LOOKED} == expected(features(digits.pixel_values(canvas)), 0.1)
    assert kept["divprune"] != bare["divprune"]


TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
TOWERS = {  # a checkpoint, and the tokens in front of its patches
    "CLIPVisionModel": (lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)), 1),
    "CLIPModel": (lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)), 1),
    "SiglipVisionModel": (lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)), 0),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_gives_the_patch_tokens_of_its_last_layer_but_one(name, photo, tmp_path):
    build, in_front = TOWERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = rough(build())
    model.save_pretrained(tmp_path / "tower")
    features, shown, grid, _ = encode(images.decode(photo, "photo"), str(tmp_path / "tower"))
    clip = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    pixels = clip(images=images.decode(photo, "photo"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close((torch.from_numpy(shown) - CLIP_MEAN) / CLIP_STD, pixels[0].permute(1, 2, 0))
    with torch.no_grad():
        hidden = getattr(model, "vision_model", model)(pixels, output_hidden_states=True).hidden_states
    want = hidden[2][:, in_front:]  # of embeddings and three layers
    assert grid == (3, 3)
    assert want.shape == (1, 9, 16)
    assert torch.equal(features, want[0])
    assert look(photo, tmp_path / "out.png", tower=str(tmp_path / "tower"), keep=0.4) == expected(want, 0.4)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_plugins_that_need_signals_are_looked_at_through_a_llava(kind, photo, tmp_path):
    """Of NeXT by the base view's own, which comes first."""
    folder = tiny.checkpoint(kind, tmp_path / "model")
    pixels = tiny.processor(kind).image_processor(images=Image.open(photo), return_tensors="pt")["pixel_values"]
    inner = loading.load_model(str(folder)).eval().model
    inner.vision_tower.set_attn_implementation("eager")
    with torch.no_grad():
        base = pixels if kind == "llava" else pixels[:, 0]
        attention = inner.vision_tower(base, output_attentions=True).attentions[1].mean(1)[0, 0, 1:]
    every = look(photo, tmp_path / "every.png", tower=folder, keep=0.4)
    assert set(every) == {name for name in pruning.names() if not pruning.entry(name).learned}
    kept = look(photo, tmp_path / "out.png", plugins=["cls_topk", "vispruner"], tower=folder, keep=0.4)
    assert kept == {name: every[name] for name in kept}
    assert kept["cls_topk"] == sorted(attention.topk(3).indices.tolist())
    assert len(kept["vispruner"]) == 3
    assert int(attention.argmax()) in kept["vispruner"]


def test_a_plugin_that_needs_signals_needs_a_llava(photo, tmp_path):
    out = tmp_path / "out.png"
    assert "'cls_topk' needs cls_attention" in refused(photo, out, plugins=["cls_topk"])
    rough(TOWERS["CLIPVisionModel"][0]()).save_pretrained(tmp_path / "tower")
    assert "give a LLaVA" in refused(photo, out, plugins=["cls_topk"], tower=str(tmp_path / "tower"))


def test_of_a_llava_without_cls_those_are_drawn_that_need_none(photo, tmp_path):
    folder = tiny.checkpoint("llava_onevision", tmp_path / "model")
    assert set(look(photo, tmp_path / "out.png", tower=folder, keep=0.4)) == {*LOOKED}
    said = refused(photo, tmp_path / "out.png", plugins=["visionzip"], tower=folder)
    assert said.startswith("the plugin 'visionzip' needs cls_attention")
    assert said.endswith(", ".join(pruning.works_with(())))


def test_seed_reaches_the_plugins_that_draw(plain, tmp_path):
    first, again, other = (look(plain, tmp_path / "out.png", plugins=["random"], seed=s)["random"] for s in (0, 0, 1))
    assert first == again != other


# What is drawn


def panels(path) -> list[np.ndarray]:
    """The pictures in a drawing of the plain picture: where it is coloured, from left to right."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    coloured = pixels[..., 0] > pixels[..., 2] + 15  # neither white, black nor grey
    edges = np.flatnonzero(np.diff(np.concatenate([[0], coloured.any(0).astype(int), [0]])))
    found = []
    for left, right in edges.reshape(-1, 2):
        lines = np.flatnonzero(coloured[:, left:right].any(1))
        found.append(pixels[lines[0] : lines[-1] + 1, left:right])
    return [f for f in found if min(f.shape[:2]) > 100]


def test_kept_cells_are_bright_and_the_others_dim(plain, tmp_path):
    out = tmp_path / "new" / "out.png"  # the folder is made
    kept = look(plain, out, plugins=["grid", "random"], keep=0.05, seed=3)
    assert list(kept) == ["grid", "random"]
    original, *drawn = panels(out)
    assert abs(original - np.array(COLOUR)).max() <= 1
    assert len(drawn) == 2
    for name, panel in zip(kept, drawn, strict=True):
        high, wide = panel.shape[0] / GRID, panel.shape[1] / GRID
        assert high > 10
        assert abs(high - wide) < 0.2
        for cell in range(GRID * GRID):
            y, x = (int((at + 0.5) * size) for at, size in zip(divmod(cell, GRID), (high, wide), strict=True))
            light = 1 if cell in kept[name] else DIM
            assert abs(panel[y, x] - light * np.array(COLOUR)).max() <= 1, (name, cell)


def test_many_plugins_are_drawn_on_several_lines(plain, tmp_path, monkeypatch):
    look(plain, tmp_path / "few.png", plugins=["divprune", "grid", "random"])
    for i in range(2):
        monkeypatch.setitem(pruning.registry.PLUGINS, f"more{i}", pruning.registry.PLUGINS["grid"])
    kept = look(plain, tmp_path / "many.png")
    assert set(kept) == {*LOOKED, "more0", "more1"}
    few, many = (Image.open(tmp_path / f"{name}.png").size for name in ("few", "many"))
    assert few[1] < 600
    assert many[1] > 800
    assert max(*few, *many) < 2000


def test_a_plugin_that_learns_cannot_be_looked_at(photo, tmp_path):
    assert "learns what to keep" in refused(photo, tmp_path / "out.png", plugins=["tokenlearner"])


def test_merged_cells_show_the_mean_of_their_rows_and_cells_of_no_row_are_dim():
    """2 x 3 cells of 2 x 2 pixels: row 0 is cell 1, row 1 the mean of 2 and 3, row 2 has a quarter of 3 and of 4."""
    picture = np.arange(4 * 6 * 3, dtype=float).reshape(4, 6, 3)
    weight = np.array([[0, 1, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0], [0, 0, 0, 0.25, 0.25, 0]])
    cell = [picture[r : r + 2, c : c + 2] for r in (0, 2) for c in (0, 2, 4)]
    drawn = melt(picture, weight, 2, 3)
    mine = [drawn[r : r + 2, c : c + 2] for r in (0, 2) for c in (0, 2, 4)]
    first, second = (cell[2] + cell[3]) / 2, (cell[3] + cell[4]) / 2
    wanted = [DIM * cell[0], cell[1], first, (0.5 * first + 0.25 * second) / 0.75, second, DIM * cell[5]]
    np.testing.assert_allclose(mine, wanted)


def test_shade_dims_whole_cells_of_oblong_pictures():
    picture = np.ones((4, 9, 3))  # 2 x 3 cells of 2 x 3 pixels
    light = shade(picture, [1, 5], 2, 3)[..., 0]
    assert (light[:2, 3:6] == 1).all()
    assert (light[2:, 6:] == 1).all()
    assert (light == 1).sum() == 12
    assert (light == DIM).sum() == 24
    assert (picture == 1).all()


# Mistakes


def refused(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        look(*args, **kwargs)
    return str(caught.value)


def test_names_and_shares_are_checked_before_anything_is_read():
    message = refused("no.png", "o.png", plugins=["divprun"], tower="/no")
    assert "unknown pruning plugin 'divprun'; did you mean 'divprune'" in message
    assert "keep = 2" in refused("no.png", "o.png", keep=2, tower="/no")
    assert "no plugin to look at" in refused("no.png", "o.png", plugins=[])


def test_bad_pictures_are_refused(tmp_path, photo, monkeypatch):
    out = tmp_path / "out.png"
    assert "cannot read the picture" in refused(tmp_path / "none.png", out)
    assert "cannot read the picture" in refused(tmp_path, out)
    (tmp_path / "text.png").write_text("hello")
    assert "is not a picture" in refused(tmp_path / "text.png", out)
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:150])
    assert "it is cut short" in refused(tmp_path / "cut.png", out)
    Image.new("RGB", (1, 201)).save(tmp_path / "thin.png")
    assert "too thin" in refused(tmp_path / "thin.png", out)
    monkeypatch.setattr(images, "MOST_PIXELS", 2000)
    assert "60 x 40 pixels, more than 2,000" in refused(photo, out)
    assert not out.exists()


def test_pictures_are_turned_as_their_camera_says_and_become_rgb(photo, tmp_path):
    upright = Image.open(photo).convert("L")
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert look(tmp_path / "turned.png", tmp_path / "out.png") == look(tmp_path / "upright.png", tmp_path / "out.png")


def test_bad_towers_are_refused(photo, tmp_path):
    out = tmp_path / "out.png"
    assert "no model folder" in refused(photo, out, tower=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "is not a model folder" in refused(photo, out, tower=str(tmp_path / "empty"))
    tower = tmp_path / "tower"
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tower)
    weights = (tower / "model.safetensors").read_bytes()
    (tower / "model.safetensors").write_bytes(weights[:1000])
    assert "cannot load" in refused(photo, out, tower=str(tower))
    (tower / "model.safetensors").unlink()
    torch.save({}, tower / "pytorch_model.bin")  # a pickle, which is never opened
    assert "cannot load" in refused(photo, out, tower=str(tower))


def test_a_tower_without_all_its_weights_is_refused(photo, tmp_path):
    from safetensors.torch import load_file, save_file

    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "tower")
    weights = load_file(tmp_path / "tower" / "model.safetensors")
    gone = next(name for name in weights if "patch_embedding" in name)
    del weights[gone]
    save_file(weights, tmp_path / "tower" / "model.safetensors", {"format": "pt"})
    assert "lacks 1 of the model's weights" in refused(photo, tmp_path / "out.png", tower=str(tmp_path / "tower"))


def test_a_model_without_patches_is_refused(photo, tmp_path):
    tiny.config("llava").text_config.save_pretrained(tmp_path / "llm")
    assert "no tower" in refused(photo, tmp_path / "out.png", tower=str(tmp_path / "llm"))


def test_an_unknown_picture_format_is_refused(plain, tmp_path):
    assert "choose a name that ends in" in refused(plain, tmp_path / "out.docx")
