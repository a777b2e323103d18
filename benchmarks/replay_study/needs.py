"""How long a chunk must be so that the arm never runs out of actions."""

from __future__ import annotations

# One tick because an answer plays from the tick after it came, the others for threads that wake up late.
BRIDGE_MARGIN_TICKS = 4

# What a tick of the plain loop does besides inferring. One read and one write of six servos take about 4 ms; the other half is for fetching the
# frames and for waking up late.
SYNC_MARGIN_S = 0.008


def needed_actions(delay_ticks: int) -> int:
    """For a controller that drops the elapsed actions: as many as are over on arrival, as many again until the next chunk is there, and a margin."""
    return 2 * delay_ticks + BRIDGE_MARGIN_TICKS
