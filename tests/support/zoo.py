"""Tiny random models of the families beyond LLaVA, and batches as their processors would make them.

A kind of model says what is special about it in a class: its configuration, what a picture is in ids and tensors, which
features its own code makes of it, and where its rows are. The oracle of a fast step puts these together by hand and
asks transformers' own LLM. Weights are large, as in `tiny.py`.
"""

import copy
import math
from collections.abc import Sequence

import torch
from support import tiny
from support.tiny import BOS, IMG, PAD, TEXT, VOCAB
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tinyspeed import pruning
from tinyspeed.rows import IGNORE

IMAGE, VIDEO, START, END, BREAK = range(VOCAB, VOCAB + 5)  # behind the text
WORDS = VOCAB + 5
TEXTS = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "bos_token_id": BOS,
    "pad_token_id": PAD, "tie_word_embeddings": False,
}  # fmt: skip


class Qwen2:
    """Pictures of 4 to 24 patches in a grid, of which four make a row of features."""

    config, model = Qwen2VLConfig, Qwen2VLForConditionalGeneration
    vision = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32}
    text: dict = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    tower, projectors = "visual", ("visual.merger",)
    patch = 4

    def made(self, layers: int = 3, **more):
        vision = {"patch_size": self.patch, "spatial_merge_size": 2, "temporal_patch_size": 2, **self.vision}
        ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
        text = {**TEXTS, **self.text, "num_hidden_layers": layers, **more}
        return self.config(text_config=text, vision_config=vision, vision_end_token_id=END, **ids)

    def picture(self, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        high, wide = (2 * int(n) for n in torch.randint(1, 5, (2,), generator=generator))
        pixels = torch.randn(high * wide, 3 * 2 * self.patch**2, generator=generator)
        grid = torch.tensor([[1, high, wide]])
        return [START, *[IMAGE] * (high * wide // 4), END], {"pixel_values": pixels, "image_grid_thw": grid}

    def collated(self, pictures: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}

    def whole(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with what the processor adds and a training loop may leave out."""
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}

    def features(self, hf: nn.Module, batch: dict) -> list[list[Tensor]]:
        """Of each image: its features, and those for the LLM's first layers."""
        out = hf.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
        return [list(parts) for parts in zip(out.pooler_output, *getattr(out, "deepstack_features", []), strict=True)]

    def places(self, ids: list[int], grids: list[list[int]]) -> list[list[int]]:
        """The (time, height, width) of each token."""
        places, at, grids = [], 0, list(grids)
        i = 0
        while i < len(ids):
            if ids[i] != IMAGE:
                places.append([at] * 3)
                at, i = at + 1, i + 1
                continue
            _, high, wide = grids.pop(0)
            places += [[at, at + y, at + x] for y in range(high // 2) for x in range(wide // 2)]
            at, i = at + max(high, wide) // 2, i + high * wide // 4
        return places


class Qwen25(Qwen2):
    config, model = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    vision = {
        "hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip


class Qwen3(Qwen2):
    config, model = Qwen3VLConfig, Qwen3VLForConditionalGeneration
    vision = {
        "hidden_size": 16, "depth": 3, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    projectors = ("visual.merger", "visual.deepstack_merger_list")


class Qwen3Moe(Qwen3):
    config, model = Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
    text = {**Qwen2.text, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


KINDS = {"qwen2_vl": Qwen2(), "qwen2_5_vl": Qwen25(), "qwen3_vl": Qwen3(), "qwen3_vl_moe": Qwen3Moe()}


def model(family: str, *, seed: int = 0, **how) -> nn.Module:
    """A small model in train mode with a frozen tower."""
    kind = KINDS[family]
    net = kind.model(kind.made(**how))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1 and "embed_tokens" not in name:
                wide = parameter[0].numel() if parameter.dim() == 2 or "visual" in name else parameter.shape[-1]
                parameter.normal_(0, 1.2 / math.sqrt(wide), generator=generator)
            elif "norm" not in name:
                parameter.normal_(0, 0.5 if parameter.dim() == 1 else 1.0, generator=generator)
    net.model.get_submodule(kind.tower).requires_grad_(False)
    for projector in kind.projectors:
        net.model.get_submodule(projector).requires_grad_(True)
    return net.train()


def twin(net: nn.Module) -> nn.Module:
    """An independent copy of a model that runs transformers' own SDPA: the oracle."""
    net = copy.deepcopy(net)
    net.model.language_model.set_attn_implementation("sdpa")
    return net


def sample(family: str, outline: Sequence[int | str], seed: int) -> dict:
    """As `tiny.sample`. All text is answer, apart from the first token and from what stands around a picture."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels, pictures = [BOS], [IGNORE], []
    for item in outline:
        if item == IMG:
            its, tensors = KINDS[family].picture(generator)
            pictures.append(tensors)
            labels += [IGNORE] * len(its)
        else:
            its = torch.randint(TEXT, VOCAB, (item,), generator=generator).tolist()
            labels += its
        ids += its
    return {"ids": ids, "labels": labels, "pictures": pictures}


def samples(family: str, seed: int = 0, outlines: Sequence = tiny.OUTLINES) -> list[dict]:
    return [sample(family, outline, 100 * seed + i) for i, outline in enumerate(outlines)]


def collate(family: str, data: list[dict], padding: str = "right") -> dict[str, Tensor]:
    longest = max(len(s["ids"]) for s in data)

    def pad(values: list[int], filler: int) -> list[int]:
        fill = [filler] * (longest - len(values))
        return values + fill if padding == "right" else fill + values

    batch = {
        "input_ids": torch.tensor([pad(s["ids"], PAD) for s in data]),
        "attention_mask": torch.tensor([pad([1] * len(s["ids"]), 0) for s in data]),
        "labels": torch.tensor([pad(s["labels"], IGNORE) for s in data]),
    }
    pictures = [picture for s in data for picture in s["pictures"]]
    return {**batch, **KINDS[family].collated(pictures)} if pictures else batch


def batch(family: str, seed: int = 0, padding: str = "right", outlines=tiny.OUTLINES) -> dict[str, Tensor]:
    return collate(family, samples(family, seed, outlines), padding)


def kept_of(images: list[list[Tensor]], keep: float, plugin: str = "divprune") -> list[set[int]]:
    return [{*pruning.select(plugin, image[0].detach()[None], keep=keep)[0].tolist()} for image in images]


def fast_by_hand(
    hf: nn.Module, family: str, data: list[dict], isolator: Tensor, positions: str, keep: float
) -> tuple[Tensor, Tensor]:
    """(logits, targets) at the answer rows of a fast step: one sample at a time, through transformers' own LLM."""
    kind, logits, targets = KINDS[family], [], []
    for its in data:
        ids, labels, pictures = its["ids"], its["labels"], its["pictures"]
        images = kind.features(hf, kind.collated(pictures)) if pictures else []
        kept, flat = kept_of(images, keep), [(n, i) for n, image in enumerate(images) for i in range(len(image[0]))]
        grids = [grid for picture in pictures for grid in picture.get("image_grid_thw", torch.zeros(0)).tolist()]
        spots = kind.places(ids, grids)
        rows, places, deep, answers = [], [], [], []
        for i, token in enumerate(ids):
            if token == IMAGE:
                n, at = flat.pop(0)
                if at == 0:
                    rows += list(isolator)
                    places += [spots[i]] * len(isolator)
                if at in kept[n]:
                    deep.append((len(rows), [part[at] for part in images[n][1:]]))
                    rows.append(images[n][0][at])
                    places.append(spots[i])
            else:
                rows.append(hf.get_input_embeddings()(torch.tensor(token)))
                places.append(spots[i])
            if i + 1 < len(ids) and labels[i + 1] != IGNORE:
                answers.append((len(rows) - 1, labels[i + 1]))  # the last row so far predicts token i + 1
        causal = torch.full((len(rows), len(rows)), torch.finfo(torch.float32).min).triu(1)[None, None]
        how = {"inputs_embeds": torch.stack(rows)[None], "use_cache": False, "attention_mask": causal}
        if positions == "original":
            how["position_ids"] = torch.tensor(places).movedim(-1, 0).unflatten(-1, (1, -1))
        if deep and deep[0][1]:
            mask = torch.zeros(1, len(rows), dtype=torch.bool)
            mask[0, [row for row, _ in deep]] = True
            layers = [torch.stack([parts[n] for _, parts in deep]) for n in range(len(deep[0][1]))]
            how |= {"visual_pos_masks": mask, "deepstack_visual_embeds": layers}
        hidden = hf.model.language_model(**how).last_hidden_state
        logits.append(hf.lm_head(hidden[0, [row for row, _ in answers]]))
        targets += [target for _, target in answers]
    return torch.cat(logits), torch.tensor(targets)
