"""What an attack leaves behind: a JSON file that says what it tried, how often, and what failed. The table in README.md
is checked against these files."""

import argparse
import json
import time
from pathlib import Path

from tinyspeed.util import provenance

_BEGAN = time.monotonic()


def parser(description: str, count: int) -> argparse.ArgumentParser:
    """Returns a parser with the arguments of every attack. `count` is how much the long form tries."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=int, default=count)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="a JSON file for the outcome")
    return made


def say(line: str) -> None:
    print(line, flush=True)


def write(out: Path | None, tried: dict[str, int], failures: list[str], **more) -> int:
    """Prints the outcome and writes it to `out`; returns the program's exit code. `tried` says how often each kind was
    tried. Each failure is a line with all that one needs to repeat it."""
    for kind, count in tried.items():
        print(f"{count:>8,}  {kind}")
    print(f"{sum(tried.values()):,} tried, {len(failures)} failed", *failures, sep="\n")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = {"tried": tried, "failures": failures, **more, "seconds": round(time.monotonic() - _BEGAN, 1)}
        out.write_text(json.dumps({**found, "record": provenance.describe()}, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0
