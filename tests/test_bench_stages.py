"""What of the stage benchmark and of keeping a GPU warm can be tried without a GPU."""

from __future__ import annotations

import threading

import pytest

from benchmarks.stage_calls import busy_and_idle_ms
from gr00t_fast.engine.keep_warm import KeepWarm


def test_gaps_between_kernels_are_what_no_kernel_covers() -> None:
    assert busy_and_idle_ms([]) == (0.0, 0.0)
    overlapping = [(0.0, 1000.0), (500.0, 1500.0), (600.0, 700.0), (2500.0, 3000.0)]  # a stream beside another, then a gap of a millisecond
    assert busy_and_idle_ms(overlapping[::-1]) == pytest.approx((2.0, 1.0))


def test_nothing_is_launched_while_paused() -> None:
    began, seen = threading.Event(), []

    def work() -> None:
        seen.append("burst")
        began.set()

    with KeepWarm(work, pause_s=0.001) as warm:
        assert began.wait(10)
        warm.pause()
        count = len(seen)
        assert not threading.Event().wait(0.05)
        assert len(seen) == count
        began.clear()
        warm.resume()
        assert began.wait(10)
    assert warm.bursts == len(seen)
    assert len(seen) > count


def test_a_failure_in_the_thread_is_not_lost() -> None:
    def work() -> None:
        failed.set()
        raise RuntimeError("out of memory")

    failed = threading.Event()
    with pytest.raises(RuntimeError, match="out of memory"), KeepWarm(work, pause_s=0.0):
        assert failed.wait(10)
