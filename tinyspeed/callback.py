"""DualSpeed under `transformers.Trainer`: two lines, and people keep their own loop.

    model = tinyspeed.DualSpeed(hf_model)
    Trainer(model=model, ..., callbacks=[SetStep(model)])

The callback tells the model which optimizer step it is in, so that every micro-batch of a step (and every rank, and a
resumed run) draws the same mode. It also refuses to go on when a step ended without our forward: TRL's SFTTrainer, for
one, replaces `forward` and can train the plain model in silence.
"""

from transformers import TrainerCallback

from .dualspeed import DualSpeed
from .errors import UserError


class SetStep(TrainerCallback):
    def __init__(self, model: DualSpeed):
        self.model = model
        self.forwards = 0

    def on_train_begin(self, args, state, control, **_):
        if args.n_gpu > 1:  # transformers would copy the model to each with nn.DataParallel, which loses the adapter
            raise UserError("several GPUs in one process are not supported: start one process a GPU, with torchrun")

    def on_step_begin(self, args, state, control, **_):
        self.model.step = state.global_step
        self.forwards = self.model.forwards

    def on_step_end(self, args, state, control, **_):
        if self.model.forwards == self.forwards:
            raise UserError(
                "the step ended without DualSpeed's forward: the trainer runs the wrapped model itself, unpruned. "
                "Use transformers.Trainer, or give back Trainer.compute_loss to your trainer class (README, drop-in)"
            )
