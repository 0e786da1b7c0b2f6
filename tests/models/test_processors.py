"""Processors of every family, as they come from a model's folder on a machine without torchvision."""

import json
import re
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import processors, tiny, zoo

from tinyspeed import UserError
from tinyspeed.models import loading
from tinyspeed.models.families import FAMILIES
from tinyspeed.models.pictures import Pictures
from tinyspeed.models.without_torchvision import VideoSettings

KNOWN = sorted(processors.MAKERS.keys() & zoo.KINDS.keys() & FAMILIES.keys())
QWEN = [family for family in KNOWN if family.startswith("qwen")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What lies beside the weights."""
    home = tmp_path_factory.mktemp("families")
    for family in KNOWN:
        zoo.KINDS[family].made(vocab_size=processors.WORDS).save_pretrained(home / family)
        processors.processor(family).save_pretrained(home / family)
        (home / family / "model.safetensors").touch()
    return home


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="for machines without torchvision")
@pytest.mark.parametrize("family", KNOWN)
def test_a_processor_is_loaded_and_saved_as_it_was(folders, family, tmp_path):
    """Also the settings for videos, which need torchvision, so that a run's folder takes videos elsewhere."""
    processor = loading.load_processor(str(folders / family))
    assert type(processor) is type(processors.processor(family))
    processor.save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (folders / family / name).read_text(), name
    if hasattr(processor, "video_processor"):
        assert isinstance(processor.video_processor, VideoSettings)
        with pytest.raises(UserError, match="needs torchvision for videos"):
            processor.video_processor([])


@pytest.mark.parametrize("family", sorted({*KNOWN} - {"mistral3"}))  # which is told the model's patches
def test_a_processor_of_another_tower_is_refused(folders, family, tmp_path):
    for file in (folders / family).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    told = json.loads((tmp_path / "config.json").read_text())
    vision = told["vision_config"]
    name = "patch_size" if family in QWEN else "image_size"
    vision[name] = [5 * side for side in vision[name]] if isinstance(vision[name], list) else 5 * vision[name]
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="has the processor of another model, or a damaged one: it makes pictures of"):
        loading.load_processor(str(tmp_path))


@pytest.mark.parametrize("family", QWEN[:1])
@settings(max_examples=30)
@given(
    side=st.tuples(st.integers(8, 300), st.integers(8, 300)), limits=st.tuples(st.integers(1, 40), st.integers(1, 40))
)
def test_pictures_have_at_least_and_at_most_so_many_pixels(folders, family, side, limits):
    """A row of features is of 8 x 8 pixels here. The processor rounds sides down where there are too many, at the most
    to half of them, so the limits are this far apart."""
    least = 64 * limits[0]
    most = 4 * least + 64 * limits[1]
    processor = loading.load_processor(str(folders / family), least, most)
    rows = Pictures(processor).text(*side).count("<|image_pad|>")
    tensors = Pictures(processor).tensors(Image.new("RGB", side))
    assert tensors["image_grid_thw"].prod() == 4 * rows
    lines = int(tensors["image_grid_thw"][0, 1:].min()) // 2
    assert 64 * rows <= most or lines == 1
    assert 64 * rows >= least


def test_limits_are_saved_with_the_processor(folders, tmp_path):
    loading.load_processor(str(folders / QWEN[0]), 1024, 2048).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]["size"]
    assert (told["shortest_edge"], told["longest_edge"]) == (1024, 2048)
    with pytest.raises(UserError, match=r"data\.min_pixels = 9,999 is more than data\.max_pixels = 1,280"):
        loading.load_processor(str(folders / QWEN[0]), 9999)


@pytest.mark.parametrize("family", ["llava", *(family for family in KNOWN if family not in QWEN)])
def test_families_whose_pictures_have_no_limits_refuse_them(folders, family, tmp_path):
    folder = tiny.checkpoint("llava", tmp_path) if family == "llava" else folders / family
    with pytest.raises(UserError, match=re.escape(f"the pictures of {folder} have no such limits, leave them out")):
        loading.load_processor(str(folder), max_pixels=1000)
