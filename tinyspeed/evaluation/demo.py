"""`tinyspeed demo`: the whole idea on a CPU, in minutes, with nothing to download.

Real handwritten digits on a large canvas, a LLaVA small enough for a laptop: train the tower, align the projector,
tune with DualSpeed, ask the trained model about pictures it has never seen on full tokens, and draw what happened.
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import digits
from ..recipe import Recipe
from ..training import report
from ..training.train import Result, train
from ..util import files, tables
from ..util.errors import UserError
from . import accuracy, look


def demo(recipe: Recipe) -> Result:
    """Train, or go on with an interrupted demo, or show a finished one again."""
    if recipe.data.kind != "digits":
        raise UserError("the demo is about digits: `tinyspeed train` is for pictures of your own")
    folder = recipe.folder
    result = train(recipe, resume=(folder / "recipe.toml").is_file())
    if result.stopped_by is not None:
        return result
    print(_results(recipe, result))
    report.draw_run(folder)
    picture = draw_example(folder / "picture.png", recipe.run.seed, digits.canvas_of(recipe))
    look.look(picture, folder / "kept.png", keep=recipe.dualspeed.keep, tower=str(folder / "model"))
    print(
        f"{folder / 'report.png'}: loss, rows and time\n{folder / 'kept.png'}: the tokens that fast steps keep\n"
        f"{folder / 'model'}: the trained model, a plain LLaVA for transformers"
    )
    return result


def _results(recipe: Recipe, result: Result) -> str:
    t = result.totals
    full, pruned = accuracy.held_out(result.model, recipe)
    rows = [
        ["% right on full tokens (as used at inference)", f"{full:.1f}"],
        ["% right on pruned tokens", f"{pruned:.1f}"],
        ["steps", f"{t.steps}"],
        ["rows through the LLM", f"{t.rows:,}"],
        ["rows in full training", f"{t.rows_full:,}"],
        ["training seconds", f"{t.seconds:.0f}"],
        ["seconds of full training, estimated", f"{t.full_seconds:.0f}"],
    ]
    return tables.table(["after training", "value"], [*rows, ["speed-up, estimated", f"{result.speedup:.2f}"]])


def draw_example(path: Path, seed: int, canvas: digits.Canvas = digits.DEFAULT) -> Path:
    pixels, _ = digits.picture(np.random.default_rng([seed, 7]), "eval", canvas)
    with files.atomic(path) as temporary:
        Image.fromarray(pixels).convert("RGB").save(temporary, format="PNG")
    return path


def short(recipe: Recipe) -> Recipe:
    """The same path in seconds, to see that everything runs; it learns nothing worth reading."""
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, name=f"{recipe.run.name}-short", save_every=10),
        data=dataclasses.replace(recipe.data, eval_pictures=100),
        digits=dataclasses.replace(recipe.digits, tower_steps=20),
        dualspeed=dataclasses.replace(recipe.dualspeed, schedule="periodic", slow=0.2),  # with slow steps, for certain
        align=dataclasses.replace(recipe.align, steps=5),
        train=dataclasses.replace(recipe.train, steps=25),
    )
