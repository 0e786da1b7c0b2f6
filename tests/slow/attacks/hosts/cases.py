"""What is done to the hosts of a run, and what must come of it."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slow.attacks.hosts.network import Network
from slow.attacks.hosts.program import MEETING
from slow.attacks.killed_runs import COMMON, SYSTEMS, names
from support import tiny
from support.album import album
from support.runs import ROOT, unlike
from support.waiting import HANGS, until

from tinyspeed import recipe
from tinyspeed.data import digits_model
from tinyspeed.recipe import Recipe

HOSTS = ("alpha", "beta", "gamma")  # rank 0 is on the first
LAUNCH = ROOT / "scale" / "launch" / "torchrun.sh"
PROGRAM = Path(__file__).with_name("program.py")
TIMEOUT, PATIENCE = 15, 20  # seconds
DIGITS = (
    *COMMON, *SYSTEMS["all of it"], "digits.pictures=16", "train.steps=9", f"scale.timeout={TIMEOUT}",
    "scale.check_every=4", "run.save_minutes=1000000",
)  # fmt: skip
CHAT = ("data.kind=chat", "align.steps=0", "digits.pictures=1000000")
# A torchrun that starts program.py where it is asked for `-m scale`.
TORCHRUN = """#!{python}
import sys
from torch.distributed.run import main
at = sys.argv.index("-m")
sys.argv[at : at + 2] = ["{program}"]
main()
"""
MOMENTS = {
    "at the start": (MEETING, "looking for model and data", "loading the model", "sharding the model"),
    "in a step": ("in a .* of step 3$", "in a .* of step 5$", "in a .* of step 12$", "after a .* of step 8$"),
    "while saving": ("copying the checkpoint", "writing the checkpoint of step (3|7|10)$"),
    "at the end": ("writing the checkpoint of step 13", "exporting"),
}


class Failed(Exception):
    """`kind` is what went wrong: "lost" if the run has not come to the right end, "silent" if nobody said what was
    wrong, "" if anything else."""

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind = kind


class Attack:
    """Does things to runs in `home`. `tried` and `failures` say what, and what of it failed."""

    def __init__(self, home: Path):
        self.home, self.tried, self.failures, self.wrong = home, Counter(), [], Counter(lost=0, silent=0)
        self.wholes: dict[tuple, Recipe] = {}
        (home / "bin").mkdir()
        (home / "bin" / "torchrun").write_text(TORCHRUN.format(python=sys.executable, program=PROGRAM))
        (home / "bin" / "torchrun").chmod(0o755)
        sizes = recipe.read("digits", [*COMMON]).digits.sizes
        digits_model.prepare(home / "base", 0, tower_steps=5, **sizes, bar=False)

    def go(self, kind: str, case: Callable[..., None], *given, **how) -> None:
        said = ", ".join([*map(str, given), *(f"{name}={value}" for name, value in how.items())])
        self.tried[kind] += 1
        for old in ("reached", "go"):
            (self.home / old).unlink(missing_ok=True)
        try:
            case(self, *given, **how)
        except (Failed, AssertionError) as error:
            self.wrong[getattr(error, "kind", "")] += 1
            self.failures.append(f"{kind} ({said}): {error}")

    def recipe(self, *changes: str) -> Recipe:
        name = f"run-{sum(self.tried.values())}-{len(list(self.home.glob('*.toml')))}"
        made = recipe.read("digits", [f"run.name={name}", f"run.folder={self.home / 'runs'}", *changes])
        (self.home / f"{name}.toml").write_text(made.to_toml())
        return made

    def digits(self) -> Recipe:
        return self.recipe(f"model.path={self.home / 'base'}", *DIGITS)

    @contextmanager
    def hosts(self, count: int) -> Iterator[Network]:
        with Network(self.home, HOSTS[:count]) as net:
            yield net

    def start(self, net: Network, made: Recipe, *on: str, restarts: int = 0, add: tuple = (), **environment) -> dict:
        """Starts this run on these hosts, or on all, as a user does."""
        environment = {
            "PATH": f"{self.home / 'bin'}:/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "NNODES": len(net.names), "HEAD": "alpha:29500", "GPUS": 1, "RESTARTS": restarts, "OMP_NUM_THREADS": 1,
            "GLOO_SOCKET_IFNAME": "eth0", "CUDA_VISIBLE_DEVICES": "", **environment,
        }  # fmt: skip
        words = ["bash", LAUNCH, f"{made.run.name}.toml", *add]
        started = {}
        for name in on or net.names:
            started[name] = net[name].start(words, self.log(name, made), self.home, **environment)
        return started

    def log(self, host: str, made: Recipe) -> Path:
        return self.home / f"{made.run.name}.{host}.log"

    def said(self, made: Recipe) -> dict[str, list[str]]:
        """Our own lines in the logs of the hosts."""
        found = {}
        for host in HOSTS:
            log = self.log(host, made)
            lines = re.split("[\r\n]", log.read_text(errors="replace")) if log.exists() else ()
            found[host] = [line[line.index("tinyspeed: ") :] for line in lines if "tinyspeed: " in line]
        return found

    def finish(self, net: Network, made: Recipe, agents: dict[str, subprocess.Popen]) -> None:
        """Waits for the end of the run, which must be that of an undisturbed one."""
        codes = {name: agent.wait(HANGS) for name, agent in agents.items()}
        if any(codes.values()):
            logs = "\n".join(self.log(name, made).read_text(errors="replace")[-3000:] for name in agents)
            raise Failed("lost", f"the run does not come to its end: {codes}\n{logs}")
        whole = self.whole(len(net.names), made)
        if wrong := unlike(made, whole):
            raise Failed("lost", f"has another end: {wrong[:10]}")
        if sorted(names(made)) != sorted(names(whole)):
            raise Failed("lost", f"leaves other files: {sorted({*names(made)} ^ {*names(whole)})}")

    def whole(self, count: int, made: Recipe) -> Recipe:
        """A run like this one on so many hosts, undisturbed."""
        kind = count, made.data.kind, made.model.quantise
        if kind not in self.wholes:
            with self.hosts(count) as net:
                file = (self.home / f"{made.run.name}.toml").read_text()
                whole = self.recipe()
                (self.home / f"{whole.run.name}.toml").write_text(file.replace(made.run.name, whole.run.name))
                whole = recipe.read(str(self.home / f"{whole.run.name}.toml"))
                self.wholes[kind] = whole
                self.finish(net, whole, self.start(net, whole))
        return self.wholes[kind]

    def stop_at(self, net: Network, moment: str, at: str, agents: dict[str, subprocess.Popen]) -> None:
        """Waits until a rank on this host stands still at this moment."""
        until((self.home / "reached").exists, f"{at} has come to: {moment}", agents[at])

    def all_end(self, net: Network, made: Recipe) -> None:
        """Waits until no rank is left, and then stops torchrun, which may wait longer."""
        try:
            until(lambda: not any(host.processes("LOCAL_RANK") for host in net.hosts.values()), "no rank is left")
        except AssertionError as error:
            raise Failed("", f"{error}; they said {self.said(made)}") from error
        for host in net.hosts.values():
            host.kill_all()

    def require_said(self, made: Recipe, host: str, what: str) -> None:
        lines = self.said(made)[host]
        if not any(re.search(what, line) for line in lines):
            raise Failed("silent", f"{host} does not say {what!r} but {lines}")


def on(host: str) -> str:
    return f"rank {HOSTS.index(host)} on {host}"


def cut(attack: Attack, count: int, victim: str, moment: str, *, inside: bool = False, head: str = "alpha") -> None:
    """The link of a host is cut at a moment of the run."""
    with attack.hosts(count) as net:
        made, how = attack.digits(), {"MOMENT": moment, "RELEASE": attack.home, "HEAD": f"{head}:29500"}
        if moment == MEETING:
            how["PATIENCE"] = PATIENCE
        agents = attack.start(net, made, victim, **how)
        del how["MOMENT"]
        agents |= attack.start(net, made, *({*net.names} - {victim}), **how)
        attack.stop_at(net, moment, victim, agents)
        net[victim].cut(inside=inside)
        (attack.home / "go").touch()
        attack.all_end(net, made)
        others = [name for name in net.names if name != victim]
        if moment == MEETING:
            apart = others if victim == "alpha" else [victim]
            missing = [HOSTS.index(name) for name in apart]
            attack.require_said(made, "alpha", rf"ranks {re.escape(str(missing))} of {count} have not come")
            for name in apart:
                attack.require_said(made, name, f"{on(name)} cannot reach alpha, where rank 0 should be")
        elif victim == "alpha":
            attack.require_said(made, "alpha", f"no answer from {', '.join(map(on, others))}; {on('alpha')} was")
            for name in others:
                attack.require_said(made, name, f"no answer from alpha, where rank 0 should be; {on(name)} was")
        else:
            attack.require_said(made, victim, f"no answer from alpha, where rank 0 should be; {on(victim)} was")
            for name in others:
                attack.require_said(made, name, f"no answer from {on(victim)}; {on(name)} was|and {on(name)} was")
            if str(attack.said(made)).count(f"no answer from {on(victim)};") != 1:
                raise Failed("silent", f"nobody, or more than one, says that {victim} is gone: {attack.said(made)}")
        net[victim].mend()
        attack.finish(net, made, attack.start(net, made))


def slow(attack: Attack, count: int, victim: str, delay: float, loss: float) -> None:
    """The link of a host delays every frame and loses some: the run takes longer, and that is all."""
    with attack.hosts(count) as net:
        made = attack.digits()
        net[victim].cable.delay, net[victim].cable.loss = delay, loss
        attack.finish(net, made, attack.start(net, made, add=("--set", "scale.timeout=600")))
        assert min(net.switch.late, net.switch.dropped) > 0, "the link was not slow"


def late(attack: Attack, count: int, victim: str) -> None:
    """The link of a host comes up only after the run was started on all."""
    with attack.hosts(count) as net:
        made = attack.digits()
        net[victim].cut()
        agents = attack.start(net, made)
        before = net.switch.dropped
        until(lambda: net.switch.dropped > before, "a host asks for another in vain", agents[victim])
        net[victim].mend()
        attack.finish(net, made, agents)


def vanish(
    attack: Attack, count: int, victim: str, moment: str, *, processes: bool = False, head: str = "alpha"
) -> None:
    """A host loses its power, or all its processes (then the kernel closes their connections), and comes back. With
    restarts torchrun lets it in again, unless it was the one where the torchruns meet: then all are started again."""
    with attack.hosts(count) as net:
        made, how = attack.digits(), {"RELEASE": attack.home, "HEAD": f"{head}:29500", "restarts": 3}
        others = [name for name in net.names if name != victim]
        agents = attack.start(net, made, victim, MOMENT=moment, **how) | attack.start(net, made, *others, **how)
        attack.stop_at(net, moment, victim, agents)
        if processes:
            net[victim].kill_all()
        else:
            net[victim].power_off()
            net[victim].power_on()
        gone = "alpha, where rank 0 should be" if victim == "alpha" else on(victim)
        until(lambda: f"no answer from {gone}" in str(attack.said(made)), f"somebody says that {victim} is gone")
        if victim == head:
            attack.all_end(net, made)
            agents = attack.start(net, made, **how)
        else:
            agents |= attack.start(net, made, victim, **how)
        attack.finish(net, made, agents)


def taken(attack: Attack) -> None:
    """Rank 0's port is taken, where the ranks are started without torchrun."""
    with attack.hosts(2) as net:
        made = attack.digits()
        listen = "import socket, time; s = socket.create_server(('', 29500)); print('up', flush=True); time.sleep(9999)"
        log = attack.home / "listener.log"
        listener = net["alpha"].start([sys.executable, "-c", listen], log, attack.home)
        until(lambda: "up" in log.read_text(), "a port is taken", listener)
        where = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "alpha", "MASTER_PORT": 29500, "PYTHONPATH": ROOT}
        words = [sys.executable, "-m", "scale", f"{made.run.name}.toml"]
        code = net["alpha"].start(words, attack.log("alpha", made), attack.home, **where).wait(HANGS)
        attack.require_said(made, "alpha", "rank 0 on alpha cannot .* 29500.* address already in use")
        if code != 2 or len(attack.said(made)["alpha"]) != 1:
            raise Failed("", f"exit code {code}, {attack.said(made)}")
        net["alpha"].kill_all()
        attack.finish(net, made, attack.start(net, made))


def clock(attack: Attack, count: int, victim: str, ahead: float) -> None:
    """The clock of a host is wrong."""
    with attack.hosts(count) as net:
        made = attack.digits()
        agents = attack.start(net, made, victim, AHEAD=ahead)
        attack.finish(net, made, agents | attack.start(net, made, *({*net.names} - {victim})))


def threads(attack: Attack) -> None:
    """Hosts compute with other numbers of threads. That changes sums of large products, and these are small."""
    with attack.hosts(2) as net:
        made = attack.digits()
        add = ("--set", "run.threads=0")
        agents = attack.start(net, made, "alpha", add=add)
        attack.finish(net, made, agents | attack.start(net, made, "beta", add=add, OMP_NUM_THREADS=2))


def other_package(attack: Attack) -> None:
    """A host has another version of the package."""
    tree = attack.home / "other"
    for room in ("scale", "tinyspeed"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    file = tree / "tinyspeed" / "scheduler.py"
    file.write_text(file.read_text() + "\n# one more line\n")
    _refused(attack, attack.digits(), "tinyspeed/scheduler.py", PYTHONPATH=f"{tree}:{ROOT / 'tests'}")


def other_data(attack: Attack) -> None:
    """One letter of an answer is another one on a host."""
    made = _chat(attack)
    text = Path(made.data.file).read_text()
    file = attack.home / "other.json"
    file.write_text(text.replace("small, 5.", "smell, 5.", 1))
    assert file.read_text() != text
    _refused(attack, made, "data.file", add=("--set", f"data.file={file}"))


def other_base(attack: Attack) -> None:
    """One bit of the base model, which each rank loads in 4 bits, is another one on a host."""
    made = _chat(attack, "model.quantise=nf4", "lora.rank=4")
    other = attack.home / "other-model"
    shutil.copytree(made.model.path, other)
    file = other / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4000] ^= 0x10
    file.write_bytes(content)
    _refused(attack, made, "model.safetensors", add=("--set", f"model.path={other}"))


def _chat(attack: Attack, *changes: str) -> Recipe:
    model = attack.home / "llava"
    if not model.exists():
        tiny.checkpoint("llava", model)
    files = (f"model.path={model}", f"data.file={album(attack.home)}", f"data.images={attack.home / 'images'}")
    return attack.recipe(*COMMON, *CHAT, *files, "train.steps=4", *changes)


def _refused(attack: Attack, made: Recipe, what: str, add: tuple = (), **environment) -> None:
    """The hosts do not agree, which one of them must say. When they do, the run comes to its end."""
    with attack.hosts(2) as net:
        agents = attack.start(net, made, "alpha") | attack.start(net, made, "beta", add=add, **environment)
        codes = [agent.wait(HANGS) for agent in agents.values()]
        lines = [line for every in attack.said(made).values() for line in every]
        if not all(codes) or len(lines) != 1:
            raise Failed("silent", f"is not refused in one line: {codes} {lines}")
        if not re.search(rf"rank \d on \w+: rank 1 on beta and rank 0 do not have the same {what}:", lines[0]):
            raise Failed("silent", f"is refused for another reason: {lines[0]}")
        if any(made.folder.rglob("step-*")):
            raise Failed("lost", "a run that was refused has begun")
        attack.finish(net, made, attack.start(net, made))
