"""Assembles a LLaVA-1.5 from a CLIP tower, an LLM and a new projector. Stage 1 (alignment) starts from one."""

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from ..util import files, require
from . import manifest
from .loading import explaining, load_weights

MANIFEST = "parts.json"
# Vicuna's template, which LLaVA-1.5 uses with every LLM, with the end-of-text token that the hub's copy leaves out.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message['role']] or '' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def assemble(tower: str, llm: str, folder: Path, seed: int) -> Path:
    """Makes a LLaVA-1.5 in `folder` from a CLIP tower, an LLM and a new projector, unless it is there already.

    The model has the LLM's own precision. Each part is loaded once and moved, never copied.
    """
    parts = {"tower": tower, "llm": llm, "seed": seed}
    if folder.is_dir():
        manifest.verify(folder, MANIFEST, parts)
        return folder
    text = load_weights(transformers.AutoModelForCausalLM, llm, dtype="auto")
    vision = load_weights(transformers.CLIPVisionModel, tower, dtype=text.dtype)
    with explaining(f"cannot load the tokenizer of {llm} or the image processor of {tower}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
        image_processor = transformers.CLIPImageProcessor.from_pretrained(tower)
    require(tokenizer.is_fast, f"{llm} has no fast tokenizer, which training needs to tell questions from answers")
    _add_words(text, tokenizer)

    config = transformers.LlavaConfig(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, text.model, text.lm_head
    model.model.multi_modal_projector = projector.to(text.dtype)
    model.generation_config = text.generation_config
    model.config.dtype = text.dtype
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
        chat_template=TEMPLATE,
    )
    with files.atomic(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        manifest.write(temporary, MANIFEST, parts)
    return folder


@torch.no_grad()
def _add_words(text: nn.Module, tokenizer) -> None:
    """Adds <image>, and <pad> if there is none, to tokenizer and embeddings. New words start as the average word."""
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tables = lambda: {id(e): e for e in (text.get_input_embeddings(), text.get_output_embeddings())}.values()
    old, means = text.get_input_embeddings().num_embeddings, [table.weight.float().mean(0) for table in tables()]
    if len(tokenizer) > old:
        text.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
        for table, mean in zip(tables(), means, strict=True):
            table.weight[old:] = mean.to(table.weight.dtype)
