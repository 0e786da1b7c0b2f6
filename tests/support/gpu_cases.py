"""Training steps of every kind, on a CPU and on a pretend GPU."""

import copy
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from hypothesis import strategies as st
from support import pretend_cuda, tiny, zoo
from torch import Tensor, nn

from tinyspeed import DualSpeed, add_lora, pruning
from tinyspeed.models import loading, precision, stages
from tinyspeed.models.families import family
from tinyspeed.pruning.signals import signals_of_model
from tinyspeed.rows import IGNORE, POSITIONS
from tinyspeed.scheduler import Plan

EVERY = (*tiny.FAMILIES, *tiny.VIDEO_FAMILIES)
MODES, LAYOUTS = ("full", "fast", "slow"), ("padded", "packed", "auto")
TUNING, SYSTEMS = ("full", "lora", "qlora"), ("none", "sts", "regate", "views")
VIDEOS = ((2, tiny.IMG, 3), (tiny.VID, 1, tiny.IMG, 4), (5,), (1, tiny.VID, 6))


# Which functions wait in some families: transformers' own code of their towers, for lengths or for pixels that are
# padding; and ours, for which rows stay, where text stands amid an image's rows.
AMID = (" encode: ", " prune: a copy to the CPU")
WAITS = {
    "llava_onevision": (" encode: ",), "gemma4": (" encode: ",), "mistral3": AMID, "smolvlm": AMID, "idefics3": AMID,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a step is."""

    family: str = "llava"
    plugin: str = "divprune"
    mode: str = "fast"
    positions: str = "original"
    layout: str = "auto"
    tuning: str = "lora"
    system: str = "none"
    precision: str = "fp32"
    sent: bool = False  # whether the whole batch is on the GPU, as Trainer sends it
    weights: str = "none"

    @property
    def possible(self) -> bool:
        skips = self.system != "regate" or self.mode != "slow"  # a slow step sees all answers
        adapters = self.system != "views" or self.tuning != "full"
        return skips and adapters and self.plugin in plugins(self.family)


@cache
def plugins(of: str) -> list[str]:
    """Those whose signals the family has."""
    return pruning.works_with(signals_of_model(family(base(of, "full"))))


@cache
def base(of: str, tuning: str) -> nn.Module:
    """A model to be copied, with its LLM in 4 bits for QLoRA."""
    net = zoo.model(of) if of in zoo.KINDS else tiny.model(of)
    if tuning != "qlora":
        return net
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(Path(folder))
        return loading.load_model(folder, "fp32", quantise="nf4")


def cases() -> st.SearchStrategy[Case]:
    choose = st.sampled_from
    return st.builds(
        Case, choose(EVERY), choose(pruning.names()), choose(MODES), choose(POSITIONS), choose(LAYOUTS),
        choose(TUNING), choose(SYSTEMS), choose(["fp32", "fp32", "bf16"]), st.booleans(),
        choose(pruning.WEIGHTS),
    ).filter(lambda case: case.possible)  # fmt: skip


def model_of(case: Case) -> DualSpeed:
    net = copy.deepcopy(base(case.family, case.tuning))
    if case.precision == "bf16":
        net = net.to(torch.bfloat16) if case.tuning != "qlora" else net
    if case.tuning != "full":
        net = add_lora(net, rank=4, views=case.system == "views")
        with torch.no_grad():  # at first B is zero, and A has no gradient
            for name, p in net.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    how = {"plugin": case.plugin, "positions": case.positions, "layout": case.layout, "views": case.system == "views"}
    model = DualSpeed(net, keep=0.3, isolator=2, weights=case.weights, **how)
    stages.set_trainable(model.model, "train")
    model.step = 3
    return model.train()


def plan_of(case: Case) -> Plan:
    skipping, sts = case.system == "regate", case.system == "sts"
    return Plan(
        case.mode, keep=0.3, distill=float(case.mode == "slow"), answer_keep=0.5 if skipping else 1.0,
        layers=(0, 2) if sts and case.mode != "slow" else None, measure=sts and case.mode == "slow",
    )  # fmt: skip


def batch_of(case: Case) -> dict[str, Tensor]:
    if case.family in zoo.KINDS:
        batch = zoo.batch(case.family)
    else:
        videos = case.family in tiny.VIDEO_FAMILIES and not pruning.entry(case.plugin).needs
        batch = tiny.batch(case.family, outlines=VIDEOS if videos else tiny.OUTLINES)
    if case.system == "regate":
        drawn = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(1)) < 0.5
        batch["answers"] = drawn | (batch["labels"] == IGNORE)
    return batch


@dataclass
class Done:
    """What a step came to, on the CPU."""

    loss: Tensor
    gradients: dict[str, Tensor]
    metrics: dict
    waits: Counter


def on_cpu(case: Case) -> Done:
    return _step(case, model_of(case), batch_of(case), torch.device("cpu"), Counter())


def on_gpu(case: Case) -> Done:
    with pretend_cuda.device() as gpu:
        model, batch = model_of(case).to("cuda"), batch_of(case)
        goes = lambda t: case.sent or t.is_floating_point()
        batch = {name: t.pin_memory().to("cuda", non_blocking=True) if goes(t) else t for name, t in batch.items()}
        gpu.waits.clear()
        return _step(case, model, batch, torch.device("cuda"), gpu.waits)


def _step(case: Case, model: DualSpeed, batch: dict[str, Tensor], device: torch.device, waits: Counter) -> Done:
    with precision.autocast(case.precision, device):
        out = model(**batch, plan=plan_of(case))
    out.loss.backward()
    waits = Counter(waits)  # what follows waits
    gradients = {name: g.cpu() for name, g in tiny.gradients(model).items()}
    metrics = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in out.metrics.items() if name != "features"}
    return Done(out.loss.detach().cpu(), gradients, metrics, waits)


def unlike(case: Case) -> str:
    """What is not on the GPU as on the CPU, or what the GPU waited for; "" if all is well."""
    here, there = on_cpu(case), on_gpu(case)
    whole = case.precision == "fp32"
    found = tiny.difference(there.loss, here.loss, rel=1e-5 if whole else 0.05)
    if whole:  # in half precision, the devices compute other operations in fp32
        found = found or tiny.difference(there.gradients, here.gradients)
    elif there.gradients.keys() != here.gradients.keys():
        found = "gradients of other parameters"
    for name in ("rows_kept", "rows_taught", "rows_full", "answers"):
        if there.metrics[name] != here.metrics[name]:
            found = found or f"{name} is {there.metrics[name]}, not {here.metrics[name]}"
    name = case.family.partition(",")[0]
    waits = {line: n for line, n in there.waits.items() if not any(part in line for part in WAITS.get(name, ()))}
    return found or ("" if case.sent or not waits else f"waits: {waits}")
