"""The lerobot plugin, installed as users do it: its actions equal `load_policy`'s, also where lerobot's own program drives an arm with them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import virtual_camera
from waiting import until

from gr00t_fast import load_policy
from gr00t_fast.base.contracts import SO100_JOINTS, ActionPrefix
from gr00t_fast.base.errors import ConfigError, ObservationError, PreflightError
from gr00t_fast.virtual.bus.bus import send_command
from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

pytest.importorskip("lerobot")
pytest.importorskip("datasets", reason="lerobot's programs need its datasets: pip install 'gr00t_fast[robot]'")

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugins" / "lerobot_policy_gr00t_fast"
ROLLOUT = importlib.util.find_spec("lerobot.rollout") is not None  # since 0.6; before, lerobot-record takes policies
INSTRUCTION, HORIZON, SEED, FPS = "pick: the cube", 5, 7, 15
CAMERA = (64, 48)
EPISODE_S = 2


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that pip installed the plugin into."""
    directory = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, directory / "source")  # pip leaves its build beside the sources
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(directory / "site"), str(directory / "source")], check=True, timeout=300)
    return directory / "site"


@pytest.fixture(scope="module")
def plugin(installed: Path) -> Iterator[Any]:
    sys.path.insert(0, str(installed))
    yield importlib.import_module("lerobot_policy_gr00t_fast.modeling_gr00t_fast")
    sys.path.remove(str(installed))


def make_policy(plugin: Any, checkpoint: Path, **options: Any) -> Any:
    values = {"model_path": str(checkpoint), "device": "cpu", "precision": "fp32", "seed": SEED, **options}
    return plugin.Gr00tFastPolicy(plugin.Gr00tFastConfig(**values))


def observed(seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same observation as lerobot's programs hand it to a policy, and as `get_action` takes it."""
    random = np.random.default_rng(seed)
    frame = random.integers(0, 256, (CAMERA[1], CAMERA[0], 3), dtype=np.uint8)
    joints = random.uniform(-40, 40, 6).astype(np.float32)
    picture = (torch.from_numpy(frame).type(torch.float32) / 255).permute(2, 0, 1)[None]
    batch = {
        "observation.images.front": picture,
        "observation.state": torch.from_numpy(joints)[None],
        "task": INSTRUCTION,
        "robot_type": "so_follower",
    }
    state = joints.astype(np.float64)[None]
    plain = {"video.webcam": frame[None], "state.single_arm": state[:, :5], "state.gripper": state[:, 5:]}
    return batch, plain | {"annotation.human.task_description": [INSTRUCTION]}


def in_order(actions: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([actions["action.single_arm"], actions["action.gripper"]], axis=1)


def test_actions_equal_those_of_load_policy(plugin: Any, checkpoint: Path) -> None:
    policy, ours = make_policy(plugin, checkpoint, action_horizon=HORIZON), load_policy(checkpoint, device="cpu", precision="fp32", seed=SEED)
    batch, plain = observed()
    noise = torch.randn(1, *ours.chunk_shape)
    chunk = policy.predict_action_chunk(batch, noise=noise)
    assert (chunk.shape, chunk.dtype) == ((1, HORIZON, 6), torch.float32)
    assert np.array_equal(chunk[0].numpy(), in_order(ours.get_action(plain, noise=noise))[:HORIZON])
    for episode in range(2):  # from the seed, the same in each episode
        policy.reset()
        ours.reset()
        with torch.inference_mode():  # as lerobot calls it
            played = [policy.select_action(observed(tick)[0]) for tick in range(2 * HORIZON)]
        wanted = [in_order(ours.get_action(observed(tick)[1]))[:HORIZON] for tick in (0, HORIZON)]
        assert np.array_equal(torch.cat(played).numpy(), np.concatenate(wanted)), episode


def test_a_policy_that_reads_earlier_pictures_gets_those_of_earlier_ticks(plugin: Any, tmp_path: Path) -> None:
    reads = write_random_checkpoint(tmp_path / "checkpoint", "tiny", network="n1.7", frame_offsets=(-3, 0))
    options = {"device": "cpu", "precision": "fp32"}
    policy, ours = make_policy(plugin, reads, data_config=None, action_horizon=HORIZON), load_policy(reads, **options)
    assert not policy.supports_rtc()
    noise = torch.randn(1, *ours.chunk_shape)
    for first in (0, 20):  # the second episode sees nothing of the first one
        policy.reset()
        played = torch.cat([policy.select_action(observed(first + tick)[0], noise=noise) for tick in range(2 * HORIZON)]).numpy()
        for tick in (0, HORIZON):
            earlier, (_, plain) = observed(max(first, first + tick - 3))[1], observed(first + tick)
            frames = np.concatenate([earlier["video.webcam"], plain["video.webcam"]])
            wanted = in_order(ours.get_action({**plain, "video.webcam": frames}, noise=noise))[:HORIZON]
            assert np.array_equal(played[tick : tick + HORIZON], wanted), (first, tick)


def test_a_chunk_continues_what_is_left_of_the_one_before(plugin: Any, checkpoint: Path) -> None:
    policy, ours = make_policy(plugin, checkpoint), load_policy(checkpoint, device="cpu", precision="fp32")
    assert policy.supports_rtc()
    policy.init_rtc_processor()
    noise = torch.randn(1, *ours.chunk_shape)
    left = policy.predict_action_chunk(observed()[0], noise=noise)[0, 6:12]  # (L, J)
    padded = torch.cat([left, torch.zeros(4, 6)])  # lerobot 0.6 fills up to its execution horizon
    batch, plain = observed(1)
    parts = {"action.single_arm": left[:, :5].numpy(), "action.gripper": left[:, 5:].numpy()}
    wanted = in_order(ours.get_action(plain, noise=noise, prefix=ActionPrefix(parts, 2)))
    for given in (left, padded, left[None]):
        chunk = policy.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=given, noise=noise)
        assert np.array_equal(chunk[0].numpy(), wanted)
    afresh = policy.predict_action_chunk(batch, noise=noise)
    assert not torch.equal(afresh[0], chunk[0])
    nothing_left = policy.predict_action_chunk(batch, inference_delay=3, prev_chunk_left_over=torch.zeros(10, 6), noise=noise)
    assert torch.equal(nothing_left, afresh)


def test_what_cannot_be_used_is_refused(plugin: Any, checkpoint: Path) -> None:
    flags = {field.name: field.default for field in dataclasses.fields(plugin.Gr00tFastConfig)}
    arguments = {name: argument.default for name, argument in inspect.signature(load_policy).parameters.items() if name in flags}
    assert {name: flags[name] for name in arguments} | {"model_path": "", "device": "auto"} == arguments | {"model_path": ""}, "its defaults"
    with pytest.raises(ConfigError, match=r"--policy.model_path is required"):
        make_policy(plugin, checkpoint, model_path="")
    with pytest.raises(ConfigError, match=r"--policy.path.*--policy.model_path"):
        plugin.Gr00tFastPolicy.from_pretrained("somewhere")
    other = SimpleNamespace(features={"action": {"names": ["x.pos", *(f"{joint}.pos" for joint in SO100_JOINTS[1:])]}})
    with pytest.raises(ConfigError, match="drives an SO-100"):
        plugin.Gr00tFastPolicy(plugin.Gr00tFastConfig(model_path=str(checkpoint), device="cpu"), dataset_meta=other)
    policy, (batch, _) = make_policy(plugin, checkpoint), observed()
    state, picture = batch["observation.state"], batch["observation.images.front"]
    for observation, error, named in (
        ({**batch, "observation.state": state.repeat(2, 1)}, ObservationError, "one observation at a time"),
        ({"observation.images.front": picture, "task": INSTRUCTION}, ObservationError, "observation.state"),
        ({"observation.state": state, "task": INSTRUCTION}, PreflightError, "webcam"),
        ({**batch, "observation.images.wrist": picture}, PreflightError, "--policy.camera_map"),
    ):
        with pytest.raises(error, match=named):
            policy.select_action(observation)


# lerobot's own program


PICTURE = np.random.default_rng(0).integers(0, 255, (CAMERA[1], CAMERA[0], 3), dtype=np.uint8)


@contextlib.contextmanager
def served(directory: Path) -> Iterator[Path]:
    """A virtual bus in another process, with its calibration file in `directory`."""
    command = [sys.executable, "-m", "gr00t_fast", "bus", f"--link={directory / 'port'}", f"--write_calibration={directory}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert "Virtual servo bus" in process.stdout.readline()
        yield directory
        process.terminate()


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Path]:
    """And a virtual camera."""
    virtual_camera.build_plugin(tmp_path)
    virtual_camera.write_camera(tmp_path, 0, PICTURE)
    with served(tmp_path) as directory:
        yield directory


def environment_of(bus: Path, installed: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(installed), str(ROOT)])
    home = {"HF_HOME": str(bus / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return {**virtual_camera.plugin_environment(bus), **home}


def lerobot_command(directory: Path, checkpoint: Path) -> list[str]:
    """lerobot-record, or from 0.6 on lerobot-rollout, which takes policies in its place."""
    camera = f"{{ front: {{type: opencv, index_or_path: 0, width: {CAMERA[0]}, height: {CAMERA[1]}, fps: 30}}}}"
    program, name = ("lerobot_rollout", "rollout_pick") if ROLLOUT else ("lerobot_record", "eval_pick")
    own = ["--strategy.type=episodic", f"--fps={FPS}", "--return_to_initial_position=false", "--device=cpu"] if ROLLOUT else []
    return [
        *(sys.executable, "-m", f"lerobot.scripts.{program}", *own, "--robot.type=so100_follower", f"--robot.port={directory / 'port'}"),
        *("--robot.id=virtual", f"--robot.calibration_dir={directory}", f"--robot.cameras={camera}", "--play_sounds=false"),
        *("--policy.type=gr00t_fast", f"--policy.model_path={checkpoint}", "--policy.device=cpu", "--policy.precision=fp32"),
        *(f"--policy.seed={SEED}", f"--policy.action_horizon={HORIZON}", f"--dataset.repo_id=me/{name}", f"--dataset.root={directory / 'data'}"),
        *(f'--dataset.single_task="{INSTRUCTION}"', f"--dataset.fps={FPS}", f"--dataset.episode_time_s={EPISODE_S}", "--dataset.num_episodes=1"),
        *("--dataset.reset_time_s=0", "--dataset.push_to_hub=false", f"--dataset.{'rgb_encoder.' if ROLLOUT else ''}vcodec=h264"),
    ]


@pytest.mark.slow
@pytest.mark.skipif(virtual_camera.compiler() is None, reason="needs a C compiler for the virtual camera (apt install gcc)")
def test_lerobots_own_program_drives_the_arm_with_our_actions(installed: Path, checkpoint: Path, bus: Path) -> None:
    import pyarrow.parquet

    command = lerobot_command(bus, checkpoint)
    done = subprocess.run(command, env=environment_of(bus, installed), cwd=bus, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (root,) = [path.parent.parent for path in bus.rglob("meta/info.json")]  # 0.6 adds a time stamp to the name
    assert json.loads((root / "meta" / "info.json").read_text())["robot_type"] == "so_follower"
    (file,) = root.glob("data/*/*.parquet")
    frames = pyarrow.parquet.read_table(file, columns=["observation.state", "action"]).to_pylist()
    assert len(frames) > 2 * HORIZON
    ours = load_policy(checkpoint, device="cpu", precision="fp32", seed=SEED)
    ours.reset()
    for start in range(0, len(frames) - HORIZON, HORIZON):
        state = np.asarray(frames[start]["observation.state"], dtype=np.float32).astype(np.float64)[None]
        plain = {"video.webcam": PICTURE[None, ..., ::-1].copy(), "state.single_arm": state[:, :5], "state.gripper": state[:, 5:]}
        wanted = in_order(ours.get_action(plain | {"annotation.human.task_description": [INSTRUCTION]}))[:HORIZON]
        recorded = np.asarray([frame["action"] for frame in frames[start : start + HORIZON]], dtype=np.float32)
        assert np.array_equal(recorded, wanted), f"frame {start}: {np.abs(recorded - wanted).max()}"
    joints = send_command(bus / "port.ctl", "state")["ok"]["joints"]
    assert [state["torque"] for state in joints.values()] == [0] * 6


def joints_of(directory: Path) -> dict[str, Any]:
    return send_command(directory / "port.ctl", "state")["ok"]["joints"]


@pytest.mark.skipif(not ROLLOUT, reason="lerobot has this since 0.6")
@pytest.mark.skipif(virtual_camera.compiler() is None, reason="needs a C compiler for the virtual camera (apt install gcc)")
def test_a_person_takes_over_with_a_leader_arm_and_gives_back(installed: Path, checkpoint: Path, bus: Path) -> None:
    """lerobot's DAgger strategy with our policy: Space pauses, and the leader goes to where the follower is; Tab corrects with the leader, Tab keeps
    the correction as an episode, Space gives back to the policy, Esc ends. The leader is a second virtual arm, which is moved by hand."""
    import pyarrow.parquet

    leader = bus / "leader"
    leader.mkdir()
    command = [word.replace("--strategy.type=episodic", "--strategy.type=dagger") for word in lerobot_command(bus, checkpoint)]
    command = [word for word in command if not word.startswith(("--dataset.num_episodes", "--dataset.episode_time_s", "--dataset.reset_time_s"))]
    command += ["--strategy.num_episodes=2", "--teleop.type=so101_leader", f"--teleop.port={leader / 'port'}", "--teleop.id=virtual"]
    command += [f"--teleop.calibration_dir={leader}"]
    terminal, theirs = pty.openpty()
    environment = {name: value for name, value in environment_of(bus, installed).items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    log = bus / "log"
    with served(leader), log.open("w") as out:
        process = subprocess.Popen(command, env=environment, cwd=bus, stdin=theirs, stdout=out, stderr=out, start_new_session=True)

        def says(words: str, times: int = 1) -> None:
            until(lambda: log.read_text().count(words) >= times or process.poll() is not None, f"it says {words!r}")
            assert log.read_text().count(words) >= times, log.read_text()[-4000:]

        try:
            says("DAgger corrections-only recording started")
            before = joints_of(bus)
            until(lambda: any(abs(joint["position"] - before[name]["position"]) > 20 for name, joint in joints_of(bus).items()), "the policy drives")
            os.write(terminal, b" ")
            says("-> paused")
            until(lambda: joints_of(leader)["elbow_flex"]["torque"] == 1, "the leader follows")
            os.write(terminal, b"\t")
            says("-> correcting")
            until(lambda: joints_of(leader)["elbow_flex"]["torque"] == 0, "the leader can be moved")
            start = joints_of(bus)["shoulder_pan"]["position"]
            for _ in range(8):
                send_command(leader / "port.ctl", "push shoulder_pan 3")
                time.sleep(0.1)
            until(lambda: abs(joints_of(bus)["shoulder_pan"]["position"] - start) > 100, "the follower does what the leader does")
            os.write(terminal, b"\t")
            says("Correction 1/2 saved")
            os.write(terminal, b" ")
            says("-> autonomous")
            held = joints_of(bus)["shoulder_pan"]["position"]
            until(lambda: abs(joints_of(bus)["shoulder_pan"]["position"] - held) > 5, "the policy drives again")
            os.write(terminal, b"\x1b")
            process.wait(120)
        finally:
            process.kill()
            os.close(terminal)
            os.close(theirs)
    assert process.returncode == 0, log.read_text()[-4000:]
    (root,) = [path.parent.parent for path in bus.rglob("meta/info.json")]
    (file,) = root.glob("data/*/*.parquet")
    table = pyarrow.parquet.read_table(file).to_pylist()
    assert table
    assert all(row["intervention"] in (True, [True]) for row in table), "what the policy did is not among the corrections"
    pan = [row["action"][0] for row in table]
    assert max(pan) - min(pan) > 10, "the correction"
