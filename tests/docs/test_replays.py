"""The tables of replays are those of their JSON, and the formulas of `estimate` agree with what was replayed."""

import json
from collections import Counter

import pytest
import replays
from support.pages import ROOT
from support.replay import Operation

from tinyspeed.models.memory import Settings, fixed

RESULTS = {what: json.loads((replays.RESULTS / f"replays-{what}.json").read_text()) for what in replays.PAGES}
STEPS = {(f["recipe"], f["stage"], f["mode"]): f for f in RESULTS["memory"]["recipes"]}


@pytest.mark.parametrize("what", replays.PAGES)
def test_a_table_is_what_its_numbers_say(what):
    page = (ROOT / "tutorials" / replays.PAGES[what]).read_text(encoding="utf-8")
    result = RESULTS[what]
    assert f"<!-- replays-{what}.json -->\n\n{replays.DESCRIBE[what](result)}\n\n<!-- end" in page
    assert f"`{result['command']}`" in " ".join(page.split())


def test_all_recipes_are_there():
    assert list(dict.fromkeys(name for name, *_ in STEPS)) == [*replays.CONSUMER, *replays.SCALE]
    assert (len(replays.CONSUMER), len(replays.SCALE)) == (8, 7)


@pytest.mark.parametrize("step", STEPS, ids=", ".join)
def test_the_formulas_agree_with_replays(step):
    found, (name, stage, mode) = STEPS[step], step
    chosen, case, _ = replays.case_of(name)
    formula = replays.formula(chosen, stage, mode, case, found["samples"], found["recompute"])
    assert formula == found["formula"]
    assert formula == pytest.approx(found["peak"], rel=0.03)
    assert sum(found["parts"].values()) == found["peak"]
    held = fixed(case.shape, Settings.of(chosen, stage, "bf16"))
    for part in ("weights", "gradients", "moments"):
        assert getattr(held, part) == pytest.approx(found["parts"][part], rel=0.02), part


def test_a_kernel_takes_as_long_as_its_products_or_its_bytes_and_a_launch():
    rate, whole, bandwidth = replays.GPUS["A100"]
    product = Operation("mm", flops=rate * 1e12, bytes=1, half=True)
    kernels = Counter(
        {product: 2, Operation("mm", whole * 1e12, 1, False): 1, Operation("add", 0, bandwidth * 10**9, True): 4}
    )
    found = replays.seconds(kernels, "A100")
    assert found == {"arithmetic": pytest.approx(3), "bandwidth": pytest.approx(4), "launches": 7 * replays.LAUNCH}


def test_what_a_gpu_measures_stands_beside_what_was_replayed(tmp_path):
    """Where it is the same: the micro-batch, or the shape, the text and the GPU."""
    (name, stage, mode), f = next(iter(STEPS.items()))
    same = {"stage": stage, "mode": mode, "samples": f["samples"], "recompute": f["recompute"]}
    modes = [{**same, "measured_gib": 20.0}, {**same, "samples": 1, "measured_gib": 21.0}]
    (tmp_path / "memory.json").write_text(json.dumps({"device": "", "recipes": [{"recipe": name, "modes": modes}]}))
    time = RESULTS["time"]
    contestants = {"fast": {"ms_a_sample": 50.0}, "trl": {"ms_a_sample": 900.0}}
    step = {"size": "7b", "family": "1.5", "tune": "lora", "device": "NVIDIA H100 80GB HBM3"}
    texts = {time["text"]: {"contestants": contestants}, "mix": {"contestants": contestants}}
    (tmp_path / "step-7b.json").write_text(json.dumps({**step, "texts": texts}))
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in replays.beside(tmp_path).splitlines() if line]
    gib = f["peak"] / replays.GIB
    assert [name, stage, mode, f"{gib:.2f}", "20.00", f"{100 * (gib / 20 - 1):+.0f}"] in lines
    assert [name, stage, mode, "", "21.00", ""] in lines
    wanted = ("7b", "1.5", "fast", "H100")
    (said,) = [s for s in time["steps"] if (s["size"], s["family"], s["mode"], s["gpu"]) == wanted]
    ms = 1000 * sum(said["seconds"].values()) / time["samples"]
    assert ["step-7b", "fast", f"{ms:.2f}", "50.00", f"{100 * (ms / 50 - 1):+.0f}"] in lines
    assert len(lines) == 7
