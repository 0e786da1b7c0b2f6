"""The short form of `kills.py`: everything that has a state of its own in one run."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torture import kills

SHORT = 2


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    (one,) = kills.torture(tmp_path, ["all of it"], [1], SHORT, seed=0)
    assert not one.lost
    assert sum(one.kills.values()) == SHORT
    assert one.ends >= 1
    assert_the_least_difference_is_seen(one)


def assert_the_least_difference_is_seen(one: kills.Torture):
    """One bit of one weight, one number of one step, one file too many."""
    whole, killed = one.made["whole"].folder, one.made["killed"].folder
    for name, change in (
        ("model/model.safetensors", flip_a_bit),
        ("metrics.jsonl", lambda file: file.write_text(file.read_text().replace('"lr": ', '"lr": 1', 1))),
        ("left.tmp", lambda file: file.touch()),
    ):
        shutil.copytree(whole, killed)
        change(killed / name)
        with pytest.raises(AssertionError):
            one.done()
        shutil.rmtree(killed)
        shutil.copytree(whole, killed)
        one.done()


def flip_a_bit(file):
    tensors = load_file(file)
    name = min(tensors)
    bits = tensors[name].view(torch.int32)
    bits.view(-1)[0] ^= 1
    save_file(tensors, file)
