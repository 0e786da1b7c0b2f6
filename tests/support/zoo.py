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
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
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


def seen(rows: int, sees) -> Tensor:
    """(1, 1, rows, rows): 0 where row i sees row j, and the lowest number elsewhere."""
    worst = torch.finfo(torch.float32).min
    return torch.tensor([[0.0 if sees(i, j) else worst for j in range(rows)] for i in range(rows)])[None, None]


class Qwen2:
    """Pictures of 4 to 24 patches in a grid, of which four make a row of features."""

    config, model = Qwen2VLConfig, Qwen2VLForConditionalGeneration
    vision = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32}
    text: dict = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    tower, projectors = "visual", ("visual.merger",)
    packs, uniform = True, True  # whether samples may stand end to end, and whether all layers of the LLM are alike
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

    def collated(self, pictures: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        """The tensors of a batch, of the pictures of each sample."""
        every = [picture for its in pictures for picture in its]
        return {name: torch.cat([picture[name] for picture in every]) for name in every[0]}

    def whole(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with what the processor adds and a training loop may leave out."""
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}

    def features(self, hf: nn.Module, picture: dict[str, Tensor]) -> list[Tensor]:
        """A picture's features, and those for the LLM's first layers."""
        out = hf.get_image_features(**picture)
        return [torch.cat([*part]) for part in (out.pooler_output, *getattr(out, "deepstack_features", []))]

    def mask(self, owner: list[int]) -> Tensor | dict[str, Tensor]:
        """Which rows see which, added to scores; `owner` says which image each belongs to, -1 for text."""
        window = self.text.get("sliding_window") or len(owner)
        return seen(len(owner), lambda i, j: i - window < j <= i)

    def again(self, hf: nn.Module, tokens: list[int]) -> dict[str, Tensor]:
        """What the LLM reads of the tokens beside their embeddings; rows without a token have `PAD`."""
        return {}

    def head(self, hf: nn.Module, hidden: Tensor) -> Tensor:
        return hf.lm_head(hidden)

    def places(self, ids: list[int], pictures: list[dict[str, Tensor]]) -> list:
        """The (time, height, width) of each token, or its number alone."""
        grids = [grid for picture in pictures for grid in picture["image_grid_thw"].tolist()]
        places, at, i = [], 0, 0
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


class Intern(Qwen2):
    """Pictures of one to three crops, each of four rows, in one run."""

    config, model = InternVLConfig, InternVLForConditionalGeneration
    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": [16, 16], "patch_size": [4, 4],
    }  # fmt: skip
    tower, projectors = "vision_tower", ("multi_modal_projector",)
    ids: dict = {"image_token_id": IMAGE}
    text = {"model_type": "qwen2"}

    def made(self, layers: int = 3, **more):
        text = {**TEXTS, **self.text, "num_hidden_layers": layers, **more}
        return self.config(text_config=text, vision_config=self.vision, **self.ids)

    def picture(self, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        crops = int(torch.randint(1, 4, (), generator=generator))
        pixels = torch.randn(crops, 3, 16, 16, generator=generator)
        return [START, *[IMAGE] * (4 * crops), END], {"pixel_values": pixels}

    def whole(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def places(self, ids: list[int], pictures: list[dict[str, Tensor]]) -> list:
        return [*range(len(ids))]


class Smol(Intern):
    """Pictures of a run for each of two crops, or of none, and a run for the whole."""

    config, model = SmolVLMConfig, SmolVLMForConditionalGeneration
    vision = {**Intern.vision, "image_size": 16, "patch_size": 4}
    tower, projectors = "vision_model", ("connector",)
    text = {"model_type": "llama"}
    ids = {"image_token_id": IMAGE, "scale_factor": 2}

    def picture(self, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        crops = 2 * int(torch.randint(2, (), generator=generator))
        pixels = torch.randn(1, crops + 1, 3, 16, 16, generator=generator)
        mask = torch.ones(1, crops + 1, 16, 16, dtype=torch.long)
        mask[:, :-1, :, 12:] = 0  # the crops are narrower than the tower's picture
        ids = [token for crop in range(crops) for token in (START, TEXT + crop, *[IMAGE] * 4)]
        return [*ids, START, END, *[IMAGE] * 4, START], {"pixel_values": pixels, "pixel_attention_mask": mask}

    def collated(self, pictures: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        names = next(picture for its in pictures for picture in its)
        most = max(sum(picture["pixel_values"].shape[1] for picture in its) for its in pictures)
        batch = {}
        for name, like in names.items():
            batch[name] = like.new_zeros(len(pictures), most, *like.shape[2:])
            for line, its in zip(batch[name], pictures, strict=True):
                for crop, of in zip(line, (crop for picture in its for crop in picture[name][0]), strict=False):
                    crop.copy_(of)
        return batch


class Idefics(Smol):
    config, model = Idefics3Config, Idefics3ForConditionalGeneration


class Mistral(Intern):
    """Pictures of lines of rows with a break behind each, the last of which is an end."""

    config, model = Mistral3Config, Mistral3ForConditionalGeneration
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
        "intermediate_size": 32, "image_size": 32, "patch_size": 4,
    }  # fmt: skip
    ids = {"image_token_index": IMAGE, "spatial_merge_size": 2}
    text = {"model_type": "mistral", "sliding_window": None}

    def picture(self, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        lines, wide = (int(n) for n in torch.randint(1, 5, (2,), generator=generator))
        pixels, size = (
            torch.randn(1, 3, 8 * lines, 8 * wide, generator=generator),
            torch.tensor([[8 * lines, 8 * wide]]),
        )
        return [*([IMAGE] * wide + [BREAK]) * lines][:-1] + [END], {"pixel_values": pixels, "image_sizes": size}

    def collated(self, pictures: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        every = [picture for its in pictures for picture in its]
        sizes = torch.cat([picture["image_sizes"] for picture in every])
        pixels = torch.zeros(len(every), 3, *sizes.amax(0).tolist())
        for one, (high, wide), picture in zip(pixels, sizes.tolist(), every, strict=True):
            one[:, :high, :wide] = picture["pixel_values"][0]
        return {"pixel_values": pixels, "image_sizes": sizes}


class Windowed(Mistral):
    """An LLM whose rows see no more than the last nine."""

    text = {"model_type": "mistral", "sliding_window": 9}


class Qwen35(Qwen2):
    config, model = Qwen3_5Config, Qwen3_5ForConditionalGeneration
    vision = {name: value for name, value in Qwen3.vision.items() if name != "deepstack_visual_indexes"}
    text = {
        **Qwen2.text, "full_attention_interval": 2, "partial_rotary_factor": 1.0, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    packs = uniform = False


class Qwen35Moe(Qwen35):
    config, model = Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    text = {**Qwen35.text, **more, "shared_expert_intermediate_size": 24}


class Gemma3(Intern):
    """Pictures of 36 patches, of which four are averaged to a row."""

    model, tower, projectors = Gemma3ForConditionalGeneration, "vision_tower", ("multi_modal_projector",)
    packs = uniform = False
    window = 5
    layers = ("sliding_attention", "full_attention", "sliding_attention")

    def made(self, **more):
        vision = {
            "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 24, "patch_size": self.patch,
        }  # fmt: skip
        text = {**TEXTS, "sliding_window": self.window, "layer_types": [*self.layers], "query_pre_attn_scalar": 8}
        ids = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": 9}
        return Gemma3Config(text_config={**text, **more}, vision_config=vision, **ids)

    def picture(self, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        return [START, *[IMAGE] * 9, END], {"pixel_values": torch.randn(1, 3, 24, 24, generator=generator)}

    def whole(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE).int()}

    def mask(self, owner: list[int]) -> dict[str, Tensor]:
        whole = lambda i, j: j <= i or owner[i] == owner[j] >= 0
        near = lambda i, j: whole(i, j) and j > i - self.window
        return {"full_attention": seen(len(owner), whole), "sliding_attention": seen(len(owner), near)}


class Gemma4(Gemma3):
    """Pictures of 8 to 24 patches, filled up to 24."""

    model, projectors = Gemma4ForConditionalGeneration, ("embed_vision",)
    bidirectional: str | None = "vision"
    layers = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
    more: dict = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": WORDS}

    def made(self, **more):
        vision = {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "patch_size": self.patch, "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        }  # fmt: skip
        text = {
            **TEXTS, "sliding_window": self.window, "layer_types": [*self.layers], "num_hidden_layers": 4,
            "global_head_dim": 16, "num_kv_shared_layers": 1, "final_logit_softcapping": 3.0,
            "use_bidirectional_attention": self.bidirectional, **self.more,
        }  # fmt: skip
        ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "boi_token_id": START, "eoi_token_id": END}
        return Gemma4Config(text_config={**text, **more}, vision_config=vision, audio_token_id=BREAK, **ids)

    def picture(self, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        high, wide = [(2, 4), (4, 4), (4, 6), (6, 4)][int(torch.randint(4, (), generator=generator))]
        places = torch.full((1, 24, 2), -1)
        places[0, : high * wide] = torch.tensor([[x, y] for y in range(high) for x in range(wide)])
        pixels = torch.rand(1, 24, 3 * self.patch**2, generator=generator)
        return [START, *[IMAGE] * (high * wide // 4), END], {"pixel_values": pixels, "image_position_ids": places}

    def whole(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return Qwen2.whole(self, batch)

    def features(self, hf: nn.Module, picture: dict[str, Tensor]) -> list[Tensor]:
        return super().features(hf.model, picture)

    def mask(self, owner: list[int]) -> dict[str, Tensor]:
        owner = owner if self.bidirectional else [-1] * len(owner)
        return {**super().mask(owner), "full_attention": seen(len(owner), lambda i, j: j <= i)}

    def again(self, hf: nn.Module, tokens: list[int]) -> dict[str, Tensor]:
        if not self.more["hidden_size_per_layer_input"]:
            return {}
        return {"per_layer_inputs": hf.model.language_model.get_per_layer_inputs(torch.tensor([tokens]))}

    def head(self, hf: nn.Module, hidden: Tensor) -> Tensor:
        return 3.0 * torch.tanh(hf.lm_head(hidden) / 3.0)


class Gemma4Causal(Gemma4):
    bidirectional = None


KINDS = {
    "qwen2_vl": Qwen2(), "qwen2_5_vl": Qwen25(), "qwen3_vl": Qwen3(), "qwen3_vl_moe": Qwen3Moe(), "internvl": Intern(),
    "smolvlm": Smol(), "idefics3": Idefics(), "mistral3": Mistral(), "mistral3, windowed": Windowed(),
    "qwen3_5": Qwen35(), "qwen3_5_moe": Qwen35Moe(), "gemma3": Gemma3(), "gemma4": Gemma4(),
    "gemma4, causal": Gemma4Causal(),
}  # fmt: skip


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
    llm_of(net).set_attn_implementation("sdpa")
    return net


def llm_of(net: nn.Module) -> nn.Module:
    return net.model.get_submodule("text_model" if hasattr(net.model, "text_model") else "language_model")


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
    batch = tiny.padded(data, padding)
    pictures = [s["pictures"] for s in data]
    return {**batch, **KINDS[family].collated(pictures)} if any(pictures) else batch


def batch(family: str, seed: int = 0, padding: str = "right", outlines=tiny.OUTLINES) -> dict[str, Tensor]:
    return collate(family, samples(family, seed, outlines), padding)


def kept_of(images: list[list[Tensor]], keep: float, plugin: str = "divprune") -> list[set[int]]:
    return [{*pruning.select(plugin, image[0].detach()[None], keep=keep)[0].tolist()} for image in images]


def fast_by_hand(
    hf: nn.Module, family: str, data: list[dict], isolator: Tensor, positions: str, keep: float, weigh: bool = False
) -> tuple[Tensor, Tensor]:
    """(logits, targets) at the answer rows of a fast step: one sample at a time, through transformers' own LLM. To
    `weigh`, each kept token counts for its equal share of its image."""
    kind, logits, targets = KINDS[family], [], []
    for its in data:
        ids, labels, pictures = its["ids"], its["labels"], its["pictures"]
        images = [kind.features(hf, picture) for picture in pictures]
        kept, flat = kept_of(images, keep), [(n, i) for n, image in enumerate(images) for i in range(len(image[0]))]
        spots = kind.places(ids, pictures)
        rows, places, owner, tokens, deep, answers, heavy = [], [], [], [], [], [], {}
        for i, token in enumerate(ids):
            if token == IMAGE:
                n, at = flat.pop(0)
                if at == 0:
                    rows += list(isolator)
                    places += [spots[i]] * len(isolator)
                if at in kept[n]:
                    heavy[len(rows)] = n
                    deep.append((len(rows), [part[at] for part in images[n][1:]]))
                    rows.append(images[n][0][at])
                    places.append(spots[i])
                owner += [n] * (len(rows) - len(owner))
                tokens += [PAD] * (len(rows) - len(tokens))
            else:
                rows.append(hf.get_input_embeddings()(torch.tensor(token)))
                places.append(spots[i])
                owner.append(-1)
                tokens.append(token)
            if i + 1 < len(ids) and labels[i + 1] != IGNORE:
                answers.append((len(rows) - 1, labels[i + 1]))  # the last row so far predicts token i + 1
        how = {"inputs_embeds": torch.stack(rows)[None], "use_cache": False, "attention_mask": kind.mask(owner)}
        how |= kind.again(hf, tokens)
        if weigh:
            for mask in how["attention_mask"].values():
                for row, n in heavy.items():
                    mask[..., row] += math.log(len(images[n][0]) / len(kept[n]))
        if positions == "original":
            spots = torch.tensor(places)
            how["position_ids"] = spots.movedim(-1, 0)[:, None] if spots.dim() == 2 else spots[None]
        if deep and deep[0][1]:
            mask = torch.zeros(1, len(rows), dtype=torch.bool)
            mask[0, [row for row, _ in deep]] = True
            layers = [torch.stack([parts[n] for _, parts in deep]) for n in range(len(deep[0][1]))]
            how |= {"visual_pos_masks": mask, "deepstack_visual_embeds": layers}
        hidden = llm_of(hf)(**how).last_hidden_state
        logits.append(kind.head(hf, hidden[0, [row for row, _ in answers]]))
        targets += [target for _, target in answers]
    return torch.cat(logits), torch.tensor(targets)
