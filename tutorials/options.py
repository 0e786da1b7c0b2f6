"""The page of a recipe's options, made from the dataclasses that hold them: the comment behind a field is its text.

python tutorials/options.py               writes tutorials/guide/options.md; `make options` does the same
"""

import ast
import inspect
import io
import json
import tokenize
from dataclasses import fields
from pathlib import Path

from tinyspeed import recipe
from tinyspeed.util import tables

PAGE = Path(__file__).parent / "guide" / "options.md"
OPENING = """\
# Every key of a recipe

Each key has the default below until a recipe's TOML file or `--set section.key=value` gives it another value. A
misspelt key is an error that names the nearest one. `runs/NAME/recipe.toml` lists every key with the value of that run.

This page is generated: `make options` writes it from the comments in
[sections.py](../../tinyspeed/recipe/sections.py) and [regate.py](../../tinyspeed/regate.py)."""
MORE = {
    "data": "Formats and checks: [your own pictures](pictures.md).",
    "digits": "The pictures of the built-in digits, and the sizes of their model.",
    "dualspeed": "What to choose, and what was measured: [what steps leave out](methods.md).",
    "sts": "STS leaves out layers: [more](methods.md#layers-sts).",
    "regate": "ReGATE leaves out answer tokens: [more](methods.md#answers-regate).",
    "align": "The two stages. `[align]` trains the projector alone, every step fast; `[train]` also trains the LLM.",
    "scale": "How [scale](../../scale/README.md) spreads a run over GPUs; `tinyspeed` itself reads none of it.",
}


def comments(section: type) -> dict[str, str]:
    """The comment behind each field of a dataclass."""
    source = inspect.getsource(section)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    behind = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (made,) = ast.parse(source).body
    return {node.target.id: behind[node.lineno] for node in made.body if isinstance(node, ast.AnnAssign)}


def page() -> str:
    kinds: dict[type, list[str]] = {}
    for section in fields(recipe.Recipe):
        kinds.setdefault(section.type, []).append(section.name)
    parts = [OPENING]
    for kind, names in kinds.items():
        said, usual = comments(kind), kind()
        rows = [[f"`{key}`", f"`{json.dumps(getattr(usual, key))}`", text] for key, text in said.items()]
        parts.append("## " + " and ".join(f"[{name}]" for name in names))
        parts += [MORE[names[0]]] if names[0] in MORE else []
        parts.append(tables.table(["key", "default", "what it does"], rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
