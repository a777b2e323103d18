"""Figures of a run whose times are known exactly, and what is written to disk."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from control_fakes import TICK_S, Bench

from gr00t_fast.base.errors import ConfigError, RecordingError
from gr00t_fast.record.report import SCHEMA, Outputs, build_report, contents, sections, text_of, write_files


def report_of(bench: Bench, **kwargs: object) -> dict:
    return build_report(bench.loop, {"model_path": "m"}, **kwargs)


@pytest.fixture
def bench() -> Bench:
    bench = Bench(inference_s=0.2, timeout_s=2.0)
    bench.loop.run()
    return bench


def test_figures_of_a_known_run(bench: Bench) -> None:
    report = report_of(bench)
    assert report["schema"] == SCHEMA
    data = bench.loop.trace.arrays()
    assert report["run"]["ticks"] + data["underrun"].sum() == len(bench.robot.sent) == len(data["underrun"])
    assert report["run"]["playback_hz"] == pytest.approx(30, abs=0.01)
    times_s = data["time_s"][~data["underrun"]]
    assert report["run"]["achieved_hz"] == pytest.approx((len(times_s) - 1) / (times_s[-1] - times_s[0]), abs=0.01)
    assert "Hz from first to last target" in text_of(sections(report)), "what the figure leaves out"
    assert report["run"]["achieved_hz"] < 30
    assert report["stages_ms"]["infer"]["p50"] == pytest.approx(200)
    assert report["stages_ms"]["infer/network"]["p99"] == 4.0
    assert report["pacing"]["pause_per_chunk_ms"]["p50"] == pytest.approx(200 - 1000 * TICK_S, abs=0.01)
    assert report["pacing"]["missed_ticks"] == 0
    assert report["pacing"]["waiting_for_inference_ticks"] == 5 * (report["run"]["inferences"] - 1) == data["underrun"].sum()
    assert report["pacing"]["tick_error_ms"]["max"] == pytest.approx(0, abs=1e-3)
    assert report["tracking_error"]["joints"]["gripper"]["max"] == 0
    assert report["events"] == {"read_retry": 2}
    assert report["landing"]["safe"] is True
    assert {"observe", "infer", "send", "wait"} <= set(report["stages_ms"])


def test_safety_counts_are_per_joint() -> None:
    bench = Bench(timeout_s=1.0)
    bench.policy.on_action = lambda targets: targets + np.array([0, 0, 0, 0, 0, 200.0])
    bench.loop.run()
    safety = report_of(bench)["safety"]
    assert safety["clamped"]["gripper"] == 29
    assert safety["clamped"]["elbow_flex"] == 0
    assert safety["speed_limited"]["gripper"] > 0


def test_a_run_that_failed_at_connect_and_a_dry_run_have_a_report(tmp_path: Path) -> None:
    failed, dry = Bench(), Bench(dry_run=True)
    failed.robot.on_connect = lambda: (_ for _ in ()).throw(OSError("no port"))
    with pytest.raises(OSError, match="no port"):
        failed.loop.run()
    dry.loop.run()
    assert report_of(failed)["safety"] is None
    assert "a dry run" in text_of(sections(report_of(dry)))
    for bench in (failed, dry):
        assert report_of(bench)["run"]["ticks"] == 0
        Outputs(tmp_path).write(bench.loop, {}, [])
        assert not (tmp_path / "report.html").exists(), "nothing was played"
    assert (tmp_path / "report.json").is_file()


def test_unwritable_directory(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="--out"):
        write_files(tmp_path / "file" / "out", contents(bench.loop.trace, report_of(bench)))
    with pytest.raises(ConfigError, match="--out"):
        Outputs(tmp_path / "file" / "out")


HOSTILE = "<script>alert('x')</script> & \udcff"


def test_the_page_is_whole_and_takes_nothing_of_a_user_for_markup(tmp_path: Path) -> None:
    bench = Bench(inference_s=0.2, timeout_s=2.0)
    bench.robot.cameras = {"front": type(bench.robot.cameras["front"])(1280, 720, 30.0)}
    outputs = Outputs(tmp_path)
    bench.loop.observers = outputs.observers
    with outputs:
        bench.loop.run()
    outputs.write(bench.loop, {"lang_instruction": HOSTILE, "robot": {"type": "fake", "cameras": {"front": {"fps": 30}}}}, ["look <out>"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = re.findall(r'<img alt="([^"]+)" src="data:image/(?:png|jpeg);base64,([^"]+)"', page)
    pictures = {name: cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_COLOR) for name, content in found}
    assert set(pictures) == {"joints", "pace", "front, first", "front, last"}
    assert all(picture is not None for picture in pictures.values())
    assert pictures["front, first"].shape == (360, 640, 3), "large pictures are made smaller"
    words = ("infer/network", "tick error", "elbow_flex", "robot.cameras.front.fps", "look <out>", "200.00", "python")
    for word in (*words, f"{(~bench.loop.trace.arrays()['underrun']).sum()} ticks, 0 missed", HOSTILE.replace("\udcff", "\\udcff")):
        assert html.escape(word) in page, word
    assert not re.search(r"<(script|link|iframe|object|embed|form|base|a)\b", page)
    assert all(value.startswith("data:") for value in re.findall(r'\b(?:src|href|on\w+)="([^"]*)"', page)), "it loads nothing"
    assert "default-src 'none'" in page
    for tag in ("table", "tr", "td", "th", "p", "figure"):
        assert len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>")
