"""The command line of scale.

torchrun --nproc-per-node 8 -m scale RECIPE.toml [--set section.key=value ...]     train; goes on by itself
python -m scale plan RECIPE.toml --gpus 8,64,512 --gpu h100                        what it costs, beforehand
"""

import argparse
import os
import sys
import traceback

from tinyspeed import cli  # light: no torch yet
from tinyspeed.training import stopping
from tinyspeed.util import UserError, errors


@cli.safe_streams()
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cli.silence_libraries()
    cli.block_hub_kernels()
    if argv[:1] == ["plan"]:
        from .planner.plan import main as plan

        return plan(argv[1:])
    parser = _Parser(prog="python -m scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a built-in one")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change one value")
    parser.add_argument("--dry-run", action="store_true", help="one step of each mode on the longest record")
    a = parser.parse_args(argv)

    from . import ranks

    try:
        with ranks.join() as here:
            stopped = _run(a, here)
    except UserError as error:  # the ranks have not found each other
        print(f"tinyspeed: {error}", file=sys.stderr)
        return ranks.MISTAKE
    if stopped is not None and here.is_main:
        print("saved; the same command goes on", file=sys.stderr)
    return stopping.exit_code(stopped)


def _run(a: argparse.Namespace, here) -> int | None:
    """Trains, or makes the dry run. An error on this rank ends all ranks."""
    from tinyspeed import recipe
    from tinyspeed.util.tables import table

    from . import ranks, run

    try:
        chosen = recipe.read(a.recipe, a.set)
        if not a.dry_run:
            return run.train(chosen, here)
        rows = []
        for f in run.dry_run(chosen, here):
            size, seconds = f"{f['memory_mib'] / 1024:.2f}", f"{f['seconds']:.2f}"
            rows.append([f["stage"], f["mode"], f"{f['samples']:,}", f"{f['rows']:,}", size, seconds])
        if here.is_main:
            print(table(["stage", "mode", "samples", "tokens", f"GiB, of rank 0 of {here.size}", "seconds"], rows))
    except (UserError, OSError, UnicodeEncodeError) as error:
        where = f"{here.name}: " if here.size > 1 else ""
        here.abort(ranks.MISTAKE, f"tinyspeed: {where}{cli.message_of(error)}")
    except Exception as error:
        if ranks.means_lost_rank(error):
            raise  # which `join` deals with
        if errors.no_memory(error):
            here.abort(ranks.MISTAKE, f"tinyspeed: {here.name}: {errors.memory_ran_out(error, here.where)}")
        here.abort(ranks.FAULT, f"{here.name}, {here.where}:\n{traceback.format_exc()}")
    except KeyboardInterrupt:  # the second one, or one before the first step
        os._exit(130)


class _Parser(cli.Parser):
    """A parser that complains on rank 0 only, since every rank reads the same arguments."""

    def error(self, message: object) -> None:
        if os.environ.get("RANK", "0") == "0":
            super().error(message)
        self.exit(2)


if __name__ == "__main__":
    sys.exit(main())
