"""Which tokens each plugin keeps of a picture, side by side.

    look("cat.jpg", "cat.png", tower="llava-hf/llava-1.5-7b-hf")      -> {"divprune": [3, 17, ...], ...}

Accuracy says how good a plugin is; a look at what it keeps says why. Every panel shows the picture as the model gets
it, resized and cropped, with the kept cells bright and the others dimmed. Of a plugin that merges, a cell shows what is
left of it: the mixture of cells that the row it went into stands for.

What the plugins see is decided by `tower`:
- a LLaVA (folder or hub id): its projected features, what they see in training. Of LLaVA-NeXT the base view only, where
  a cell is a patch of the whole picture; training prunes over the base view and its crops together. The LLM is built
  without layers, so a 7B model needs 2.4 GB here instead of 28. Plugins that ask what [CLS] attends to, `cls_topk`,
  `vispruner` and `visionzip`, are drawn of a LLaVA alone.
- a CLIP, SigLIP or a tower like them: the patch tokens of its last layer but one, where LLaVA takes them, unprojected.
- none: the pixels of a 24 x 24 grid of patches, less their mean. No download, and honest plugins, but what they call
  different is colour and not content: good for learning what a plugin does, not for judging it.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .. import pruning
from ..util.errors import UserError
from ..util.plots import figure, save

DIM = 0.25  # brightness of what is pruned
GRID, PATCH = 24, 14  # without a tower: LLaVA-1.5's 576 cells
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
THIN = 100  # longest over shortest side; resizing a thread of pixels by its short side would fill the memory


def look(
    image: Path | str,
    out: Path | str,
    *,
    plugins: Sequence[str] | None = None,
    keep: float = 0.1,
    tower: str | None = None,
    seed: int = 0,
) -> dict[str, list[int]]:
    """Draw to `out` which cells of `image` each plugin keeps; returns them, numbered in raster order.
    Without `plugins`: of all that choose without having learned, and whose signals are there."""
    every, plugins = plugins is None, list(dict.fromkeys(_untaught(()) if plugins is None else plugins))
    for name in plugins:
        if pruning.entry(name).learned:
            raise UserError(f"{name!r} learns what to keep while it trains: before that there is nothing to look at")
    out = Path(out) if Path(out).suffix else Path(f"{out}.png")
    if out.resolve() == Path(image).resolve():
        raise UserError(f"{out} is the picture itself: choose another place for the drawing")
    if not plugins:
        raise UserError(f"no plugin to look at; known: {', '.join(pruning.names())}")
    needs = sorted({signal for name in plugins for signal in pruning.entry(name).needs})
    given = {} if tower is None else {signal: torch.ones(1, 1) for signal in needs}
    for name in plugins:  # a single row is kept by all: this only checks name and share, before anything is loaded
        pruning.select(name, torch.ones(1, 1, 1), keep=keep, signals=given)
    picture = read_picture(Path(image))
    if tower is None:
        features, shown, (rows, columns) = patches(picture)
    else:
        features, shown, (rows, columns), given = encode(picture, str(tower), None if every else plugins)
    plugins = _untaught(given) if every else plugins
    how = {"keep": keep, "seed": seed, "signals": {signal: values[None] for signal, values in given.items()}}
    found = {name: pruning.choose(name, features[None], **how) for name in plugins}
    kept = {name: of.index[0].tolist() for name, of in found.items()}

    side = 3.1  # inches of a panel; gaps, titles and header come on top
    across = math.ceil(math.sqrt(1 + len(plugins))) if len(plugins) > 3 else 1 + len(plugins)
    down = math.ceil((1 + len(plugins)) / across)
    tall = side * shown.shape[0] / shown.shape[1]
    width, height = across * (side + 0.15) + 0.15, down * (tall + 0.4) + 0.35
    fig = figure(width, height)
    source = "plain colour patches (no model)" if tower is None else f"features of {Path(tower).name or tower}"
    fig.suptitle(f"{_short(Path(image).name)}: {_short(source, 45)}", y=1 - 0.2 / height, fontsize=11, parse_math=False)
    panels = [("as the plugins see it", shown)]
    for name, of in found.items():
        count = len(kept[name])
        drawn = shade(shown, kept[name], rows, columns)
        if of.weight is not None:
            drawn = melt(shown, of.weight[0].numpy(), rows, columns)
        panels.append((f"{name} {count} of {rows * columns}", drawn))
    for i, (title, pixels) in enumerate(panels):
        left = 0.15 + i % across * (side + 0.15)
        top = height - 0.6 - i // across * (tall + 0.4)
        ax = fig.add_axes((left / width, (top - tall) / height, side / width, tall / height))
        ax.imshow(pixels, interpolation="nearest", aspect="auto")
        ax.set_title(title, fontsize=10, pad=3, parse_math=False)
        ax.set_axis_off()
        if i and found[plugins[i - 1]].weight is None:
            _outline(ax, kept[plugins[i - 1]], rows, columns, pixels.shape)
    save(fig, out)
    return kept


def _untaught(signals) -> list[str]:
    return [name for name in pruning.works_with(signals) if not pruning.entry(name).learned]


def shade(picture: np.ndarray, kept: Sequence[int], rows: int, columns: int) -> np.ndarray:
    """`picture` (H, W, 3) with all cells but the kept ones dimmed."""
    light = np.full(rows * columns, DIM, dtype=picture.dtype)
    light[kept] = 1
    cell = np.ones((picture.shape[0] // rows, picture.shape[1] // columns), dtype=picture.dtype)
    return picture * np.kron(light.reshape(rows, columns), cell)[..., None]


def melt(picture: np.ndarray, weight: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`picture` (H, W, 3) with every cell as the rows that hold it, `weight` (K, cells), have it on the average; dimmed
    where none does."""
    high, wide = picture.shape[0] // rows, picture.shape[1] // columns
    cells = picture.reshape(rows, high, columns, wide, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    mixed = weight / weight.sum(1, keepdims=True) @ cells
    held = weight.sum(0)[:, None]
    shown = np.where(held > 0, (weight.T @ mixed) / np.maximum(held, 1e-9), DIM * cells)
    return shown.reshape(rows, columns, high, wide, 3).swapaxes(1, 2).reshape(picture.shape)


def _outline(ax, kept: Sequence[int], rows: int, columns: int, shape: tuple[int, ...]) -> None:
    """A white line between bright and dimmed cells: in a dark picture it is all one sees of the difference."""
    from matplotlib.collections import LineCollection

    high, wide = shape[0] / rows, shape[1] / columns
    kept, lines = set(kept), []
    for cell in kept:
        r, c = divmod(cell, columns)
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            inside = 0 <= r + dr < rows and 0 <= c + dc < columns
            if not (inside and cell + dr * columns + dc in kept):
                y, x = r + (dr > 0), c + (dc > 0)  # the corner where the side between the two cells starts
                lines.append([(x * wide, y * high), ((x + (dc == 0)) * wide, (y + (dr == 0)) * high)])
    ax.add_collection(LineCollection(np.array(lines) - 0.5, colors="white", linewidths=0.7))


def _short(text: str, most: int = 30) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


# Pictures


def read_picture(path: Path) -> Image.Image:
    """An RGB picture, turned the way that its camera says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise UserError(f"{path} would unpack to more than {limit}: shrink it first") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no picture {path}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's words for a broken file
        raise UserError(f"{path} cannot be read as a picture: {error}") from error
    if max(picture.size) > THIN * min(picture.size):
        raise UserError(f"{path} is {picture.width} x {picture.height} pixels: too thin to be cut into patches")
    return picture


def patches(picture: Image.Image) -> tuple[Tensor, np.ndarray, tuple[int, int]]:
    """Features that need no model: the pixels of every patch, less the mean patch. Without the subtraction all of
    them point the same way, towards grey, and cosines tell little apart."""
    side = GRID * PATCH
    shown = np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    cells = torch.from_numpy(shown).unflatten(0, (GRID, PATCH)).unflatten(2, (GRID, PATCH))
    features = cells.transpose(1, 2).reshape(GRID * GRID, -1)  # (lines, y, columns, x, 3) -> (cells, pixels)
    return features - features.mean(0), shown, (GRID, GRID)


# Towers


@torch.no_grad()
def encode(
    picture: Image.Image, tower: str, plugins: Sequence[str] | None = ()
) -> tuple[Tensor, np.ndarray, tuple[int, int], dict[str, Tensor]]:
    """Features (cells, width) of the model at `tower`, the picture that it was shown (H, W, 3) in 0 .. 1, the lines and
    columns of its cells, and the signals that the plugins need; without plugins, all that there are."""
    # Here, since transformers takes seconds to import and a look without a tower needs none of it.
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    from ..models import families, loading
    from ..pruning import signals

    with _loading(tower):
        config = AutoConfig.from_pretrained(tower, trust_remote_code=False)
    vision = getattr(config, "vision_config", config)
    patch = getattr(vision, "patch_size", None)
    if not isinstance(patch, int):
        raise UserError(f"{tower} holds a {config.model_type!r} model: it has no tower that cuts pictures into patches")
    llava = config.model_type in families.FAMILIES
    if llava:  # without LLM layers: their weights are not even read
        config.text_config.num_hidden_layers = 0
    batch, shown = _preprocess(picture, tower, vision, config.model_type)
    kind = AutoModelForImageTextToText if llava else AutoModel
    loading.require_safetensors(tower)
    with _loading(tower):
        model, found = kind.from_pretrained(
            tower, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    absent = sorted(name for name in found["missing_keys"] if "language_model" not in name and "lm_head" not in name)
    if absent:  # transformers would draw them at random and carry on
        raise UserError(f"{tower} lacks {len(absent)} of the model's weights ({absent[0]} ...): copy the folder again")
    model.eval()
    if not llava and hasattr(config, "text_config") and not hasattr(model, "vision_model"):
        raise UserError(f"{tower} holds a {config.model_type!r} model, unknown here: give a LLaVA, a CLIP or a SigLIP")

    pixels, sizes = batch["pixel_values"], batch.get("image_sizes")
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    cells = rows * columns
    asking = [name for name in plugins or () if pruning.entry(name).needs]
    if asking and not llava:
        raise UserError(f"the plugin {asking[0]!r} needs what a LLaVA's projector reads: give a LLaVA as tower")
    heard, family = {}, families.family(model) if llava else None
    for name in asking:
        signals.require_signals(family, name)
    needs = {signal for name in asking for signal in pruning.entry(name).needs}
    if llava and plugins is None:
        needs = {*signals.signals_of_model(family)}
    try:
        if llava:
            with signals.recording(family, batch, sorted(needs)) as heard:
                features = family.encode(pixels, sizes, "full")[0]
        else:
            features = getattr(model, "vision_model", model)(pixels, output_hidden_states=True).hidden_states[-2][0]
    except (RuntimeError, ValueError) as error:
        size = f"{pixels.shape[-1]} x {pixels.shape[-2]}"
        raise UserError(f"the model in {tower} cannot read the {size} pictures of its processor: {error}") from error
    # NeXT puts its base view first. Other models have nothing behind the patches, and at most CLS or registers before.
    features = features[:cells] if sizes is not None else features[-cells:]
    if len(features) < cells:
        raise UserError(f"{tower} makes {len(features)} tokens of {rows} x {columns} patches: there is no map to draw")
    heard = {signal: images[0][:cells] for signal, images in heard.items()}
    return features, shown[: rows * patch, : columns * patch], (rows, columns), heard


def _preprocess(picture: Image.Image, tower: str, vision, kind: str) -> tuple[dict[str, Tensor], np.ndarray]:
    """The model's input, and the picture in it. By the model's own processor, or as CLIP would where there is none."""
    from transformers import AutoImageProcessor

    try:
        with _quiet():
            processor = AutoImageProcessor.from_pretrained(tower, trust_remote_code=False)
    except (OSError, ValueError) as error:  # no processor there, or not one for pictures
        if kind == "llava_next":
            raise UserError(
                f"{tower} lacks the image processor that cuts crops for LLaVA-NeXT: copy it there"
            ) from error
        mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
        square = ImageOps.fit(picture, (vision.image_size, vision.image_size), Image.Resampling.BICUBIC)
        shown = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255)
        return {"pixel_values": ((shown - mean) / std).permute(2, 0, 1)[None]}, shown.numpy()
    batch = processor(images=picture, return_tensors="pt")
    if batch["pixel_values"].dim() not in (4, 5):
        raise UserError(f"the image processor of {tower} makes {tuple(batch['pixel_values'].shape)}, not a picture")
    shown = batch["pixel_values"].flatten(0, -4)[0].permute(1, 2, 0)  # of NeXT's views the first, the base view
    if processor.do_normalize:
        shown = shown * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    return dict(batch), shown.clamp(0, 1).numpy()


@contextmanager
def _loading(tower: str) -> Iterator[None]:
    from ..models.loading import explaining  # not before: it imports transformers, and a picture's own pixels need none

    if not Path(tower).is_dir() and (tower.startswith((".", "/", "~")) or tower.count("/") > 1):
        raise UserError(f"there is no model folder {tower}; give one, or a hub id like openai/clip-vit-large-patch14")
    with explaining(f"cannot load a vision tower from {tower}"), _quiet():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' list of the LLM weights that we leave out on purpose, and without its bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
