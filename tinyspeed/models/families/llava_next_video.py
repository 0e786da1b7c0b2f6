"""LLaVA-NeXT-Video and LLaVA-OneVision: LLaVA-NeXT with videos.

LLaVA-NeXT-Video puts pooled frames end to end, without newlines. (No published model has a learned pooling; it would
stay frozen.) LLaVA-OneVision scales large images down, does not cut one of several images in a sample into crops, and
ends such images and videos with a newline. It does so in functions of its own.
"""

import torch
from torch import Tensor

from .llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    rowwise = False  # some models pool after the projector

    @property
    def placeholders(self) -> dict[str, int]:
        return {**super().placeholders, "video": self.config.video_token_id}

    def encode_videos(self, pixel_values_videos: Tensor, plan_mode: str) -> list[Tensor]:
        """Returns the projected features of each video as a (rows, hidden) tensor."""
        with self._newline_for(plan_mode):
            out = self.model.get_video_features(pixel_values_videos=pixel_values_videos)
        return [video.reshape(-1, self.hidden_size) for video in out.pooler_output]


class LlavaOnevision(LlavaNextVideo):
    _how_packed = "vision_aspect_ratio"

    def _crops(self, visual: dict[str, Tensor]) -> list[int]:
        crops = super()._crops(visual)
        images = visual.get("batch_num_images", torch.ones(len(crops), dtype=torch.long))  # of each sample
        return [n if alone else 1 for n, alone in zip(crops, (images == 1).repeat_interleave(images), strict=True)]

    def shown(self, visual: dict[str, Tensor], lengths: dict[str, list[int]]) -> list[Tensor]:
        masks = super().shown(visual, lengths)
        for video in masks[len(lengths["image"]) :]:
            video[-1] = False
        return masks
