"""A folder of pictures and a file of conversations, as a user has them: mixed sizes, turns, texts without pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def album(folder: Path, records: int = 12, *, text_only: bool = True, seed: int = 0) -> str:
    """Write `folder/train.json` in LLaVA's format and its pictures in `folder/images`; returns the file."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    made = []
    for i in range(records):
        count = (1, 1, 2, 0)[i % 4] if text_only else 1
        names = []
        for k in range(count):
            name = f"p{i}-{k}.{'png' if i % 2 else 'jpg'}"
            size = (int(rng.integers(20, 70)), int(rng.integers(20, 70)))
            pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name)
            names.append(name)
        turns = []
        for turn in range(1 + i % 3):
            marks = "<image>\n" * count if turn == 0 else ""
            turns.append({"from": "human", "value": f"{marks}What is number {i}, {turn}?"})
            turns.append({"from": "gpt", "value": "It is " + "very " * int(rng.integers(0, 4)) + f"small, {i}."})
        record = {"id": f"r{i}", "conversations": turns}
        if names:
            record["image"] = names[0] if count == 1 else names
        made.append(record)
    file = folder / "train.json"
    file.write_text(json.dumps(made))
    return str(file)
