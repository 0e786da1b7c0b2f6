"""What the answer loss costs: with logits of every row, of answer rows, and of answer rows in chunks.

    tinyspeed bench loss

Three ways to the same number and the same gradient. transformers makes logits of every row and takes the loss of all of
them; the official DualSpeed does so twice in a slow step, for teacher and student. Rows that predict nothing need no
logits, and of the others only a chunk's need to exist at a time, if the backward makes them again (`distill.py`).

The sizes are those of 4 samples, each with a picture of 576 rows and 128 words, half of them answers, at the width of
LLaVA-1.5-7B and with its vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distill import answer_loss
from ..rows import IGNORE
from ..util import tables
from .harness import Bar, Results, bar_chart, time_in_turns
from .peak_memory import peak_bytes

ROWS, ANSWERS = 4 * 704, 4 * 64


def measure(
    device: torch.device,
    width: int = 4096,
    vocab: int = 32064,
    chunks: tuple[int, ...] = (64, 256, 1024),
    repeats: int = 5,
) -> Results:
    """Measures time and memory of loss and gradient, for cross-entropy alone and with a teacher."""
    print(f"{ROWS:,} rows, {ANSWERS} of them answers, width {width:,}, {vocab:,} words; median of {repeats}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(ROWS, width, generator=random).to(device, dtype) for _ in range(2))
    head = torch.nn.Linear(width, vocab, bias=False).to(device, dtype).requires_grad_(False)
    target = torch.full((ROWS,), IGNORE)
    answers = torch.randperm(ROWS, generator=random)[:ANSWERS].sort().values
    target[answers] = torch.randint(vocab, (ANSWERS,), generator=random)
    target, answers = target.to(device), answers.to(device)

    def answers_of(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[answers]

    def in_chunks(chunk: int, x: Tensor, teacher: Tensor | None) -> Tensor:
        ce, kl, *_ = answer_loss(head, x[answers], target[answers], teacher=answers_of(teacher), chunk=chunk)
        return ce + kl

    ways: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
        "every row": lambda x, teacher: _at_once(head, x, target, teacher),
        "answer rows": lambda x, teacher: _at_once(head, x[answers], target[answers], answers_of(teacher)),
        **{f"answer rows, {n} at a time": partial(in_chunks, n) for n in chunks},
    }
    known = {t.untyped_storage().data_ptr(): 0 for t in (hidden, taught, head.weight, target, answers)}
    kinds: dict[str, dict] = {}
    for kind, teacher in (("cross-entropy", None), ("with a teacher", taught)):
        steps = {name: partial(_gradient, way, hidden, teacher) for name, way in ways.items()}
        kinds[kind] = time_in_turns(steps, repeats, device)
        _, wanted = steps["every row"]()
        for name, step in steps.items():
            value, gradient = step()
            off = float((gradient - wanted).norm() / wanted.norm())
            kinds[kind][name] |= {"peak_bytes": peak_bytes(step, device, known), "loss": value, "gradient_off": off}
    results = {"rows": ROWS, "answers": ANSWERS, "width": width, "vocab": vocab, "repeats": repeats, "kinds": kinds}
    yield describe(results), results


def _at_once(head: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, teacher: Tensor | None) -> Tensor:
    """Returns the loss as transformers computes it, from fp32 logits of all these rows."""
    logits = head(x).float()
    loss = F.cross_entropy(logits, target, reduction="sum")
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted = F.log_softmax(head(teacher).float(), -1)
    each = F.kl_div(F.log_softmax(logits, -1), wanted, reduction="none", log_target=True).sum(-1)
    return loss + each[target != IGNORE].sum()


def _gradient(way: Callable, hidden: Tensor, teacher: Tensor | None) -> tuple[float, Tensor]:
    x = hidden.detach().requires_grad_()
    loss = way(x, teacher)
    loss.backward()
    return loss.item(), x.grad


def describe(results: dict) -> str:
    headers, lines = ["loss", "logits of", "median", "vs every row", "memory", "vs every row"], []
    for kind, found in results["kinds"].items():
        for name, f in found.items():
            time, memory = (f"{f[key] / found['every row'][key]:.0%}" for key in ("median_ms", "peak_bytes"))
            lines.append([kind, name, f"{f['median_ms']:.0f} ms", time, f"{f['peak_bytes'] / 2**20:,.0f} MiB", memory])
    return tables.table(headers, lines)


def draw(results: dict):
    panels = {}
    for unit, key, size in (("ms", "median_ms", 1), ("MiB", "peak_bytes", 2**20)):
        for kind, found in results["kinds"].items():
            whole = found["every row"][key]
            panels[f"{kind}: {unit}"] = [
                Bar(name, f[key] / size, f"{f[key] / whole:.0%}", ours="at a time" in name) for name, f in found.items()
            ]
    return bar_chart(panels, "")
