"""The answer loss: cross-entropy and KL on answer rows only, in chunks.

    loss = sum_r CE(student_r, target_r)  +  alpha * T^2 * sum_r KL( softmax(teacher_r / T) || softmax(student_r / T) )

These are sums and not means. The caller divides by the number of answer tokens of the whole optimizer batch, so cutting
a batch into micro-batches or among ranks changes nothing.

A LLaVA sequence of 700 rows has perhaps 60 answer rows, and the vocabulary has 32,000 tokens. Logits of all rows in
fp32 would take 90 MB per sample, and twice that with a teacher. Here only answer rows go through the head, `chunk` at a
time, and each chunk is computed again in the backward pass instead of being stored. The trade-off: the head does a few
percent more work, and the peak memory is one chunk's logits, however large the batch.

The teacher's own cross-entropy comes from the same logits, at temperature 1 whatever T is. It is on the same answers as
the student's, so the difference between the two says how far apart the modes are.

What differs from the official code: it computes fp32 logits at every position of teacher and student and finds the
answer rows with a Python loop over the labels. The values are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # last hidden states to logits
CHUNK = 1024  # answer rows whose logits exist at a time


def _chunk_loss(
    head: Head, hidden: Tensor, target: Tensor, teacher_head: Head, teacher: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy of each row, the KL (without T^2), and the teacher's cross-entropy."""
    logits = head(hidden).float()
    ce = F.cross_entropy(logits, target, reduction="none")
    if teacher is None:
        return ce, ce.new_zeros(()), ce.new_zeros(())
    teacher_logp, teacher_ce = _teacher_logp(teacher_head, teacher, target, temperature)
    logp = F.log_softmax(logits / temperature, dim=-1)
    return ce, F.kl_div(logp, teacher_logp, reduction="sum", log_target=True), teacher_ce


@torch.no_grad()
def _teacher_logp(head: Head, hidden: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(teacher / T), and the teacher's summed cross-entropy. A function of its own frees the logits."""
    logits = head(hidden).float()
    return F.log_softmax(logits / temperature, dim=-1), F.cross_entropy(logits, target, reduction="sum")


def answer_loss(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    *,
    teacher: Tensor | None = None,
    teacher_head: Head | None = None,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the summed cross-entropy and the summed T^2 * KL over all answer rows, with a graph; and without one, the
    cross-entropy of each row and the teacher's summed cross-entropy (0 without a teacher).

    hidden (A, H): the student's last hidden states at the answer rows. target (A,): the tokens to predict.
    teacher (A, H): the teacher's hidden states for the same answers. They go through `teacher_head`, or through `head`.
    Without answer rows the first two are zeros with a graph, so backward works and reaches the same parameters.
    """
    ce = kl = teacher_ce = torch.zeros((), device=hidden.device)
    each = []
    for start in range(0, max(len(target), 1), chunk):
        part = slice(start, start + chunk)
        teacher_part = None if teacher is None else teacher[part].detach()
        args = (head, hidden[part], target[part], teacher_head or head, teacher_part, temperature)
        if torch.is_grad_enabled():
            chunk_ce, chunk_kl, chunk_teacher = checkpoint(_chunk_loss, *args, use_reentrant=False)
        else:
            chunk_ce, chunk_kl, chunk_teacher = _chunk_loss(*args)
        ce, kl, teacher_ce = ce + chunk_ce.sum(), kl + chunk_kl, teacher_ce + chunk_teacher
        each.append(chunk_ce.detach())
    return ce, kl * temperature**2, torch.cat(each), teacher_ce


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Eval mode, as for a teacher. Afterwards each sub-module is in its own mode again, which may be eval's."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
