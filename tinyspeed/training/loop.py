"""The training loop: one stage with its optimizer, its schedule and its steps.

    for step:  plan = schedule.plan(step)
               for each micro-batch, cut by the plan's rows:  loss = sum over its answers / answers of the whole batch
               clip the gradients, check that everything is finite, step the optimizer

The speed-up shown is an estimate. Before the stage a full forward and backward on its first batch is timed (the probe):

    speed-up = seconds that full steps would have taken, by their number of rows / seconds taken

That is as good as one timing can be; `tinyspeed compare` measures whole runs. Saving and the probe are not counted.
When checkpoints are written depends on the clock, and changes no bit of the run: saving draws no random numbers.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import loader
from ..data.examples import Source
from ..dualspeed import DualSpeed, Output
from ..models import attention, memory, precision, stages
from ..recipe import Recipe, StageSection
from ..recipe.schedules import schedule_of
from ..rows import plan_rows
from ..scheduler import Plan
from ..util import NotFinite, UserError, counted, errors, files, finite, malloc, provenance, require
from ..util.sending import to_device
from . import checkpoint, diagnosis, metrics, optimizer
from .answer_gate import Gate
from .batching import Order, cut
from .run_folder import fingerprint, log_fingerprint

PATIENCE = 5.0  # seconds after which the probe repeats its measurement no more


def seconds_since(began: float) -> float:
    """Never 0 or less, also if the clock was set back."""
    return max(time.perf_counter() - began, 1e-6)


@dataclass
class Totals:
    """What the run has done so far, and with which base model. It is part of every checkpoint."""

    steps: int = 0  # over both stages
    seconds: float = 0.0
    rows: int = 0  # that the LLM saw, teachers included
    rows_full: int = 0  # that full training would have shown it
    full_seconds: float = 0.0  # that full training would have taken, by the probes
    base: dict[str, str] = field(default_factory=dict)  # `build.base_files`; earlier versions did not save it

    @property
    def speedup(self) -> float | None:
        """None as long as it is too early to tell, or if a full step does not fit on the device and was not timed."""
        early = self.steps < 50 and self.seconds < 60  # starting the worker processes may have taken most of it
        return self.full_seconds / self.seconds if self.full_seconds and not early else None


class StageRun:
    """One stage of a run.

    If several processes share a stage (`scale`), each trains on its part of every batch. What they must agree on passes
    through `_together`, `_sum`, `_stops`, `_norms` and `_find_cause`, which do nothing special in a single process.
    """

    lead = True  # whether this process writes the log
    processes = 1

    def __init__(
        self, recipe: Recipe, model: DualSpeed, source: Source, name: str, number: int, stage: StageSection,
        totals: Totals,
    ):  # fmt: skip
        if model.device.type == "cpu":
            malloc.keep_freed_memory()
        self.recipe, self.model, self.source = recipe, model, source
        self.name, self.number, self.stage, self.totals = name, number, stage, totals
        self.steps = stage.total(len(source))
        self.first = 0  # the step that it begins with
        self.stopped = False
        stages.set_trainable(model.model, name)
        model.schedule = schedule_of(recipe, name, model.config.text_config.num_hidden_layers)
        model.chooser.switch(recipe.pruning(name)[0])
        model.train()
        model.activation_checkpointing_enable()  # each micro-batch then decides whether it needs it
        self.names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        connector = {id(p) for p in [*model.vlm.connector(), *model.only_training.values()]}
        its, others = ([p for p in self.names if (id(p) in connector) == among] for among in (True, False))
        self.optimizer = optimizer.make_optimizer(stage, its, others)
        self.order = Order(len(source), recipe.run.seed + number)
        self.precision = precision.resolve(recipe.model.precision, model.device)
        self.scale = precision.LossScale.of(self.precision)
        self.pad = model.config.text_config.pad_token_id or 0  # masked, so its value does not matter
        self.rows_that_fit = self._rows_that_fit()
        self.gate = self._gate()
        self.seen = diagnosis.Seen()

    def _gate(self) -> Gate | None:
        """What decides which answers are skipped, if the recipe asks for ReGATE."""
        skips = self.name == "train" and self.recipe.regate.keep < 1
        base = self.recipe.model.path or str(self.recipe.folder / "base")  # where `build.base_model` puts its model
        return Gate(self.recipe, self.source, self.model.device, base) if skips else None

    def _rows_that_fit(self) -> float:
        """The number of rows up to which a micro-batch's activations fit on the device. Larger ones are recomputed."""
        if self.stage.checkpointing != "auto":
            return 0 if self.stage.checkpointing == "on" else math.inf
        return memory.rows_that_fit(self.model, memory.Settings.of(self.recipe, self.name, self.precision))

    def go(self, folder: Path, stop: list[int], bar: bool) -> None:
        if self.first >= self.steps:
            return
        self._announce()
        full_seconds_per_row = self._probe()
        # A schedule that adapts allows batches to be made only so many steps ahead, and each holds a step at most.
        workers = int(min(self.recipe.data.workers, self.model.schedule.ahead / loader.PREFETCH))
        pin = self.model.device.type == "cuda"
        batches = loader.batches(self.source, self._ahead(), self.pad, workers=workers, pin=pin)
        how = {"unit": "step", "disable": not bar, "mininterval": 0.2}
        line = tqdm(total=self.steps, initial=self.first, desc=self.name, **how)
        saved = time.perf_counter()
        with loader.explaining_crashes(), closing(batches), metrics.logging(folder, self.lead) as log, line:
            for step in range(self.first, self.steps):
                with diagnosis.naming_the_step(self):
                    entry = self._step(step, batches, full_seconds_per_row)
                log(entry)
                note = " skipped" if entry["skipped"] else ""
                speed = f"{entry['rows_per_second']:,.0f} tokens/s"
                speed += f" {entry['speedup']:.2f}x full" if entry["speedup"] else ""
                line.set_postfix_str(f"{entry['mode']} loss {entry['loss']:.3f}{note} {speed}", refresh=False)
                line.update()
                # Asked once a step, since a signal may come at any moment.
                self.stopped, late = self._stops(stop, self._late(step, seconds_since(saved)))
                if self.stopped or late or step + 1 == self.steps or (step + 1) % self.recipe.run.save_every == 0:
                    if self.lead:  # after a power cut the log must reach as far as the checkpoint
                        with files.errors_about(folder / metrics.LOG):
                            files.flush(folder / metrics.LOG)
                    self.save(folder / "checkpoints", step + 1)
                    saved = time.perf_counter()
                if self.stopped:
                    return

    def _stops(self, stop: list[int], late: bool = False) -> tuple[bool, bool]:
        """Whether the run stops, and whether a checkpoint is late: in all processes the same."""
        return bool(stop), late

    def _late(self, step: int, seconds: float) -> bool:
        """Whether the newest checkpoint, so many seconds old, is too old. At the end of an epoch a tenth is enough."""
        ends = (step + 1) * self.stage.batch % len(self.source) < self.stage.batch
        return seconds >= self.recipe.run.save_minutes * (6 if ends else 60)

    def _announce(self) -> None:
        """Says which of steps and epochs counts, if both are given. Warns of a short run that draws no slow step: its
        model never sees a whole picture and is poor at them."""
        if self.lead and self.stage.steps and self.stage.epochs:
            used, ignored = f"{self.name}.steps = {self.stage.steps}", f"{self.name}.epochs = {self.stage.epochs:g}"
            print(f"{used} is used, {ignored} is not", file=sys.stderr)
        modes = {self.model.schedule.plan(step).mode for step in range(min(self.steps, 10_000))}
        if self.lead and self.name == "train" and "fast" in modes and "slow" not in modes:
            more = "train for more steps (more train.epochs, a smaller train.batch)"
            more += ', or set dualspeed.schedule = "periodic" and a larger dualspeed.slow'
            print(f"in {counted(self.steps, 'step')} no whole picture is seen: {more}", file=sys.stderr)

    @contextmanager
    def _fitting(self, mode: str, rows: list[int]) -> Iterator[None]:
        """Turns running out of memory into advice."""
        try:
            yield
        except Exception as error:
            if not errors.no_memory(error):
                raise
            advice = f"set {self.name}.row_budget below that (or a smaller {self.name}.batch)"
            if len(rows) == 1:
                advice = f'set {self.name}.checkpointing = "on", model.quantise = "nf4" or a smaller data.max_rows'
            part = f"a {mode} micro-batch of {len(rows) * max(rows):,} tokens ({counted(len(rows), 'sample')})"
            what = f"step {self.totals.steps + 1}: {part} does not fit into memory"
            raise UserError(f"{what}; {advice}; `tinyspeed estimate` says what fits") from error

    def _parts(self, step: int, plan: Plan) -> Iterator[tuple[list[int], list[int]]]:
        """The step's micro-batches: samples, and the rows of each."""
        chosen = self.order.batch(step, self.stage.batch)
        rows = [plan_rows(*self.source.lengths(i)[:2], plan, len(self.model.isolator)) for i in chosen]
        for part in cut(rows, self.stage.row_budget):
            yield [chosen[i] for i in part], [rows[i] for i in part]

    def _ahead(self) -> Iterator[list[int]]:
        """The samples of every micro-batch of the steps that are left."""
        for step in range(self.first, self.steps):
            for part, _ in self._parts(step, self.model.schedule.plan(step)):
                yield part

    def _forward_backward(self, step: int, plan: Plan, batches: Iterator[dict[str, Tensor]]) -> dict:
        """Computes the gradients of one optimizer batch, times the loss scale, and returns its summed metrics."""
        chosen = self.order.batch(step, self.stage.batch)
        answers = sum(self.source.lengths(i)[2] for i in chosen)
        if self.gate:
            answers = self.gate.begin(chosen, plan.answer_keep)
        require(answers > 0, f"step {self.totals.steps + 1}: no sample of its batch has an answer to learn")
        self.model.step = step
        means, sums = ("ce", "kl", "ce_teacher"), ("influence", "rows_kept", "rows_taught", "rows_full")
        total = {"loss": 0.0, **dict.fromkeys(means, 0.0), **dict.fromkeys(sums, 0)}
        for part, rows in self._parts(step, plan):
            batch = next(batches)
            if self.gate:
                batch = self.gate.mark(part, batch)
            self.seen.parts.append(part)
            with self._fitting(plan.mode, rows):
                out = self._micro_batch(batch, rows, plan, answers)
            self.seen.add(out)
            if self.gate:
                self.gate.ran(out.metrics["losses"])
            total["loss"] += out.loss.detach()
            for name in means:
                total[name] += out.metrics[name] * (out.metrics["answers"] / answers)
            for name in sums:
                total[name] += out.metrics[name]
        return {**total, "answers": answers}

    def _micro_batch(self, batch: dict[str, Tensor], rows: list[int], plan: Plan, answers: int) -> Output:
        """Forward and backward."""
        device = self.model.device
        # Only pixels: of whole numbers, the forward's plan is made on the CPU.
        batch = {name: to_device(t, device) if t.is_floating_point() else t for name, t in batch.items()}
        self.model.vlm.recompute(self.laid_out(rows) > self.rows_that_fit)
        with precision.autocast(self.precision, device):
            out = self.model(**batch, plan=plan, num_items_in_batch=answers)
        (out.loss * self.scale.scale).backward()
        return out

    def laid_out(self, rows: list[int]) -> int:
        """The slots that these samples take: their rows if they are packed, otherwise padding too."""
        with precision.autocast(self.precision, self.model.device):
            packed = attention.has_packed_kernel(self.model.isolator.weight)
        return sum(rows) if packed and self.model.layout != "padded" else len(rows) * max(rows)

    def _together(self, done: dict) -> dict:
        """Turns sums over this process's part of the batch into sums over the whole batch."""
        return done

    def _sum(self, numbers: Tensor) -> Tensor:
        """The same for a tensor."""
        return numbers

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.names if p.grad is not None]

    def _norms(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The norm of the gradients, and the norm of the weights and moments that the optimizer reads besides."""
        beside = finite.norm(self._local(t)[0] for t in optimizer.tensors_read(self.optimizer))
        return torch.nn.utils.get_total_norm(gradients), beside

    def _find_cause(self) -> tuple[int, str, str]:
        return diagnosis.find_cause(self)

    def _update(self, plan: Plan, loss: Tensor, others: list[Tensor]) -> tuple[list[float | None], bool]:
        """Clips, checks that all is finite, and steps. Returns the log's numbers, and whether it overflowed."""
        gradients = self._gradients()
        norm, beside = self._norms(gradients)
        norm = norm / self.scale.scale
        factor = (self.stage.clip / (norm + 1e-6)).clamp(max=1.0) / self.scale.scale
        numbers = torch.stack([norm, beside, loss, *others]).tolist()  # the step's one wait for the device
        rest = all(map(math.isfinite, numbers[1:]))  # the loss scale can only make the gradients overflow
        fine = rest and math.isfinite(numbers[0])
        if not fine and not (rest and self.scale.overflowed()):
            raise diagnosis.stopped(self, numbers)
        if fine:
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
            self.optimizer.step()
            self.scale.stepped()
        self.optimizer.zero_grad(set_to_none=True)
        return [n if math.isfinite(n) else None for n in numbers], not fine

    def _step(self, step: int, batches: Iterator[dict[str, Tensor]], full_seconds_per_row: float | None) -> dict:
        began = time.perf_counter()
        if found := finite.bad_number({"schedule": self.model.schedule.state_dict(), "scale": self.scale.state_dict()}):
            raise NotFinite(f"the state of {found}")
        plan = self.model.schedule.plan(step)
        self.seen = diagnosis.Seen(plan.mode)
        share = optimizer.learning_rate(self.stage, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * share
        done = self._together(self._forward_backward(step, plan, batches))
        others = [done["ce"], done["kl"], done["ce_teacher"], *done["influence"]]
        (norm, _, loss, ce, kl, ce_teacher, *influence), skipped = self._update(plan, done["loss"], others)
        if not skipped:
            known = {"step": step, "answers": done["answers"], "ce": ce, "ce_teacher": ce_teacher}
            self.model.schedule.observe(plan, {**known, "influence": influence})
            if self.gate:
                self.gate.learn(self._sum(self.gate.losses()))
        took = seconds_since(began)

        t = self.totals
        t.steps, t.seconds = t.steps + 1, t.seconds + took
        rows = done["rows_kept"] + done["rows_taught"]
        t.rows, t.rows_full = t.rows + rows, t.rows_full + done["rows_full"]
        t.full_seconds += done["rows_full"] * (full_seconds_per_row or 0.0)
        return {
            "step": t.steps, "stage": self.name, "mode": plan.mode, "loss": loss, "ce": ce, "kl": kl,
            "ce_teacher": ce_teacher if done["rows_taught"] else None, "grad_norm": norm, "skipped": skipped,
            "lr": self.stage.lr * share, "answers": done["answers"],
            "layers": len(plan.layers) if plan.layers else None,
            "rows_kept": done["rows_kept"], "rows_taught": done["rows_taught"], "rows_full": done["rows_full"],
            "rows_per_second": rows / took, "seconds": t.seconds, "speedup": t.speedup,
            "memory_mib": provenance.peak_memory_mib(self.model.device),
        }  # fmt: skip

    def _probe(self) -> float | None:
        """Measures the seconds a row of a full step takes (forward and backward) on the first micro-batch, and throws
        the gradients away. None if a full step does not fit on the device: a run of fast steps does not need one."""
        device, seconds, plan = self.model.device, math.inf, Plan("full")
        on_cuda = [device] if device.type == "cuda" else []
        samples, rows = next(self._parts(0, plan))
        batch = next(loader.batches(self.source, [samples], self.pad))
        with torch.random.fork_rng(on_cuda):
            try:
                begins = time.perf_counter()
                for _ in range(5):  # the first ones also allocate memory, which later ones reuse
                    began = time.perf_counter()
                    out = self._micro_batch(batch, rows, plan, 1)
                    out.loss.item()  # wait for the device
                    seconds = min(seconds, seconds_since(began))
                    self.optimizer.zero_grad(set_to_none=True)
                    if self._stops([1] * (seconds_since(begins) > PATIENCE))[0]:
                        break
                return seconds / out.metrics["rows_full"]
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                return None
            finally:
                if on_cuda:  # the run's peak memory must not include the probe's
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)

    def rehearse(self, plan: Plan) -> dict[str, float]:
        """Takes one step of this plan on a micro-batch full of the longest example. Returns its rows, peak memory (on a
        CPU: of the process so far) and seconds. The weights change, so no training may follow."""
        device, plan = self.model.device, replace(plan, answer_keep=1.0)  # skipping no answer takes the most memory
        rows = [plan_rows(*self.source.lengths(i)[:2], plan, len(self.model.isolator)) for i in range(len(self.source))]
        longest = max(range(len(rows)), key=rows.__getitem__)
        share = math.ceil(self.stage.batch / self.processes)
        lengths = [rows[longest] for _ in next(cut([rows[longest]] * share, self.stage.row_budget))]
        batch = next(loader.batches(self.source, [[longest] * len(lengths)], self.pad))
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self.model.step = 0
        began = time.perf_counter()
        with self._fitting(plan.mode, lengths):
            for _ in range(2):  # the second one runs beside the gradients of the first
                out = self._micro_batch(batch, lengths, plan, 1)
        self._update(plan, out.loss.detach(), [])
        return {
            "samples": len(lengths), "rows": sum(lengths), "memory_mib": provenance.peak_memory_mib(device),
            "recompute": sum(lengths) > self.rows_that_fit, "seconds": time.perf_counter() - began,
        }  # fmt: skip

    def save(self, folder: Path, step: int) -> None:
        checkpoint.save(folder, self.totals.steps, self._tensors(), self._state(step), self.recipe.run.keep_checkpoints)

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs."""
        tensors = {f"model/{name}": p for p, name in self.names.items()}
        tensors |= checkpoint.optimizer_tensors(self.optimizer, self.names)
        tensors["rng/cpu"] = torch.get_rng_state()
        if self.model.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.model.device)
        return tensors | (self.gate.tensors() if self.gate else {})

    def _state(self, step: int) -> dict:
        return {
            "stage": self.number, "stage_step": step, "totals": asdict(self.totals), "recipe": fingerprint(self.recipe),
            "schedule": self.model.schedule.state_dict(), "scale": self.scale.state_dict(),
            "data": self.source.fingerprint, "reference": self.gate.reference if self.gate else "",
            "threads": torch.get_num_threads(), "log": log_fingerprint(self.recipe.folder) if self.lead else (0, 0),
        }  # fmt: skip

    def restore(self, saved: checkpoint.Saved, state: dict) -> None:
        mine = self._state(state["stage_step"])
        for what in ("data", "reference"):
            was, now = state.get(what, ""), mine[what]
            require(was == now, f"the {what} has changed since the run was stopped: it was {was}, and now it is {now}")
        checkpoint.fill({f"model/{name}": p for p, name in self.names.items()}, saved, self._local)
        checkpoint.load_optimizer(self.optimizer, self.names, saved, self._local)
        checkpoint.fill(self.gate.tensors() if self.gate else {}, saved)
        with checkpoint.reading(f"of step {state['step']}"):
            self.model.schedule.load_state_dict(state["schedule"])
            self.scale.load_state_dict(state["scale"])
        self._restore_random_state(saved)
        self.first = state["stage_step"]

    _local = staticmethod(checkpoint.unsharded)  # the part of a tensor that this process holds

    def _restore_random_state(self, saved: checkpoint.Saved, rank: str = "") -> None:
        torch.set_rng_state(saved[f"rng/cpu{rank}"])
        if f"rng/cuda{rank}" in saved and self.model.device.type == "cuda":
            torch.cuda.set_rng_state(saved[f"rng/cuda{rank}"], self.model.device)
