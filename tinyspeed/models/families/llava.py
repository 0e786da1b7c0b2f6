"""LLaVA-1.5: one square picture an image, and nothing but its rows. `Family` already says all of it."""

from .base import Family


class Llava(Family):
    pass
