"""One question to a model: pictures and text in, the model's words out.

    question -> chat template -> processor -> greedy decoding -> the new tokens, as text

Greedy, as LLaVA's own evaluations are: the same question gets the same answer. The prompt is the one that training
ends at (`chat.py`), and checked: a LLaVA template that is given a plain string drops it and asks "USER: ASSISTANT:",
and nothing in the answer shows it.
"""

import torch
from PIL import Image
from torch import nn
from transformers import TextStreamer

from ..data.chat import Chat
from ..util.errors import UserError


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
    chat = Chat(processor)
    prompt = chat.prompt(question, len(pictures))
    inputs = processor(
        images=pictures or None,
        text=prompt,
        add_special_tokens=not chat.begun(prompt),
        return_tensors="pt",
    ).to(model.device, model.dtype)  # only what is floating takes the dtype
    length = inputs["input_ids"].shape[1]
    positions = model.config.get_text_config().max_position_embeddings
    if length >= positions:
        raise UserError(f"the prompt takes {length} tokens, and the model's {positions} positions hold an answer too")
    was_training = model.training
    model.eval()
    try:
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
    except (UserError, UnicodeError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"the model cannot answer: {error}. Is its generation_config.json sound?") from error
    finally:
        model.train(was_training)
    return processor.decode(out[0, length:], skip_special_tokens=True).strip()
