"""Keys in a terminal, and what they do to the episodes of a run."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
import termios
import threading
from collections.abc import Iterator

import pytest
from control_fakes import Bench
from waiting import PATIENCE_S

from gr00t_fast.base.errors import ObservationError, RobotError
from gr00t_fast.base.keyboard import BACKSPACE, ENTER, ESCAPE, LEFT, RIGHT, Keys
from gr00t_fast.base.worker import ThreadWorker
from gr00t_fast.cli import run
from gr00t_fast.record.session import SAVE_LIMIT_S, Session

TASK = "pick: the cube"  # of the bench


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a pseudo-terminal: the person's and the program's."""
    person, program = pty.openpty()
    yield person, program
    os.close(person)
    os.close(program)


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
    now_s = 0.0
    with Keys(program, lambda: now_s) as keys:
        os.write(person, b"\x1b")
        assert keys.poll() == []
        os.write(person, b"[C")
        assert keys.poll() == [RIGHT]
        os.write(person, b"\x1b")
        assert keys.poll() == []
        now_s = 0.2
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

    def add(self, observation: object, commanded: object, underrun: bool = False) -> None:
        self.rows += 1

    def end(self, **outcome: object) -> None:
        self.told.append(("end", self.rows, outcome["success"]))

    def save(self, **outcome: object) -> None:
        self.told.append(("save", outcome["success"]))

    def discard(self) -> None:
        self.told.append("discard")


def made(pressed: dict[int, list[str]], recorder: Recorder | None = None, **options: object) -> tuple[Bench, Fingers]:
    """A run of one-second episodes, 30 ticks each; keys by the number of the look at the keyboard."""
    bench, keys = Bench(timeout_s=1.0, **options), Fingers(pressed)
    bench.loop.session = Session(bench.stop, keys, recorder, bench.said.append, bench.clock.now_s)
    return bench, keys


def played(pressed: dict[int, list[str]], **options: object) -> tuple[Bench, Recorder]:
    recorder = Recorder()
    bench, _ = made(pressed, recorder, **options)
    bench.loop.run()
    return bench, recorder


def tasks(recorder: Recorder) -> list[str]:
    return [told[1] for told in recorder.told if told[0] == "begin"]


@pytest.mark.parametrize(
    ("pressed", "options", "fates", "episodes"),
    [
        ({}, {"episodes": 2}, [None, None], 2),
        ({3: ["s"], 40: ["f"], 50: ["s"], 70: [LEFT]}, {"episodes": 3}, [True, True, "discard", None], 4),
        ({40: ["f"], 60: [RIGHT]}, {"episodes": 2, "reset_time_s": 100.0}, [False, None], 2),
        ({40: [LEFT], 70: ["s"]}, {"episodes": 2, "reset_time_s": 3.0}, ["discard", True, None], 3),
        ({10: ["s"], 40: [ESCAPE]}, {"episodes": 2, "reset_time_s": 100.0}, [True], 1),
        ({10: [LEFT], 40: [ESCAPE]}, {"episodes": 2, "reset_time_s": 100.0}, ["discard"], 1),
    ],
    ids=["no keys", "marks and a repetition", "marked in the pause", "repeated in the pause", "Esc after a mark", "Esc after a repetition"],
)
def test_what_becomes_of_episodes(pressed: dict[int, list[str]], options: dict[str, object], fates: list[object], episodes: int) -> None:
    bench, recorder = played(pressed, **options)
    assert [told if isinstance(told, str) else told[-1] for told in recorder.told if told == "discard" or told[0] == "save"] == fates
    assert bench.loop.trace.episodes == episodes
    if not pressed:
        assert recorder.told == [("begin", TASK), ("end", 29, None), ("save", None), ("begin", TASK), ("end", 29, None), ("save", None)]


def test_every_run_in_a_terminal_has_keys(terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one episode that is not recorded."""
    config = run.parse(["--robot.type=so100_sim", "--model_path=m", "--lang_instruction=go"])
    assert run.keys_of_session(config, print) is None
    assert "no keys" not in capsys.readouterr().out, "none were asked for"
    monkeypatch.setattr(run, "keys_obstacle", lambda: None)
    with os.fdopen(os.dup(terminal[1])) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert isinstance(run.keys_of_session(config, print), Keys)
    assert "Esc stops" in capsys.readouterr().out


def test_escape_ends_the_run_and_the_episode_is_kept() -> None:
    bench, recorder = played({10: [ESCAPE]}, episodes=3)
    assert bench.robot.calls[-1] == "land"
    assert bench.loop.trace.ended_by == "Esc"
    assert [told[0] for told in recorder.told] == ["begin", "end", "save"]


@pytest.mark.parametrize("refused", [False, True])
def test_an_instruction_typed_in_the_pause_is_for_the_next_episode(refused: bool) -> None:
    """The pause lasts as long as somebody types, and the network is warmed up with the new instruction; one that it refuses leaves the old one."""
    recorder = Recorder()
    bench, _ = made({40: ["t"], 42: [*"lift iq"], 200: [BACKSPACE, "t", ENTER]}, recorder, episodes=2, reset_time_s=1.0)
    if refused:
        bench.policy.warm_up = lambda *_: (_ for _ in ()).throw(ObservationError("the instruction contains the image token"))
    bench.loop.run()
    assert tasks(recorder) == [TASK, TASK if refused else "lift it"]
    assert any("image token" in line for line in bench.said) == refused
    assert bench.policy.warmed_up == (None if refused else "lift it")
    assert bench.policy.seen[-1]["annotation.human.task_description"] == [TASK if refused else "lift it"]


@pytest.mark.parametrize("meanwhile", ["a camera is lost", "another instruction is typed"])
def test_arm_and_keys_are_watched_while_the_network_makes_itself_ready(meanwhile: str) -> None:
    """The instruction before the other one is not played."""
    recorder, ready, typed = Recorder(), threading.Event(), iter([["t"], [*"put it down", ENTER], []])
    keys_of_run = {40: ["t"], 42: [*"lift it", ENTER]}
    bench, keys = made(keys_of_run, recorder, episodes=2, reset_time_s=1.0, worker=ThreadWorker())
    answer = bench.policy.warm_up

    def warm_up(*options: object) -> dict[str, float]:
        answer(*options)
        assert ready.wait(PATIENCE_S), "nobody looked at the arm"
        return {}

    def look() -> None:
        if bench.policy.warmed_up is None:
            return
        if meanwhile == "a camera is lost":
            raise RobotError("camera front is gone")
        keys.now = next(typed, [])
        if not keys.now:
            ready.set()

    bench.policy.warm_up, bench.robot.on_observe = warm_up, look
    with pytest.raises(RobotError, match="front") if "camera" in meanwhile else contextlib.nullcontext():
        bench.loop.run()
    ready.set()  # no thread is left for the tests to come
    assert bench.robot.calls[-1] == "land"
    assert tasks(recorder) == ([TASK] if "camera" in meanwhile else [TASK, "put it down"])


def test_a_recording_that_fails_lands_the_arm() -> None:
    recorder = Recorder()
    bench, _ = made({}, recorder)
    recorder.failure = "the disk is full"
    trace = bench.loop.run()
    assert (trace.ended_by, bench.stop.exit_code) == ("the disk is full", 1)
    assert trace.landing.safe


def test_an_episode_that_is_never_saved_does_not_keep_the_arm_powered() -> None:
    recorder = Recorder()
    bench, _ = made({}, recorder, episodes=2)
    recorder.busy = True
    trace = bench.loop.run()
    assert "not saved" in trace.ended_by
    assert (bench.stop.exit_code, bench.robot.calls[-1]) == (1, "land")
    assert [line for line in bench.said if "WARNING" in line and "saved" in line]
    assert bench.clock.now_s() - 100 == pytest.approx(1 + SAVE_LIMIT_S, abs=1)
