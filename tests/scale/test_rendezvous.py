"""Ranks that meet in a store full of what others left: all in one place, and never in one where somebody was before."""

import threading
import time
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.waiting import HANGS

from scale import ranks
from scale.rendezvous import rendezvous
from tinyspeed import UserError

SIZE = 3


def attempt(store: dist.Store, ranks: set[int], patience: float) -> dict[int, dist.Store | str]:
    """What these ranks of SIZE find, each in a thread of its own."""
    found = {}

    def come(rank: int) -> None:
        try:
            found[rank] = rendezvous(store, rank, SIZE, patience)
        except UserError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@settings(max_examples=15)
@given(before=st.lists(st.sets(st.integers(0, SIZE - 1)), max_size=3))
def test_all_meet_in_a_new_place_whoever_was_there_before(before):
    store = dist.HashStore()
    for number, some in enumerate(before):
        found = attempt(store, some, patience=HANGS if len(some) == SIZE else 0.1)
        for rank, place in found.items():
            if len(some) == SIZE:
                place.set(f"said by {rank}", str(number))
            else:
                assert "not come" in place, "and nobody goes on alone"
    found = attempt(store, set(range(SIZE)), patience=HANGS)
    for rank in range(SIZE):
        assert not found[rank].check([f"said by {rank}"]), "nobody was here before"
    found[0].set("word", "hello")
    assert [found[rank].get("word") for rank in range(SIZE)] == [b"hello"] * SIZE


def test_who_is_missing_is_said(monkeypatch):
    store, looks = dist.HashStore(), Counter()

    def clock() -> float:
        """The time is up for a rank when it has looked around once more after rank 2 had come."""
        looks[threading.get_ident()] += store.check(["confirmed/2"])
        return float(looks[threading.get_ident()] > 1)

    monkeypatch.setattr("scale.rendezvous.time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    found = attempt(store, {0, 2}, patience=0.5)
    assert found[0].startswith("ranks [1] of 3 have not come")
    assert found[2].startswith("rank 0 has not come")


def test_one_rank_meets_nobody():
    place = rendezvous(dist.HashStore(), 0, 1, patience=0.0)
    place.set("word", "hello")
    assert place.get("word") == b"hello"
    with pytest.raises(UserError):
        rendezvous(dist.HashStore(), 0, 2, patience=0.0)


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU, there are 1"), ranks.join():
        pass


def test_one_process_alone_opens_no_port(monkeypatch):
    """torch's store listens on every interface, whatever address it is given; a run of one process needs none."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    before = {c.laddr for c in psutil.Process().net_connections("inet")}
    store = ranks._store(0, 1)
    store.set("a", "1")
    assert store.compare_set(ranks.ABORTED, "", "mine") == b"mine"
    assert store.clone().compare_set(ranks.ABORTED, "", "another's") == b"mine"
    assert {c.laddr for c in psutil.Process().net_connections("inet")} == before
