"""Refuses joint readings that no arm can have produced.

The bus checksum has eight bits, so on a noisy line one damaged reading in some hundred passes it. A reading that moved further than the
motors can turn is read again, and believed once two in a row agree: the arm may really have moved, or be elsewhere after a pause.
"""

from __future__ import annotations

import numpy as np

MAX_SPEED_DEG_S = 450.0  # an STS3215 turns 290 deg/s without load at 12 V; a hand can push it somewhat faster
SLACK_DEG = 8.0  # time stamps are taken after the reading, and the line may hold it up
LONGEST_GAP_S = 0.1  # after a longer pause any large step asks for a second reading, which is cheap


class JumpGuard:
    """Holds the last believed reading. One per arm; `forget` after a reconnect."""

    def __init__(self, units_per_deg: np.ndarray) -> None:
        """units_per_deg: (J,) how much each joint's reading changes per degree."""
        self._scale = np.asarray(units_per_deg, dtype=np.float64)
        self.forget()

    def forget(self) -> None:
        """Believe nothing: the next reading needs a second one that agrees with it."""
        self.jumped = False  # whether the last reading is believed only because another one agreed with it
        self._believed: tuple[np.ndarray, float] | None = None
        self._candidate: tuple[np.ndarray, float] | None = None

    def believes(self, reading: np.ndarray, time_s: float) -> bool:
        """Whether to use the reading (J,) taken at `time_s`; when not, read again and ask again."""
        known_near = [known is not None and self._near(reading, time_s, *known) for known in (self._believed, self._candidate)]
        near = any(known_near)
        self.jumped = near and self._believed is not None and not known_near[0]
        if near:
            self._believed, self._candidate = (reading, time_s), None
        else:
            self._candidate = (reading, time_s)
        return near

    @property
    def last(self) -> np.ndarray | None:
        """The last believed reading (J,), None before the first."""
        return None if self._believed is None else self._believed[0]

    def _near(self, reading: np.ndarray, time_s: float, other: np.ndarray, other_time_s: float) -> bool:
        limit_deg = SLACK_DEG + MAX_SPEED_DEG_S * min(max(time_s - other_time_s, 0.0), LONGEST_GAP_S)
        return bool(np.all(np.abs(reading - other) <= limit_deg * self._scale))
