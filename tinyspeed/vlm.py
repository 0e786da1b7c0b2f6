"""Everything tinyspeed knows about model classes: transformers is touched here and nowhere else in the core.

A `Family` is a thin adapter over a Hugging Face vision-language model whose processor marks images with placeholder
ids. DualSpeed asks it for five things: features of the images, embeddings of the ids, which feature rows may be pruned,
hidden states of a list of rows, and logits. A new model family is one small subclass and a line in `FAMILIES`; one
whose positions are not a single number a row (Qwen-VL) overrides `hidden`.

The LLM runs with the attention function of `attention.py`, which is told a step's layout instead of guessing it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from . import attention
from .errors import UserError, unknown
from .rows import Layout


class Family:
    """LLaVA-1.5, and the base of the others."""

    def __init__(self, model: nn.Module):
        # peft wraps the model; its base is the same modules with adapters in place.
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.model.config
        self.language_model.set_attn_implementation(attention.NAME)

    @property
    def tower(self) -> nn.Module:
        return self.model.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        return self.model.model.multi_modal_projector

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    @property
    def image_token(self) -> int:
        return self.config.image_token_id

    @property
    def hidden_size(self) -> int:
        return self.config.text_config.hidden_size

    def connector(self) -> list[nn.Parameter]:
        """The parameters between tower and LLM: what stage 1 trains, with the isolator."""
        return list(self.projector.parameters())

    def encode(self, pixel_values: Tensor, image_sizes: Tensor | None, plan_mode: str) -> list[Tensor]:
        """Projected features, one (rows, hidden) tensor an image."""
        return list(self.model.get_image_features(pixel_values=pixel_values).pooler_output)

    def idle(self, plan_mode: str) -> Tensor:
        """Rows that a batch without images puts in the table and never picks: the connector's gradients are then
        zeros instead of missing, so which parameters a step touches depends on its plan and not on its data."""
        like = self.model.get_input_embeddings().weight  # not the projector's: a 4-bit one stores bytes
        width = self.config.vision_config.hidden_size
        if isinstance(self.config.vision_feature_layer, list | tuple):
            width *= len(self.config.vision_feature_layer)
        return self.projector(torch.zeros(1, 1, width, dtype=like.dtype, device=like.device))[0]

    def prunable(self, features: list[Tensor], image_sizes: Tensor | None) -> list[Tensor]:
        """For each image, which of its feature rows are pictures, and not structure."""
        return [torch.ones(len(f), dtype=torch.bool, device=f.device) for f in features]

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(input_ids)

    def hidden(self, embeddings: Tensor, layout: Layout, layers: tuple[int, ...] | None) -> Tensor:
        """Last hidden states (slots, hidden) of rows laid out as `layout` says, through the LLM layers of the plan."""
        with self._running(layers):
            # Any 4-D mask keeps transformers from making one of its own; `rows_attention` does not look at it.
            out = self.language_model(
                inputs_embeds=embeddings.view(*layout.position.shape, -1),
                attention_mask=embeddings.new_ones(1, 1, 1, 1, dtype=torch.bool),
                position_ids=layout.position,
                use_cache=False,
                rows=layout,
            )
        return out.last_hidden_state.flatten(0, 1)

    @contextmanager
    def _running(self, layers: tuple[int, ...] | None) -> Iterator[None]:
        """The LLM with only these layers. They are skipped outside their own call, so no hook of theirs fires."""
        if layers is None:
            yield
            return
        every = self.language_model.layers
        if layers[-1] >= len(every):
            raise UserError(
                f"the plan runs layer {layers[-1]}, but the LLM has {len(every)} layers, 0 to {len(every) - 1}"
            )
        self.language_model.layers = nn.ModuleList(every[i] for i in layers)
        try:
            yield
        finally:
            self.language_model.layers = every

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)


class LlavaNext(Family):
    """LLaVA-NeXT: an image is its base view and a grid of crops, unpadded, with a newline row behind each line."""

    @property
    def newline(self) -> nn.Parameter:
        return self.model.model.image_newline

    def connector(self) -> list[nn.Parameter]:
        return [*super().connector(), self.newline]

    def encode(self, pixel_values: Tensor, image_sizes: Tensor | None, plan_mode: str) -> list[Tensor]:
        if image_sizes is None:
            raise UserError("LLaVA-NeXT needs image_sizes beside pixel_values: pass the processor's whole batch")
        # Fast plans drop every newline row, so the newline is no part of their graph.
        with _frozen(self.newline) if plan_mode == "fast" else nullcontext():
            out = self.model.get_image_features(pixel_values=pixel_values, image_sizes=image_sizes)
        return list(out.pooler_output)

    def idle(self, plan_mode: str) -> Tensor:
        rows = super().idle(plan_mode)
        return rows if plan_mode == "fast" else torch.cat([rows, self.newline[None]])

    def prunable(self, features: list[Tensor], image_sizes: Tensor | None) -> list[Tensor]:
        """Newline rows are structure. They are found by packing one-channel zeros with a newline of one."""
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        crops = [
            torch.zeros(
                image_size_to_num_patches(size, self.config.image_grid_pinpoints, vision.image_size), patches, 1
            )
            for size in image_sizes
        ]
        packed, _ = self.model.model.pack_image_features(
            crops, image_sizes, self.config.vision_feature_select_strategy, image_newline=torch.ones(1)
        )
        return [(p[:, 0] == 0).to(f.device) for p, f in zip(packed, features, strict=True)]


@contextmanager
def _frozen(parameter: nn.Parameter) -> Iterator[None]:
    was = parameter.requires_grad
    parameter.requires_grad_(False)
    try:
        yield
    finally:
        parameter.requires_grad_(was)


FAMILIES: dict[str, type[Family]] = {"llava": Family, "llava_next": LlavaNext}


def family(model: nn.Module) -> Family:
    """The adapter for a model, by its config's model_type."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UserError(f"tinyspeed cannot train a {kind!r} model yet; it knows {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind](model)


def load(path: str, dtype: str = "float32") -> nn.Module:
    """A LLaVA from a hub id ("llava-hf/llava-1.5-7b-hf") or a local folder written by `save_pretrained`."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise unknown("dtype", dtype, dtypes)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{path} is not a model folder: it has no config.json")
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}/config.json is not a model's configuration: {error!r}") from error
        if kind not in FAMILIES:
            raise UserError(f"{path} holds a {kind!r} model; tinyspeed knows {', '.join(sorted(FAMILIES))}")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir():
        raise UserError(f"there is no model folder {path}; give a folder, or a hub id such as llava-hf/llava-1.5-7b-hf")
    try:
        # Safetensors only: a pickle can run code.
        where = folder if folder.is_dir() else path
        return AutoModelForImageTextToText.from_pretrained(where, dtype=dtypes[dtype], use_safetensors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot load the model {path}: {str(error).splitlines()[0]}") from error


def load_processor(path: str):
    """The processor saved beside a model: tokeniser, image processor, chat template."""
    try:
        return AutoProcessor.from_pretrained(Path(path).expanduser() if Path(path).expanduser().is_dir() else path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} has no usable processor beside its model: {str(error).splitlines()[0]}") from error


STAGES = ("align", "train")


def set_trainable(model: nn.Module, stage: str) -> None:
    """LLaVA's two stages. align: the connector alone. train: the connector and the LLM. The tower is always frozen."""
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    model.requires_grad_(False)
    vlm = family(model)
    for parameter in vlm.connector():
        parameter.requires_grad_(True)
    if stage == "train":
        vlm.language_model.requires_grad_(True)
        vlm.model.get_output_embeddings().requires_grad_(True)
