"""Keys in a terminal, and what they do to the episodes of a run."""

from __future__ import annotations

import contextlib
import os
import pty
import termios
import threading
from collections.abc import Callable, Iterator

import pytest
from control_fakes import Bench

from gr00t_fast.control.controller import ThreadWorker
from gr00t_fast.control.session import BACKSPACE, ENTER, ESCAPE, LEFT, RIGHT, Keys, Session
from gr00t_fast.errors import ObservationError, RobotError

PATIENCE_S = 60.0
TASK = "pick: the cube"  # of the bench


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a pseudo-terminal: the person's and the program's."""
    person, program = pty.openpty()
    yield person, program
    os.close(person)
    os.close(program)


class Time:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (b"\x1b[C", [RIGHT]),
        (b"\x1bOD", [LEFT]),
        (b"\x1b[C\x1b[D", [RIGHT, LEFT]),
        (b"sf", ["s", "f"]),
        (b"\r\x7f", [ENTER, BACKSPACE]),
        ("gr\u00fcn \u62ff".encode(), [*"gr\u00fcn \u62ff"]),
        (b"\x1b[15~\x1b[1;5Cx", ["x"]),  # F5, Ctrl with an arrow: no keys of ours
        (b"\xff\xfe\x01s", ["s"]),  # no text
    ],
)
def test_keys_are_named(terminal: tuple[int, int], typed: bytes, expected: list[str]) -> None:
    person, program = terminal
    with Keys(program) as keys:
        os.write(person, typed)
        assert keys.poll() == expected


def test_escape_alone_is_told_from_an_arrow_that_comes_in_pieces(terminal: tuple[int, int]) -> None:
    person, program = terminal
    now = Time()
    with Keys(program, now) as keys:
        os.write(person, b"\x1b")
        assert keys.poll() == []
        os.write(person, b"[C")
        assert keys.poll() == [RIGHT]
        os.write(person, b"\x1b")
        assert keys.poll() == []
        now.s += 0.2
        assert keys.poll() == [ESCAPE]


def test_the_terminal_is_as_before_afterwards(terminal: tuple[int, int]) -> None:
    _, program = terminal
    before = termios.tcgetattr(program)
    with contextlib.suppress(RuntimeError), Keys(program):
        during = termios.tcgetattr(program)
        raise RuntimeError("something else failed")
    assert not during[3] & (termios.ECHO | termios.ICANON)
    assert during[3] & termios.ISIG  # Ctrl-C stays a signal
    assert termios.tcgetattr(program) == before


def test_a_terminal_that_goes_away_gives_no_more_keys() -> None:
    person, program = pty.openpty()
    with Keys(program) as keys:
        os.close(person)
        assert keys.poll() == []
        assert keys.poll() == []
    os.close(program)


class Fingers:
    """Keys pressed at given ticks, in place of a terminal's."""

    def __init__(self, pressed: dict[int, list[str]]) -> None:
        self._pressed, self._polls = pressed, 0
        self.now: list[str] = []  # pressed before the next look, whichever it is

    def poll(self) -> list[str]:
        self._polls += 1
        now, self.now = self.now, []
        return now or self._pressed.get(self._polls, [])


class Recorder:
    """Notes what it is told, in place of one that writes."""

    failure = None
    busy = False

    def __init__(self) -> None:
        self.told: list[object] = []
        self.rows = 0

    def begin(self, task: str) -> None:
        self.told.append(("begin", task))
        self.rows = 0

    def add(self, observation: object, commanded: object) -> None:
        self.rows += 1

    def end(self, **outcome: object) -> None:
        self.told.append(("end", self.rows, outcome["success"]))

    def save(self, **outcome: object) -> None:
        self.told.append(("save", outcome["success"]))

    def discard(self) -> None:
        self.told.append("discard")


def played(pressed: dict[int, list[str]], **options: object) -> tuple[Bench, Recorder]:
    """A run of one-second episodes, 30 ticks each; keys by the number of the look at the keyboard."""
    bench, recorder = Bench(timeout_s=1.0, **options), Recorder()
    bench.loop.session = Session(bench.stop, Fingers(pressed), recorder, bench.said.append, bench.clock.now_s)
    bench.loop.run()
    return bench, recorder


def test_each_episode_is_recorded_with_its_ticks() -> None:
    _, recorder = played({}, episodes=2)
    assert recorder.told == [("begin", TASK), ("end", 30, None), ("save", None)] * 2


def test_keys_mark_end_and_repeat_episodes() -> None:
    """The third episode ends early, is repeated, and then counts."""
    bench, recorder = played({3: ["s"], 40: ["f"], 50: ["s"], 70: [LEFT]}, episodes=3)
    fates = [told if isinstance(told, str) else told[-1] for told in recorder.told if told == "discard" or told[0] == "save"]
    assert fates == [True, True, "discard", None]
    assert bench.loop.trace.episodes == 4


def test_a_key_held_down_is_one_press() -> None:
    """The right arrow that ended the first episode does not end the second one too."""
    _, recorder = played({10: [RIGHT], **{poll: [RIGHT] for poll in range(25, 40)}}, episodes=2)
    assert [told[1] for told in recorder.told if told[0] == "end"][1] > 5


def test_escape_ends_the_run_and_the_episode_is_kept() -> None:
    bench, recorder = played({10: [ESCAPE]}, episodes=3)
    assert bench.robot.calls[-1] == "land"
    assert bench.loop.trace.ended_by == "Esc"
    assert [told[0] for told in recorder.told] == ["begin", "end", "save"]


def test_a_stop_in_the_pause_keeps_what_was_decided() -> None:
    """A mark counts, and an episode that was thrown away stays so."""
    _, recorder = played({10: ["s"], 40: [ESCAPE]}, episodes=2, reset_time_s=100.0)
    assert ("save", True) in recorder.told
    _, recorder = played({10: [LEFT], 40: [ESCAPE]}, episodes=2, reset_time_s=100.0)
    assert recorder.told[-1] == "discard"


def test_an_instruction_that_the_policy_refuses_leaves_the_old_one() -> None:
    keys = {40: ["t"], 42: [*"<IMG_CONTEXT>", ENTER]}
    bench, recorder = Bench(timeout_s=1.0, episodes=2, reset_time_s=1.0), Recorder()

    def refuse(*_: object) -> None:
        raise ObservationError("the instruction contains the image token")

    bench.policy.warm_up = refuse
    bench.loop.session = Session(bench.stop, Fingers(keys), recorder, bench.said.append, bench.clock.now_s)
    bench.loop.run()
    assert [told for told in recorder.told if told[0] == "begin"] == [("begin", TASK)] * 2
    assert any("image token" in line for line in bench.said)


def test_in_the_pause_the_last_episode_can_still_be_marked_and_repeated() -> None:
    _, recorder = played({40: ["f"], 60: [RIGHT]}, episodes=2, reset_time_s=100.0)
    assert ("save", False) in recorder.told
    _, recorder = played({40: [LEFT], 70: ["s"]}, episodes=2, reset_time_s=3.0)
    assert recorder.told.count("discard") == 1
    assert [told for told in recorder.told if told[0] == "begin"] == [("begin", TASK)] * 3


def test_an_instruction_typed_in_the_pause_is_for_the_next_episode() -> None:
    """The pause lasts as long as somebody types, and the network is warmed up with the new instruction."""
    keys = {40: ["t"], 42: [*"lift iq"], 200: [BACKSPACE, "t", ENTER]}
    bench, recorder = played(keys, episodes=2, reset_time_s=1.0)
    assert [told for told in recorder.told if told[0] == "begin"] == [("begin", TASK), ("begin", "lift it")]
    assert bench.policy.warmed_up == "lift it"
    assert bench.policy.seen[-1]["annotation.human.task_description"] == ["lift it"]


def slow_warm_up(bench: Bench, until: Callable[[], bool]) -> threading.Event:
    """The network makes itself ready until `until` says so of a look at the arm, or the event is set."""
    ready, answer = threading.Event(), bench.policy.warm_up

    def look() -> None:
        if bench.policy.warmed_up is not None and until():
            ready.set()

    def warm_up(instruction: str, prefix_method: str | None = None) -> dict[str, float]:
        answer(instruction, prefix_method)
        assert ready.wait(PATIENCE_S), "nobody looked at the arm"
        return {}

    bench.policy.warm_up, bench.robot.on_observe = warm_up, look
    return ready


def test_the_arm_is_watched_while_the_network_makes_itself_ready() -> None:
    bench = Bench(timeout_s=1.0, episodes=2, reset_time_s=1.0, worker=ThreadWorker())
    bench.loop.session = Session(bench.stop, Fingers({40: ["t"], 42: [*"lift it", ENTER]}), None, bench.said.append, bench.clock.now_s)

    def camera_lost() -> bool:
        raise RobotError("camera front is gone")

    ready = slow_warm_up(bench, camera_lost)
    with pytest.raises(RobotError, match="front"):
        bench.loop.run()
    ready.set()  # no thread is left for the tests to come
    assert bench.policy.warmed_up == "lift it"
    assert bench.robot.calls[-1] == "land"


def test_keys_are_heard_while_the_network_makes_itself_ready() -> None:
    """Another instruction is typed, and the one before it is not played."""
    bench, recorder = Bench(timeout_s=1.0, episodes=2, reset_time_s=1.0, worker=ThreadWorker()), Recorder()
    keys = Fingers({40: ["t"], 42: [*"lift it", ENTER]})
    bench.loop.session = Session(bench.stop, keys, recorder, bench.said.append, bench.clock.now_s)
    typed = iter([["t"], [*"put it down", ENTER], []])

    def type_another() -> bool:
        keys.now = next(typed, [])
        return not keys.now

    slow_warm_up(bench, type_another)
    bench.loop.run()
    assert [told for told in recorder.told if told[0] == "begin"] == [("begin", TASK), ("begin", "put it down")]


def test_a_recording_that_fails_lands_the_arm() -> None:
    bench, recorder = Bench(timeout_s=1.0), Recorder()
    bench.loop.session = Session(bench.stop, None, recorder, bench.said.append, bench.clock.now_s)
    recorder.failure = "the disk is full"
    trace = bench.loop.run()
    assert (trace.ended_by, bench.stop.exit_code) == ("the disk is full", 1)
    assert trace.landing.safe
