"""The commands `tinyspeed bench ...`. As in `cli.py`, torch is not imported before the arguments have been checked."""

import argparse
from functools import partial
from importlib import import_module

INTEGERS = ("--batch", "--budget", "--layers", "--micro", "--repeats", "--samples", "--width")
KINDS = {  # of a flag: whatever is not here is a string
    **{flag: {"type": int} for flag in INTEGERS},
    "--compiled": {"action": "store_true"},
    "--gpu": {"type": float, "metavar": "GIB"},
    "--keep": {"type": float},
    "--set": {"action": "append", "metavar": "section.key=value"},
    "--text": {"action": "append", "dest": "texts"},
    "--workers": {"action": "append", "type": int},
    "recipe": {"nargs": "?", "metavar": "RECIPE.toml"},
    "recipes": {"nargs": "+", "metavar": "RECIPE.toml"},
}
OUT = {"--out": "write the numbers to this JSON file"}
FILES = {**OUT, "--png": "draw the results"}
DEVICE = {"--device": "cpu, cuda, ... (default: cpu)", **FILES}
MODEL = {
    "--size": "tiny, 1b, 7b or 13b (default: tiny)",
    "--family": "LLaVA-1.5 or NeXT: 1.5 or next (default: 1.5)",
    "--tune": "lora, qlora or full (default: lora)",
    "--batch": "samples of a step (default: 8)",
}
COMMANDS: dict[str, tuple[str, dict[str, str]]] = {  # what it measures; its flags, which are parameters of `measure`
    "step": (
        "a training step, beside what people run today",
        {
            **MODEL,
            "--text": 'words of a sample, or "mix"; repeat for several (default: 64, 128, 256 and mix)',
            "--micro": "samples that the others take at a time (default: the batch)",
            "--budget": "rows that ours take at a time (default: the batch)",
            "--checkpointing": "whether ours recompute activations, as the others do: on, off or auto (default: auto)",
            "--repeats": "rounds (default: 5)",
            **DEVICE,
        },
    ),
    "levers": (
        "what each lever of a step is worth: the step with it and without",
        {
            **MODEL,
            "--budget": "rows at a time (default: 4096)",
            "--compiled": "also with compiled layers, which takes longer",
            "--repeats": "rounds (default: 5)",
            **DEVICE,
        },
    ),
    "loss": (
        "the answer loss: time and memory, beside logits of every row",
        {"--width": "of the hidden states (default: 4096)", "--repeats": "rounds (default: 5)", **DEVICE},
    ),
    "scaling": (
        "how a step grows with the picture, to a video of 11,520 tokens",
        {"--size": MODEL["--size"], "--repeats": "rounds (default: 5)", **DEVICE},
    ),
    "data": (
        "records per second, beside what a GPU needs",
        {
            "recipe": "whose data is read; without it, pictures are made",
            "--set": "change one value of the recipe",
            "--family": "the model that pictures are made for: 1.5 or next (default: 1.5)",
            "--samples": "records that are read (default: 256)",
            "--workers": "worker processes; repeat for several (default: 0, 1, 2)",
            "--repeats": "rounds (default: 3)",
            **FILES,
        },
    ),
    "pruning": (
        "what choosing the rows costs",
        {
            "--width": "of the features; a 7B model's are 4096 wide (default: 1024)",
            "--keep": "share of the rows that is kept (default: 0.1)",
            "--repeats": "rounds (default: 20)",
            **DEVICE,
        },
    ),
    "savings": (
        "what skipping rows, layers and answers saves, beside what it promises",
        {"--layers": "of the LLM (default: 16)", "--width": "of the LLM (default: 256)", **DEVICE},
    ),
    "memory": (
        "what recipes need, beside what is estimated; downloads nothing",
        {
            "recipes": "recipe files, or names of built-in ones",
            "--set": "change one value of all recipes",
            "--gpu": "as on a GPU with so much memory",
            **OUT,
        },
    ),
}


def add(subparsers) -> None:
    """Adds the commands to argparse's subparsers of `tinyspeed bench`."""
    for name, (help, flags) in COMMANDS.items():
        parser = subparsers.add_parser(name, help=help, description=help)
        parser.set_defaults(command=partial(_run, name))
        for flag, said in flags.items():
            parser.add_argument(flag, help=said, **KINDS.get(flag, {}))


def _run(name: str, a: argparse.Namespace) -> int:
    from .. import recipe

    settings = {key: value for key, value in vars(a).items() if value is not None and key != "command"}
    changes = settings.pop("set", [])
    if "recipe" in settings:
        settings["recipe"] = recipe.read(a.recipe, changes)
    if "recipes" in settings:
        settings["recipes"] = {path: recipe.read(path, changes) for path in a.recipes}
    from . import harness

    benchmark = import_module(f".{name}", __package__)
    benchmark.run(**settings) if name == "memory" else harness.run(benchmark, **settings)
    return 0
