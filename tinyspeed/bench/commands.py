"""`tinyspeed bench WHAT`. As in `cli.py`, nothing here imports torch before the arguments have been looked at."""

import argparse
from collections.abc import Callable


def add(what) -> None:
    """The commands, to the subparsers `what`."""

    def command(name: str, function: Callable, help: str, device: bool = True) -> argparse.ArgumentParser:
        made = what.add_parser(name, help=help, description=help)
        made.set_defaults(command=function)
        if device:
            made.add_argument("--device", default="cpu")
        made.add_argument("--out", help="write the numbers to this JSON file")
        if name != "memory":
            made.add_argument("--png", help="draw them")
        return made

    made = command("step", _step, "a training step, beside what people run today")
    made.add_argument("--size", default="tiny", help="tiny, 1b, 7b or 13b (default: tiny)")
    made.add_argument("--family", default="1.5", help="1.5 or next (default: 1.5)")
    made.add_argument("--tune", default="lora", help="lora, qlora or full (default: lora)")
    made.add_argument("--text", action="append", help='words a sample, or "mix"; repeat for several')
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--micro", type=int, default=0, help="samples that rivals take at a time (0: the batch)")
    made.add_argument("--budget", type=int, default=0, help="rows that ours take at a time (0: the batch)")
    made.add_argument("--checkpointing", default="auto", help="on: ours recompute as rivals do; off, auto (default)")
    made.add_argument("--repeats", type=int, default=5)

    made = command("levers", _levers, "what each lever of a step is worth: the step with it and without")
    made.add_argument("--size", default="tiny", help="tiny, 1b, 7b or 13b (default: tiny)")
    made.add_argument("--family", default="1.5", help="1.5 or next (default: 1.5)")
    made.add_argument("--tune", default="lora", help="lora, qlora or full (default: lora)")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--budget", type=int, default=4096, help="rows at a time (default: 4096)")
    made.add_argument("--compiled", action="store_true", help="also with compiled layers, which takes longer")
    made.add_argument("--repeats", type=int, default=5)

    made = command("loss", _loss, "the answer loss: time and memory, beside logits of every row")
    made.add_argument("--width", type=int, default=4096)
    made.add_argument("--repeats", type=int, default=5)

    made = command("scaling", _scaling, "how a step grows with the picture, to a video of 11,520 tokens")
    made.add_argument("--size", default="tiny", help="tiny, 1b, 7b or 13b (default: tiny)")
    made.add_argument("--repeats", type=int, default=5)

    made = command("data", _data, "records a second, beside what a GPU asks for", device=False)
    made.add_argument("recipe", nargs="?", metavar="RECIPE.toml", help="its data; without it, pictures made here")
    made.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change one value")
    made.add_argument("--family", default="1.5", help="of pictures made here: for LLaVA 1.5 or next (default: 1.5)")
    made.add_argument("--samples", type=int, default=256)
    made.add_argument("--workers", action="append", type=int, help="repeat for several (default: 0, 1, 2)")
    made.add_argument("--repeats", type=int, default=3)

    made = command("pruning", _pruning, "what choosing the rows costs")
    made.add_argument("--width", type=int, default=1024, help="of the features; a 7B model's are 4096 wide")
    made.add_argument("--repeats", type=int, default=20)
    made.add_argument("--keep", type=float, default=0.1)

    made = command("savings", _savings, "what skipping rows, layers and answers saves, beside what it promises")
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--width", type=int, default=256)

    made = command("memory", _memory, "what recipes need, beside what is estimated; downloads nothing", device=False)
    made.add_argument("recipe", nargs="+", metavar="RECIPE.toml", help="recipe files, or names of built-in ones")
    made.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change one value of all")
    made.add_argument("--gpu", type=float, metavar="GIB", help="as on a GPU with so much memory")


def _step(a) -> int:
    from .step import bench_step

    sizes = {"batch": a.batch, "micro": a.micro, "budget": a.budget, "repeats": a.repeats}
    sizes["checkpointing"] = a.checkpointing
    texts = tuple(a.text or ("64", "128", "256", "mix"))
    bench_step(a.size, a.family, a.tune, texts, **sizes, device=a.device, out=a.out, png=a.png)
    return 0


def _levers(a) -> int:
    from .levers import bench_levers

    sizes = {"batch": a.batch, "budget": a.budget, "compiled": a.compiled, "repeats": a.repeats}
    bench_levers(a.size, a.family, a.tune, **sizes, device=a.device, out=a.out, png=a.png)
    return 0


def _loss(a) -> int:
    from .loss import bench_loss

    bench_loss(a.width, repeats=a.repeats, device=a.device, out=a.out, png=a.png)
    return 0


def _scaling(a) -> int:
    from .scaling import bench_scaling

    bench_scaling(a.size, repeats=a.repeats, device=a.device, out=a.out, png=a.png)
    return 0


def _data(a) -> int:
    from .. import recipe

    chosen = recipe.read(a.recipe, a.set) if a.recipe else None
    from .data import bench_data

    bench_data(chosen, a.family, a.samples, tuple(a.workers or (0, 1, 2)), a.repeats, out=a.out, png=a.png)
    return 0


def _pruning(a) -> int:
    from .pruning import bench_pruning

    bench_pruning((16, 576, a.width), a.keep, a.repeats, a.device, a.out, a.png)
    return 0


def _savings(a) -> int:
    from .savings import bench_savings

    bench_savings(a.layers, a.width, device=a.device, out=a.out, png=a.png)
    return 0


def _memory(a) -> int:
    from .. import recipe

    chosen = {name: recipe.read(name, a.set) for name in a.recipe}
    from .memory import bench_memory

    bench_memory(chosen, a.gpu, a.out)
    return 0
