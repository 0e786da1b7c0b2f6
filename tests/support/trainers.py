"""A tiny model, pictures and arguments for `transformers.Trainer`."""

import torch
from transformers import TrainingArguments

from tinyspeed import DualSpeed
from tinyspeed.adaptive import AdaptiveSchedule
from tinyspeed.data import digits, digits_model
from tinyspeed.data.examples import collate
from tinyspeed.scheduler import Combined
from tinyspeed.sts import LayerSkipper


class Pictures(torch.utils.data.Dataset):
    def __init__(self, n):
        self.source = digits.Digits(n, 2)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return {"example": self.source.example(i)}


def adapting() -> DualSpeed:
    schedule = AdaptiveSchedule(slow=0.9, keep=0.3, gap=0.001)
    schedule.block = 2
    base = digits_model.build_model(0, width=32, layers=2, tower_width=16, tower_layers=1)
    base.model.vision_tower.requires_grad_(False)
    return DualSpeed(base, schedule=Combined(schedule, LayerSkipper(2, 0.5, "influence", 0, 0, every=0)))


def arguments(folder, **kw):
    given = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    return TrainingArguments(
        folder, report_to=[], remove_unused_columns=False, use_cpu=True, logging_steps=1, disable_tqdm=True,
        **{"save_strategy": "no", **given, **kw},
    )  # fmt: skip


def gather(items):
    return collate([item["example"] for item in items], 0)


def wrapped(**kw):
    model = digits_model.build_model(0, width=32, layers=1, tower_width=16, tower_layers=1)
    model.model.vision_tower.requires_grad_(False)
    return DualSpeed(model, positions="original", **kw)
