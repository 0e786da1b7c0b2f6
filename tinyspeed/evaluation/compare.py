"""The paper's claims in miniature: the same recipe trained in several ways, side by side.

Every arm of a seed starts from the same base model and sees the same pictures in the same order for the same number of
steps; arms differ in what a step leaves out. Training seconds are the loop's own (forward, backward, optimizer, data),
in one process on one machine, one arm after the other. All arms of a seed are trained before the next seed begins, so
slow hours of the machine hit every arm.

What the arms are: `recipe/comparison.py`. Arms that have been measured are not run again, so an interrupted comparison
goes on where it was, and one folder may collect the arms of several files. Each result says when it was measured.
"""

import json
import statistics
import tomllib
from pathlib import Path

from ..data import digits_model
from ..models import loading
from ..recipe import Recipe, comparison, from_tables, schedules
from ..training import answer_gate, metrics, run_folder
from ..training.build import place, set_threads
from ..training.checkpoint import only_one
from ..training.train import train
from ..util import UserError, files, located, paths, plots, provenance, require, tables
from . import accuracy
from .comparison_figure import compare_figure


def folder_of(recipe: Recipe) -> Path:
    return recipe.folder.with_name(f"{recipe.run.name}-compare")


def compare(recipe: Recipe, seeds: int, arms: dict[str, Recipe], bar: bool = True) -> int | None:
    """Runs every arm for every seed, and writes compare.json, compare.md and compare.png into `folder_of(recipe)`.

    Returns the signal that ended it early, if one did."""
    require(seeds >= 1, f"--seeds {seeds}: compare at least one seed")
    for arm, made in arms.items():
        _require_runnable(arm, made)
    folder = folder_of(recipe)
    with files.errors_about(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths.require_plain(folder, own=True)
    with only_one(folder):
        stopped_by = _run_arms(recipe, folder, seeds, arms, bar)
        if stopped_by is None:
            _write_results(recipe, folder, list(arms))
        return stopped_by


def _require_runnable(arm: str, recipe: Recipe) -> None:
    """Refuses now what a run would refuse when its turn comes, perhaps hours from now."""
    run_folder.require_sources(recipe)
    sizes = recipe.digits
    layers = loading.load_config(recipe.model.path).text_config.num_hidden_layers if recipe.model.path else sizes.layers
    with located(f"arm {arm!r}"):
        for stage, _ in recipe.stages():
            schedules.schedule_of(recipe, stage, layers)
        answer_gate.require_some_skipping(recipe, sizes.pictures)


def _run_arms(recipe: Recipe, folder: Path, seeds: int, arms: dict[str, Recipe], bar: bool) -> int | None:
    """Runs the arms that have not been measured. Returns the signal that ended it early, if one did."""
    set_threads(recipe)
    missing: list[tuple[str, Recipe]] = []
    for seed in range(recipe.run.seed, recipe.run.seed + seeds):
        home = folder / f"seed-{seed}"
        for arm, made in arms.items():
            run = {"folder": str(home), "name": comparison.folder_of(arm), "seed": seed}
            made = made.replaced(run=run, model={"path": recipe.model.path or str(home / "base")})
            if not _measured(made):
                missing.append((arm, made))
    for arm, made in missing:
        if not recipe.model.path:
            how = {"tower_steps": recipe.digits.tower_steps, **recipe.digits.sizes, "bar": bar}
            digits_model.prepare(Path(made.model.path), made.run.seed, **how, device=place(recipe).device)
        if bar:
            print(f"seed {made.run.seed}: {arm}", flush=True)
        if (stopped_by := _run(made, arm, bar)) is not None:
            return stopped_by
    return None


def _measured(recipe: Recipe) -> bool:
    done = recipe.folder / "result.json"
    if not done.is_file():
        return False
    before = tomllib.loads(json.loads(done.read_text(encoding="utf-8"))["recipe"])
    if from_tables(before, str(done)) != recipe:
        raise UserError(f"{done} was measured with another recipe; choose another run.name, or delete the folder")
    return True


def _run(recipe: Recipe, arm: str, bar: bool) -> int | None:
    """Trains and measures one arm. Returns the signal that ended it early, if one did."""
    with files.errors_about(recipe.folder):
        files.delete(recipe.folder)  # what an interrupted run has left: its seconds would be incomplete
    trained = train(recipe, bar=bar)
    if trained.stopped_by is not None:
        return trained.stopped_by
    full, pruned = accuracy.held_out(trained.model, recipe, bar)
    lines = metrics.read_metrics(recipe.folder / metrics.LOG)
    result = {
        "arm": arm,
        "seed": recipe.run.seed,
        "accuracy_full": full,
        "accuracy_pruned": pruned,
        "seconds": trained.totals.seconds,
        "rows": trained.totals.rows,
        "area": area(lines, trained.model.config.text_config.num_hidden_layers),
        "steps": trained.totals.steps,
        "slow_steps": sum(line["mode"] == "slow" for line in lines),
        "curve": [[line["step"], round(line["ce"], 4), line["mode"]] for line in lines],
        "recipe": recipe.to_toml(),
        "record": provenance.describe(place(recipe).device),
    }
    files.write_atomically(recipe.folder / "result.json", json.dumps(result))
    return None


def area(lines: list[dict], layers: int) -> int:
    """Returns the cost of the steps in a log: rows times the layers that they ran through, the teachers' included."""
    return sum((line["rows_kept"] + line["rows_taught"]) * (line["layers"] or layers) for line in lines)


def _write_results(recipe: Recipe, folder: Path, arms: list[str]) -> None:
    """Collects everything that the folder holds. Arms of earlier calls come last."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("seed-*/*/result.json")]
    order = {arm: at for at, arm in enumerate(arms)}
    runs.sort(key=lambda run: (run["seed"], order.get(run["arm"], len(order)), run["arm"]))
    results = {**provenance.describe(recipe=recipe.to_toml()), "runs": runs}
    files.write_atomically(folder / "compare.json", json.dumps(results, indent=1) + "\n")
    files.write_atomically(folder / "compare.md", summary(runs) + "\n")
    plots.save(compare_figure(results), folder / "compare.png")


def summary(runs: list[dict]) -> str:
    """Returns the table: means, and over several seeds the range from lowest to highest."""
    full = {run["seed"]: run for run in runs if run["arm"] == "full"}

    def ratio(run: dict, key: str, factor: float) -> float | None:
        """Relative to the full arm of the same seed; None without one, or if that is 0."""
        whole, mine = full.get(run["seed"], {}).get(key), run.get(key)
        return factor * (mine / whole) if whole and mine is not None else None

    columns = {  # header: decimals, value of a run
        "% right, full tokens": (1, lambda run: run["accuracy_full"]),
        "% right, pruned": (1, lambda run: run["accuracy_pruned"]),
        "seconds": (0, lambda run: run["seconds"]),
        "tokens x layers, %": (0, lambda run: ratio(run, "area", 100)),
        "speed-up": (2, lambda run: (share := ratio(run, "seconds", 1)) and 1 / share),
        "% of full's accuracy": (1, lambda run: ratio(run, "accuracy_full", 100)),
    }

    def cell(arm: str, decimals: int, value) -> str:
        values = [value(run) for run in runs if run["arm"] == arm]
        if None in values:
            return "-"
        spread = f" ({min(values):.{decimals}f} to {max(values):.{decimals}f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{decimals}f}{spread}"

    arms = dict.fromkeys(run["arm"] for run in runs)
    return tables.table(["arm", *columns], [[arm, *(cell(arm, *how) for how in columns.values())] for arm in arms])
