"""Executes the course: every chapter from top to bottom in a fresh kernel, as a reader would.

A chapter fails if a cell raises an error, and its cells assert what they teach. The outputs are part of the text, and
`--keep` writes them into the notebook. Progress bars (stderr) and the times of execution are left out.

    python tutorials/run.py                   all chapters, in full
    python tutorials/run.py 1 3 --keep        two chapters; their notebooks get the new outputs
    python tutorials/run.py --short           every cell, with fewer repeats and shorter training (SHORT=1)
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

HERE = Path(__file__).parent
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def chapters(numbers: list[int]) -> list[Path]:
    found = {int(file.stem.split("-")[0]): file for file in sorted(HERE.glob("[0-9]*.ipynb"))}
    if unknown := set(numbers) - set(found):
        raise SystemExit(f"no chapter {min(unknown)}; there are {', '.join(map(str, found))}")
    return [found[number] for number in numbers or found]


def tidy(outputs: list) -> list:
    """Returns the outputs without stderr, and with consecutive pieces of stdout joined into one."""
    kept = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name == "stdout":
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(output)
    return kept


def execute(file: Path, short: bool = False) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of this execution. Raises CellExecutionError if a cell fails."""
    notebook = nbformat.read(file, as_version=4)
    environment = {name: value for name, value in os.environ.items() if name != "SHORT"}
    if short:
        environment["SHORT"] = "1"
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    with (
        tempfile.TemporaryDirectory() as sockets,  # files, not ports, which other users of the machine could reach
        tqdm(desc=file.name, total=cells, unit="cell", mininterval=0, leave=False) as bar,
    ):
        client = NotebookClient(
            notebook, kernel_name="python3", timeout=1800, startup_timeout=600, iopub_timeout=600, record_timing=False
        )
        client.on_cell_executed = lambda **_: bar.update()
        kernel = client.create_kernel_manager()
        kernel.transport, kernel.ip = "ipc", f"{sockets}/kernel"
        client.execute(cwd=str(file.parent), env=environment)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", type=int, metavar="N", help="numbers of chapters; all if none is given")
    parser.add_argument("--short", action="store_true", help="fewer repeats, every cell")
    parser.add_argument("--keep", action="store_true", help="write the outputs into the notebooks")
    asked = parser.parse_args(arguments)
    if asked.short and asked.keep:
        parser.error("--keep is for the outputs of a full run: it cannot be combined with --short")
    failed = 0
    for file in chapters(asked.chapters):
        began = time.monotonic()
        try:
            notebook = execute(file, asked.short)
        except CellExecutionError as error:
            failed = 1
            said = COLOUR.sub("", str(error))
            print(f"{file.name}: FAILED after {time.monotonic() - began:.0f} s\n{said}", flush=True)
            continue
        if asked.keep:
            nbformat.write(notebook, file)
        print(f"{file.name}: {time.monotonic() - began:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
