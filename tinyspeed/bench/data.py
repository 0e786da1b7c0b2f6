"""Records per second: whether decoding pictures keeps up with steps that leave most of them out.

    tinyspeed bench data                       pictures made here: 640 x 480, as COCO's are
    tinyspeed bench data my-recipe.toml        the recipe's own records

A fast step takes a tenth of the image tokens, but all of the JPEG. So the faster the steps, the sooner they wait for
data. What is measured is everything that training does for a record until its batch goes to the GPU: read, decode,
resize, cut into crops, tokenise, collate; by 0, 1, 2, ... worker processes (`data.workers`). Beside it stands what
DualSpeed with one slow step in fifty needs, by its FLOPs, on a GPU that sustains so many TFLOP/s: for the recipe's
records, or for records as long as in LLaVA's mix. Where that is more than any number of workers brings,
`data.feature_cache_gb` decodes every picture only once (`feature_cache.py`).
"""

import json
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from ..data import conversations, llava_mix, loader
from ..data.examples import Sample, Source
from ..models import assembling, loading, published
from ..models.memory import Settings, Shape
from ..recipe import DataSection, Recipe
from ..training import build
from ..util import UserError, files, tables
from . import estimate
from .harness import Bar, Results, bar_chart

BATCH, TFLOPS, SLOW, PICTURES = 8, (20.0, 100.0, 400.0), 0.02, 64
WIDTH, HEIGHT = 640, 480


def measure(
    device: torch.device, recipe: Recipe | None = None, family: str = "1.5", samples: int = 256,
    workers: tuple[int, ...] = (0, 1, 2), repeats: int = 3,
) -> Results:  # fmt: skip
    """Times the records of a recipe, or of an album that is made for it (`family`: for LLaVA-1.5 or NeXT)."""
    if samples < BATCH or repeats < 1 or not workers or min(workers) < 0:
        raise UserError(f"samples = {samples}, repeats = {repeats}, workers = {workers}: at least {BATCH}, 1 and 0")
    with tempfile.TemporaryDirectory(prefix="tinyspeed-") as folder, files.errors_about(folder):
        if recipe is None:
            config, lengths = published.config_of("7b", family), llava_mix.mix(1024, 0, family)
            source, rank, name = album(Path(folder), config, family), 64, f"{WIDTH} x {HEIGHT} JPEGs made here"
        else:
            if recipe.data.kind != "chat":
                raise UserError('bench data: the recipe\'s data must be conversations, data.kind = "chat"')
            base = build.base_model(recipe, build.place(recipe).device)
            config, source = loading.load_config(base), conversations.from_recipe(recipe, base)
            rank, name = recipe.lora.rank, recipe.data.file
            lengths = [source.lengths(i) for i in range(min(len(source), 1024))]
        print(f"{name}, {config.model_type}; {samples} records, median of {repeats}")
        rates: dict[int, list[float]] = {count: [] for count in sorted({loader.at_most(count) for count in workers})}
        for _ in range(repeats):
            for count, found in rates.items():
                found.append(_records_per_second(source, samples, count))
    results = {
        "data": name, "model": config.model_type, "samples": samples, "repeats": repeats,
        "records_per_second": {count: {"median": statistics.median(r), "max": max(r)} for count, r in rates.items()},
        "wanted": {tflops: tflops * 1e12 / _flops_per_record(config, lengths, rank) for tflops in TFLOPS},
    }  # fmt: skip
    yield describe(results), results


def _records_per_second(source: Source, samples: int, workers: int) -> float:
    """Measures once the workers are busy."""
    ahead = max(1, workers * loader.PREFETCH)
    count = -(-samples // BATCH)
    parts = [[(BATCH * n + k) % len(source) for k in range(BATCH)] for n in range(count + ahead)]
    with closing(loader.batches(source, parts, 0, workers=workers)) as batches:
        for _ in range(ahead):
            next(batches)
        began = time.perf_counter()
        for _ in range(count):
            next(batches)
        return count * BATCH / (time.perf_counter() - began)


def _flops_per_record(config, samples: list[Sample], rank: int) -> float:
    shape, s = Shape(config), Settings("bf16", rank=rank)
    mean = lambda mode: statistics.fmean(estimate.flops(shape, s, mode, sample, False) for sample in samples)
    return (1 - SLOW) * mean("fast") + SLOW * mean("slow")


def describe(results: dict) -> str:
    found = [[str(n), f"{f['median']:,.1f}"] for n, f in results["records_per_second"].items()]
    wanted = [[f"{float(tflops):g}", f"{n:,.1f}"] for tflops, n in results["wanted"].items()]
    return (
        f"{tables.table(['workers', 'records/s'], found)}\n\nWhat DualSpeed with one slow step in fifty needs:\n\n"
        f"{tables.table(['TFLOP/s sustained', 'records/s'], wanted)}"
    )


def draw(results: dict):
    made = [Bar(f"{n} workers", f["median"]) for n, f in results["records_per_second"].items()]
    needed = [Bar(f"a GPU at {float(t):g} TFLOP/s", n, ours=False) for t, n in results["wanted"].items()]
    return bar_chart({"made here, and needed": made + needed}, "records/s")


def album(folder: Path, config, family: str) -> conversations.Conversations:
    """Writes pictures with as much detail as photos, and returns a conversation about each."""
    draw = np.random.default_rng(0)
    records = []
    for n in range(PICTURES):
        coarse = Image.fromarray(draw.integers(0, 255, (15, 20, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
        grain = draw.normal(0, 12, (HEIGHT, WIDTH, 1))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A picture. " * 30}]
        records.append({"id": str(n), "image": f"{n}.jpg", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    data = replace(DataSection(), kind="chat", file=str(folder / "records.json"), images=str(folder), max_rows=4096)
    return conversations.Conversations(data, _processor(config, family), folder / "cache", bar=False)


def _processor(config, family: str):
    """Returns the family's own processor, with a token for each byte."""
    words = ["<s>", "</s>", "<pad>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    side = config.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    kind, pictures = transformers.LlavaProcessor, transformers.CLIPImageProcessor(**sizes)
    if family == "next":
        kind = transformers.LlavaNextProcessor
        pictures = transformers.LlavaNextImageProcessor(**sizes, image_grid_pinpoints=published.GRIDS)
    return kind(
        pictures, tokenizer, patch_size=config.vision_config.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=assembling.TEMPLATE,
    )  # fmt: skip
