"""Ours against what lerobot's own code makes of checkpoints that its trainer wrote: recordings (tests/golden/), and policies that it trains here.

fp32. Pictures, ids, state and decoded actions are equal; features, velocities and chunks within 1e-5 relative L2, actions within 0.01 % of the range
that they span. Other shapes are made by lerobot where GR00T_FAST_LEROBOT names interpreters that have it with its `groot` extra (0.4.4 on Python
3.11, 0.6.1 on 3.12, separated by spaces; minutes).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import virtual_camera
from golden_cases import relative_error
from lerobot_policies import CAMERA, NOISE_SEED
from safetensors.numpy import load_file, save_file
from torch import Tensor

from gr00t_fast import load_policy
from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import CheckpointError, ConfigError, ObservationError
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.cli import run
from gr00t_fast.engine import PolicyInputs
from gr00t_fast.engine.manifest import Digests, target_of
from gr00t_fast.inputs.embodiment import Embodiment
from gr00t_fast.inputs.images import view
from gr00t_fast.model import Gr00t
from gr00t_fast.model.action_head import euler_step
from gr00t_fast.policy import Gr00tPolicy
from gr00t_fast.robots.calibration import save_calibration, to_units
from gr00t_fast.virtual.bus import VirtualBus
from gr00t_fast.virtual.bus.servo import Servo

RECORDED = ("n1d5", "n1d7", "n1d7_relative", "n1d7_local_base")
CLOSE = 1e-5
GOAL_POSITION = 42
SHARE_OF_RANGE = 1e-4
Arrays = Mapping[str, np.ndarray]


class Case:
    def __init__(self, directory: Path, shared: Path) -> None:
        self.checkpoint = directory / "checkpoint"
        self.observation: dict[str, Any] = {
            key: value for key, value in np.load(directory / "observation.npz").items() if key.startswith("observation")
        }
        self.observation["task"] = str(np.load(directory / "observation.npz")["task"])
        self.expected: Arrays = dict(np.load(directory / "expected.npz"))
        self.n1d5 = "in.eagle_input_ids" in self.expected
        self.tokenizer = shared / ("eagle2_hg_model" if self.n1d5 else "qwen3_vl_processor")

    def policy(self, **settings: Any) -> Gr00tPolicy:
        return load_policy(self.checkpoint, **{"processor_path": self.tokenizer, "device": "cpu", "precision": "fp32", "engine": "eager", **settings})


def check(case: Case) -> None:
    """Each stage from what lerobot's own gave the next, then all of them from the raw observation."""
    expected, policy = case.expected, case.policy()
    inputs = policy.preprocess(case.observation)
    for name, values in policy.apply_transforms(case.observation).items():
        if name != "eagle_image_sizes":  # of the frames, there; nothing reads it
            assert np.array_equal(values.numpy().reshape(expected[f"in.{name}"].shape), expected[f"in.{name}"]), name
    if "images" in expected:
        frames = [case.observation[f"observation.images.{key.removeprefix('video.')}"] for key in policy.processor.data_config.video_keys]
        assert np.array_equal(np.stack([view(frame, policy.processor.embodiment.images) for frame in frames]), expected["images"])
    for name, values in _stages(policy.engine.model, inputs, torch.from_numpy(expected["noise"])).items():
        theirs = torch.from_numpy(expected[name])
        assert relative_error(values.reshape(theirs.shape), theirs) < CLOSE, name
    for steps in (4, 2):
        policy.denoising_steps = steps
        chunk, action = expected[f"chunk.{steps}"], expected[f"action.{steps}"][0]
        rows, width = chunk.shape[1:]
        ours = torch.from_numpy(policy.infer(inputs, expected["noise"])[:, :rows, :width])
        assert relative_error(ours, torch.from_numpy(chunk)) < CLOSE
        answer = policy.get_action(case.observation, noise=expected["noise"])
        assert [*answer] == ["action"]
        assert answer["action"].dtype == np.float32
        assert answer["action"].shape == action.shape
        assert (np.abs(answer["action"] - action) <= SHARE_OF_RANGE * np.ptp(action, axis=0)).all()
        whole = np.zeros((1, rows, policy.chunk_shape[1]), np.float32)
        whole[..., :width] = chunk
        decoded = policy.unapply_transforms({"action": whole, "state": inputs.raw_state})
        assert np.array_equal(np.concatenate([*decoded.values()], axis=-1)[0], action)


@torch.inference_mode()
def _stages(model: Gr00t, inputs: PolicyInputs, noise: Tensor) -> dict[str, Tensor]:
    tensors, head, tables = inputs.to(torch.device("cpu"), torch.float32), model.head, model.head.step_tables(4)
    backbone = model.encode_language(tensors, model.encode_vision(tensors.pixel_values))
    vl, velocities, actions = head.refine(backbone), [], noise
    condition = head.condition(vl, tensors.state, None, tensors.image_positions)
    for tau, modulation in zip(tables.tau, tables.modulation, strict=True):
        velocities.append(head.velocity(actions, condition, tau, modulation))
        actions = euler_step(actions, velocities[-1], 0.25)
    state = head.state_encoder(tensors.state)
    return {"backbone_features": backbone, "vl_features": vl, "state_features": state, "velocity.4": torch.cat(velocities)}


@pytest.fixture(scope="module")
def data_dir(reference_root: Callable[..., Path]) -> Path:
    """It holds golden_lerobot/ and the tokenizers."""
    return reference_root("golden_lerobot", "eagle2_hg_model/vocab.json", "qwen3_vl_processor/vocab.json")


@pytest.fixture(params=RECORDED)
def recorded(request: pytest.FixtureRequest, data_dir: Path) -> Case:
    return Case(data_dir / "golden_lerobot" / request.param, data_dir)


def test_recorded(recorded: Case) -> None:
    check(recorded)


def test_forms_of_an_observation(recorded: Case) -> None:
    """A batch, NVIDIA's keys, and both together give each item what it gives alone."""
    policy, noise = recorded.policy(), np.concatenate([recorded.expected["noise"], recorded.expected["noise"][:, ::-1]])
    other = {key: value[::-1].copy() if key != "task" else "Other task" for key, value in recorded.observation.items()}
    alone = [policy.get_action(each, noise=noise[[index]])["action"] for index, each in enumerate((recorded.observation, other))]
    batch = {key: np.stack([value, other[key]]) if key != "task" else [value, other[key]] for key, value in recorded.observation.items()}
    assert np.abs(policy.get_action(batch, noise=noise)["action"] - np.stack(alone)).max() < 1e-3
    flat = {f"video.{key.rpartition('.')[2]}": value[None] for key, value in other.items() if ".images." in key}
    widths = policy.metadata.state_widths
    parts = np.split(other["observation.state"], np.cumsum([*widths.values()])[:-1])
    flat |= {f"state.{part}": values[None] for part, values in zip(widths, parts, strict=True)}
    answer = policy.get_action({**flat, "annotation.human.task_description": ["Other task"]}, noise=noise[[1]])
    assert np.array_equal(np.concatenate([*answer.values()], axis=-1), alone[1])


def test_a_camera_too_many_is_refused(recorded: Case) -> None:
    policy, frame = recorded.policy(), recorded.observation["observation.images.front"]
    with pytest.raises(ObservationError, match=r"observation\.images\.side"):
        policy.get_action({**recorded.observation, "observation.images.side": frame})
    with pytest.raises(ObservationError, match="task"):
        policy.get_action({key: value for key, value in recorded.observation.items() if key != "task"})
    with pytest.raises(ObservationError, match=r"observation\.state.*\(6,\).*\(5,\)"):
        policy.get_action({**recorded.observation, "observation.state": np.zeros(5, np.float32)})


PRE, POST, POLICY = "policy_preprocessor.json", "policy_postprocessor.json", "config.json"
PACK_N1D5, PACK_N1D7 = "policy_preprocessor_step_2_groot_pack_inputs_v3", "policy_preprocessor_step_2_groot_n1_7_pack_inputs_v1"
REFUSED: dict[str, tuple[str, str, str, Any, str]] = {  # case, file, dotted key, value, what the message names
    "another policy": ("n1d7", POLICY, "type", "act", "lerobot-rollout"),
    "an unknown step": ("n1d7", PRE, "steps.0.registry_name", "tokenizer_processor", "tokenizer_processor"),
    "no packing": ("n1d7", PRE, "steps.2.registry_name", "pack_v9", "pack_v9"),
    "another postprocessor": ("n1d5", POST, "steps.0.registry_name", "groot_action_unpack_unnormalize_v2", "unnormalize_v2"),
    "other wording": ("n1d5", PRE, "steps.2.config.formalize_language", True, "formalize_language"),
    "raw joints": ("n1d7", POST, "steps.0.config.normalize_min_max", False, "normalize_min_max"),
    "no settings (N1.5)": ("n1d5", POST, "steps.0.config", {}, "env_action_dim"),
    "no settings (N1.7)": ("n1d7", POST, "steps.0.config", {}, "env_action_dim"),
    "two frames": ("n1d7", PRE, "steps.2.config.video_horizon", 2, "video_horizon"),
    "renamed joints": ("n1d7", PRE, "steps.0.config.rename_map", {"observation.joints": "observation.state"}, "observation.joints"),
    "LIBERO's gripper": ("n1d7_relative", POLICY, "action_decode_transform", "libero", "libero"),
    "frames as they are": ("n1d7_local_base", PRE, "steps.3.config.image_target_size", None, "image_target_size"),
    "relative or not": ("n1d7", POLICY, "use_relative_actions", True, "use_relative_actions"),
    "two tags": ("n1d5", POLICY, "embodiment_tag", "so100", "so100"),
    "no such row": ("n1d7", PRE, "steps.2.config.embodiment_mapping.new_embodiment", 99, "99"),
    "other statistics in one file": ("n1d7_relative", POST, "steps.0.config.raw_stats.action.gripper.q01", [1.0], "raw_stats"),
    "groups in another order": ("n1d7_relative", PRE, "steps.2.config.modality_config.state.modality_keys", ["gripper", "single_arm"], "modality"),
    "fewer joints": ("n1d7", POLICY, "output_features.action.shape", [5], "env_action_dim"),
    "no file of statistics": ("n1d5", PRE, "steps.2.state_file", "none.safetensors", "none.safetensors"),
    "a file elsewhere": ("n1d5", PRE, "steps.2.state_file", "../x.safetensors", "../x.safetensors"),
    "statistics of another policy": ("n1d7_relative", PRE, "steps.2.state_file", "swapped.safetensors", "observation.state"),
}


def _copy(shared: Path, case: str, directory: Path) -> Path:
    """Files that a test may change, and links to the weights."""
    for file in (source := shared / "golden_lerobot" / case / "checkpoint").rglob("*"):
        if file.is_file():
            target = directory / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file) if file.name == "model.safetensors" else target.write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_equal_is_refused(name: str, data_dir: Path, tmp_path: Path) -> None:
    case, file, dotted, value, named = REFUSED[name]
    checkpoint = _copy(data_dir, case, tmp_path)
    swapped = data_dir / "golden_lerobot" / "n1d7" / "checkpoint" / f"{PACK_N1D7}.safetensors"
    (checkpoint / "swapped.safetensors").write_bytes(swapped.read_bytes())
    _edit(checkpoint / file, dotted, value)
    with pytest.raises(CheckpointError, match=re.escape(named)):
        open_checkpoint(checkpoint).embodiment("new_embodiment")


@pytest.mark.parametrize(("case", "file"), [("n1d5", PACK_N1D5), ("n1d7", PACK_N1D7)])
@pytest.mark.parametrize("change", ["missing", "another value"])
def test_statistics_are_whole_and_the_same_in_both_files(case: str, file: str, change: str, data_dir: Path, tmp_path: Path) -> None:
    checkpoint = _copy(data_dir, case, tmp_path)
    statistics = load_file(checkpoint / f"{file}.safetensors")
    if change == "missing":
        del statistics["action.min"]
    else:
        statistics["observation.state.max"][2] += 1.0
    save_file(statistics, checkpoint / f"{file}.safetensors")
    with pytest.raises(CheckpointError, match="action.min" if change == "missing" else "observation.state.max"):
        open_checkpoint(checkpoint)


SETTINGS: dict[str, tuple[str, str, str, Any, Callable[[Embodiment], Any], Any]] = {  # case, file, key, value, what it decides
    "row": ("n1d7", PRE, "steps.2.config.embodiment_mapping", {"gr1": 3}, lambda e: e.row, 0),
    "states beyond the range": ("n1d7", PRE, "steps.2.config.clip_outliers", False, lambda e: e.state[0].clip, False),
    "actions beyond the range": ("n1d7", POST, "steps.0.config.clip_normalized_action", False, lambda e: e.arithmetic.clip_actions, False),
    "wording": ("n1d7", PRE, "steps.2.config.formalize_language", False, lambda e: e.formalize_language, False),
    "padding": ("n1d7", PRE, "steps.3.config.letter_box_transform", True, lambda e: e.images.letterbox, True),
    "order of cameras": (
        "n1d7",
        PRE,
        "steps.2.config.video_modality_keys",
        ["wrist", "front"],
        lambda e: [*e.cameras],
        ["video.wrist", "video.front"],
    ),
    "one camera": ("n1d7", PRE, "steps.2.config.video_modality_keys", ["front", "side"], lambda e: [*e.cameras], ["video.front"]),
    "no such camera": ("n1d7", PRE, "steps.2.config.video_modality_keys", ["side"], lambda e: [*e.cameras], ["video.front", "video.wrist"]),
    "rows that count": ("n1d7", PRE, "steps.2.config.valid_action_horizon", 9, lambda e: (e.trained_horizon, e.default_horizon), (9, 9)),
    "rows that play": ("n1d7", POLICY, "n_action_steps", 5, lambda e: (e.trained_horizon, e.default_horizon), (32, 5)),
    "rows by mean and deviation": (
        *("n1d7_relative", None, "modality_config.action.mean_std_embedding_keys", ["gripper"]),
        *(lambda e: e.action[1].mode, "min_max"),
    ),
}


def test_a_setting_that_nothing_reads_is_named_in_a_warning(data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = _copy(data_dir, "n1d7", tmp_path)
    _edit(checkpoint / PRE, "steps.3.config.sharpen", True)
    open_checkpoint(checkpoint)
    assert "'sharpen'" in caplog.text


def test_an_export_fits_whatever_device_the_policy_was_trained_on(data_dir: Path, tmp_path: Path) -> None:
    checkpoint = _copy(data_dir, "n1d7", tmp_path)
    before = target_of(open_checkpoint(checkpoint), "new_embodiment", None).identity(Digests(tmp_path))
    for file, dotted in ((POLICY, "device"), (PRE, "steps.3.config.device"), (PRE, "steps.4.config.device"), (POST, "steps.1.config.device")):
        _edit(checkpoint / file, dotted, "cuda:7")
    assert target_of(open_checkpoint(checkpoint), "new_embodiment", None).identity(Digests(tmp_path)) == before
    _edit(checkpoint / POST, "steps.0.config.clip_normalized_action", False)
    assert target_of(open_checkpoint(checkpoint), "new_embodiment", None).identity(Digests(tmp_path)) != before


def _edit(file: Path, dotted: str, value: Any) -> None:
    raw = json.loads(file.read_text())
    *parents, last = dotted.split(".")
    node = raw
    for key in parents:
        node = node[int(key) if isinstance(node, list) else key]
    node[last] = value
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_obeyed(name: str, data_dir: Path, tmp_path: Path) -> None:
    case, file, dotted, value, decided, expected = SETTINGS[name]
    checkpoint = _copy(data_dir, case, tmp_path)
    for each, prefix in [(file, "")] if file else [(PRE, "steps.2.config."), (POST, "steps.0.config.")]:
        _edit(checkpoint / each, prefix + dotted, value)
    before = open_checkpoint(data_dir / "golden_lerobot" / case / "checkpoint").embodiment("new_embodiment")
    assert decided(open_checkpoint(checkpoint).embodiment("new_embodiment")) == expected
    assert name in ("no such camera", "rows by mean and deviation") or decided(before) != expected


def test_denoising_steps_are_the_policys_and_the_rate_its_data_sets(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = _copy(data_dir, "n1d7", tmp_path / "checkpoint")
    _edit(checkpoint / POLICY, "num_inference_timesteps", 2)
    opened = open_checkpoint(checkpoint)
    assert opened.config.head.denoising_steps == 2
    assert opened.embodiment("new_embodiment").metadata.fps is None
    (tmp_path / "golden" / "so101" / "meta").mkdir(parents=True)
    (tmp_path / "golden" / "so101" / "meta" / "info.json").write_text('{"fps": 15}')
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    embodiment = open_checkpoint(checkpoint).embodiment("new_embodiment")
    assert embodiment.metadata.fps == 15
    assert "15 Hz" in embodiment.notes[0]


def test_tags_and_letterbox_are_the_checkpoints_own(data_dir: Path, tmp_path: Path) -> None:
    checkpoint = _copy(data_dir, "n1d5", tmp_path)
    for file, dotted in ((POLICY, "embodiment_tag"), (PRE, "steps.2.config.embodiment_tag")):
        _edit(checkpoint / file, dotted, "so100")
    opened = open_checkpoint(checkpoint)
    assert opened.row_of("new_embodiment") == opened.row_of("so100") == 2
    with pytest.raises(ConfigError, match="so100"):
        opened.embodiment("gr1")
    with pytest.raises(ConfigError, match="letterbox"):
        open_checkpoint(checkpoint, letterbox="always")


def test_a_run_plays_n_action_steps_of_the_checkpoint_unless_a_flag_says_otherwise(data_dir: Path, tmp_path: Path) -> None:
    checkpoint = _copy(data_dir, "n1d5", tmp_path)
    _edit(checkpoint / POLICY, "n_action_steps", 8)
    common = {"model_path": str(checkpoint), "processor_path": data_dir / "eagle2_hg_model", "device": "cpu"}
    assert run.load(run.RunConfig(**common)).action_horizon == 8
    assert run.load(run.RunConfig(**common, action_horizon=12)).action_horizon == 12
    assert load_policy(**common).action_horizon == 16, "what lerobot's predict_action_chunk returns"


def test_renamed_cameras_keep_their_names_and_the_networks_order(data_dir: Path, tmp_path: Path) -> None:
    """lerobot renames what an observation has, then sorts."""
    recorded = Case(data_dir / "golden_lerobot" / "n1d7", data_dir)
    checkpoint = _copy(data_dir, "n1d7", tmp_path)
    renamed = {"observation.images.a": "observation.images.wrist", "observation.images.b": "observation.images.front"}
    _edit(checkpoint / PRE, "steps.0.config.rename_map", renamed)
    policy = load_policy(checkpoint, processor_path=recorded.tokenizer, device="cpu", precision="fp32", engine="eager")
    observation = {old: recorded.observation[new] for old, new in renamed.items()} | {
        key: recorded.observation[key] for key in ("observation.state", "task")
    }
    assert np.array_equal(
        policy.get_action(observation, noise=recorded.expected["noise"])["action"],
        recorded.policy().get_action(recorded.observation, noise=recorded.expected["noise"])["action"],
    )


def test_an_adapter_that_lerobot_trained_is_merged(data_dir: Path, tmp_path: Path) -> None:
    """As peft names what is in lerobot's policy; compared with a checkpoint that has the merged weights."""
    recorded = Case(data_dir / "golden_lerobot" / "n1d7", data_dir)
    adapter, merged = (_copy(data_dir, "n1d7", tmp_path / name) for name in ("adapter", "merged"))
    module = "_groot_model.action_head.model.transformer_blocks.0.attn1.to_q"
    weights = load_file(adapter / "model.safetensors")
    rows, columns = weights[f"{module}.weight"].shape
    random = np.random.default_rng(0)
    a, b = random.standard_normal((4, columns)).astype(np.float32), random.standard_normal((rows, 4)).astype(np.float32)
    save_file({f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "base_model_name_or_path": str(recorded.checkpoint), "r": 4, "lora_alpha": 8, "target_modules": ["to_q"]}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    for directory in (adapter, merged):
        _edit(directory / POLICY, "num_inference_timesteps", 2)
    (adapter / "model.safetensors").unlink()
    (merged / "model.safetensors").unlink()
    weights[f"{module}.weight"] = weights[f"{module}.weight"] + 2.0 * (b @ a)
    save_file(weights, merged / "model.safetensors")
    answers = []
    for checkpoint in (adapter, merged, recorded.checkpoint):
        recorded.checkpoint = checkpoint
        answers.append(recorded.policy().get_action(recorded.observation, noise=recorded.expected["noise"])["action"])
    assert np.abs(answers[0] - answers[1]).max() < 1e-3
    assert np.abs(answers[0] - answers[2]).max() > 0.1


pythons = pytest.mark.parametrize("python", os.environ.get("GR00T_FAST_LEROBOT", "").split() or [None])
ASK = "takes minutes: GR00T_FAST_LEROBOT=PYTHON, an interpreter with lerobot 0.4.4 or 0.6.1 and its `groot` extra"
PROGRAM = Path(__file__).resolve().parents[1] / "support" / "lerobot_policies.py"


@pythons
def test_policies_that_lerobot_trains_now(python: str | None, shared_dir: Path, tmp_path: Path) -> None:
    if python is None:
        pytest.skip(ASK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    subprocess.run([python, str(PROGRAM), str(tmp_path), str(shared_dir)], check=True, env=environment, capture_output=True)
    made = sorted(file.parent for file in tmp_path.glob("*/expected.npz"))
    assert len(made) >= 6
    for directory in made:
        check(Case(directory, shared_dir))


@pythons
def test_the_benchmark_compares_equal_actions(python: str | None, shared_dir: Path, tmp_path: Path) -> None:
    if python is None:
        pytest.skip(ASK)
    root = PROGRAM.parent.parent
    n1d5 = subprocess.run([python, "-c", "import lerobot.policies.groot.groot_n1"], env={**os.environ, "PYTHONPATH": ""}, capture_output=True)
    processor = shared_dir / ("qwen3_vl_processor" if n1d5.returncode else "eagle2_hg_model")
    words = [f"--processor_path={processor}", "--size=tiny", "--precision=fp32", "--rounds=2", f"--out={tmp_path}"]
    command = [python, str(root / "benchmarks" / "bench_lerobot.py"), *words]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    result = json.loads((tmp_path / "bench_lerobot.json").read_text())
    assert result["difference_joint_units"]["largest"] < 1e-2
    assert len(result["times_ms"]) == 2


@pythons
def test_the_arm_gets_the_goals_that_lerobots_own_program_sends(python: str | None, shared_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """The first chunk on the wire, to a count of the servo: the same arm, picture, policy and noise."""
    if python is None:
        pytest.skip(ASK)
    written: list[tuple[int, int]] = []
    plain = Servo.write

    def noted(servo: Servo, register: int, data: bytes) -> Any:
        if register == GOAL_POSITION:
            written.append((servo.id, int.from_bytes(data, "little")))
        return plain(servo, register, data)

    monkeypatch.setattr(Servo, "write", noted)
    width, height = CAMERA
    virtual_camera.write_camera(tmp_path, 0, np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    environment = {**virtual_camera.plugin_environment(tmp_path), "OMP_NUM_THREADS": "1"}
    chunks = []
    for theirs in (True, False):
        interpreter = python if theirs else sys.executable  # OpenCV refuses a plugin made for another version
        build = f"import sys, pathlib; sys.path.insert(0, {str(PROGRAM.parent)!r}); import virtual_camera as v; v.build_plugin(pathlib.Path('.'))"
        subprocess.run([interpreter, "-c", build], check=True, cwd=tmp_path, env=environment)
        with VirtualBus(seed=3) as bus:
            save_calibration(bus.calibration, tmp_path / "virtual.json")
            pose = [str(to_units(joint, bus.calibration[joint], servo.position)) for joint, servo in zip(SO100_JOINTS, bus.servos, strict=True)]
            command = [python, str(PROGRAM), str(tmp_path), str(shared_dir), bus.port, *pose]
            paths = {"PYTHONPATH": "" if theirs else str(PROGRAM.parent.parent)}
            command = command if theirs else [*_run(tmp_path, shared_dir, bus.port)]
            subprocess.run(command, check=True, cwd=tmp_path, env={**environment, **paths}, stdin=subprocess.DEVNULL, capture_output=True)
        ticks = np.array([goal for _, goal in written]).reshape(-1, len(SO100_JOINTS))
        chunks.append(ticks if theirs else ticks[1:])  # ours holds the pose before the first action
        written.clear()
    assert np.array_equal(chunks[0][:16], chunks[1][:16])
    assert (np.ptp(chunks[0][:16], axis=0) > 0).sum() >= 5


def _run(directory: Path, shared: Path, port: str) -> Iterator[str]:
    yield from (sys.executable, "-m", "gr00t_fast", "run", "--robot.type=so101_follower", f"--robot.port={port}", "--robot.id=virtual")
    yield from (f"--robot.calibration_dir={directory}", f"--model_path={directory / 'driven' / 'checkpoint'}", "--lang_instruction=Pick")
    yield f"--robot.cameras={{ front: {{type: opencv, index_or_path: 0, width: {CAMERA[0]}, height: {CAMERA[1]}, fps: 30}}}}"
    tokenizer = "eagle2_hg_model" if (directory / "driven" / "checkpoint" / "eagle2_hg_model").exists() else "qwen3_vl_processor"
    yield from (f"--processor_path={shared / tokenizer}", "--device=cpu", "--precision=fp32", "--engine=eager", f"--seed={NOISE_SEED}")
    yield from ("--controller=sync", "--timeout=1.5", "--preflight=warn", "--max_speed_deg_s=null", "--max_following_error_deg=null")
