"""Draws which tokens each plugin keeps of a picture, side by side.

    look("cat.jpg", "cat.png", tower="llava-hf/llava-1.5-7b-hf")      -> {"divprune": [3, 17, ...], ...}

Accuracy says how good a plugin is, and a look at what it keeps says why. Every panel shows the picture as the model
gets it, resized and cropped, with the kept cells bright and the others dimmed. If a plugin merges tokens, a cell shows
the mixture of cells that stands for it in the merged tokens. With `cells`, a cell that is pruned shows the kept one
that is most like it: that is what `dualspeed.weights = "cells"` counts.

What the plugins see depends on `tower`:
- a LLaVA (folder or hub id): its projected features, as in training. Of LLaVA-NeXT only the base view, where a cell is
  a patch of the whole picture; training prunes over the base view and its crops together. The LLM is built without
  layers, so a 7B model needs 2.4 GB here instead of 28. Plugins that ask what [CLS] attends to, `cls_topk`,
  `vispruner` and `visionzip`, need a LLaVA.
- a CLIP, SigLIP or a similar tower: the patch tokens of its last layer but one, where LLaVA takes them, unprojected.
- none: the pixels of a 24 x 24 grid of patches, less their mean. Nothing is downloaded and the plugins are the real
  ones, but they compare colours and not content: good for learning what a plugin does, not for judging it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .. import pruning
from ..data import images
from ..util import UserError, paths, require
from ..util.plots import figure, save

DIM = 0.25  # brightness of what is pruned
GRID, PATCH = 24, 14  # without a tower: LLaVA-1.5's 576 cells
SIDE, GAP, TITLE, HEADER = 3.1, 0.15, 0.4, 0.35  # inches: a panel, between panels, above a panel, above the first


def look(
    image: Path | str,
    out: Path | str,
    *,
    plugins: Sequence[str] | None = None,
    keep: float = 0.1,
    tower: str | None = None,
    seed: int = 0,
    cells: bool = False,
) -> dict[str, list[int]]:
    """Draws to `out` which cells of `image` each plugin keeps, and returns them, numbered in raster order.
    Default for `plugins`: all that need no training and whose signals the tower gives."""
    names = list(dict.fromkeys(_untrained(()) if plugins is None else plugins))
    for name in names:
        if pruning.entry(name).learned:
            raise UserError(f"{name!r} learns what to keep while it trains: before that there is nothing to look at")
    out = Path(out) if Path(out).suffix else Path(f"{out}.png")
    if out.exists() and Path(image).exists() and out.samefile(image):
        raise UserError(f"{out} is the picture itself: choose another place for the drawing")
    require(bool(names), f"no plugin to look at; known: {', '.join(pruning.names())}")
    needs = sorted({signal for name in names for signal in pruning.entry(name).needs})
    given = {} if tower is None else {signal: torch.ones(1, 1) for signal in needs}
    for name in names:  # any plugin keeps a single row: this checks names and the share before anything is loaded
        pruning.select(name, torch.ones(1, 1, 1), keep=keep, signals=given)
    picture, given = images.decode(Path(image), "look"), {}
    if tower is None:
        features, shown, (rows, columns) = patches(picture)
    else:
        features, shown, (rows, columns), given = encode(picture, str(tower), plugins)
    how = {"keep": keep, "seed": seed, "signals": {signal: values[None] for signal, values in given.items()}}
    names = _untrained(given) if plugins is None else names
    found = {name: pruning.choose(name, features[None], **how) for name in names}
    source = "plain colour patches (no model)" if tower is None else f"features of {Path(tower).name or tower}"
    nearest = {}
    if cells:
        nearest = {name: pruning.cells(features[None].float(), kept.index)[0] for name, kept in found.items()}
    save(_draw(f"{_short(Path(image).name, 30)}: {_short(source, 45)}", shown, rows, columns, found, nearest), out)
    return {name: kept.index[0].tolist() for name, kept in found.items()}


def _untrained(signals) -> list[str]:
    return [name for name in pruning.works_with(signals) if not pruning.entry(name).learned]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


# The drawing


def _draw(
    title: str, shown: np.ndarray, rows: int, columns: int, found: dict[str, pruning.Kept], nearest: dict[str, Tensor]
):
    panels = [("as the plugins see it", shown, [])]
    for name, kept in found.items():
        cells = kept.index[0].tolist()
        label = f"{name} {len(cells)} of {rows * columns}"
        if kept.weight is None:
            if nearest:
                pixels = stand_in(shown, kept.index[0][nearest[name]], rows, columns)
            else:
                pixels = shade(shown, cells, rows, columns)
            panels.append((label, pixels, cells))
        else:
            panels.append((label, melt(shown, kept.weight[0].numpy(), rows, columns), []))
    across = math.ceil(math.sqrt(len(panels))) if len(panels) > 4 else len(panels)
    down = math.ceil(len(panels) / across)
    tall = SIDE * shown.shape[0] / shown.shape[1]
    width, height = across * (SIDE + GAP) + GAP, down * (tall + TITLE) + HEADER
    fig = figure(width, height)
    fig.suptitle(title.encode(errors="replace").decode(), y=1 - 0.2 / height, fontsize=11, parse_math=False)
    axes = fig.subplots(down, across, squeeze=False).flatten()
    fig.subplots_adjust(
        left=GAP / width, right=1 - GAP / width, bottom=GAP / height, top=1 - (HEADER + TITLE - GAP) / height,
        wspace=GAP / SIDE, hspace=TITLE / tall,
    )  # fmt: skip
    for ax in axes:
        ax.set_axis_off()
    for ax, (label, pixels, outlined) in zip(axes, panels, strict=False):
        ax.imshow(pixels, interpolation="nearest", aspect="auto")
        ax.set_title(label, fontsize=10, pad=3, parse_math=False)
        if outlined:
            _outline(ax, outlined, rows, columns, pixels.shape)
    return fig


def shade(picture: np.ndarray, kept: Sequence[int], rows: int, columns: int) -> np.ndarray:
    """Returns `picture` (H, W, 3) with all cells but the kept ones dimmed."""
    light = np.full(rows * columns, DIM, dtype=picture.dtype)
    light[kept] = 1
    cell = np.ones((picture.shape[0] // rows, picture.shape[1] // columns), dtype=picture.dtype)
    return picture * np.kron(light.reshape(rows, columns), cell)[..., None]


def melt(picture: np.ndarray, weight: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Returns `picture` (H, W, 3) with every cell as the average of the merged tokens `weight` (K, cells) that hold it,
    and dimmed where no token does."""
    high, wide = picture.shape[0] // rows, picture.shape[1] // columns
    cells = picture.reshape(rows, high, columns, wide, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    mixed = weight / weight.sum(1, keepdims=True) @ cells
    held = weight.sum(0)[:, None]
    shown = np.where(held > 0, (weight.T @ mixed) / np.maximum(held, 1e-9), DIM * cells)
    return shown.reshape(rows, columns, high, wide, 3).swapaxes(1, 2).reshape(picture.shape)


def stand_in(picture: np.ndarray, by: Tensor, rows: int, columns: int) -> np.ndarray:
    """Returns `picture` (H, W, 3) with the cell by[i] in the place of each cell i."""
    high, wide = picture.shape[0] // rows, picture.shape[1] // columns
    cells = picture.reshape(rows, high, columns, wide, 3).swapaxes(1, 2).reshape(rows * columns, high, wide, 3)
    return cells[by.numpy()].reshape(rows, columns, high, wide, 3).swapaxes(1, 2).reshape(picture.shape)


def _outline(ax, kept: Sequence[int], rows: int, columns: int, shape: tuple[int, ...]) -> None:
    """Draws a white line between bright and dimmed cells: in a dark picture nothing else shows the difference."""
    bright = np.zeros(rows * columns)
    bright[kept] = 1
    pixels = np.pad(np.kron(bright.reshape(rows, columns), np.ones((shape[0] // rows, shape[1] // columns))), 1)
    ax.autoscale(False)
    x, y = np.arange(pixels.shape[1]) - 1, np.arange(pixels.shape[0]) - 1
    ax.contour(x, y, pixels, levels=[0.5], colors="white", linewidths=0.7)


# What the plugins see


def patches(picture: Image.Image) -> tuple[Tensor, np.ndarray, tuple[int, int]]:
    """Features that need no model: the pixels of every patch, less the mean patch. Without the subtraction all of them
    would point the same way, towards grey, and their cosines would hardly differ."""
    side = GRID * PATCH
    shown = np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    cells = torch.from_numpy(shown).unflatten(0, (GRID, PATCH)).unflatten(2, (GRID, PATCH))
    features = cells.transpose(1, 2).reshape(GRID * GRID, -1)  # (lines, y, columns, x, 3) -> (cells, pixels)
    return features - features.mean(0), shown, (GRID, GRID)


@torch.no_grad()
def encode(
    picture: Image.Image, tower: str, plugins: Sequence[str] | None = ()
) -> tuple[Tensor, np.ndarray, tuple[int, int], dict[str, Tensor]]:
    """Returns the features (cells, width) of the model at `tower`, the picture that it was shown (H, W, 3) in 0 .. 1,
    the lines and columns of its cells, and the signals that the plugins need (None: all that there are)."""
    # Imported here, since transformers takes seconds and a look without a tower does not need it.
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    from ..models import families, loading
    from ..pruning import signals

    path = paths.model_folder_or_hub_id(tower)
    with loading.explaining(f"cannot load a vision tower from {tower}"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    vision = getattr(config, "vision_config", config)
    patch = getattr(vision, "patch_size", None)
    if not isinstance(patch, int):
        raise UserError(f"{tower} holds a {config.model_type!r} model: it has no tower that cuts pictures into patches")
    llava = config.model_type in families.FAMILIES
    drawn = not llava or config.model_type.startswith("llava")
    require(
        drawn, f"{tower} holds a {config.model_type!r} model, whose tokens cannot be drawn yet: give a LLaVA or a CLIP"
    )
    asking = [name for name in plugins or () if pruning.entry(name).needs]
    if asking and not llava:
        raise UserError(f"the plugin {asking[0]!r} needs what a LLaVA's projector reads: give a LLaVA as tower")
    if llava:  # without LLM layers: their weights are not even read
        config.text_config.num_hidden_layers = 0
    batch, shown = _preprocess(picture, tower, vision, config.model_type)
    with _silent_transformers():
        kind = AutoModelForImageTextToText if llava else AutoModel
        model = loading.load_weights(kind, path, config=config, dtype=torch.float32).eval()
    if not llava and hasattr(config, "text_config") and not hasattr(model, "vision_model"):
        raise UserError(f"{tower} holds a {config.model_type!r} model, unknown here: give a LLaVA, a CLIP or a SigLIP")

    pixels, sizes = batch["pixel_values"], batch.get("image_sizes")
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    cells = rows * columns
    family, heard = families.family(model) if llava else None, {}
    for name in asking:
        signals.require_signals(family, name)
    needs = {signal for name in asking for signal in pruning.entry(name).needs}
    try:
        if llava:
            with signals.recording(
                family, batch, sorted(signals.signals_of_model(family) if plugins is None else needs)
            ) as heard:
                features = family.encode(batch, "full")[0]
        else:
            features = getattr(model, "vision_model", model)(pixels, output_hidden_states=True).hidden_states[-2][0]
    except (RuntimeError, ValueError) as error:
        size = f"{pixels.shape[-1]} x {pixels.shape[-2]}"
        raise UserError(f"the model in {tower} cannot read the {size} pictures of its processor: {error}") from error
    # NeXT's base view comes first. Others have nothing behind the patches, and at most CLS or registers before them.
    features = features[:cells] if sizes is not None else features[-cells:]
    if len(features) < cells:
        raise UserError(f"{tower} makes {len(features)} tokens of {rows} x {columns} patches: there is no map to draw")
    given = {signal: values[0][:cells] for signal, values in heard.items()}
    return features, shown[: rows * patch, : columns * patch], (rows, columns), given


def _preprocess(picture: Image.Image, tower: str, vision, kind: str) -> tuple[dict[str, Tensor], np.ndarray]:
    """Returns the model's input and the picture in it, by the model's own processor, or CLIP's if it has none."""
    from transformers import AutoImageProcessor, CLIPImageProcessor

    try:
        with _silent_transformers():
            processor = AutoImageProcessor.from_pretrained(paths.model_folder_or_hub_id(tower), trust_remote_code=False)
    except (OSError, ValueError) as error:  # there is no processor, or not one for pictures
        if kind == "llava_next":
            what = "the image processor that cuts crops for LLaVA-NeXT"
            raise UserError(f"{tower} lacks {what}: copy it there") from error
        side = vision.image_size
        processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    batch = processor(images=picture, return_tensors="pt")
    if batch["pixel_values"].dim() not in (4, 5):
        raise UserError(f"the image processor of {tower} makes {tuple(batch['pixel_values'].shape)}, not a picture")
    shown = batch["pixel_values"].flatten(0, -4)[0].permute(1, 2, 0)  # of NeXT's views the first, the base view
    if processor.do_normalize:
        shown = shown * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    return dict(batch), shown.clamp(0, 1).numpy()


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Silences transformers' list of the LLM weights that are left out on purpose, and its progress bars."""
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
