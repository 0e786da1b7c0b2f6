"""What people run today, on the same weights, samples, precision and optimizer as ours.

hf       the model's own forward. Batches are padded as a processor pads them, in the order of the data; every
         activation is checkpointed; gradients are accumulated and clipped: transformers' `Trainer` without its
         bookkeeping
trl      `SFTTrainer.compute_loss` in the same loop, where TRL is installed. TRL rewrites its model, so it has modules
         of its own around the same weights. It hooks every module that embeds, so the frozen tower has a backward too

Both train the same parameters as ours, with torch's fused AdamW, which is the Trainer's default too. On a GPU batches
are pinned, as the Trainer's are.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from ..data import digits_model
from ..data.examples import collate
from ..models import precision
from ..models.families import family
from ..training.loop import StageRun


def baselines(run: StageRun, micro: int) -> dict[str, Callable[[], float]]:
    """Returns by name: one optimizer step on all samples of the run, `micro` at a time, which returns its loss."""
    samples = range(len(run.source))
    batches = [batch_of(run, samples[first : first + micro]) for first in range(0, len(samples), micro)]
    answers = sum(run.source.lengths(i)[2] for i in samples)
    model, vlm = run.model.model, run.model.vlm

    def hf(checkpointing: bool) -> float:
        vlm.as_ours(False)
        vlm.recompute(checkpointing)
        try:
            return _step(run, batches, lambda batch: model(**batch, use_cache=False, num_items_in_batch=answers).loss)
        finally:
            vlm.as_ours(True)

    found = {"hf": partial(hf, True), "hf, nothing recomputed": partial(hf, False)}
    if find_spec("trl") and run.recipe.model.quantise == "none":  # of a 4-bit model it casts what the others train
        found["trl"] = _trl(run, batches, answers)
    return found


def _trl(run: StageRun, batches: list[dict[str, Tensor]], answers: int) -> Callable[[], float]:
    import datasets
    import trl

    weights = [*run.model.model.parameters(), *run.model.model.buffers()]
    model = copy.deepcopy(run.model.model, {id(weight): weight for weight in weights})
    family(model).as_ours(False)
    unused = datasets.Dataset.from_dict({"images": [None], "messages": [[]]})  # SFTTrainer insists on data
    with tempfile.TemporaryDirectory() as folder:
        how = trl.SFTConfig(
            folder, report_to=[], save_strategy="no", use_cpu=run.model.device.type == "cpu", disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, how, train_dataset=unused, data_collator=list, processing_class=digits_model.build_processor()
        )
    model.train()
    model.gradient_checkpointing_enable()
    return lambda: _step(run, batches, lambda batch: trainer.compute_loss(model, batch, num_items_in_batch=answers))


def batch_of(run: StageRun, samples: Iterable[int]) -> dict[str, Tensor]:
    """Returns a batch that is ready before the clock starts."""
    batch = collate([run.source.example(i) for i in samples], run.pad)
    return {name: value.pin_memory() for name, value in batch.items()} if run.model.device.type == "cuda" else batch


def _step(run: StageRun, batches: Iterable[dict[str, Tensor]], loss: Callable) -> float:
    device, optimizer, total = run.model.device, run.optimizer, 0.0
    for batch in batches:
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        with precision.autocast(run.precision, device):
            part = loss(batch)
        part.backward()
        total += part.detach()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, run.stage.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)
