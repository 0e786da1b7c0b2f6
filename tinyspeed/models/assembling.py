"""A LLaVA-1.5 from parts: a CLIP tower, an LLM and a new projector. Stage 1 (aligning) starts from one."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ..util import files
from ..util.errors import UserError
from . import built
from .loading import explaining, only_safetensors

# Vicuna's template, as LLaVA-1.5 uses it on every LLM, with the end-of-text token that the hub's
# copy leaves out.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message['role']] or '' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def assemble(tower: str, llm: str, folder: Path, seed: int) -> Path:
    """A LLaVA-1.5 in `folder` from a CLIP tower, an LLM and a new projector: what stage 1 starts from.

    Built once, in the LLM's own precision; each part is loaded once and moved, never copied.
    """
    made = {"tower": tower, "llm": llm, "seed": seed}
    if folder.is_dir():
        built.check(folder, "parts.json", made)
        return folder
    for part in (llm, tower):
        only_safetensors(part)
    with explaining(f"cannot load {llm} or {tower}"):
        text = AutoModelForCausalLM.from_pretrained(llm, dtype="auto", use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
        vision = CLIPVisionModel.from_pretrained(tower, dtype=text.dtype, use_safetensors=True)
        pictures = CLIPImageProcessor.from_pretrained(tower)
    if not tokenizer.is_fast:
        raise UserError(f"{llm} has no fast tokenizer, which training needs to tell questions from answers")

    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with torch.no_grad():  # new words start as the average word
        tables = {id(e): e for e in (text.get_input_embeddings(), text.get_output_embeddings())}
        old, means = text.get_input_embeddings().num_embeddings, [e.weight.float().mean(0) for e in tables.values()]
        if len(tokenizer) > old:
            text.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
            tables = {id(e): e for e in (text.get_input_embeddings(), text.get_output_embeddings())}
            for table, mean in zip(tables.values(), means, strict=True):
                table.weight[old:] = mean.to(table.weight.dtype)

    cells = (vision.config.image_size // vision.config.patch_size) ** 2
    shape = LlavaConfig(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=cells,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        projector = model.model.multi_modal_projector.to_empty(device="cpu").float()
        for layer in projector.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, text.model, text.lm_head
    model.model.multi_modal_projector = projector.to(text.dtype)
    model.generation_config = text.generation_config
    model.config.dtype = text.dtype
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
        chat_template=TEMPLATE,
    )
    with files.atomic(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        built.label(temporary, "parts.json", made)
    return folder
