"""The launch files: what they start, with which arguments, and what comes back into the queue. Cluster and torchrun are
stand-ins that write down how they were called; a real run is in tests/slow/test_torchrun.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import HANGS
from torch.distributed.launcher.api import LaunchConfig

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scale" / "launch"
NOW = 1_800_000_000  # which `date` says here
TORCHRUN, SLURM = LAUNCH / "torchrun.sh", LAUNCH / "slurm.sbatch"
RECORDS = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], dict(os.environ)]) + "\\n")
{then}
"""
CLUSTER = {
    "torchrun": "sys.exit(int(os.environ['ENDS']))",
    "date": f"print({NOW})",
    "scontrol": "print('a1\\na2\\na3') if sys.argv[1] == 'show' else None",
    "srun": """
import subprocess
command = sys.argv[next(i for i, word in enumerate(sys.argv[1:], 1) if not word.startswith("-")):]
sys.exit(max(subprocess.call(command) for _ in range(int(os.environ["SLURM_NNODES"]))))""",
}


@pytest.fixture
def call(tmp_path):
    """`call(file, *arguments, NAME=value)`: the exit code, what was said, and every call that was written down."""
    for name, then in CLUSTER.items():
        (tmp_path / name).write_text(RECORDS.format(python=sys.executable, then=then))
        (tmp_path / name).chmod(0o755)

    def made(file, *arguments, **environment):
        ours = ("NNODES", "HEAD", "RUN_ID", "GPUS", "RESTARTS", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
        clean = {name: value for name, value in os.environ.items() if name not in ours and "SLURM" not in name}
        own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "ENDS": "0"}
        ran = subprocess.run(
            ["bash", file, *arguments],
            env={**clean, **own, **environment},
            capture_output=True,
            text=True,
            timeout=HANGS,
        )
        calls = tmp_path / "calls"
        return ran.returncode, ran.stderr, [json.loads(line) for line in calls.open()] if calls.exists() else []

    return made


def split(arguments):
    """torchrun's options, and the words behind `-m scale`."""
    end = arguments.index("-m")
    assert arguments[end + 1] == "scale"
    return dict((*word.removeprefix("--").split("="), "")[:2] for word in arguments[:end]), arguments[end + 2 :]


@pytest.mark.parametrize("file", [TORCHRUN, SLURM], ids=lambda file: file.name)
def test_the_shell_can_read_them(file):
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0


def test_one_node_needs_nothing_but_a_recipe(call):
    code, _, [(program, arguments, environment)] = call(TORCHRUN, "digits", "--set", "run.name=two words")
    options, words = split(arguments)
    assert (code, program) == (0, "torchrun")
    assert options == {"standalone": "", "nproc-per-node": "gpu", "max-restarts": "3"}
    assert words == ["digits", "--set", "run.name=two words"]
    assert environment["OMP_NUM_THREADS"] == "4"


def test_every_node_is_told_where_all_meet(call):
    given = {"NNODES": "4", "HEAD": "a1:29500", "RUN_ID": "mine", "GPUS": "2", "RESTARTS": "0", "OMP_NUM_THREADS": "9"}
    _, _, [(_, arguments, environment)] = call(TORCHRUN, "digits", **given)
    assert split(arguments)[0] == {
        "nnodes": "4", "rdzv-backend": "c10d", "rdzv-endpoint": "a1:29500", "rdzv-id": "mine", "nproc-per-node": "2",
        "max-restarts": "0",
    }  # fmt: skip
    assert environment["OMP_NUM_THREADS"] == "9", "what the user has set stays"
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1", "so that a node can come back"


@pytest.mark.parametrize(
    ("arguments", "environment", "says"), [((), {}, "NNODES=4 HEAD="), (("digits",), {"NNODES": "2"}, "HOST:PORT")]
)
def test_what_is_missing_is_said(call, arguments, environment, says):
    code, said, calls = call(TORCHRUN, *arguments, **environment)
    assert code != 0
    assert says in said
    assert calls == []


def slurm(left: int, **more) -> dict[str, str]:
    return {
        "SLURM_NNODES": "3", "SLURM_JOB_ID": "71234", "SLURM_JOB_NODELIST": "a[1-3]", "SLURM_CPUS_PER_TASK": "72",
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_END_TIME": str(NOW + left), **more,
    }  # fmt: skip


def test_slurm_starts_one_torchrun_a_node_and_all_meet_at_the_first(call):
    code, _, calls = call(SLURM, "digits", "--set", "run.name=two words", **slurm(3600))
    (step,) = [arguments for program, arguments, _ in calls if program == "srun"]
    started = [split(arguments) for program, arguments, _ in calls if program == "torchrun"]
    assert code == 0
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=72"} <= set(step)
    assert len(started) == 3
    for options, words in started:
        assert words == ["digits", "--set", "run.name=two words"]
        assert (options["nnodes"], options["rdzv-id"]) == ("3", "71234.0")
        host, port = options["rdzv-endpoint"].split(":")
        assert host == "a1"
        assert 1024 < int(port) < 65536
    assert not [arguments for program, arguments, _ in calls if program == "scontrol" and "requeue" in arguments]


def test_a_second_attempt_does_not_meet_the_first(call):
    _, _, calls = call(SLURM, "digits", **slurm(3600, SLURM_RESTART_COUNT="2"))
    assert {split(arguments)[0]["rdzv-id"] for program, arguments, _ in calls if program == "torchrun"} == {"71234.2"}


@pytest.mark.parametrize(
    ("ends", "left", "again"),
    [(1, 100, True), (1, 180, True), (1, 181, False), (0, 100, False)],
    ids=["time is up", "signalled a minute early", "a mistake", "done just in time"],
)
def test_only_what_the_time_limit_has_ended_comes_back(call, ends, left, again):
    code, _, calls = call(SLURM, "digits", **slurm(left, ENDS=str(ends)))
    back = [arguments for program, arguments, _ in calls if program == "scontrol" and arguments[0] == "requeue"]
    assert code == ends
    assert back == [["requeue", "71234"]] * again


def test_a_slurm_that_does_not_say_when_a_job_ends_puts_nothing_back(call):
    environment = slurm(0, ENDS="1")
    del environment["SLURM_JOB_END_TIME"]
    code, _, calls = call(SLURM, "digits", **environment)
    assert code == 1
    assert not [arguments for program, arguments, _ in calls if program == "scontrol" and "requeue" in arguments]


def test_there_is_time_to_save_before_the_limit(call, monkeypatch):
    """SLURM's warning comes earlier than torchrun's patience ends, and torchrun knows of that."""
    _, _, [(_, _, environment)] = call(TORCHRUN, "digits")
    patience = environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert 30 < int(patience) < int(re.search(r"^#SBATCH --signal=TERM@(\d+)$", SLURM.read_text(), re.MULTILINE)[1])
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", patience)
    launched = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    if not hasattr(launched, "shutdown_timeout"):
        pytest.skip("this torch's torchrun waits 30 seconds, whatever it is told")
    assert launched.shutdown_timeout == int(patience)
