"""What the answer loss costs: its logits for every row, for answer rows, and for answer rows in chunks.

    tinyspeed bench loss

Three ways to the same number and the same gradient. transformers makes logits of every row and takes the loss of all
of them; the official DualSpeed does so twice in a slow step, for teacher and student. Rows that predict nothing need no
logits; and of those that do, only a chunk's need be there at a time, if the backward makes them again (`distill.py`).

Sizes are those of 4 samples with a picture of 576 rows and 128 words, half of them answers, at the width of
LLaVA-1.5-7B and with its words.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distill import answer_loss
from ..models.precision import device_of
from ..rows import IGNORE
from ..util.tables import table
from . import bars
from .bars import Bar
from .live import peak
from .timing import described, finish, timed

ROWS, ANSWERS = 4 * 704, 4 * 64


def bench_loss(
    width: int = 4096,
    vocab: int = 32064,
    chunks: tuple[int, ...] = (64, 256, 1024),
    repeats: int = 5,
    device: str = "cpu",
    out: Path | str | None = None,
    png: Path | str | None = None,
) -> dict:
    """Time and memory of loss and gradient, by cross-entropy alone and with a teacher. Prints a table, returns
    everything, and writes it as JSON to `out` and as a picture to `png`."""
    where = device_of(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    random = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(ROWS, width, generator=random).to(where, dtype) for _ in range(2))
    head = torch.nn.Linear(width, vocab, bias=False).to(where, dtype).requires_grad_(False)
    target = torch.full((ROWS,), IGNORE)
    answers = torch.randperm(ROWS, generator=random)[:ANSWERS].sort().values
    target[answers] = torch.randint(vocab, (ANSWERS,), generator=random)
    target, answers = target.to(where), answers.to(where)

    def whole(x: Tensor, teacher: Tensor | None) -> Tensor:
        """As transformers: every row, in fp32."""
        return _both(head, x, target, teacher)

    def some(x: Tensor, teacher: Tensor | None) -> Tensor:
        return _both(head, x[answers], target[answers], None if teacher is None else teacher[answers])

    def ours(chunk: int) -> Callable[[Tensor, Tensor | None], Tensor]:
        def loss(x: Tensor, teacher: Tensor | None) -> Tensor:
            teacher = None if teacher is None else teacher[answers]
            ce, kl, _, _ = answer_loss(head, x[answers], target[answers], teacher=teacher, chunk=chunk)
            return ce + kl

        return loss

    ways = {"every row": whole, "answer rows": some, **{f"answer rows, {n} at a time": ours(n) for n in chunks}}
    found = {}
    for kind, teacher in (("cross-entropy", None), ("with a teacher", taught)):
        steps = {name: lambda way=way, t=teacher: _gradient(way, hidden, t) for name, way in ways.items()}
        times = timed(steps, repeats, where)
        known = {t.untyped_storage().data_ptr(): 0 for t in (hidden, taught, head.weight, target, answers)}
        (_, wanted), every = steps["every row"](), {}
        for name, step in steps.items():
            value, gradient = step()
            off = float((gradient - wanted).norm() / wanted.norm())
            every[name] = {**times[name], "peak_bytes": peak(step, where, known), "loss": value, "gradient_off": off}
        found[kind] = every
    result = described(
        where, bench="loss", rows=ROWS, answers=ANSWERS, width=width, vocab=vocab, repeats=repeats, kinds=found
    )
    said = f"{ROWS:,} rows, {ANSWERS} of them answers, width {width:,}, {vocab:,} words; median of {repeats}"
    return finish(said, result, describe, draw, out, png)


def describe(result: dict) -> str:
    headers = ["loss", "logits of", "median", "of every row's", "memory", "of every row's"]
    return table(headers, [_line(kind, name, of) for kind, of in result["kinds"].items() for name in of])


def draw(result: dict):
    panels = {}
    for unit, key, size in (("ms", "median_ms", 1), ("MiB", "peak_bytes", 2**20)):
        for kind, of in result["kinds"].items():
            share = lambda f, whole=of["every row"][key], key=key: f"{f[key] / whole:.0%}"
            panels[f"{kind}: {unit}"] = [
                Bar(name, f[key] / size, share(f), ours="at a time" in name) for name, f in of.items()
            ]
    return bars.draw(panels, "")


def _line(kind: str, name: str, of: dict) -> list[str]:
    f, whole = of[name], of["every row"]
    shares = [f"{f[key] / whole[key]:.0%}" for key in ("median_ms", "peak_bytes")]
    return [kind, name, f"{f['median_ms']:.0f} ms", shares[0], f"{f['peak_bytes'] / 2**20:,.0f} MiB", shares[1]]


def _both(head: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, teacher: Tensor | None) -> Tensor:
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
