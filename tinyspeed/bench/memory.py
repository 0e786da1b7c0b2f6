"""What recipes need in memory, measured on this machine, beside the estimate. Nothing is downloaded.

    tinyspeed bench memory llava-1.5-7b-qlora-8gb --gpu 8 --out memory.json

Memory depends neither on what the weights are nor on what is in the picture. So a checkpoint of random weights is
written in the hub's format and read back as a run reads it, since what loading leaves behind counts too. Then every
mode of every stage takes one step on the longest example that `estimate.py` assumes, in the recipe's own micro-batches.
`--gpu 8` limits the process to what a GPU of 8 GiB would leave it, so that a larger GPU decides as the small one does,
and runs out of memory where that one would. `tinyspeed train --dry-run` measures your own data.

Each recipe has a process of its own, so that what one leaves behind does not count for another. On a GPU "measured" is
what tensors take, "reserved" (in the JSON) what torch has reserved for them, and "outside" what CUDA itself takes.

How little does QLoRA of rank 16 take, with a 32-bit optimizer and one sample at a time?

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

from ..models import loading, precision
from ..models.memory import GIB, Shape
from ..recipe import Recipe
from ..training import build, train
from ..util import UserError, provenance, require, tables
from .estimate import ON_A_CPU, SIZES, Case, assumed, beside_estimate, changed, measured_cells
from .harness import write
from .random_examples import RandomExamples, random_weights

SLACK = 1.05  # a checkpoint needs so many times its weights on disk, and on the GPU where it is made


def run(recipes: dict[str, Recipe], gpu: float | None = None, out: Path | str | None = None) -> dict:
    """Measures these recipes, by name; prints a table and returns everything, which is also written to the JSON file
    `out` after each recipe. One that does not fit is an error when all are done."""
    require(gpu is None or 0 < gpu < math.inf, f"--gpu {gpu}: must be above 0")
    models: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        if not recipe.model.path:
            raise UserError(f"{name}: its model is put together by the run itself; give a recipe with a model.path")
        if gpu is not None and precision.device_of(recipe.run.device).type != "cuda":
            raise UserError("--gpu: there is no GPU here whose memory could be limited")
        longest_example(recipe, loading.load_config(recipe.model.path))
        models.setdefault(recipe.model.path, []).append(name)
    _require_disk(models)
    results = provenance.describe(bench="memory", held_to_gib=gpu, recipes=[])
    for path, names in models.items():
        with tempfile.TemporaryDirectory(prefix="tinyspeed-") as folder:
            print(f"{path}: writing {_bytes(path) / GIB:.1f} GiB of random weights to {folder}", file=sys.stderr)
            _in_a_process(write_random_weights, path, folder, recipes[names[0]].run.device)
            for name in names:
                print(f"{name}: loading, and one step of every mode", file=sys.stderr)
                found = _in_a_process(measure, recipes[name], folder, gpu)
                results["device"] = found.pop("device")
                results["recipes"].append({"recipe": name, "path": path, **found})
                if out is not None:
                    write(results, Path(out))
    print(describe(results))
    if failed := [f"{found['recipe']}: {found['error']}" for found in results["recipes"] if found["error"]]:
        raise UserError("; ".join(failed))
    return results


def describe(results: dict) -> str:
    rows = []
    for found in results["recipes"]:
        for m in found["modes"]:
            how = ["no", "yes"][m["recompute"]] + " (not as estimated)" * (m["recompute"] != m["estimated_recompute"])
            counts = [f"{m['rows']:,}", m["samples"], how]
            rows.append([found["recipe"], m["stage"], m["mode"], *counts, *measured_cells(m), f"{m['seconds']:.1f}"])
    headers = ["recipe", "stage", "mode", "tokens", "samples", "recompute"]
    text = tables.table([*headers, *SIZES, "seconds"], rows)
    limited = f", limited to {results['held_to_gib']:g} GiB" if results["held_to_gib"] else ""
    on_a_cpu = any(found["gpu_gib"] is None for found in results["recipes"])
    return f"{results['device']}{limited}\n\n{text}" + f"\n\n{ON_A_CPU}" * on_a_cpu


def longest_example(recipe: Recipe, config) -> RandomExamples:
    """Returns the example that the estimate assumes."""
    try:
        return RandomExamples(config, [assumed(recipe, Shape(config))])
    except UserError as error:
        raise UserError(f"{recipe.model.path}: {error}; data.max_rows = {recipe.data.max_rows:,}") from error


def write_random_weights(path: str, folder: str, device: str) -> None:
    """Writes a checkpoint of a model's shape. The weights are drawn on the GPU if they fit there, which is faster."""
    where, config = precision.device_of(device), loading.load_config(path)
    if where.type == "cuda" and cuda.mem_get_info(where)[0] < SLACK * _bytes(path):
        where = torch.device("cpu")
    random_weights(config, torch.bfloat16, where).save_pretrained(folder, max_shard_size="5GB")


def measure(recipe: Recipe, folder: str, gpu: float | None) -> dict:
    """Measures every mode of a recipe on the weights in `folder`, up to an error, which is returned too."""
    recipe = changed(recipe, {"model.path": folder})
    build.set_threads(recipe)
    (device, name), source = build.place(recipe), longest_example(recipe, loading.load_config(folder))
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
            found["gpu_gib"], found["outside_gib"] = _limit(model.device, gpu)
        case = Case(Shape(source.config), [source.lengths(0)], 1, "noise", name, found["gpu_gib"])
        for m in train.rehearsals(recipe, model, source):
            same = case.micro_batch(recipe, m["stage"], m["mode"], source.lengths(0), m["samples"])
            compared = beside_estimate(m.pop("memory_mib"), same, case.gpu)
            reserved = cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else None
            found["modes"].append({**m, **compared, "estimated_recompute": same.recompute, "reserved_gib": reserved})
    except (UserError, torch.OutOfMemoryError) as error:
        found["error"] = str(error).splitlines()[0]
    return found


def _limit(device: torch.device, gpu: float | None) -> tuple[float, float]:
    """Limits this process to what a smaller GPU would leave it. Returns that GPU's GiB, and what CUDA takes of them."""
    cuda.empty_cache()
    free, total = cuda.mem_get_info(device)
    outside = total - free - cuda.memory_reserved(device)
    if gpu is None:
        return total / GIB, outside / GIB
    require(gpu * GIB <= total, f"--gpu {gpu:g}: this one has {total / GIB:.1f} GiB")
    cuda.set_per_process_memory_fraction(max(0.0, (gpu * GIB - outside) / total), device.index)
    return gpu, outside / GIB


def _bytes(path: str) -> int:
    return 2 * sum(Shape(loading.load_config(path)).parameters.values())


def _require_disk(paths) -> None:
    """Refuses to start without space for the largest checkpoint. Each is deleted before the next is written."""
    needs, folder = SLACK * max(map(_bytes, paths)), tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    what = f"random weights need {needs / GIB:.1f} GiB of disk, and {folder} has {free / GIB:.1f} GiB free"
    require(needs <= free, f"{what}: set TMPDIR to a larger one")


def _in_a_process(task: Callable, *arguments):
    """Calls the task in a new process and returns its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(task, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError("the process that measured was killed, most likely for lack of memory") from error
