"""The replay study: recordings, the late policy, the arm, its figures, and what the architectures do - in virtual time, and once for real."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import control_architectures, inference_profiler
from benchmarks.control_architectures import (
    boundary_jumps,
    freeze_s,
    frozen_ticks,
    summarise,
    t95,
)
from benchmarks.lib.latency import needed_actions, parse_latency
from benchmarks.replay import (
    MARKER,
    Cell,
    Motion,
    Setup,
    load_recording,
    made_up,
    run_trial,
)
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.errors import ConfigError

FPS = 50.0


def setup_of(**changes: object) -> Setup:
    base = Setup(made_up(0).cut(0.0, 5.0), FPS, "hold", 0.0, 0.06, 6.0 * FPS, 0, True)
    return replace(base, **changes)


def play(architecture: str, horizon: int, delay: str, scene: str = "moving", trial: int = 0, **changes: object) -> Motion:
    return run_trial(setup_of(**changes), Cell(scene, architecture, horizon, parse_latency(f"{1000 * float(delay):g}")), trial)


# --- recordings -----------------------------------------------------------------------------------------------------------------------


def test_a_csv_is_read_in_degrees_and_its_time_begins_at_zero(tmp_path: Path) -> None:
    file = tmp_path / "take.csv"
    file.write_text("time_s,pan,lift\n10.0,1,2\n10.5,3,6\n\n11.0,5,10\n")
    recording = load_recording(file)
    assert recording.joint_names == ("pan", "lift")
    np.testing.assert_allclose(recording.times_s, [0, 0.5, 1])
    np.testing.assert_allclose(recording.at(np.array([-1, 0.25, 9])), [[1, 2], [2, 4], [5, 10]])
    assert str(tmp_path) not in recording.source


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "pan,lift\n0,1\n", "time_s and then the joints"),
        ("a.csv", "", "time_s and then the joints"),
        ("a.csv", "time_s,pan\n0,1\n1,left\n", "line 3.*left"),
        ("a.csv", "time_s,pan\n0,1\n1,2,3\n", "line 3: 3 numbers for 2 columns"),
        ("a.csv", "time_s,pan\n0,1\n", "at least two samples"),
        ("a.csv", "time_s,pan\n0,1\n0,2\n", "time must increase"),
        ("a.csv", "time_s,pan\n0,1\n1,nan\n", "not finite"),
        ("a.csv", "time_s,pan,pan\n0,1,1\n1,2,2\n", "must differ"),
        ("a.csv", f"time_s,{MARKER}\n0,1\n1,2\n", "must differ"),
        ("a.txt", "time_s,pan\n0,1\n", "neither a directory"),
        ("a.bag", "#ROSBAG V1.2\n", "no readable ROS 1 bag"),
        ("dataset/readme.md", "", "meta/info.json is missing"),
        ("dataset/meta/info.json", "{", "damaged"),
        ("dataset/meta/info.json", '{"codebase_version": "v2.1", "features": {}}', "expected v3"),
        ("dataset/meta/info.json", '{"codebase_version": "v3.0", "features": {}}', "no joint columns"),
    ],
)
def test_a_wrong_recording_is_explained(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_recording(tmp_path / "dataset" if name.startswith("dataset") else file)


def write_bag(path: Path, topics: dict[str, list[tuple[float, list[str], list[float]]]]) -> None:
    """Messages (stamp in s, names, radians) of sensor_msgs/JointState by topic. A stamp of 0 is none."""
    rosbag1, typesys = pytest.importorskip("rosbags.rosbag1"), pytest.importorskip("rosbags.typesys")
    types = typesys.get_typestore(typesys.Stores.ROS1_NOETIC)
    kinds = types.types
    with rosbag1.Writer(path) as writer:
        for topic, messages in topics.items():
            connection = writer.add_connection(topic, "sensor_msgs/msg/JointState", typestore=types)
            for number, (stamp_s, names, radians) in enumerate(messages):
                stamp = kinds["builtin_interfaces/msg/Time"](sec=int(stamp_s), nanosec=round(stamp_s % 1 * 1e9))
                header = kinds["std_msgs/msg/Header"](seq=number, stamp=stamp, frame_id="")
                empty = np.empty(0)
                message = kinds["sensor_msgs/msg/JointState"](header=header, name=names, position=np.array(radians), velocity=empty, effort=empty)
                writer.write(connection, 7 * 10**9 + number * 20_000_000, types.serialize_ros1(message, "sensor_msgs/msg/JointState"))


def test_a_bag_gives_degrees_by_joint_name_and_the_stamps_time(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.bag", {"/joints": [(100.0, ["pan", "lift"], [0.0, np.pi / 2]), (100.25, ["lift", "pan"], [np.pi, -np.pi / 4])]})
    recording = load_recording(tmp_path / "a.bag")
    assert recording.joint_names == ("pan", "lift")
    np.testing.assert_allclose(recording.times_s, [0.0, 0.25])
    np.testing.assert_allclose(recording.values, [[0, 90], [-45, 180]])


def test_the_topic_of_a_bag_must_be_clear(tmp_path: Path) -> None:
    states = [(1.0, ["pan"], [0.0]), (2.0, ["pan"], [1.0])]
    write_bag(tmp_path / "a.bag", {"/follower": states, "/leader": [(1.0, ["pan"], [0.5]), (2.0, ["elbow"], [1.0])]})
    with pytest.raises(ConfigError, match="--topic is needed.*/follower, /leader"):
        load_recording(tmp_path / "a.bag")
    with pytest.raises(ConfigError, match="Did you mean '/follower'"):
        load_recording(tmp_path / "a.bag", topic="/folower")
    with pytest.raises(ConfigError, match="positions of pan; one holds those of elbow"):
        load_recording(tmp_path / "a.bag", topic="/leader")
    assert load_recording(tmp_path / "a.bag", topic="/follower").joint_names == ("pan",)


def test_a_dataset_written_by_lerobot_is_read_without_lerobot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    names = [f"{joint}.pos" for joint in SO100_JOINTS]
    features = {key: {"dtype": "float32", "shape": (6,), "names": names} for key in ("action", "observation.state")}
    dataset = datasets.LeRobotDataset.create("local/test", fps=25, root=tmp_path / "data", features=features, use_videos=False)
    for episode in range(2):
        for frame in range(5):
            joints = np.arange(6, dtype=np.float32) + 10 * frame + 100 * episode
            dataset.add_frame({"action": joints, "observation.state": joints - 1, "task": "none"})
        dataset.save_episode()
    dataset.finalize()
    recording = load_recording(tmp_path / "data", episode=1)
    assert recording.joint_names == SO100_JOINTS
    np.testing.assert_allclose(recording.times_s, np.arange(5) / 25, atol=1e-6)
    np.testing.assert_allclose(recording.values[2], np.arange(6) + 120)
    assert load_recording(tmp_path / "data", column="observation.state").values[0, 0] == -1
    with pytest.raises(ConfigError, match="no episode 2"):
        load_recording(tmp_path / "data", episode=2)
    with pytest.raises(ConfigError, match="Did you mean 'action'"):
        load_recording(tmp_path / "data", column="actions")


# --- delays ---------------------------------------------------------------------------------------------------------------------------


def test_a_measured_delay_is_drawn_from_the_percentiles_of_a_result(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(
        json.dumps({"times_ms": {"ours": {"total": {"p50": 100, "p95": 200, "p99": 400, "max": 500}, "vision": {"p50": 1, "p95": 1, "p99": 1}}}})
    )
    delay = parse_latency(f"measured:{file}")
    samples = np.array([delay.sample_s(np.random.default_rng([0, k])) for k in range(4000)])
    assert samples.min() == pytest.approx(0.1)
    assert samples.max() <= 0.5
    np.testing.assert_allclose(np.percentile(samples, [50, 95]), [0.1, 0.2], atol=0.02)
    assert delay.ticks(FPS) == 20
    assert parse_latency(f"measured:{file}#times_ms.ours.vision").ticks(FPS) == 1
    file.write_text(json.dumps({"a": {"p50": 1, "p95": 1, "p99": 1}, "b": {"p50": 1, "p95": 1, "p99": 1}}))
    with pytest.raises(ConfigError, match="#PLACE: a, b"):
        parse_latency(f"measured:{file}")


@pytest.mark.parametrize("text", ["-1", "800000", "fast", "nan", "measured:/nowhere.json"])
def test_a_wrong_delay_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--latency_ms"):
        parse_latency(text)


# --- policy and arm -------------------------------------------------------------------------------------------------------------------


# --- figures --------------------------------------------------------------------------------------------------------------------------


def motion_of(targets: np.ndarray, sent_s: np.ndarray, **changes: object) -> Motion:
    count = len(targets)
    grid_s = np.arange(0, sent_s[-1] + 0.01, 0.02)
    none = np.zeros((len(grid_s), 2))
    base = Motion(
        0.02,
        ("pan", "gripper"),
        sent_s,
        targets,
        sent_s.copy(),
        np.zeros(count, bool),
        np.array([0]),
        np.array([True]),
        grid_s,
        none,
        none,
        0,
        0,
        True,
    )
    return replace(base, **changes)


def test_a_pause_counts_as_freeze_jump_and_nothing_else() -> None:
    """One degree per tick, and half a second of pause before the 21st target, which is where the 20th was to go on."""
    sent_s = np.concatenate([np.arange(20), np.arange(45, 60)]) * 0.02
    targets = np.column_stack([np.arange(35.0), 100 * np.arange(35.0)])  # the gripper's jumps are not in degrees
    motion = motion_of(targets, sent_s, entries=np.array([0, 20]), waited=np.array([True, True]))
    assert frozen_ticks(motion) == 25
    assert freeze_s(motion) == pytest.approx(0.5)
    jumps = boundary_jumps(motion, [0])
    assert jumps["boundary_jump_deg_s"] == pytest.approx(50.0)
    assert jumps["boundary_step_deg"] == pytest.approx(1.0)
    missed = replace(motion, entries=np.array([0]), waited=np.array([True]))
    assert frozen_ticks(missed) == 0
    assert boundary_jumps(missed, [0])["boundary_jump_deg_s"] == 0.0


def test_starved_ticks_freeze_and_the_jump_after_them_is_at_a_boundary() -> None:
    pan = np.concatenate([np.arange(10.0), np.full(5, 9.0), 20 + np.arange(10.0)])
    starved = np.zeros(25, bool)
    starved[10:15] = True
    motion = motion_of(np.column_stack([pan, pan]), np.arange(25) * 0.02, starved=starved, entries=np.array([0, 15]), waited=np.array([True, False]))
    assert frozen_ticks(motion) == 5
    assert freeze_s(motion) == pytest.approx(0.1)
    assert boundary_jumps(motion, [0]) == {"boundary_jump_deg_s": pytest.approx(11 / 0.02), "boundary_step_deg": pytest.approx(11.0)}


def test_confidence_intervals_are_students() -> None:
    summary = summarise([{"a": value, "joints": {"pan": value}} for value in (1.0, 2.0, 3.0)])
    assert summary["a"] == summary["joints"]["pan"] == {"mean": 2.0, "ci95": pytest.approx(4.303 / 3**0.5, abs=1e-3), "max": 3.0}
    assert summarise([{"a": 1.0}])["a"]["ci95"] is None
    for freedom, quantile in {1: 12.706, 20: 2.086, 21: 2.080, 30: 2.042, 31: 2.040, 40: 2.021, 60: 2.000, 120: 1.980, 10**6: 1.960}.items():
        assert t95(freedom) == pytest.approx(quantile, abs=1.1e-3)


# --- architectures, in virtual time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["moving", "still"])
@pytest.mark.parametrize("delay_ticks", [0, 7, 40])
def test_threaded_never_freezes_from_the_documented_chunk_length_on(scene: str, delay_ticks: int) -> None:
    motion = play("threaded", max(4, needed_actions(delay_ticks)), str(delay_ticks / FPS), scene)
    assert frozen_ticks(motion) == 0
    assert motion.finished
    assert np.abs(motion.sent_s - motion.played_s).max() < 1.1 / FPS  # each action at its moment


@pytest.mark.parametrize("scene", ["moving", "still"])
def test_sync_freezes_for_every_inference_but_the_first(scene: str) -> None:
    motion = play("sync", 50, "0.8", scene)
    pauses = int((motion.waited & (motion.entries > 0)).sum())
    assert pauses >= 2
    assert freeze_s(motion) == pytest.approx(0.8 * pauses, abs=0.03 * pauses)
    assert frozen_ticks(motion) == pytest.approx(40 * pauses, abs=pauses)


# --- for real -------------------------------------------------------------------------------------------------------------------------


def test_in_real_time_server_and_threaded_go_on_where_sync_freezes() -> None:
    """An inference of 10 ticks begins with 40 actions left: the machine may be late by more than half a second."""
    recording = made_up(0).cut(0.0, 1.8)
    motions = {name: play(name, 80, "0.2", virtual=False, recording=recording) for name in ("server", "threaded")}
    for motion in motions.values():
        assert motion.finished
        assert frozen_ticks(motion) == 0
        assert len(motion.entries) > 1  # chunks did arrive while it moved
        assert np.abs(motion.sent_s - motion.played_s).max() < 0.2 < 1.6 < motion.played_s[-1]
    sync = play("sync", 30, "0.2", virtual=False, recording=recording)
    assert frozen_ticks(sync) >= 10


# --- programs -------------------------------------------------------------------------------------------------------------------------


def test_the_study_writes_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "take.csv"
    recording = made_up(1).cut(0.0, 3.0)
    joints = SO100_JOINTS[:2]
    np.savetxt(file, np.column_stack([recording.times_s, recording.values[:, :2]]), delimiter=",", header=",".join(["time_s", *joints]), comments="")
    out = tmp_path / "out"
    flags = [f"--recording={file}", "--virtual", "--rounds=2", "--latency_ms", "500", "--actions_per_chunk", "30", "60", f"--out={out}"]
    assert control_architectures.main([*flags, "--json"]) == 0
    printed, result = json.loads(capsys.readouterr().out.splitlines()[-1]), json.loads((out / "results.json").read_text())
    assert printed == control_architectures.without_joints(result)
    assert set(result["rows"][1]["figures"]["joints"]["rmse_aligned"]) == set(joints)
    rows = {(row["scene"], row["architecture"], row.get("actions_per_chunk")): row["figures"] for row in result["rows"]}
    assert rows["moving", "threaded", 60]["frozen_ticks"]["max"] == 0 < rows["moving", "threaded", 30]["frozen_ticks"]["mean"]
    assert rows["still", "sync", 30]["frozen_ticks"]["mean"] > 0
    assert any("must starve" in note and "54 actions" in note for note in result["notes"])
    assert "| still | 500 ms | 60 | threaded |" in (out / "table.md").read_text()
    assert str(tmp_path) not in (out / "results.json").read_text() + (out / "table.md").read_text()
    for name in ("all_joints_comparison.png", "comparison_joints.png", "comparison_errors.png"):
        assert (out / name).stat().st_size > 10_000
    runs = sorted((out / "runs").glob("*/trial1"))
    assert len(runs) == 14  # two scenes, each architecture of virtual time with each length; the scene that moves by itself has no `threaded_resume`
    for run in runs:
        original, inferred = (np.loadtxt(run / f"{kind}.csv", delimiter=",", skiprows=1) for kind in ("org", "infer"))
        assert original.shape == inferred.shape
        assert original.shape[1] == 3
        assert len(original) >= 149
        assert (run / "org.csv").read_text().startswith("time_s,shoulder_pan")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--virtual", "--architectures", "server"], "real time only"),
        (["--virtual", "--latency_ms", "1000", "--architectures", "threaded", "--actions_per_chunk", "20"], "all would be over"),
        (["--virtual", "--latency_ms", "0", "--architectures", "threaded_resume"], "nothing to run"),
        (["--virtual", "--rounds", "0"], "must be at least 1"),
    ],
)
def test_flags_that_cannot_work_are_explained(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert control_architectures.main([*flags, f"--out={tmp_path}"]) == 1
    assert message in capsys.readouterr().err


# --- the profiler ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p99_s", "fps", "horizon"), [(0.05, 30, 16), (0.19, 50, 50), (0.8, 50, 84)])
def test_what_the_profiler_advises_keeps_the_arm_moving(p99_s: float, fps: float, horizon: int) -> None:
    advice = inference_profiler.advise(p99_s, fps, horizon)
    assert advice.controller == "threaded"
    assert advice.needed_actions_per_chunk <= horizon
    motion = play("threaded", horizon, str(p99_s), fps=fps)
    assert frozen_ticks(motion) == 0
    assert motion.finished


def test_a_chunk_of_less_than_twice_the_delay_starves() -> None:
    """The formula is not merely generous."""
    assert frozen_ticks(play("threaded", 2 * 40 - 2, "0.8")) > 0


def test_the_profiler_says_when_sync_is_enough_and_when_nothing_is() -> None:
    assert not inference_profiler.advise(0.015, 50, 16).sync_is_enough  # bus and cameras want their part of the 20 ms
    quick = inference_profiler.advise(0.010, 50, 16)
    assert quick.sync_is_enough
    assert quick.controller == "sync"
    assert quick.sync_pause_ticks_per_chunk == 0
    assert frozen_ticks(play("sync", 16, "0.010")) == 0
    slow = inference_profiler.advise(0.8, 50, 16)
    assert not slow.sync_is_enough
    assert slow.controller == "sync"
    assert not slow.bridges
    assert "84 are needed" in slow.reason
    assert slow.highest_fps_without_pauses == pytest.approx(7.5)
    assert inference_profiler.advise(0.8, 7.5, 16).bridges
    with pytest.raises(ConfigError):
        inference_profiler.advise(float("nan"), 50, 16)


@pytest.mark.parametrize("p99_s", [0.02, 0.19, 0.8])
@pytest.mark.parametrize("horizon", [1, 8, 17])
def test_at_the_highest_rate_that_is_advised_the_arm_does_not_pause(p99_s: float, horizon: int) -> None:
    highest = inference_profiler.advise(p99_s, 30, horizon).highest_fps_without_pauses
    for fps, pauses in ((highest, False), (highest + 0.11, True)):  # a tenth is what rounding down may cost
        advice = inference_profiler.advise(p99_s, fps, horizon)
        assert (not advice.bridges and not advice.sync_is_enough) == pauses
    assert inference_profiler.advise(0.13, 30, 16).highest_fps_without_pauses == 46.1


def test_the_profiler_reads_a_measured_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inference_profiler.main(["--latency-ms=100", "--fps", "30", f"--out={tmp_path}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["latency_ms"]["p99"] == pytest.approx(100)
    assert result["advice"][0]["delay_ticks"] == 3
    assert (tmp_path / "inference_profiler.png").exists()
