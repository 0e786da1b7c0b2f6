"""The frozen tower's features on disk: in the second epoch no picture is decoded and no tower runs.

    file of a picture = hash( tower, precision, how pictures are prepared | the picture's own bytes )

The tower is frozen, so what it makes of a picture never changes, and a file is found by everything that it depends on:
no name, date or order matters. Fast steps spend a good part of their time in the tower (it sees every patch, the LLM a
tenth of them), so for a few epochs over a few thousand pictures this is worth its disk: 1.2 MB a picture for
LLaVA-1.5, up to 5.9 MB for LLaVA-NeXT.

All features are made before training, each under a temporary name and then renamed, so an interruption loses one at
most. The folder never grows beyond its size: features of other pictures, oldest first, make room; and a data set that
does not fit is refused, since features that come and go would cost more than they save.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from ..models.families import Family
from ..models.precision import autocast
from ..util import files, finite
from ..util.errors import UserError, counted
from . import images

GB = 10**9


class Features:
    """Features by picture, in `folder`, of one tower in one precision. Safe to hand to worker processes."""

    def __init__(self, folder: Path, vlm: Family, image_processor, precision: str):
        kind = vlm.config.model_type
        if kind not in ("llava", "llava_next"):
            raise UserError(f"data.feature_cache_gb: features of a {kind!r} model cannot be kept; set it to 0")
        self.folder = folder
        made = hashlib.blake2b(repr((precision, vlm.feature_source)).encode(), digest_size=16)
        made.update(image_processor.to_json_string().encode())
        for tensor in vlm.tower.state_dict().values():
            made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self.tower = made.digest()

    def file(self, picture: Path) -> Path:
        made = hashlib.blake2b(picture.read_bytes(), key=self.tower, digest_size=16)
        name = made.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, picture: Path) -> tuple[Tensor, Tensor | None]:
        """What the projector reads of a picture (crops, patches, width), and the picture's size if that matters."""
        file = self.file(picture)
        try:
            tensors = load_file(file)
            if found := finite.first_bad([("features", tensors["features"])]):
                raise ValueError(f"{found}: not finite")
            return tensors["features"], tensors.get("image_sizes")
        except FileNotFoundError as error:
            raise UserError(
                f"the features of {picture} are gone, by hand or to make room for another run: --resume makes them "
                f"anew, and a run.cache of its own keeps them"
            ) from error
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(f"the features of {picture} in {file} cannot be read ({error}): delete the file") from error


@torch.no_grad()
def fill(
    features: Features, pictures: Iterable[Path], vlm: Family, image_processor, precision: str, most: float, bar: bool
) -> None:
    """Make what is missing, within `most` bytes in all."""
    device = vlm.language_model.device
    files.remove_stale(features.folder.glob("*/.*.tmp"))
    wanted = {features.file(path): path for path in tqdm(pictures, desc="hash", unit="picture", disable=not bar)}
    held = {file: file.stat() for file in features.folder.glob("*/*.safetensors")}
    used = sum(stat.st_size for stat in held.values())
    oldest = sorted((file for file in held if file not in wanted), key=lambda file: -held[file].st_mtime)
    missing = {file: path for file, path in wanted.items() if file not in held}
    for file, path in tqdm(missing.items(), desc="features", unit="picture", disable=not (bar and missing)):
        batch = image_processor([images.decode(path, str(path))], return_tensors="pt")
        sizes = batch.get("image_sizes")
        with autocast(precision, device):
            tensors = {"features": vlm.tower_features(batch["pixel_values"].to(device), sizes).cpu().contiguous()}
        if finite.first_bad(tensors.items()):
            raise UserError(f"the features of {path} are not finite: try another model.precision, or leave it out")
        if sizes is not None:
            tensors["image_sizes"] = sizes
        content = save(tensors)
        while used + len(content) > most and oldest:
            other = oldest.pop()
            used -= held[other].st_size
            files.remove(other)
        used += len(content)
        if used > most:
            raise UserError(
                f"the features of {counted(len(wanted), 'picture')} take more than {most / GB:.1f} GB: raise "
                f"data.feature_cache_gb, or set it to 0 to train without them"
            )
        with files.about(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(file, cached=True) as temporary:
            temporary.write_bytes(content)
