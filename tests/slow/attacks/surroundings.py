"""Attacks what is around a run: its user, names, locale, clock and memory, numbers that overflow, and large files.

    make torture ONLY=surroundings

Most of it is in tests of the suite, of which this program runs those of `TESTS` and counts the cases. The rest is large
or needs root, and is done here:

    another user        who may not write here, or not read that, gets the result or one line
    100,000 records     are read and checked in time and memory that grow as their number does
    a list of 200 MB    of JSON, on one line, costs a small part of its size in memory
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from slow.attacks import outcomes
from support import tiny
from support.album import album
from support.runs import ROOT, recipe_file, settings
from support.waiting import HANGS

TESTS = {
    "names and locales": ("slow/test_names_and_locales.py", "test_streams.py"),
    "TOML of wrong types, or nested": (
        "recipe/test_recipe.py::test_a_value_of_another_type_is_refused_by_the_name_of_its_key",
        "recipe/test_recipe.py::test_what_is_nested_a_thousand_deep_is_refused_in_one_line",
    ),
    "signals in every phase": ("slow/test_signals.py",),
    "tensors that overlap": ("models/test_overlapping_tensors.py",),
    "fp16 that overflows": (
        "slow/test_half_precision.py::test_overflows_without_end_stop_an_fp16_run_before_a_weight_is_harmed",
        "training/test_tuning.py::test_an_overflow_skips_the_step_and_halves_the_scale",
    ),
    "a clock that jumps": ("training/test_training.py::test_a_clock_that_jumps_by_days_spoils_neither_run_nor_log",),
    "a full /dev/shm": ("slow/test_commands.py::test_a_dev_shm_that_is_full_is_one_line_with_the_way_out",),
    "links, pipes and devices": ("util/test_special_files.py",),
    "two writers": ("util/test_two_writers.py",),
}
NO_POWERS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")  # root, but what is forbidden is forbidden
RECORDS, LIST = (25_000, 100_000), 200_000_000
# Reads a file of records and checks them; prints how many there are, the seconds of CPU and the MiB that it took.
CHECK = """
import resource, sys
from tinyspeed import recipe
from tinyspeed.data import conversations
made = recipe.read(sys.argv[1])
used = lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_utime, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
seconds, memory = used()
source = conversations.from_recipe(made, made.model.path, bar=False)
print(len(source), used()[0] - seconds, (used()[1] - memory) / 1024)
"""


class Cases:
    """Counts the cases that pytest runs, and keeps the names of those that fail."""

    def __init__(self):
        self.tried, self.failures = 0, []

    def pytest_runtest_logreport(self, report) -> None:
        self.tried += report.when == "call" and not report.skipped
        if report.failed:
            self.failures.append(f"{report.nodeid}: {str(report.longrepr)[-500:]}")


def go(words: list, folder: Path, *before: str, **environment) -> subprocess.CompletedProcess:
    here = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*before, sys.executable, *map(str, words)], cwd=folder, env={**os.environ, **here, **environment},
        capture_output=True, text=True, timeout=HANGS,
    )  # fmt: skip


def another_user(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields each case with what is wrong."""
    album(folder, 6)
    tiny.checkpoint("llava", folder / "llava")
    own, theirs = folder / "own", folder / "theirs"
    own.mkdir()
    theirs.mkdir(mode=0o555)

    def case(name: str, says: str, *changes: str, home: Path = own) -> tuple[str, str]:
        made = settings(folder, own, name.replace(" ", "-"), "train.steps=2", "lora.rank=2", *changes)
        (own / "recipe.toml").write_text(made.to_toml())
        words = ["-m", "tinyspeed", "train", own / "recipe.toml"]
        done = go(words, own, *NO_POWERS, HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
        lines = [line for line in done.stderr.splitlines() if line.startswith("tinyspeed: ")]
        good = done.returncode == (2 if says else 0) and "Traceback" not in done.stderr
        good = good and len(lines) == bool(says) and all(says in line for line in lines)
        return name, "" if good else f"exit code {done.returncode}, {done.stderr[-1000:]}"

    yield case("everything allowed", "")
    yield case("no home", "", home=theirs / "absent")
    yield case("a folder of runs that is not its own", "ermission denied", f"run.folder={theirs}")
    yield case("a cache that is not its own", "", f"run.cache={theirs}")
    for name in ("train.json", "images/p0-0.jpg", "llava/config.json", "llava/model.safetensors"):
        (folder / name).chmod(0)
        yield case(f"may not read {name.replace('/', '-')}", "ermission denied")
        (folder / name).chmod(0o644)


def large_files(folder: Path) -> Iterator[tuple[str, str]]:
    record = json.loads(Path(album(folder, 2)).read_text())[0]
    tiny.checkpoint("llava", folder / "llava")
    seconds = {}

    def check(name: str, entries: int, padding: int) -> tuple[int, float, float]:
        made = settings(folder, folder, name, f"data.file={folder / name}.json")
        one = json.dumps(record | {"notes": "x" * padding})
        (folder / f"{name}.json").write_text(f"[{', '.join([one] * entries)}]")
        done = go(["-c", CHECK, folder / recipe_file(made)], folder)
        assert done.returncode == 0, done.stderr[-1000:]
        count, used, memory = done.stdout.split()
        return int(count), float(used), float(memory)

    for entries in RECORDS:
        count, seconds[entries], memory = check(f"records-{entries}", entries, 0)
        slow = seconds[entries] > 2 * entries / RECORDS[0] * seconds[RECORDS[0]]
        yield f"{entries:,} records", f"{count} records, {seconds}" if count != entries or slow else ""
    count, _, memory = check("list", 1000, LIST // 1000)
    yield "a list of 200 MB", f"{count} records, {memory} MiB" if count != 1000 or memory > 100 else ""


if __name__ == "__main__":
    asked = outcomes.parser(__doc__, count=0).parse_args()
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    tried, failures = Counter(), []
    for kind, nodes in TESTS.items():
        cases = Cases()
        pytest.main(["-q", "-p", "no:cacheprovider", "-n", "0", *(f"{ROOT}/tests/{node}" for node in nodes)], [cases])
        tried[kind], failures = cases.tried, failures + cases.failures
    for kind, attack in (("another user", another_user), ("large files", large_files)):
        with tempfile.TemporaryDirectory() as folder:
            for case, wrong in attack(Path(folder)):
                outcomes.say(f"{kind}: {case} {wrong}")
                tried[kind] += 1
                failures += [f"{kind}: {case}: {wrong}"] * bool(wrong)
    sys.exit(outcomes.write(asked.out, dict(tried), failures))
