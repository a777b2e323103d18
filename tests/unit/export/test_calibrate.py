"""Calibration of 8-bit exports: what it does to a trained network's actions. The program, and what else it decides: test_quantise.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exports import cases_of, make_export, target_for

from gr00t_fast.engine.exported import ExportTables
from gr00t_fast.engine.manifest import read_manifest
from gr00t_fast.export import CalibrationOptions
from gr00t_fast.export.calibrate import GraphNetwork, Trials, calibrate, with_layers
from gr00t_fast.export.verify import ACTION_LIMITS

TRAINED = Path(__file__).resolve().parents[3] / "checkpoints" / "so100-sim-reach"


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="needs `pip install 'gr00t_fast[export]'`")
    return make_export(TRAINED, tmp_path_factory.mktemp("trained") / "onnx")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """To calibrate with, and held out."""
    pytest.importorskip("mujoco", reason="needs `pip install 'gr00t_fast[sim]'`")
    directory = tmp_path_factory.mktemp("recordings")
    return _recorded(directory / "calibration", range(500, 504)), _recorded(directory / "held_out", range(600, 604))


def _recorded(directory: Path, seeds: range) -> Path:
    """Episodes of the scripted expert, every third tick."""
    from gr00t_fast.virtual.sim.expert import expert
    from gr00t_fast.virtual.sim.simulation import TICK_S, Simulation

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


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "least_work"), [("int8", 0.95), ("fp8", 0.65)])
def test_a_trained_networks_actions_move_by_little(graphs: Path, recordings: tuple[Path, Path], scheme: str, least_work: float) -> None:
    """As `gr00t-fast quantise` decides by default, on 50 observations of episodes that calibration did not see."""
    seen, held_out = recordings
    network = GraphNetwork(target_for(TRAINED), read_manifest(graphs, "").shapes, ExportTables(graphs, ""), 4, scheme)
    scales, report = calibrate(network, cases_of(TRAINED, 64, str(seen)), CalibrationOptions())
    assert report["work_in_8_bits"] > least_work
    rounded = with_layers(network.module, network.rounded(scales))
    error = Trials(network, cases_of(TRAINED, 50, str(held_out))).error(rounded, network.parts)
    assert error.p50 > 0.001
    assert error.p99 < ACTION_LIMITS[scheme]
    assert error.displacement < 0.03
