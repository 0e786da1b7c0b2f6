"""Ranks that are gone are named, also by those that wait for them patiently, and a store that is gone keeps nobody."""

import platform
import signal
import threading
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.waiting import HANGS

from scale import __main__, ranks, run

CPU = torch.device("cpu")


class Left(BaseException):
    """A process that has ended."""


class Clock:
    """Time passes only while somebody sleeps, and meanwhile those who are alive give their signs."""

    def __init__(self, store: dist.Store, alive: list[ranks.Ranks]):
        self.store, self.alive, self.now = store, alive, 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for rank in self.alive:
            rank._sign(self.store)


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    """Processes end by an exception."""

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(ranks.os, "_exit", leave)


def all_ranks(size: int, store: dist.Store) -> list[ranks.Ranks]:
    return [ranks.Ranks(rank, size, CPU, store) for rank in range(size)]


@given(size=st.integers(1, 6), data=st.data())
def test_exactly_those_who_give_no_sign_are_named(size, data):
    store = dist.HashStore()
    every = all_ranks(size, store)
    me = data.draw(st.integers(0, size - 1))
    gone = data.draw(st.sets(st.integers(0, size - 1)).map(lambda some: some - {me}))
    never = data.draw(st.sets(st.sampled_from(sorted(gone)))) if gone else set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "time", Clock(store, [rank for rank in every if rank.rank not in gone]))
        for rank in every:
            if rank.rank not in never:
                rank._sign(store)
        said = every[me]._silent(store)
    named = [f"rank {rank}" + f" on {platform.node()}" * (rank not in never) for rank in sorted(gone)]
    assert said == ", ".join(named)


GONE, BEHIND = "no answer from rank 1 on {host}", "no progress for 20 s (scale.timeout), another rank is far behind"


@pytest.mark.parametrize(
    ("patient", "lost", "gone", "says"),
    [
        (True, "", True, GONE),
        (True, "", False, ""),
        (False, "", True, GONE),
        (False, "", False, BEHIND),
        (True, "a connection is lost", False, "a connection is lost"),
        (True, "a connection is lost", True, GONE),
    ],
)
def test_a_rank_leaves_when_another_one_is_gone_or_keeps_it_waiting(monkeypatch, capsys, patient, lost, gone, says):
    store = dist.HashStore()
    me, other = all_ranks(2, store)
    clock = Clock(store, [me] if gone else [me, other])
    monkeypatch.setattr(ranks, "time", clock)
    other._sign(store)
    me.timeout, me.lost = 20.0, lost
    me.progress("reading", patient=patient)
    leaves = pytest.raises(Left, match=str(ranks.LOST)) if says else nullcontext()
    with leaves:
        for _ in range(40):
            me._check(store)
            clock.sleep(ranks.CHECK_EVERY)
    said, host = capsys.readouterr().err, platform.node()
    if says:
        assert clock.now <= (0 if lost else me.timeout) + 12 * ranks.CHECK_EVERY
        assert said == f"\ntinyspeed: {says.format(host=host)}; rank 0 on {host} was reading\n"
        with pytest.raises(Left):
            other._check(store)
        assert capsys.readouterr().err == f"tinyspeed: and rank 1 on {host} was starting\n"


@pytest.mark.parametrize("error", [None, dist.DistNetworkError("closed")], ids=["never answers", "is gone"])
def test_a_store_behind_a_dead_link_keeps_no_rank(monkeypatch, capsys, error):
    left, link = threading.Event(), threading.Event()

    class Dead:
        clone = staticmethod(lambda: Dead())

        def check(self, keys):
            if error:
                raise error
            link.wait(HANGS)
            return False

    def leave(code: int) -> None:
        left.set()
        me.done.set()

    monkeypatch.setattr(ranks.os, "_exit", leave)
    monkeypatch.setattr(ranks, "CHECK_EVERY", 0.01)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    me = ranks.Ranks(1, 2, CPU, Dead(), timeout=0.0)
    me.watch()
    assert left.wait(HANGS)
    link.set()
    me.watcher.join()
    said = f"no answer from node1, where rank 0 should be; rank 1 on {platform.node()} was starting"
    assert capsys.readouterr().err == f"tinyspeed: {said}\n"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nmore")])
def test_a_rank_whose_memory_runs_out_says_so_in_one_line(monkeypatch, capsys, error):
    def loads(recipe, here):
        here.progress("loading the model")
        raise error

    monkeypatch.setattr(run, "train", loads)
    monkeypatch.setattr(ranks, "CHECK_EVERY", 0)
    with pytest.raises(Left, match=str(ranks.MISTAKE)):
        __main__._run(Namespace(recipe="digits", set=[], dry_run=False), all_ranks(2, dist.HashStore())[1])
    said = capsys.readouterr().err
    assert said.startswith(f"tinyspeed: rank 1 on {platform.node()}: memory ran out loading the model (")
    assert said.count("\n") == 1


def test_a_torchrun_that_ends_too_does_not_silence_a_rank_that_is_about_to_say_who_is_gone(monkeypatch):
    met = []

    class Watcher:
        def join(self) -> None:
            met.append(signal.getsignal(signal.SIGTERM))
            raise Left

    monkeypatch.setattr(ranks.Ranks, "watch", lambda self: setattr(self, "watcher", Watcher()))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Left), ranks.join():
            raise dist.DistNetworkError("Connection closed by peer")
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()
    assert met == [signal.SIG_IGN]
