"""One question to a model: pictures and text in, the model's words out.

    question -> chat template -> processor -> greedy decoding -> the new tokens, as text

Greedy, as LLaVA's own evaluations are: the same question gets the same answer. The chat template is given the parts of
the message as a list. A LLaVA template that is given a plain string drops it and asks "USER: ASSISTANT:", and nothing
in the answer shows it; so what the template wrote is checked before the model sees it.
"""

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import nn
from transformers import TextStreamer

from .errors import UserError


def chat(processor, question: str, images: int) -> str:
    """The prompt: a question about so many pictures, as the model's chat template writes it."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    try:
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except (ValueError, TypeError, TemplateError) as error:
        raise UserError(f"the model's chat template cannot write this question: {error}") from error
    if question.strip() not in prompt:  # templates may trim it
        raise UserError(f"the model's chat template lost the question: it wrote {prompt!r}")
    token = processor.image_token
    if token in question:
        raise UserError(f"the question contains {token}, which stands for a picture: leave it out")
    if prompt.count(token) != images:
        raise UserError(f"the model's chat template made room for {prompt.count(token)} pictures, not {images}")
    return prompt


def to_stdout(processor) -> TextStreamer:
    """A streamer for `answer` that prints the answer word by word, and nothing of the prompt."""
    return TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


@torch.no_grad()
def answer(
    model: nn.Module,
    processor,
    pictures: list[Image.Image],
    question: str,
    *,
    max_new_tokens: int = 128,
    streamer: TextStreamer | None = None,
) -> str:
    """What the model says. It stops at the end token, after `max_new_tokens`, or where its positions end."""
    if max_new_tokens < 1:
        raise UserError(f"an answer needs at least one token, not {max_new_tokens}")
    prompt = chat(processor, question, len(pictures))
    bos = processor.tokenizer.bos_token
    inputs = processor(
        images=pictures or None,
        text=prompt,
        # Some templates write the start token themselves, and it must not stand there twice.
        add_special_tokens=bos is None or not prompt.startswith(bos),
        return_tensors="pt",
    ).to(model.device, model.dtype)  # only what is floating takes the dtype
    length = inputs["input_ids"].shape[1]
    positions = model.config.get_text_config().max_position_embeddings
    if length >= positions:
        raise UserError(f"the prompt takes {length} tokens, and the model's {positions} positions hold an answer too")
    was_training = model.training
    model.eval()
    out = model.generate(
        **inputs,
        max_new_tokens=min(max_new_tokens, positions - length),
        do_sample=False,
        num_beams=1,
        # None, because a checkpoint may bring settings for sampling, and transformers warns of them.
        temperature=None,
        top_p=None,
        top_k=None,
        streamer=streamer,
    )
    model.train(was_training)
    return processor.decode(out[0, length:], skip_special_tokens=True).strip()
