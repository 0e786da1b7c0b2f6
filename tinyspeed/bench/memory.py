"""What recipes need in memory, measured on this machine, beside what `estimate` says. Nothing is downloaded.

    tinyspeed bench memory llava-1.5-7b-qlora-8gb --gpu 8 --out memory.json

Memory does not ask what the weights are, nor what is in the picture. So a checkpoint of random weights is written in
the hub's format and read back as a run reads it (what loading leaves behind is part of the truth), and every mode of
every stage takes one step on the longest example that `estimate` assumes, in the recipe's own micro-batches. `--gpu 8`
holds the process to what a GPU of 8 GiB would leave it, so that a large one decides as a small one does, and runs out
of memory where a small one would. Data of your own is what `tinyspeed train --dry-run` measures.

Each recipe has a process of its own: what one leaves behind counts for no other. What is measured of a GPU is what
tensors take ("measured"), and what torch has reserved for them ("reserved", in the JSON); CUDA's own is "outside".

How little does QLoRA of rank 16 take, its optimizer in 32 bits, one sample at a time?

    little="--set lora.rank=16 --set train.optimizer=adamw --set train.row_budget=1 --set train.checkpointing=on"
    tinyspeed bench memory llava-1.5-7b-qlora-8gb llava-1.5-13b-qlora-24gb $little
    next="llava-next-7b-qlora-12gb --set data.max_rows=2900"
    tinyspeed bench memory $next $little
    tinyspeed bench memory $next $little --set model.path=llava-hf/llava-v1.6-vicuna-13b-hf
"""

import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import cuda
from transformers import AutoModelForImageTextToText

from ..models import loading, precision
from ..models.memory import GIB, Shape
from ..recipe import Recipe
from ..training import build, train
from ..util import provenance
from ..util.errors import UserError
from ..util.tables import table
from .estimate import ON_A_CPU, Case, assumed, changed
from .noise import Noise
from .timing import write

SLACK = 1.05  # what else a checkpoint needs on disk, and on the GPU that it is drawn on


def bench_memory(recipes: dict[str, Recipe], gpu: float | None = None, out: Path | str | None = None) -> dict:
    """Measure these recipes, by name. Prints a table, returns everything, and writes it as JSON to `out`, anew after
    each recipe. One that does not fit is named when all are done."""
    if gpu is not None and not 0 < gpu < math.inf:
        raise UserError(f"--gpu {gpu:g}: must be above 0")
    models: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        if not recipe.model.path:
            raise UserError(f"{name}: its model is put together by the run itself; give a recipe with a model.path")
        if gpu is not None and precision.device_of(recipe.run.device).type != "cuda":
            raise UserError("--gpu: there is no GPU here that could be held to it")
        longest(recipe, loading.load_config(recipe.model.path))
        models.setdefault(recipe.model.path, []).append(name)
    _check_disk(models)
    result = provenance.describe(bench="memory", held_to_gib=gpu, recipes=[])
    for path, names in models.items():
        with tempfile.TemporaryDirectory(prefix="tinyspeed-") as folder:
            print(f"{path}: drawing {_size(path) / GIB:.1f} GiB of random weights in {folder}", file=sys.stderr)
            _alone(draw, path, folder, recipes[names[0]].run.device)
            for name in names:
                print(f"{name}: loading, and one step of every mode", file=sys.stderr)
                found = _alone(measure, recipes[name], folder, gpu)
                result["device"] = found.pop("device")
                result["recipes"].append({"recipe": name, "path": path, **found})
                if out is not None:
                    write(result, Path(out))
    print(describe(result))
    failed = [f"{found['recipe']}: {found['error']}" for found in result["recipes"] if found["error"]]
    if failed:
        raise UserError("; ".join(failed))
    return result


def describe(result: dict) -> str:
    rows = []
    for found in result["recipes"]:
        for m in found["modes"]:
            sizes = [None if m[kind] is None else f"{m[kind]:.2f}" for kind in ("measured_gib", "estimated_gib")]
            off = None if m["off_percent"] is None else f"{m['off_percent']:+.1f}"
            how = ["no", "yes"][m["recompute"]] + " (not as estimated)" * (m["recompute"] != m["estimated_recompute"])
            counts = [f"{m['rows']:,}", m["samples"], how]
            rows.append([found["recipe"], m["stage"], m["mode"], *counts, *sizes, off, f"{m['seconds']:.1f}"])
    headers = ["recipe", "stage", "mode", "rows", "samples", "recompute"]
    said = table([*headers, "measured GiB", "estimated GiB", "off by %", "seconds"], rows)
    cpu = any(found["gpu_gib"] is None for found in result["recipes"])
    held = f", held to {result['held_to_gib']:g} GiB" if result["held_to_gib"] else ""
    return f"{result['device']}{held}\n\n{said}" + f"\n\n{ON_A_CPU}" * cpu


def longest(recipe: Recipe, config) -> Noise:
    """The example that `estimate` assumes."""
    try:
        return Noise(config, [assumed(recipe, Shape(config))])
    except UserError as error:
        raise UserError(f"{recipe.model.path}: {error}; data.max_rows = {recipe.data.max_rows:,}") from error


def draw(path: str, folder: str, device: str) -> None:
    """Random weights of a model's shape, drawn where they are drawn fastest, as `save_pretrained` leaves them."""
    torch.manual_seed(0)
    where = precision.device_of(device)
    if where.type == "cuda" and cuda.mem_get_info(where)[0] < SLACK * _size(path):
        where = torch.device("cpu")
    with where:
        model = AutoModelForImageTextToText.from_config(
            loading.load_config(path), dtype=torch.bfloat16, trust_remote_code=False
        )
    model.save_pretrained(folder, max_shard_size="5GB")


def measure(recipe: Recipe, folder: str, gpu: float | None) -> dict:
    """A recipe on the weights in `folder`: its modes, and the error that ended them."""
    recipe = changed(recipe, {"model.path": folder})
    build.set_threads(recipe)
    (device, name), source = build.place(recipe), longest(recipe, loading.load_config(folder))
    found = {
        "device": cuda.get_device_name(device) if device.type == "cuda" else provenance.cpu_name(),
        "gpu_gib": None, "outside_gib": None, "precision": name, "quantise": recipe.model.quantise,
        "rank": recipe.lora.rank, "optimizer": recipe.train.optimizer, "picture": list(source.sizes[0]),
        **dict(zip(("text", "visual", "answers"), source.lengths(0), strict=True)),
        "modes": [], "error": None,
    }  # fmt: skip
    try:
        model = build.build_model(recipe)
        if device.type == "cuda":
            found["gpu_gib"], found["outside_gib"] = _hold(model.device, gpu)
        case = Case(Shape(source.config), [source.lengths(0)], 1, "noise", name, found["gpu_gib"])
        for m in train.rehearsals(recipe, model, source):
            same = case.micro_batch(recipe, m["stage"], m["mode"], source.lengths(0), m["samples"])
            found["modes"].append(_beside(m, same, device))
    except (UserError, torch.OutOfMemoryError) as error:
        found["error"] = str(error).splitlines()[0]
    return found


def _beside(m: dict, same, device: torch.device) -> dict:
    """What was measured, and what was estimated of the same micro-batch."""
    measured, estimated = m.pop("memory_mib"), same.peak / GIB
    measured = None if measured is None else measured / 1024
    return {
        **m,
        "measured_gib": measured,
        "estimated_gib": estimated,
        "off_percent": None if measured is None else 100 * (estimated / measured - 1),
        "estimated_recompute": same.recompute,
        "reserved_gib": cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else None,
    }


def _hold(device: torch.device, gpu: float | None) -> tuple[float, float]:
    """Let this process have of its GPU what a smaller one would leave it. The GiB of that, and what is not torch's."""
    cuda.empty_cache()
    free, total = cuda.mem_get_info(device)
    outside = total - free - cuda.memory_reserved(device)
    if gpu is None:
        return total / GIB, outside / GIB
    if gpu * GIB > total:
        raise UserError(f"--gpu {gpu:g}: this one has {total / GIB:.1f} GiB")
    cuda.set_per_process_memory_fraction(max(0.0, (gpu * GIB - outside) / total), device.index)
    return gpu, outside / GIB


def _size(path: str) -> int:
    return 2 * sum(Shape(loading.load_config(path)).parameters.values())


def _check_disk(paths) -> None:
    """The largest checkpoint must fit; each is deleted before the next is written."""
    needs, folder = SLACK * max(map(_size, paths)), tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needs > free:
        raise UserError(
            f"random weights need {needs / GIB:.1f} GiB of disk, and {folder} has {free / GIB:.1f} GiB free: set "
            f"TMPDIR to a larger one"
        )


def _alone(task: Callable, *arguments):
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(task, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError("the process that measured was killed, most likely for want of memory") from error
