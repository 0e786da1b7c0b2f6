"""`transformers.Trainer` on several ranks: torchrun runs this for test_torchrun.py, and it writes what rank 0 trained.

torchrun --nproc-per-node 2 trainer_ranks.py FOLDER
"""

import sys
from pathlib import Path

import torch
from support.trainers import Pictures, adapting, arguments, gather, wrapped
from torch import distributed
from transformers import Trainer

from tinyspeed.models import lora
from tinyspeed.scheduler import PeriodicSchedule
from tinyspeed.training.trainer_callback import SetStep

SAMPLES = 8  # of a step


def half_slow():
    return wrapped(schedule=PeriodicSchedule(slow=0.5, keep=0.1))


def with_lora():
    model = half_slow()
    model.model = lora.add_lora(model.model, rank=4)
    model.model.base_model.model.model.multi_modal_projector.requires_grad_(True)
    return model


CASES = {
    "whole": (half_slow, {}),
    "lora, recomputed": (with_lora, {"gradient_checkpointing": True}),
    "adaptive, skipping": (adapting, {}),
}


def train(name: str, folder: Path, ranks: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights after eight steps, and the schedule's state."""
    make, how = CASES[name]
    torch.manual_seed(0)
    model = make()
    given = arguments(
        folder, max_steps=8, per_device_train_batch_size=SAMPLES // ranks, optim="sgd", learning_rate=0.1, **how
    )
    Trainer(model, given, train_dataset=Pictures(64), data_collator=gather, callbacks=[SetStep(model)]).train()
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, model.schedule.state_dict()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for number, name in enumerate(CASES):
        found = train(name, folder, ranks=2)
        rank = distributed.get_rank()
        torch.save(found, folder / f"{number}-{rank}.pt")
    distributed.destroy_process_group()  # its threads could abort a process that ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
