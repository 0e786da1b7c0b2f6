"""Recipes: a TOML file, read into frozen dataclasses."""

from .sections import *  # noqa: F403
