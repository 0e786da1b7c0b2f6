"""Models that are small enough to run and wide enough for the memory formulas, settings of runs, and batches."""

import torch
from transformers import LlavaConfig, LlavaNextConfig

from tinyspeed.models.memory import Settings
from tinyspeed.models.published import clip, vicuna

SIDE, PATCH, HIDDEN, LAYERS, VOCAB = 64, 8, 128, 4, 300
TEXT, ANSWERS = 60, 30

SETTINGS = {
    "fp32": Settings("fp32"),
    "fp32 LoRA": Settings("fp32", rank=4, dropout=0.1),
    "bf16": Settings("bf16"),
    "bf16 LoRA": Settings("bf16", rank=4),
    "bf16 LoRA dropout": Settings("bf16", rank=4, dropout=0.1),
    "4-bit LoRA": Settings("bf16", "nf4", rank=4),
    "4-bit LoRA dropout": Settings("bf16", "nf4", rank=4, dropout=0.1),
    "align": Settings("bf16", stage="align"),
    "align LoRA": Settings("bf16", rank=4, dropout=0.1, stage="align"),
    "bf16 views": Settings("bf16", rank=4, views=2),
    "bf16 glances": Settings("bf16", rank=4, plugin="tokenlearner"),
    "fp32 dynamic": Settings("fp32", plugin="dynamicvit"),
}


def batch_of(config, samples, text=TEXT, answers=ANSWERS):
    """Samples of one picture each, and how many rows that is."""
    cells = (SIDE // PATCH) ** 2
    if config.model_type == "llava":
        rows, more = cells, {"pixel_values": torch.randn(samples, 3, SIDE, SIDE)}
    else:
        rows = 5 * cells + 2 * SIDE // PATCH  # square, in 5 crops, and a newline behind each line of the larger view
        more = {
            "pixel_values": torch.randn(samples, 5, 3, SIDE, SIDE),
            "image_sizes": torch.tensor([[2 * SIDE] * 2] * samples),
        }
    ids = torch.randint(10, 200, (samples, text + rows))
    ids[:, 5 : 5 + rows] = 3
    labels = torch.full_like(ids, -100)
    labels[:, -answers:] = ids[:, -answers:]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **more}, rows


def small(family="llava", *, hidden=HIDDEN, layers=LAYERS, vocab=VOCAB, tower=32):
    text = vicuna(hidden, 11 * hidden // 4, layers, 4, vocab_size=vocab)
    vision = clip(
        hidden_size=tower, intermediate_size=4 * tower, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    both = {"vision_config": vision, "text_config": text, "image_token_index": 3}
    if family == "llava":
        return LlavaConfig(**both, image_seq_length=(SIDE // PATCH) ** 2)
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    return LlavaNextConfig(**both, image_grid_pinpoints=grids)
