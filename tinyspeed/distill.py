"""The answer loss: cross-entropy and KL on answer rows only, in chunks.

    loss = sum_r CE(student_r, target_r)  +  alpha * T^2 * sum_r KL( softmax(teacher_r / T) || softmax(student_r / T) )

Sums, not means: the caller divides by the number of answer tokens of the whole optimizer batch, so cutting a batch
into micro-batches or ranks changes nothing.

A LLaVA sequence of 700 rows has perhaps 60 answer rows, and a vocabulary of 32,000. Full logits in fp32 would be
90 MB a sample, twice when a teacher is there. Here the head only ever sees answer rows, `chunk` of them at a time,
and each chunk is recomputed in the backward pass instead of stored: a few percent more work for the head, and the
peak is one chunk's logits whatever the batch. The teacher's own cross-entropy comes with its logits, at temperature 1
whatever T is: on the same answers as the student's, so their difference says how far apart the two modes are.

What differs from the official code: it makes fp32 logits for every position of teacher and student, and finds the
answer rows with a Python loop over labels. The values are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def _chunk_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    target: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    teacher: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = head(hidden).float()
    ce = F.cross_entropy(logits, target, reduction="none")
    if teacher is None:
        return ce, ce.new_zeros(()), ce.new_zeros(())
    teacher_logp, teacher_ce = _taught(teacher_head, teacher, target, temperature)
    logp = F.log_softmax(logits / temperature, dim=-1)
    return ce, F.kl_div(logp, teacher_logp, reduction="sum", log_target=True), teacher_ce


@torch.no_grad()
def _taught(
    head: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log softmax(teacher / T), and the teacher's summed cross-entropy. Its logits are gone when this returns."""
    logits = head(hidden).float()
    return F.log_softmax(logits / temperature, dim=-1), F.cross_entropy(logits, target, reduction="sum")


def answer_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    target: Tensor,
    *,
    teacher: Tensor | None = None,
    teacher_head: Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed cross-entropy and summed T^2 * KL over answer rows; and without a graph, each row's cross-entropy, and the
    teacher's summed one (0 without a teacher).

    hidden (A, H): the student's last hidden states at answer rows, target (A,): the tokens to predict,
    teacher (A, H): the teacher's hidden states at the same answers (its logits are made here, chunk by chunk, by
    `teacher_head` where that differs from `head`).
    No answer rows give two zeros that still carry a graph, so backward works and touches the same parameters.
    """
    ce, kl, teacher_ce, each = 0.0, 0.0, 0.0, []
    for start in range(0, max(len(target), 1), chunk):
        part = slice(start, start + chunk)
        taught_by = None if teacher is None else teacher[part].detach()
        args = (head, hidden[part], target[part], teacher_head or head, taught_by, temperature)
        if torch.is_grad_enabled():
            chunk_ce, chunk_kl, chunk_teacher = checkpoint(_chunk_loss, *args, use_reentrant=False)
        else:
            chunk_ce, chunk_kl, chunk_teacher = _chunk_loss(*args)
        ce, kl, teacher_ce = ce + chunk_ce.sum(), kl + chunk_kl, teacher_ce + chunk_teacher
        each.append(chunk_ce.detach())
    return ce, kl * temperature**2, torch.cat(each), teacher_ce


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """A teacher is in eval mode; afterwards each sub-module is as it was (a frozen one may have been in it before)."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
