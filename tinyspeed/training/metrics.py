"""What a run measures: metrics.jsonl in its folder, one line of JSON for every step.

A tracker (TensorBoard and the like) would get each step's numbers here too, in `logging`.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ..util import UserError, files, require

LOG = "metrics.jsonl"
NEEDED = ("step", "stage", "mode", "ce", "rows_kept", "rows_taught", "rows_full", "seconds")


@contextmanager
def logging(folder: Path, lead: bool) -> Iterator[Callable[[dict], None]]:
    """Yields a function that logs a step. Only the `lead` of several processes writes."""
    with files.appending(folder / LOG) if lead else nullcontext(lambda line: None) as add:
        yield lambda step: add(json.dumps(step).encode() + b"\n")


def read_metrics(path: Path) -> list[dict]:
    """The steps of a metrics.jsonl in order. The later of two lines of a step counts, and the last may be cut off."""
    try:
        lines = files.read(path).decode(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a run's folder holds metrics.jsonl once it has trained") from error
    steps: dict[int, dict] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not JSON: {error.msg}; delete the line to go on") from error
        lacks = ", ".join(key for key in NEEDED if key not in row) if isinstance(row, dict) else "everything"
        require(not lacks, f"{path}, line {number} lacks {lacks}: was it written by tinyspeed train?")
        steps[row["step"]] = row
    require(bool(steps), f"{path} holds no step yet: train for at least one step first")
    return [steps[step] for step in sorted(steps)]
