"""The published LLaVAs' configurations, by hub id: their shapes are known before a byte of their weights is here.

So a recipe's memory and time are estimated without a network, and measured (`tinyspeed bench memory`) with random
weights of the true shape: memory and speed do not ask what the numbers are. Where a model has been downloaded its own
`config.json` counts and not this one (`loading.config`).
"""

from collections.abc import Callable

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    MistralConfig,
    PreTrainedConfig,
)

from ..util.errors import unknown

GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # that NeXT cuts a picture to: height, width
COMMON = {"vocab_size": 32064, "rms_norm_eps": 1e-5}  # 32,000 words, <image>, <pad>, and what rounds them to 64


def clip(**changes) -> CLIPVisionConfig:
    """openai/clip-vit-large-patch14-336, which is the tower of all of them."""
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPVisionConfig(**{**large, "image_size": 336, "patch_size": 14, "projection_dim": 768, **changes})


def vicuna(hidden: int = 4096, inner: int = 11008, layers: int = 32, heads: int = 32, **changes) -> LlamaConfig:
    """Vicuna-7B v1.5, if nothing else is said."""
    size = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return LlamaConfig(**{**COMMON, **size, "num_attention_heads": heads, "max_position_embeddings": 4096, **changes})


def vicuna_13b() -> LlamaConfig:
    return vicuna(5120, 13824, 40, 40)


def mistral() -> MistralConfig:
    """Mistral-7B-Instruct v0.2: four queries share a key, and no window slides."""
    return MistralConfig(
        **COMMON, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def small() -> LlamaConfig:
    """TinyLlama-1.1B, eight queries of which share a key."""
    return vicuna(2048, 5632, 22, 32, num_key_value_heads=4)


def tiny() -> LlamaConfig:
    """For a CPU: narrow, and a quarter as deep as 7B, with few words, so that what they cost stays in proportion."""
    return vicuna(256, 688, 8, 8, vocab_size=1024)


def tiny_clip() -> CLIPVisionConfig:
    """Its tower: as many patches as the large one has, for about as small a share of the work."""
    return clip(hidden_size=64, intermediate_size=256, num_hidden_layers=5, num_attention_heads=2)


def llava(text: PreTrainedConfig, vision: CLIPVisionConfig | None = None) -> LlavaConfig:
    return LlavaConfig(vision_config=vision or clip(), image_seq_length=576, **_joined(text))


def llava_next(text: PreTrainedConfig, vision: CLIPVisionConfig | None = None) -> LlavaNextConfig:
    return LlavaNextConfig(vision_config=vision or clip(), image_grid_pinpoints=GRIDS, **_joined(text))


def llava_next_video(text: PreTrainedConfig, vision: CLIPVisionConfig | None = None) -> LlavaNextVideoConfig:
    """Of whose frames a token in four is left: 144 of 576."""
    made = _joined(text)
    return LlavaNextVideoConfig(
        vision_config=vision or clip(),
        image_grid_pinpoints=GRIDS,
        video_token_index=made["image_token_index"] + 2,
        **made,
    )


def _joined(text: PreTrainedConfig) -> dict:
    """What both have in common: <image> and <pad> are the first two of the last 64 words."""
    image = text.vocab_size - 64
    return {
        "text_config": text, "image_token_index": image, "pad_token_id": image + 1, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
    }  # fmt: skip


KNOWN: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava-hf/llava-1.5-7b-hf": lambda: llava(vicuna()),
    "llava-hf/llava-1.5-13b-hf": lambda: llava(vicuna_13b()),
    "llava-hf/llava-v1.6-vicuna-7b-hf": lambda: llava_next(vicuna()),
    "llava-hf/llava-v1.6-vicuna-13b-hf": lambda: llava_next(vicuna_13b()),
    "llava-hf/llava-v1.6-mistral-7b-hf": lambda: llava_next(mistral()),
}

FAMILIES = {"1.5": llava, "next": llava_next, "video": llava_next_video}
SIZES = {
    "tiny": (tiny, tiny_clip),
    "1b": (small, clip),
    "7b": (vicuna, clip),
    "13b": (vicuna_13b, clip),
}


def shaped(size: str, family: str) -> PreTrainedConfig:
    """A LLaVA-1.5, NeXT or NeXT-Video of this size."""
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    text, tower = SIZES[size]
    return FAMILIES[family](text(), tower())
