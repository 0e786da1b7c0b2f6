"""A user's folders, in which processes run and three witnesses see what they do.

    Python's audit hook in every process (`guard.py`), workers and what they start included
    the files, before and after: all that is the user's, and of what was given the content too
    the kernel: each process has a network namespace of its own, in which what leaves is counted, whoever sent it

What was given (models, pictures, conversations) is mounted read-only. Where namespaces cannot be had (they take root),
`confined` is False and the first two remain.
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

from support import hostile_model as bait

ROOT = Path(__file__).parents[2]
CONFINE = """
for folder in $READ_ONLY; do mount --bind $folder $folder && mount -o remount,ro,bind $folder $folder || exit 99; done
ip link set lo up
"$@" <&0; code=$?
cat /proc/net/snmp /proc/net/snmp6 > $KERNEL; exit $code
"""
# Several command lines in one process, each begun and ended in what it prints.
MANY = """
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
# In place of the package that gets compiled code from the hub, and loads it.
KERNELS = """
import os
def get_kernel(name, *a, **k):
    os.makedirs(os.path.join(os.environ["SEALED_CANARIES"], "kernel-" + name.replace("/", "-")), exist_ok=True)
    raise OSError("this is where code from the hub would run")
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *a, **k: (lambda cls: cls)
"""
LIBRARIES = (  # what others write, of what is in `home` and `tmp`
    r"home/\.(cache|config)(/matplotlib(/fontlist-v[\d.]+\.json(\.matplotlib-lock)?)?)?",
    r"tmp/torchinductor_\w+",  # an empty folder, where torch would keep what it compiles
    r"tmp/pymp-\w+(/listener-\w+)?",  # where worker processes meet; gone when they are
    r"tmp/\w{8}",  # whether a file can be made there; gone at once
)
OURS = (r"cwd/runs(/.*)?", r"home/\.cache/tinyspeed(/.*)?")
KERNELS_OWN = (r"/dev/null", r"/dev/shm/.*", r"/proc/.*")
YES = b"y\n" * 1000


@dataclass
class World:
    """Folders of one user, and what was seen of the processes that ran among them."""

    at: Path
    confined: bool = field(init=False)
    seen: list[list] = field(default_factory=list)  # what the guards wrote
    sent: int = 0  # what left, by the kernel's counters

    def __post_init__(self):
        self.user, self.tmp, self.cwd = self.at / "home", self.at / "tmp", self.at / "cwd"
        self.given, self.watch, self.canaries = self.at / "given", self.at / "watch", self.at / "canaries"
        for folder in (self.user, self.tmp, self.cwd, self.given, self.watch, self.canaries):
            folder.mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("guard.py"), self.watch / "sitecustomize.py")
        (self.watch / "kernels.py").write_text(KERNELS)
        told = self.watch / "kernels-0.18.9.dist-info"
        told.mkdir()
        (told / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.9\n")
        self.confined = not subprocess.run(
            ["unshare", "--net", "--mount", "sh", "-c", CONFINE, "sh", "true"],
            env={**os.environ, "READ_ONLY": str(self.given), "KERNEL": "/dev/null"}, capture_output=True,
        ).returncode  # fmt: skip

    def code(self, name: str) -> bait.Code:
        return bait.Code(self.canaries / name)

    def run(self, words: list[str], timeout: int = 600) -> subprocess.CompletedProcess:
        """One process, watched."""
        log, kernel = self.watch / "log", self.watch / "kernel"
        log.write_text("")
        kernel.unlink(missing_ok=True)
        # Nothing of the caller's environment but what finds its programs.
        environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": f"{self.at / 'watch'}:{ROOT}", "OMP_NUM_THREADS": "1",
            "HOME": str(self.user), "TMPDIR": str(self.tmp), "PYTHONDONTWRITEBYTECODE": "1",
            "SEALED_LOG": str(log), "SEALED_WORLD": str(self.at), "SEALED_CANARIES": str(self.canaries),
            "READ_ONLY": str(self.given), "KERNEL": str(kernel), "LANG": "C.UTF-8",
        }  # fmt: skip
        words = [sys.executable, *words]
        if self.confined:
            words = ["unshare", "--net", "--mount", "sh", "-c", CONFINE, "sh", *words]
        done = subprocess.run(words, cwd=self.cwd, env=environment, input=YES, capture_output=True, timeout=timeout)
        self.seen += [json.loads(line) for line in log.read_text().splitlines()]
        if self.confined:
            self.sent += _sent(kernel.read_text())
        return done

    def lines(self, commands: list[list[str]]) -> Iterator[tuple[int, str]]:
        """Several command lines of tinyspeed in one process: exit codes, and what each wrote to stderr."""
        done = self.run(["-c", MANY, json.dumps(commands)])
        text = done.stderr.decode(errors="replace")
        parts = re.split(r"\n== (\w+)\n", text)
        if len(parts) != 2 * len(commands) + 1:
            raise AssertionError(f"{len(commands)} commands, of which the process survived {len(parts) // 2}: {text}")
        return ((int(code), said) for said, code in zip(parts[::2], parts[1::2], strict=False))

    def line(self, words: list[str]) -> tuple[int, str]:
        """One, in a process of its own. `scale` is not one of tinyspeed's."""
        words = words if words[0] == "scale" else ["tinyspeed", *words]
        done = self.run(["-m", *words])
        return done.returncode, done.stderr.decode(errors="replace")

    def wrong(self, outputs: tuple[str, ...] = ()) -> Iterator[str]:
        """What was seen and should not have been, since this was asked last."""
        seen, self.seen = self.seen, []
        allowed = re.compile("|".join((*LIBRARIES, *OURS, *outputs)))
        system = re.compile("|".join(KERNELS_OWN))
        for kind, *what in seen:
            if kind == "write":
                path = Path(what[-1])
                inside = path.is_relative_to(self.at) and allowed.fullmatch(str(path.relative_to(self.at)))
                if not inside and not system.fullmatch(str(path)):
                    yield f"writes {what[0]} {path}"
            elif kind == "network":
                yield f"network {what}"
            elif kind == "start":
                if Path(what[0][0]).name not in ("git", "fc-list"):  # which commit it is, and which fonts there are
                    yield f"starts {what}"
            else:
                yield f"{kind} {what}"
        if self.sent:
            yield f"the kernel counted {self.sent} packets, or attempts, that were to leave"
            self.sent = 0
        for canary in sorted((self.canaries).iterdir()):
            yield f"code of the bait {canary.name} ran"
            canary.rmdir()

    def files(self) -> dict[str, tuple]:
        """Every file and folder of the user: of what is given the content too."""
        found = {}
        for top in ("home", "tmp", "cwd", "given"):
            for path in (self.at / top).rglob("*"):
                told = path.lstat()
                what = (told.st_mode, 0 if path.is_dir() else told.st_size, told.st_mtime_ns)
                if top == "given" and path.is_file():
                    what = (*what, hashlib.blake2b(path.read_bytes()).digest())
                found[str(path.relative_to(self.at))] = what
        return found

    def strays(self, before: dict[str, tuple], outputs: tuple[str, ...] = ()) -> Iterator[str]:
        """What has changed on disk and should not have."""
        allowed, now = re.compile("|".join((*LIBRARIES, *OURS, *outputs))), self.files()
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name) and not allowed.fullmatch(name):
                yield f"{name} {'is new' if name not in before else 'is gone' if name not in now else 'has changed'}"
            elif name.startswith("tmp/") and not before.get(name) and not name.startswith("tmp/torchinductor"):
                yield f"{name} was left behind"


def _sent(counters: str) -> int:
    """What found no way out, by /proc/net/snmp and snmp6. There is none here but `lo`: that is all that was to leave.
    A connection is counted as it is asked for."""
    routes, six = counters.split("Ip6OutNoRoutes")
    lines = [line.split() for line in routes.splitlines()]
    names, values = (line for line in lines if line[0] == "Ip:")
    return int(dict(zip(names, values, strict=True))["OutNoRoutes"]) + int(six.split()[0])
