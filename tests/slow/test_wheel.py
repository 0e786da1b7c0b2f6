"""The wheel: built, installed into an empty environment, and run there without the source tree."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from support.waiting import HANGS

ROOT = Path(__file__).parents[2]
PACKED = ("pyproject.toml", "README.md", "LICENSE", "tinyspeed", "scale")
SMALL = (
    "run.device=cpu", "digits.width=32", "digits.layers=2", "digits.tower_width=16", "digits.tower_steps=2",
    "data.eval_pictures=8", "align.steps=1", "train.steps=2",
)  # fmt: skip


def run(*words: object, cwd: Path) -> str:
    """What a command has printed. It inherits nothing that would lead to the source tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a source distribution, as `python -m build` does; from a copy, since building leaves files behind."""
    folder = tmp_path_factory.mktemp("build")
    for name in PACKED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation"], cwd=folder, check=True, capture_output=True)
    (made,) = (folder / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel. Everything else it borrows from this one, whose own tinyspeed
    comes behind the wheel's; where that is an editable one, its import hook does not come along."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, symlinks=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    run(*pip, wheel, cwd=folder)
    packages = Path(run(programs / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    return programs


def test_it_has_every_file_of_the_packages(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [file for top in ("tinyspeed", "scale") for file in (ROOT / top).rglob("*") if file.is_file()]
    wanted = {str(file.relative_to(ROOT)) for file in files if file.suffix in (".py", ".toml", ".typed")}
    assert wanted <= names
    assert {name for name in names if ".dist-info/" not in name} == wanted


def test_it_is_what_runs(programs, tmp_path):
    found = run(programs / "python", "-c", "import scale, tinyspeed\nfor m in (scale, tinyspeed): print(m.__file__)",
                cwd=tmp_path)  # fmt: skip
    for file in found.split():
        assert Path(file).is_relative_to(programs.parent)


def test_the_demo_runs(programs, tmp_path):
    assert "% right on full tokens" in run(programs / "tinyspeed", "demo", "--short", cwd=tmp_path)
    assert (tmp_path / "runs" / "demo-short" / "kept.png").is_file()


def test_a_packaged_recipe_trains(programs, tmp_path):
    changes = [word for change in SMALL for word in ("--set", change)]
    assert "3 steps, " in run(programs / "tinyspeed", "train", "digits", *changes, cwd=tmp_path)


def test_the_planner_plans_a_packaged_recipe(programs, tmp_path):
    plan = ["scale", "plan", "llava-next-7b-stage2", "--gpus", "8", "--gpu", "h100", "--samples", "779289"]
    assert "6,089 steps" in run(programs / "python", "-m", *plan, cwd=tmp_path)
