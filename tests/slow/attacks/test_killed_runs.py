"""The short form of `killed_runs.py`: one run that has everything with a state of its own."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow.attacks import killed_runs

KILLS = 2


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    (one,) = killed_runs.attack(tmp_path, ["all of it"], [1], KILLS, seed=0)
    assert not one.failure
    assert sum(one.kills.values()) == KILLS
    assert one.ends >= 1
    assert_the_smallest_difference_is_found(one)


def assert_the_smallest_difference_is_found(one: killed_runs.Attack):
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
            one.check_end()
        shutil.rmtree(killed)
        shutil.copytree(whole, killed)
        one.check_end()


def flip_a_bit(file):
    tensors = load_file(file)
    name = min(tensors)
    bits = tensors[name].view(torch.int32)
    bits.view(-1)[0] ^= 1
    save_file(tensors, file)
