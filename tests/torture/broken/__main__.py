"""The long form: `python -m torture.broken --count 40000 --seed 0`."""

import importlib
import sys
import tempfile
from pathlib import Path

from torture import broken, outcome
from torture.broken import trial
from transformers.utils import logging

from tinyspeed import cli

if __name__ == "__main__":
    cli.silence_libraries()
    logging.disable_progress_bar()
    parser = outcome.parser(broken.__doc__, count=40_000)
    parser.add_argument("--parts", default=",".join(broken.SHARES))
    parser.add_argument("--first", type=int, default=0, help="the number of the first case, to see one again")
    asked = parser.parse_args()
    tally, chosen = trial.Tally(), asked.parts.split(",")
    whole = sum(broken.SHARES[name] for name in chosen)
    for name in chosen:
        count = max(1, round(asked.count * broken.SHARES[name] / whole))
        with tempfile.TemporaryDirectory() as home:
            part = importlib.import_module(f"torture.broken.{name}")
            trial.run(name, part, Path(home), range(asked.first, asked.first + count), asked.seed, tally)
        print(f"{name}: {count:,} cases", flush=True)
    sys.exit(outcome.write(asked.out, tally.tried(), tally.lost))
