"""Runs on digits that take a second: a tiny base model, and a recipe of two stages."""

import json
from pathlib import Path

from tinyspeed import recipe
from tinyspeed.data import digits_model

ALIGN, TUNE = 3, 7  # steps


def small_base(folder: Path) -> str:
    """A base model with attention dropout, so that the random state matters to a resumed run."""
    digits_model.prepare(folder, 0, bar=False, width=32, layers=2, tower_width=16, tower_layers=1, tower_steps=2)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def settings(base: str, home: Path, name: str, *changes: str) -> recipe.Recipe:
    values = [
        f"model.path={base}", f"run.folder={home}", f"run.name={name}", "run.save_every=2", "run.threads=1",
        "run.device=cpu", "data.eval_pictures=20", "dualspeed.slow=0.4", f"align.steps={ALIGN}", f"train.steps={TUNE}",
        "align.batch=4", "train.batch=4", "train.weight_decay=0.1",
    ]  # fmt: skip
    return recipe.read("digits", [*values, *changes])
