"""Calibration of the torch engine `fp8`: what is recorded, kept and refused, and what it does to a trained network's actions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import FEW, cases_of, target_for
from random_networks import TINY, load_network, write_network
from safetensors.torch import load_file, save_file

from benchmarks.evaluate import reach_for_still_blocks
from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.cli import export
from gr00t_fast.contracts import ActionPrefix
from gr00t_fast.engine.cuda_graph import GraphEngine
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.fused import FusedModel
from gr00t_fast.engine.manifest import describe_files, read_manifest
from gr00t_fast.engine.quantized import PARTS, SCALES_NAME, InputScale, linear_layers, read_calibration, rewritten
from gr00t_fast.errors import ConfigError, EngineError, StaleEngineError
from gr00t_fast.export.calibrate import TorchNetwork, Trials, record, scales_of
from gr00t_fast.export.verify import ACTION_LIMITS, digest_of
from gr00t_fast.model import Gr00t
from gr00t_fast.policy import Gr00tPolicy, load_policy

TRAINED = Path(__file__).parent.parent / "checkpoints" / "so100-sim-reach"


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer of the tiny network."""
    out = tmp_path_factory.mktemp("calibrated") / "fp8"
    assert run(checkpoint, out, "--trial_frames=0", *FEW) == 0
    return out


def run(checkpoint: Path, out: Path, *flags: str) -> int:
    return export.calibrate([f"--model_path={checkpoint}", f"--out={out}", "--device=cpu", *flags])


def eager_policy(checkpoint: Path, model: Gr00t, **options: int) -> Gr00tPolicy:
    """Over a model with layers of 8 bits."""
    engine = EagerEngine(model)
    engine.device, engine.dtype = model.device, model.dtype
    return load_policy(checkpoint, engine=engine, **options)


# --- what is recorded


# --- the store


def test_what_was_written_is_what_is_read(checkpoint: Path, calibrated: Path) -> None:
    target, manifest = target_for(checkpoint), read_manifest(calibrated, "")
    found = read_calibration(calibrated, target)
    assert set(found) == set(linear_layers(load_network(checkpoint)))
    assert found["language.blocks.0.mlp.gate"] is found["language.blocks.0.mlp.up"]
    same, other = cases_of(checkpoint, 4), cases_of(checkpoint, 4, "random:1")
    assert manifest.quantisation["calibration"]["digest"] == digest_of(same) != digest_of(other)
    again = export.calibrate.parse(["--model_path=x", *manifest.flags])  # the message that names the command can be typed
    assert (again.frames, again.trial_frames, again.observations) == (4, 0, "random:0")


def test_one_that_is_missing_damaged_or_stale_names_the_command(checkpoint: Path, calibrated: Path, tmp_path: Path) -> None:
    """What else is damaged or stale: test_manifest.py."""
    other = write_network(tmp_path / "weights", TINY, seed=1)
    with pytest.raises(StaleEngineError, match=r"(?s)other weights.*gr00t-fast calibrate"):
        read_calibration(calibrated, target_for(other))
    copy = Path(shutil.copytree(calibrated, tmp_path / "copy"))
    tensors = load_file(str(copy / SCALES_NAME))
    key = next(key for key in tensors if key.endswith(".largest"))
    save_file({**tensors, key: torch.tensor(-1.0)}, str(copy / SCALES_NAME))
    replace(read_manifest(copy, ""), files=describe_files(copy)).write(copy)  # which agrees
    for directory in (copy, tmp_path / "nothing"):
        with pytest.raises(EngineError, match=r"Run: gr00t-fast calibrate --model_path=.* --observations="):
            read_calibration(directory, target_for(checkpoint))


# --- from a name to an engine


def test_in_the_fused_model_the_rounded_layers_do_what_they_do_in_the_plain_one(checkpoint: Path, calibrated: Path) -> None:
    """What the engine runs but for the compiler and the kernel of the steps, which have tests of their own; gate and up are one layer here."""
    rounded = rewritten(load_network(checkpoint), read_calibration(calibrated, target_for(checkpoint)), emulated=True)
    expecting = eager_policy(checkpoint, rounded, denoising_steps=2)
    policy = load_policy(checkpoint, engine=GraphEngine("fp8", FusedModel(rounded), continues=frozenset({"prefix"})), denoising_steps=2)
    seen, noise = policy.example_observation("pick"), np.random.default_rng(0).standard_normal((1, 16, 32)).astype(np.float32)
    got, expected = policy.get_action(seen, noise=noise), expecting.get_action(seen, noise=noise)
    # rounding falls to the other side now and then
    np.testing.assert_allclose(got["action.single_arm"], expected["action.single_arm"], atol=0.5)
    with pytest.raises(ConfigError, match="'fp8' cannot continue a chunk by 'rtc'.*--smoothing=prefix"):
        policy.get_action(seen, prefix=ActionPrefix({key: rows[3:] for key, rows in expected.items()}, 1, "rtc"))


def test_a_calibration_that_rounds_gate_without_up_is_refused(checkpoint: Path) -> None:
    with pytest.raises(EngineError, match=r"gate and up.*gr00t-fast calibrate"):
        FusedModel(rewritten(load_network(checkpoint), {"language.blocks.0.mlp.gate": InputScale(1.0)}))


# --- a trained network


def _recorded(directory: Path, seeds: range) -> Path:
    """Episodes of the scripted expert, every third tick."""
    from gr00t_fast.robots.sim.expert import expert
    from gr00t_fast.robots.sim.simulation import TICK_S, Simulation

    directory.mkdir()
    simulation = Simulation("reach", 0)
    for seed in seeds:
        simulation.reset(seed)
        frames, joints = [], []
        for tick, targets in enumerate(expert(simulation)):
            if tick % 3 == 0:
                frames.append(simulation.render("front", 640, 480))
                joints.append(simulation.joints_deg.copy())
            simulation.set_targets(targets)
            simulation.advance(TICK_S)
        rows = np.stack(joints)
        arrays = {"video.webcam": np.stack(frames), "state.single_arm": rows[:, :5], "state.gripper": rows[:, 5:]}
        np.savez(directory / f"{seed}.npz", **arrays, **{"annotation.human.task_description": np.array("Reach the block")})
    return directory


def test_a_trained_networks_actions_move_by_little(tmp_path: Path) -> None:
    """Every layer of the demo's network rounded, on 50 observations of episodes that calibration did not see; and it still reaches the block."""
    pytest.importorskip("mujoco", reason="needs `pip install 'gr00t_fast[sim]'`")
    seen, held_out = (_recorded(tmp_path / name, seeds) for name, seeds in (("calibration", range(500, 504)), ("held_out", range(600, 604))))
    cases = cases_of(TRAINED, 50, str(held_out))
    model = load_model(open_checkpoint(TRAINED), "new_embodiment", torch.device("cpu"), torch.float32)
    network = TorchNetwork(model, 4, emulated=True)
    scales = scales_of(network, record(network, cases_of(TRAINED, 64, str(seen)), 0))
    rounded = rewritten(model, scales, emulated=True)
    for steps, some in ((4, cases), (2, cases[::4]), (1, cases[::4])):
        error = Trials(TorchNetwork(model, steps, emulated=True), some).error(rounded, PARTS)
        assert error.p50 > 0.001
        assert error.p99 < ACTION_LIMITS["fp8"], steps
        assert error.displacement < 0.03, steps
    policy = eager_policy(TRAINED, rounded, action_horizon=8)
    assert all(outcome.solved_s is not None for outcome in reach_for_still_blocks(policy, (16, 32), range(2)))
