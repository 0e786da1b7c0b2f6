"""One stage of training on many ranks: the core's own steps, each on its part of every batch.

    batch -> assign(rows of its samples, ranks) -> equally many micro-batches on each rank, of nearly equal rows
    loss of a rank = its answers' loss / answers of the whole batch;   gradient = sum over ranks

So two ranks compute what one rank does in two micro-batches. What a step does follows from (seed, step), and every
rank knows how long the samples are, so ranks agree about plan, batch and assignment without communicating. A hash of
plan and batch is compared every `check_every` steps, to be sure. With one rank everything is the core's, bit for bit.
Checkpoints are copied first and written while training goes on.
"""

import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tinyspeed import UserError
from tinyspeed.dualspeed import Output
from tinyspeed.models import memory
from tinyspeed.rows import IGNORE, plan_rows
from tinyspeed.scheduler import Plan
from tinyspeed.training import checkpoint, diagnosis
from tinyspeed.training.answer_gate import Gate
from tinyspeed.training.loop import StageRun

from .balancing import LengthGroupedOrder, assign
from .planner.sharded_model import ShardedModel
from .ranks import Ranks

LOSSES, COUNTS = ("loss", "ce", "kl", "ce_teacher"), ("rows_kept", "rows_taught", "rows_full")


class ShardedStage(StageRun):
    """A `StageRun` whose model is sharded over `mesh`."""

    def __init__(self, ranks: Ranks, mesh: DeviceMesh, recipe, model, source, name, number, stage, totals):
        self.ranks, self.mesh, self.settings = ranks, mesh, recipe.scale
        self.lead, self.processes, self._shards = ranks.is_main, ranks.size, mesh.get_group("shard")
        self.forwards_left = 0  # in this step
        self.writer = ThreadPoolExecutor(1)
        self.writing: tuple[Future, Path, dict] | None = None  # the checkpoint that is being written
        super().__init__(recipe, model, source, name, number, stage, totals)
        if recipe.scale.window > 1:
            seed = recipe.run.seed + number
            self.order = LengthGroupedOrder(source.lengths, len(source), seed, stage.batch, recipe.scale.window)

    def _parts(self, step: int, plan: Plan) -> Iterator[tuple[list[int], list[int]]]:
        """This rank's micro-batches. One without rows teaches nothing: all ranks must run equally many forwards."""
        chosen = self.order.batch(step, self.stage.batch)
        rows = [plan_rows(*self.source.lengths(i)[:2], plan, len(self.model.isolator)) for i in chosen]
        for part in assign(rows, self.ranks.size, self.stage.row_budget)[self.ranks.rank]:
            if part:
                yield [chosen[i] for i in part], [rows[i] for i in part]
            else:
                yield [chosen[rows.index(min(rows))]], []

    def _micro_batch(self, batch: dict[str, Tensor], rows: list[int], plan: Plan, answers: int) -> Output:
        self.ranks.progress(f"in a {plan.mode} micro-batch of step {self.totals.steps + 1}")
        self.forwards_left -= 1
        if self.mesh.ndim > 1:  # copies of the model add up their gradients once a step
            self.model.set_requires_all_reduce(self.forwards_left <= 0)
        idle = not rows
        if idle:
            batch, rows = {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}, [batch["labels"].shape[1]]
        with self._fitting(plan.mode, rows):  # also during the core's probe, which would catch it while others wait
            out = super()._micro_batch(batch, rows, plan, answers)
        self.ranks.progress(f"after a {plan.mode} micro-batch of step {self.totals.steps + 1}")
        if idle:
            out.metrics.update(dict.fromkeys(COUNTS, 0))
        return out

    def _forward_backward(self, step: int, plan: Plan, batches: Iterator[dict[str, Tensor]]) -> dict:
        self.forwards_left = sum(1 for _ in self._parts(step, plan))
        return super()._forward_backward(step, plan, batches)

    def _step(self, step: int, batches: Iterator[dict[str, Tensor]], full_seconds_per_row: float | None) -> dict:
        if step % self.settings.check_every == 0:
            decided = (asdict(self.model.schedule.plan(step)), self.order.batch(step, self.stage.batch))
            self.ranks.require_same(f"step {self.totals.steps + 1}", decided)
        return super()._step(step, batches, full_seconds_per_row)

    def _probe(self) -> float | None:
        """Seconds per row of all ranks together. If no step sees whole pictures, they need not fit into memory."""
        modes = {self.model.schedule.plan(step).mode for step in range(self.first, self.steps)}
        if modes == {"fast"} and self.model.device.type == "cuda":
            return None
        found = super()._probe()
        return found and found / self.ranks.size

    def _rows_that_fit(self) -> float:
        if self.stage.checkpointing != "auto" or not memory.is_known(self.model.config):
            return super()._rows_that_fit()
        settings = memory.Settings.of(self.recipe, self.name, self.precision)
        coming = ShardedModel(memory.Shape(self.model.config), settings).coming(self._shards.size())
        return memory.rows_that_fit(self.model, settings, coming)

    def _stops(self, stop: list[int], late: bool = False) -> tuple[bool, bool]:
        """Whether any rank is asked to stop; then all stop. Also finishes a checkpoint that all ranks have written.
        While one is being written, it is too early for the next."""
        writing = bool(self.writing) and not self.writing[0].done()
        number, late, writing = self.ranks.max(stop[0] if stop else 0, late, writing)
        if number and not stop:
            stop.append(number)
        if not writing:
            self.settle()
        return number > 0, bool(late and not writing)

    def _together(self, done: dict) -> dict:
        if self.ranks.size == 1:
            return done
        sums = iter(self.ranks.sum([*(done[name] for name in LOSSES + COUNTS), *done["influence"]]))
        losses, counts = {name: next(sums).float() for name in LOSSES}, {name: int(next(sums)) for name in COUNTS}
        return {**done, **losses, **counts, "influence": [n.float() for n in sums]}

    def _sum(self, numbers: Tensor) -> Tensor:
        return numbers if self.ranks.size == 1 else self.ranks.sum([numbers])[0].float()

    def _gate(self) -> Gate | None:
        self.ranks.progress("reading the reference's losses", patient=True)
        gate = super()._gate()
        known = gate and gate.memory.reference
        self.ranks.require_same("the reference's losses", None if known is None else zlib.crc32(known.tobytes()))
        return gate

    def _gradients(self) -> list[Tensor]:
        return [self._local(p.grad)[0] for p in self.names if p.grad is not None]

    def _norms(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The norms over all ranks. What is not finite on one rank is so on all, and all stop."""
        norm, beside = (n.to(self.model.device) for n in super()._norms(gradients))
        if self.ranks.size == 1:
            return norm, beside
        squares, beside = self.ranks.sum([norm.double().square(), beside])
        copies = self.ranks.size // self._shards.size()
        return (squares / copies).sqrt().float(), beside.float()

    def _find_cause(self) -> tuple[int, str, str]:
        """Says with which rank it began, where that can be known: gradients belong to all ranks."""
        place, *found = super()._find_cause()
        place, rank, said, mend = min(self.ranks.gather([(place, self.ranks.rank, *found)]))
        return place, said if place >= diagnosis.SHARED else f"on rank {rank} {said}", mend

    def _update(self, plan: Plan, loss: Tensor, others: list[Tensor]) -> tuple[list[float | None], bool]:
        try:
            return super()._update(plan, loss, others)
        except UserError:  # something is not finite, which all ranks see; the checkpoint that is being written is good
            self.settle()
            raise

    def _local(self, tensor: Tensor) -> tuple[Tensor, int]:
        if not isinstance(tensor, DTensor):
            return tensor, 0
        here, every = tensor.to_local(), len(tensor)
        per = -(-every // self._shards.size())
        return here, min(every, per * self._shards.rank())

    def save(self, folder: Path, step: int) -> None:
        """Each rank copies its rows and writes them while training goes on: a disk is slower than memory, and of a 7B
        model's weights and moments each of 8 ranks has 10 GB."""
        self.settle()
        self.ranks.progress(f"copying the checkpoint of step {self.totals.steps}")
        state = {**self._state(step), "step": self.totals.steps}
        unfit = checkpoint.not_finite(((n, self._local(t)[0]) for n, t in self._tensors().items()), state)
        if found := [of for of in self.ranks.gather([unfit and f"on rank {self.ranks.rank} {unfit}"]) if of]:
            raise checkpoint.refusal(self.totals.steps, found[0])
        temporary = checkpoint.temporary_folder_of(folder, self.totals.steps)
        if self.lead:
            checkpoint.begin(folder, self.totals.steps)
        self.ranks.barrier()
        here, rows = self._mine()
        part = f"-{self.ranks.rank:05d}-of-{self.ranks.size:05d}" if self.ranks.size > 1 else ""
        self.writing = self.writer.submit(checkpoint.write, temporary, here, rows, part), temporary, state

    def _mine(self) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
        """Returns copies of the tensors that this rank writes, and for sharded ones (first row, rows of all ranks)."""
        here, rows, rank = {}, {}, self.ranks.rank
        for name, tensor in self._tensors().items():
            local, begin = self._local(tensor)
            if isinstance(tensor, DTensor):
                if rank < self._shards.size() and len(local):  # the first copy of the model is enough
                    here[name], rows[name] = local, (begin, len(tensor))
            elif rank == 0 or name.startswith("rng/"):
                here[name + (f"/{rank}" if rank else "")] = tensor
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in here.items()}, rows

    def settle(self) -> None:
        """Waits until the checkpoint that is being written is complete, and gives it its name."""
        if self.writing is None:
            return
        (future, temporary, state), self.writing = self.writing, None
        self.ranks.progress(f"writing the checkpoint of step {state['step']}")
        written = self.ranks.gather([future.result()])
        if self.lead:
            files = {name: found for of in written for name, found in of.items()}
            checkpoint.finish(temporary, state, files, self.recipe.run.keep_checkpoints)
        self.ranks.barrier()

    def _restore_random_state(self, saved: checkpoint.Saved) -> None:
        """Restores this rank's own state. A rank that was not there before gets a new one."""
        mine = f"/{self.ranks.rank}" if self.ranks.rank else ""
        if f"rng/cpu{mine}" in saved:
            super()._restore_random_state(saved, mine)
        else:
            torch.manual_seed(hash((self.recipe.run.seed, self.totals.steps, self.ranks.rank)))
