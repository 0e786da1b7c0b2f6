"""DualSpeed: one module around a vision-language model, one `forward` = encode -> select -> gather -> LLM -> loss.

    fast:  L = CE(model(isolator + pruned rows))
    slow:  L = CE(model(all rows)) + alpha * T^2 * KL( fast forward of the same batch, no grad || model(all rows) )
    full:  L = CE(model(all rows))

Most steps are fast; the rare slow ones keep the model good at what it will see at inference, and the fast mode, which
has had nine times the updates, teaches them. In `eval()` the module is the wrapped model and nothing else: no
isolator, no pruning, the very same forward.

What differs from the official code: images are encoded once for both halves of a slow step; the teacher runs without
dropout; anyres images are pruned after packing, over the whole image; logits exist for answer rows only; the mode is a
function of (seed, step); text-only batches touch the same parameters as others; positions stay `original`.

The trade-off: a slow step costs a full step and a bit. At r = 0.1 that is the larger part of the total, so how rare
slow steps may become decides the speed-up.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from . import rows, sts
from .distill import answer_loss, without_dropout
from .isolator import PromptIsolator, Views
from .models import attention
from .models.drop_in import DropIn
from .models.families import family
from .pruning import signals
from .pruning.choosing import Chooser
from .scheduler import DualSpeedSchedule, Plan, Schedule
from .util import finite
from .util.errors import UserError, unknown


@dataclass
class Output(ModelOutput):
    """What a training forward returns. A `ModelOutput`, because sharding hooks look inside those."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (answer rows, vocabulary), when asked for
    targets: Tensor | None = None  # (answer rows,), when asked for
    metrics: dict | None = None


class DualSpeed(DropIn):
    """Wraps a Hugging Face vision-language model for training.

    `plugin`, `keep`: which visual rows fast steps see, and what share of them. `slow`: the share of slow steps.
    `isolator`: rows of the mode isolator, 0 for none. `views`: each mode trains a LoRA of its own (`loading.add_lora`).
    `distill`, `temperature`: alpha and T. `positions`: "compact" or "original". `layout`: "padded", "packed", or "auto"
    (`attention.choose_layout`). `schedule`: instead of the default. `chunk`: answer rows whose logits exist at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plugin: str = "divprune",
        keep: float = 0.1,
        slow: float = 0.1,
        isolator: int = 4,
        views: bool = False,
        distill: float = 1.0,
        temperature: float = 1.0,
        positions: str = "original",
        layout: str = "auto",
        schedule: Schedule | None = None,
        chunk: int = 1024,
        seed: int = 0,
    ):
        super().__init__()
        if positions not in rows.POSITIONS:
            raise unknown("positions", positions, rows.POSITIONS)
        if layout not in rows.LAYOUTS:
            raise unknown("layout", layout, rows.LAYOUTS)
        if not 0 < temperature < math.inf:
            raise UserError(f"temperature = {temperature}: must be above 0")
        if chunk < 1:
            raise UserError(f"chunk = {chunk}: must be at least 1")
        self.model = model
        self.vlm = family(model)
        self.chooser = Chooser(self.vlm, plugin, keep, seed)
        self.isolator = PromptIsolator(isolator, self.vlm.hidden_size, seed=seed)
        # They stay fp32 in a bf16 model, as LoRA's adapters do: small updates would round away.
        for mine in (self.isolator, self.chooser):
            mine.to(model.get_input_embeddings().weight.device)
        self.views = Views(model, self.vlm.language_model, views)
        self.positions, self.layout = positions, layout
        self.temperature, self.chunk, self.seed = temperature, chunk, seed
        self.schedule = schedule or DualSpeedSchedule(slow=slow, keep=keep, distill=distill, seed=seed)
        self.step: int | None = None  # the optimizer step; whoever owns the loop sets it
        self.forwards = 0  # how often our training forward ran: the Trainer callback's proof that it is used at all

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_sizes_videos: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        tower_features: Tensor | None = None,
        labels: Tensor | None = None,
        answers: Tensor | None = None,
        plan: Plan | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = False,
    ) -> ModelOutput:
        """A Hugging Face processor's batch, as it is. The loss is divided by `num_items_in_batch` answer tokens, or by
        the batch's own number. Without a plan: the schedule's at `self.step`, or in eval mode the plain model.
        `answers`, bool like labels: which answer tokens stay (see `rows.elide`), for a plan that keeps but a share of
        them: only a memory of their difficulty knows which."""
        visual = {  # each by its name in the signature, which is where Trainer looks for the columns to keep
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "pixel_values_videos": pixel_values_videos,
            "image_sizes_videos": image_sizes_videos,
            "batch_num_images": batch_num_images,
            "tower_features": tower_features,
        }
        visual = {name: value for name, value in visual.items() if value is not None}
        if not self.training and plan is None:
            asked = {} if labels is None else {"labels": labels}
            self.views.use("slow")
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **visual, **asked)
        if labels is None:
            raise UserError("the batch has no labels: there is nothing to learn from")
        plan = self._planned(plan)
        if (plan.answer_keep < 1) != (answers is not None):
            raise UserError("answer_keep below 1 and `answers=`, which stay (a gating.Memory knows), go together")
        self.forwards += 1

        learned = labels if answers is None else labels.masked_fill(~answers, rows.IGNORE)
        features, heard, idle = self._looked(visual, plan)
        lengths = {kind: [len(image) for image in of] for kind, of in features.items()}
        full = rows.full(input_ids, attention_mask, learned, self.vlm.placeholders, lengths)
        every = len(full)
        if answers is not None:
            full = rows.elide(full, labels, answers, self.positions)

        images = [*itertools.chain(*features.values())]
        sizes = finite.norms(images)
        table, run, extra, teacher, taught_rows = images, full, 0.0, None, 0
        if plan.taught:
            self.views.use("fast")
            with torch.no_grad(), without_dropout(self.vlm.language_model), without_dropout(self.chooser):
                pruned, isolating, _ = self._pruned(input_ids, full, images, plan.keep, heard)
                teacher, taught_rows = self._answers(input_ids, pruned, isolating, plan)[0], len(isolating)
        elif plan.mode == "fast":
            table, run, extra = self._pruned(input_ids, full, images, plan.keep, heard)
        del features, images, heard  # of which a fast step keeps a tenth
        self.views.use("fast" if plan.mode == "fast" else "slow")  # and so it stays until the backward is over
        hidden, target, influence = self._answers(input_ids, [*table, *idle], run, plan)
        if len(target) == 0 and num_items_in_batch is None:  # as a part of a larger batch it may have none
            raise UserError("the batch has no answer tokens: every label is ignored")
        total = len(target) if num_items_in_batch is None else num_items_in_batch
        out = self._loss(hidden, target, teacher, plan, extra, total)
        out.metrics |= {"rows_kept": len(run), "rows_taught": taught_rows, "rows_full": every, "influence": influence}
        out.metrics["features"] = sizes  # of each image's, to know it by if the loss is not finite
        if return_logits:
            out.logits, out.targets = self.vlm.head(hidden), target
        return out

    def _looked(self, visual: dict[str, Tensor], plan: Plan) -> tuple[dict[str, list[Tensor]], dict, list[Tensor]]:
        """Features of all images by kind, the signals that the plugin needs, and what stands in for images that are not
        there."""
        twice = plan.mode == "fast" and self.chooser.projects_twice
        needs = {*self.chooser.needs, *["tower"] * twice} if plan.mode == "fast" or plan.taught else ()
        graph = torch.is_grad_enabled() and not twice
        with signals.heard(self.vlm, visual, needs) as heard, torch.set_grad_enabled(graph):
            features = self.vlm.features(visual, plan.mode)
        return features, heard, self.vlm.unused_rows(features, plan.mode)

    def _loss(
        self, hidden: Tensor, target: Tensor, teacher: Tensor | None, plan: Plan, extra: Tensor | float, total
    ) -> Output:
        """Of the answer rows, divided by `total` of them; and what is known of them."""
        how = {"teacher": teacher, "teacher_head": self._quiet_head, "temperature": self.temperature}
        ce, kl, each, teacher_ce = answer_loss(self.vlm.head, hidden, target, **how, chunk=self.chunk)
        count = max(len(target), 1)
        metrics = {
            "mode": plan.mode,
            "ce": ce.detach() / count,
            "kl": kl.detach() / count,
            "ce_teacher": teacher_ce / count,  # of the fast mode on the same answers; 0 without a teacher
            "answers": len(target),
            "losses": each,  # of each answer token, sample after sample
        }
        return Output(loss=(ce + plan.distill * kl + extra) / total, metrics=metrics)

    def _planned(self, plan: Plan | None) -> Plan:
        """This plan, or without one the schedule's at `self.step`."""
        if plan is not None:
            return plan
        if self.step is None:  # every step would draw the mode of one and the same step
            said = "which step is it? Set model.step, add SetStep(model) to the Trainer's callbacks, or pass plan="
            raise UserError(said)
        return self.schedule.plan(self.step)

    def _pruned(
        self, ids: Tensor, full: rows.Rows, images: list[Tensor], keep: float, heard: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], rows.Rows, Tensor | float]:
        """The table behind the words and the rows of a fast forward, and a learned plugin's part of the loss."""
        kept, visual, loss, extra = ids.new_zeros(0, dtype=torch.bool), [], None, self.chooser.idle()
        if images:
            kept, *visual, loss = self.chooser(images, keep, heard, self.step)
        run = rows.prune(full, kept, len(self.isolator), ids.numel(), self.positions)
        if loss is not None:  # as much an image as cross-entropy has, whatever the micro-batch
            extra = extra + (loss * rows.answers_beside(run, len(loss))).sum()
        return [*visual, self.isolator.weight], run, extra

    def _answers(
        self, ids: Tensor, visual: list[Tensor], selected: rows.Rows, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the LLM on the selected rows; hidden states and targets of the answer rows, and if the plan asks for it,
        how much each layer changed them."""
        embeddings, placed = self._gathered(ids, visual, selected)
        answers = (selected.target != rows.IGNORE).nonzero()[:, 0]
        slots = placed.slot[answers]
        with sts.measuring_influence(self.vlm.language_model.layers if plan.measure else (), slots) as found:
            hidden = self.vlm.hidden(embeddings, placed, plan.layers)
        influence = torch.stack(found) if found else hidden.new_zeros(0, dtype=torch.float32)
        return hidden.index_select(0, slots), selected.target[answers], influence

    def _gathered(self, ids: Tensor, visual: list[Tensor], selected: rows.Rows) -> tuple[Tensor, rows.Layout]:
        """The selected rows as they are laid out. Nothing but them is left of the table when the LLM runs."""
        index, selected = rows.looked_up(selected, ids.numel())
        words = self.vlm.embed(ids.flatten()[index])
        placed = rows.lay_out(
            selected, attention.choose_layout(words, selected) if self.layout == "auto" else self.layout
        )
        table = torch.cat([words, *(part.to(words.dtype) for part in visual)])
        return table.index_select(0, placed.index), placed

    @property
    def only_training(self) -> dict[str, nn.Parameter]:
        """What learns here and is no part of the model that comes out."""
        more = {f"chooser.{name}": p for name, p in self.chooser.named_parameters()}
        return {"isolator.weight": self.isolator.weight, **more}

    @property
    def device(self) -> torch.device:
        """Where the arithmetic is: the tower is there whole, even if what trains is kept elsewhere between steps."""
        return next(self.vlm.tower.parameters()).device

    def _quiet_head(self, hidden: Tensor) -> Tensor:
        with without_dropout(self.vlm.model.get_output_embeddings()):
            return self.vlm.head(hidden)
