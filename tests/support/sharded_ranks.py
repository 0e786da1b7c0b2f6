"""What several ranks compute beside one process: torchrun runs this for test_two_ranks.py, and it writes what it found.

    torchrun --nproc-per-node 2 sharded_ranks.py HOME OUT.json

Starting two processes costs seven seconds, so all cases share a start. Rank 0 also takes the same step by itself, as
the core does, which is the oracle.
"""

import json
import shutil
import signal
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import torch
from support import tiny
from support.runs import settings
from torch.distributed.tensor import DTensor

from scale import loop, ranks, run, shard
from tinyspeed import UserError, adaptive
from tinyspeed.data import loader
from tinyspeed.scheduler import Plan
from tinyspeed.training import build
from tinyspeed.training.loop import StageRun, Totals
from tinyspeed.util import paths, provenance

PLANS = {
    mode: Plan(mode, keep=0.3, distill=float(mode == "slow"), measure=mode != "fast")
    for mode in ("fast", "slow", "full")
}
SKIPPING = {mode: replace(plan, layers=(0, 2), measure=False) for mode, plan in PLANS.items()}  # of three
CASES = {
    "llava": (),
    "llava lora": ("lora.rank=4",),
    "llava 4-bit lora": ("lora.rank=4", "model.quantise=nf4"),
    "llava copies": ("scale.shard=1",),  # HSDP: every rank holds a copy
    "llava copies in turns": ("scale.shard=1", "train.row_budget=60"),
    "llava lora copies": ("scale.shard=1", "train.row_budget=60", "lora.rank=4"),
    "llava recomputed": ("lora.rank=4", "train.checkpointing=on"),
    "llava without isolator": ("lora.rank=4", "dualspeed.isolator=0"),
    "llava views in turns": ("lora.rank=4", "dualspeed.views=true", "train.row_budget=60"),
    "llava views 4-bit": ("lora.rank=4", "dualspeed.views=true", "model.quantise=nf4", "train.checkpointing=on"),
    "llava bf16": ("model.precision=bf16",),
    "llava kept gathered": ("scale.reshard=false",),
    "llava bf16 lora": ("model.precision=bf16", "lora.rank=4"),
    "llava offloaded": ("scale.offload=true",),
    "llava one a rank": ("train.batch=2",),  # one of them has no picture
    "llava idle": ("train.batch=3", "train.row_budget=1"),  # a rank has one sample, and two forwards to run
    "llava_next": (),
    "llava_next idle": ("lora.rank=4", "train.batch=3", "train.row_budget=1"),
    "llava_next lora": ("lora.rank=4",),
    "llava_next 4-bit lora": ("lora.rank=4", "model.quantise=nf4"),
    "llava skipping": (),
    "llava skipping lora copies": ("scale.shard=1", "train.row_budget=60", "lora.rank=4"),
    "llava skipping kept gathered": ("scale.reshard=false", "train.row_budget=60"),
    "llava glances": ("dualspeed.plugin=tokenlearner",),
    "llava_next glances idle": ("dualspeed.plugin=tokenlearner", "lora.rank=4", "train.batch=3", "train.row_budget=1"),
    "llava_next dynamic lora": ("dualspeed.plugin=dynamicvit", "lora.rank=4"),
    "llava bf16 glances": ("model.precision=bf16", "dualspeed.plugin=tokenlearner"),
    "llava weighted": ("dualspeed.weights=cells", "train.row_budget=60"),
    "llava bf16 weighted": ("dualspeed.weights=cells", "model.precision=bf16", "lora.rank=4"),
    "llava_next merging": ("dualspeed.plugin=tome",),
    "llava_next skipping idle": ("lora.rank=4", "train.batch=3", "train.row_budget=1"),
}
STEP = 1
LOSSES = ("loss", "ce", "kl", "ce_teacher")


def gradients(model) -> dict[str, torch.Tensor]:
    return whole({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def trained(model) -> dict[str, torch.Tensor]:
    return whole({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of all rows."""
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}


def one(made, plan: Plan) -> tuple[list[float], list[float], dict[str, torch.Tensor], float, dict[str, torch.Tensor]]:
    """Losses, influence of layers and gradients as the core computes them, in one process; and how far a step goes, and
    where it leads."""
    model, source = build.build(made)
    alone = StageRun(made, model, source, "train", 0, made.train, Totals())
    parts = (part for part, _ in alone._parts(STEP, plan))
    done = alone._forward_backward(STEP, plan, loader.batches(source, parts, 0))
    gradients, before = tiny.gradients(model), trained(model)
    alone._update(plan, done["loss"], [])
    after = trained(model)
    losses = [done[of].item() for of in LOSSES]
    return losses, done["influence"].tolist(), gradients, apart(before, after), after


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The distance between two models."""
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


def parity(here: ranks.Ranks, home: Path, name: str, changes: tuple[str, ...]) -> dict:
    made = settings(home, home.parent / f"run{here.rank}", "run", "lora.dropout=0.0", *changes, family=name.split()[0])
    source, mesh = run.read_source(made, here), here.device_mesh(made.scale.shard)
    found = {}
    for mode, plan in (SKIPPING if "skipping" in name else PLANS).items():
        model = run.sharded_model(made, "train", here, mesh, None)
        sharded = loop.ShardedStage(here, mesh, made, model, source, "train", 0, made.train, Totals())
        parts = list(sharded._parts(STEP, plan))
        done = sharded._forward_backward(STEP, plan, loader.batches(source, (part for part, _ in parts), 0))
        done = sharded._together(done)
        norm, every = float(sharded._norms(sharded._gradients())[0]), gradients(model)
        sharded._update(plan, done["loss"], [])
        after = trained(model)
        forwards = here.gather([[len(rows) for _, rows in parts]])
        if here.is_main:
            losses, influence, want, way, alone = one(made, plan)
            whole = torch.nn.utils.get_total_norm(want.values()).item()
            found[mode] = {
                "losses": [[done[of].item() for of in LOSSES], losses],
                "influence": [[n.item() for n in done["influence"]], influence],
                "norm": [norm, whole],
                # From fp32's, a gradient in bf16 is 1.3 % of the largest away; here are two of them.
                "different": tiny.difference(every, want, rel=0.03 if "bf16" in name else 1e-5),
                "samples": forwards,
                "way": [apart(after, alone), way],
            }
    return found


def adapting(here: ranks.Ranks, home: Path) -> dict:
    """A run whose steps depend on what those before have measured: its modes and shares, on each rank and alone."""
    adaptive.BLOCK = 2
    changes = ("lora.rank=4", "lora.dropout=0.0", "train.row_budget=60", "train.lr=0.001")
    changes += ("dualspeed.schedule=adaptive", "dualspeed.slow=0.8", "dualspeed.gap=0.002")
    made = settings(home, home.parent / f"run{here.rank}", "run", *changes)
    source, mesh = run.read_source(made, here), here.device_mesh(made.scale.shard)
    model = run.sharded_model(made, "train", here, mesh, None)
    found = here.gather([steps(loop.ShardedStage(here, mesh, made, model, source, "train", 0, made.train, Totals()))])
    if here.is_main:
        model, source = build.build(made)
        return {"ranks": found, "alone": steps(StageRun(made, model, source, "train", 0, made.train, Totals()))}
    return {}


def steps(part: StageRun) -> tuple[list[str], list[float]]:
    batches = loader.batches(part.source, part._ahead(), part.pad)
    modes = [part._step(step, batches, None)["mode"] for step in range(part.steps)]
    return modes, part.model.schedule.shares


def told(of) -> str:
    try:
        of()
    except UserError as error:
        return str(error)
    return "nothing"


def mistakes(here: ranks.Ranks, home: Path) -> dict:
    """What every rank is told when something is wrong on one."""

    made = settings(home, home.parent / f"run{here.rank}", "run", "lora.rank=4", "train.steps=2")
    other = settings(home, home.parent / f"run{here.rank}", "run", "lora.rank=4", f"train.lr={0.1 + here.rank}")
    source, mesh = run.read_source(made, here), here.device_mesh(0)
    alive = []

    def watched(model, *given, **how):
        whole = [weakref.ref(p) for layer in model.vlm.language_model.layers for p in layer.parameters()]
        shard.shard(model, *given, **how)
        alive.append(sum(ref() is not None for ref in whole))

    run.shard = watched
    model = run.sharded_model(made, "train", here, mesh, None)
    sharded = loop.ShardedStage(here, mesh, made, model, source, "train", 0, made.train, Totals())
    backward = sharded._micro_batch

    def broken(*given):
        out = backward(*given)
        out.loss = out.loss * (float("nan") if here.rank == 1 else 1.0)
        return out

    sharded._micro_batch = broken
    batches = loader.batches(source, sharded._ahead(), 0)

    def poisoned(key: str, value: float) -> list[str]:
        """What is said if rank 1 has this in what it remembers of a parameter, or in the parameter itself."""
        sharded._micro_batch = backward
        p = next(p for p in sharded.names if len(sharded._local(p)[0]))
        there = sharded._local(sharded.optimizer.state[p][key] if key else p.detach())[0].view(-1)
        was = there[0].item()
        there[0] = value if here.rank == 1 else was
        if key:
            said = told(lambda: sharded._step(0, loader.batches(source, sharded._ahead(), 0), None))
        else:
            said = told(lambda: sharded.save(home / "never", 1))
        there[0] = was
        return here.gather([said])

    stop, calm = [signal.SIGTERM] * (here.rank == 1), []
    return {
        "alive": here.gather(alive),
        "recipes": here.gather([told(lambda: run.require_same_recipe(other, here))]),
        "stops": here.gather([(sharded._stops(stop), stop)]),
        "goes on": here.gather([(sharded._stops(calm), calm)]),
        "late": here.gather([sharded._stops(calm, here.rank == 1)]),
        "NaN": here.gather([told(lambda: sharded._step(0, batches, None))]),
        "moment": poisoned("exp_avg_sq", float("inf")),
        "saving": poisoned("", float("nan")),
        "steps": here.gather([sharded.totals.steps]),
        "disagree": here.gather([told(lambda: here.require_same("the weather", here.rank))]),
        "agree": here.gather([told(lambda: here.require_same("the weather", "fine"))]),
        "divide": here.gather([told(lambda: here.device_mesh(3))]),
    }


def other_files(here: ranks.Ranks, home: Path) -> dict:
    """What every rank is told when rank 1 has a copy of its own, and another one."""
    mine, found = home.parent / f"copies{here.rank}", {}

    def changed(name: str, change) -> None:
        folder = mine / name
        shutil.copytree(home, folder)
        (folder / paths.ISOLATOR).write_bytes(b"an isolator")
        if here.rank == 1:
            change(folder)
        places = (f"data.file={folder}/train.json", f"data.images={folder}/images", f"model.path={folder}/llava")
        places += (f"dualspeed.isolator_from={folder}",)
        made = settings(home, home.parent / f"run{here.rank}", "run", "lora.rank=4", *places)
        found[name] = here.gather([told(lambda: run.read_source(made, here))])

    def edit(change):
        def edited(folder: Path) -> None:
            records = json.loads((folder / "train.json").read_text())
            (folder / "train.json").write_text(json.dumps(change(records)))

        return edited

    def a_letter(records: list) -> list:
        turn = records[4]["conversations"][0]
        turn["value"] = turn["value"].replace("What", "Whet")
        return records

    def flip(name: str, at: int):
        def flipped(folder: Path) -> None:
            content = bytearray((folder / name).read_bytes())
            content[at] ^= 1
            (folder / name).write_bytes(content)

        return flipped

    changed("nothing", lambda folder: None)
    changed("a letter", edit(a_letter))
    changed("the order", edit(lambda records: records[::-1]))
    changed("fewer", edit(lambda records: records[:-1]))
    changed("a picture", flip("images/p1-0.png", 400))
    changed("a weight", flip("llava/model.safetensors", -2))
    changed("an isolator", lambda folder: (folder / paths.ISOLATOR).write_bytes(b"another one"))
    changed("the tokenizer", lambda folder: (folder / "llava" / "tokenizer.json").open("a").write("\n"))
    program = mine / "program"
    for package in ("tinyspeed", "scale"):
        shutil.copytree(Path(run.__file__).parents[1] / package, program / package)
    provenance.__file__ = str(program / "tinyspeed" / "util" / "provenance.py")
    changed("another program", lambda folder: (program / "scale" / "loop.py").open("a").write("# a comment\n"))
    return found


def main(home: str, out: str) -> None:
    torch.set_num_threads(1)
    with ranks.join() as here:
        found = {name: parity(here, Path(home), name, changes) for name, changes in CASES.items()}
        found["mistakes"] = mistakes(here, Path(home))
        found["adapting"] = adapting(here, Path(home))
        found["other files"] = other_files(here, Path(home))
        if here.is_main:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
