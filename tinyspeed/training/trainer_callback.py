"""DualSpeed under `transformers.Trainer`, in two lines.

    model = tinyspeed.DualSpeed(hf_model)
    Trainer(model=model, ..., callbacks=[SetStep(model)])

The callback tells the model which optimizer step it is in, so that all micro-batches of a step, all ranks and a resumed
run draw the same mode. It tells the schedule what a step measured, summed over micro-batches and ranks, and keeps the
schedule's state in the Trainer's. It raises an error if a step ended without DualSpeed's forward: TRL's SFTTrainer, for
one, replaces `forward` and can silently train the plain model.
"""

import torch
from torch import distributed, nn
from transformers import TrainerCallback

from ..dualspeed import DualSpeed
from ..scheduler import Schedule
from ..util import UserError

STATE = "tinyspeed"  # the key of our entry in trainer_state.json


class SetStep(TrainerCallback):
    def __init__(self, model: DualSpeed):
        self.model = model
        self.forwards = 0
        self.begin = model.schedule.state_dict()
        self.seen: list[dict] = []  # the metrics of this step's forwards
        model.register_forward_hook(self._look)

    def _look(self, model: nn.Module, given: tuple, out) -> None:
        listens = type(model.schedule).observe is not Schedule.observe  # reading numbers waits for the device
        if model.training and listens:
            self.seen.append(out["metrics"])

    def on_train_begin(self, args, state, control, **_):
        if args.n_gpu > 1:  # transformers would copy the model to each with nn.DataParallel, which loses the adapter
            raise UserError("several GPUs in one process are not supported: start one process a GPU, with torchrun")
        self.model.schedule.load_state_dict(state.stateful_callbacks.get(STATE, self.begin))

    def on_step_begin(self, args, state, control, **_):
        self.model.step = state.global_step
        self.forwards = self.model.forwards
        self.seen.clear()

    def on_step_end(self, args, state, control, **_):
        if self.model.forwards == self.forwards:
            what = "the step ended without DualSpeed's forward: the trainer runs the wrapped model itself, unpruned"
            mend = "Use transformers.Trainer, or give your trainer class Trainer.compute_loss back"
            raise UserError(f"{what}. {mend} (guide, your-own-loop)")
        if self.seen:
            self._observe()
        state.stateful_callbacks[STATE] = self.model.schedule.state_dict()

    def _observe(self) -> None:
        sums = 0
        for seen in self.seen:
            count = torch.tensor(float(seen["answers"]), device=self.model.device)
            losses = [seen[name].float() * seen["answers"] for name in ("ce", "ce_teacher")]
            sums = sums + torch.stack([count, *losses, *seen["influence"].float()])
        if distributed.is_initialized():
            distributed.all_reduce(sums)
        answers, ce, ce_teacher, *influence = sums.tolist()
        if answers and sums.isfinite().all():  # half precision may overflow, and the Trainer leaves such a step out
            means = {"ce": ce / answers, "ce_teacher": ce_teacher / answers, "influence": influence}
            known = {"step": self.model.step, "answers": answers, **means}
            self.model.schedule.observe(self.model.schedule.plan(self.model.step), known)
