"""The configurations of the published LLaVAs, by hub id: their shapes are known before any weights are downloaded.

So a recipe's memory and time can be estimated without a network, and measured (`tinyspeed bench memory`) on random
weights of the true shape, since memory and speed do not depend on the numbers. Once a model has been downloaded, its
own `config.json` is used instead (`loading.load_config`).
"""

from collections.abc import Callable

import transformers as hf

from ..util import require_known

GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # height, width: how NeXT cuts a picture
COMMON = {"vocab_size": 32064, "rms_norm_eps": 1e-5}  # 32,000 words, <image>, <pad>, rounded up to a multiple of 64


def clip(**changes) -> hf.CLIPVisionConfig:
    """openai/clip-vit-large-patch14-336, the tower of all of them."""
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return hf.CLIPVisionConfig(**{**large, "image_size": 336, "patch_size": 14, "projection_dim": 768, **changes})


def vicuna(hidden: int = 4096, inner: int = 11008, layers: int = 32, heads: int = 32, **changes) -> hf.LlamaConfig:
    """Vicuna-7B v1.5 by default."""
    size = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    more = {"num_attention_heads": heads, "max_position_embeddings": 4096, **changes}
    return hf.LlamaConfig(**{**COMMON, **size, **more})


def mistral() -> hf.MistralConfig:
    """Mistral-7B-Instruct v0.2: four queries share a key, and there is no sliding window."""
    return hf.MistralConfig(
        **COMMON, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=32768, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def llava(family: str, text: hf.PreTrainedConfig, vision: hf.CLIPVisionConfig | None = None) -> hf.PreTrainedConfig:
    """A LLaVA-1.5, a LLaVA-NeXT, or a LLaVA-NeXT-Video, whose frames keep one token in four (144 of 576)."""
    image = text.vocab_size - 64  # <image> and <pad> are the first two of the last 64 words
    common = {
        "text_config": text, "vision_config": vision or clip(), "image_token_index": image, "pad_token_id": image + 1,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
    }  # fmt: skip
    if family == "1.5":
        return hf.LlavaConfig(**common, image_seq_length=576)
    if family == "next":
        return hf.LlavaNextConfig(**common, image_grid_pinpoints=GRIDS)
    return hf.LlavaNextVideoConfig(**common, image_grid_pinpoints=GRIDS, video_token_index=image + 2)


VERSIONS = ("1.5", "next", "video")
SIZES = {  # the LLM and its tower
    # For a CPU: narrow and a quarter as deep as 7B, with few words so that their cost stays in proportion. The tower
    # has as many patches as the large one, for about as small a share of the work.
    "tiny": (
        lambda: vicuna(256, 688, 8, 8, vocab_size=1024),
        lambda: clip(hidden_size=64, intermediate_size=256, num_hidden_layers=5, num_attention_heads=2),
    ),
    "1b": (lambda: vicuna(2048, 5632, 22, 32, num_key_value_heads=4), clip),  # TinyLlama: eight queries share a key
    "7b": (vicuna, clip),
    "13b": (lambda: vicuna(5120, 13824, 40, 40), clip),
}
KNOWN: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llava-hf/llava-1.5-7b-hf": lambda: config_of("7b", "1.5"),
    "llava-hf/llava-1.5-13b-hf": lambda: config_of("13b", "1.5"),
    "llava-hf/llava-v1.6-vicuna-7b-hf": lambda: config_of("7b", "next"),
    "llava-hf/llava-v1.6-vicuna-13b-hf": lambda: config_of("13b", "next"),
    "llava-hf/llava-v1.6-mistral-7b-hf": lambda: llava("next", mistral()),
}


def config_of(size: str, family: str) -> hf.PreTrainedConfig:
    """Returns the configuration of a LLaVA-1.5, NeXT or NeXT-Video of this size."""
    require_known("size", size, SIZES)
    require_known("family", family, VERSIONS)
    text, tower = SIZES[size]
    return llava(family, text(), tower())
