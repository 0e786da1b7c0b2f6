"""Published models as their configurations say: the true shapes, and no weights."""

from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

from tinyspeed.models.published import KNOWN
from tinyspeed.recipe import Recipe, from_tables


def siglip():
    return SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip


def qwen():
    return Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip


REAL = {
    "1.5-7b": KNOWN["llava-hf/llava-1.5-7b-hf"],
    "1.5-13b": KNOWN["llava-hf/llava-1.5-13b-hf"],
    "next-7b": KNOWN["llava-hf/llava-v1.6-vicuna-7b-hf"],
    "next-13b": KNOWN["llava-hf/llava-v1.6-vicuna-13b-hf"],
    "next-mistral": KNOWN["llava-hf/llava-v1.6-mistral-7b-hf"],
    "onevision": lambda: LlavaOnevisionConfig(vision_config=siglip(), text_config=qwen(), tie_word_embeddings=True),
}


def recipe(tables: dict, **changes) -> Recipe:
    """A recipe of these tables, with changes named as `train_batch=8`; its data need not be there."""
    tables = {name: dict(table) for name, table in tables.items()}
    tables["data"] = {"kind": "chat", "file": "not-here.json"}
    for key, value in changes.items():
        section, _, field = key.partition("_")
        tables.setdefault(section, {})[field] = value
    return from_tables(tables, "the test")
