"""The modes of a run, and the events that lead from one to another. The control loop is in one mode at each tick; this table says what comes next.

CONTRIBUTING.md shows it as a picture, which a test draws from the table.
"""

from __future__ import annotations

from enum import Enum


class Mode(Enum):
    """What the arm does at present."""

    APART = "no connection yet, nothing is powered by this run"
    CONNECTED = "connected and looked at; the torque is as it was found"
    MOVE = "moves slowly to the home pose, if there is one, before an episode"
    HOLD = "in an episode, without an action that is due: keeps its last goal"
    PLAY = "plays the rows of a chunk"
    PAUSED = "a person has paused it: keeps its last goal"
    BETWEEN = "between two episodes: goes to the home pose and keeps it until scene, recording and network are ready"
    AWAY = "out of reach (its port is lost, the program was held up): nothing is sent until it has been seen again"
    PUT_DOWN = "moves slowly to where it can be let go"
    RELEASED = "the torque goes off"
    HELD = "an arm that the run has not moved, or that stays powered, is left as it is"


class Event(Enum):
    """What a tick can find."""

    READY = "what the next episode needs is there"
    ARRIVED = "the slow move has ended"
    CHUNK = "a row is due"
    UNDERRUN = "no row is due"
    PAUSE = "a person pauses, or goes on"
    OVER = "the episode's time is up, or a person ends it"
    DONE = "no episode is left, or it was a dry run"
    LOST = "the arm is out of reach, or was for a while"
    BACK = "it has been seen again"
    STOP = "a stop, or trouble that leaves the bus sound"
    STOP_AGAIN = "a deliberate further stop"
    KEPT = "there is no pose to go to"
    FAULT = "the bus or a servo cannot be relied on"


ENDS = frozenset({Mode.RELEASED, Mode.HELD})
BEFORE = "the mode before"  # PLAY before: HOLD, since what was planned is over

_ALWAYS: dict[Event, Mode | str] = {Event.LOST: Mode.AWAY, Event.STOP: Mode.PUT_DOWN, Event.FAULT: Mode.RELEASED}
_EPISODE: dict[Event, Mode | str] = {**_ALWAYS, Event.OVER: Mode.BETWEEN, Event.PAUSE: Mode.PAUSED}
TABLE: dict[Mode, dict[Event, Mode | str]] = {
    Mode.APART: {Event.READY: Mode.CONNECTED, Event.STOP: Mode.HELD, Event.FAULT: Mode.RELEASED},
    Mode.CONNECTED: {**_ALWAYS, Event.READY: Mode.MOVE},
    Mode.MOVE: {**_ALWAYS, Event.ARRIVED: Mode.HOLD, Event.PAUSE: Mode.PAUSED},
    Mode.HOLD: {**_EPISODE, Event.CHUNK: Mode.PLAY, Event.DONE: Mode.PUT_DOWN},
    Mode.PLAY: {**_EPISODE, Event.UNDERRUN: Mode.HOLD},
    Mode.PAUSED: {**_ALWAYS, Event.OVER: Mode.BETWEEN, Event.PAUSE: BEFORE},
    Mode.BETWEEN: {**_ALWAYS, Event.READY: Mode.MOVE, Event.DONE: Mode.PUT_DOWN},
    Mode.AWAY: {**_ALWAYS, Event.BACK: BEFORE, Event.STOP_AGAIN: Mode.RELEASED},
    Mode.PUT_DOWN: {**_ALWAYS, Event.ARRIVED: Mode.RELEASED, Event.KEPT: Mode.HELD, Event.STOP_AGAIN: Mode.RELEASED},
    Mode.RELEASED: {},
    Mode.HELD: {},
}


def after(mode: Mode, event: Event, before: Mode) -> Mode:
    """The mode that `event` leads to from `mode`, to which `before` led. An event that the table does not name for a mode changes nothing."""
    found = TABLE[mode].get(event, mode)
    return found if isinstance(found, Mode) else Mode.HOLD if before is Mode.PLAY else before
