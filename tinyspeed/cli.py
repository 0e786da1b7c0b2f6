"""The command line: one program, `tinyspeed`. A mistake of the user's is one line and exit code 2."""

import argparse
import os
import signal
import sys
from pathlib import Path

from . import __version__, pruning
from .errors import UserError


def main(argv: list[str] | None = None) -> int:
    # The bars and notices of ours are enough: transformers' own would drown them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except UserError as error:
        print(f"tinyspeed: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full or read-only disk, a folder that is a file
        print(f"tinyspeed: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside of the steps, which save first
        print("tinyspeed: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinyspeed", description="Train vision-language models faster by pruning visual tokens in training."
    )
    parser.add_argument("--version", action="version", version=f"tinyspeed {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(command=function)
        return made

    def takes_recipe(made: argparse.ArgumentParser, default: str | None = None) -> None:
        if default is None:
            made.add_argument("recipe", metavar="RECIPE.toml", help="a recipe file, or the name of a built-in one")
        else:
            made.add_argument("recipe", nargs="?", default=default, help=f"a recipe (default: the built-in {default})")
        made.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change one value")

    made = command("demo", _demo, "the embedded default: real handwritten digits, on a CPU, in minutes")
    takes_recipe(made, "digits")
    made.add_argument("--short", action="store_true", help="a few steps only, to see that everything runs")

    made = command("train", _train, "train a recipe")
    takes_recipe(made)
    made.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")

    made = command("compare", _compare, "full training, pruned-only, DualSpeed and its ablations, side by side")
    takes_recipe(made, "digits")
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--arms", help="only these, separated by commas (default: all)")

    made = command("eval", _eval, "accuracy of a run's model, on full and on pruned tokens")
    made.add_argument("run", metavar="RUN", help="a run's folder, such as runs/demo")

    made = command("export", _export, "write a run's newest checkpoint as a plain Hugging Face folder")
    made.add_argument("run", metavar="RUN")
    made.add_argument("out", metavar="OUT")

    made = command("look", _look, "draw which tokens every plugin keeps of a picture")
    made.add_argument("image")
    made.add_argument("--plugin", action="append", choices=pruning.names(), help="repeat for several; default: all")
    made.add_argument("--keep", type=float, default=0.1)
    made.add_argument("--tower", help="a LLaVA or CLIP folder, or hub id, whose features the plugins see")
    made.add_argument("--seed", type=int, default=0, help="for plugins that draw")
    made.add_argument("--out", default="look.png")

    made = command("bench", _bench, "measure speed on this machine")
    made.add_argument("what", choices=["pruning"])
    made.add_argument("--keep", type=float, default=0.1)
    made.add_argument("--device", default="cpu")
    made.add_argument("--out", help="write the numbers to this JSON file")
    return parser


def _stopped(number: int | None, how_to_go_on: str = "saved; continue with --resume") -> int:
    """Exit code of a run: 0, also for Ctrl-C (it is saved); 143 for SIGTERM, as job schedulers expect."""
    if number is not None:
        print(how_to_go_on, file=sys.stderr)
    return 143 if number == signal.SIGTERM else 0


def _demo(a) -> int:
    from . import demo, recipe

    chosen = recipe.read(a.recipe, a.set)
    return _stopped(demo.demo(demo.short(chosen) if a.short else chosen).stopped_by, "saved; the same command goes on")


def _train(a) -> int:
    from . import recipe, report
    from .train import train

    chosen = recipe.read(a.recipe, a.set)
    result = train(chosen, resume=a.resume)
    if result.totals.steps:
        report.draw_run(chosen.folder)
    if result.stopped_by is None:
        t = result.totals
        speedup = f", {result.speedup:.2f}x full" if result.speedup else ""
        print(f"{t.steps} steps, {t.seconds:.0f} s{speedup}; model in {chosen.folder / 'model'}")
    return _stopped(result.stopped_by)


def _compare(a) -> int:
    from . import compare, recipe

    chosen = recipe.read(a.recipe, a.set)
    arms = [arm.strip() for arm in a.arms.split(",")] if a.arms else None
    stopped = compare.compare(chosen, a.seeds, arms)
    if stopped is None:
        folder = compare.folder_of(chosen)
        print((folder / "compare.md").read_text())
        print(f"numbers in {folder / 'compare.json'}, picture in {folder / 'compare.png'}")
    return _stopped(stopped, "stopped; the same command goes on, beginning with this arm")


def _eval(a) -> int:
    from . import evaluate, report
    from .recipe import of_run
    from .train import load_trained

    chosen = of_run(a.run)
    full, pruned = evaluate.held_out(load_trained(chosen), chosen)
    print(report.table(["tokens", "% right"], [["full", f"{full:.1f}"], ["pruned", f"{pruned:.1f}"]]))
    return 0


def _export(a) -> int:
    from .recipe import of_run
    from .train import export, load_trained

    if Path(a.out).exists():
        raise UserError(f"{a.out} exists already; nothing was overwritten")
    chosen = of_run(a.run)
    export(load_trained(chosen), chosen, Path(a.out))
    print(f"{a.out}: load it with transformers.AutoModelForImageTextToText")
    return 0


def _look(a) -> int:
    from .look import look

    kept = look(a.image, a.out, plugins=a.plugin, keep=a.keep, tower=a.tower, seed=a.seed)
    print(
        f"{a.out if Path(a.out).suffix else a.out + '.png'}: "
        + ", ".join(f"{name} keeps {len(rows)}" for name, rows in kept.items())
    )
    return 0


def _bench(a) -> int:
    from .bench import bench_pruning

    bench_pruning(keep=a.keep, device=a.device, out=a.out)
    return 0
