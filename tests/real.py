"""Published models as their configurations say: the true shapes, and no weights."""

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tinyspeed.recipe import Recipe, from_tables

GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def clip(**changes):
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPVisionConfig(**{**large, "image_size": 336, "patch_size": 14, **changes})


def llama(hidden=4096, inner=11008, layers=32, heads=32, vocab=32064):
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocab,
    )  # fmt: skip


def mistral():
    return MistralConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=32064)


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


def config_of(kind, vision, text, **more):
    return kind(vision_config=vision, text_config=text, **more)


REAL = {
    "1.5-7b": lambda: config_of(LlavaConfig, clip(), llama()),
    "1.5-13b": lambda: config_of(LlavaConfig, clip(), llama(5120, 13824, 40, 40)),
    "next-7b": lambda: config_of(LlavaNextConfig, clip(), llama(), image_grid_pinpoints=GRIDS),
    "next-13b": lambda: config_of(LlavaNextConfig, clip(), llama(5120, 13824, 40, 40), image_grid_pinpoints=GRIDS),
    "next-mistral": lambda: config_of(LlavaNextConfig, clip(), mistral(), image_grid_pinpoints=GRIDS),
    "onevision": lambda: config_of(LlavaOnevisionConfig, siglip(), qwen(), tie_word_embeddings=True),
}


def recipe(tables: dict, **changes) -> Recipe:
    """A recipe of these tables, with changes named as `train_batch=8`; its data need not be there."""
    tables = {name: dict(table) for name, table in tables.items()}
    tables["data"] = {"kind": "chat", "file": "not-here.json"}
    for key, value in changes.items():
        section, _, field = key.partition("_")
        tables.setdefault(section, {})[field] = value
    return from_tables(tables, "the test")
