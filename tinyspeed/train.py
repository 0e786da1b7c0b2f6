"""The loop: recipe -> model -> data -> two stages of steps -> a plain Hugging Face folder.

    for step in stage:  plan = schedule.plan(step)
                        for micro-batch cut by the plan's rows:  loss = sum over its answers / answers of the whole
                        batch clip, check that everything is finite, step

What a step does follows from (recipe, seed, step) alone, so a killed run that resumes from a checkpoint ends with the
same bits as one that was never killed (on a CPU, with the same number of threads). Numbers are fetched from the device
once a step, together with the finite check that must come before the optimizer anyway.

The speed-up shown is measured, not promised: before each stage one full step is timed on the stage's first batch and
thrown away, and `speed-up = seconds that full steps would have taken / seconds taken`, by rows. Evaluation, saving and
the probe itself are outside of both clocks.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, digits, record, scheduler, vlm
from .batching import Order, cut, plan_rows
from .data import Source, collate
from .dualspeed import DualSpeed
from .errors import UserError
from .recipe import Recipe, Stage
from .rows import IGNORE
from .scheduler import Plan, Schedule

SECTION = {"align": "align", "tune": "train"}  # the recipe's name of each stage


@dataclass
class Totals:
    """What the run has done so far; part of every checkpoint."""

    steps: int = 0  # over both stages
    seconds: float = 0.0
    rows: int = 0  # rows the LLM saw, teachers' included
    rows_full: int = 0  # rows that full training would have shown it
    full_seconds: float = 0.0  # and the time it would have taken, by the probes


@dataclass
class Result:
    model: DualSpeed
    totals: Totals
    stopped_by: int | None = None  # the signal that ended the run early

    @property
    def speedup(self) -> float:
        return self.totals.full_seconds / max(self.totals.seconds, 1e-9)


def train(recipe: Recipe, *, resume: bool = False, bar: bool = True) -> Result:
    """Run a recipe from the start, or from its newest checkpoint."""
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    folder = recipe.folder
    state, tensors = _begin(recipe, folder, resume)
    model, source = build(recipe)
    totals = Totals(**state["totals"]) if state else Totals()
    torch.manual_seed(recipe.run.seed)  # after building: dropout is the only thing that draws from here on
    with _stop_requested() as stop:
        for number, (name, stage) in enumerate(recipe.stages()):
            if state and number < state["stage"]:
                continue
            run = StageRun(recipe, model, source, name, number, stage, totals)
            if state and number == state["stage"]:
                run.restore(tensors, state)
                tensors = None
            run.go(folder, stop, bar)
            if stop:
                return Result(model, totals, stop[0])
    if not (folder / "model" / "config.json").is_file():
        export(model, recipe, folder / "model")
    return Result(model, totals)


def _begin(recipe: Recipe, folder: Path, resume: bool) -> tuple[dict | None, dict[str, Tensor] | None]:
    """Make or reopen the run's folder; the newest checkpoint if there is one to resume from."""
    checkpoints = folder / "checkpoints"
    newest = checkpoint.newest(checkpoints)
    if not resume and (newest or (folder / "metrics.jsonl").exists()):
        raise UserError(f"{folder} holds a run already: --resume continues it, or choose another run.name")
    if resume and not folder.exists():
        raise UserError(f"there is no run to resume in {folder}")
    checkpoints.mkdir(parents=True, exist_ok=True)
    for half in checkpoint.unfinished(checkpoints):
        print(f"ignoring {half}: it was being written when the run was killed", file=sys.stderr)
    text = recipe.to_toml()
    if resume and (folder / "recipe.toml").exists() and (folder / "recipe.toml").read_text(encoding="utf-8") != text:
        raise UserError(
            f"the recipe is not the one {folder} was started with ({folder / 'recipe.toml'}); resume with that"
        )
    checkpoint.write_atomically(folder / "recipe.toml", text)
    record.write(folder / "record.json", seed=recipe.run.seed)
    if newest is None:
        (folder / "metrics.jsonl").write_text("")
        return None, None
    tensors, state = checkpoint.load(newest)
    if state["threads"] != torch.get_num_threads():
        print(
            f"the run used {state['threads']} threads and goes on with {torch.get_num_threads()}: "
            f"its weights will be right, but not bit-identical to an uninterrupted run",
            file=sys.stderr,
        )
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    checkpoint.write_atomically(folder / "metrics.jsonl", "".join(lines[: state["totals"]["steps"]]))
    return state, tensors


def build(recipe: Recipe) -> tuple[DualSpeed, Source]:
    """The wrapped model and the training examples of a recipe."""
    path = base(recipe)
    # Far more pictures than any run looks at: every picture is new.
    source = digits.Digits(1_000_000, recipe.data.turns, "train", recipe.run.seed)
    settings = recipe.dualspeed
    model = DualSpeed(
        vlm.load(path, recipe.model.dtype),
        plugin=settings.plugin,
        keep=settings.keep,
        isolator=settings.isolator,
        temperature=settings.temperature,
        positions=settings.positions,
        layout=settings.layout,
        schedule=_schedule(recipe, "tune"),
        seed=recipe.run.seed,
    )
    return model.to(_device(recipe.run.device)), source


def base(recipe: Recipe) -> str:
    """Where the untrained model is; the embedded default's is made on first use."""
    if recipe.model.path:
        return recipe.model.path
    return str(digits.prepare(recipe.folder / "base", recipe.run.seed, **asdict(recipe.digits)))


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError('run.device = "cuda", but torch finds no CUDA device; use "auto" or "cpu"')
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def _schedule(recipe: Recipe, stage: str) -> Schedule:
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
        vlm.set_trainable(model.model, name)
        model.schedule = _schedule(recipe, name)
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
                entry = self._step(step, full_seconds_per_row)
                metrics.write(json.dumps(entry) + "\n")
                metrics.flush()
                line.set_postfix_str(
                    f"{entry['mode']} loss {entry['loss']:.3f} {entry['rows_per_second']:,.0f} rows/s "
                    f"{entry['speedup']:.2f}x full",
                    refresh=False,
                )
                line.update()
                last = step + 1 == self.steps
                if stop or last or (step + 1) % self.recipe.run.save_every == 0:
                    self.save(folder / "checkpoints", step + 1)
                if stop:
                    return

    def _micro_batches(self, step: int, plan: Plan) -> tuple[list[dict[str, Tensor]], int]:
        """The step's batches, and how many answer tokens they hold together."""
        chosen = self.order.batch(step, self.stage.batch)
        rows = [plan_rows(*self.source.lengths(i), plan, len(self.model.isolator)) for i in chosen]
        pad = self.model.config.text_config.pad_token_id or 0  # masked: its value does not matter
        batches = [
            collate([self.source.example(chosen[i]) for i in part], pad) for part in cut(rows, self.stage.row_budget)
        ]
        answers = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
        return [{k: v.to(self.model.device) for k, v in batch.items()} for batch in batches], answers

    def _forward_backward(self, step: int, plan: Plan) -> dict:
        """Gradients of one optimizer batch, and its summed metrics. Numbers stay on the device."""
        batches, answers = self._micro_batches(step, plan)
        self.model.step = step
        total = {"loss": 0.0, "ce": 0.0, "kl": 0.0, "rows_kept": 0, "rows_taught": 0, "rows_full": 0}
        for batch in batches:
            out = self.model(**batch, plan=plan, num_items_in_batch=answers)
            out.loss.backward()
            total["loss"] += out.loss.detach()
            for name in ("ce", "kl"):
                total[name] += out.metrics[name] * (out.metrics["answers"] / answers)
            for name in ("rows_kept", "rows_taught", "rows_full"):
                total[name] += out.metrics[name]
        return {**total, "answers": answers}

    def _step(self, step: int, full_seconds_per_row: float) -> dict:
        began = time.perf_counter()
        plan = self.model.schedule.plan(step)
        lr = learning_rate(self.stage, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        done = self._forward_backward(step, plan)
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.names if p.grad is not None], self.stage.clip)
        numbers = torch.stack(
            [done["loss"], norm, done["ce"], done["kl"]]
        ).tolist()  # the step's one wait for the device
        if not all(map(math.isfinite, numbers[:2])):
            raise UserError(
                f"step {self.totals.steps + 1} ({plan.mode}): loss {numbers[0]}, gradient norm {numbers[1]}. Stopped "
                f"before the optimizer used them; the last checkpoint is good. Try a lower {SECTION[self.name]}.lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        took = time.perf_counter() - began

        t = self.totals
        t.steps, t.seconds = t.steps + 1, t.seconds + took
        rows = done["rows_kept"] + done["rows_taught"]
        t.rows, t.rows_full = t.rows + rows, t.rows_full + done["rows_full"]
        t.full_seconds += done["rows_full"] * full_seconds_per_row
        loss, norm, ce, kl = numbers
        return {
            "step": t.steps, "stage": self.name, "mode": plan.mode, "loss": loss, "ce": ce, "kl": kl, "grad_norm": norm,
            "lr": lr, "answers": done["answers"], "rows_kept": done["rows_kept"], "rows_taught": done["rows_taught"],
            "rows_full": done["rows_full"], "rows_per_second": rows / took, "seconds": t.seconds,
            "speedup": t.full_seconds / t.seconds, "memory_mib": record.peak_memory_mib(),
        }  # fmt: skip

    def _probe(self) -> float:
        """Seconds a row of a full step (forward and backward), measured on this stage's first batch and undone."""
        plan, seconds = Plan("full"), math.inf
        with torch.random.fork_rng():
            for _ in range(2):  # the first pays for memory that later steps reuse
                began = time.perf_counter()
                done = self._forward_backward(0, plan)
                float(done["loss"])  # wait for the device
                seconds = min(seconds, time.perf_counter() - began)
                self.optimizer.zero_grad(set_to_none=True)
        return seconds / done["rows_full"]

    def save(self, folder: Path, step: int) -> None:
        tensors = {f"model/{name}": p for p, name in self.names.items()}
        tensors |= checkpoint.optimizer_tensors(self.optimizer, self.names)
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
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
        if "rng/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng/cuda"])
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


def load_trained(recipe: Recipe) -> DualSpeed:
    """The model of a run as its newest checkpoint has it, isolator included."""
    newest = checkpoint.newest(recipe.folder / "checkpoints")
    if newest is None:
        raise UserError(f"{recipe.folder} has no checkpoint yet")
    tensors, state = checkpoint.load(newest)
    model, _ = build(recipe)
    vlm.set_trainable(model.model, recipe.stages()[state["stage"]][0])
    load_parameters({p: n for n, p in model.named_parameters() if p.requires_grad}, tensors)
    return model


def export(model: DualSpeed, recipe: Recipe, out: Path) -> None:
    """The plain model, without isolator, with its processor: transformers alone can load it."""
    temporary = out.with_name(f".{out.name}.tmp")
    model.model.save_pretrained(temporary)
    processor = vlm.load_processor(base(recipe))
    processor.save_pretrained(temporary)
    temporary.rename(out)


@contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM puts its number into; a second one ends the process as usual."""
    stop: list[int] = []
    before = {}

    def ask(number, frame):
        stop.append(number)
        print(
            f"\n{signal.Signals(number).name}: finishing this step, then saving; once more to quit at once",
            file=sys.stderr,
        )
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread: signals are somebody else's business
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
