"""Figures of a run whose times are known exactly, and what is written to disk."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from control_fakes import TICK_S, Bench

from gr00t_fast.contracts import SO100_JOINTS, LandingReport, Observation
from gr00t_fast.control import recorder
from gr00t_fast.control.display import Display, DisplayTarget, window_target
from gr00t_fast.control.recorder import VideoRecorder, display_obstacle, side_by_side
from gr00t_fast.control.report import SCHEMA, Outputs, as_text, build_report, plot_joints, save_run, write_report
from gr00t_fast.errors import ConfigError, MissingExtraError
from gr00t_fast.measurement import percentiles


def report_of(bench: Bench, **kwargs: object) -> dict:
    return build_report(bench.loop, {"model_path": "m"}, **kwargs)


@pytest.fixture
def bench() -> Bench:
    bench = Bench(inference_s=0.2, timeout_s=2.0)
    bench.loop.run()
    return bench


def test_percentiles() -> None:
    assert percentiles([]) is None
    assert percentiles([1.0, float("nan"), 3.0]) == {"count": 2, "p50": 2.0, "p95": 2.9, "p99": 2.98, "max": 3.0}


def test_figures_of_a_known_run(bench: Bench) -> None:
    report = report_of(bench)
    assert report["schema"] == SCHEMA
    assert report["run"]["ticks"] == len(bench.robot.sent)
    assert report["run"]["playback_hz"] == pytest.approx(30, abs=0.01)
    times_s = bench.times()
    assert report["run"]["achieved_hz"] == pytest.approx((len(times_s) - 1) / (times_s[-1] - times_s[0]), abs=0.01)
    assert "Hz from first to last target" in as_text(report), "what the figure leaves out"
    assert report["run"]["achieved_hz"] < 30
    assert report["stages_ms"]["infer"]["p50"] == pytest.approx(200)
    assert report["stages_ms"]["infer/network"]["p99"] == 4.0
    assert report["stages_ms"]["loop"]["p50"] == pytest.approx(200 + 7000 * TICK_S, abs=0.01)
    assert report["pacing"]["pause_per_chunk_ms"]["p50"] == pytest.approx(200 - 1000 * TICK_S, abs=0.01)
    assert report["pacing"]["missed_ticks"] == 0
    assert report["pacing"]["waiting_for_inference_ticks"] == 5 * (report["run"]["inferences"] - 1)
    assert report["pacing"]["tick_error_ms"]["max"] == pytest.approx(0, abs=1e-3)
    assert report["tracking_error"]["joints"]["gripper"]["max"] == 0
    assert report["events"] == {"read_retry": 2}
    assert report["landing"]["safe"] is True
    assert {"observe", "infer", "send", "wait", "loop"} <= set(report["stages_ms"])


def test_safety_counts_are_per_joint() -> None:
    bench = Bench(timeout_s=1.0)
    bench.policy.on_action = lambda targets: targets + np.array([0, 0, 0, 0, 0, 200.0])
    bench.loop.run()
    safety = report_of(bench)["safety"]
    assert safety["clamped"]["gripper"] == 30
    assert safety["clamped"]["elbow_flex"] == 0
    assert safety["speed_limited"]["gripper"] > 0


def test_says_what_ran_where(bench: Bench) -> None:
    report = report_of(bench, argv=["prog", "--lang_instruction=pick: the cube"])
    assert report["command_line"] == "prog '--lang_instruction=pick: the cube'"
    assert report["versions"]["python"]
    assert report["machine"]["cpus"]
    assert "git_commit" in report


def test_text_has_a_line_for_every_stage_and_joint(bench: Bench) -> None:
    text = as_text(report_of(bench, warnings=["look out"]))
    for word in (
        "observe",
        "infer",
        "infer/network",
        "send",
        "wait",
        "loop",
        "wrist_roll",
        "gripper",
        "missed ticks",
        "p99",
        "read_retry 2",
    ):
        assert word in text
    assert "warning: look out" in text
    assert "ended by the time limit" in text
    for word in ("pause/chunk:", "wait:", "infer/refine:", "speed-lim.:", "follow-lim.:", "track:"):
        assert word in text, f"{word} is explained nowhere"
    assert "torque off; safe" in text
    assert max(map(len, text.splitlines())) < 120


def test_an_unsafe_landing_is_loud(bench: Bench) -> None:
    bench.loop.trace.landing = LandingReport({"gripper": "unknown"}, True, True, ["servo 6 silent"])
    assert "NOT SAFE: servo 6 silent" in as_text(report_of(bench))


def test_a_run_that_failed_at_connect_still_has_a_report(tmp_path: Path) -> None:
    bench = Bench()
    bench.robot.on_connect = lambda: (_ for _ in ()).throw(OSError("no port"))
    with pytest.raises(OSError, match="no port"):
        bench.loop.run()
    report = report_of(bench)
    assert report["run"]["ticks"] == 0
    assert report["safety"] is None
    assert as_text(report)
    write_report(report, tmp_path)


def test_a_dry_run_is_not_ended_by_a_time_limit() -> None:
    bench = Bench(dry_run=True)
    bench.loop.run()
    assert "ended by itself: a dry run" in as_text(report_of(bench))


def test_json_is_strict_and_complete(bench: Bench, tmp_path: Path) -> None:
    as_json, text = write_report(report_of(bench), tmp_path / "deep" / "out")
    loaded = json.loads(as_json.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert loaded["settings"] == {"model_path": "m"}
    assert text.read_text().startswith("run ")


def test_unwritable_directory(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        write_report(report_of(bench), tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="--out"):
        Outputs(tmp_path / "file" / "out", None, 30.0)


def test_recorded_run_and_plot(bench: Bench, tmp_path: Path) -> None:
    npz, csv = save_run(bench.loop.trace, tmp_path)
    data = np.load(npz)
    assert data["commanded"].shape == (len(bench.robot.sent), 6)
    assert np.array_equal(data["commanded"], np.array([targets for _, targets in bench.robot.sent]))
    assert data["joint_names"].tolist()[-1] == "gripper"
    assert np.allclose(np.diff(data["time_s"]), np.diff(bench.times()))
    header, *rows = csv.read_text().splitlines()
    assert len(rows) == len(bench.robot.sent)
    assert len(header.split(",")) == len(rows[0].split(",")) == 20
    assert plot_joints(bench.loop.trace, tmp_path / "joints.png", "degrees").read_bytes().startswith(b"\x89PNG")


def test_the_plot_marks_where_episodes_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    bench = Bench(episodes=3, timeout_s=0.5)
    bench.loop.run()
    marked_s = []
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **style: marked_s.append(x) if style.get("linestyle") == "--" else None)
    plot_joints(bench.loop.trace, tmp_path / "joints.png", "degrees")
    assert marked_s == [bench.loop.trace.arrays()["time_s"][tick] for tick in (15, 30)] * 6


def test_the_plot_does_not_join_what_was_measured_before_and_after_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    bench = Bench(episodes=2, timeout_s=0.5, reset_time_s=3.0)
    bench.loop.run()
    drawn: dict[str, np.ndarray] = {}
    monkeypatch.setattr(Axes, "plot", lambda self, times_s, values, *_, label, **__: drawn.update({label: np.stack([times_s, values])}))
    plot_joints(bench.loop.trace, tmp_path / "joints.png", "degrees")
    gaps = np.isnan(drawn["measured"]).all(axis=0)
    assert np.flatnonzero(gaps).tolist() == [15], "before the second episode, and at no ordinary tick"
    assert np.array_equal(drawn["measured"][0, ~gaps], bench.loop.trace.arrays()["time_s"])


def frames_of(number: int) -> Observation:
    front, wrist = np.full((48, 64, 3), number, np.uint8), np.full((50, 33, 3), 255 - number, np.uint8)
    return Observation(np.zeros(6), {"front": front, "wrist": wrist}, 0.0)


@pytest.mark.parametrize(("suffix", "magic"), [(".mp4", b"ftyp"), (".gif", b"GIF89a")])
def test_video(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / "new" / f"run{suffix}"
    with VideoRecorder(path, 30.0) as video:
        for number in range(30):
            video.see(frames_of(number))
    assert video.error is None
    assert magic in path.read_bytes()[:16]


def test_a_failing_encoder_never_disturbs_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with VideoRecorder(tmp_path / "file" / "run.mp4", 30.0) as video:
        for number in range(100):
            video.see(frames_of(number))
    assert video.error


def test_an_encoder_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_FINISH_S", 0.3)
    video = VideoRecorder(tmp_path / "run.mp4", 30.0)
    began_s = time.monotonic()
    with video:
        video.see(frames_of(0))
        while video._process is None:
            time.sleep(0.01)
        os.kill(video._process.pid, signal.SIGSTOP)
        for number in range(200):
            video.see(frames_of(number))
    assert time.monotonic() - began_s < 5
    assert "was killed" in video.error
    assert video._process.wait(5) == -signal.SIGKILL


def test_settings_that_are_no_json_numbers_are_written_as_text(bench: Bench, tmp_path: Path) -> None:
    report = build_report(bench.loop, {"reconnect_s": float("inf"), "path": "a\udcffb"})
    loaded = json.loads(write_report(report, tmp_path)[0].read_text())
    assert loaded["settings"] == {"reconnect_s": "inf", "path": "a\udcffb"}


def test_side_by_side_has_even_sizes() -> None:
    assert side_by_side(frames_of(0).frames).shape == (48, 96, 3)


def test_video_suffix_and_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.mp4 or \.gif"):
        VideoRecorder(tmp_path / "run.avi", 30.0)
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingExtraError, match=r"\[plots\]"):
        VideoRecorder(tmp_path / "run.mp4", 30.0)


def test_no_window_is_a_message_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    said: list[str] = []
    assert window_target(said.append) is None
    assert len(said) == 1
    assert "--video=run.mp4" in said[0]


def test_headless_opencv_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:                           NONE\n")
    assert "pip install opencv-python" in display_obstacle()


def window_of(directory: Path, imshow: str) -> None:
    """An OpenCV for the process that shows the window: what `imshow` does, and a q after the second picture."""
    (directory / "cv2.py").write_text(
        "import time\nclass error(Exception): pass\nshown = []\ndef namedWindow(name): pass\n"
        f"def imshow(name, picture):\n    shown.append(picture.shape)\n    open({str(directory / 'shown')!r}, 'a').write('.')\n"
        f"    {imshow}\ndef waitKey(ms): return ord('q') if len(shown) == 2 else -1\n"
    )


def test_a_window_that_stalls_delays_nothing_and_shows_the_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    window_of(tmp_path, "time.sleep(1.5)")
    said: list[str] = []
    quits, took_s = threading.Event(), []
    with Display(DisplayTarget(images=True), "go", "degrees", SO100_JOINTS, ["front"], 30.0, said.append, quits.set) as view:
        for number in range(400):
            began_s = time.perf_counter()
            view.see(frames_of(number % 256))
            took_s.append(time.perf_counter() - began_s)
            time.sleep(0.01)
            if quits.is_set():
                break
        assert quits.wait(20), "q stops the run"
    assert np.median(took_s) < 1e-3
    assert max(took_s) < 1.0, "a window that stalls for 1.5 s"
    assert 2 <= len((tmp_path / "shown").read_text()) < 10, "what it is too slow for is left out"
    assert said == []


def test_a_window_that_fails_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    window_of(tmp_path, "raise error('no window system')")
    said: list[str] = []
    with Display(DisplayTarget(images=True), "go", "degrees", SO100_JOINTS, ["front"], 30.0, said.append) as view:
        for number in range(20):
            view.see(frames_of(number))
            time.sleep(0.05)
    assert len(said) == 1
    assert "--show_images" in said[0]
    assert "no window system" in said[0]
