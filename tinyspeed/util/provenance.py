"""What belongs next to a result so that others can believe and repeat it: versions, commit, machine, command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .errors import UserError
from .files import hashed, write_atomically

PACKAGES = ("tinyspeed", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy")


def describe(device: torch.device | str = "cpu", **more) -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    file = Path(sys.argv[0])
    program = ["python", "-m", file.parent.name] if file.name == "__main__.py" else [file.name]
    return {
        "command": shlex.join([*program, *sys.argv[1:]]), "commit": commit(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu_name(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions, **more,
    }  # fmt: skip


def program() -> dict[str, str]:
    """What decides what this program computes: the versions of packages, and a hash of each of our own files."""
    root = Path(__file__).resolve().parents[2]
    sources = sorted(file for package in ("tinyspeed", "scale") for file in (root / package).rglob("*.py"))
    versions = {package: version(package) for package in ("torch", "transformers", "tokenizers", "numpy")}
    return versions | {str(file.relative_to(root)): hashed(file) for file in sources}


def write(path: Path, **more) -> None:
    """Writes the description of a run that starts; a resumed run adds its own to it."""
    now = describe(**more)
    if path.is_file():
        try:
            first = json.loads(path.read_text(encoding="utf-8"))
            now = {**first, "resumed": [*first.get("resumed", []), now]}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to continue without what it says") from error
    write_atomically(path, json.dumps(now, indent=1))


def commit() -> str | None:
    """The commit of the source that this package runs from, with a + if files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return os.fsdecode(subprocess.check_output(["git", *words], cwd=root, stderr=subprocess.DEVNULL)).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed inside some other project's checkout
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_mib(device: torch.device) -> float | None:
    """The peak of the GPU's allocator, or on a CPU of the whole process; None where the system does not tell."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
