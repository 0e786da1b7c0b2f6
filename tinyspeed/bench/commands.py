"""The commands `tinyspeed bench ...`. As in `cli.py`, torch is not imported before the arguments have been checked."""

import argparse
from functools import partial
from importlib import import_module

GPU = "a GPU of this memory, such as 12 or 12GB (the GB in a card's name are GiB)"
NUMBER, REPEATED, RECIPE = {"type": int}, {"action": "append"}, {"metavar": "RECIPE"}


def gib(text: str) -> float:
    """Reads 12, 12GB and "12 GiB" alike."""
    return float(text.lower().rstrip("gib "))


FLAGS: dict[str, tuple[str, dict]] = {  # of all commands: the help, and what else argparse is told
    "recipe": ("whose data is read; without it, pictures are made", {**RECIPE, "nargs": "?"}),
    "recipes": ("recipe files, or names of built-in ones", {**RECIPE, "nargs": "+"}),
    "--set": ("change one value of the recipe", {**REPEATED, "default": [], "metavar": "section.key=value"}),
    "--size": ("tiny, 1b, 7b or 13b (default: tiny)", {}),
    "--family": ("LLaVA-1.5 or NeXT: 1.5 or next (default: 1.5)", {}),
    "--tune": ("lora, qlora or full (default: lora)", {}),
    "--text": ('words of a sample, or "mix"; repeat for several', {**REPEATED, "dest": "texts", "metavar": "WORDS"}),
    "--batch": ("samples of a step (default: 8)", NUMBER),
    "--micro": ("samples in a micro-batch of transformers and TRL (default: the batch)", NUMBER),
    "--budget": ("tokens in a micro-batch of our steps (default: for `step` the batch, for `levers` 4096)", NUMBER),
    "--checkpointing": ("whether our steps recompute activations: on, off or auto (default: auto)", {}),
    "--compiled": ("also with compiled layers, which takes longer", {"action": "store_true"}),
    "--samples": ("records that are read in a round (default: 256)", NUMBER),
    "--workers": ("worker processes; repeat for several (default: 0, 1, 2)", {**REPEATED, **NUMBER}),
    "--layers": ("layers of the LLM (default: 16)", NUMBER),
    "--width": ("width of the features or hidden states; a 7B model's are 4096 wide", NUMBER),
    "--keep": ("share of the tokens that is kept (default: 0.1)", {"type": float}),
    "--repeats": ("rounds that are timed", NUMBER),
    "--gpu": (f"use no more memory than {GPU} has", {"type": gib, "metavar": "GB"}),
    "--device": ("cpu or cuda (default: cpu)", {}),
    "--out": ("write the numbers to this JSON file", {}),
    "--png": ("draw the results", {}),
}
TIMED = "--repeats --device --out --png"
COMMANDS = {  # what it measures, and its flags: parameters of `measure`
    "step": (
        "a training step, beside what people run today",
        f"--size --family --tune --text --batch --micro --budget --checkpointing {TIMED}",
    ),
    "levers": (
        "what each lever of a step is worth: the step with it and without",
        f"--size --family --tune --batch --budget --compiled {TIMED}",
    ),
    "loss": ("the answer loss: time and memory, beside logits of every token", f"--width {TIMED}"),
    "scaling": ("how a step grows with the picture, to a video of 11,520 tokens", f"--size {TIMED}"),
    "data": (
        "records per second, beside what a GPU needs",
        "recipe --set --family --samples --workers --repeats --out --png",
    ),
    "pruning": ("what choosing the tokens costs", f"--width --keep {TIMED}"),
    "savings": (
        "what skipping tokens, layers and answers saves, compared with what their FLOPs promise",
        f"--layers --width {TIMED}",
    ),
    "memory": (
        "the memory that recipes need, compared with the estimate; downloads nothing",
        "recipes --set --gpu --out",
    ),
}


def add(subparsers) -> None:
    """Adds the commands to argparse's subparsers of `tinyspeed bench`."""
    for name, (help, flags) in COMMANDS.items():
        parser = subparsers.add_parser(name, help=help, description=help)
        parser.set_defaults(command=partial(_run, name))
        for flag in flags.split():
            said, how = FLAGS[flag]
            parser.add_argument(flag, help=said, **how)


def _run(name: str, a: argparse.Namespace) -> int:
    """Runs a benchmark. A flag that is not given has the default of the function that it goes to."""
    from .. import recipe

    settings = {key: value for key, value in vars(a).items() if value is not None and key != "command"}
    changes = settings.pop("set", [])
    if "recipe" in settings:
        settings["recipe"] = recipe.read(a.recipe, changes)
    if "recipes" in settings:
        settings["recipes"] = {path: recipe.read(path, changes) for path in a.recipes}
    benchmark = import_module(f".{name}", __package__)
    if name == "memory":
        benchmark.run(**settings)
    else:
        from . import harness

        harness.run(benchmark, **settings)
    return 0
