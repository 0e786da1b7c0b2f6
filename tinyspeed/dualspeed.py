"""DualSpeed: a module around a vision-language model whose `forward` is encode -> select -> gather -> LLM -> loss.

    fast:  L = CE(model(isolator + pruned rows))
    slow:  L = CE(model(all rows)) + alpha * T^2 * KL( fast forward of the same batch, no grad || model(all rows) )
    full:  L = CE(model(all rows))

Most steps are fast. The few slow steps keep the model good at what it sees at inference, taught by the fast mode, which
has had nine times as many updates. In `eval()` the module is the wrapped model and nothing else: no isolator, no
pruning, exactly the same forward.

What differs from the official code: images are encoded once for both halves of a slow step; the teacher runs without
dropout; anyres images are pruned after packing, over the whole image; logits are computed for answer rows only; the
mode is a function of (seed, step); text-only batches give the same parameters gradients; positions are `original`.

The trade-off: a slow step costs a little more than a full step, and three to five times as much as a fast one. At a
tenth of the steps, slow ones take a quarter to a third of the time, so a run is faster the rarer they are.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from . import rows, sts
from .distill import CHUNK, answer_loss, without_dropout
from .isolator import PromptIsolator, Views
from .models import attention
from .models.drop_in import DropIn
from .models.families import family
from .pruning import signals
from .pruning.chooser import Chooser
from .scheduler import DualSpeedSchedule, Plan, Schedule
from .util import UserError, finite, require, require_known
from .util.sending import to_device


@dataclass
class Output(ModelOutput):
    """What a training forward returns. It is a `ModelOutput` because the hooks of FSDP look into those."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (answer rows, vocabulary), if asked for
    targets: Tensor | None = None  # (answer rows,), if asked for
    metrics: dict | None = None


class DualSpeed(DropIn):
    """Wraps a Hugging Face vision-language model for training.

    `plugin` and `keep`: which image tokens fast steps see, and what share of them. `slow`: the share of slow steps.
    `isolator`: the length of the mode isolator, 0 for none. `views`: each mode trains a LoRA of its own (`add_lora`).
    `distill` and `temperature`: alpha and T. `positions`: "compact" or "original". `weights` and `power`: whether
    a kept token weighs as many as it stands for (`pruning/weights.py`). `layout`: "padded", "packed", or
    "auto" (`attention.choose_layout`). `schedule`: used instead of the default one. `chunk`: how many answer tokens
    have logits at a time.
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
        weights: str = "none",
        power: float = 1.0,
        layout: str = "auto",
        schedule: Schedule | None = None,
        chunk: int = CHUNK,
        seed: int = 0,
    ):
        super().__init__()
        require_known("positions", positions, rows.POSITIONS)
        require_known("layout", layout, rows.LAYOUTS)
        require(0 < temperature < math.inf, f"temperature = {temperature}: must be above 0")
        require(0 <= power <= 1, f"power = {power}: must be between 0 and 1")
        require(chunk >= 1, f"chunk = {chunk}: must be at least 1")
        self.model = model
        self.vlm = family(model)
        self.chooser = Chooser(self.vlm, plugin, keep, seed, weights)
        self.isolator = PromptIsolator(isolator, self.vlm.hidden_size, seed=seed)
        for module in (self.isolator, self.chooser):  # fp32 also in a bf16 model, as LoRA is: bf16 loses small updates
            module.to(next(self.get_input_embeddings().parameters()).device)
        self.views = Views(model, self.vlm.language_model, views)
        self.positions, self.layout = positions, self.vlm.layout_for(layout)
        self.temperature, self.chunk, self.seed, self.power = temperature, chunk, seed, power
        self.schedule = schedule or DualSpeedSchedule(slow=slow, keep=keep, distill=distill, seed=seed)
        self.step: int | None = None  # the optimizer step, set by the training loop
        self.forwards = 0  # training forwards so far; by them the Trainer callback knows that this module is in use

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_sizes_videos: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        tower_features: Tensor | None = None,
        labels: Tensor | None = None,
        answers: Tensor | None = None,
        plan: Plan | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = False,
    ) -> ModelOutput:
        """Takes the batch of a Hugging Face processor as it is. Its integers may stay on the CPU, which plans the step.
        Without a plan it uses the schedule's for `self.step`, or, in eval mode, runs the plain model. The loss is
        divided by `num_items_in_batch` answer tokens, or by the number in this batch. `answers`, bool and shaped like
        labels, says which answer tokens stay. It goes with a plan whose `answer_keep` is below 1, and comes from a
        `regate.Memory`."""
        given = {  # by name in the signature, because Trainer looks there for the columns to keep
            "pixel_values": pixel_values, "image_sizes": image_sizes, "pixel_values_videos": pixel_values_videos,
            "image_sizes_videos": image_sizes_videos, "batch_num_images": batch_num_images,
            "image_grid_thw": image_grid_thw, "pixel_attention_mask": pixel_attention_mask,
            "mm_token_type_ids": mm_token_type_ids, "token_type_ids": token_type_ids,
            "image_position_ids": image_position_ids, "tower_features": tower_features,
        }  # fmt: skip
        visual = {name: value for name, value in given.items() if value is not None}
        if not self.training and plan is None:
            self.views.use("slow")
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **visual)
        if labels is None:
            raise UserError("the batch has no labels: there is nothing to learn from")
        plan = plan or self._plan_of_step()
        together = (plan.answer_keep < 1) == (answers is not None)
        require(together, "answer_keep below 1 and `answers=` (from a regate.Memory) go together")
        self.forwards += 1
        # The CPU plans the step. Integers that are on a GPU are copied back, which waits for it once.
        input_ids, labels = input_ids.cpu(), labels.cpu()
        attention_mask, answers = (None if t is None else t.cpu() for t in (attention_mask, answers))
        visual = {name: t if t.is_floating_point() else t.cpu() for name, t in visual.items()}

        # Encode: features of all images, and all rows of the batch.
        features, recorded, zero_gradient_rows = self._encode(visual, plan, input_ids)
        lengths = {kind: [len(image) for image in of] for kind, of in features.items()}
        learned = labels if answers is None else labels.masked_fill(~answers, rows.IGNORE)
        places = self.vlm.positions(input_ids, attention_mask, visual)
        full = rows.full(input_ids, attention_mask, learned, self.vlm.placeholders, lengths, places)
        rows_full = len(full)
        if answers is not None:
            full = rows.skip_answers(full, labels, answers, self.positions)
        images, shown = [*itertools.chain(*features.values())], self.vlm.shown(visual, lengths)
        norms = finite.norms(images)

        # Select: what the teacher and the student see.
        plugin_loss: Tensor | float = 0.0
        table, run, teacher, rows_taught = images, full, None, 0
        if plan.taught:
            self.views.use("fast")
            with torch.no_grad(), without_dropout(self.vlm.language_model), without_dropout(self.chooser):
                pruned, kept, _ = self._prune(input_ids, full, images, shown, plan, recorded)
                teacher, rows_taught = self._run_llm(input_ids, pruned, kept, plan)[0], len(kept)
        elif plan.mode == "fast":
            table, run, plugin_loss = self._prune(input_ids, full, images, shown, plan, recorded)
        del features, images, recorded  # a fast step keeps a tenth of them

        # Gather the rows and run the LLM on them. This view must stay in use until the backward is over.
        self.views.use("fast" if plan.mode == "fast" else "slow")
        hidden, target, influence = self._run_llm(input_ids, [*table, *zero_gradient_rows], run, plan)

        if len(target) == 0 and num_items_in_batch is None:  # one micro-batch of several may have none
            raise UserError("the batch has no answer tokens: every label is ignored")
        loss, metrics = self._loss(hidden, target, teacher, plan)
        total = len(target) if num_items_in_batch is None else num_items_in_batch
        metrics |= {"rows_kept": len(run), "rows_taught": rows_taught, "rows_full": rows_full, "influence": influence}
        metrics["features"] = norms  # of each image's features, to name the image if the loss is not finite
        loss = (loss + plugin_loss) / total
        if norms:  # on a GPU no plugin says that features are not finite, and it may have pruned those
            loss = loss + 0.0 * torch.stack(norms).sum()
        out = Output(loss=loss, metrics=metrics)
        if return_logits:
            out.logits, out.targets = self.vlm.head(hidden), target
        return out

    def _plan_of_step(self) -> Plan:
        if self.step is None:  # without a number, all steps would have the same mode
            said = "which step is it? Set model.step, add SetStep(model) to the Trainer's callbacks, or pass plan="
            raise UserError(said)
        return self.schedule.plan(self.step)

    def _encode(
        self, visual: dict[str, Tensor], plan: Plan, input_ids: Tensor
    ) -> tuple[dict[str, list[Tensor]], dict, list[Tensor]]:
        """Returns the features of all images by kind, the signals that the plugin needs, and rows that no step reads.
        They are made with parameters that the batch does not use, whose gradients are then zero and not None."""
        twice = plan.mode == "fast" and self.chooser.projects_twice
        needs = {*self.chooser.plugin.needs, *["tower"] * twice} if plan.mode == "fast" or plan.taught else set()
        graph = torch.is_grad_enabled() and not twice
        with signals.recording(self.vlm, visual, needs) as recorded, torch.set_grad_enabled(graph):
            features = self.vlm.features(visual, plan.mode, input_ids)
        return features, recorded, self.vlm.zero_gradient_rows(features, plan.mode)

    def _prune(
        self, ids: Tensor, full: rows.Rows, images: list[Tensor], shown: list[Tensor], plan: Plan,
        recorded: dict[str, list[Tensor]],
    ) -> tuple[list[Tensor], rows.Rows, Tensor | float]:  # fmt: skip
        """Returns the table after the words and the rows of a fast forward, and a learned plugin's loss."""
        kept, chosen, visual, weight, loss = ids.new_zeros(0, dtype=torch.bool), None, [], None, None
        total = self.chooser.zero_loss()
        if images:
            how = {"step": self.step, "weigh": plan.weigh and self.power > 0}
            kept, chosen, *visual, stand_for, loss = self.chooser(images, shown, plan.keep, recorded, **how)
            weight = None if stand_for is None else self.power * stand_for.log()
        run = rows.prune(full, kept, len(self.isolator), ids.numel(), self.positions, chosen, weight)
        if loss is not None:  # each image counts as often as its sample has answers, as in the cross-entropy
            total = total + (loss * to_device(rows.answers_per_image(run, len(loss)), loss.device)).sum()
        return [*visual, self.isolator.weight], run, total

    def _run_llm(self, ids: Tensor, visual: list[Tensor], run: rows.Rows, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the LLM on these rows. Returns the hidden states and targets of the answer rows, and how much each layer
        changed them if the plan asks for it."""
        embeddings, layout = self._gather(ids, visual, run)
        answers = (run.target != rows.IGNORE).nonzero()[:, 0]
        slots, target = (to_device(of[answers], embeddings.device) for of in (layout.slot, run.target))
        with sts.measuring_influence(self.vlm.language_model.layers if plan.measure else (), slots) as found:
            hidden = self.vlm.hidden(embeddings, layout, plan.layers)
        influence = torch.stack(found) if found else hidden.new_zeros(0, dtype=torch.float32)
        return hidden.index_select(0, slots), target, influence

    def _gather(self, ids: Tensor, visual: list[Tensor], run: rows.Rows) -> tuple[Tensor, rows.Layout]:
        """Gathers the rows in their layout. The rest of the table is freed before the LLM runs."""
        index, run = rows.used_words(run, ids.numel())
        tokens = to_device(ids.flatten()[index], self.device)
        words = self.get_input_embeddings()(tokens)
        kind = attention.choose_layout(words, run) if self.layout == "auto" else self.layout
        layout = rows.lay_out(run, kind, words.device, self.vlm.whole_images)
        width = self.vlm.hidden_size
        table = torch.cat([words, *(part[:, :width].to(words.dtype) for part in visual)])
        if most := max(part.shape[1] for part in visual) - width:  # what deeper layers add; nothing to the isolator
            beyond = [nn.functional.pad(part[:, width:], (0, width + most - part.shape[1])) for part in visual]
            where = (run.source >= len(index)).nonzero()[:, 0]
            slots, these = (to_device(of[where], words.device) for of in (layout.slot, run.source - len(index)))
            layout = replace(layout, deep=(slots, torch.cat(beyond).index_select(0, these)))
        if (filler := self.vlm.filler) is not None:  # the layers look up the tokens themselves
            tokens = nn.functional.pad(tokens, (0, len(table) - len(tokens)), value=filler)
            layout = replace(layout, token=tokens.index_select(0, layout.index).view(layout.position.shape[:2]))
        return table.index_select(0, layout.index), layout

    def _loss(self, hidden: Tensor, target: Tensor, teacher: Tensor | None, plan: Plan) -> tuple[Tensor, dict]:
        """Returns the loss summed over the answer rows, and what is known about it."""
        head, temperature = self._teacher_head, self.temperature
        ce, kl, each, teacher_ce = answer_loss(
            self.vlm.head, hidden, target, teacher=teacher, teacher_head=head, temperature=temperature, chunk=self.chunk
        )
        count = max(len(target), 1)
        return ce + plan.distill * kl, {
            "mode": plan.mode,
            "ce": ce.detach() / count,
            "kl": kl.detach() / count,
            "ce_teacher": teacher_ce / count,  # of the fast mode on the same answers; 0 without a teacher
            "answers": len(target),
            "losses": each,  # of each answer token, sample after sample
        }

    def _teacher_head(self, hidden: Tensor) -> Tensor:
        with without_dropout(self.vlm.model.get_output_embeddings()):
            return self.vlm.head(hidden)

    @property
    def only_training(self) -> dict[str, nn.Parameter]:
        """The parameters that train but are no part of the exported model."""
        chooser = {f"chooser.{name}": p for name, p in self.chooser.named_parameters()}
        return {"isolator.weight": self.isolator.weight, **chooser}

    @property
    def device(self) -> torch.device:
        """Where the computation happens. The tower is always whole there, even if trained parameters are offloaded."""
        return next(self.vlm.tower.parameters()).device
