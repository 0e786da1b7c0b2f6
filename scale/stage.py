"""One stage on many ranks: the core's own steps, each on its part of every batch.

    batch -> deal(rows of its samples, ranks) -> as many micro-batches on each rank, of nearly equal rows
    loss of a rank = its answers' loss / answers of the whole batch;   gradient = sum over ranks

so two ranks compute what one rank does in two micro-batches. What a step does follows from (seed, step), and how long
samples are is known to every rank, so ranks agree about plan, batch and division without a word; a hash of all that is
compared every `check_every` steps, to be told if it is not so. With one rank everything is the core's, bit for bit.
Checkpoints are copied first, and written while training goes on.
"""

import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
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

from .dealing import Alike, deal
from .planner.traffic import Model
from .world import World

SUMMED = ("loss", "ce", "kl", "ce_teacher", "rows_kept", "rows_taught", "rows_full")


class ShardedStage(StageRun):
    """A `StageRun` whose model is sharded over `mesh`."""

    def __init__(self, world: World, mesh: DeviceMesh, recipe, model, source, name, number, stage, totals):
        self.world, self.mesh, self.settings = world, mesh, recipe.scale
        self.lead, self.processes = world.leads, world.size
        self.forwards = 0  # that this step still has
        self.writer = ThreadPoolExecutor(1)
        self.writing: tuple[Future, Path, dict] | None = None  # the checkpoint under way
        super().__init__(recipe, model, source, name, number, stage, totals)
        if recipe.scale.window > 1:
            seed = recipe.run.seed + number
            self.order = Alike(source.lengths, len(source), seed, stage.batch, recipe.scale.window)

    @property
    def _shards(self) -> dist.ProcessGroup:
        return self.mesh.get_group("shard")

    def _parts(self, step: int, plan: Plan) -> Iterator[tuple[list[int], list[int]]]:
        """This rank's micro-batches. One without rows is a sample run for the sake of the others, and nothing is
        learned of it: all ranks must meet in as many forwards."""
        chosen = self.order.batch(step, self.stage.batch)
        rows = [plan_rows(*self.source.lengths(i)[:2], plan, len(self.model.isolator)) for i in chosen]
        for part in deal(rows, self.world.size, self.stage.row_budget)[self.world.rank]:
            if part:
                yield [chosen[i] for i in part], [rows[i] for i in part]
            else:
                yield [chosen[min(range(len(rows)), key=rows.__getitem__)]], []

    def _micro_batch(self, batch: dict[str, Tensor], rows: list[int], plan: Plan, answers: int) -> Output:
        self.world.at(f"in a {plan.mode} micro-batch of step {self.totals.steps + 1}")
        self.forwards -= 1
        if self.mesh.ndim > 1:  # copies of the model add up their gradients once a step
            self.model.set_requires_all_reduce(self.forwards <= 0)
        idle = not rows
        if idle:
            batch, rows = {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}, [batch["labels"].shape[1]]
        with self._fitting(plan.mode, rows):  # here too: in the core's probe it may be caught, and others would wait
            out = super()._micro_batch(batch, rows, plan, answers)
        self.world.at(f"behind a {plan.mode} micro-batch of step {self.totals.steps + 1}")
        if idle:
            out.metrics.update(rows_kept=0, rows_taught=0, rows_full=0)
        return out

    def _forward_backward(self, step: int, plan: Plan, batches: Iterator[dict[str, Tensor]]) -> dict:
        self.forwards = sum(1 for _ in self._parts(step, plan))
        return super()._forward_backward(step, plan, batches)

    def _step(self, step: int, batches: Iterator[dict[str, Tensor]], full_seconds_per_row: float | None) -> dict:
        if step % self.settings.check_every == 0:
            said = (asdict(self.model.schedule.plan(step)), self.order.batch(step, self.stage.batch))
            self.world.agree(f"step {self.totals.steps + 1}", said)
        return super()._step(step, batches, full_seconds_per_row)

    def _probe(self) -> float | None:
        """Seconds a row of all ranks together. Where no step sees whole pictures, they need not fit the memory."""
        modes = {self.model.schedule.plan(step).mode for step in range(self.first, self.steps)}
        if modes == {"fast"} and self.model.device.type == "cuda":
            return None
        found = super()._probe()
        return found and found / self.world.size

    def _rows_that_fit(self) -> float:
        if self.stage.checkpointing != "auto":
            return super()._rows_that_fit()
        settings = memory.Settings.of(self.recipe, self.name, self.precision)
        coming = Model(memory.Shape(self.model.config), settings).coming(self._shards.size())
        return memory.rows_that_fit(self.model, settings, coming)

    def _announce(self) -> None:
        if self.lead:
            super()._announce()

    def _stops(self, stop: list[int]) -> bool:
        """Whether any rank is asked to stop; then all are. And whether all have written their checkpoints."""
        number, writing = self.world.most(stop[0] if stop else 0, bool(self.writing) and not self.writing[0].done())
        if number and not stop:
            stop.append(number)
        if not writing:
            self.settle()
        return number > 0

    def _together(self, done: dict) -> dict:
        if self.world.size == 1:
            return done
        sums = iter(self.world.sums([*(done[name] for name in SUMMED), *done["influence"]]))
        numbers = {name: n.float() if name in SUMMED[:4] else int(n) for name, n in zip(SUMMED, sums, strict=False)}
        return {**done, **numbers, "influence": [n.float() for n in sums]}

    def _sum(self, numbers: Tensor) -> Tensor:
        return numbers if self.world.size == 1 else self.world.sums([numbers])[0].float()

    def _gate(self) -> Gate | None:
        self.world.at("reading the reference's losses", patient=True)
        gate = super()._gate()
        known = gate and gate.memory.reference
        self.world.agree("the reference's losses", None if known is None else zlib.crc32(known.tobytes()))
        return gate

    def _gradients(self) -> list[Tensor]:
        return [self._local(p.grad)[0] for p in self.names if p.grad is not None]

    def _norms(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of all ranks, copies of the model included: what is not finite on one is so on all, and all stop."""
        norm, beside = (n.to(self.model.device) for n in super()._norms(gradients))
        if self.world.size == 1:
            return norm, beside
        squares, beside = self.world.sums([norm.double().square(), beside])
        copies = self.world.size // self._shards.size()
        return (squares / copies).sqrt().float(), beside.float()

    def _find_cause(self) -> tuple[int, str, str]:
        """With which rank it began, where that can be known: gradients are of all ranks."""
        place, *found = super()._find_cause()
        place, rank, said, mend = min(self.world.gather([(place, self.world.rank, *found)]))
        return place, said if place >= diagnosis.SHARED else f"on rank {rank} {said}", mend

    def _update(self, plan: Plan, loss: Tensor, others: list[Tensor]) -> tuple[list[float | None], bool]:
        try:
            return super()._update(plan, loss, others)
        except UserError:  # not finite, which all ranks see: the checkpoint under way is good
            self.settle()
            raise

    def _local(self, tensor: Tensor) -> tuple[Tensor, int]:
        if not isinstance(tensor, DTensor):
            return tensor, 0
        here, every = tensor.to_local(), len(tensor)
        per = -(-every // self._shards.size())
        return here, min(every, per * self._shards.rank())

    def save(self, folder: Path, step: int) -> None:
        """Each rank copies its rows, and writes them while training goes on: of all weights of a 7B model and their
        moments a rank of 8 has 10 GB, and a disk is slower than memory."""
        self.settle()
        self.world.at(f"copying the checkpoint of step {self.totals.steps}")
        state = {**self._state(step), "step": self.totals.steps}
        unfit = checkpoint.not_finite(((n, self._local(t)[0]) for n, t in self._tensors().items()), state)
        if found := [of for of in self.world.gather([unfit and f"on rank {self.world.rank} {unfit}"]) if of]:
            raise checkpoint.refusal(self.totals.steps, found[0])
        temporary = checkpoint.temporary_folder_of(folder, self.totals.steps)
        if self.world.leads:
            checkpoint.begin(folder, self.totals.steps)
        self.world.wait()
        here, rows = self._mine()
        part = f"-{self.world.rank:05d}-of-{self.world.size:05d}" if self.world.size > 1 else ""
        self.writing = self.writer.submit(checkpoint.write, temporary, here, rows, part), temporary, state

    def _mine(self) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
        """Copies of what this rank writes; and of tensors in parts, its first row and the rows of all."""
        here, rows, rank = {}, {}, self.world.rank
        for name, tensor in self._tensors().items():
            local, begin = self._local(tensor)
            if isinstance(tensor, DTensor):
                if rank < self._shards.size() and len(local):  # the first copy of the model is enough
                    here[name], rows[name] = local, (begin, len(tensor))
            elif rank == 0 or name.startswith("rng/"):
                here[name + (f"/{rank}" if rank else "")] = tensor
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in here.items()}, rows

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is whole, and give it its name."""
        if self.writing is None:
            return
        (future, temporary, state), self.writing = self.writing, None
        self.world.at(f"writing the checkpoint of step {state['step']}")
        written = self.world.gather([future.result()])
        if self.world.leads:
            files = {name: found for of in written for name, found in of.items()}
            checkpoint.finish(temporary, state, files, self.recipe.run.keep_checkpoints)
        self.world.wait()

    def _restore_random_state(self, saved: checkpoint.Saved) -> None:
        """Each rank as it drew before; one that was not there before draws on its own."""
        mine = f"/{self.world.rank}" if self.world.rank else ""
        if f"rng/cpu{mine}" not in saved:
            torch.manual_seed(hash((self.recipe.run.seed, self.totals.steps, self.world.rank)))
            return
        torch.set_rng_state(saved[f"rng/cpu{mine}"])
        if f"rng/cuda{mine}" in saved and self.model.device.type == "cuda":
            torch.cuda.set_rng_state(saved[f"rng/cuda{mine}"], self.model.device)
