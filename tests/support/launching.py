"""torchrun in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def log(folder: Path) -> str:
    return (folder / "log").read_text()


def torchrun(folder: Path, *arguments, ranks: int = 2, restarts: int = 0) -> subprocess.Popen:
    """torchrun, writing to folder/log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return subprocess.Popen(
        [*command, f"--max-restarts={restarts}", *map(str, arguments)], cwd=folder, env=environment,
        stdout=open(folder / "log", "a"), stderr=subprocess.STDOUT,
    )  # fmt: skip
