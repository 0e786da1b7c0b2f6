"""The folders of a user, in which commands run and are watched in three ways.

    Python's audit hook (audit_hook.py) in every process, in workers and in what they start
    the files before and after: everything of the user's; of what was downloaded also the content
    the kernel: each process has its own network namespace, which counts every packet that was to leave

What the user has downloaded (models, pictures, conversations) is mounted read-only. Namespaces need root; without them
`confined` is False and only the first two are there.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support import hostile
from support.runs import ROOT
from support.waiting import HANGS

CONFINE = """
for folder in $READ_ONLY; do mount --bind $folder $folder && mount -o remount,ro,bind $folder $folder || exit 99; done
ip link set lo up
"$@" <&0; code=$?
cat /proc/net/snmp /proc/net/snmp6 > $KERNEL; exit $code
"""
# Runs several command lines in one process, and prints the exit code of each after what it wrote to stderr.
SEVERAL = """
import json, sys, traceback
from tinyspeed.cli import main
for words in json.loads(sys.argv[1]):
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    print(f"\\n== {code}", file=sys.stderr, flush=True)
"""
# Takes the place of the package that loads compiled code from the hub.
KERNELS = """
import os
def get_kernel(name, *a, **k):
    os.makedirs(os.path.join(os.environ["SANDBOX_CANARIES"], "kernel-" + name.replace("/", "-")), exist_ok=True)
    raise OSError("this is where code from the hub would run")
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *a, **k: (lambda cls: cls)
"""
LIBRARIES = (  # what libraries write into `home` and `tmp`
    r"home/\.(cache|config)(/matplotlib(/fontlist-v[\d.]+\.json(\.matplotlib-lock)?)?)?",
    r"tmp/torchinductor_\w+",  # an empty folder, where torch would keep what it compiles
    r"tmp/pymp-\w+(/listener-\w+)?",  # where worker processes meet; removed when they end
    r"tmp/\w{8}",  # Python tries whether it can make a file there, and removes it
)
OURS = (r"cwd/runs(/.*)?", r"home/\.cache/tinyspeed(/.*)?")
SYSTEM = (r"/dev/null", r"/dev/shm/.*", r"/proc/.*")
YES = b"y\n" * 1000


@dataclass
class Sandbox:
    """The folders of one user, and what was seen of the processes that ran there."""

    at: Path
    confined: bool = field(init=False)
    seen: list[list] = field(default_factory=list)  # what the audit hooks wrote
    sent: int = 0  # packets that were to leave, by the kernel's counters

    def __post_init__(self):
        self.home, self.tmp, self.cwd = self.at / "home", self.at / "tmp", self.at / "cwd"
        self.given, self.watch, self.canaries = self.at / "given", self.at / "watch", self.at / "canaries"
        for folder in (self.home, self.tmp, self.cwd, self.given, self.watch, self.canaries):
            folder.mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("audit_hook.py"), self.watch / "sitecustomize.py")
        (self.watch / "kernels.py").write_text(KERNELS)
        told = self.watch / "kernels-0.18.9.dist-info"
        told.mkdir()
        (told / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.9\n")
        self.confined = not subprocess.run(
            ["unshare", "--net", "--mount", "sh", "-c", CONFINE, "sh", "true"],
            env={**os.environ, "READ_ONLY": str(self.given), "KERNEL": "/dev/null"}, capture_output=True,
        ).returncode  # fmt: skip

    def code(self, name: str) -> hostile.Code:
        return hostile.Code(self.canaries / name)

    def run(self, words: list[str]) -> subprocess.CompletedProcess:
        """Run one Python process and watch it."""
        log, kernel = self.watch / "log", self.watch / "kernel"
        log.write_text("")
        kernel.unlink(missing_ok=True)
        # Nothing of the caller's environment but PATH.
        environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": f"{self.at / 'watch'}:{ROOT}", "OMP_NUM_THREADS": "1",
            "HOME": str(self.home), "TMPDIR": str(self.tmp), "PYTHONDONTWRITEBYTECODE": "1",
            "SANDBOX_LOG": str(log), "SANDBOX": str(self.at), "SANDBOX_CANARIES": str(self.canaries),
            "READ_ONLY": str(self.given), "KERNEL": str(kernel), "LANG": "C.UTF-8",
        }  # fmt: skip
        words = [sys.executable, *words]
        if self.confined:
            words = ["unshare", "--net", "--mount", "sh", "-c", CONFINE, "sh", *words]
        done = subprocess.run(words, cwd=self.cwd, env=environment, input=YES, capture_output=True, timeout=HANGS)
        self.seen += [json.loads(line) for line in log.read_text().splitlines()]
        if self.confined:
            self.sent += _unroutable(kernel.read_text())
        return done

    def run_together(self, commands: list[list[str]]) -> Iterator[tuple[int, str]]:
        """Run several command lines of tinyspeed in one process. Yields the exit code and the stderr of each."""
        done = self.run(["-c", SEVERAL, json.dumps(commands)])
        text = done.stderr.decode(errors="replace")
        parts = re.split(r"\n== (\w+)\n", text)
        if len(parts) != 2 * len(commands) + 1:
            raise AssertionError(f"the process ended after {len(parts) // 2} of {len(commands)} commands: {text}")
        return ((int(code), said) for said, code in zip(parts[::2], parts[1::2], strict=False))

    def run_alone(self, words: list[str]) -> tuple[int, str]:
        """Run one command line of tinyspeed or scale in a process of its own."""
        words = words if words[0] == "scale" else ["tinyspeed", *words]
        done = self.run(["-m", *words])
        return done.returncode, done.stderr.decode(errors="replace")

    def violations(self, outputs: tuple[str, ...] = ()) -> Iterator[str]:
        """Yields what processes did since the last call of this and should not have done."""
        seen, self.seen = self.seen, []
        allowed = re.compile("|".join((*LIBRARIES, *OURS, *outputs)))
        system = re.compile("|".join(SYSTEM))
        for kind, *what in seen:
            if kind == "write":
                path = Path(what[-1])
                inside = path.is_relative_to(self.at) and allowed.fullmatch(str(path.relative_to(self.at)))
                if not inside and not system.fullmatch(str(path)):
                    yield f"writes {what[0]} {path}"
            elif kind == "network":
                yield f"network {what}"
            elif kind == "start":
                if Path(what[0][0]).name not in ("git", "fc-list"):  # they tell the commit, and matplotlib the fonts
                    yield f"starts {what}"
            else:
                yield f"{kind} {what}"
        if self.sent:
            yield f"the kernel counted {self.sent} packets or connections that were to leave"
            self.sent = 0
        for canary in sorted((self.canaries).iterdir()):
            yield f"code of {canary.name} ran"
            canary.rmdir()

    def files(self) -> dict[str, tuple]:
        """Every file and folder of the user; of what was downloaded also a hash of the content."""
        found = {}
        for top in ("home", "tmp", "cwd", "given"):
            for path in (self.at / top).rglob("*"):
                told = path.lstat()
                what = (told.st_mode, 0 if path.is_dir() else told.st_size, told.st_mtime_ns)
                if top == "given" and path.is_file():
                    what = (*what, hashlib.blake2b(path.read_bytes()).digest())
                found[str(path.relative_to(self.at))] = what
        return found

    def changes(self, before: dict[str, tuple], outputs: tuple[str, ...] = ()) -> Iterator[str]:
        """Yields what has changed on disk and should not have."""
        allowed, now = re.compile("|".join((*LIBRARIES, *OURS, *outputs))), self.files()
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name) and not allowed.fullmatch(name):
                yield f"{name} {'is new' if name not in before else 'is gone' if name not in now else 'has changed'}"
            elif name.startswith("tmp/") and not before.get(name) and not name.startswith("tmp/torchinductor"):
                yield f"{name} was left behind"


def _unroutable(counters: str) -> int:
    """How many packets found no way out, by /proc/net/snmp and snmp6: as there is only `lo` here, these are all that
    were to leave. A connection is counted when a program asks for it."""
    routes, six = counters.split("Ip6OutNoRoutes")
    lines = [line.split() for line in routes.splitlines()]
    names, values = (line for line in lines if line[0] == "Ip:")
    return int(dict(zip(names, values, strict=True))["OutNoRoutes"]) + int(six.split()[0])
