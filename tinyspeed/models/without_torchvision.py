"""Processors where torchvision is missing: they take pictures, and refuse videos.

transformers has image processors that need Pillow alone. Yet it wants torchvision, or num2words, for the processor
around them: in most families that also holds a video processor, Pixtral's imports the other image processor for one
function that Pillow's has too, and SmolVLM's spells out how many frames a video has. So while a processor is loaded,
the settings of the video processor stand in its place, and Pillow's function in that of the other. The settings are
saved as they were read, so the folder that a run exports takes videos again where torchvision is.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

from transformers import processing_utils
from transformers.video_processing_utils import VideoProcessorMixin

from ..util import UserError


class VideoSettings(VideoProcessorMixin):
    """What is known of a video processor that cannot be built here."""

    num_frames = fps = None  # SmolVLM's processor asks for them whenever it writes a conversation

    def __init__(self, **settings):
        self.settings = settings

    @classmethod
    def get_video_processor_dict(cls, path, **how) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return super().get_video_processor_dict(path, **how)
        except OSError:  # a processor that was saved without one
            return {}, {}

    def preprocess(self, videos, **how):
        raise UserError("this processor needs torchvision for videos: install it")

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)


@contextmanager
def loading_pictures_alone() -> Iterator[None]:
    """While it lasts, transformers loads processors without torchvision. Where that is installed, nothing changes."""
    with ExitStack() as stack:
        if find_spec("torchvision") is None:
            kinds = processing_utils.MODALITY_TO_BASE_CLASS_MAPPING
            stack.enter_context(patch.dict(kinds, video_processor=kinds["image_processor"]))
            for module, name, stand_in in (
                ("auto.video_processing_auto", "AutoVideoProcessor", VideoSettings),
                ("smolvlm.processing_smolvlm", "num2words", str),
                ("pixtral", "PixtralProcessor", _pixtral()),
            ):
                stack.enter_context(patch.object(import_module(f"transformers.models.{module}"), name, stand_in))
        yield


def _pixtral() -> type:
    package = "transformers.models.pixtral"
    wanted = f"{package}.image_processing_pixtral"
    sys.modules[wanted] = import_module(f"{package}.image_processing_pil_pixtral")
    try:
        return import_module(f"{package}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[wanted]
