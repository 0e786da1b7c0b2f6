"""Hypothesis profiles and shared fixtures. The models behind them are built in `support/tiny.py`."""

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import pretend_cuda, published_models, tiny
from support.album import album

from tinyspeed.models import published

# More threads do not help with tiny tensors, and on a busy machine they wait for each other. Processes inherit this.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Autograd asks what devices there are at the first backward of a process, and a pretend one must be there by then.
pretend_cuda.unavailable()

# No test has a deadline. `ci` draws the same examples every time, so that a failure can be repeated; `long` draws many
# more (HYPOTHESIS_PROFILE=long make test).
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", deadline=None, suppress_health_check=QUIET, max_examples=40)
settings.register_profile("long", deadline=None, suppress_health_check=QUIET, max_examples=1000)
settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=40, print_blob=True, suppress_health_check=QUIET
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture
def llava():
    """A tiny random LLaVA-1.5."""
    return tiny.model("llava")


@pytest.fixture
def llava_next():
    """A tiny random LLaVA-NeXT."""
    return tiny.model("llava_next")


@pytest.fixture(params=tiny.FAMILIES)
def family(request) -> str:
    """A test that takes this runs once for each model family that tinyspeed knows."""
    return request.param


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(family)` writes a small checkpoint in the real format and returns its folder."""
    return functools.partial(lambda family: tiny.checkpoint(family, tmp_path / family))


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Pictures, conversations and the two base models, as a user has them. Tests share it, and must not write to it."""
    home = tmp_path_factory.mktemp("home")
    album(home, 10)
    for family in tiny.FAMILIES:
        tiny.checkpoint(family, home / family)
    return home


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders with the configurations of published models, without weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in published_models.REAL.items():
        config().save_pretrained(folder / name)
    return folder


@pytest.fixture
def dwarf(monkeypatch):
    """Makes `--size dwarf` known, with which a benchmark takes a second."""
    small = published.clip(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    monkeypatch.setitem(
        published.SIZES, "dwarf", (lambda: published.vicuna(64, 96, 2, 2, vocab_size=300), lambda: small)
    )
    monkeypatch.setattr("tinyspeed.data.llava_mix.VISUAL", {"1.5": {16: 1.0}, "next": {40: 1.0}})
    monkeypatch.setattr(published, "GRIDS", [[56, 112], [112, 56]])
