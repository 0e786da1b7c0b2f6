"""All three systems in one recipe: rows that DualSpeed prunes, layers that STS skips, answers that ReGATE skips."""

import re

from support import pages

from tinyspeed import pruning, recipe
from tinyspeed.recipe import schedules
from tinyspeed.training import answer_gate


def test_the_guides_recipe_for_all_of_them_skips_rows_layers_and_answers():
    (command,) = [
        command for command in pages.commands(pages.ROOT / "tutorials" / "guide" / "methods.md") if "regate" in command
    ]
    made = recipe.read("digits", re.findall(r"--set (\S+)", command))
    answer_gate.require_some_skipping(made, made.digits.pictures)
    plans = list(map(schedules.schedule_of(made, "train", made.digits.layers).plan, range(made.train.steps)))
    assert any(plan.keep < 1 and plan.answer_keep < 1 for plan in plans)
    skipper = schedules.skipper_of(made, "train", made.digits.layers)
    assert skipper.on_average < made.digits.layers
    assert pruning.entry(made.dualspeed.plugin).needs
