"""Nothing gets in, nothing gets out: all commands, watched (`world.py`), among the baits of `bait.py`.

    make torture ONLY=sealed        every command and every bait in a process of its own, then 30 draws of several baits

- No code of a stranger runs: no pickle is opened, no .py of a model's folder imported, however it is asked for. Whoever
  asks whether to trust it is answered yes here, again and again.
- The network is not used when model and data are folders. (`scale` talks to itself on 127.0.0.1.)
- Nothing is written but the run's folder, the cache, and what was named as output; `world.LIBRARIES` has what others
  write. What is given is bit for bit the same afterwards.
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
from slow.attacks.sandbox import World
from support import hostile_model as bait
from support import tiny
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


def furnish(world: World) -> None:
    """What a user has been given: two models, pictures, conversations in two formats, a benchmark's questions."""
    given = world.given
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
    bait.extension_types(given / "train.parquet", rows, world.code("extension types"))
    asked = [{"question_id": 1, "image": "p0-0.jpg", "text": "Is there a bird in the image?", "label": "no"}]
    (given / "coco_pope_random.json").write_text("\n".join(map(json.dumps, asked)))
    (world.cwd / "mine.toml").write_text(RECIPE.format(given=given))


def commands(world: World) -> dict[str, list[str]]:
    """All of them, in an order in which each finds what it needs."""
    given, picture = world.given, str(world.given / "images" / "p0-0.jpg")
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


OUTPUTS = (r"cwd", r"cwd/\.?(out|adapter)(\.tmp)?(/.*)?", r"cwd/\.?(look|tower|bench)\.(png|json)(\.tmp)?")
SCALE = ["scale", "mine.toml", "--set=run.name=scaled", "--set=data.feature_cache_gb=0"]


def interrupt(world: World) -> None:
    """Make the finished run one that was killed behind its step 4."""
    shutil.rmtree(world.cwd / "runs" / "mine" / "model")
    shutil.rmtree(world.cwd / "runs" / "mine" / "checkpoints" / "step-00000006")


# Baits


@dataclass(frozen=True)
class Attack:
    """Where a bait lies, the command that comes upon it, and how that may end: 0, or 2, refused in one line."""

    name: str
    lay: Callable[[World, Path, bait.Code], list[str]]  # into a folder of its own; the command
    ends: tuple[int, ...]


def of_model(plant: Callable, *ends: int) -> Attack:
    """A whole LLaVA's folder, asked."""

    def lay(world: World, folder: Path, code: bait.Code) -> list[str]:
        plant(bait.copy(world.given / "llava", folder / "llava"), code)
        picture = str(world.given / "images" / "p0-0.jpg")
        return ["ask", str(folder / "llava"), picture, "What?", "--max-new-tokens", "2"]

    return Attack(f"model: {plant.__name__}", lay, ends)


def of_llm(plant: Callable, *ends: int) -> Attack:
    """A reference for ReGATE: of any architecture that transformers knows."""

    def lay(world: World, folder: Path, code: bait.Code) -> list[str]:
        plant(bait.copy(world.given / "llm", folder / "llm"), code)
        name = f"--set=run.name=of-{plant.__name__}"
        return ["train", "mine.toml", name, f"--set=regate.reference={folder / 'llm'}", "--set=train.steps=1"]

    return Attack(f"reference: {plant.__name__}", lay, ends)


def of_part(which: str, plant: Callable, *ends: int) -> Attack:
    def lay(world: World, folder: Path, code: bait.Code) -> list[str]:
        parts = bait.copy(world.given / "parts", folder / "parts")
        plant(parts / {"tower": "clip", "llm": "llama"}[which], code)
        words = commands(world)["train from parts"]
        words = [word.replace(str(world.given / "parts"), str(parts)) for word in words]
        return [*words, f"--set=run.name=part-{which}-{plant.__name__}"]

    return Attack(f"{which}: {plant.__name__}", lay, ends)


def of_look(plant: Callable, *ends: int) -> Attack:
    def lay(world: World, folder: Path, code: bait.Code) -> list[str]:
        plant(bait.copy(world.given / "llava", folder / "llava"), code)
        return [
            "look",
            str(world.given / "images" / "p0-0.jpg"),
            "--tower",
            str(folder / "llava"),
            "--out",
            "tower.png",
        ]

    return Attack(f"look: {plant.__name__}", lay, ends)


def of_checkpoint(name: str) -> Attack:
    def lay(world: World, folder: Path, code: bait.Code) -> list[str]:
        run = bait.copy(world.cwd / "runs" / "mine", folder / "mine")
        bait.checkpoint(run / "checkpoints" / "step-00000006", code, name)
        return ["export", str(run), str(world.cwd / "out2")]

    return Attack(f"checkpoint: {name}", lay, (2,))


def _isolator(world: World, folder: Path, code: bait.Code) -> list[str]:
    run = bait.copy(world.cwd / "runs" / "mine", folder / "mine")
    (run / "isolator.safetensors").write_bytes(code.torch_pickle)
    return ["train", "mine.toml", "--set=run.name=next", f"--set=dualspeed.isolator_from={run}"]


def _beside_a_run(world: World, folder: Path, code: bait.Code) -> list[str]:
    run = bait.copy(world.cwd / "runs" / "mine", folder / "mine")
    for inside in (run, run / "checkpoints" / "step-00000006", run / "model"):
        bait.pickles_beside(inside, code)
        bait.auto_map_of_the_model(inside, code)
    return ["ask", str(run), str(world.given / "images" / "p0-0.jpg"), "What?", "--max-new-tokens", "2"]


def _picture(world: World, folder: Path, code: bait.Code) -> list[str]:
    data = bait.copy(world.given / "images", folder / "images")
    bait.picture(data / "p0-0.jpg", code)
    return ["train", "mine.toml", "--set=run.name=picture", f"--set=data.images={data}"]


def _cache(world: World, folder: Path, code: bait.Code) -> list[str]:
    """Pickles in place of all that is kept of pictures and reference."""
    cache = bait.copy(world.user / ".cache" / "tinyspeed", world.user / ".cache" / "tinyspeed" / "cache")
    for file in cache.rglob("*.safetensors"):
        file.write_bytes(code.torch_pickle)
    return ["train", "mine.toml", "--set=run.name=cached", f"--set=run.cache={cache}"]


BESIDE = (  # what a folder may hold beside a sound model
    bait.pickles_beside, bait.auto_map_of_the_model, bait.auto_map_of_the_processor, bait.own_generate, bait.trusting,
)  # fmt: skip
ATTACKS = (
    *(of_model(plant, 0) for plant in BESIDE),
    *(of_model(plant, 2) for plant in (
        bait.pickle_instead, bait.index_of_pickles, bait.pickle_named_safetensors, bait.tree_of_weights,
        bait.unknown_model, bait.unknown_llm, bait.attention_from_the_hub,
    )),
    *(of_model(plant, 0, 2) for plant in (
        bait.kernels_from_the_hub, bait.adapter_beside, bait.unknown_processor, bait.unknown_tokenizer,
        bait.unknown_image_processor,
    )),
    *(Attack(f"chat template {n}", of_model(bait.escape(n)).lay, (0, 2)) for n in range(len(bait.ESCAPES))),
    *(of_llm(plant, 0) for plant in (bait.pickles_beside, bait.auto_map_of_the_model)),
    *(of_llm(plant, 2) for plant in (bait.pickle_instead, bait.unknown_model)),
    *(of_llm(plant, 0, 2) for plant in (bait.unknown_tokenizer, bait.adapter_beside, bait.attention_from_the_hub)),
    *(of_part("llm", plant, *ends) for plant, ends in (
        (bait.pickles_beside, (0,)), (bait.pickle_instead, (2,)), (bait.unknown_model, (2,)),
        (bait.unknown_tokenizer, (0, 2)),
    )),
    *(of_part("tower", plant, *ends) for plant, ends in (
        (bait.pickles_beside, (0,)), (bait.pickle_instead, (2,)), (bait.auto_map_of_the_processor, (0,)),
    )),
    *(of_look(plant, 0, 2) for plant in (
        bait.pickles_beside, bait.pickle_instead, bait.unknown_model, bait.unknown_image_processor,
    )),
    *(of_checkpoint(name) for name in ("tensors.safetensors", "state.json")),
    Attack("isolator", _isolator, (2,)),
    Attack("beside a run", _beside_a_run, (0,)),
    Attack("picture", _picture, (2,)),
    Attack("cache", _cache, (0, 2)),
)  # fmt: skip


def check(world: World, before: dict[str, tuple]) -> list[str]:
    """What the witnesses saw since `before`, that should not be."""
    return [*world.wrong(OUTPUTS), *world.strays(before, OUTPUTS)]


def ended(name: str, ends: tuple[int, ...], code: int, said: str) -> list[str]:
    """A command ends as it should, and one that is refused says so in a line."""
    if code not in ends:
        return [f"{name}: exit code {code}, not {ends}:\n{said[-2000:]}"]
    said = said.replace("\r", "\n").strip().splitlines()
    if (code and not (said and said[-1].startswith("tinyspeed: "))) or any("Traceback" in line for line in said):
        return [f"{name}: exit code {code}, and no line that says why: {said[-20:]}"]
    return []


def at_once(world: World, chosen: list[str], attacks: list[Attack]) -> list[str]:
    """These commands and baits in one process; what went wrong."""
    furnish(world)
    every, code = commands(world), world.code
    lines = [attack.lay(world, world.given / "baits" / str(n), code(attack.name)) for n, attack in enumerate(attacks)]
    before = world.files()
    codes = world.lines([every[name] for name in chosen] + lines)
    goals = [(name, (0,)) for name in chosen] + [(attack.name, attack.ends) for attack in attacks]
    wrong = [line for goal, end in zip(goals, codes, strict=True) for line in ended(*goal, *end)]
    return wrong + check(world, before)


def one_by_one(world: World, draws: int, seed: int, say: Callable = print) -> tuple[dict[str, int], list[str]]:
    """Each in a process of its own, `scale` too; then several baits in one folder, so many times."""
    furnish(world)
    lost = []

    def alone(name: str, words: list[str], ends: tuple[int, ...]) -> None:
        before = world.files()
        code, said = world.line(words)
        found = [f"{name}: {line}" for line in check(world, before)] + ended(name, ends, code, said)
        say(f"{name}: {code}{' LOST' if found else ''}")
        lost.extend(found)

    for name, words in {**commands(world), "scale": SCALE}.items():
        if name == "resume":
            bait.copy(world.cwd / "runs" / "mine", world.given / "whole")
            interrupt(world)
        alone(name, words, (0,))
    for number, attack in enumerate(ATTACKS):
        alone(attack.name, attack.lay(world, world.given / "baits" / str(number), world.code(attack.name)), attack.ends)
    draw = random.Random(seed)
    for number in range(draws):
        plants = draw.sample(MIXED, draw.randrange(2, 5))
        name = " and ".join(plant.__name__ for plant in plants)

        def together(folder: Path, code: bait.Code, plants=plants) -> None:
            for plant in plants:
                plant(folder, code)

        of = draw.choice((of_model, of_look))
        lines = of(together).lay(world, world.given / "mixed" / str(number), world.code(name))
        alone(f"{of.__name__}: {name}", lines, (0, 2))
    tried = {"commands": len(commands(world)) + 1, "baits": len(ATTACKS), "several baits in one folder": draws}
    return tried, lost


MIXED = (
    *BESIDE, bait.adapter_beside, bait.unknown_model, bait.unknown_llm, bait.unknown_processor, bait.unknown_tokenizer,
    bait.unknown_image_processor, bait.attention_from_the_hub, bait.pickle_named_safetensors, bait.index_of_pickles,
    *map(bait.escape, range(len(bait.ESCAPES))),
)  # fmt: skip


if __name__ == "__main__":
    asked = outcomes.parser(__doc__, count=30).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder).resolve())
        tried, lost = one_by_one(world, asked.count, asked.seed, say=lambda line: print(line, flush=True))
        if not world.confined:
            print("without namespaces: seen by Python's hook and by the files alone")
    sys.exit(outcomes.write(asked.out, tried, lost))
