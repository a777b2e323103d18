"""What looks on at a run: what a video, a window and rerun's own reader show of it, and what a view that is missing, hangs or goes away costs."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from waiting import PATIENCE_S, beside, children, until

from gr00t_fast.base.contracts import SO100_JOINTS, Observation
from gr00t_fast.base.errors import ConfigError, MissingExtraError
from gr00t_fast.base.files import is_running
from gr00t_fast.control.trace import TickRecord
from gr00t_fast.record import views
from gr00t_fast.record.views import (
    QUEUED_TICKS,
    DisplayTarget,
    View,
    display_target,
    display_view,
    side_by_side,
    video_view,
)

rerun = pytest.importorskip("rerun")

SIZE = (64, 48)
FPS = 30.0


def tick_of(index: int) -> tuple[Observation, TickRecord]:
    """Numbers that tell the tick; a front camera that grows brighter, in red only."""
    joints = np.arange(6) + index / 10
    frame = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    frame[:, :, 0] = 5 * index % 250
    ahead = (joints + 1 + np.arange(4)[:, None]).astype(np.float32)
    record = TickRecord(index, index // 20, index / FPS, ahead[0], joints + 1, ahead, 50.0 + index, False, 3, False, 0.25, index, index // 10)
    return Observation(joints, {"front": frame}, 1000.0 + index / FPS), record


def display_to(target: DisplayTarget, said: list[str] | None = None) -> View:
    return display_view(target, "pick: the cube", "degrees", SO100_JOINTS, ["front"], (said if said is not None else []).append)


def play(view: View, ticks: range) -> None:
    for index in ticks:
        view.see(*tick_of(index))


def rows_of(path: Path, index: str = "tick") -> list[dict[str, Any]]:
    dataframe = pytest.importorskip("rerun.dataframe", reason="rerun-sdk 0.26 has this reader; later ones have another")
    recording = dataframe.load_recording(path)
    return recording.view(index=index, contents="/**").select().read_all().to_pylist()


def scalar(row: dict[str, Any], entity: str) -> float | None:
    found = row[f"/{entity}:Scalars:scalars"]
    return None if found is None else found[0]


class Viewer(subprocess.Popen):
    """rerun's own server, which takes what a viewer takes and needs no window, at a port that the system has chosen."""

    def __init__(self, log: Path) -> None:
        program = Path(rerun.__file__).parent.parent / "rerun_cli" / "rerun"
        if not program.exists() or not Path("/proc/net/tcp").exists():
            pytest.skip("this build of rerun-sdk comes without its viewer, or this system does not tell its port")
        super().__init__([program, "--serve-grpc", "--port", "0", "--bind", "127.0.0.1"], stdout=log.open("wb"), stderr=subprocess.STDOUT)
        until(self.port, f"rerun's server ({log})")

    def port(self) -> int | None:
        """At which it listens (0A)."""
        own = {os.readlink(file) for file in Path(f"/proc/{self.pid}/fd").iterdir()}
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        return next((int(words[1].split(":")[1], 16) for words in sockets if words[3] == "0A" and f"socket:[{words[9]}]" in own), None)


@pytest.fixture
def viewer(tmp_path: Path) -> Iterator[Viewer]:
    with Viewer(tmp_path / "viewer.log") as process:
        yield process
        process.send_signal(signal.SIGCONT)
        process.kill()


def target_at(port: int, rrd: Path | None = None) -> DisplayTarget:
    return DisplayTarget("127.0.0.1", port, f"rerun+http://127.0.0.1:{port}/proxy", rrd=rrd)


@pytest.mark.parametrize(
    ("text", "host", "port", "spawn", "rrd"),
    [
        ("window", "127.0.0.1", 9876, True, "out/display.rrd"),
        ("true", "127.0.0.1", 9876, True, "out/display.rrd"),
        ("laptop:9000", "laptop", 9000, False, "out/display.rrd"),
        ("laptop", "laptop", 9876, False, "out/display.rrd"),
        ("rerun+https://10.0.0.7:9876/proxy", "10.0.0.7", 9876, False, "out/display.rrd"),
        ("[::1]:9876", "::1", 9876, False, "out/display.rrd"),
        ("a/run.rrd", None, 9876, False, "a/run.rrd"),
    ],
)
def test_what_a_value_means(text: str, host: str | None, port: int, spawn: bool, rrd: str) -> None:
    found = display_target(text, Path("out"))
    assert (found.host, found.port, found.spawn, str(found.rrd)) == (host, port, spawn, rrd)
    assert host is None or (host in found.url and found.url.endswith(f":{port}/proxy"))
    assert "://" not in text or found.url == text


@pytest.mark.parametrize("text", ["http://laptop:9000/", "laptop:port", "laptop:0", "laptop:70000", "a b", "run.mp4/"])
def test_what_is_no_address_is_refused(text: str) -> None:
    assert display_target("false", None) is display_target(None, None) is None
    with pytest.raises(ConfigError, match="--display"):
        display_target(text, None)


def test_a_missing_package_and_a_file_that_cannot_be_written_are_errors_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("directory.rrd", "directory.mp4"):
        (tmp_path / name).mkdir()
    for path in (tmp_path / "file" / "run.rrd", tmp_path / "directory.rrd"):
        with pytest.raises(ConfigError, match="--display"):
            display_to(DisplayTarget(rrd=path))
    for path in (tmp_path / "file" / "run.mp4", tmp_path / "directory.mp4"):
        with pytest.raises(ConfigError, match="--video"):
            video_view(path, FPS)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rerun" else found(name, *rest))
    with pytest.raises(MissingExtraError, match=r"\[display\]"):
        display_to(DisplayTarget(rrd=tmp_path / "run.rrd"))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingExtraError, match=r"\[plots\]"):
        video_view(tmp_path / "run.mp4", FPS)


def test_reruns_reader_finds_every_tick(tmp_path: Path) -> None:
    """Also between episodes, where only the cameras and the measured joints go on."""
    path, ticks = tmp_path / "run.rrd", 40
    with display_to(DisplayTarget(rrd=path)) as view:
        play(view, range(ticks))
        for index in range(ticks, ticks + 3):
            view.see(tick_of(index)[0])
    assert view.warnings == []
    assert view.written == path
    rows = rows_of(path)
    assert [row["tick"] for row in rows] == list(range(ticks))
    for index, row in enumerate(rows):
        joints = np.arange(6) + index / 10
        assert row["time"].total_seconds() == pytest.approx(index / FPS, abs=1e-5)
        assert [scalar(row, f"joints/{joint}/measured") for joint in SO100_JOINTS] == pytest.approx(joints, abs=1e-5)
        assert [scalar(row, f"joints/{joint}/commanded") for joint in SO100_JOINTS] == pytest.approx(joints + 1, abs=1e-5)
        assert scalar(row, "timing/inference_ms") == pytest.approx(50 + index)
        assert scalar(row, "timing/missed_ticks") == index // 10
        picture = cv2.imdecode(np.array(row["/cameras/front:EncodedImage:blob"][0], np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (SIZE[1], SIZE[0], 3)
        assert picture[:, :, 2].mean() == pytest.approx(5 * index % 250, abs=4), "red is OpenCV's last channel"
        curves = np.array(row["/chunk:LineStrips2D:strips"])  # (J, L, 2)
        assert curves[:, :, 1] == pytest.approx(-(joints + 1 + np.arange(4)[:, None]).T, abs=1e-4)
    assert [row["/events:TextLog:text"] for row in rows if row["/events:TextLog:text"]] == [["episode 1"], ["episode 2"]]
    rows = rows_of(path, index="time")
    assert [row["time"].total_seconds() for row in rows] == pytest.approx([index / FPS for index in range(ticks + 3)], abs=1e-5)
    assert [scalar(row, "joints/gripper/measured") for row in rows] == pytest.approx([5 + index / 10 for index in range(ticks + 3)], abs=1e-5)
    assert [scalar(row, "joints/gripper/commanded") is None for row in rows] == [False] * ticks + [True] * 3


def test_a_viewer_that_is_missing_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers, or no program can open a window here; the recording goes on."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as silent:  # nobody listens
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for text, named in ((address, address), ("window", "--display=HOST:PORT")):
            said: list[str] = []
            with display_to(display_target(text, tmp_path), said) as view:
                play(view, range(30))
            assert len(said) == 1
            assert named in said[0]
            assert said == view.warnings, "it stands in the report, too"
            assert len(rows_of(view.path)) == 30


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_viewer_that_goes_away_or_hangs_costs_its_own_picture_alone(number: int, viewer: Viewer, tmp_path: Path) -> None:
    said: list[str] = []
    with display_to(target_at(viewer.port(), tmp_path / "run.rrd"), said) as view:
        play(view, range(20))
        view.sink.wait(PATIENCE_S)
        assert said == []
        viewer.send_signal(number)
        play(view, range(20, 70))
        view.sink.wait(PATIENCE_S)
    assert view.written == tmp_path / "run.rrd"
    assert len(rows_of(tmp_path / "run.rrd")) == 70
    if number == signal.SIGKILL:
        assert len(said) == 1
        assert "went away" in said[0]


def test_a_process_that_takes_nothing_costs_ticks_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "FINISH_S", 1.0)
    frame, ticks = np.zeros((480, 640, 3), np.uint8), 3 * QUEUED_TICKS
    with display_to(DisplayTarget(rrd=tmp_path / "run.rrd")) as view:
        process = beside()
        os.kill(process, signal.SIGSTOP)
        for index in range(ticks):  # returns, although nothing is taken
            view.see(Observation(np.zeros(6), {"front": frame}, index / FPS), tick_of(index)[1])
    assert view.sink.dropped == ticks - QUEUED_TICKS
    assert any(f"lacks {view.sink.dropped} of {ticks} ticks" in text for text in view.warnings)
    assert any("did not finish" in text for text in view.warnings), "it is ended, not waited for"
    assert view.written is None
    until(lambda: not is_running(process))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_ends_the_recording_and_not_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "run.rrd").symlink_to("/dev/full")
    with display_to(DisplayTarget(rrd=tmp_path / "run.rrd"), said) as view:
        play(view, range(60))
    assert len(said) == 1, said
    assert "run.rrd" in said[0]
    assert view.warnings[0] == said[0]


def frames_of(number: int) -> Observation:
    front, wrist = np.full((48, 64, 3), number, np.uint8), np.full((50, 33, 3), 255 - number, np.uint8)
    return Observation(np.zeros(6), {"front": front, "wrist": wrist}, 0.0)


@pytest.mark.parametrize(("suffix", "magic"), [(".mp4", b"ftyp"), (".gif", b"GIF89a")])
def test_video(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / "new" / f"run{suffix}"
    with video_view(path, FPS) as view:
        for number in range(30):
            view.see(frames_of(number))
    assert view.warnings == []
    assert magic in path.read_bytes()[:16]
    assert side_by_side(frames_of(0).frames).shape == (48, 96, 3), "even sizes"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux to find the encoder")
def test_an_encoder_that_fails_or_hangs_never_disturbs_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with video_view(tmp_path / "gone" / "run.mp4", FPS, said.append) as view:
        (tmp_path / "gone").rmdir()
        for number in range(100):
            view.see(frames_of(number))
    assert "No such file" in said[0]
    assert view.warnings[0] == said[0]
    monkeypatch.setattr(views, "FINISH_S", 0.5)
    with video_view(tmp_path / "run.mp4", FPS) as view:
        view.see(frames_of(0))
        until(lambda: children(beside()))
        encoders = children(beside())
        os.kill(encoders[0], signal.SIGSTOP)
        for number in range(200):
            view.see(frames_of(number))
    assert "did not finish" in view.warnings[0]
    assert view.written is None
    until(lambda: not is_running(encoders[0]))  # killed, but the kernel takes its time
