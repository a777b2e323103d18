"""The live view: what rerun's own reader finds in a recording, and what a viewer that is missing, hangs or goes away costs a run."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from gr00t_fast.contracts import SO100_JOINTS, Observation
from gr00t_fast.control import display as module
from gr00t_fast.control.display import QUEUED_TICKS, Display, DisplayTarget, display_target
from gr00t_fast.control.trace import TickRecord
from gr00t_fast.errors import ConfigError, MissingExtraError

rerun = pytest.importorskip("rerun")

SIZE = (64, 48)
FPS = 30.0


def tick_of(index: int) -> tuple[Observation, TickRecord]:
    """Numbers that tell the tick; a front camera that grows brighter, in red only."""
    joints = np.arange(6) + index / 10
    frame = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    frame[:, :, 0] = 5 * index % 250
    ahead = (joints + 1 + np.arange(4)[:, None]).astype(np.float32)
    record = TickRecord(index, index // 20, index / FPS, ahead[0], joints + 1, ahead, 50.0 + index, 3, False, 0.25, index // 10)
    return Observation(joints, {"front": frame}, 1000.0 + index / FPS), record


def display_to(target: DisplayTarget, said: list[str] | None = None) -> Display:
    return Display(target, "pick: the cube", "degrees", SO100_JOINTS, ["front"], FPS, (said if said is not None else []).append)


def play(display: Display, ticks: range, pause_s: float = 0.0) -> None:
    for index in ticks:
        display.see(*tick_of(index))
        time.sleep(pause_s)


def rows_of(path: Path, index: str = "tick") -> list[dict[str, Any]]:
    dataframe = pytest.importorskip("rerun.dataframe", reason="rerun-sdk 0.26 has this reader; later ones have another")
    recording = dataframe.load_recording(path)
    return recording.view(index=index, contents="/**").select().read_all().to_pylist()


def scalar(row: dict[str, Any], entity: str) -> float | None:
    found = row[f"/{entity}:Scalars:scalars"]
    return None if found is None else found[0]


@pytest.fixture
def port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


@pytest.fixture
def viewer(port: int, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """rerun's own server, which takes what a viewer takes and needs no window."""
    name = "rerun.exe" if os.name == "nt" else "rerun"
    program = Path(rerun.__file__).parent.parent / "rerun_cli" / name
    if not program.exists():
        pytest.skip("this build of rerun-sdk comes without its viewer")
    log = (tmp_path / "viewer.log").open("wb")
    with log, subprocess.Popen([program, "--serve-grpc", "--port", str(port), "--bind", "127.0.0.1"], stdout=log, stderr=log) as process:
        end_s = time.monotonic() + 20
        while not _answers(port):
            assert time.monotonic() < end_s, (tmp_path / "viewer.log").read_text()
            time.sleep(0.1)
        yield process
        process.send_signal(signal.SIGCONT)
        process.kill()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def target_at(port: int, rrd: Path | None = None) -> DisplayTarget:
    return DisplayTarget("127.0.0.1", port, f"rerun+http://127.0.0.1:{port}/proxy", rrd=rrd)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("false", None),
        ("window", ("127.0.0.1", 9876, True, "out/display.rrd")),
        ("true", ("127.0.0.1", 9876, True, "out/display.rrd")),
        ("laptop:9000", ("laptop", 9000, False, "out/display.rrd")),
        ("laptop", ("laptop", 9876, False, "out/display.rrd")),
        ("rerun+http://10.0.0.7:9876/proxy", ("10.0.0.7", 9876, False, "out/display.rrd")),
        ("[::1]:9876", ("::1", 9876, False, "out/display.rrd")),
        ("a/run.rrd", (None, 9876, False, "a/run.rrd")),
    ],
)
def test_what_a_value_means(text: str | None, expected: tuple[str | None, int, bool, str] | None) -> None:
    found = display_target(text, Path("out"))
    assert found is None if expected is None else (found.host, found.port, found.spawn, str(found.rrd)) == expected


def test_an_address_becomes_reruns_url() -> None:
    assert display_target("laptop:9000", None).url == "rerun+http://laptop:9000/proxy"
    assert display_target("rerun+https://laptop:9000/proxy", None).url == "rerun+https://laptop:9000/proxy"
    assert display_target("laptop:9000", None).rrd is None


@pytest.mark.parametrize("text", ["http://laptop:9000/", "laptop:port", "laptop:0", "laptop:70000", "a b", "run.mp4/"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--display"):
        display_target(text, None)


def test_without_rerun_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rerun" else found(name, *rest))
    with pytest.raises(MissingExtraError, match=r"\[display\]"):
        display_to(DisplayTarget(rrd=tmp_path / "run.rrd"))


def test_a_file_that_cannot_be_written_is_an_error_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.rrd").mkdir()
    for path in (tmp_path / "file" / "run.rrd", tmp_path / "directory.rrd"):
        with pytest.raises(ConfigError, match="--display"):
            display_to(DisplayTarget(rrd=path))


def test_reruns_reader_finds_every_tick(tmp_path: Path) -> None:
    path, ticks = tmp_path / "run.rrd", 40
    with display_to(DisplayTarget(rrd=path)) as display:
        play(display, range(ticks))
    assert display.warnings == []
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


def test_between_episodes_the_cameras_and_joints_go_on(tmp_path: Path) -> None:
    path = tmp_path / "run.rrd"
    with display_to(DisplayTarget(rrd=path)) as display:
        play(display, range(3))
        for index in range(3, 6):
            display.see(tick_of(index)[0], None)
    rows = rows_of(path, index="time")
    assert [row["time"].total_seconds() for row in rows] == pytest.approx([index / FPS for index in range(6)], abs=1e-5)
    assert [scalar(row, "joints/gripper/measured") for row in rows] == pytest.approx([5 + index / 10 for index in range(6)], abs=1e-5)
    assert [scalar(row, "joints/gripper/commanded") is None for row in rows] == [False] * 3 + [True] * 3


def test_a_viewer_that_is_missing_is_one_message(port: int, tmp_path: Path) -> None:
    said: list[str] = []
    with display_to(target_at(port, tmp_path / "run.rrd"), said) as display:
        play(display, range(30))
    assert len(said) == 1
    assert f"127.0.0.1:{port}" in said[0]
    assert said[0] in display.warnings, "it stands in the report, too"
    assert len(rows_of(tmp_path / "run.rrd")) == 30


def test_no_desktop_is_one_message_and_a_recording(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "desktop_obstacle", lambda: "there is no display (DISPLAY is not set).")
    said: list[str] = []
    with display_to(display_target("window", tmp_path), said) as display:
        play(display, range(5))
    assert len(said) == 1
    assert "display.rrd" in said[0]
    assert "--display=HOST:PORT" in said[0]
    assert len(rows_of(tmp_path / "display.rrd")) == 5
    said.clear()
    with display_to(display_target("window", None), said) as display:
        play(display, range(2 * QUEUED_TICKS))
    assert len(said) == 1
    assert display.warnings == said, "nothing is shown, so nothing is missing"


def test_a_viewer_that_goes_away_is_one_message_and_the_recording_goes_on(viewer: subprocess.Popen[bytes], port: int, tmp_path: Path) -> None:
    said: list[str] = []
    with display_to(target_at(port, tmp_path / "run.rrd"), said) as display:
        play(display, range(30), 1 / FPS)
        assert said == []
        viewer.kill()
        viewer.wait()
        play(display, range(30, 90), 1 / FPS)
    assert len(said) == 1
    assert "went away" in said[0]
    assert len(rows_of(tmp_path / "run.rrd")) == 90


def test_a_viewer_that_hangs_delays_nothing(viewer: subprocess.Popen[bytes], port: int, tmp_path: Path) -> None:
    with display_to(target_at(port, tmp_path / "run.rrd")) as display:
        play(display, range(10), 1 / FPS)
        viewer.send_signal(signal.SIGSTOP)
        play(display, range(10, 70), 1 / FPS)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 8
    assert len(rows_of(tmp_path / "run.rrd")) == 70


def test_a_process_that_takes_nothing_costs_ticks_and_no_time(tmp_path: Path) -> None:
    """Frames of 640x480, so that the pipe holds a few at most."""
    frame = np.zeros((480, 640, 3), np.uint8)
    ticks = 3 * QUEUED_TICKS
    durations_s = []
    with display_to(DisplayTarget(rrd=tmp_path / "run.rrd")) as display:
        (child,) = _children_of(os.getpid(), "display_writer")
        os.kill(child, signal.SIGSTOP)
        for index in range(ticks):
            observation, record = tick_of(index)
            began_s = time.perf_counter()
            display.see(Observation(observation.joints, {"front": frame}, observation.time_s), record)
            durations_s.append(time.perf_counter() - began_s)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 15, "it is ended, not waited for"
    assert np.percentile(durations_s, 95) < 1e-3
    dropped = int(next(text for text in display.warnings if "lacks" in text).split(" lacks ")[1].split()[0])
    assert ticks - QUEUED_TICKS - 10 <= dropped <= ticks - QUEUED_TICKS
    assert any("did not finish" in text for text in display.warnings)


def _children_of(parent: int, word: str) -> list[int]:
    if not sys.platform.startswith("linux"):
        pytest.skip("looks processes up in /proc")
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            command = (place / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if int(fields[1]) == parent and word in command:
            found.append(int(place.name))
    return found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_ends_the_recording_and_not_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "run.rrd").symlink_to("/dev/full")
    with display_to(DisplayTarget(rrd=tmp_path / "run.rrd"), said) as display:
        play(display, range(60), 1 / FPS)
    assert len(said) == 1, said
    assert "run.rrd" in said[0]
    assert display.warnings[0] == said[0]


def test_a_whole_run_is_seen_by_a_viewer_and_kept(viewer: subprocess.Popen[bytes], port: int, tmp_path: Path) -> None:
    """The program with the simulated arm; the viewer goes away in the middle."""
    pytest.importorskip("mujoco")
    root = Path(__file__).parent.parent
    command = [
        *(sys.executable, "-m", "gr00t_fast", "run", "--config_path=configs/so100_sim.yaml", "--model_path=checkpoints/so100-sim-reach"),
        *("--robot.cameras={front: {type: sim, view: front, width: 64, height: 48, fps: 30}}", "--preflight=warn", "--timeout=100"),
        *(f"--out={tmp_path}", f"--display=127.0.0.1:{port}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(root)}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("Loop 2"):
                viewer.kill()
            if line.startswith("--display:"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, "".join(said)
    told = [line for line in said if line.startswith("--display:")]
    assert len(told) == 1, told
    assert "went away" in told[0]
    report = (tmp_path / "report.txt").read_text()
    assert "went away" in report, "in the report, too"
    data = np.load(tmp_path / "run.npz")
    rows = {row["tick"]: row for row in rows_of(tmp_path / "display.rrd")}
    assert "lacks" in report or set(rows) == set(range(len(data["time_s"])))
    for number, row in rows.items():
        assert [scalar(row, f"joints/{joint}/commanded") for joint in SO100_JOINTS] == pytest.approx(data["commanded"][number], abs=1e-3)
