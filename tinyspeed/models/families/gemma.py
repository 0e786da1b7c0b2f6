"""Gemma 3 and 4: the rows of an image see each other, and most layers see only the last rows of a window.

    full layers      row i sees row j  if  j <= i, or both are rows of one image
    sliding layers   ... and j > i - window

So this LLM needs a mask, made once a forward for each kind of layer. It has as many lines as there are rows left, so it
is small after pruning. An isolator's rows are rows of their image here: they see what is kept of it, and it sees them.
The window counts rows and not positions, as in transformers; so after pruning it reaches further back.

Gemma 4 sees an image like this in its sliding layers alone, and only if its configuration says "vision". Its small
models look up each token a second time for every layer, where an image's rows and the isolator's count as padding, as
an image's do in transformers. Its last layers may use the keys and values of earlier ones. Its tower drops the patches
that fill up a picture, which waits for the device a few times a step.

Without a kernel for such masks over packed samples the layout is padded. Two images side by side, without the
delimiters that the processor puts around each, are two images here and one for transformers.
"""

import torch
from torch import Tensor

from ...rows import Layout
from ...util import UserError, require
from ...util.sending import to_device
from .base import Family


class Gemma3(Family):
    whole_images, rowwise = True, False  # the projector averages squares of patches
    why_padded = "the rows of an image see each other in this LLM, for which no packed kernel is known here"

    @property
    def most_rows(self) -> int:
        return self.config.mm_tokens_per_image

    def _zeros(self) -> tuple[int, ...]:
        vision = self.config.vision_config
        return 1, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size

    def mask(self, layout: Layout) -> dict[str, Tensor]:
        image = layout.image
        at = torch.arange(image.shape[1], device=image.device)
        same = (image[:, :, None] == image[:, None]) & (image > 0)[:, None]
        full = ((at <= at[:, None]) | same)[:, None]
        near = at > at[:, None] - self.config.text_config.sliding_window
        return {"full_attention": full, "sliding_attention": full & near}


class Gemma4(Gemma3):
    projector_name = "embed_vision"
    square = False
    most_rows = 1120  # by the published processors
    why_padded = "for this LLM's masks and its heads of up to 512 numbers no packed kernel is known here"

    @property
    def whole_images(self) -> bool:
        kind = self.config.text_config.use_bidirectional_attention
        require(kind != "all", 'an LLM with use_bidirectional_attention = "all" predicts no next token')
        return kind == "vision"

    @property
    def filler(self) -> int | None:
        text = self.config.text_config
        return text.pad_token_id if text.hidden_size_per_layer_input else None

    def encode(self, visual: dict[str, Tensor], plan_mode: str) -> list[Tensor]:
        if "image_position_ids" not in visual:
            raise UserError("a 'gemma4' model needs image_position_ids: pass the processor's whole batch")
        pixels = visual["pixel_values"]
        places = to_device(visual["image_position_ids"].cpu(), pixels.device)
        return list(self.model.get_image_features(pixels, places).pooler_output)

    def _zeros(self) -> tuple[int, ...]:
        return 1, 1, self.config.vision_config.hidden_size

    def mask(self, layout: Layout) -> Tensor | dict[str, Tensor]:
        if not self.whole_images:
            return Family.mask(self, layout)
        n = layout.image.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=layout.image.device).tril()[None, None]
        return {**super().mask(layout), "full_attention": causal}

    def hidden(self, embeddings: Tensor, layout: Layout, layers: tuple[int, ...] | None, **more) -> Tensor:
        if layout.token is not None:
            more["per_layer_inputs"] = self.language_model.get_per_layer_inputs(layout.token)
        return super().hidden(embeddings, layout, layers, **more)

    def head(self, hidden: Tensor) -> Tensor:
        logits, cap = super().head(hidden), self.config.text_config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)
