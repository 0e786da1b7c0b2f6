"""The command line: one program, `tinyspeed`. A user's mistake is reported in one line, with exit code 2.

torch takes a second to import and transformers four. So neither is imported before the recipe, the paths and the
arguments have been checked, and a typing mistake is reported at once.
"""

import argparse
import errno
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from . import __version__
from .bench import commands as bench_commands
from .training import stopping
from .util import UserError, counted, errors, files, located, paths, require, require_known, tables, unknown


def main(argv: list[str] | None = None) -> int:
    # As an exception a signal lets whoever is writing a file delete what there is of it.
    ended = stopping.handled(stopping.ENDING, lambda number, frame: sys.exit(stopping.exit_code(number)))
    with safe_streams(), ended:
        silence_libraries()
        block_hub_kernels()
        arguments = _parser().parse_args(argv)
        try:
            os.getcwd()  # fails if it has been deleted
            code = arguments.command(arguments)
            sys.stdout.flush()  # at exit nobody would report that this fails
            return code
        except (UserError, OSError, UnicodeEncodeError) as error:
            print(f"tinyspeed: {message_of(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:  # while no step runs; a step saves first
            print("tinyspeed: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if not errors.no_memory(error):
                raise
            where = f"during `tinyspeed {(argv or sys.argv[1:])[0]}`"
            print(f"tinyspeed: {errors.memory_ran_out(error, where)}", file=sys.stderr)
            return 2


def silence_libraries() -> None:
    """Turns off the progress bars and notices of transformers and others, so that ours can be seen."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns about forked workers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of packages about each other


@contextmanager
def safe_streams() -> Iterator[None]:
    """Standard streams that end no run, even if they are closed, not read (as behind `| head`) or lack characters."""
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:  # or one of our files would become, say, standard error
        pass
    os.close(handle)
    out, err = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="backslashreplace")
    with redirect_stdout(SafeStream(out, needed=True)), redirect_stderr(SafeStream(err)):
        yield
        with suppress(OSError):
            sys.stdout.flush()


class SafeStream:
    """A standard stream that need not be read. If it is not `needed`, not even a full disk makes it end a run."""

    def __init__(self, stream, needed: bool = False):
        self._stream, self._needed = stream, needed

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable, *given: str) -> None:
        try:
            act(*given)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EBADF):
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())  # Python tries again at exit
            elif self._needed:
                raise

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def block_hub_kernels() -> None:
    """Hides the package `kernels`, with which bitsandbytes and transformers would run compiled code from the hub."""
    sys.modules.setdefault("kernels", None)


def message_of(error: UserError | OSError | UnicodeEncodeError) -> str:
    """The line that reports an error. An OSError is a full disk, or a path that is not what it should be."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        return f"cannot write {error.object[max(0, error.start - 40) :][:80]!r}: rename it, or set LC_ALL=C.UTF-8"
    if (error.errno, error.filename) == (errno.ENOENT, None):  # os.getcwd() alone raises this
        return "the working directory has been deleted: change to one that exists"
    if number := files.errno_of(error):
        return str(files.DiskError(error.filename or "standard output", number))
    return str(UserError(": ".join(str(part) for part in (error.strerror or error, error.filename) if part)))


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, and names the flag that was meant."""

    def parse_known_args(self, args=None, namespace=None):
        found, left = super().parse_known_args(args, namespace)
        if left:
            many = f"{left[0]!r} is one argument too many: is a flag missing before it, or quotes around some words?"
            flags = [flag.strip("-") for flag in self._option_string_actions]
            unread = unknown("flag", left[0].partition("=")[0].strip("-"), flags, "--")
            self.error(unread if left[0].startswith("-") else many)
        return found, left

    def error(self, message: object) -> None:
        self.exit(2, f"tinyspeed: {UserError(message)} (`{self.prog} --help` says more)\n")


def _parser() -> Parser:
    says = "Train vision-language models faster by pruning image tokens in training."
    parser = Parser(prog="tinyspeed", description=says)
    parser.add_argument("--version", action="version", version=f"tinyspeed {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, help: str, takes: str = "") -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        made.set_defaults(command=function)
        if takes == "recipe":
            made.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a built-in one")
        elif takes == "digits":
            made.add_argument("recipe", nargs="?", default="digits", help="a recipe (default: the built-in digits)")
        elif takes == "model":
            made.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder, a model's folder or a hub id")
            made.add_argument("--system", metavar="TEXT", help="a system message (default: a run's own, or none)")
        if takes in ("recipe", "digits"):
            made.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change a value")
        return made

    made = command("demo", _demo, "train on handwritten digits, in minutes, and show the results", "digits")
    made.add_argument("--short", action="store_true", help="a few steps only, to see that everything runs")

    made = command("train", _train, "train a recipe", "recipe")
    made.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    made.add_argument("--skip-bad", action="store_true", help="leave bad records out and list them in skipped.txt")
    made.add_argument("--dry-run", action="store_true", help="take one step of each mode on the longest record only")

    made = command("estimate", _estimate, "memory and time of a recipe, before anything is loaded", "recipe")
    made.add_argument("--gpu", type=bench_commands.gib, metavar="GB", help=f"does it fit {bench_commands.GPU}?")
    made.add_argument("--tflops", type=float, help="speed that your GPU sustains, for the times (default: 20)")

    made = command("ask", _ask, "ask a run's model, or any LLaVA, about a picture", "model")
    made.add_argument("words", nargs="+", metavar="[IMAGE ...] QUESTION")
    made.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens (default: 256)")

    says = "full training, DualSpeed, and arms of your own, side by side, on digits"
    made = command("compare", _compare, says, "digits")
    made.add_argument("--seeds", type=int, default=1, help="how many seeds to run (default: 1)")
    arms = made.add_mutually_exclusive_group()
    arms.add_argument("--arms", default="paper", help="a TOML file of arms, or a built-in one (default: paper)")
    arms.add_argument("--vary", action="append", metavar="section.key=v1,v2", help="an arm for each combination")
    made.add_argument("--only", metavar="ARM,ARM", help="only these arms")

    says = "the score of a model in an official benchmark, or the accuracy of a run on digits"
    made = command("eval", _eval, says, "model")
    made.add_argument("--task", help="pope, scienceqa, textvqa, vqav2 or gqa")
    made.add_argument("--questions", metavar="PATH", help="the benchmark's own file, or folder of files")
    made.add_argument("--beside", metavar="PATH", help="textvqa: a file of OCR tokens; vqav2: the annotations")
    made.add_argument("--images", metavar="FOLDER", help="the folder of its pictures")
    made.add_argument("--out", metavar="FILE", help="file of predictions (default: in the run's folder, or here)")

    made = command("export", _export, "write a run's newest checkpoint as a plain Hugging Face folder")
    made.add_argument("run", metavar="RUN")
    made.add_argument("out", metavar="OUT")
    made.add_argument("--adapter", action="store_true", help="only the LoRA adapter and the projector, for peft")

    made = command("look", _look, "draw which tokens every plugin keeps of a picture")
    made.add_argument("image", metavar="IMAGE")
    made.add_argument("--plugin", action="append", metavar="NAME", help="may be repeated (default: all untrained ones)")
    made.add_argument("--keep", type=float, default=0.1, help="share of the tokens to keep (default: 0.1)")
    made.add_argument("--tower", help="a LLaVA or CLIP folder, or hub id, whose features the plugins see")
    made.add_argument("--cells", action="store_true", help="show in each pruned place the kept token most like it")
    made.add_argument("--seed", type=int, default=0, help="seed of the plugins that choose at random")
    made.add_argument("--out", help="file of the drawing, overwritten (default: IMAGE-kept.png, over drawings only)")

    says = "measure speed and memory on this machine"
    bench = commands.add_parser("bench", help=says, description=says)
    bench_commands.add(bench.add_subparsers(required=True, metavar="WHAT"))
    return parser


def _stopped(number: int | None, go_on: str = "saved; continue with --resume") -> int:
    """The exit code of a run, after a word about how to go on if a signal has stopped it."""
    if number is not None:
        print(go_on, file=sys.stderr)
    return stopping.exit_code(number)


def _recipe(a, *more: str):
    from .recipe import read

    return read(a.recipe, [*a.set, *more])


def _demo(a) -> int:
    chosen = _recipe(a)
    from .evaluation import demo

    return _stopped(demo.demo(demo.short(chosen) if a.short else chosen).stopped_by, "saved; the same command goes on")


def _train(a) -> int:
    chosen = _recipe(a, *["data.skip_bad=true"] * a.skip_bad)
    from .training import run_folder

    run_folder.require_sources(chosen)
    if a.dry_run:
        from .bench import estimate
        from .training.train import dry_run

        source, measured = dry_run(chosen)
        found = estimate.estimate(chosen, source=source) if estimate.is_possible(chosen) else None
        print(estimate.compare_measured(found, measured))
        return 0
    run_folder.require_free_or_resumable(chosen, a.resume)
    from .training import report
    from .training.train import train

    complete = (chosen.folder / "model").is_dir()
    try:
        result = train(chosen, resume=a.resume)
        if result.totals.steps:
            report.draw_run(chosen.folder)
    except files.DiskError as error:
        if run_folder.has_begun(chosen.folder):
            error.then = "continue with --resume"
        raise
    if result.stopped_by is None:
        t = result.totals
        speedup = f", {t.speedup:.2f}x full" if t.speedup else ""
        before = "the run was complete already: " if complete else ""
        print(f"{before}{counted(t.steps, 'step')}, {t.seconds:.0f} s{speedup}; model in {chosen.folder / 'model'}")
    return _stopped(result.stopped_by)


def _estimate(a) -> int:
    chosen = _recipe(a)
    from .bench import estimate

    print(estimate.describe(estimate.estimate(chosen, a.gpu, a.tflops)))
    return 0


def _ask(a) -> int:
    from .data import images

    *pictures, question = a.words
    require(not os.path.isfile(question), f"{question} is a file, but the last argument must be the question")
    _check_model(a.model)
    pictures = [images.decode(Path(picture), 'ask IMAGE "QUESTION"') for picture in pictures]
    from .evaluation import ask
    from .training.trained_model import open_model

    with open_model(a.model, system=a.system) as (model, processor, _):
        how = {"max_new_tokens": a.max_new_tokens, "streamer": ask.to_stdout(processor)}
        ask.answer(model, processor, pictures, question, **how)
    return 0


def _compare(a) -> int:
    chosen = _recipe(a)
    from .recipe import comparison

    arms = comparison.vary(chosen, a.vary, a.only) if a.vary else comparison.read(chosen, a.arms, a.only)
    from .evaluation import compare

    stopped = compare.compare(chosen, a.seeds, arms)
    if stopped is None:
        folder = compare.folder_of(chosen)
        print((folder / "compare.md").read_text(encoding="utf-8"))
        print(f"numbers in {folder / 'compare.json'}, picture in {folder / 'compare.png'}")
    return _stopped(stopped, "stopped; the same command goes on, beginning with this arm")


def _eval(a) -> int:
    from .recipe import of_run

    if a.task:
        return _benchmark(a)
    chosen = of_run(a.model) if paths.is_run(a.model) else None
    if chosen is None or chosen.data.kind != "digits":
        raise UserError(f"{a.model} is not a run on the digits: give --task, --questions and --images")
    from .evaluation import accuracy
    from .training.trained_model import load_trained

    full, pruned = accuracy.held_out(load_trained(chosen), chosen)
    print(tables.table(["tokens", "% right"], [["full", f"{full:.1f}"], ["pruned", f"{pruned:.1f}"]]))
    return 0


def _benchmark(a) -> int:
    from .evaluation import questions as official

    require_known("benchmark", a.task, official.READERS)
    require(bool(a.questions and a.images), "--task needs --questions and --images")
    require(Path(a.images).is_dir(), f"--images: there is no folder {a.images}")
    _check_model(a.model)
    questions = official.read(a.task, Path(a.questions), Path(a.beside) if a.beside else None)
    out = Path(a.out) if a.out else _predictions(a.model, a.task)
    require(out.suffix != ".json", f"--out {out}: scores go to the file of that name; call this one {out.stem}.jsonl")
    print(f"predictions go to {out}", file=sys.stderr)
    from .data.chat import Chat
    from .evaluation import ask, benchmarks
    from .training.trained_model import open_model

    with open_model(a.model, system=a.system) as (model, processor, name):
        chat, prompts = Chat(processor), []
        for question in questions:  # all of them before the first is asked, so that none is refused after hours
            with located(f"{a.task} question {question.id}"):
                prompts.append(chat.prompt(question.text, bool(question.image)))
        asked = lambda pictures, text: ask.answer(model, processor, pictures, text)
        predictions = benchmarks.run(a.task, questions, Path(a.images), asked, out, model=name, prompts=prompts)
    if any(question.truth is None for question in questions):
        file = out.with_suffix(".submission.json")
        files.write_atomically(file, json.dumps(benchmarks.submission(questions, predictions)))
        print(f"{file}: for the benchmark's server, since the answers are not public")
        return 0
    scores = benchmarks.score(a.task, questions, predictions)
    files.write_atomically(out.with_suffix(".json"), json.dumps({"model": name, "task": a.task, **scores}, indent=1))
    print(tables.table([a.task, "%"], [[key, f"{value:.2f}"] for key, value in scores.items()]))
    print(f"predictions in {out}, scores in {out.with_suffix('.json')}")
    return 0


def _check_model(path: str) -> None:
    if not paths.is_run(path):
        paths.model_folder_or_hub_id(path)


def _predictions(model: str, task: str) -> Path:
    """In the run's folder; for any other model in the current one, since nothing is written into a model's folder."""
    if paths.is_run(model):
        return Path(model) / f"{task}.jsonl"
    whole = paths.expanded(model).resolve()
    return Path("-".join([*whole.relative_to(whole.anchor).parts[-2:], task]) + ".jsonl")


def _export(a) -> int:
    from .recipe import of_run

    require(not Path(a.out).exists(), f"{a.out} exists already; nothing was overwritten")
    run = of_run(a.run)
    from .training.trained_model import export

    export(run, Path(a.out), adapter_only=a.adapter)
    by = "peft.PeftModel.from_pretrained(base, ...)" if a.adapter else "transformers.AutoModelForImageTextToText"
    print(f"{a.out}: load it with {by}")
    return 0


def _look(a) -> int:
    out = Path(a.out or f"{Path(a.image).stem}-kept.png")
    free = a.out or not out.exists() or b"Matplotlib" in files.read(out)  # which all our drawings name
    require(bool(free), f"{out} exists already, and is not one of our drawings: choose another file with --out")
    from .evaluation.look import look

    kept = look(a.image, out, plugins=a.plugin, keep=a.keep, tower=a.tower, seed=a.seed, cells=a.cells)
    shown = ", ".join(f"{name} keeps {len(rows)}" for name, rows in kept.items())
    print(f"{out if out.suffix else f'{out}.png'}: {shown}")
    return 0
