"""Disks that are full or read-only, at every write: one line that says what to do, and what it says leads to the end.

    make torture ONLY=disk        240 of them: everything that writes, in turn

Each time a command (deeds.py) meets a disk (volume.py) that says no from one of the command's moments on. It must end
with exit code 2 and one line that names what could not be written and says how to go on. The newest checkpoint that was
there can still be read, and nothing is left half-written if it could be taken away. When the disk is right again, the
command that the line advises ends with the files of one that nobody disturbed, bit for bit. Every other one meets a
second such disk before.
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

from support.runs import timeless
from torture import outcome
from torture.deeds import Deed, all_of_them
from torture.volume import Volume, refused

from tinyspeed import UserError, cli
from tinyspeed.training import checkpoint

KINDS = ("full", "nearly full", "no files", "read-only")
TIMED = ("record.json", "state.json", "result.json", "compare.json")
PATIENCE = 120.0  # seconds, after which a command hangs
# What commands import, so that each begins in no time.
WARM = (
    "torture.deeds", "tinyspeed.evaluation.demo", "tinyspeed.evaluation.compare", "tinyspeed.evaluation.benchmarks",
    "tinyspeed.evaluation.look", "scale.__main__", "scale.run", "peft", "matplotlib.backends.backend_agg",
    "transformers.models.llava.processing_llava", "transformers.models.clip.image_processing_pil_clip", "bitsandbytes",
)  # fmt: skip


class Lost(Exception):
    """What went wrong."""


@dataclass
class Trouble:
    kind: str
    moment: int
    pages: int
    rank: int

    def __str__(self) -> str:
        return f"{self.kind} ({self.pages} pages left) at moment {self.moment} of rank {self.rank}"


class Torture:
    """Of some of the deeds, in a folder."""

    def __init__(self, home: Path, names: list[str], seed: int):
        self.home, self.volume = home, Volume(home / "disk")
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload([*WARM])
        self.tried, self.named, self.lost = Counter(), Counter(), []
        made, before = all_of_them(home, self.volume.at)
        self.deeds = [next(deed for deed in made if deed.name == name) for name in names]
        if any(deed.words[0] == "export" for deed in self.deeds):
            assert self.run(Deed("before", before), before)[0] == [0]
        self.draws = {deed.name: random.Random(f"{seed} {deed.name}") for deed in self.deeds}
        for deed in self.deeds:
            self.undisturbed(deed)

    def undisturbed(self, deed: Deed) -> None:
        with self.volume:
            codes, said = self.run(deed, deed.words)
            assert not any(codes), f"{deed.name}: {codes}\n{said}"
            deed.moments = self.moments(0)
            now = os.statvfs(self.volume.at)
            deed.pages = now.f_blocks - now.f_bfree
            deed.files = {name: path.read_bytes() for name, path in self.volume.files().items()}

    def go(self, count: int, say=print) -> None:
        """So many troubles, dealt out over the deeds."""
        for turn in range(10 * count):
            for deed in self.deeds:
                if sum(self.tried.values()) >= count:
                    return
                if turn % deed.ranks**2:  # to start several ranks takes long
                    continue
                if lost := self.through(deed):
                    say(lost)
                    self.lost.append(lost)
        self.lost.append(f"only {sum(self.tried.values())} of {count} met a command")

    def through(self, deed: Deed) -> str | None:
        """From an empty disk to the end, through one trouble or two; what was lost."""
        draw, words, story = self.draws[deed.name], deed.words, []
        try:
            with self.volume:
                for _ in range(draw.choice((1, 2))):
                    story.append(trouble := self.drawn(deed, draw))
                    before, half = self.checkpoints(), self.half_written()
                    codes, said = self.run(deed, words, trouble)
                    came = self.moments(trouble.rank)[trouble.moment :][:1]
                    story[-1] = f"{trouble} ({came[0] if came else 'after its end'})"
                    if not any(codes):  # that no longer mattered
                        self.volume.relieve()
                        break
                    self.tried[f"{deed.name}, {trouble.kind}"] += 1
                    words = [*deed.words, *self.judged(deed, codes, said, trouble, before, half)]
                    self.volume.relieve()
                else:
                    codes, said = self.run(deed, words)
                    if any(codes):
                        raise Lost(f"does not go on: {codes}\n{said[-2000:]}")
                if wrong := unlike(self.volume.files(), deed.files):
                    raise Lost(f"ends otherwise: {wrong[:10]}")
        except (Lost, UserError) as lost:
            return f"{deed.name}: {', then '.join(map(str, story))}: {lost}"

    def drawn(self, deed: Deed, draw: random.Random) -> Trouble:
        kind = draw.choice(KINDS)
        pages = draw.randrange(1, 1 + deed.pages // 2) if kind == "nearly full" else 0
        return Trouble(kind, draw.randrange(len(deed.moments)), pages, draw.randrange(deed.ranks))

    def judged(
        self, deed: Deed, codes: list[int], said: str, trouble: Trouble, before: list[str], half: set[str]
    ) -> list[str]:
        """Of a command that a disk has ended; what it advises to add to it. Before it there were these checkpoints, and
        what an earlier trouble had left."""
        if not {2} <= {*codes} <= {0, 2}:  # a rank may have done its part before
            raise Lost(f"exit codes {codes}\n{said[-3000:]}")
        lines = [line for line in re.split("[\r\n]", said) if line.startswith("tinyspeed: ")]
        if len(lines) != 1 or "Traceback" in said or "Exception ignored" in said:
            raise Lost(f"not one line, but\n{said[-3000:]}")
        named = re.search(rf"{re.escape(str(self.volume.at))}/?([^\s:;,]*)", lines[0])
        if not named or not re.search("make (space|it writable).*(same command again|--resume)", lines[0]):
            raise Lost(f"names no file, or no way to go on: {lines[0]}")
        self.named[f"{deed.name}: {re.sub(r'[0-9a-f]{8,}', 'N', named[1])}"] += 1
        after = self.checkpoints()
        if after[-1:] < before[-1:] and not deed.anew:
            raise Lost(f"{before[-1]} is gone")
        for name in after:
            checkpoint.read(self.volume.at / name)
        # One rank does not take away what another may still be writing: the next start does.
        left = self.half_written() - half
        if left and deed.ranks == 1 and trouble.kind != "read-only":
            raise Lost(f"left half-written: {left}")
        return ["--resume"] if "--resume" in lines[0] else []

    def half_written(self) -> set[str]:
        return {str(path) for path in self.volume.at.rglob("*") if ".tmp" in path.name}

    def checkpoints(self) -> list[str]:
        every = self.volume.at.rglob("checkpoints/step-*")
        return sorted(str(path.relative_to(self.volume.at)) for path in every)

    def run(self, deed: Deed, words: list[str], trouble: Trouble | None = None) -> tuple[list[int], str]:
        """Exit codes and all that was said."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"WORLD_SIZE": deed.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        every = []
        for rank in range(deed.ranks):
            ours = {**where, "RANK": rank, "LOCAL_RANK": rank} if deed.ranks > 1 else {}
            given = (words, self.home, self.volume, rank, trouble if trouble and trouble.rank == rank else None, ours)
            every.append(self.processes.Process(target=_command, args=given))
            every[-1].start()
        until = time.monotonic() + PATIENCE
        for one in every:
            one.join(max(0.0, until - time.monotonic()))
        said = "\n".join((self.home / f"log-{rank}").read_text(errors="replace") for rank in range(deed.ranks))
        if hang := [one for one in every if one.is_alive()]:
            for one in hang:
                one.kill()
                one.join()
            raise Lost(f"{len(hang)} of {deed.ranks} processes hang\n{said[-2000:]}")
        return [one.exitcode for one in every], said

    def moments(self, rank: int) -> list[str]:
        """That the last command had."""
        return (self.home / f"moments-{rank}").read_text().splitlines()


def _command(words: list[str], home: Path, volume: Volume, rank: int, trouble: Trouble | None, where: dict) -> None:
    """One process of a command."""
    with open(home / f"log-{rank}", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {name: str(value) for name, value in where.items()}
    if trouble:
        volume.watch(home / f"moments-{rank}", trouble.moment, trouble.kind, trouble.pages)
    else:
        volume.watch(home / f"moments-{rank}")
    if where:
        from scale.__main__ import main
    else:
        main = cli.main
    sys.exit(main(words))


def unlike(found: dict[str, Path], wanted: dict[str, bytes]) -> list[str]:
    """Files that are on one side alone, or differ in what does not depend on the time it took, or when it was."""
    wrong = [f"{name} is {'missing' if name in wanted else 'new'}" for name in found.keys() ^ wanted.keys()]
    for name in found.keys() & wanted.keys():
        mine, whole = found[name].read_bytes(), wanted[name]
        if name.endswith("metrics.jsonl"):
            mine, whole = timeless(mine), timeless(whole)
        elif name.endswith((".png", ".md")) or Path(name).name in TIMED:
            continue
        if mine != whole:
            wrong.append(f"{name} differs")
    return sorted(wrong)


if __name__ == "__main__":
    if reason := refused():
        sys.exit(reason)
    parser = outcome.parser(__doc__, count=240)
    parser.add_argument("--deeds", default="digits,chat,parts,scale,demo,compare,export,adapter,eval,look")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(Path(folder), asked.deeds.split(","), asked.seed)
        torture.go(asked.count, say=lambda line: print(line, flush=True))
    for name, count in sorted(torture.named.items()):
        print(f"{count:>8,}  {name}")
    sys.exit(outcome.write(asked.out, dict(sorted(torture.tried.items())), torture.lost))
