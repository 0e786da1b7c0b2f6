"""The frozen tower's features on disk: in the second epoch no picture is decoded and no tower runs.

    name of a file = hash( tower, precision, how pictures are prepared | the picture's own bytes )

The tower is frozen, so what it makes of a picture never changes, and the name has everything that it depends on; no
picture's name or date matters. Fast steps spend a good part of their time in the tower (it sees every patch, the LLM a
tenth of them), so for a few epochs over a few thousand pictures this is worth its disk space: 1.2 MB a picture for
LLaVA-1.5, up to 5.9 MB for LLaVA-NeXT.

All features are made before training. Each file is written under a temporary name and then renamed, so an interruption
loses one at most. Its name and a checksum are in it too, so that a damaged or swapped one is noticed and made anew. The
folder never outgrows its limit: the oldest features of other pictures make room. A data set that does not fit is
refused, since features that come and go would cost more than they save.
"""

import hashlib
import sys
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ..models.families import Family
from ..models.precision import autocast
from ..util import UserError, counted, files, finite, require
from ..util.files import UNREADABLE
from . import images

GB = 10**9


class FeatureCache:
    """Features of pictures, in `folder`, by one tower in one precision. Worker processes may have a copy of it."""

    def __init__(self, folder: Path, vlm: Family, image_processor, precision: str):
        kind = vlm.config.model_type
        if kind not in ("llava", "llava_next"):
            raise UserError(f"data.feature_cache_gb: features of a {kind!r} model cannot be kept; set it to 0")
        self.folder, self.image_processor, self.precision = folder, image_processor, precision
        key = hashlib.blake2b(repr((precision, vlm.feature_source)).encode(), digest_size=16)
        key.update(image_processor.to_json_string().encode())
        for tensor in vlm.tower.state_dict().values():
            key.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self.key = key.digest()

    def file(self, picture: Path) -> Path:
        name = hashlib.blake2b(files.read(picture), key=self.key, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, picture: Path) -> dict[str, Tensor]:
        """What the projector gets of a picture (crops, patches, width), and its size if the model needs that."""
        tensors = _read(file := self.file(picture))
        if tensors is None:
            what = f"the features of {picture} in {file} were deleted or damaged, by hand or for another run"
            raise UserError(f"{what}: --resume makes them again; with its own run.cache a run keeps them")
        return {"tower_features": tensors.pop("features"), **tensors}

    @torch.no_grad()
    def fill(self, pictures: Iterable[Path], vlm: Family, most: float, bar: bool) -> None:
        """Makes the features that are missing or damaged, so that all files together have at most `most` bytes."""
        files.delete_stale(self.folder.glob("*/.*.tmp"))
        wanted = {self.file(path): path for path in tqdm(pictures, desc="hash", unit="picture", disable=not bar)}
        held = {file: file.stat() for file in self.folder.glob("*/*.safetensors")}
        kept = tqdm(wanted.keys() & held.keys(), desc="verify", unit="picture", disable=not bar)
        damaged = [file for file in kept if _read(file) is None]
        if damaged:
            what = f"features of {counted(len(damaged), 'picture')} in {self.folder}, damaged or of another version"
            print(f"{what}: made anew", file=sys.stderr)
        for file in damaged:
            files.delete_if_possible(file)
            del held[file]
        used = sum(stat.st_size for stat in held.values())
        oldest = sorted((file for file in held if file not in wanted), key=lambda file: -held[file].st_mtime)
        missing = {file: path for file, path in wanted.items() if file not in held}
        for file, path in tqdm(missing.items(), desc="features", unit="picture", disable=not (bar and missing)):
            tensors = self._features(path, vlm)
            content = save(tensors, _label(file, tensors))
            while used + len(content) > most and oldest:
                other = oldest.pop()
                used -= held[other].st_size
                files.delete_if_possible(other)
            used += len(content)
            what = f"the features of {counted(len(wanted), 'picture')} take more than {most / GB:.1f} GB"
            require(used <= most, f"{what}: raise data.feature_cache_gb, or set it to 0 to train without them")
            files.write_atomically(file, content, cached=True)

    def _features(self, picture: Path, vlm: Family) -> dict[str, Tensor]:
        device = vlm.language_model.device
        batch = self.image_processor([images.decode(picture, str(picture))], return_tensors="pt")
        sizes = batch.get("image_sizes")
        with autocast(self.precision, device):
            features = vlm.tower_features(batch["pixel_values"].to(device), sizes).cpu().contiguous()
        if finite.first_bad([("features", features)]):
            raise UserError(f"the features of {picture} are not finite: try another model.precision, or leave it out")
        return {"features": features} if sizes is None else {"features": features, "image_sizes": sizes}


def _label(file: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """What is saved beside the features to recognise a file that is damaged, or that has another one's name."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return {"key": file.stem, "crc32": f"{crc:08x}"}


def _read(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, or None if it is not there or not as it was written."""
    if not file.is_file():  # opening a pipe would wait for ever
        return None
    with suppress(*UNREADABLE), safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        return tensors if opened.metadata() == _label(file, tensors) else None
