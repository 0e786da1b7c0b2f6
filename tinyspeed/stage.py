"""One stage of training: its optimizer, its schedule, its steps.

    for step:  plan = schedule.plan(step)
               for each micro-batch, cut by the plan's rows:  loss = sum over its answers / answers of the whole batch
               clip, check that everything is finite, step

The speed-up shown is an estimate from a measurement: before the stage one full forward and backward is timed on its
first batch and thrown away, and

    speed-up = seconds that full steps would have taken, by their rows / seconds taken

It is as good as that one timing; `tinyspeed compare` measures whole runs. Saving and the probe are in neither.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, record, scheduler, vlm
from .batching import Order, cut, plan_rows
from .data import Source, collate
from .dualspeed import DualSpeed
from .errors import UserError
from .recipe import Recipe, Stage
from .rows import IGNORE
from .scheduler import Plan, Schedule


@dataclass
class Totals:
    """What the run has done so far; part of every checkpoint."""

    steps: int = 0  # over both stages
    seconds: float = 0.0
    rows: int = 0  # rows the LLM saw, teachers' included
    rows_full: int = 0  # rows that full training would have shown it
    full_seconds: float = 0.0  # and the time it would have taken, by the probes

    @property
    def speedup(self) -> float | None:
        """None before the first step, and where a full step does not fit the device and could not be timed."""
        return self.full_seconds / self.seconds if self.full_seconds else None


def schedule_of(recipe: Recipe, stage: str) -> Schedule:
    """Aligning is all fast (unless the recipe trains without pruning altogether); tuning follows the recipe."""
    d = recipe.dualspeed
    kind = "fast" if stage == "align" and d.schedule != "full" else d.schedule
    return scheduler.build(kind, slow=d.slow, keep=d.keep, distill=d.distill, seed=recipe.run.seed)


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = math.ceil(stage.warmup * steps)
    if step < warm:
        return stage.lr * (step + 1) / warm
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class StageRun:
    """One stage: its optimizer, its schedule, its steps."""

    def __init__(
        self,
        recipe: Recipe,
        model: DualSpeed,
        source: Source,
        name: str,
        number: int,
        stage: Stage,
        totals: Totals,
    ):
        self.recipe, self.model, self.source = recipe, model, source
        self.name, self.number, self.stage, self.totals = name, number, stage, totals
        self.steps = stage.total(len(source))
        self.first = 0  # the step to begin with
        self.stopped = False
        vlm.set_trainable(model.model, name)
        model.schedule = schedule_of(recipe, name)
        model.train()
        self.names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.names), lr=stage.lr, betas=(0.9, stage.beta2), weight_decay=stage.weight_decay, fused=True
        )
        checkpoint.start_moments(self.optimizer)
        self.order = Order(len(source), recipe.run.seed + number)

    def go(self, folder: Path, stop: list[int], bar: bool) -> None:
        if self.first >= self.steps:
            return
        full_seconds_per_row = self._probe()
        with (
            open(folder / "metrics.jsonl", "a", encoding="utf-8") as metrics,
            tqdm(
                total=self.steps, initial=self.first, desc=self.name, unit="step", disable=not bar, mininterval=0.2
            ) as line,
        ):
            for step in range(self.first, self.steps):
                entry = self._fitting(self._step, step, full_seconds_per_row)
                metrics.write(json.dumps(entry) + "\n")
                metrics.flush()
                speedup = f" {entry['speedup']:.2f}x full" if entry["speedup"] else ""
                line.set_postfix_str(
                    f"{entry['mode']} loss {entry['loss']:.3f} {entry['rows_per_second']:,.0f} rows/s{speedup}",
                    refresh=False,
                )
                line.update()
                self.stopped = bool(stop)  # read once: a signal may come at any moment
                if self.stopped or step + 1 == self.steps or (step + 1) % self.recipe.run.save_every == 0:
                    self.save(folder / "checkpoints", step + 1)
                if self.stopped:
                    return

    def _fitting(self, function, step: int, *arguments):
        """`function(step, ...)`; running out of memory becomes advice."""
        try:
            return function(step, *arguments)
        except torch.OutOfMemoryError as error:
            plan = self.model.schedule.plan(step)
            most = max(len(rows) * max(rows) for _, rows in self._parts(step, plan))
            raise UserError(
                f"step {self.totals.steps + 1}: a {plan.mode} micro-batch of {most:,} rows does not fit into memory; "
                f"set {self.name}.row_budget below that (or a smaller {self.name}.batch)"
            ) from error

    def _parts(self, step: int, plan: Plan) -> Iterator[tuple[list[int], list[int]]]:
        """The step's micro-batches: samples, and the rows of each."""
        chosen = self.order.batch(step, self.stage.batch)
        rows = [plan_rows(*self.source.lengths(i), plan, len(self.model.isolator)) for i in chosen]
        for part in cut(rows, self.stage.row_budget):
            yield [chosen[i] for i in part], [rows[i] for i in part]

    def _forward_backward(self, step: int, plan: Plan) -> dict:
        """Gradients of one optimizer batch, and its summed metrics. Losses stay on the device."""
        pad = self.model.config.text_config.pad_token_id or 0  # masked: its value does not matter
        batches = [collate([self.source.example(i) for i in part], pad) for part, _ in self._parts(step, plan)]
        answers = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
        if answers == 0:
            raise UserError(f"step {self.totals.steps + 1}: no sample of its batch has an answer to learn")
        self.model.step = step
        total = {"loss": 0.0, "ce": 0.0, "kl": 0.0, "rows_kept": 0, "rows_taught": 0, "rows_full": 0}
        for batch in batches:
            batch = {name: value.to(self.model.device) for name, value in batch.items()}
            out = self.model(**batch, plan=plan, num_items_in_batch=answers)
            out.loss.backward()
            total["loss"] += out.loss.detach()
            for name in ("ce", "kl"):
                total[name] += out.metrics[name] * (out.metrics["answers"] / answers)
            for name in ("rows_kept", "rows_taught", "rows_full"):
                total[name] += out.metrics[name]
        return {**total, "answers": answers}

    def _step(self, step: int, full_seconds_per_row: float | None) -> dict:
        began = time.perf_counter()
        plan = self.model.schedule.plan(step)
        lr = learning_rate(self.stage, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        done = self._forward_backward(step, plan)
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.names if p.grad is not None], self.stage.clip)
        loss, norm, ce, kl = torch.stack([done["loss"], norm, done["ce"], done["kl"]]).tolist()  # waits for the device
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"step {self.totals.steps + 1} ({plan.mode}): loss {loss}, gradient norm {norm}. Stopped before the "
                f"optimizer used them, and nothing was saved. Start a new run with a lower {self.name}.lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        took = time.perf_counter() - began

        t = self.totals
        t.steps, t.seconds = t.steps + 1, t.seconds + took
        rows = done["rows_kept"] + done["rows_taught"]
        t.rows, t.rows_full = t.rows + rows, t.rows_full + done["rows_full"]
        t.full_seconds += done["rows_full"] * (full_seconds_per_row or 0.0)
        return {
            "step": t.steps, "stage": self.name, "mode": plan.mode, "loss": loss, "ce": ce, "kl": kl, "grad_norm": norm,
            "lr": lr, "answers": done["answers"], "rows_kept": done["rows_kept"], "rows_taught": done["rows_taught"],
            "rows_full": done["rows_full"], "rows_per_second": rows / took, "seconds": t.seconds,
            "speedup": t.speedup, "memory_mib": record.peak_memory_mib(self.model.device),
        }  # fmt: skip

    def _probe(self) -> float | None:
        """Seconds a row of a full step (forward and backward), measured on this stage's first batch and undone; None
        if a full step does not fit the device, which a run of fast steps need not care about."""
        device, seconds = self.model.device, math.inf
        on_cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(on_cuda):
            try:
                for _ in range(2):  # the first pays for memory that later steps reuse
                    began = time.perf_counter()
                    done = self._forward_backward(0, Plan("full"))
                    float(done["loss"])  # wait for the device
                    seconds = min(seconds, time.perf_counter() - began)
                    self.optimizer.zero_grad(set_to_none=True)
                return seconds / done["rows_full"]
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                return None
            finally:
                if on_cuda:  # the run's peak is its own, not the probe's
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)

    def save(self, folder: Path, step: int) -> None:
        tensors = {f"model/{name}": p for p, name in self.names.items()}
        tensors |= checkpoint.optimizer_tensors(self.optimizer, self.names)
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.model.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.model.device)
        state = {
            "stage": self.number,
            "stage_step": step,
            "totals": asdict(self.totals),
            "schedule": self.model.schedule.state_dict(),
            "threads": torch.get_num_threads(),
        }
        checkpoint.save(folder, self.totals.steps, tensors, state, self.recipe.run.keep_checkpoints)

    def restore(self, tensors: dict[str, Tensor], state: dict) -> None:
        load_parameters(self.names, tensors)
        checkpoint.load_optimizer(self.optimizer, self.names, tensors)
        self.model.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors and self.model.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng/cuda"], self.model.device)
        self.first = state["stage_step"]


def load_parameters(names: dict[Tensor, str], tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint's weights into the parameters of these names; all must be there."""
    with torch.no_grad():
        for parameter, name in names.items():
            saved = tensors.get(f"model/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise UserError(
                    f"the checkpoint has no {name} of shape {tuple(parameter.shape)}: it is of another model"
                )
            parameter.copy_(saved)
