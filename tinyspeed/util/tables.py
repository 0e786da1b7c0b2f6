"""The tables that commands print. They are valid Markdown, so that they can be pasted into a report."""

import re
from collections.abc import Sequence

# A number with its unit and its uncertainty: 12, -3.4e-5, 1,234, 3.1x, 98.4 %, 98.4 ± 0.2, 9.1 (8.8 to 9.3), nan, -
_NUMBER = re.compile(
    r"[<>~]?[-+]?(\d[\d,]*\.?\d*(e[-+]?\d+)?( ?± ?[\d.]+)?( ?(%|[a-zA-Z/]{1,5}))?( \([^()]*\))?|nan|inf)|-"
)


def table(headers: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table that is aligned in plain text too: columns of numbers, such as "3.1x" or "98.4 %", to the right."""
    cells = [[_cell(c) for c in row] for row in (headers, *rows)]
    assert all(len(row) == len(headers) for row in cells), "every row needs one cell for each header"
    columns = list(zip(*cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [len(c) > 1 and any(c[1:]) and all(_NUMBER.fullmatch(text) for text in c[1:] if text) for c in columns]

    def line(texts: Sequence[str]) -> str:
        padded = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


def _cell(value) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
