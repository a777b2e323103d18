"""Real time, as the control loop reads it (`contracts.Clock`)."""

from __future__ import annotations

import time

# The operating system wakes a sleeper late: about 0.06 ms on Linux (timer slack), above 1 ms on a busy machine. The last
# stretch is polled instead; 1 ms of a 33 ms tick is 3 % of a core.
SPIN_S = 0.001


class MonotonicClock:
    """Real time. Sleeps coarsely, then polls the last millisecond."""

    def now_s(self) -> float:
        return time.perf_counter()

    def sleep_until_s(self, deadline_s: float) -> None:
        coarse_s = deadline_s - SPIN_S - time.perf_counter()
        if coarse_s > 0:
            time.sleep(coarse_s)
        while time.perf_counter() < deadline_s:
            time.sleep(0)  # gives the interpreter lock to camera threads while polling

    def suspended_s(self) -> float:
        """CLOCK_MONOTONIC stands still while a laptop is closed; CLOCK_BOOTTIME does not."""
        if not hasattr(time, "CLOCK_BOOTTIME"):
            return 0.0
        return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
