"""How often a model answers right: exact match under greedy decoding, on full or on pruned tokens.

One forward with the right answer in place is enough. Greedy decoding gives exactly the reference answer if and only if
the model's first choice at every answer token, given the reference so far, is the next reference token (the end of the
answer included). So nothing is generated, and full and pruned sequences go through the same code.
"""

import torch
from tqdm import tqdm

from ..data import digits
from ..data.examples import Source, collate
from ..dualspeed import DualSpeed
from ..models import precision
from ..recipe import Recipe
from ..rows import IGNORE, plan_rows
from ..scheduler import Plan
from ..training.batching import cut


@torch.no_grad()
def accuracy(model: DualSpeed, source: Source, plan: Plan, row_budget: int = 10_000, bar: bool = False) -> float:
    """Returns the percentage of examples whose answer tokens are all the model's first choice."""
    was_training = model.training
    model.eval()
    rows = [plan_rows(*source.lengths(i)[:2], plan, len(model.isolator)) for i in range(len(source))]
    pad = model.config.text_config.pad_token_id or 0
    right = 0
    with tqdm(total=len(source), desc=f"evaluate {plan.mode}", unit="picture", disable=not bar, leave=False) as line:
        for part in cut(rows, row_budget):
            batch = collate([source.example(i) for i in part], pad)
            # Answer tokens come sample after sample, so the labels alone say which sample each belongs to.
            sample = (batch["labels"][:, 1:] != IGNORE).nonzero()[:, 0]
            out = model(**{k: v.to(model.device) for k, v in batch.items()}, plan=plan, return_logits=True)
            wrong = (out.logits.argmax(-1) != out.targets).cpu()
            right += len(part) - len(sample[wrong].unique())
            line.update(len(part))
    model.train(was_training)
    return 100 * right / len(source)


def held_out(model: DualSpeed, recipe: Recipe, bar: bool = True) -> tuple[float, float]:
    """Returns the accuracy on the recipe's evaluation pictures, on full tokens (as at inference) and on pruned ones."""
    pictures = digits.Digits(recipe.data.eval_pictures, 1, "eval", recipe.run.seed, digits.canvas_of(recipe))
    pruned = Plan("fast", keep=recipe.dualspeed.keep)
    name = precision.resolve(recipe.model.precision, model.device)
    with precision.autocast(name, model.device):  # trained weights are fp32, beside others in half precision
        return accuracy(model, pictures, Plan("full"), bar=bar), accuracy(model, pictures, pruned, bar=bar)
