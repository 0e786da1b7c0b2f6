"""The long form: `python -m slow.attacks.damaged_input --count 40000 --seed 0`."""

import importlib
import sys
import tempfile
from pathlib import Path

from slow.attacks import damaged_input, outcomes
from slow.attacks.damaged_input import cases
from transformers.utils import logging

from tinyspeed import cli

if __name__ == "__main__":
    cli.silence_libraries()
    logging.disable_progress_bar()
    parser = outcomes.parser(damaged_input.__doc__, count=40_000)
    parser.add_argument("--parts", default=",".join(damaged_input.SHARES))
    parser.add_argument("--first", type=int, default=0, help="the number of the first case, to repeat one")
    asked = parser.parse_args()
    tally, chosen = cases.Tally(), asked.parts.split(",")
    whole = sum(damaged_input.SHARES[name] for name in chosen)
    for name in chosen:
        count = max(1, round(asked.count * damaged_input.SHARES[name] / whole))
        with tempfile.TemporaryDirectory() as home:
            part = importlib.import_module(f"slow.attacks.damaged_input.{name}")
            numbers = range(asked.first, asked.first + count)
            cases.run_cases(name, part, Path(home), numbers, asked.seed, tally)
        outcomes.say(f"{name}: {count:,} cases")
    sys.exit(outcomes.write(asked.out, tally.tried(), tally.failures))
