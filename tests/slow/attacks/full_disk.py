"""A disk that is full or read-only, at any write: one line says what to do, and doing that leads to the right end.

    make torture ONLY=full_disk        240 faults: every command that writes, in turn

Each time one of the commands (commands.py) runs on a disk (small_disk.py) that fails from one of the command's moments
on. The command must end with exit code 2 and one line that names the file and says how to go on. The newest checkpoint
from before can still be read, and no half-written file is left that could have been removed. Once the disk works again,
the command that the line advises must end with the same files as an undisturbed one, bit for bit. In every second case
the disk fails twice before that.
"""

import multiprocessing
import os
import random
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from slow.attacks import outcomes
from slow.attacks.commands import Command, commands_that_write
from slow.attacks.small_disk import SmallDisk, why_not
from support.runs import content_of, timeless
from support.waiting import HANGS

from tinyspeed import UserError, cli
from tinyspeed.training import checkpoint

KINDS = ("full", "nearly full", "no files", "read-only")
TIMED = ("record.json", "state.json", "result.json", "compare.json")
# What commands import, so that each of them starts at once.
PRELOADED = (
    "slow.attacks.commands", "tinyspeed.evaluation.demo", "tinyspeed.evaluation.compare",
    "tinyspeed.evaluation.benchmarks", "tinyspeed.evaluation.look", "scale.__main__", "scale.run", "peft",
    "matplotlib.backends.backend_agg", "transformers.models.llava.processing_llava",
    "transformers.models.clip.image_processing_pil_clip", "bitsandbytes",
)  # fmt: skip


class Failed(Exception):
    """A command did not end as it should."""


@dataclass
class Fault:
    kind: str
    moment: int
    pages: int
    rank: int

    def __str__(self) -> str:
        return f"{self.kind} ({self.pages} pages left) at moment {self.moment} of rank {self.rank}"


class Attack:
    """Runs some of the commands on disks that fail."""

    def __init__(self, home: Path, names: list[str], seed: int):
        self.home, self.disk = home, SmallDisk(home / "disk")
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload([*PRELOADED])
        self.tried, self.named, self.failures = Counter(), Counter(), []
        known, first = commands_that_write(home, self.disk.at)
        self.commands = [next(command for command in known if command.name == name) for name in names]
        if any(command.words[0] == "export" for command in self.commands):
            assert self.run(Command("first", first), first)[0] == [0]
        self.draws = {command.name: random.Random(f"{seed} {command.name}") for command in self.commands}
        for command in self.commands:
            self.run_undisturbed(command)

    def run_undisturbed(self, command: Command) -> None:
        with self.disk:
            codes, said = self.run(command, command.words)
            assert not any(codes), f"{command.name}: {codes}\n{said}"
            command.moments = self.moments(0)
            now = os.statvfs(self.disk.at)
            command.pages = now.f_blocks - now.f_bfree
            command.files = {name: path.read_bytes() for name, path in self.disk.files().items()}

    def go(self, count: int, say=print) -> None:
        """So many faults, dealt out over the commands."""
        for turn in range(10 * count):
            for command in self.commands:
                if sum(self.tried.values()) >= count:
                    return
                if turn % command.ranks**2:  # several ranks take long to start
                    continue
                if failure := self.run_with_faults(command):
                    say(failure)
                    self.failures.append(failure)
        self.failures.append(f"only {sum(self.tried.values())} of {count} faults met a command")

    def run_with_faults(self, command: Command) -> str | None:
        """From an empty disk to the end, through one fault or two. Returns what failed."""
        draw, words, story = self.draws[command.name], command.words, []
        try:
            with self.disk:
                for _ in range(draw.choice((1, 2))):
                    story.append(fault := self.drawn(command, draw))
                    before, half = self.checkpoints(), self.half_written()
                    codes, said = self.run(command, words, fault)
                    came = self.moments(fault.rank)[fault.moment :][:1]
                    story[-1] = f"{fault} ({came[0] if came else 'after its end'})"
                    if not any(codes):  # the fault came too late to matter
                        self.disk.repair()
                        break
                    self.tried[f"{command.name}, {fault.kind}"] += 1
                    words = [*command.words, *self.advice(command, codes, said, fault, before, half)]
                    self.disk.repair()
                else:
                    codes, said = self.run(command, words)
                    if any(codes):
                        raise Failed(f"does not go on: {codes}\n{said[-2000:]}")
                if wrong := unlike(self.disk.files(), command.files):
                    raise Failed(f"has another end: {wrong[:10]}")
        except (Failed, UserError) as error:
            return f"{command.name}: {', then '.join(map(str, story))}: {error}"

    def drawn(self, command: Command, draw: random.Random) -> Fault:
        kind = draw.choice(KINDS)
        pages = draw.randrange(1, 1 + command.pages // 2) if kind == "nearly full" else 0
        return Fault(kind, draw.randrange(len(command.moments)), pages, draw.randrange(command.ranks))

    def advice(
        self, command: Command, codes: list[int], said: str, fault: Fault, before: list[str], half: set[str]
    ) -> list[str]:
        """Returns what the command's line advises to add to it, after checking how the command ended. `before` are the
        checkpoints that were there when it started, and `half` the files that an earlier fault had left."""
        if not {2} <= {*codes} <= {0, 2}:  # another rank may have finished its part before
            raise Failed(f"exit codes {codes}\n{said[-3000:]}")
        lines = [line for line in re.split("[\r\n]", said) if line.startswith("tinyspeed: ")]
        if len(lines) != 1 or "Traceback" in said or "Exception ignored" in said:
            raise Failed(f"prints something else than one line:\n{said[-3000:]}")
        named = re.search(rf"{re.escape(str(self.disk.at))}/?([^\s:;,]*)", lines[0])
        if not named or not re.search("make (space|it writable).*(same command again|--resume)", lines[0]):
            raise Failed(f"names no file, or no way to go on: {lines[0]}")
        self.named[f"{command.name}: {re.sub(r'[0-9a-f]{8,}', 'N', named[1])}"] += 1
        after = self.checkpoints()
        if after[-1:] < before[-1:] and not command.starts_over:
            raise Failed(f"{before[-1]} is gone")
        for name in after:
            checkpoint.read(self.disk.at / name)
        # A rank does not remove what another one may still be writing. The next start removes it.
        left = self.half_written() - half
        if left and command.ranks == 1 and fault.kind != "read-only":
            raise Failed(f"leaves half-written files: {left}")
        return ["--resume"] if "--resume" in lines[0] else []

    def half_written(self) -> set[str]:
        return {str(path) for path in self.disk.at.rglob("*") if ".tmp" in path.name}

    def checkpoints(self) -> list[str]:
        every = self.disk.at.rglob("checkpoints/step-*")
        return sorted(str(path.relative_to(self.disk.at)) for path in every)

    def run(self, command: Command, words: list[str], fault: Fault | None = None) -> tuple[list[int], str]:
        """Returns the exit codes and everything that was printed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"WORLD_SIZE": command.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        every = []
        for rank in range(command.ranks):
            ours = {**where, "RANK": rank, "LOCAL_RANK": rank} if command.ranks > 1 else {}
            given = (words, self.home, self.disk, rank, fault if fault and fault.rank == rank else None, ours)
            every.append(self.processes.Process(target=_run_process, args=given))
            every[-1].start()
        until = time.monotonic() + HANGS
        for one in every:
            one.join(max(0.0, until - time.monotonic()))
        said = "\n".join((self.home / f"log-{rank}").read_text(errors="replace") for rank in range(command.ranks))
        if hanging := [one for one in every if one.is_alive()]:
            for one in hanging:
                one.kill()
                one.join()
            raise Failed(f"{len(hanging)} of {command.ranks} processes hang\n{said[-2000:]}")
        return [one.exitcode for one in every], said

    def moments(self, rank: int) -> list[str]:
        """The moments of the last command, see `SmallDisk.watch`."""
        return (self.home / f"moments-{rank}").read_text().splitlines()


def _run_process(words: list[str], home: Path, disk: SmallDisk, rank: int, fault: Fault | None, where: dict) -> None:
    with open(home / f"log-{rank}", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {name: str(value) for name, value in where.items()}
    if fault:
        disk.watch(home / f"moments-{rank}", fault.moment, fault.kind, fault.pages)
    else:
        disk.watch(home / f"moments-{rank}")
    if where:
        from scale.__main__ import main
    else:
        main = cli.main
    sys.exit(main(words))


def unlike(found: dict[str, Path], wanted: dict[str, bytes]) -> list[str]:
    """Files that only one side has, or that differ in something else than times."""
    names = {name for name in found.keys() ^ wanted.keys() if not name.endswith(".tmp.lock")}  # empty, and harmless
    wrong = [f"{name} is {'missing' if name in wanted else 'new'}" for name in names]
    for name in found.keys() & wanted.keys():
        mine, whole = (content_of(name, content) for content in (found[name].read_bytes(), wanted[name]))
        if name.endswith("metrics.jsonl"):
            mine, whole = timeless(mine), timeless(whole)
        elif name.endswith((".png", ".md")) or Path(name).name in TIMED:
            continue
        if mine != whole:
            wrong.append(f"{name} differs")
    return sorted(wrong)


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    parser = outcomes.parser(__doc__, count=240)
    parser.add_argument("--commands", default="digits,chat,parts,scale,demo,compare,export,adapter,eval,look")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        attack = Attack(Path(folder), asked.commands.split(","), asked.seed)
        attack.go(asked.count, outcomes.say)
    for name, count in sorted(attack.named.items()):
        print(f"{count:>8,}  {name}")
    sys.exit(outcomes.write(asked.out, dict(sorted(attack.tried.items())), attack.failures))
