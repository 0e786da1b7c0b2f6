"""What replays of true shapes say: the memory of the recipes, and times on paper. No GPU and no weights are needed.

    PYTHONPATH=tests python tutorials/replays.py memory       results/replays-memory.json, guide/memory.md
    PYTHONPATH=tests python tutorials/replays.py time         results/replays-time.json, results/performance.md
    python tutorials/replays.py beside FOLDER                 what `make bench-gpu` has measured, beside what they say

Steps run on the pretend GPU of the tests (`tests/support/replay.py`): what is alive, and which kernels run with how
many FLOPs and bytes, is counted there and not computed. Models have two and three layers, and are continued to their
true depth, which is exact (`tests/slow/test_replays_of_all_layers.py`). The time of a step is

    sum over its kernels of  max(FLOPs / rate, bytes / bandwidth) + 5 us

with the rates of data sheets. So it is a bound and not a forecast: real kernels reach a half to three quarters of it.
"""

import json
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tinyspeed import recipe
from tinyspeed.bench import estimate
from tinyspeed.models import published
from tinyspeed.models.memory import GIB, MicroBatch, Settings, Shape, Step, fixed
from tinyspeed.util.files import write_atomically
from tinyspeed.util.tables import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tutorials" / "results"
PAGES = {"memory": "guide/memory.md", "time": "results/performance.md"}
CONSUMER = sorted(p.stem for p in recipe.BUILT_IN.glob("llava-*gb*.toml"))
SCALE = sorted(p.stem for p in recipe.BUILT_IN.glob("llava-*-stage?*.toml"))
DEPTHS = 2, 3
PARTS = "weights", "gradients", "moments", "activations", "transient"
SHOWN = "llava-1.5-7b-stage2-lora", "train", "slow"  # whose largest tensors are listed
# Dense half precision and fp32 in TFLOP/s, with sums in fp32, and GB/s: NVIDIA's data sheets.
GPUS = {
    "H100": (989, 67, 3350), "A100": (312, 19.5, 2039), "L40S": (362, 91.6, 864), "RTX 4090": (165, 82.6, 1008),
    "RTX 3060": (25.5, 12.7, 360),
}  # fmt: skip
LAUNCH = 5e-6  # seconds
SHAPES = ("7b", "1.5"), ("13b", "1.5"), ("7b", "next"), ("13b", "next")
CARDS = {"8": "RTX 3060", "12": "RTX 3060", "16": "RTX 3060", "24": "RTX 4090"}  # by the GB in a recipe's name
TIMES = 4  # a row budget so many times as large is compared
SAMPLES, TEXT = 8, "128"
MODES = "hf", "full", "slow", "fast"


# Memory


def case_of(name: str) -> tuple:
    """A recipe, what is assumed of its data, and its configuration. The GPU is that in its name, or has 80 GB."""
    chosen, gb = recipe.read(name), re.search(r"-(\d+)gb", name)
    size, family = re.search(r"-(\d+b)-", name)[1], "next" if "next" in name else "1.5"
    config = published.KNOWN.get(chosen.model.path, lambda: published.config_of(size, family))()
    shape = Shape(config)
    return (
        chosen,
        estimate.Case(shape, [estimate.assumed(chosen, shape)], 1, "", "bf16", float(gb[1]) if gb else 80.0),
        config,
    )


def formula(chosen: recipe.Recipe, stage: str, mode: str, case: estimate.Case, samples: int, recompute: bool) -> int:
    """What `estimate` says of this micro-batch."""
    s, (sample,) = Settings.of(chosen, stage, "bf16"), case.samples
    step = Step(case.shape, s, MicroBatch.of(mode, *sample, s, samples), recompute)
    return fixed(case.shape, s).total + step.peak


def memory_of(name: str) -> list[dict]:
    """Each mode of each stage. The recipes of `scale` recompute nothing, since the planner's eight GPUs have room."""
    from support.replay import cut, deeper, replay

    chosen, case, config = case_of(name)
    found, (sample,) = [], case.samples
    for stage, _ in chosen.stages():
        for mode in estimate.shares(chosen, stage):
            batch = case.worst_batch(chosen, stage, mode)
            again = batch.recompute and name not in SCALE
            how = {"samples": batch.samples, "recompute": again}
            few = (replay(chosen, stage, mode, cut(config, n), sample, **how) for n in DEPTHS)
            whole = deeper(*few, case.shape.layers)
            found.append({
                "recipe": name, "stage": stage, "mode": mode, **how, "rows": batch.rows, "peak": whole.peak,
                "formula": formula(chosen, stage, mode, case, **how), "parts": whole.parts,
            })  # fmt: skip
            print(f"{name}, {stage}, {mode}", file=sys.stderr)
    return found


def budgets_of(name: str) -> list[dict]:
    """Milliseconds a sample with the recipe's row budget, and with a larger one, which recomputes more."""
    from support.replay import cut, replay

    chosen, case, config = case_of(name)
    card, found, now = CARDS[re.search(r"-(\d+)gb", name)[1]], [], chosen.train.row_budget
    for budget in (now, TIMES * now):
        tried, modes = chosen.replaced(train={"row_budget": budget}), {}
        for mode, share in estimate.shares(tried, "train").items():
            batch = case.worst_batch(tried, "train", mode)
            how = {"samples": batch.samples, "recompute": batch.recompute}
            few = (replay(tried, "train", mode, cut(config, n), case.samples[0], **how).operations for n in DEPTHS)
            ms = 1000 * sum(of_depth(*(seconds(done, card) for done in few), case.shape.layers).values())
            modes[mode] = {"share": share, **how, "peak": batch.peak, "ms": ms / batch.samples}
        found.append({"recipe": name, "gpu": card, "budget": budget, "modes": modes})
    print(f"{name}, row budgets", file=sys.stderr)
    return found


def memory() -> dict:
    from support.replay import replay

    name, stage, mode = SHOWN
    budgets = [one for each in CONSUMER for one in budgets_of(each)]
    found = [one for each in (*CONSUMER, *SCALE) for one in memory_of(each)]
    (shown,) = [f for f in found if (f["recipe"], f["stage"], f["mode"]) == SHOWN]
    chosen, case, config = case_of(name)
    how = {"samples": shown["samples"], "recompute": shown["recompute"]}
    whole = replay(chosen, stage, mode, config, case.samples[0], **how)
    tensors = [
        {"bytes": n, "count": count, "line": line, "operation": func, "shape": list(shape), "type": str(kind)[6:]}
        for n, count, (line, func, shape, kind) in whole.tensors[:10]
    ]
    return {"recipes": found, "shown": {"peak": whole.peak, "tensors": tensors}, "budgets": budgets}


def describe_memory(results: dict) -> str:
    gib, rows = lambda n: f"{n / GIB:.2f}", []
    for f in results["recipes"]:
        off, parts = f"{100 * (f['formula'] / f['peak'] - 1):+.1f}", f["parts"]
        counts = [f["samples"], f"{f['rows']:,}", "yes" if f["recompute"] else "no"]
        sizes = [gib(f["peak"]), gib(f["formula"]), off, *(gib(parts[part]) for part in PARTS)]
        rows.append([f["recipe"], f"{f['stage']}, {f['mode']}", *counts, *sizes])
    head = ["recipe", "step", "samples", "tokens", "recompute", "replayed", "formula", "off by %"]
    head += PARTS
    shown = results["shown"]
    largest = [
        [gib(t["bytes"]), t["count"], " x ".join(map(str, t["shape"])), t["type"], t["operation"], f"`{t['line']}`"]
        for t in shown["tensors"]
    ]
    name, stage, mode = SHOWN
    said = f"{name}, {stage}, {mode}: {gib(shown['peak'])} GiB when all layers are replayed. The largest activations:"
    head_2 = ["GiB", "tensors", "shape", "type", "operation", "made in"]
    compared = []
    for f in results["budgets"]:
        mixed, modes = sum(m["share"] * m["ms"] for m in f["modes"].values()), [f["modes"][m] for m in ("fast", "slow")]
        each = [cell for m in modes for cell in (m["samples"], "yes" if m["recompute"] else "no", f"{m['ms']:.0f}")]
        peak = gib(max(m["peak"] for m in modes))
        compared.append([f["recipe"], f["gpu"], f"{f['budget']:,}", peak, *each, f"{mixed:.0f}"])
    head_3 = ["recipe", "rates of", "row budget", "GiB"]
    head_3 += [f"{mode}: {what}" for mode in ("fast", "slow") for what in ("samples", "recompute", "ms")]
    why = f"Predicted milliseconds a sample with the recipes' row budgets, and with {TIMES} times as many tokens:"
    tables = f"{table(head, rows)}\n\n{said}\n\n{table(head_2, largest)}"
    return f"{tables}\n\n{why}\n\n{table([*head_3, 'both'], compared)}"


# Time


def seconds(operations: Counter, gpu: str) -> dict[str, float]:
    """The time of these kernels: in products that the rate limits, in what the bandwidth limits, and in launches."""
    half, whole, bandwidth = GPUS[gpu]
    found = {"arithmetic": 0.0, "bandwidth": 0.0, "launches": LAUNCH * operations.total()}
    for operation, times in operations.items():
        work = operation.flops / (half if operation.half else whole) / 1e12
        moved = operation.bytes / bandwidth / 1e9
        found["arithmetic" if work > moved else "bandwidth"] += times * max(work, moved)
    return found


def of_depth(two: dict[str, float], three: dict[str, float], layers: int) -> dict[str, float]:
    """These times in a model of so many layers."""
    return {what: n + (layers - DEPTHS[1]) * (n - two[what]) for what, n in three.items()}


def time() -> dict:
    from support.replay import steps

    found = []
    for size, family in SHAPES:
        layers = Shape(published.config_of(size, family)).layers
        two, three = (steps(size, family, n, SAMPLES, TEXT) for n in DEPTHS)
        for mode, gpu in ((mode, gpu) for mode in MODES for gpu in GPUS):
            a, b = (seconds(of[mode], gpu) for of in (two, three))
            whole = of_depth(a, b, layers)
            inside = layers * (sum(b.values()) - sum(a.values()))  # the LLM's layers
            found.append({"size": size, "family": family, "mode": mode, "gpu": gpu, "seconds": whole, "layers": inside})
        print(f"{size}, {family}", file=sys.stderr)
    return {"samples": SAMPLES, "text": TEXT, "steps": found}


def describe_time(results: dict) -> str:
    rows, found = [], {(f["size"], f["family"], f["gpu"], f["mode"]): f for f in results["steps"]}
    for size, family, gpu in dict.fromkeys(key[:3] for key in found):
        of = {mode: found[size, family, gpu, mode] for mode in MODES}
        total = {mode: sum(f["seconds"].values()) for mode, f in of.items()}
        mixes = [total["hf"] / ((1 - r) * total["fast"] + r * total["slow"]) for r in (0.1, 0.02)]
        ms = [f"{1000 * total[mode] / results['samples']:.1f}" for mode in MODES]
        fast = of["fast"]
        outside = 1 - fast["layers"] / total["fast"]
        shares = [f"{n / total['fast']:.0%}" for n in fast["seconds"].values()]
        faster = [f"{total['hf'] / total['full']:.1f}x", *(f"{m:.1f}x" for m in mixes)]
        rows.append(
            [f"LLaVA-{family}-{size.upper()}".replace("next", "NeXT"), gpu, *ms, *faster, f"{outside:.0%}", *shares]
        )
    head = ["shape", "GPU", *(f"{mode}, ms" for mode in MODES), "full", "r = 0.1", "r = 0.02", "outside the LLM"]
    return table([*head, "arithmetic", "bandwidth", "launches"], rows)


# Beside what a GPU measures


def beside(folder: Path) -> str:
    """Tables of what `make bench-gpu` has left in this folder, beside what replays say; what they lack is a dash."""
    replayed = {what: json.loads((RESULTS / f"replays-{what}.json").read_text(encoding="utf-8")) for what in PAGES}
    peaks = {(f["recipe"], f["stage"], f["mode"]): f for f in replayed["memory"]["recipes"]}
    found: dict[str, list] = {"memory": [], "step": []}
    for file in sorted(folder.glob("*.json")):
        measured = json.loads(file.read_text(encoding="utf-8"))
        for each in measured.get("recipes", ()):
            for m in each["modes"]:
                said = peaks.get((each["recipe"], m["stage"], m["mode"]), {})
                same = [said.get(name) for name in ("samples", "recompute")] == [m["samples"], m["recompute"]]
                cells = said["peak"] / GIB if same else None, m["measured_gib"]
                found["memory"].append([each["recipe"], m["stage"], m["mode"], *_compared(*cells)])
        kind = measured.get("size"), measured.get("family")
        if measured.get("tune") == "lora" and replayed["time"]["text"] in measured["texts"]:
            for name, contestant in measured["texts"][replayed["time"]["text"]]["contestants"].items():
                said = [
                    f
                    for f in replayed["time"]["steps"]
                    if (f["size"], f["family"], f["mode"]) == (*kind, name) and f["gpu"] in measured["device"]
                ]
                if said:
                    ms = 1000 * sum(said[0]["seconds"].values()) / replayed["time"]["samples"]
                    found["step"].append([file.stem, name, *_compared(ms, contestant["ms_a_sample"])])
    units = {
        "memory": ["recipe", "stage", "mode", "GiB replayed"],
        "step": ["benchmark", "step", "ms a sample, at least"],
    }
    return "\n\n".join(table([*units[what], "measured", "off by %"], rows) for what, rows in found.items() if rows)


def _compared(said: float | None, measured: float | None) -> list[str | None]:
    off = None if said is None or measured is None else f"{100 * (said / measured - 1):+.0f}"
    return [*(None if n is None else f"{n:.2f}" for n in (said, measured)), off]


DESCRIBE = {"memory": describe_memory, "time": describe_time}


def main(what: str) -> None:
    from support import pretend_cuda

    if why := pretend_cuda.unavailable():
        sys.exit(f"there is no pretend GPU: {why}")
    versions = {package: version(package) for package in ("torch", "transformers", "peft", "bitsandbytes")}
    results = {"command": f"PYTHONPATH=tests python tutorials/replays.py {what}", **versions}
    results |= {"memory": memory, "time": time}[what]()
    file = RESULTS / f"replays-{what}.json"
    write_atomically(file, json.dumps(results, indent=1) + "\n")
    text, page = DESCRIBE[what](results), ROOT / "tutorials" / PAGES[what]
    mark = f"<!-- {file.name} -->"
    before, _, after = page.read_text(encoding="utf-8").partition(mark)
    after = after[after.index(f"<!-- end of {file.name} -->") :]
    write_atomically(page, f"{before}{mark}\n\n{text}\n\n{after}")


if __name__ == "__main__":
    print(beside(Path(sys.argv[2]))) if sys.argv[1] == "beside" else main(sys.argv[1])
