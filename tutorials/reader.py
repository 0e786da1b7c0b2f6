"""Trains a text-only language model for the digits: ReGATE's reference in the ablation of its losses.

    python tutorials/reader.py runs/reader
    tinyspeed compare --arms tutorials/reference.toml --seeds 3 --set run.name=reference --set digits.pictures=2000

The model has one layer. It reads conversations about pictures that no student sees, with pad tokens in place of the
picture. So it learns only which answers are likely whatever the picture shows: that `</s>` ends them, that a place
holds a digit or none, and what earlier answers reveal about later ones.
"""

import sys

import torch
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

from tinyspeed.data import digits, digits_model

SEED, TURNS, BATCH, STEPS = 2**32 - 1, 6, 64, 600  # no run of a comparison has this seed, so the pictures differ


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    canvas = digits.Canvas()
    known = canvas.ids
    reader = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(known), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=digits_model.context(canvas), bos_token_id=known["<s>"], eos_token_id=known["</s>"],
            pad_token_id=known["<pad>"],
        )
    )  # fmt: skip
    source = digits.Digits(BATCH * STEPS, TURNS, "train", SEED, canvas)
    adam = torch.optim.Adam(reader.parameters(), lr=3e-3)
    for step in (bar := trange(STEPS, desc="reader", unit="step")):
        ids, labels = map(torch.stack, zip(*(source.text(BATCH * step + i) for i in range(BATCH)), strict=True))
        ids[ids == known["<image>"]] = known["<pad>"]
        loss = reader(input_ids=ids, labels=labels).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        bar.set_postfix_str(f"loss {float(loss):.3f}")
    reader.save_pretrained(folder)
    digits_model.build_processor(canvas).tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
