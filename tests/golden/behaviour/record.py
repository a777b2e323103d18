"""What the product does, as bytes: recorded before a refactoring, recorded again after each step, and compared.

    python tests/golden/behaviour/record.py [--only=actions,control,bus,wire,exports,dataset,pictures]
    git diff --stat tests/golden/behaviour

Each section writes one JSON file beside this script: a name for every array, file or message, with its digest and, of arrays, shape and first values.
A difference is a change of behaviour, and the commit that makes it says why. Actions and exports depend on the processor and on the versions of the
libraries: on another machine record the commit before the work first. Golden checkpoints are looked for in GR00T_FAST_SHARED, or beside the project.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
SHARED = Path(os.environ.get("GR00T_FAST_SHARED") or ROOT.parent / "shared")
DEMO = ROOT / "checkpoints" / "so100-sim-reach"
FPS = 30.0
Record = tuple[str, Any]


def digest(value: Any) -> Any:
    """Arrays: shape, digest of the bytes, first values. Bytes: length and digest. Others as they are."""
    if isinstance(value, np.ndarray):
        shown = [repr(number) for number in value.ravel()[:3].tolist()]
        return {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": hashlib.sha256(value.tobytes()).hexdigest()[:16], "begins": shown}
    if isinstance(value, bytes):
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()[:16]}
    return value


# Actions of every engine that runs without a GPU


def actions() -> Iterator[Record]:
    with tempfile.TemporaryDirectory() as directory:
        for family, processor, cases in (
            ("golden", "eagle2_hg_model", {"so100": "so100", "so100_dualcam": "so100_dualcam"}),
            ("golden_n1d7", "qwen3_vl_processor", dict.fromkeys(sorted(p.name for p in (SHARED / "golden_n1d7").glob("so101*")))),
        ):
            for case, data_config in cases.items():
                yield from _case_actions(SHARED / family / case, SHARED / processor, data_config, Path(directory) / case)


def _case_actions(case: Path, processor: Path, data_config: str | None, exports: Path) -> Iterator[Record]:
    from gr00t_fast import load_policy

    with np.load(case / "observation.npz") as file:
        recorded = dict(file)
    instruction = str(recorded.get("instruction", "Place the block in the bowl"))
    with np.load(case / "expected.npz") as file:
        noise = file["noise"]
    observation: dict[str, Any] = {key: value for key, value in recorded.items() if key.startswith(("video.", "state."))}
    observation["annotation.human.task_description"] = [instruction]
    common = {"data_config": data_config, "processor_path": processor, "device": "cpu"}
    engines: dict[str, dict[str, Any]] = {"eager fp32": {"precision": "fp32"}, "eager bf16": {"precision": "bf16"}}
    height, width = next(value.shape[-3:-1] for key, value in observation.items() if key.startswith("video."))
    size = [] if data_config else [f"--camera_size={width}x{height}"]  # an export of N1.7 is made for one shape of camera
    for name, path in _exported(case, common, size, exports).items():
        engines[name] = {"engine": name.split()[0], "engine_path": path}
    for name, options in engines.items():
        policy = load_policy(case / "checkpoint", **common, **options)
        for steps in (1, 4):
            policy.denoising_steps = steps
            for key, value in policy.get_action(observation, noise=noise).items():
                yield f"{case.name}/{name}/{steps} steps/{key}", value
        for method in sorted(policy.continues):
            yield from _continued(policy, observation, noise, f"{case.name}/{name}/{method}", method)


def _continued(policy: Any, observation: dict[str, Any], noise: np.ndarray, name: str, method: str) -> Iterator[Record]:
    from gr00t_fast.base.contracts import ActionPrefix

    batched = any(value.ndim == 5 for key, value in observation.items() if key.startswith("video."))
    single = {key: value[0] if batched and isinstance(value, np.ndarray) else value for key, value in observation.items()}
    before = policy.get_action(single, noise=noise)
    prefix = ActionPrefix({key: rows[4:] for key, rows in before.items()}, 3, method)
    for key, value in policy.get_action(single, noise=-noise, prefix=prefix).items():
        yield f"{name}/{key}", value


def _exported(case: Path, common: dict[str, Any], size: list[str], out: Path) -> dict[str, Path]:
    flags = [f"--model_path={case / 'checkpoint'}", f"--processor_path={common['processor_path']}"]
    flags += [f"--data_config={common['data_config']}"] if common["data_config"] else []
    program("export", "onnx", *flags, *size, f"--out={out / 'onnx'}", "--denoising_steps=1,4")
    made = {"onnxruntime fp32": out / "onnx", "openvino fp32": out / "onnx"}
    if case.name not in ("so100", "so101"):  # one of each network: quantising takes most of the time
        return made
    flags += ["--target=onnxruntime", "--observations=random:0", "--trial_frames=0"]
    program("quantise", *flags, f"--onnx={out / 'onnx'}", f"--out={out / 'int8'}")
    return made | {"onnxruntime int8": out / "int8"}


def program(*arguments: str) -> None:
    """A command of the product, as a user calls it. Raises RuntimeError with what it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "gr00t_fast", *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"gr00t-fast {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def exports() -> Iterator[Record]:
    """Files of an export of the demo's network: graphs and weights by their bytes, the manifest without what a run stamps on it."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "onnx"
        program("export", "onnx", f"--model_path={DEMO}", "--data_config=so100", f"--out={out}")
        for file in sorted(path for path in out.rglob("*") if path.is_file()):
            if file.suffix == ".json":
                yield f"onnx/{file.relative_to(out)}", sorted(key.replace(str(ROOT), "PROJECT") for key in json.loads(file.read_text()))
            elif file.suffix != ".md":
                yield f"onnx/{file.relative_to(out)}", file.read_bytes()


# The control loop in virtual time, with the demo's network


def control() -> Iterator[Record]:
    from control_fakes import FakeClock, FakeRobot
    from gr00t_fast.control.controller import ChunkController, ControllerOptions
    from virtual_worker import Call, VirtualWorker

    from gr00t_fast import load_policy
    from gr00t_fast.base.contracts import SO100_JOINTS
    from gr00t_fast.control.binding import RobotBinding
    from gr00t_fast.control.loop import ControlLoop, LoopOptions
    from gr00t_fast.control.pacer import StopSignals

    class Slow(VirtualWorker):
        """Each outcome is there after 0.2 s of the loop's time."""

        def submit(self, call: Callable[[], Any]) -> Any:
            return Call(call).at(clock.now_s() + 0.2, clock)

    policy = load_policy(DEMO, data_config="so100", device="cpu", precision="fp32", seed=0)
    known = policy.metadata
    for name, smoothing in (("sync", None), ("threaded", "none"), ("rtc", "rtc"), ("prefix", "prefix")):
        clock, policy.last_timing = FakeClock(), {}
        policy.seed(0) if hasattr(policy, "seed") else None
        robot = FakeRobot(clock, {"front": (64, 48)})
        binding = RobotBinding(policy.get_modality_config(), known.state_widths, known.action_widths, SO100_JOINTS, {"front": "webcam"})
        how = [ControllerOptions("sync", action_horizon=8)] if smoothing is None else [ControllerOptions("threaded", smoothing), Slow([0])]
        controller = ChunkController(policy, binding, "reach", clock, FPS, *how)
        options = LoopOptions(FPS, episodes=2, timeout_s=2.0, seed=0)
        ControlLoop(robot, controller, options, clock, StopSignals(), echo=lambda line: None).run()
        yield f"{name}/times_s", np.array([time_s for time_s, _ in robot.sent])
        yield f"{name}/goals", np.array([goal for _, goal in robot.sent])


# Writes on the servo bus

FAULTS = (None, "silent:servo=3", "unplug", "unplug:at_s=0.01,for_s=0.3", "error:servo=3,bits=32", "error:servo=3,bits=4", "delay:ms=30")


def bus() -> Iterator[Record]:
    import pytest
    from arm_bench import make_arm

    from gr00t_fast.virtual.bus import VirtualBus
    from gr00t_fast.virtual.bus.servo import Servo

    writes: list[str] = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        plain = Servo.write

        def noted(servo: Servo, register: int, data: bytes) -> Any:
            writes.append(f"{servo.id} {int(register)} {bytes(data).hex()}")
            return plain(servo, register, data)

        patch.setattr(Servo, "write", noted)
        for fault in FAULTS:
            writes.clear()
            with VirtualBus(seed=3) as virtual:
                arm = make_arm(virtual, Path(directory), reconnect_s=0.6)
                yield f"{fault}/outcome", _driven(arm, virtual, fault, writes)
                yield f"{fault}/torque", list(virtual.torque().values()) if virtual.device else "unplugged"
                goals = [write for write in writes if write.split()[1] == "42"]
                yield f"{fault}/configuration", digest("\n".join(w for w in writes if w.split()[1] not in ("42", "40", "55")).encode())
                if fault is None:
                    yield "goals", goals


def _driven(arm: Any, virtual: Any, fault: str | None, writes: list[str]) -> str:
    from gr00t_fast.base.errors import Gr00tFastError

    outcome = "ran"
    try:
        arm.connect()
        arm.reset()
        start = arm.observe().joints
        if fault:
            virtual.inject(fault)
        end_s = time.monotonic() + (4.0 if fault and "bits=4" in fault else 0.5)
        tick = 0
        while time.monotonic() < end_s:
            arm.observe()
            if tick < 10:
                arm.send(start + 0.5 * tick)
            tick += 1
            time.sleep(1 / FPS)
    except Gr00tFastError as error:
        outcome = f"{type(error).__name__}: {str(error).split('.')[0]}"
    report = arm.land()
    outcome = re.sub(r"was lost \(.*\) and", "was lost and", outcome)  # which call of the system meets it first is a matter of microseconds
    return f"{outcome.replace(virtual.port, 'PORT')}; safe={report.safe}"


# Messages of both dialects


def wire() -> Iterator[Record]:
    from gr00t_fast.base.contracts import ModalityConfig
    from gr00t_fast.serving import wire as form

    numbers = np.random.default_rng(0)
    frames = numbers.integers(0, 256, (1, 1, 6, 8, 3), dtype=np.uint8)
    state = numbers.standard_normal((1, 1, 5)).astype(np.float32)
    flat = {"video.webcam": frames, "state.single_arm": state, "annotation.human.task_description": ["pick"]}
    nested = {"video": {"webcam": frames}, "state": {"single_arm": state}, "language": {"annotation.human.task_description": [["pick"]]}}
    configs = {"video": ModalityConfig([0], ["video.webcam"]), "action": ModalityConfig(list(range(16)), ["action.single_arm"])}
    for name, n1d7, message in (("n1.5", False, flat), ("n1.7", True, nested)):
        yield f"{name}/request", form.encode({"endpoint": "get_action", "data": message}, n1d7)
        yield f"{name}/modality", form.encode(form.modality_config_message(configs, n1d7), n1d7)
    yield "json", form.to_json(flat)


# A recorded data set


def dataset() -> Iterator[Record]:
    import pyarrow.parquet as parquet
    from test_recording import opened, play, recorder_in, settled

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "data"
        with recorder_in(out, []) as recorder:
            opened(recorder)
            for ticks, task in ((12, "lift"), (5, "put down")):
                play(recorder, ticks, task)
                settled(recorder)
        yield "files", sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        info = json.loads((out / "meta" / "info.json").read_text())
        yield "info", {key: value for key, value in info.items() if key not in ("codebase_version",)}
        for file in sorted(out.rglob("data/**/*.parquet")):
            for name, column in parquet.read_table(file).to_pydict().items():
                yield f"{file.name}/{name}", np.asarray(column)


# The simulated arm: what its cameras see, and where its joints are. The demo's network was trained with exactly these pictures.


def pictures() -> Iterator[Record]:
    from gr00t_fast.virtual.sim.expert import expert
    from gr00t_fast.virtual.sim.simulation import CAMERA_VIEWS, TICK_S, Simulation

    for task in ("reach", "place"):
        simulation = Simulation(task, seed=3)
        for tick, targets in enumerate(expert(simulation)):
            if tick % 20 == 0:
                yield f"{task}/{tick}/joints", simulation.joints_deg
                for view in CAMERA_VIEWS:
                    yield f"{task}/{tick}/{view}", simulation.render(view)
                    yield f"{task}/{tick}/{view}, small and smooth", simulation.render(view, 160, 120, samples=2)
            simulation.set_targets(targets)
            simulation.advance(TICK_S)


SECTIONS: dict[str, Callable[[], Iterator[Record]]] = {each.__name__: each for each in (actions, exports, control, bus, wire, dataset, pictures)}


def main(arguments: list[str]) -> None:
    chosen = [name for argument in arguments if argument.startswith("--only=") for name in argument.removeprefix("--only=").split(",")]
    for name in chosen or SECTIONS:
        began_s = time.monotonic()
        found = {key: digest(value) for key, value in SECTIONS[name]()}
        (HERE / f"{name}.json").write_text(json.dumps(found, indent=0) + "\n")
        print(f"{name}: {len(found)} records in {time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
