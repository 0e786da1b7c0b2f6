"""On a pretend GPU a step of any kind is what it is on a CPU, and never waits for the device."""

import pytest
import torch
from hypothesis import given, settings
from support import gpu_cases, pretend_cuda
from support.gpu_cases import Case

import tinyspeed.dualspeed
from tinyspeed.pruning import chooser

pytestmark = pytest.mark.skipif(bool(pretend_cuda.unavailable()), reason=pretend_cuda.unavailable() or "available")


@given(gpu_cases.cases())
@settings(max_examples=8)
def test_a_step_is_what_it_is_on_a_cpu_and_waits_for_nothing(case):
    assert not gpu_cases.unlike(case)


@pytest.mark.parametrize("plugin", ["divprune", "dpp", "tome", "vispruner", "grid", "dynamicvit"])
def test_nan_in_a_pruned_feature_is_in_the_loss(monkeypatch, plugin):
    """On a GPU no plugin looks for it, as it would wait. Whatever it then chooses, nothing fails on the device."""
    case = Case(plugin=plugin)
    batch = gpu_cases.batch_of(case)
    batch["pixel_values"][-1] = torch.nan
    monkeypatch.setattr(gpu_cases, "batch_of", lambda case: batch)
    done = gpu_cases.on_gpu(case)
    assert done.loss.isnan()
    assert not done.waits


# Planted mistakes


@pytest.mark.parametrize("where", [tinyspeed.dualspeed, chooser])
def test_an_index_left_on_the_cpu_is_found(monkeypatch, where):
    monkeypatch.setattr(where, "to_device", lambda tensor, device: tensor)
    with pytest.raises(pretend_cuda.Mixed):
        gpu_cases.unlike(Case())


def test_a_size_read_from_the_device_is_found(monkeypatch):
    forward = chooser.Chooser.forward

    def careless(self, images, *args, **how):
        images[0].sum().item()
        return forward(self, images, *args, **how)

    monkeypatch.setattr(chooser.Chooser, "forward", careless)
    assert "item" in gpu_cases.unlike(Case()) or "_local_scalar_dense" in gpu_cases.unlike(Case())


def test_a_copy_that_waits_is_found(monkeypatch):
    monkeypatch.setattr(tinyspeed.dualspeed, "to_device", torch.Tensor.to)
    assert "a copy to the GPU, not non_blocking" in gpu_cases.unlike(Case(plugin="grid"))
