"""Collects what comparisons have measured into a table of results/ablations.md, over as many sittings as it takes.

    python tutorials/ablations.py weights-6 runs/weights-6-compare    adds the runs of this folder
    python tutorials/ablations.py weights-6                           says which runs are missing, as commands

The folder is that of `tinyspeed compare`, which may still be at work: each arm counts when it has been measured. What
is in results/ablations-NAME.json already stays, so the folders of earlier sittings are not needed any more. Losses are
left out. On the page, the table between the marks of that name is written anew, and the text around it is not touched.

Arms that an earlier table has measured with the same settings stand in until they are measured here: they have the
earlier name in their recipe.
"""

import json
import statistics
import sys
from pathlib import Path

from tinyspeed import recipe
from tinyspeed.recipe import comparison
from tinyspeed.util.files import write_atomically
from tinyspeed.util.tables import table

RESULTS = Path(__file__).parent / "results"
SEEDS, HEAD = 3, ["arm", "seeds", "% right, full tokens", "% right, pruned", "tokens x layers", "slow steps"]
DEEP = "digits.layers={} train.lr=0.001"
SETS = {  # name: what is set beside the arms of comparisons/weights.toml
    "weights-3": "",
    "weights-6": DEEP.format(6),
    "weights-12": DEEP.format(12),
    "weights-6-long": f"{DEEP.format(6)} train.steps=1200",
    "weights-6-keep-0.05": f"{DEEP.format(6)} dualspeed.keep=0.05",
    "weights-6-keep-0.25": f"{DEEP.format(6)} dualspeed.keep=0.25",
}
EARLIER = {"weights-3": "shelf", "weights-6": "limits-depth"}  # tables with the same settings
STANDS_FOR = {"full": "full", **{f"original r={r}": f"none r={r}" for r in ("0", "0.02", "0.1")}}
Runs = dict[tuple[str, int], dict]  # by arm and seed


def runs_of(name: str) -> Runs:
    file = RESULTS / f"ablations-{name}.json"
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else []
    return {(run["arm"], run["seed"]): run for run in runs}


def earlier(name: str) -> Runs:
    """The runs of an earlier table that stand in, under the names of the arms here."""
    found = runs_of(EARLIER[name]) if name in EARLIER else {}
    return {
        (STANDS_FOR[arm], seed): run | {"arm": STANDS_FOR[arm]}
        for (arm, seed), run in found.items()
        if arm in STANDS_FOR
    }


def measured(folder: Path) -> Runs:
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("seed-*/*/result.json")]
    return {(run["arm"], run["seed"]): {key: of for key, of in run.items() if key != "curve"} for run in runs}


def arms() -> list[str]:
    return list(comparison.read(recipe.read("digits"), "weights"))


def describe(runs: Runs) -> str:
    """The table of these runs, in the order of the arms."""
    full, rows = {seed: run["area"] for (arm, seed), run in runs.items() if arm == "full"}, []
    for arm in arms():
        mine = [run for (of, _), run in sorted(runs.items()) if of == arm]
        if not mine:
            continue
        shares = [run["area"] / full[run["seed"]] for run in mine if run["seed"] in full]
        share = f"{100 * statistics.mean(shares):.0f}%" if shares else "-"
        right = [_spread([run[f"accuracy_{tokens}"] for run in mine]) for tokens in ("full", "pruned")]
        slow = statistics.mean(run["slow_steps"] for run in mine)
        rows.append([arm, str(len(mine)), *right, share, f"{slow:.0f}"])
    return table(HEAD, rows)


def _spread(values: list[float]) -> str:
    said = f"{statistics.mean(values):.1f}"
    return said if len(values) == 1 else f"{said} ({min(values):.1f} to {max(values):.1f})"


def missing(name: str, runs: Runs) -> list[str]:
    """The commands that measure what is not there yet, seed by seed."""
    sets = "".join(f" --set {change}" for change in SETS[name].split())
    commands = []
    for seed in range(SEEDS):
        if left := [arm for arm in arms() if (arm, seed) not in runs]:
            how = f"--set run.name={name}{sets} --set run.seed={seed} --set run.threads=1"
            commands.append(f"tinyspeed compare --arms weights --only '{','.join(left)}' {how}")
    return commands


def main(name: str, folder: str | None = None) -> None:
    if name not in SETS:
        sys.exit(f"there is no {name}; there are {', '.join(SETS)}")
    page, file = RESULTS / "ablations.md", RESULTS / f"ablations-{name}.json"
    runs = earlier(name) | runs_of(name)
    if folder is not None:
        text, mark, end = page.read_text(encoding="utf-8"), f"<!-- {file.name} -->", f"<!-- end of {file.name} -->"
        if mark not in text:
            sys.exit(f"{page.name} has no place for the table: put a link to {file.name}, {mark} and {end} there")
        runs |= measured(Path(folder))
        write_atomically(file, json.dumps({"runs": [runs[key] for key in sorted(runs)]}, indent=1) + "\n")
        before, _, after = text.partition(mark)
        write_atomically(page, f"{before}{mark}\n\n{describe(runs)}\n\n{after[after.index(end) :]}")
        print(describe(runs))
    for command in missing(name, runs):
        print(command)


if __name__ == "__main__":
    main(*sys.argv[1:])
