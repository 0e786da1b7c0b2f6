"""Tiny random LLaVAs, batches as a processor would make them, and a checkpoint in the real format on disk.

Weights are drawn far larger than an initialiser would: with the usual 0.02 every logit is nearly equal, and a test
that swaps two rows or shifts a position would pass. Here such a slip moves the logits by more than 0.1.
"""

import copy
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches, select_best_resolution

from tinyspeed.models import lean

FAMILIES = ("llava", "llava_next")
VIDEO_FAMILIES = ("llava_next_video", "llava_onevision")  # of these too, in `test_families.py`
SIDE, PATCH = 24, 8  # one picture is 3 x 3 patches
PINPOINTS = [[24, 48], [48, 24], [48, 48]]
MOST_CROPS = 2  # beyond, OneVision scales an image down
FRAMES = 10
BOS, EOS, PAD, IMAGE = 0, 1, 2, 3
TEXT = 4  # the first id that is plain text
VOCAB = TEXT + 256  # byte-level: any text can be written
VIDEO = VOCAB  # behind the text: most models have no such token
IGNORE = -100
IMG, VID = "image", "video"  # in the outline of a sample, see `sample`


def config(family: str = "llava", *, layers: int = 3, dropout: float = 0.0):
    onevision = family == "llava_onevision"
    vision = (SiglipVisionConfig if onevision else CLIPVisionConfig)(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    text = (Qwen2Config if onevision else LlamaConfig)(
        vocab_size=VOCAB + (family in VIDEO_FAMILIES), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, attention_dropout=dropout,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    common = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE, "vision_feature_layer": -2}
    if family == "llava":
        return LlavaConfig(**common, image_seq_length=(SIDE // PATCH) ** 2)
    if family == "llava_next":
        return LlavaNextConfig(**common, image_grid_pinpoints=PINPOINTS)
    common |= {"image_grid_pinpoints": PINPOINTS, "video_token_id": VIDEO}
    if family == "llava_next_video":
        return LlavaNextVideoConfig(**common)
    return LlavaOnevisionConfig(**common, vision_aspect_ratio=f"anyres_max_{MOST_CROPS}")


MODELS = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_next_video": LlavaNextVideoForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}


def model(family: str = "llava", *, seed: int = 0, layers: int = 3, dropout: float = 0.0) -> nn.Module:
    """A small LLaVA in train mode, with grouped-query attention in its LLM and a frozen tower."""
    net = MODELS[family](config(family, layers=layers, dropout=dropout))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(0, 1.2 / math.sqrt(parameter[0].numel()), generator=generator)
            elif not re.search("norm.*weight", name):
                parameter.normal_(0, 0.5 if parameter.dim() == 1 else 1.0, generator=generator)
    net.model.vision_tower.requires_grad_(False)
    return net.train()


def twin(net: nn.Module) -> nn.Module:
    """An independent copy of a model that runs transformers' own SDPA and layers: the oracle."""
    net = copy.deepcopy(net)
    net.model.language_model.set_attn_implementation("sdpa")
    lean.use(net, False)
    return net


def image_rows(family: str, size: tuple[int, int], cropped: bool = True) -> tuple[int, int]:
    """(picture rows, newline rows) of an image, by the formula of transformers' processors."""
    side = SIDE // PATCH
    if family == "llava":
        return side * side, 0
    if not cropped:
        return side * side, 1
    height, width = size
    best_height, best_width = select_best_resolution(list(size), PINPOINTS)
    lines, columns = best_height // PATCH, best_width // PATCH
    if width / height > columns / lines:
        lines -= (lines - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (lines / height), 7))) // 2 * 2
    ratio = math.sqrt(lines * columns / (MOST_CROPS * side * side))
    if family == "llava_onevision" and ratio > 1.1:
        lines, columns = int(lines // ratio), int(columns // ratio)
    return side * side + lines * columns, lines


def video_rows(family: str) -> tuple[int, int]:
    """(picture rows, newline rows) of a video."""
    side = SIDE // PATCH
    return (FRAMES * ((side + 1) // 2) ** 2, 1) if family == "llava_onevision" else (FRAMES * (side // 2) ** 2, 0)


SIZES = [(24, 24), (20, 47), (48, 16), (30, 41), (48, 48), (10, 48)]


def sample(family: str, outline: Sequence[int | str], seed: int) -> dict:
    """One sample, made of `outline`: n tokens of text for a number n, an image for `IMG`, a video for `VID`. (1, IMG,
    IMG, 5) has two images side by side. Text is random and all of it is answer, apart from the sample's first token."""
    generator = torch.Generator().manual_seed(seed)
    ids, pixels, sizes, videos = [BOS], [], [], []
    cropped = family != "llava_onevision" or list(outline).count(IMG) == 1
    for item in outline:
        if item == IMG:
            size = SIZES[int(torch.randint(len(SIZES), (), generator=generator))]
            ids += [IMAGE] * sum(image_rows(family, size, cropped))
            crops = image_size_to_num_patches(size, PINPOINTS, SIDE) if cropped else 1
            shape = (3, SIDE, SIDE) if family == "llava" else (crops, 3, SIDE, SIDE)
            pixels.append(torch.randn(shape, generator=generator))
            sizes.append(size)
        elif item == VID:
            ids += [VIDEO] * sum(video_rows(family))
            videos.append(torch.randn(FRAMES, 3, SIDE, SIDE, generator=generator))
        else:
            ids += torch.randint(TEXT, VOCAB, (item,), generator=generator).tolist()
    labels = [IGNORE, *(IGNORE if i in (IMAGE, VIDEO) else i for i in ids[1:])]
    return {"ids": ids, "labels": labels, "pixels": pixels, "sizes": sizes, "videos": videos, "family": family}


def padded(samples: list[dict], padding: str = "right") -> dict[str, Tensor]:
    """The ids and labels of samples in one batch."""
    longest = max(len(s["ids"]) for s in samples)

    def pad(values: list[int], filler: int) -> list[int]:
        fill = [filler] * (longest - len(values))
        return values + fill if padding == "right" else fill + values

    return {
        "input_ids": torch.tensor([pad(s["ids"], PAD) for s in samples]),
        "attention_mask": torch.tensor([pad([1] * len(s["ids"]), 0) for s in samples]),
        "labels": torch.tensor([pad(s["labels"], IGNORE) for s in samples]),
    }


def collate(samples: list[dict], padding: str = "right") -> dict[str, Tensor]:
    """Samples as the batch that a Hugging Face processor returns."""
    batch = padded(samples, padding)
    pixels = [p for s in samples for p in s["pixels"]]
    if pixels and samples[0]["family"] == "llava":
        batch["pixel_values"] = torch.stack(pixels)
    elif pixels:  # (images, most crops, 3, H, W): an image with fewer crops is filled up with black ones
        batch["pixel_values"] = nn.utils.rnn.pad_sequence(pixels, batch_first=True)
        batch["image_sizes"] = torch.tensor([size for s in samples for size in s["sizes"]])
    if pixels and samples[0]["family"] == "llava_onevision":
        batch["batch_num_images"] = torch.tensor([len(s["sizes"]) for s in samples if s["sizes"]])
    videos = [video for s in samples for video in s["videos"]]
    if videos:
        batch["pixel_values_videos"] = torch.stack(videos)
    return batch


# An image within text, no image, two images side by side, two apart, and one after which the sample ends.
OUTLINES = ((2, IMG, 6), (7,), (3, IMG, IMG, 4), (2, IMG, 3, IMG, 5), (3, IMG))


def samples(family: str, seed: int = 0, outlines: Sequence[Sequence[int | str]] = OUTLINES) -> list[dict]:
    return [sample(family, outline, 100 * seed + i) for i, outline in enumerate(outlines)]


def batch(family: str, seed: int = 0, padding: str = "right", outlines=OUTLINES) -> dict[str, Tensor]:
    return collate(samples(family, seed, outlines), padding)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that are there; a parameter without one is left out."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def difference(got: dict[str, Tensor] | Tensor, want: dict[str, Tensor] | Tensor, rel: float = 1e-5) -> str:
    """What differs, in words; "" if all is equal within `rel` of the largest entry, as sums in another order are.

    Of the largest of all and not of each tensor: where a true gradient is near zero, its rounding is not."""
    if isinstance(got, Tensor):
        got, want = {"": got}, {"": want}
    got, want = ({name: t.detach() for name, t in side.items()} for side in (got, want))
    if got.keys() != want.keys():
        return f"only on one side: {sorted(got.keys() ^ want.keys())}"
    scale = max([1e-6, *(float(t.abs().max()) for t in want.values() if t.numel())])
    for name in want:
        if got[name].shape != want[name].shape:
            return f"{name or 'values'} are {tuple(got[name].shape)}, not {tuple(want[name].shape)}"
        worst = float((got[name] - want[name]).abs().max()) if want[name].numel() else 0.0
        if not worst <= rel * scale:  # so that NaN differs too
            return f"{name or 'values'} differ by {worst:.3g}, the largest entry is {scale:.3g}"
    return ""


# LLaVA-1.5's own template, as it stands on the hub.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, no merges: one token a byte, so any text can be written with 260 ids."""
    vocabulary = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, "<image>": IMAGE}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def processor(family: str):
    """A real processor, for pictures of any size."""
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    # Without torchvision, transformers 5 puts its Pillow image processors behind these names, with a log line.
    if family == "llava":
        kind, images = LlavaProcessor, CLIPImageProcessor(size=size, crop_size=crop)
    else:
        kind = LlavaNextProcessor
        images = LlavaNextImageProcessor(size=size, crop_size=crop, image_grid_pinpoints=PINPOINTS)
    return kind(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
        chat_template=CHAT_TEMPLATE,
    )


def checkpoint(family: str, folder: Path | str, *, seed: int = 0) -> Path:
    """A model and its processor on disk, in the format of the hub: weights, configs, tokenizer, chat template."""
    folder = Path(folder)
    model(family, seed=seed).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder


def llm(folder: Path | str, seed: int = 1) -> str:
    """A text-only LLM with the tests' tokenizer, on disk."""
    torch.manual_seed(seed)
    net = LlamaForCausalLM(config("llava").text_config)
    for parameter in net.parameters():  # far apart, or all losses would be nearly equal
        parameter.data *= 5
    net.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def parts(home: Path) -> tuple[str, str]:
    """A CLIP tower and a Llama with its tokenizer, each saved as on the hub."""
    shape = config("llava")
    torch.manual_seed(3)
    CLIPVisionModel(shape.vision_config).save_pretrained(home / "clip")
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size=size, crop_size=crop).save_pretrained(home / "clip")
    LlamaForCausalLM(shape.text_config).to(torch.bfloat16).save_pretrained(home / "llama")
    tokenizer().save_pretrained(home / "llama")
    return str(home / "clip"), str(home / "llama")
