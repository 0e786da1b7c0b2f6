"""What a torture leaves: a file that says what was tried, how often, and what was lost. The table in README.md is held
to these files."""

import argparse
import json
import time
from pathlib import Path

from tinyspeed.util import provenance

_BEGAN = time.monotonic()


def parser(description: str, count: int) -> argparse.ArgumentParser:
    """The arguments that all tortures take; `count`: how much there is in the long form."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=int, default=count)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="a JSON file for what was tried and found")
    return made


def write(out: Path | None, tried: dict[str, int], lost: list[str], **more) -> int:
    """Print and keep the outcome; the program's exit code. `tried`: by kind, how often. `lost`: a line for each time
    that it went wrong, with all that is needed to see it again."""
    for kind, count in tried.items():
        print(f"{count:>8,}  {kind}")
    print(f"{sum(tried.values()):,} tried, {len(lost)} lost", *lost, sep="\n")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = {"tried": tried, "lost": lost, **more, "seconds": round(time.monotonic() - _BEGAN, 1)}
        out.write_text(json.dumps({**found, "record": provenance.describe()}, indent=1) + "\n", encoding="utf-8")
    return 1 if lost else 0
