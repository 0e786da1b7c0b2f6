"""`tinyspeed demo`: the whole idea on a CPU, in minutes, with nothing to download.

A LLaVA that is small enough for a laptop learns to read real handwritten digits on a large canvas. Its tower is
trained, its projector is aligned, and it is tuned with DualSpeed; then it is asked about new pictures on full tokens,
and what happened is drawn.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ..data import digits
from ..recipe import Recipe
from ..training import report
from ..training.train import Result, train
from ..util import files, require, tables
from . import accuracy, look


def demo(recipe: Recipe) -> Result:
    """Trains, goes on with an interrupted demo, or shows a finished one again."""
    require(recipe.data.kind == "digits", "the demo is about digits: `tinyspeed train` is for pictures of your own")
    folder = recipe.folder
    result = train(recipe, resume=(folder / "recipe.toml").is_file())
    if result.stopped_by is not None:
        return result
    print(_results(recipe, result))
    report.draw_run(folder)
    picture = draw_example(folder / "picture.png", recipe.run.seed, digits.canvas_of(recipe))
    look.look(picture, folder / "kept.png", keep=recipe.dualspeed.keep, tower=str(folder / "model"))
    print(
        f"{folder / 'report.png'}: loss, tokens and time\n{folder / 'kept.png'}: the tokens that fast steps keep\n"
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
        ["tokens through the LLM", f"{t.rows:,}"],
        ["tokens in full training", f"{t.rows_full:,}"],
        ["training seconds", f"{t.seconds:.0f}"],
        ["seconds of full training, estimated", f"{t.full_seconds:.0f}" if t.speedup else "-"],
        ["speed-up, estimated", f"{t.speedup:.2f}" if t.speedup else "-"],
    ]
    return tables.table(["after training", "value"], rows)


def draw_example(path: Path, seed: int, canvas: digits.Canvas = digits.DEFAULT) -> Path:
    """Writes a picture that the training has not seen."""
    pixels, _ = digits.picture(np.random.default_rng([seed, 7]), "eval", canvas)
    with files.atomic(path) as temporary:
        Image.fromarray(pixels).convert("RGB").save(temporary, format="PNG")
    return path


def short(recipe: Recipe) -> Recipe:
    """Returns a recipe that takes the same path in seconds, to see that everything runs. It learns next to nothing."""
    return recipe.replaced(
        run={"name": f"{recipe.run.name}-short", "save_every": 10},
        data={"eval_pictures": 100},
        digits={"tower_steps": 20},
        dualspeed={"schedule": "periodic", "slow": 0.2},  # so that some steps are slow
        align={"steps": 5},
        train={"steps": 25},
    )
