"""No foreign code runs and nothing leaves: all commands in a sandbox (sandbox.py), with traps (support/hostile.py) in
what they read.

    make torture ONLY=foreign_code        every command and every trap in a process of its own, then 30 mixed traps

- Code that came with a model does not run: no pickle is opened and no .py file of a model's folder is imported, however
  the folder asks for it. Whoever asks whether to trust such code is always answered yes here.
- The network is not used when model and data are folders. (`scale` talks to itself on 127.0.0.1.)
- Nothing is written but the run's folder, the cache and the named outputs; `sandbox.LIBRARIES` lists what libraries
  write. What the commands read is the same afterwards, bit for bit.
"""

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slow.attacks import outcomes
from slow.attacks.sandbox import Sandbox
from support import hostile, tiny
from support.album import album

RECIPE = """
[run]
name = "mine"
threads = 1
device = "cpu"
save_every = 2
[model]
path = "{given}/llava"
quantise = "nf4"
[lora]
rank = 4
[data]
kind = "chat"
file = "{given}/train.json"
images = "{given}/images"
workers = 2
feature_cache_gb = 0.01
[dualspeed]
slow = 0.3
keep = 0.3
[regate]
keep = 0.5
reference = "{given}/llm"
warmup = 2
cycle = 4
refresh = 1
[train]
steps = 6
batch = 4
"""
DIGITS = [
    f"--set={change}"
    for change in (
        "run.threads=1", "run.device=cpu", "run.save_every=2", "digits.side=6", "digits.width=32", "digits.layers=2",
        "digits.tower_width=32", "digits.tower_steps=2", "align.steps=1", "align.batch=4", "train.steps=3",
        "train.batch=4", "dualspeed.keep=0.25", "data.eval_pictures=4",
    )
]  # fmt: skip


def provide(sandbox: Sandbox) -> None:
    """What a user has downloaded: two models, pictures, conversations in two formats, the questions of a benchmark."""
    given = sandbox.given
    album(given, 12)
    tiny.checkpoint("llava", given / "llava")
    tiny.llm(given / "llm")
    parts = given / "parts"
    parts.mkdir()
    tiny.parts(parts)
    rows = json.loads((given / "train.json").read_text())
    for row in rows:  # a column has one type
        named = row.get("image", [])
        row["image"] = named if isinstance(named, list) else [named]
    hostile.extension_types(given / "train.parquet", rows, sandbox.code("extension types"))
    asked = [{"question_id": 1, "image": "p0-0.jpg", "text": "Is there a bird in the image?", "label": "no"}]
    (given / "coco_pope_random.json").write_text("\n".join(map(json.dumps, asked)))
    (sandbox.cwd / "mine.toml").write_text(RECIPE.format(given=given))


def commands(sandbox: Sandbox) -> dict[str, list[str]]:
    """All commands, in an order in which each finds what it needs."""
    given, picture = sandbox.given, str(sandbox.given / "images" / "p0-0.jpg")
    few = ["--max-new-tokens", "2"]
    parts = [f"--set=model.{name}={given}/parts/{folder}" for name, folder in (("tower", "clip"), ("llm", "llama"))]
    plain = ["--set=model.path=", "--set=model.quantise=none", "--set=lora.rank=0", "--set=train.steps=1"]
    return {
        "estimate": ["estimate", "mine.toml"],
        "dry run": ["train", "mine.toml", "--dry-run"],
        "train": ["train", "mine.toml"],
        "resume": ["train", "mine.toml", "--resume"],
        "train on parquet": ["train", "mine.toml", "--set=run.name=parquet", f"--set=data.file={given}/train.parquet"],
        "train from parts": ["train", "mine.toml", "--set=run.name=parts", *plain, *parts, "--set=data.template=plain",
                             "--skip-bad", "--set=regate.keep=1", "--set=regate.reference=",
                             "--set=data.feature_cache_gb=0"],
        "export": ["export", "runs/mine", "out"],
        "export the adapter": ["export", "runs/mine", "adapter", "--adapter"],
        "ask a run": ["ask", "runs/mine", picture, "What?", *few],
        "ask a model": ["ask", str(given / "llava"), picture, "What?", *few],
        "eval": ["eval", "runs/mine", "--task", "pope", "--questions", f"{given}/coco_pope_random.json", "--images",
                 str(given / "images")],
        "look": ["look", picture],
        "look by a tower": ["look", picture, "--tower", str(given / "llava"), "--out", "tower.png"],
        "train digits": ["train", "digits", *DIGITS, "--set=run.name=digits"],
        "eval digits": ["eval", "runs/digits"],
        "compare": ["compare", "digits", *DIGITS, "--set=run.name=both", "--only", "full,dualspeed"],
        "bench": ["bench", "savings", "--layers", "4", "--width", "32", "--out", "bench.json", "--png", "bench.png"],
        "demo": ["demo", "digits", *DIGITS, "--set=run.name=demo"],
    }  # fmt: skip


OUTPUTS = (
    r"cwd", r"cwd/\.?(out|adapter)(\.tmp(\.lock)?)?(/.*)?", r"cwd/\.?(look|tower|bench)\.(png|json)(\.tmp(\.lock)?)?",
)  # fmt: skip
SCALE = ["scale", "mine.toml", "--set=run.name=scaled", "--set=data.feature_cache_gb=0"]


def interrupt(sandbox: Sandbox) -> None:
    """Make the finished run look as if it had been killed after its step 4."""
    shutil.rmtree(sandbox.cwd / "runs" / "mine" / "model")
    shutil.rmtree(sandbox.cwd / "runs" / "mine" / "checkpoints" / "step-00000006")


# Traps


@dataclass(frozen=True)
class Attack:
    """A trap, the command that meets it, and the exit codes it may have: 0, or 2, refused in one line."""

    name: str
    set_up: Callable[[Sandbox, Path, hostile.Code], list[str]]  # puts the trap into this folder, returns the command
    ends: tuple[int, ...]


def of_model(trap: Callable, *ends: int) -> Attack:
    """In the folder of a LLaVA that is asked a question."""

    def set_up(sandbox: Sandbox, folder: Path, code: hostile.Code) -> list[str]:
        trap(hostile.copy(sandbox.given / "llava", folder / "llava"), code)
        picture = str(sandbox.given / "images" / "p0-0.jpg")
        return ["ask", str(folder / "llava"), picture, "What?", "--max-new-tokens", "2"]

    return Attack(f"model: {trap.__name__}", set_up, ends)


def of_llm(trap: Callable, *ends: int) -> Attack:
    """In the reference model of ReGATE, which may have any architecture that transformers knows."""

    def set_up(sandbox: Sandbox, folder: Path, code: hostile.Code) -> list[str]:
        trap(hostile.copy(sandbox.given / "llm", folder / "llm"), code)
        name = f"--set=run.name=of-{trap.__name__}"
        return ["train", "mine.toml", name, f"--set=regate.reference={folder / 'llm'}"]

    return Attack(f"reference: {trap.__name__}", set_up, ends)


def of_part(which: str, trap: Callable, *ends: int) -> Attack:
    def set_up(sandbox: Sandbox, folder: Path, code: hostile.Code) -> list[str]:
        parts = hostile.copy(sandbox.given / "parts", folder / "parts")
        trap(parts / {"tower": "clip", "llm": "llama"}[which], code)
        words = commands(sandbox)["train from parts"]
        words = [word.replace(str(sandbox.given / "parts"), str(parts)) for word in words]
        return [*words, f"--set=run.name=part-{which}-{trap.__name__}"]

    return Attack(f"{which}: {trap.__name__}", set_up, ends)


def of_look(trap: Callable, *ends: int) -> Attack:
    def set_up(sandbox: Sandbox, folder: Path, code: hostile.Code) -> list[str]:
        trap(hostile.copy(sandbox.given / "llava", folder / "llava"), code)
        picture = str(sandbox.given / "images" / "p0-0.jpg")
        return ["look", picture, "--tower", str(folder / "llava"), "--out", "tower.png"]

    return Attack(f"look: {trap.__name__}", set_up, ends)


def of_checkpoint(name: str) -> Attack:
    def set_up(sandbox: Sandbox, folder: Path, code: hostile.Code) -> list[str]:
        run = hostile.copy(sandbox.cwd / "runs" / "mine", folder / "mine")
        hostile.checkpoint(run / "checkpoints" / "step-00000006", code, name)
        return ["export", str(run), str(sandbox.cwd / "out2")]

    return Attack(f"checkpoint: {name}", set_up, (2,))


def _isolator(sandbox: Sandbox, folder: Path, code: hostile.Code) -> list[str]:
    run = hostile.copy(sandbox.cwd / "runs" / "mine", folder / "mine")
    (run / "isolator.safetensors").write_bytes(code.torch_pickle)
    return ["train", "mine.toml", "--set=run.name=next", f"--set=dualspeed.isolator_from={run}"]


def _beside_a_run(sandbox: Sandbox, folder: Path, code: hostile.Code) -> list[str]:
    run = hostile.copy(sandbox.cwd / "runs" / "mine", folder / "mine")
    for inside in (run, run / "checkpoints" / "step-00000006", run / "model"):
        hostile.pickles_beside(inside, code)
        hostile.auto_map_of_the_model(inside, code)
    return ["ask", str(run), str(sandbox.given / "images" / "p0-0.jpg"), "What?", "--max-new-tokens", "2"]


def _picture(sandbox: Sandbox, folder: Path, code: hostile.Code) -> list[str]:
    data = hostile.copy(sandbox.given / "images", folder / "images")
    hostile.picture(data / "p0-0.jpg", code)
    return ["train", "mine.toml", "--set=run.name=picture", f"--set=data.images={data}"]


def _cache(sandbox: Sandbox, folder: Path, code: hostile.Code) -> list[str]:
    """Pickles in place of everything in the caches."""
    cache = hostile.copy(sandbox.home / ".cache" / "tinyspeed", sandbox.home / ".cache" / "tinyspeed" / "cache")
    for file in cache.rglob("*.safetensors"):
        file.write_bytes(code.torch_pickle)
    return ["train", "mine.toml", "--set=run.name=cached", f"--set=run.cache={cache}"]


BESIDE = (  # traps beside a sound model
    hostile.pickles_beside, hostile.auto_map_of_the_model, hostile.auto_map_of_the_processor, hostile.own_generate,
    hostile.trusting,
)  # fmt: skip
ATTACKS = (
    *(of_model(trap, 0) for trap in BESIDE),
    *(of_model(trap, 2) for trap in (
        hostile.pickle_instead, hostile.index_of_pickles, hostile.pickle_named_safetensors, hostile.linked_weights,
        hostile.unknown_model, hostile.unknown_llm, hostile.attention_from_the_hub,
    )),
    *(of_model(trap, 0, 2) for trap in (
        hostile.kernels_from_the_hub, hostile.adapter_beside, hostile.unknown_processor, hostile.unknown_tokenizer,
        hostile.unknown_image_processor,
    )),
    *(Attack(f"chat template {n}", of_model(hostile.escape(n)).set_up, (0, 2)) for n in range(len(hostile.ESCAPES))),
    *(of_llm(trap, 0) for trap in (hostile.pickles_beside, hostile.auto_map_of_the_model)),
    *(of_llm(trap, 2) for trap in (hostile.pickle_instead, hostile.unknown_model)),
    *(of_llm(trap, 0, 2) for trap in (
        hostile.unknown_tokenizer, hostile.adapter_beside, hostile.attention_from_the_hub,
    )),
    *(of_part("llm", trap, *ends) for trap, ends in (
        (hostile.pickles_beside, (0,)), (hostile.pickle_instead, (2,)), (hostile.unknown_model, (2,)),
        (hostile.unknown_tokenizer, (0, 2)),
    )),
    *(of_part("tower", trap, *ends) for trap, ends in (
        (hostile.pickles_beside, (0,)), (hostile.pickle_instead, (2,)), (hostile.auto_map_of_the_processor, (0,)),
    )),
    *(of_look(trap, 0, 2) for trap in (
        hostile.pickles_beside, hostile.pickle_instead, hostile.unknown_model, hostile.unknown_image_processor,
    )),
    *(of_checkpoint(name) for name in ("tensors.safetensors", "state.json")),
    Attack("isolator", _isolator, (2,)),
    Attack("beside a run", _beside_a_run, (0,)),
    Attack("picture", _picture, (2,)),
    Attack("cache", _cache, (0, 2)),
)  # fmt: skip


def check(sandbox: Sandbox, before: dict[str, tuple]) -> list[str]:
    """Returns what happened since `before` and should not have."""
    return [*sandbox.violations(OUTPUTS), *sandbox.changes(before, OUTPUTS)]


def ended(name: str, ends: tuple[int, ...], code: int, said: str) -> list[str]:
    """Returns what is wrong with how a command ended. One that refuses must say so in one line."""
    if code not in ends:
        return [f"{name}: exit code {code}, not {ends}:\n{said[-2000:]}"]
    said = said.replace("\r", "\n").strip().splitlines()
    if (code and not (said and said[-1].startswith("tinyspeed: "))) or any("Traceback" in line for line in said):
        return [f"{name}: exit code {code} and no line that says why: {said[-20:]}"]
    return []


def at_once(sandbox: Sandbox, chosen: list[str], attacks: list[Attack]) -> list[str]:
    """Run these commands and attacks in one process. Returns what went wrong."""
    provide(sandbox)
    every, code = commands(sandbox), sandbox.code
    lines = [
        attack.set_up(sandbox, sandbox.given / "traps" / str(n), code(attack.name)) for n, attack in enumerate(attacks)
    ]
    before = sandbox.files()
    codes = sandbox.run_together([every[name] for name in chosen] + lines)
    goals = [(name, (0,)) for name in chosen] + [(attack.name, attack.ends) for attack in attacks]
    wrong = [line for goal, end in zip(goals, codes, strict=True) for line in ended(*goal, *end)]
    return wrong + check(sandbox, before)


def one_by_one(sandbox: Sandbox, draws: int, seed: int, say: Callable = print) -> tuple[dict[str, int], list[str]]:
    """Run each command and each attack in a process of its own, `scale` too, then draw several traps for one folder, so
    many times."""
    provide(sandbox)
    failures = []

    def alone(name: str, words: list[str], ends: tuple[int, ...]) -> None:
        before = sandbox.files()
        code, said = sandbox.run_alone(words)
        found = [f"{name}: {line}" for line in check(sandbox, before)] + ended(name, ends, code, said)
        say(f"{name}: {code}{' FAILED' if found else ''}")
        failures.extend(found)

    for name, words in {**commands(sandbox), "scale": SCALE}.items():
        if name == "resume":
            hostile.copy(sandbox.cwd / "runs" / "mine", sandbox.given / "whole")
            interrupt(sandbox)
        alone(name, words, (0,))
    for number, attack in enumerate(ATTACKS):
        alone(
            attack.name,
            attack.set_up(sandbox, sandbox.given / "traps" / str(number), sandbox.code(attack.name)),
            attack.ends,
        )
    draw = random.Random(seed)
    for number in range(draws):
        traps = draw.sample(MIXED, draw.randrange(2, 5))
        name = " and ".join(trap.__name__ for trap in traps)

        def together(folder: Path, code: hostile.Code, traps=traps) -> None:
            for trap in traps:
                trap(folder, code)

        of = draw.choice((of_model, of_look))
        lines = of(together).set_up(sandbox, sandbox.given / "mixed" / str(number), sandbox.code(name))
        alone(f"{of.__name__}: {name}", lines, (0, 2))
    tried = {"commands": len(commands(sandbox)) + 1, "traps": len(ATTACKS), "several traps in one folder": draws}
    return tried, failures


MIXED = (
    *BESIDE, hostile.adapter_beside, hostile.unknown_model, hostile.unknown_llm, hostile.unknown_processor,
    hostile.unknown_tokenizer, hostile.unknown_image_processor, hostile.attention_from_the_hub,
    hostile.pickle_named_safetensors, hostile.index_of_pickles, *map(hostile.escape, range(len(hostile.ESCAPES))),
)  # fmt: skip


if __name__ == "__main__":
    asked = outcomes.parser(__doc__, count=30).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(Path(folder).resolve())
        tried, failures = one_by_one(sandbox, asked.count, asked.seed, outcomes.say)
        if not sandbox.confined:
            print("without namespaces: only Python's audit hook and the files were checked")
    sys.exit(outcomes.write(asked.out, tried, failures))
