"""torchrun in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def log(folder: Path) -> str:
    return (folder / "log").read_text()


def rank_of(agent: subprocess.Popen, rank: int) -> int:
    """The process of a rank that this torchrun has started."""
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


def torchrun(folder: Path, *arguments, ranks: int = 2, restarts: int = 0) -> subprocess.Popen:
    """torchrun, writing to folder/log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",  # or it kills what has not left 30 seconds after it was told to
    }
    return subprocess.Popen(
        [*command, f"--max-restarts={restarts}", *map(str, arguments)], cwd=folder, env=environment,
        stdout=open(folder / "log", "a"), stderr=subprocess.STDOUT,
    )  # fmt: skip
