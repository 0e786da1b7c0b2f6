"""A header may say that two tensors share bytes, or that bytes belong to none. Whoever reads such a file refuses it."""

import json
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny
from support.trained import saved

from tinyspeed import UserError
from tinyspeed.data.feature_cache import FeatureCache
from tinyspeed.models import export, isolator_file, loading
from tinyspeed.models.families import family
from tinyspeed.training import checkpoint


def move(file: Path, by: int) -> None:
    """Moves the last tensor in the file, whose bytes then begin within those of the one before, or behind a gap."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin + by, end + by]
    header = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + (data + bytes(max(by, 0)))[: end + by])


def of_a_checkpoint(folder: Path, by: int) -> list[torch.Tensor]:
    save_file({"a": torch.ones(8), "b": torch.zeros(8)}, folder / "tensors.safetensors", {"rows": "{}"})
    move(folder / "tensors.safetensors", by)
    with checkpoint.reading(folder):
        return [*checkpoint.Saved([folder / "tensors.safetensors"]).values()]


def of_an_isolator(folder: Path, by: int) -> list[torch.Tensor]:
    learned = {"a": torch.ones(8), "b": torch.zeros(8)}
    isolator_file.save(learned, folder / "isolator.safetensors")
    move(folder / "isolator.safetensors", by)
    isolator_file.load_into(learned, folder / "isolator.safetensors")
    return [*learned.values()]


def of_a_model(folder: Path, by: int) -> list[torch.Tensor]:
    move(tiny.checkpoint("llava", folder) / "model.safetensors", by)
    return [*loading.load_model(str(folder)).parameters()]


def of_an_exported_base(folder: Path, by: int) -> list[torch.Tensor]:
    move(tiny.checkpoint("llava", folder / "base") / "model.safetensors", by)
    export.merge(saved(tiny.model("llava")), 1.0, str(folder / "base"), folder / "out")
    return [*load_file(folder / "out" / "model.safetensors").values()]


def of_cached_features(folder: Path, by: int) -> list[torch.Tensor]:
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    net = family(tiny.model("llava_next"))
    store = FeatureCache(folder / "cache", net, tiny.processor("llava_next").image_processor, "fp32")
    store.fill([folder / "a.png"], net, 1e9, bar=False)
    move(store.file(folder / "a.png"), by)
    return [*store.read(folder / "a.png").values()]


READERS = [of_a_checkpoint, of_an_isolator, of_a_model, of_an_exported_base, of_cached_features]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("by", [-8, 8])
def test_a_file_whose_tensors_overlap_or_leave_a_gap_is_refused(read, by, tmp_path):
    with pytest.raises(UserError, match=r"offset|damaged"):
        read(tmp_path, by)


@pytest.mark.parametrize("read", READERS)
def test_the_same_file_unmoved_is_read(read, tmp_path):
    found = read(tmp_path, 0)
    assert len(found) > 1
    assert all(tensor.isfinite().all() for tensor in found)
