"""`gr00t-fast doctor` names deliberate mistakes of a set-up, and passes one without any: a virtual servo bus, virtual cameras, small checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arm_bench
import numpy as np
import pytest
import torch
import virtual_camera
from exports import target_for

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.cli.main import main
from gr00t_fast.engine.manifest import STAGES, Digests, Manifest, describe_files
from gr00t_fast.robots.calibration import JointCalibration, save_calibration
from gr00t_fast.robots.feetech import Register
from gr00t_fast.robots.lerobot_glue import readings
from gr00t_fast.virtual.bus import VirtualBus

ROOT = Path(__file__).resolve().parents[3]
TRAINED = ROOT / "checkpoints" / "so100-sim-reach"

pytest.importorskip("serial", reason="needs `pip install 'gr00t_fast[robot]'`")


@pytest.fixture
def flags(bus: VirtualBus, tmp_path: Path) -> list[str]:
    """Of a set-up without mistakes, but for its camera, which is drawn."""
    save_calibration(bus.calibration, tmp_path / "black.json")
    bus.push("wrist_flex", 70)  # to where the recordings began
    bus.push("wrist_roll", -85)
    arm = [f"--robot.port={bus.port}", "--robot.id=black", f"--robot.calibration_dir={tmp_path}", "--robot.cameras={webcam: {type: sim}}"]
    return ["--robot.type=so100_follower", *arm, f"--model_path={TRAINED}"]


def asked(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """Exit code, result, and all that failed or warned as one text."""
    code = main(["doctor", "--json", *words])
    result = json.loads(capsys.readouterr().out)
    return code, result, "\n".join(f"{row['what']} {row['what_to_do']}" for row in result["rows"] if row["state"] != "ok")


def test_a_set_up_without_mistakes(bus: VirtualBus, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    registers = [bytes(servo.registers) for servo in bus.servos]
    code, result, _ = asked(flags, capsys)
    assert code == 0, result
    shown = "\n".join(row["what"] for row in result["rows"])
    assert all(f"servo {number} (" in shown for number in range(1, 7))
    assert "12.1 V, 31 C, firmware 3.10" in shown
    assert {row["state"] for row in result["rows"] if row["section"] == "engines"} == {"ok"}, "those that are not asked for are no problem"
    assert torch.cuda.is_available() or not Path("/proc/meminfo").exists() or "this machine's memory has" in shown
    assert registers == [bytes(servo.registers) for servo in bus.servos], "the servos are only read"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda bus: bus.inject("absent:servo=3"), ["servo 3 (elbow_flex) does not answer"]),
        (lambda bus: bus.inject("absent"), ["no servo answers", "power supply"]),
        (lambda bus: bus.servos[2].registers.__setitem__(Register.PRESENT_TEMPERATURE, 74), ["servo 3 (elbow_flex) is too hot: 74 C"]),
        (lambda bus: bus.inject("wrong_model:servo=2"), ["servo 2 (shoulder_lift) is of model 1284"]),
        (lambda bus: bus.inject("error:servo=6,bits=32"), ["servo 6 (gripper) reports overload"]),
        (lambda bus: bus.servos[2].registers.__setitem__(Register.TORQUE_ENABLE, 1), ["servo 3 (elbow_flex) is powered"]),
    ],
)
def test_a_fault_of_the_arm_is_named(
    spoil: Callable[[VirtualBus], None], named: list[str], bus: VirtualBus, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(bus)
    code, _, told = asked(flags, capsys)
    assert all(word in told for word in named), told
    assert code == ("is powered" not in told)


def test_a_calibration_of_another_arm_a_damaged_and_a_missing_one(
    bus: VirtualBus, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrist = bus.calibration["wrist_flex"]
    other = JointCalibration(wrist.id, 0, wrist.homing_offset + 33, wrist.range_min, wrist.range_max)
    save_calibration({**bus.calibration, "wrist_flex": other}, tmp_path / "black.json")
    assert "of another arm: wrist_flex.homing_offset" in asked(flags, capsys)[2]
    (tmp_path / "black.json").write_text('{"gripper": {}}')
    assert "no calibration of an SO-100" in asked(flags, capsys)[2]
    (tmp_path / "black.json").unlink()
    assert "lerobot-calibrate" in asked(flags, capsys)[2]


@pytest.mark.parametrize(
    ("change", "named", "code"),
    [
        (lambda copy: os.truncate(copy / "model.safetensors", 6_000_000), ["incomplete", "cut short"], 1),
        (shutil.rmtree, ["is not usable"], 1),
        (lambda copy: (copy / "eagle2_hg_model" / "tokenizer.json").unlink(), ["no tokenizer files"], 0),
        ("--embodiment_tag=gr1", ["gr1", "--embodiment_tag=new_embodiment"], 1),
        ("--robot.cameras={front: {type: sim}, side: {type: sim}}", ["webcam", "--camera_map"], 1),
        ("--robot.cameras={webcam: {type: opencv, index_or_path: 97}}", ["webcam cannot be opened", "97"], 1),
        ("--engine=openvino", ["exports/openvino", "no exported engine"], 1),
    ],
)
def test_a_checkpoint_that_cannot_run_is_named(
    change: Callable[[Path], object] | str, named: list[str], code: int, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(TRAINED, copy)
    more = [change] if isinstance(change, str) else []
    more or change(copy)
    got, _, told = asked([*flags, f"--model_path={copy}", *more], capsys)
    assert all(word in told for word in named), told
    assert got == code, told


def trained_otherwise(directory: Path, joint: int, low: float, high: float) -> str:
    """The flag of a checkpoint whose data lies in this range for a joint, an index."""
    copy = shutil.copytree(TRAINED, directory / "other")
    file = copy / "experiment_cfg" / "metadata.json"
    metadata = json.loads(file.read_text())
    for what in ("state", "action"):
        of_arm = metadata["new_embodiment"]["statistics"][what]["single_arm"]
        for name, value in {"min": low, "q01": low, "mean": (low + high) / 2, "q99": high, "max": high, "std": (high - low) / 4}.items():
            of_arm[name][joint] = value
    file.write_text(json.dumps(metadata))
    return f"--model_path={copy}"


@pytest.mark.parametrize("led", [False, True])
@pytest.mark.parametrize("unit", ["degrees", "range"])
def test_doctor_says_of_pose_and_range_what_a_run_says(
    led: bool, unit: str, bus: VirtualBus, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arm stands where another program left it: a run refuses, and only warns where it is led away. The data reaches beyond the arm."""
    bus.push("wrist_roll", -62)  # to -147
    other = trained_otherwise(tmp_path, 4, 3.0, 3.0) if unit == "degrees" else trained_otherwise(tmp_path, 2, -20.0, 101.5)
    same = [*flags, other, *(["--home=[0, 0, 0, 0, 0, 10]"] if led else [])]
    if unit == "range":
        bus.push("wrist_roll", 62)
    stop = "--timeout=0.1", "--lang_instruction=reach", "--dry_run"
    ran = main(["run", *same, *stop])
    said = "".join(capsys.readouterr())
    code, result, told = asked(same, capsys)
    assert code == ran == (unit == "degrees" and not led), told
    rows = [row for row in result["rows"] if row["section"] == "fit" and row["state"] in ("warn", "fail")]
    assert [row["what"].partition(":")[0] for row in rows] == ["wrist_roll" if unit == "degrees" else "elbow_flex"]
    assert rows[0]["what"] in said, "in the run's own words"


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--device=cuda:7", "cuda:7"),
        ("--engine=cuda_graph", "cuda_graph"),
        ("--denoising_steps=100000", "denoising_steps"),
        ("--home=[0, 0, 0, 0, 170, 10]", "wrist_roll 170"),
        ("--robot.watchdog_s=0.01", "watchdog_s"),
    ],
)
def test_what_a_run_refuses_is_no_set_up_that_is_ready(flag: str, named: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each is refused by a run before its arm moves."""
    code = main(["doctor", *flags, flag])
    said = "".join(capsys.readouterr())
    assert code != 0
    assert named in said
    if flag.startswith("--robot"):
        return
    assert main(["run", *flags, flag, "--timeout=0.1", "--lang_instruction=reach", "--dry_run"]) != 0


@pytest.mark.parametrize("use_degrees", [True, False])
def test_readings_are_those_of_the_driver(use_degrees: bool, bus: VirtualBus, tmp_path: Path) -> None:
    bus.push("elbow_flex", -95)  # outside its range, by less than is refused (4 degrees)
    bus.push("elbow_flex", 3)
    bus.push("wrist_flex", 70)
    with arm_bench.connected(tmp_path, bus, engaged=False, use_degrees=use_degrees) as (_, arm):
        seen = arm.observe().joints
    positions = {joint: servo.position for joint, servo in zip(SO100_JOINTS, bus.servos, strict=True)}
    np.testing.assert_allclose(readings(positions, bus.calibration, use_degrees), seen, atol=1e-9)


def test_drawn_cameras_are_drawn(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cv2

    simulated = ["--robot.type=so100_sim", "--robot.cameras={webcam: {type: sim}}", f"--model_path={TRAINED}"]
    for number, words in enumerate((flags, simulated)):
        out = tmp_path / str(number)
        assert asked([*words, f"--out={out}"], capsys)[0] == 0
        assert cv2.imread(str(out / "camera_webcam.png")).shape == (480, 640, 3)
        assert (out / "cameras.png").is_file()


def test_a_stale_export_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(TRAINED, tmp_path / "checkpoint"))
    made = copy / "exports" / "onnxruntime"
    made.mkdir(parents=True)
    identity, stages = target_for(copy).identity(Digests(made)), {stage: {"file": "a.onnx", "inputs": {}, "outputs": {}} for stage in STAGES}
    (made / "a.onnx").write_bytes(b"its bytes alone count")
    command = {"versions": {}, "command": "", "program": "to_onnx.py", "flags": ()}
    Manifest("onnx", "fp32", identity, shapes={}, denoising_steps=(1,), stages=stages, files=describe_files(made), **command).write(made)
    assert asked([f"--model_path={copy}", "--engine=onnxruntime"], capsys)[0] == 0
    with (copy / "model.safetensors").open("r+b") as file:  # trained on: another weight
        file.seek(-1, os.SEEK_END)
        file.write(b"\x11")
    assert "other weights" in asked([f"--model_path={copy}", "--engine=onnxruntime"], capsys)[2]
    assert asked([f"--model_path={copy}"], capsys)[0] == 0, "an engine that is not asked for only warns"


def test_a_missing_extra_is_named(flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lerobot" else find_spec(name, *rest))
    assert "[robot]" in asked(flags, capsys)[2]


@pytest.mark.slow
def test_pictures_of_cameras_and_mistakes_with_them(flags: list[str], tmp_path: Path) -> None:
    """In a process of its own: OpenCV looks for its plugins once."""
    import cv2

    if virtual_camera.compiler() is None:
        pytest.skip("needs a C compiler for the virtual camera (apt install gcc)")
    virtual_camera.build_plugin(tmp_path)
    red, blue = np.zeros((480, 640, 3), np.uint8), np.zeros((480, 640, 3), np.uint8)
    red[..., 2] = blue[..., 0] = np.linspace(0, 255, 640)  # BGR
    for number, picture in enumerate((red, blue, red + blue)):
        virtual_camera.write_camera(tmp_path, number, picture)

    out, good = tmp_path / "seen", "{type: opencv, index_or_path: %d, width: 640, height: 480, fps: 30}"
    wrong = "gone: {type: opencv, index_or_path: 7}, wide: {type: opencv, index_or_path: 2, width: 1280}, twin: {type: opencv, index_or_path: 1}"
    words = [*flags, f"--robot.cameras={{wrist: {good % 0}, webcam: {good % 1}, {wrong}}}", f"--out={out}"]
    environment = {**virtual_camera.plugin_environment(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gr00t_fast", "doctor", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert {file.name for file in out.iterdir()} == {"camera_wrist.png", "camera_webcam.png", "cameras.png", "doctor.json", "doctor.txt"}
    assert cv2.imread(str(out / "camera_wrist.png"))[..., 2].mean() > 100, "index 0 is the red one"
    assert cv2.imread(str(out / "camera_webcam.png"))[..., 0].mean() > 100
    assert cv2.imread(str(out / "cameras.png")).shape[1] > 2 * 400
    for named in ("(index_or_path: 7)", "1280 (actual_width=640", "webcam and twin are the same device"):
        assert named in done.stdout, done.stdout
