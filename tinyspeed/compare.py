"""The paper's claims in miniature: the same recipe trained in several ways, side by side.

Every arm of a seed starts from the same base model and sees the same pictures in the same order for the same number
of steps; arms differ in what a step leaves out. Training seconds are the loop's own (forward, backward, optimizer,
data), in one process on one machine, one arm after the other; the seeds go round all arms before the next seed
begins, so slow hours of the machine hit every arm.

Arms already measured are not run again: an interrupted comparison goes on where it was.
"""

import dataclasses
import json
import shutil
import statistics
from pathlib import Path

from . import digits, evaluate, record, report
from .checkpoint import only_one, write_atomically
from .errors import UserError, unknown
from .recipe import Recipe
from .train import set_threads, train

# What each arm changes in the recipe's [dualspeed]. The four after `full` are the paper's, with the official code's
# compact positions; the last four ask how rare slow steps may become when positions stay original.
ARMS: dict[str, dict] = {
    "full": {"schedule": "full"},
    "pruned-only": {"schedule": "fast", "positions": "compact"},
    "dualspeed": {"schedule": "bernoulli", "slow": 0.1, "positions": "compact"},
    "no isolator": {"schedule": "bernoulli", "slow": 0.1, "positions": "compact", "isolator": 0},
    "no distillation": {"schedule": "bernoulli", "slow": 0.1, "positions": "compact", "distill": 0.0},
    "original r=0.1": {"schedule": "bernoulli", "slow": 0.1, "positions": "original"},
    "original r=0.05": {"schedule": "bernoulli", "slow": 0.05, "positions": "original"},
    "original r=0.02": {"schedule": "bernoulli", "slow": 0.02, "positions": "original"},
    "original r=0": {"schedule": "fast", "positions": "original"},
}


def folder_of(recipe: Recipe) -> Path:
    return recipe.folder.with_name(f"{recipe.run.name}-compare")


def compare(recipe: Recipe, seeds: int, arms: list[str] | None = None, bar: bool = True) -> int | None:
    """Run every arm for every seed; write compare.json, compare.md and compare.png into `folder_of(recipe)`.

    Returns the signal that ended it early, if one did."""
    arms = arms or list(ARMS)
    for arm in arms:
        if arm not in ARMS:
            raise unknown("arm", arm, ARMS)
    if recipe.data.kind != "digits":
        raise UserError(f'compare asks about digits: data.kind = "{recipe.data.kind}" has no such questions')
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: compare at least one seed")
    folder = folder_of(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        return _compare(recipe, folder, seeds, arms, bar)


def _compare(recipe: Recipe, folder: Path, seeds: int, arms: list[str], bar: bool) -> int | None:
    set_threads(recipe)
    for seed in range(recipe.run.seed, recipe.run.seed + seeds):
        home = folder / f"seed-{seed}"
        home.mkdir(exist_ok=True)
        base = recipe.model.path or str(
            digits.prepare(home / "base", seed, **dataclasses.asdict(recipe.digits), bar=bar)
        )
        for arm in arms:
            stopped = _run(recipe, home, base, seed, arm, bar)
            if stopped is not None:
                return stopped
    # Whatever this folder holds, also from earlier calls with other arms.
    every = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("seed-*/*/result.json")]
    known = list(ARMS)
    runs = sorted(every, key=lambda run: (run["seed"], known.index(run["arm"])))
    results = {**record.describe(recipe=recipe.to_toml()), "runs": runs}
    write_atomically(folder / "compare.json", json.dumps(results, indent=1) + "\n")
    write_atomically(folder / "compare.md", summary(runs) + "\n")
    report.draw_compare(results, folder / "compare.png")
    return None


def _run(recipe: Recipe, home: Path, base: str, seed: int, arm: str, bar: bool) -> int | None:
    """Measure one arm, unless it has been; the signal that ended it early, if one did."""
    name = arm.replace(" ", "-")
    recipe = dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, folder=str(home), name=name, seed=seed),
        model=dataclasses.replace(recipe.model, path=base),
        dualspeed=dataclasses.replace(recipe.dualspeed, **ARMS[arm]),
    )
    done = recipe.folder / "result.json"
    if done.is_file():
        if json.loads(done.read_text(encoding="utf-8"))["recipe"] != recipe.to_toml():
            raise UserError(f"{done} was measured with another recipe; choose another run.name, or delete the folder")
        return None
    shutil.rmtree(recipe.folder, ignore_errors=True)  # of an arm that was cut off: its seconds would not be whole
    if bar:
        print(f"seed {seed}: {arm}", flush=True)
    trained = train(recipe, bar=bar)
    if trained.stopped_by is not None:
        return trained.stopped_by
    full, pruned = evaluate.held_out(trained.model, recipe, bar)
    lines = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "arm": arm,
        "seed": seed,
        "accuracy_full": full,
        "accuracy_pruned": pruned,
        "seconds": trained.totals.seconds,
        "rows": trained.totals.rows,
        "steps": trained.totals.steps,
        "slow_steps": sum(line["mode"] == "slow" for line in lines),
        "curve": [[line["step"], round(line["ce"], 4), line["mode"]] for line in lines],
        "recipe": recipe.to_toml(),
    }
    write_atomically(done, json.dumps(result))
    return None


def summary(runs: list[dict]) -> str:
    """The table: mean and, over several seeds, the spread from lowest to highest."""
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    full = {run["seed"]: run for run in runs if run["arm"] == "full"}

    def cell(arm: str, value, digits: int) -> str:
        values = [value(run) for run in runs if run["arm"] == arm]
        if None in values:
            return "-"
        spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    def of_full(run: dict, key: str) -> float | None:
        """Relative to the full arm of the same seed; None without one, or with one too short to get anything right."""
        whole = full.get(run["seed"], {}).get(key)
        return run[key] / whole if whole else None

    def speedup(run: dict) -> float | None:
        ratio = of_full(run, "seconds")
        return 1 / ratio if ratio else None

    def kept(run: dict) -> float | None:
        ratio = of_full(run, "accuracy_full")
        return None if ratio is None else 100 * ratio

    headers = [
        "arm",
        "% right, full tokens",
        "% right, pruned",
        "seconds",
        "rows (M)",
        "speed-up",
        "% of full's accuracy",
    ]
    rows = [
        [
            arm,
            cell(arm, lambda r: r["accuracy_full"], 1),
            cell(arm, lambda r: r["accuracy_pruned"], 1),
            cell(arm, lambda r: r["seconds"], 0),
            cell(arm, lambda r: r["rows"] / 1e6, 2),
            cell(arm, speedup, 2),
            cell(arm, kept, 1),
        ]
        for arm in arms
    ]
    return report.table(headers, rows)
