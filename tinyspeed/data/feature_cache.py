"""The frozen tower's features on disk: in the second epoch no picture is decoded and no tower runs.

    name of a file = hash( tower, precision, how pictures are prepared | the picture's own bytes )

The tower is frozen, so what it makes of a picture never changes, and the name has everything that it depends on; no
picture's name or date matters. Fast steps spend a good part of their time in the tower (it sees every patch, the LLM a
tenth of them), so for a few epochs over a few thousand pictures this is worth its disk space: 1.2 MB a picture for
LLaVA-1.5, up to 5.9 MB for LLaVA-NeXT.

All features are made before training. Each file is written under a temporary name and then renamed, so an interruption
loses one at most. The folder never outgrows its limit: the oldest features of other pictures make room. A data set that
does not fit is refused, since features that come and go would cost more than they save.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from ..models.families import Family
from ..models.precision import autocast
from ..util import UserError, counted, files, finite, require
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

    def read(self, picture: Path) -> tuple[Tensor, Tensor | None]:
        """What the projector gets of a picture (crops, patches, width), and its size if the model needs that."""
        file = self.file(picture)
        try:
            tensors = load(files.read(file))
            if found := finite.first_bad([("features", tensors["features"])]):
                raise ValueError(f"{found}: not finite")
            return tensors["features"], tensors.get("image_sizes")
        except FileNotFoundError as error:
            mend = "--resume makes them again; with its own run.cache a run keeps them"
            raise UserError(f"the features of {picture} were deleted, by hand or for another run: {mend}") from error
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(f"the features of {picture} in {file} cannot be read ({error}): delete the file") from error

    @torch.no_grad()
    def fill(self, pictures: Iterable[Path], vlm: Family, most: float, bar: bool) -> None:
        """Makes the features that are missing, so that all files together have at most `most` bytes."""
        files.delete_stale(self.folder.glob("*/.*.tmp"))
        wanted = {self.file(path): path for path in tqdm(pictures, desc="hash", unit="picture", disable=not bar)}
        held = {file: file.stat() for file in self.folder.glob("*/*.safetensors")}
        used = sum(stat.st_size for stat in held.values())
        oldest = sorted((file for file in held if file not in wanted), key=lambda file: -held[file].st_mtime)
        missing = {file: path for file, path in wanted.items() if file not in held}
        for file, path in tqdm(missing.items(), desc="features", unit="picture", disable=not (bar and missing)):
            content = save(self._features(path, vlm))
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
