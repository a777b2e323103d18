"""Which action is due: rows, ages, underruns and staleness, tick by tick."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from gr00t_fast.contracts import ActionChunk
from gr00t_fast.control.chunk_buffer import DELAY_WINDOW, Admission, ChunkBuffer, DelayEstimate, TimedChunk


def chunk(observed: int, rows: int = 16, episode: int = 0) -> TimedChunk:
    """Joint 0 tells the tick a row is meant for, joint 1 the observation."""
    targets = np.zeros((rows, 6), np.float32)
    targets[:, 0], targets[:, 1] = observed + np.arange(rows), observed
    return TimedChunk(ActionChunk(targets), observed, episode, {"action.single_arm": targets[:, :5], "action.gripper": targets[:, 5:]})


@pytest.mark.parametrize(
    ("rows", "ticks", "observed", "hold", "resume"),
    [
        (16, (0, 1, 5, 6), 3, [7, 8], [7, 8]),
        (4, range(7), 2, [7, 8], [4, 5]),
        (4, (0, 1, 2, 3, 4, 6), 2, [7, 8], [4, 5]),
        (4, (0, 1, 2, 3), 2, [7, 8], [4, 5]),
        (12, (0, 1, 2, 5), 1, [7, 8], [7, 8]),
    ],
    ids=["missed ticks drop their actions", "held ticks", "missed between held ones", "missed instead of held", "missed while rows are left"],
)
def test_where_a_chunk_that_comes_at_tick_seven_is_entered(
    rows: int, ticks: Iterable[int], observed: int, hold: list[int], resume: list[int]
) -> None:
    """At the action that is due now; with `resume` where the arm stopped."""
    for resumes, expected in ((False, hold), (True, resume)):
        buffer = ChunkBuffer(resumes)
        buffer.offer(chunk(0, rows), 0)
        assert [buffer.due(tick).target[0] for tick in ticks] == [min(tick, rows - 1) for tick in ticks]
        assert buffer.offer(chunk(observed), 7) is Admission.ENTERED
        assert [(due.target[0], due.age_ticks, due.underrun) for due in map(buffer.due, (7, 8))] == [
            (row, tick - observed, False) for row, tick in zip(expected, (7, 8), strict=True)
        ]


def test_stale_and_expired_chunks_never_play() -> None:
    buffer = ChunkBuffer()
    buffer.offer(chunk(10), 12)
    assert buffer.offer(chunk(9), 13) is Admission.STALE
    assert buffer.offer(chunk(11, episode=3), 13) is Admission.STALE
    assert buffer.offer(chunk(11, rows=2), 13) is Admission.EXPIRED
    assert buffer.due(13).target[1] == 10
    buffer.reset()
    assert buffer.offer(chunk(14), 14) is Admission.STALE  # of the episode that ended
    assert buffer.empty
    assert buffer.admissions == {Admission.ENTERED: 1, Admission.STALE: 3, Admission.EXPIRED: 1}


def test_targets_go_out_in_order() -> None:
    buffer = ChunkBuffer()
    with pytest.raises(RuntimeError, match="no chunk"):
        buffer.due(0)
    buffer.offer(chunk(0), 0)
    buffer.due(3)
    with pytest.raises(RuntimeError, match="after tick 3"):
        buffer.due(3)


@pytest.mark.parametrize(
    ("quantile", "measured", "estimate"),
    [
        (0.9, [], 0),
        (0.9, [3, 5, 4], 5),  # the worst of the first few
        (0.9, [3] * DELAY_WINDOW + [90, 80], 3),  # spikes are no change
        (0.9, [3] * DELAY_WINDOW + [90, 80, 70], 70),
        (0.9, [90, 80, 70] + [3] * DELAY_WINDOW, 3),  # and are forgotten
        (0.9, [3] * DELAY_WINDOW + [6, 6, 6], 6),
        (1.0, [3] * DELAY_WINDOW + [6], 6),
        (1.0, [6] + [3] * (DELAY_WINDOW - 1), 6),
        (1.0, [6] + [3] * DELAY_WINDOW, 3),
    ],
)
def test_the_delay_is_a_high_quantile_of_the_last_few(quantile: float, measured: list[int], estimate: int) -> None:
    delay = DelayEstimate(quantile)
    for ticks in measured:
        delay.add(ticks)
    assert delay.ticks == estimate
