"""Which action is due: rows, ages, starvation and staleness, tick by tick."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr00t_fast.contracts import ActionChunk
from gr00t_fast.control.chunk_buffer import DELAY_WINDOW, ENSEMBLE_DECAY, ChunkBuffer, DelayEstimate, TimedChunk, Verdict


def chunk(observed: int, rows: int = 16, episode: int = 0) -> TimedChunk:
    """Joint 0 tells the tick a row is meant for, joint 1 the observation."""
    targets = np.zeros((rows, 6), np.float32)
    targets[:, 0], targets[:, 1] = observed + np.arange(rows), observed
    return TimedChunk(ActionChunk(targets), observed, episode, {"action.single_arm": targets[:, :5], "action.gripper": targets[:, 5:]})


def test_enters_at_the_action_that_is_due_now() -> None:
    buffer = ChunkBuffer()
    assert buffer.offer(chunk(10), 14) is Verdict.ENTERED
    due = buffer.due(14)
    assert (due.target[0], due.age_ticks, due.starved) == (14, 4, False)


def test_skipped_ticks_skip_their_actions() -> None:
    buffer = ChunkBuffer()
    buffer.offer(chunk(0), 0)
    assert [buffer.due(tick).target[0] for tick in (0, 1, 5, 6)] == [0, 1, 5, 6]


def test_holds_and_counts_when_nothing_is_left_and_goes_on_with_the_next() -> None:
    buffer = ChunkBuffer()
    buffer.offer(chunk(0, rows=4), 0)
    played = [buffer.due(tick) for tick in range(7)]
    assert [due.target[0] for due in played] == [0, 1, 2, 3, 3, 3, 3]
    assert [due.starved for due in played] == [False] * 4 + [True] * 3
    assert buffer.starved_ticks == 3
    buffer.offer(chunk(5, rows=4), 7)
    assert buffer.due(7).target[0] == 7


def test_stale_and_expired_chunks_never_play() -> None:
    buffer = ChunkBuffer()
    buffer.offer(chunk(10), 12)
    assert buffer.offer(chunk(9), 13) is Verdict.STALE
    assert buffer.offer(chunk(11, episode=3), 13) is Verdict.STALE
    assert buffer.offer(chunk(11, rows=2), 13) is Verdict.EXPIRED
    assert buffer.due(13).target[1] == 10
    buffer.reset()
    assert buffer.offer(chunk(14), 14) is Verdict.STALE  # of the episode that ended
    assert buffer.empty
    assert buffer.verdicts == {Verdict.ENTERED: 1, Verdict.STALE: 3, Verdict.EXPIRED: 1}


def test_targets_go_out_in_order() -> None:
    buffer = ChunkBuffer()
    with pytest.raises(RuntimeError, match="no chunk"):
        buffer.due(0)
    buffer.offer(chunk(0), 0)
    buffer.due(3)
    with pytest.raises(RuntimeError, match="after tick 3"):
        buffer.due(3)


def test_what_is_left() -> None:
    buffer = ChunkBuffer()
    assert (buffer.rows_left(0), buffer.leftover(0)) == (0, {})
    buffer.offer(chunk(0), 2)
    assert buffer.rows_left(2) == 13
    assert buffer.fraction_left(7) == 0.5
    left = buffer.leftover(10)
    assert left["action.single_arm"][:, 0].tolist() == [10, 11, 12, 13, 14, 15]
    assert left["action.gripper"].shape == (6, 1)
    assert buffer.leftover(16) == {}
    assert buffer.rows_left(40) == 0


def test_lag_bridges_the_gap_that_dropping_would_leave() -> None:
    """Ten actions, eight ticks per inference: dropping leaves two actions for eight ticks; lagging waits once, by the missing six, and no more."""
    starved = {}
    for lag in (False, True):
        buffer = ChunkBuffer(lag=lag)
        played = []
        for tick in range(0, 80):
            if tick % 8 == 0:
                buffer.offer(chunk(max(0, tick - 8), rows=10), tick, bridge_ticks=8)
            due = buffer.due(tick)
            if not due.starved:
                played.append(due.target[0])
        assert (np.diff(played) > 0).all()
        starved[lag] = buffer.starved_ticks
    assert starved[True] == 6
    assert starved[False] > 40


@given(steps=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=40), rows=st.integers(1, 16), bridge=st.integers(0, 40))
def test_lagging_never_goes_back_in_its_plan_nor_ahead_of_time(steps: list[tuple[int, int]], rows: int, bridge: int) -> None:
    buffer, tick, last = ChunkBuffer(lag=True), 0, -np.inf
    for delay, play in steps:
        buffer.offer(chunk(tick - delay, rows), tick, bridge)
        for _ in range(play):
            due = buffer.due(tick)
            if not due.starved:
                assert last < due.target[0] <= tick
                last = due.target[0]
            tick += 1


def test_ensembling_averages_what_covers_the_tick() -> None:
    buffer = ChunkBuffer(ensemble=True)
    buffer.offer(chunk(0, rows=8), 0)
    buffer.due(0)
    buffer.offer(chunk(4, rows=8), 5)
    target = buffer.due(5).target  # observations 0 and 4, the oldest weighs most
    assert target[0] == pytest.approx(5)
    assert target[1] == pytest.approx(4 * np.exp(-ENSEMBLE_DECAY) / (1 + np.exp(-ENSEMBLE_DECAY)))
    assert buffer.due(8).target[1] == 4  # the first has run out
    assert buffer.due(12).starved
    assert buffer.due(13).target[1] == 4


class TestDelayEstimate:
    def test_nothing_measured(self) -> None:
        assert DelayEstimate().ticks == 0

    def test_the_worst_of_the_first_few(self) -> None:
        estimate = DelayEstimate()
        for ticks in (3, 5, 4):
            estimate.add(ticks)
        assert estimate.ticks == 5

    def test_a_spike_is_ignored_and_two_are_forgotten(self) -> None:
        estimate = DelayEstimate()
        for ticks in [3] * DELAY_WINDOW + [90, 80]:
            estimate.add(ticks)
        assert estimate.ticks == 3
        estimate.add(70)
        assert estimate.ticks == 70
        for _ in range(DELAY_WINDOW):
            estimate.add(3)
        assert estimate.ticks == 3

    def test_a_lasting_change_is_noticed(self) -> None:
        estimate = DelayEstimate()
        for ticks in [3] * DELAY_WINDOW + [6, 6, 6]:
            estimate.add(ticks)
        assert estimate.ticks == 6
