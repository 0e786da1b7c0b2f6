"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, positions of three numbers, and features for several layers.

Each patch has its place in the picture as a position (time, height, width), and the text goes on behind the largest of
them. With `original` positions a kept token keeps its own, as in every other family. `compact` numbers the rows that
are left 0, 1, 2 ... and gives all three the same number, so a kept token no longer says where it was.

Qwen3-VL adds features from earlier layers of its tower to the hidden states behind the LLM's first layers (deepstack).
Here they are further columns of the features (`base.py`), which pruning picks and merges along with the row.

The tower is left as it is, with 2.5's attention in windows. Its merger projects four patches to one row. It lies inside
the tower's module, but it is the connector, and trains as such.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import vision_utils

from ...rows import Layout
from ...util import UserError
from ...util.sending import to_device
from .base import Family


class Qwen2VL(Family):
    tower_name, projector_name = "visual", "visual.merger"
    square = rowwise = False
    most_rows = 16_384  # of the largest picture by the published processors

    def encode(self, visual: dict[str, Tensor], plan_mode: str) -> list[Tensor]:
        if "image_grid_thw" not in visual:
            raise UserError(
                f"a {self.config.model_type!r} model needs image_grid_thw: pass the processor's whole batch"
            )
        pixels, grid = visual["pixel_values"], visual["image_grid_thw"].cpu()
        # Made on the CPU and sent: the tower would wait for the device to read the grid, once in each of its blocks.
        send = lambda of: to_device(of, pixels.device)
        out = self.model.get_image_features(pixels, grid, **self._places(grid, send))
        return self._widened(out)

    def _places(self, grid: Tensor, send) -> dict[str, Tensor]:
        """What the tower derives from the sizes of the pictures."""
        places = vision_utils.get_vision_position_ids(grid, self.tower.spatial_merge_size)
        return {"image_position_ids": send(places)}

    def _widened(self, out) -> list[Tensor]:
        """The features of each image, with what deeper layers add behind them."""
        return list(out.pooler_output)

    def _projected_zeros(self, like: Tensor) -> Tensor:
        patches = self.tower.spatial_merge_size**2
        zeros = torch.zeros(patches, self.projector.hidden_size // patches, dtype=like.dtype, device=like.device)
        return torch.cat([merger(zeros) for merger in self.projectors], dim=1)

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, visual: dict[str, Tensor]) -> Tensor | None:
        if "image_grid_thw" not in visual:  # text alone is numbered 0, 1, 2 ... three times
            return None
        kinds, rows = (input_ids == self.config.image_token_id).long(), visual["image_grid_thw"].prod(1).sum()
        if int(kinds.sum()) * self.tower.spatial_merge_size**2 != int(rows):
            return None  # `rows.full` refuses such a text
        found, _ = self.model.model.get_rope_index(
            input_ids, mm_token_type_ids=kinds, image_grid_thw=visual["image_grid_thw"], attention_mask=attention_mask
        )
        return found.movedim(0, 2)


class Qwen25VL(Qwen2VL):
    def _places(self, grid: Tensor, send) -> dict[str, Tensor]:
        tower = self.tower
        sizes = {name: getattr(tower, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
        order, borders = vision_utils.get_vision_window_index(grid, **sizes)
        return {**super()._places(grid, send), "image_window_index": send(order), "image_cu_window_seqlens": borders}


class Qwen3VL(Qwen2VL):
    def _places(self, grid: Tensor, send) -> dict[str, Tensor]:
        tower = self.tower
        names = {"mode": "interpolation_mode", "align_corners": "interpolation_align_corners"}
        how = {name: getattr(tower, of) for name, of in names.items()}
        how |= {name: getattr(tower, name) for name in ("num_grid_per_side", "spatial_merge_size")}
        index, weights = vision_utils.get_vision_interpolation_indices_and_weights(grid, **how)
        more = {"image_interp_indices": send(index), "image_interp_weights": send(weights)}
        return {**super()._places(grid, send), **more}

    def _widened(self, out) -> list[Tensor]:
        return [torch.cat(parts, dim=1) for parts in zip(out.pooler_output, *out.deepstack_features, strict=True)]

    @property
    def projectors(self) -> list[nn.Module]:
        return [self.projector, *self.tower.deepstack_merger_list]

    @property
    def first_layers(self) -> int:
        return len(self.tower.deepstack_merger_list)

    def hidden(self, embeddings: Tensor, layout: Layout, layers: tuple[int, ...] | None, **more) -> Tensor:
        if layout.deep is None:
            return super().hidden(embeddings, layout, layers, **more)
        slots, values = layout.deep
        with self._adding():
            parts = values.split(self.hidden_size, dim=1)
            return super().hidden(
                embeddings, layout, layers, visual_pos_masks=slots, deepstack_visual_embeds=parts, **more
            )

    @contextmanager
    def _adding(self) -> Iterator[None]:
        """Transformers' own adding takes a mask, and waits for the device to count its rows."""
        llm = self.language_model
        llm._deepstack_process = lambda hidden, slots, values: (
            hidden.flatten(0, 1).index_add(0, slots, values.to(hidden.dtype)).view_as(hidden)
        )
        try:
            yield
        finally:
            del llm._deepstack_process
