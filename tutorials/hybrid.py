"""Do original positions close the gap where most layers of the LLM know no positions?

    python tutorials/hybrid.py 3              three seeds of every arm in hybrid.toml, into runs/hybrid-compare
    python tutorials/hybrid.py 1 "full"       only some arms; those that have been measured are not run again

The LLM of the built-in digits is replaced by one with the structure of Qwen3.5's: of its four layers three are linear
attention (gated delta nets), and the last is full attention with rotary positions on a quarter of its width. Tower,
projector, pictures and questions are as in `tinyspeed compare digits`, and so are the steps.
"""

import sys
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, Qwen3_5TextConfig

from tinyspeed import recipe
from tinyspeed.data import digits, digits_model
from tinyspeed.evaluation.compare import compare
from tinyspeed.recipe import comparison
from tinyspeed.util import files

ARMS = Path(__file__).with_suffix(".toml")
WIDTH, LAYERS, HEADS, HEAD = 128, 4, 4, 32


def base(folder: Path, seed: int, tower_steps: int) -> Path:
    """The untrained model in `folder`, with a trained tower."""
    if folder.is_dir():
        return folder
    config = digits_model.build_model(seed, width=WIDTH).config
    ids = digits.DEFAULT.ids
    config.text_config = Qwen3_5TextConfig(
        vocab_size=len(ids), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD,
        linear_num_key_heads=HEADS, linear_num_value_heads=HEADS, linear_key_head_dim=HEAD, linear_value_head_dim=HEAD,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        max_position_embeddings=digits_model.context(digits.DEFAULT), initializer_range=WIDTH**-0.5,
        pad_token_id=ids["<pad>"], bos_token_id=ids["<s>"], eos_token_id=ids["</s>"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    llm = model.model.language_model
    with torch.no_grad():  # as in `digits_model.build_model`, which says why
        llm.embed_tokens.weight.mul_(WIDTH**0.5)
        for layer in llm.layers:
            mixer = layer.self_attn.o_proj if layer.block_type == "full_attention" else layer.linear_attn.out_proj
            for branch in (mixer, layer.mlp.down_proj):
                branch.weight.mul_((4 * LAYERS) ** -0.5)
    digits_model.train_tower(model.model.vision_tower, seed, tower_steps)
    with files.atomic(folder) as temporary:
        model.save_pretrained(temporary)
        digits_model.build_processor().save_pretrained(temporary)
    return folder


def main(seeds: str, only: str | None = None) -> None:
    torch.set_num_threads(1)
    for seed in range(int(seeds)):
        made = recipe.read("digits").replaced(run={"name": "hybrid", "seed": seed, "threads": 1})
        where = base(Path("runs") / "hybrid-base" / str(seed), seed, made.digits.tower_steps)
        made = made.replaced(model={"path": str(where)})
        if compare(made, 1, comparison.read(made, str(ARMS), only)):
            return  # interrupted: the next call goes on here


if __name__ == "__main__":
    main(*sys.argv[1:])
