"""The model for the built-in digits: a LLaVA-1.5 small enough for two CPU cores, with its tower and its processor.

There is no CLIP of this size to download, so the CLIP-shaped tower is trained here, briefly, to name each cell's
content. Then it is frozen, as LLaVA's is.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..models import manifest
from ..util import files, require
from .digits import BLANK, CELL, DEFAULT, Canvas, picture, pixel_values


def build_model(seed: int, *, width=128, layers=2, tower_width=64, tower_layers=2, side=12, regions=2) -> nn.Module:
    """The untrained model: CLIP tower, two-layer projector, Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    canvas = Canvas(side, regions)
    ids = canvas.ids
    vision = CLIPVisionConfig(
        hidden_size=tower_width, intermediate_size=2 * tower_width, num_hidden_layers=tower_layers,
        num_attention_heads=4, image_size=canvas.pixels, patch_size=CELL,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(ids), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=context(canvas),
        # transformers' 0.02 suits widths of thousands; with it, this width learns ten times slower.
        initializer_range=width**-0.5,
        pad_token_id=ids["<pad>"], bos_token_id=ids["<s>"], eos_token_id=ids["</s>"],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=ids["<image>"], image_seq_length=canvas.cells,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    # At first, attention adds the average of 144 mostly blank cells to every word. The word must be louder than that;
    # otherwise full sequences need hundreds of steps to tell questions apart (pruned ones need far fewer).
    llm = model.model.language_model
    with torch.no_grad():
        llm.embed_tokens.weight.mul_(width**0.5)
        for layer in llm.layers:
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                branch.weight.mul_((4 * layers) ** -0.5)
    return model


def context(canvas: Canvas) -> int:
    """The longest sequence: a picture, and room for every question about it."""
    return max(512, canvas.cells + 128)


def train_tower(tower, seed: int, steps: int, batch=32, report=lambda step, loss: None, canvas=DEFAULT) -> float:
    """Teaches the tower what each cell holds and where the cell is; returns its accuracy on held-out digits.

    A linear head reads the tokens that LLaVA will read. Blank cells outnumber digits fifty to one, so they weigh less,
    in the same balance on every canvas. The place (line and column) is asked for because CLIP's tokens know it too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        side, blank = canvas.side, 1.8 * canvas.regions**2 / canvas.cells
        device = next(tower.parameters()).device
        head = nn.Linear(tower.config.hidden_size, BLANK + 1 + 2 * side).to(device)
        tower.requires_grad_(True)
        optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.01)
        places = torch.arange(side**2, device=device).repeat(batch)
        line, column = places // side, places % side
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
            pixels, cells = _pictures([seed, step, 2], "train", batch, canvas, device)
            weight = torch.where(cells.flatten() == BLANK, blank, 1.0)
            what, at_line, at_column = _read(tower, head, pixels).flatten(0, 1).split([BLANK + 1, side, side], dim=1)
            loss = F.cross_entropy(what, cells.flatten(), reduction="none")
            for place, truth in ((at_line, line), (at_column, column)):
                loss = loss + 0.2 * F.cross_entropy(place, truth, reduction="none")
            loss = (loss * weight).sum() / weight.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            report(step, loss)
    tower.requires_grad_(False)
    with torch.no_grad():
        pixels, cells = _pictures([seed, 0, 3], "eval", 256, canvas, device)
        guess = _read(tower, head, pixels)[..., : BLANK + 1].argmax(-1)
    digit = cells != BLANK
    return (guess == cells)[digit].float().mean().item()


def build_processor(canvas: Canvas = DEFAULT):
    """The processor that makes of a real picture and a chat what `Digits.example` makes directly."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(canvas.ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", canvas.ids["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"], model_max_length=context(canvas),
    )  # fmt: skip
    half, size = [0.5, 0.5, 0.5], {"height": canvas.pixels, "width": canvas.pixels}
    # Nothing is cropped, but transformers counts visual tokens by `crop_size`.
    pictures = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}"
        "{{ '</s> ' if message['role'] == 'assistant' else '' }}{% endfor %}"
    )
    return LlavaProcessor(
        pictures, tokenizer, patch_size=CELL, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip


def prepare(folder: Path, seed: int, *, tower_steps: int, bar=True, device="cpu", **sizes: int) -> Path:
    """The base model in `folder`, in transformers' own format. On first use it is built, and its tower trained."""
    how = {"seed": seed, "tower_steps": tower_steps, **sizes}
    if folder.is_dir():
        manifest.verify(folder, "digits.json", how)
        return folder
    model = build_model(seed, **sizes)
    canvas = Canvas(**{name: sizes[name] for name in ("side", "regions") if name in sizes})
    with tqdm(total=tower_steps, desc="tower", unit="step", disable=not bar, mininterval=0.2) as line:

        def report(step: int, loss: Tensor) -> None:
            if step % 10 == 0:
                line.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            line.update()

        accuracy = train_tower(model.model.vision_tower.to(device), seed, tower_steps, report=report, canvas=canvas)
        line.set_postfix_str(f"names {100 * accuracy:.1f} % of held-out digits")
    with files.atomic(folder) as temporary:
        model.save_pretrained(temporary)
        build_processor(canvas).save_pretrained(temporary)
        manifest.write(temporary, "digits.json", how)
    return folder


def require_fitting(config, path: str, canvas: Canvas) -> None:
    """Refuses a model whose configuration says that it cannot read these pictures or these words."""
    found = config.text_config.vocab_size, config.image_token_id, config.vision_config.image_size
    wanted = len(canvas.ids), canvas.ids["<image>"], canvas.pixels
    words, token, size = (f"{has}, not {wants}" for has, wants in zip(found, wanted, strict=True))
    what = f'{path} is not a model for data.kind = "digits" (words: {words}; image token: {token}; pixels: {size})'
    require(found == wanted, f"{what}: digits.side and digits.regions must be those that it was built with")


def _read(tower: nn.Module, head: nn.Module, pixels: Tensor) -> Tensor:
    return head(tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:])


def _pictures(seed: list[int], split: str, count: int, canvas: Canvas, device) -> tuple[Tensor, Tensor]:
    """So many pictures, and what their cells hold."""
    rng = np.random.default_rng(seed)
    pixels, cells = zip(*(picture(rng, split, canvas) for _ in range(count)), strict=True)
    cells = torch.from_numpy(np.stack([held.flatten() for held in cells]))
    return torch.stack([pixel_values(each) for each in pixels]).to(device), cells.to(device)
