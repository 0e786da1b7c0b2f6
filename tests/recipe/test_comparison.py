"""Arms: each is the recipe with what it changes, and those that come with the package can all be run."""

import dataclasses
import itertools
import json
import re
import shlex
import signal
import statistics
from pathlib import Path

import ablations
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyspeed import cli, recipe
from tinyspeed.evaluation import compare
from tinyspeed.pruning import registry
from tinyspeed.recipe import comparison

DIGITS = recipe.read("digits")
BUILT_IN = sorted(p.stem for p in comparison.BUILT_IN.glob("*.toml"))


def differences(a, b):
    """{section.key: value} of b where it is not a's."""
    a, b = dataclasses.asdict(a), dataclasses.asdict(b)
    return {f"{s}.{k}": b[s][k] for s in a for k in a[s] if a[s][k] != b[s][k]}


VALUES = {  # none of them the recipe's own
    "dualspeed.keep": [0.2, 0.25, 0.5],
    "dualspeed.plugin": ["dpp", "grid", "random"],
    "dualspeed.isolator": [0, 2, 8],
    "train.lr": [1e-4, 5e-4],
    "align.lr": [1e-4, 5e-4],
    "train.steps": [7, 70],
}


@given(data=st.data())
def test_vary_makes_every_combination_once_and_changes_nothing_else(data):
    keys = data.draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3, unique=True))
    chosen = {key: data.draw(st.lists(st.sampled_from(VALUES[key]), min_size=1, unique=True)) for key in keys}
    arms = comparison.vary(DIGITS, [f"{key}={','.join(map(str, values))}" for key, values in chosen.items()])
    assert next(iter(arms)) == "full"
    assert differences(DIGITS, arms.pop("full")) == {"dualspeed.schedule": "full"}
    expected = [dict(zip(keys, values, strict=True)) for values in itertools.product(*chosen.values())]
    assert [differences(DIGITS, made) for made in arms.values()] == expected
    for name, changes in zip(arms, expected, strict=True):
        said = [word.split("=") for word in name.split(" ")]
        assert [value for _, value in said] == [str(value) for value in changes.values()]
        assert all(key.endswith(short) for key, (short, _) in zip(keys, said, strict=True))


def test_keys_of_one_name_are_told_apart_by_their_sections():
    assert list(comparison.vary(DIGITS, ["train.lr=1e-4", "align.lr=1e-3", "lora.rank=4"])) == [
        "full",
        "train.lr=1e-4 align.lr=1e-3 rank=4",
    ]


words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8).filter(lambda word: word != "base")


@given(data=st.data(), arms=st.dictionaries(words, st.sets(st.sampled_from(sorted(VALUES)), max_size=3), min_size=1))
def test_a_file_of_arms_is_read_in_its_order_and_only_picks_some(tmp_path_factory, data, arms):
    changes = {arm: {key: data.draw(st.sampled_from(VALUES[key])) for key in sorted(arms[arm])} for arm in arms}
    lines = []
    for arm, values in changes.items():
        lines.append(f"[{json.dumps(arm, ensure_ascii=False)}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    file = tmp_path_factory.mktemp("arms") / "mine.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    made = comparison.read(DIGITS, str(file))
    assert [(arm, differences(DIGITS, found)) for arm, found in made.items()] == list(changes.items())
    some = data.draw(st.lists(st.sampled_from(list(changes)), min_size=1, unique=True))
    assert comparison.read(DIGITS, str(file), " , ".join(some)) == {arm: made[arm] for arm in some}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_command_that_a_built_in_file_opens_with_runs_all_of_its_arms(name, tmp_path, monkeypatch):
    opening = (comparison.BUILT_IN / f"{name}.toml").read_text(encoding="utf-8").split("\n[")[0]
    (command,) = re.findall(r"^#   tinyspeed (compare (?:.*\\\n)*.*)", opening, flags=re.MULTILINE)
    begun = []

    def instead(chosen, folder, seeds, arms, bar):
        begun.append((chosen, seeds, arms))
        return signal.SIGINT

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "_run_arms", instead)  # all checks are behind it
    assert cli.main(shlex.split(command.replace("\\\n#", ""))) == 0
    [(chosen, seeds, arms)] = begun
    assert seeds == 3
    assert {**arms} == comparison.read(chosen, name)
    assert differences(chosen, arms["full"]) == {"dualspeed.schedule": "full"}
    assert len({made.to_toml() for made in arms.values()}) == len(arms), "two arms are the same"


def test_every_plugin_of_the_package_is_among_the_plugins_arms():
    ours = {name for name, plugin in registry.PLUGINS.items() if plugin.__module__.startswith("tinyspeed.")}
    compared = {(made.dualspeed.plugin, made.dualspeed.keep) for made in comparison.read(DIGITS, "plugins").values()}
    assert compared == {(name, keep) for name in ours for keep in (0.1, 0.25)}


def rows_of(runs: list[dict]) -> dict[str, list[str]]:
    """The lines of a table that these runs ask for, by arm."""

    def spread(values: list[float]) -> str:
        said = f"{statistics.mean(values):.1f}"
        return said if len(values) == 1 else f"{said} ({min(values):.1f} to {max(values):.1f})"

    full, made = {run["seed"]: run["area"] for run in runs if run["arm"] == "full"}, {}
    for arm in {run["arm"] for run in runs}:
        mine = [run for run in runs if run["arm"] == arm]
        shares = [run["area"] / full[run["seed"]] for run in mine if run["seed"] in full]
        made[arm] = [
            arm,
            str(len(mine)),
            *(spread([run[f"accuracy_{tokens}"] for run in mine]) for tokens in ("full", "pruned")),
            f"{100 * statistics.mean(shares):.0f}%" if shares else "-",
            f"{statistics.mean(run['slow_steps'] for run in mine):.0f}",
        ]
    return made


def test_the_tables_of_ablations_are_what_was_measured():
    results = Path(__file__).parents[2] / "tutorials" / "results"
    page = (results / "ablations.md").read_text(encoding="utf-8")
    shown: dict[str, set[str]] = {}
    for before, table in re.findall(r"((?:^[^|\n].*\n|^\n)+)((?:^\|.*\n)+)", page, flags=re.MULTILINE):
        file = re.findall(r"\((ablations-[\w-]+\.json)\)", before)[-1]
        expected = rows_of(json.loads((results / file).read_text(encoding="utf-8"))["runs"])
        for line in table.splitlines()[2:]:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells == expected[cells[0]]
            shown.setdefault(file, set()).add(cells[0])
    measured = {
        file.name: {run["arm"] for run in json.loads(file.read_text(encoding="utf-8"))["runs"]}
        for file in results.glob("ablations-*.json")
    }
    assert shown == measured, "a result that is shown nowhere, or the other way round"


def test_a_table_is_collected_over_several_sittings(tmp_path, monkeypatch, capsys):
    """Of runs of this sitting, of committed ones, and of an earlier table's until an arm is measured here."""
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(ablations, "RESULTS", results)
    run = lambda arm, seed, right: {
        "arm": arm, "seed": seed, "accuracy_full": right, "accuracy_pruned": right / 2, "area": 100 + seed,
        "slow_steps": seed, "curve": [],
    }  # fmt: skip
    shelf = [run("full", 0, 97.0), run("original r=0", 0, 94.0), run("original r=0", 1, 93.0), run("dpp 0.1", 0, 1.0)]
    (results / "ablations-shelf.json").write_text(json.dumps({"runs": shelf}))
    mark, end = "<!-- ablations-weights-3.json -->", "<!-- end of ablations-weights-3.json -->"
    (results / "ablations.md").write_text(f"before\n\n{mark}\n\n{end}\n\nafter\n")
    sittings = [[run("cells r=0", 0, 96.0)], [run("none r=0", 0, 95.0), run("cells r=0", 2, 90.0)]]
    for sitting, runs in enumerate(sittings):
        for one in runs:
            folder = tmp_path / f"sitting-{sitting}" / f"seed-{one['seed']}" / one["arm"]
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(one))
        ablations.main("weights-3", str(tmp_path / f"sitting-{sitting}"))
    right = {
        ("full", 0): 97.0, ("none r=0", 0): 95.0, ("none r=0", 1): 93.0, ("cells r=0", 0): 96.0, ("cells r=0", 2): 90.0,
    }  # fmt: skip
    held = json.loads((results / "ablations-weights-3.json").read_text())["runs"]
    assert {(run["arm"], run["seed"]): run["accuracy_full"] for run in held} == right
    assert not any("curve" in run for run in held if run["arm"] == "cells r=0")
    page = (results / "ablations.md").read_text()
    assert page.startswith(f"before\n\n{mark}\n\n| arm")
    assert page.endswith(f"|\n\n{end}\n\nafter\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    assert {line[0]: line for line in lines[2:]} == rows_of(held)

    capsys.readouterr()
    ablations.main("weights-3")
    asked = [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()]
    begun = []
    monkeypatch.setattr(compare, "_run_arms", lambda *of: begun.append(of) or signal.SIGINT)
    monkeypatch.chdir(tmp_path)
    assert [cli.main(command) for command in asked] == [0] * 3
    left = {(arm, chosen.run.seed) for chosen, _, seeds, arms, _ in begun for arm in arms if seeds == 1}
    assert left == set(itertools.product(comparison.read(DIGITS, "weights"), range(3))) - set(right)
