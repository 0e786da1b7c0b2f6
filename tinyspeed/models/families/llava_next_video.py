"""LLaVA-NeXT-Video and LLaVA-OneVision: LLaVA-NeXT with videos.

LLaVA-NeXT-Video puts pooled frames end to end, without newlines. (No published model has a learned pooling; it would
stay frozen.) LLaVA-OneVision scales large images down, does not cut one of several images in a sample into crops, and
ends such images and videos with a newline. It does so in functions of its own.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    rowwise = False  # some models pool after the projector

    @property
    def placeholders(self) -> dict[str, int]:
        return {**super().placeholders, "video": self.config.video_token_id}

    def encode_videos(self, visual: dict[str, Tensor], plan_mode: str) -> list[Tensor]:
        """Returns the projected features of each video as a (rows, hidden) tensor."""
        with self._newline_for(plan_mode):
            out = self.model.get_video_features(pixel_values_videos=visual["pixel_values_videos"])
        return [video.reshape(-1, self.hidden_size) for video in out.pooler_output]


class LlavaOnevision(LlavaNextVideo):
    def _packing(self) -> AbstractContextManager:
        return nullcontext()  # transformers' own, since large images are interpolated

    def shown(self, visual: dict[str, Tensor], lengths: dict[str, list[int]]) -> list[Tensor]:
        """Packing zeros of one channel with a newline of one shows where the newlines are."""
        shape = (self.config.image_grid_pinpoints, self.config.vision_config.image_size)
        sizes, images = visual.get("image_sizes", ()), []
        alone = [True] * len(sizes)
        if "batch_num_images" in visual:  # of each sample that has any
            alone = [n == 1 for n in visual["batch_num_images"].tolist() for _ in range(n)]
        crops = [image_size_to_num_patches(size, *shape) if one else 1 for size, one in zip(sizes, alone, strict=True)]
        if crops:
            zeros = torch.zeros(sum(crops), self._patches, 1).split(crops)
            how = {"image_newline": torch.ones(1), "vision_aspect_ratio": self.config.vision_aspect_ratio}
            images = [image[:, 0] == 0 for image in self.model.model.pack_image_features(zeros, sizes, **how)[0]]
        videos = [torch.arange(n) < n - 1 for n in lengths["video"]]
        return [*images, *videos]
