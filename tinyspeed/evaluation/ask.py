"""One question to a model: pictures and text in, the model's words out.

    question -> chat template -> processor -> greedy decoding -> the new tokens, as text

Decoding is greedy, as in LLaVA's own evaluations, so the same question gets the same answer. The prompt ends where
training's prompts end (`data/chat.py`), which is checked: given a plain string, a LLaVA template drops it and asks
"USER: ASSISTANT:", and nothing in the answer would show it.
"""

import torch
from PIL import Image
from torch import nn
from transformers import TextStreamer

from ..data.chat import Chat
from ..util import UserError, paths, require


def to_stdout(processor) -> TextStreamer:
    """Returns a streamer for `answer` that prints the answer word by word, without the prompt."""
    return TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


@torch.no_grad()
def answer(
    model: nn.Module, processor, pictures: list[Image.Image], question: str, *, max_new_tokens: int = 128,
    streamer: TextStreamer | None = None,
) -> str:  # fmt: skip
    """Returns what the model says until its end token, `max_new_tokens`, or the end of its positions."""
    require(max_new_tokens >= 1, f"an answer needs at least one token, not {max_new_tokens}")
    require(not paths.UNENCODABLE.search(question), f"no text can have all characters of the question {question!r}")
    chat = Chat(processor)
    prompt = chat.prompt(question, len(pictures))
    inputs = processor(
        images=pictures or None, text=prompt, add_special_tokens=not chat.begun(prompt), return_tensors="pt"
    ).to(model.device, model.dtype)  # only floating-point tensors take the dtype
    length = inputs["input_ids"].shape[1]
    positions = model.config.get_text_config().max_position_embeddings
    if length >= positions:
        raise UserError(f"the prompt takes {length} tokens, and the model's {positions} positions hold an answer too")
    # None instead of settings for sampling, which a checkpoint may bring and which transformers warns about.
    sampling = {"temperature": None, "top_p": None, "top_k": None}
    most = min(max_new_tokens, positions - length)
    was_training = model.training
    model.eval()
    try:
        out = model.generate(**inputs, max_new_tokens=most, do_sample=False, num_beams=1, streamer=streamer, **sampling)
    except (UserError, UnicodeError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"the model cannot answer: {error}. Is its generation_config.json sound?") from error
    finally:
        model.train(was_training)
    return processor.decode(out[0, length:], skip_special_tokens=True).strip()
