"""DualSpeed's forwards, and the same put together by hand from transformers' own LLM: the oracle of many tests."""

import torch
from support import tiny
from torch import Tensor, nn

from tinyspeed import DualSpeed, pruning
from tinyspeed.scheduler import Plan

KEEP = 0.3
FULL, FAST, SLOW = Plan("full"), Plan("fast", keep=KEEP), Plan("slow", keep=KEEP, distill=1.0)


def features_of(hf: nn.Module, batch: dict) -> list[Tensor]:
    if "pixel_values" not in batch:
        return []
    given = {name: batch[name] for name in ("pixel_values", "image_sizes", "batch_num_images") if name in batch}
    return list(hf.get_image_features(**given).pooler_output)


def videos_of(hf: nn.Module, batch: dict) -> list[Tensor]:
    if "pixel_values_videos" not in batch:
        return []
    videos = hf.get_video_features(pixel_values_videos=batch["pixel_values_videos"]).pooler_output
    return [video.reshape(-1, video.shape[-1]) for video in videos]


def kept_of(hf: nn.Module, features: list[Tensor], plugin: str = "divprune") -> list[list[bool]]:
    """Which rows of each image a fast step keeps. A newline row is known by being the newline."""
    kept = []
    for image in features:
        newline = getattr(hf.model, "image_newline", None)
        picture = [newline is None or not torch.equal(row, newline) for row in image]
        places = [i for i, is_picture in enumerate(picture) if is_picture]
        picks = pruning.select(plugin, image[places].detach()[None], keep=KEEP)[0].tolist()
        kept.append([i in {places[p] for p in picks} for i in range(len(image))])
    return kept


def answers_of(hf_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of (B, S, vocabulary) logits that predict an answer, and what they should predict."""
    answers = labels[:, 1:] != tiny.IGNORE
    return hf_logits[:, :-1][answers], labels[:, 1:][answers]


def backward(model: nn.Module, batch: dict, **how) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step from a clean slate."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch, **how).loss
    loss.backward()
    return loss.detach(), tiny.gradients(model)


def fast_by_hand(
    hf: nn.Module, batch: dict, isolator: Tensor, positions: str, weights: list[list[float]] | None = None
) -> tuple[Tensor, Tensor]:
    """(logits, targets) at the answer rows of a fast step: one sample at a time, through transformers' own LLM.
    `weights` are added to the scores of each image's kept rows, in a mask."""
    weights = iter([w for image in weights or () for w in image])
    rows_of = {}  # of each kind of placeholder: its feature rows, whether they stay, and whether they begin an image
    for placeholder, images in ((tiny.IMAGE, features_of(hf, batch)), (tiny.VIDEO, videos_of(hf, batch))):
        every = zip(images, kept_of(hf, images), strict=True)
        rows_of[placeholder] = iter([(image[i], stays[i], i == 0) for image, stays in every for i in range(len(image))])
    logits, targets = [], []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()].tolist(), labels[mask.bool()].tolist()
        rows, places, answers, heavy = [], [], [], {}
        for i, token in enumerate(ids):
            if token in rows_of:
                row, stays, begins = next(rows_of[token])
                if begins:
                    rows += list(isolator)
                    places += [i] * len(isolator)
                if stays:
                    heavy[len(rows)] = next(weights, 0.0)
                    rows.append(row)
                    places.append(i)
            else:
                rows.append(hf.get_input_embeddings()(torch.tensor(token)))
                places.append(i)
            if i + 1 < len(ids) and labels[i + 1] != tiny.IGNORE:
                answers.append((len(rows) - 1, labels[i + 1]))  # the last row so far predicts token i + 1
        how = {"inputs_embeds": torch.stack(rows)[None], "use_cache": False}
        if positions == "original":  # an explicit mask, or transformers takes the gaps for borders of documents
            causal = torch.full((len(rows), len(rows)), torch.finfo(torch.float32).min).triu(1)
            causal[:, list(heavy)] += torch.tensor(list(heavy.values()))
            how |= {"position_ids": torch.tensor([places]), "attention_mask": causal[None, None]}
        hidden = hf.model.language_model(**how).last_hidden_state
        logits.append(hf.lm_head(hidden[0, [row for row, _ in answers]]))
        targets += [target for _, target in answers]
    return torch.cat(logits), torch.tensor(targets)


def of_net(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the wrapped model under its own names."""
    return {name.removeprefix("model."): g for name, g in gradients.items() if not name.startswith("isolator")}


def wrap(net: nn.Module, **how) -> DualSpeed:
    return DualSpeed(net, **{"keep": KEEP, **how}).train()
