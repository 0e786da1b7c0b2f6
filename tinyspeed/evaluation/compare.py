"""The paper's claims in miniature: the same recipe trained in several ways, side by side.

Every arm of a seed starts from the same base model and sees the same pictures in the same order for the same number
of steps; arms differ in what a step leaves out. Training seconds are the loop's own (forward, backward, optimizer,
data), in one process on one machine, one arm after the other; the seeds go round all arms before the next seed
begins, so slow hours of the machine hit every arm.

What the arms are: `ablations.py`. Arms already measured are not run again: an interrupted comparison goes on where it
was, and one folder may collect the arms of several files, each with the record of when it was measured.
"""

import dataclasses
import json
import statistics
import tomllib
from pathlib import Path

from ..data import digits
from ..models import loading
from ..recipe import Recipe, comparison, from_tables, schedules
from ..training import answer_gate, run_folder
from ..training.build import place, set_threads
from ..training.checkpoint import only_one
from ..training.train import train
from ..util import files, provenance, tables
from ..util.errors import UserError
from ..util.files import write_atomically
from . import accuracy, comparison_figure


def folder_of(recipe: Recipe) -> Path:
    return recipe.folder.with_name(f"{recipe.run.name}-compare")


def compare(recipe: Recipe, seeds: int, arms: dict[str, Recipe], bar: bool = True) -> int | None:
    """Run every arm for every seed; write compare.json, compare.md and compare.png into `folder_of(recipe)`.

    Returns the signal that ended it early, if one did."""
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: compare at least one seed")
    for arm, made in arms.items():
        _check(arm, made)
    folder = folder_of(recipe)
    with files.about(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        return _compare(recipe, folder, seeds, arms, bar)


def _check(arm: str, recipe: Recipe) -> None:
    """What a run would refuse when its turn comes, perhaps hours from now."""
    run_folder.require_sources(recipe)
    sizes = recipe.digits
    layers = loading.config(recipe.model.path).text_config.num_hidden_layers if recipe.model.path else sizes.layers
    try:
        for stage, _ in recipe.stages():
            schedules.schedule_of(recipe, stage, layers)
        answer_gate.require_some_skipping(recipe, sizes.pictures)
    except UserError as error:
        raise UserError(f"arm {arm!r}: {error}") from error


def _compare(recipe: Recipe, folder: Path, seeds: int, arms: dict[str, Recipe], bar: bool) -> int | None:
    set_threads(recipe)
    todo = []
    for seed in range(recipe.run.seed, recipe.run.seed + seeds):
        home = folder / f"seed-{seed}"
        base = recipe.model.path or str(home / "base")
        every = {arm: _of_seed(made, home, base, seed, arm) for arm, made in arms.items()}
        todo.append((seed, home, {arm: made for arm, made in every.items() if not _measured(made)}))
    for seed, home, missing in todo:
        if missing and not recipe.model.path:
            with files.about(home):
                home.mkdir(exist_ok=True)
            sizes = recipe.digits
            digits.prepare(
                home / "base", seed, tower_steps=sizes.tower_steps, **sizes.sizes, bar=bar, device=place(recipe)[0]
            )
        for arm, made in missing.items():
            if bar:
                print(f"seed {seed}: {arm}", flush=True)
            stopped = _run(made, arm, bar)
            if stopped is not None:
                return stopped
    # Whatever this folder holds, also from earlier calls with other arms: these come last.
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("seed-*/*/result.json")]
    order = {arm: at for at, arm in enumerate(arms)}
    found.sort(key=lambda run: (run["seed"], order.get(run["arm"], len(order)), run["arm"]))
    results = {**provenance.describe(recipe=recipe.to_toml()), "runs": found}
    write_atomically(folder / "compare.json", json.dumps(results, indent=1) + "\n")
    write_atomically(folder / "compare.md", summary(found) + "\n")
    comparison_figure.draw_compare(results, folder / "compare.png")
    return None


def _of_seed(recipe: Recipe, home: Path, base: str, seed: int, arm: str) -> Recipe:
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, folder=str(home), name=comparison.folder_of(arm), seed=seed),
        model=dataclasses.replace(recipe.model, path=base),
    )


def _measured(recipe: Recipe) -> bool:
    done = recipe.folder / "result.json"
    if not done.is_file():
        return False
    before = tomllib.loads(json.loads(done.read_text(encoding="utf-8"))["recipe"])
    if from_tables(before, str(done)) != recipe:
        raise UserError(f"{done} was measured with another recipe; choose another run.name, or delete the folder")
    return True


def _run(recipe: Recipe, arm: str, bar: bool) -> int | None:
    """Measure one arm; the signal that ended it early, if one did."""
    with files.about(recipe.folder):
        files.delete(recipe.folder)  # of an arm that was cut off: its seconds would not be whole
    trained = train(recipe, bar=bar)
    if trained.stopped_by is not None:
        return trained.stopped_by
    full, pruned = accuracy.held_out(trained.model, recipe, bar)
    lines = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
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
        "record": provenance.describe(place(recipe)[0]),
    }
    write_atomically(recipe.folder / "result.json", json.dumps(result))
    return None


def area(lines: list[dict], layers: int) -> int:
    """Rows times the layers that they ran through, teachers' included: what the steps of a log cost."""
    return sum((line["rows_kept"] + line["rows_taught"]) * (line["layers"] or layers) for line in lines)


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
        whole, mine = full.get(run["seed"], {}).get(key), run.get(key)
        return mine / whole if whole and mine is not None else None

    def speedup(run: dict) -> float | None:
        ratio = of_full(run, "seconds")
        return 1 / ratio if ratio else None

    def percent(key: str):
        def value(run: dict) -> float | None:
            ratio = of_full(run, key)
            return None if ratio is None else 100 * ratio

        return value

    headers = [
        "arm",
        "% right, full tokens",
        "% right, pruned",
        "seconds",
        "rows x layers, %",
        "speed-up",
        "% of full's accuracy",
    ]
    rows = [
        [
            arm,
            cell(arm, lambda r: r["accuracy_full"], 1),
            cell(arm, lambda r: r["accuracy_pruned"], 1),
            cell(arm, lambda r: r["seconds"], 0),
            cell(arm, percent("area"), 0),
            cell(arm, speedup, 2),
            cell(arm, percent("accuracy_full"), 1),
        ]
        for arm in arms
    ]
    return tables.table(headers, rows)
