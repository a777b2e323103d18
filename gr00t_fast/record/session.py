"""A run as a row of episodes with a person at the keyboard: which end early, which are played again, what they showed, what is recorded of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gr00t_fast.base.contracts import Observation
from gr00t_fast.base.keyboard import BACKSPACE, ENTER, ESCAPE, LEFT, RIGHT, SPACE, Keys
from gr00t_fast.base.signals import StopSignals

if TYPE_CHECKING:
    from gr00t_fast.record.page import PageView

KEYS_HELP = (
    "keys: space pauses and goes on, right arrow ends the episode, left arrow plays it again, s success, f failure, Esc stops; between episodes t: "
    "another instruction"
)
_REPEAT_S = 0.7  # a key that is held down repeats sooner, first after up to 0.5 s
_EXIT_CODE = 1
_TELL_AFTER_S, SAVE_LIMIT_S = 5.0, 60.0  # pictures are encoded as they come: an episode is saved within seconds, while the arm holds its pose


class Session:
    """`control.loop.Session`. Without keys and recorder it changes nothing."""

    def __init__(
        self,
        stop: StopSignals,
        keys: Keys | None = None,
        recorder: Any = None,
        echo: Callable[[str], None] = print,
        now_s: Callable[[], float] = time.monotonic,
        page: PageView | None = None,
    ) -> None:
        self._stop, self._keys, self._recorder, self._echo, self._now_s, self._page = stop, keys, recorder, echo, now_s, page
        self._last_key, self._last_key_s = "", float("-inf")
        self._typed: str | None = None  # of an instruction that is being typed
        self._playing, self._settled = False, True
        self._busy_since_s: float | None = None  # the recorder, with saving
        self._told_saving = False
        self._outcome: dict[str, Any] = {}
        self.over = False  # the episode, or the pause after it, is to end now
        self.again = False  # the episode does not count and is to be played again
        self.pause = False  # the arm is to hold, or to go on; the loop takes it
        self.instruction: str | None = None  # typed for the episodes to come; the loop takes it

    def begin(self, instruction: str) -> None:
        """An episode begins."""
        self.over = self.again = False
        self._typed = None
        self._playing, self._settled, self._outcome = True, False, {"success": None}
        if self._recorder is not None:
            self._recorder.begin(instruction)

    def see(self, observation: Observation, commanded: np.ndarray, underrun: bool = False) -> None:
        """A tick: what was seen, the target (J,) that was sent, and whether it is the last one once more for want of actions."""
        if self._recorder is not None:
            self._recorder.add(observation, commanded, underrun)
        self._end_with_the_recording()

    def poll(self) -> None:
        """Take note of what was pressed."""
        for what, value in self._page.poll() if self._page is not None else ():
            if what == "instruction":
                self._instruct(value)
            elif not self._repeated(value):  # a double click on next would end the pause after the episode, too
                self._pressed(value)
        for key in self._keys.poll() if self._keys is not None else ():
            repeated = self._repeated(key)
            if self._typed is not None:
                self._type(key, self._typed)
            elif not repeated:
                self._pressed(key)

    def end(self, ended_by: str, solved: bool | None) -> None:
        """The episode's last tick has been. `solved` as far as the arm can tell; what the person said counts more."""
        if not self._playing:
            return
        self._playing = self.over = False
        self._outcome["ended_by"] = ended_by
        if self._outcome["success"] is None:
            self._outcome["success"] = solved
        if self._recorder is not None:
            self._recorder.end(**self._outcome)

    # Between episodes

    @property
    def typing(self) -> bool:
        """Whether an instruction is being typed."""
        return self._typed is not None

    @property
    def doing(self) -> str:
        """What the next episode waits for, for people; empty: nothing here."""
        return "an instruction is being typed" if self.typing else "the recording is being saved" if self._busy_since_s is not None else ""

    @property
    def waits(self) -> bool:
        """Whether the next episode is to wait although the pause is over: the person types, or the last one is still being saved."""
        is_saving = self._recorder is not None and self._recorder.busy  # looking may be what ends it
        self._end_with_the_recording()
        if not is_saving:
            self._busy_since_s, self._told_saving = None, False
            return self.typing
        self._busy_since_s = self._now_s() if self._busy_since_s is None else self._busy_since_s
        busy_s = self._now_s() - self._busy_since_s
        if busy_s >= _TELL_AFTER_S and not self._told_saving:
            self._told_saving = True
            self._echo(f"WARNING: the episode has not been saved for {busy_s:.0f} s; the arm holds its pose, {SAVE_LIMIT_S:.0f} s at most")
        if busy_s >= SAVE_LIMIT_S:  # a recorder that hangs must not keep the arm powered for ever
            self._stop.request(f"the episode was not saved within {SAVE_LIMIT_S:.0f} s: does the disk answer?", _EXIT_CODE)
        return True

    def settle(self) -> bool:
        """The pause is over, or the run: the last episode is saved, or forgotten. Returns whether it is to be played again. May be called again."""
        if self._recorder is not None and not self._settled:
            self._recorder.discard() if self.again else self._recorder.save(**self._outcome)
        self._settled = True
        return self.again

    def _end_with_the_recording(self) -> None:
        if self._recorder is not None and self._recorder.failure is not None:
            self._stop.request(self._recorder.failure, _EXIT_CODE)

    # Keys

    def _repeated(self, key: str) -> bool:
        now_s, before, before_s = self._now_s(), self._last_key, self._last_key_s
        self._last_key, self._last_key_s = key, now_s
        return key == before and now_s - before_s < _REPEAT_S

    def _pressed(self, key: str) -> None:
        if key == SPACE:
            self.pause = True
        elif key == RIGHT:
            self.over = True
        elif key in (LEFT, "s", "f") and self._settled:
            self._echo("no episode is open: the last one is decided, the next one has not begun")
        elif key == LEFT:
            self.over = self.again = True
            self._echo("this episode is played again and not recorded")
        elif key in ("s", "f"):
            self._outcome["success"] = key == "s"
            self._echo(f"marked: {'success' if key == 's' else 'failure'}")
        elif key == ESCAPE:
            self._stop.request("Esc", by_person=True)
        elif key in ("t", ENTER) and not self._playing:
            self._echo("new instruction (Enter: take it, Esc: keep the old one; the arm holds its pose):")
            self._type("", "")

    def _instruct(self, text: str) -> None:
        self.instruction = text.strip() or None
        self._echo(f"\ninstruction of the next episode: {self.instruction!r}" if self.instruction else "\nthe instruction stays")

    def _type(self, key: str, typed: str) -> None:
        if key in (ENTER, ESCAPE):
            self._typed = None
            self._instruct(typed if key == ENTER else "")
            return
        self._typed = typed[:-1] if key == BACKSPACE else typed + key * (len(key) <= 1)
        print(f"\r> {self._typed}\x1b[K", end="", file=sys.stderr, flush=True)  # standard output is --json's; \x1b[K clears the rest of the line
