"""A recipe says everything about a run: a TOML file, read into frozen dataclasses.

    made = recipe.read("digits", ["train.lr=1e-4"])     a file, or a built-in one by its name; with changes
    made.train.lr, made.folder, made.stages()

`sections.py` has the keys with their defaults, `reading.py` the way from TOML, `schedules.py` the schedule that a
recipe asks for, `comparison.py` the recipes of a comparison; `presets/` and `comparisons/` are the built-in files.
"""

from .reading import BUILT_IN, changed, from_tables, of_run, read
from .sections import DataSection, DualSpeedSection, Recipe, RunSection, StageSection

__all__ = ["BUILT_IN", "DataSection", "DualSpeedSection", "Recipe", "RunSection", "StageSection"]
__all__ += ["changed", "from_tables", "of_run", "read"]
