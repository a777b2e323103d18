"""Calibration of the torch engine `fp8`: what is recorded, kept and refused, and what it does to a trained network's actions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import target_for
from random_networks import TINY, edit_json, load_network, write_network
from safetensors.torch import load_file, save_file

from benchmarks.evaluate import reach_for_still_blocks
from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.cli import export
from gr00t_fast.console import Progress
from gr00t_fast.contracts import ActionPrefix
from gr00t_fast.engine import make_engine
from gr00t_fast.engine.cuda_graph import GraphEngine
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.fp8 import SCALES_NAME, prepare, read_calibration
from gr00t_fast.engine.fused import FusedModel
from gr00t_fast.engine.manifest import Manifest, describe_files, read_manifest
from gr00t_fast.engine.quantized import PARTS, InputScale, linear_layers, part_of, rewritten
from gr00t_fast.errors import ConfigError, EngineError, StaleEngineError
from gr00t_fast.export.calibrate import Settings, Trials, record, scales_of
from gr00t_fast.export.networks import TorchNetwork
from gr00t_fast.export.samples import Case, collect_cases, digest_of
from gr00t_fast.export.verify import ACTION_LIMITS
from gr00t_fast.model import Gr00t
from gr00t_fast.policy import load_policy

TRAINED = Path(__file__).parent.parent / "checkpoints" / "so100-sim-reach"
FEW = ("--observations=random:0", "--frames=4", "--allow_few", "--device=cpu")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture(scope="module")
def calibrated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer of the tiny network."""
    out = tmp_path_factory.mktemp("calibrated") / "fp8"
    assert run(tiny, out, "--trial_frames=0", *FEW) == 0
    return out


def run(checkpoint: Path, out: Path, *flags: str) -> int:
    return export.calibrate([f"--model_path={checkpoint}", f"--out={out}", "--denoising_steps=2", *flags])


def cases_of(checkpoint: Path, count: int = 3, source: str = "random:0") -> list[Case]:
    return collect_cases(target_for(checkpoint), source, frames=count, seed=0, noise_seed=0, progress=Progress(), allow_few=True)[0]


# --- what is recorded


def test_statistics_cover_every_layer_and_frame(tiny: Path) -> None:
    model, cases = load_network(tiny), cases_of(tiny)
    recorded = {name: entry for entry in record(TorchNetwork(model, 2, emulated=True), cases, 0, Progress()) for name in entry.readers}
    assert set(recorded) == set(linear_layers(model))
    largest: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}

    def hook(name: str):
        def see(_, inputs) -> None:
            values = inputs[0].flatten(0, -2)
            rows[name] = rows.get(name, 0) + len(values)
            largest[name] = torch.maximum(largest.get(name, torch.zeros(values.shape[-1])), values.abs().amax(dim=0))

        return see

    for name, layer in linear_layers(model).items():
        layer.register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        for case in cases:
            model(case.inputs, case.noise, model.head.step_tables(2))
    for name, entry in recorded.items():
        torch.testing.assert_close(entry.largest, largest[name], rtol=1e-5, atol=1e-6)
        assert rows[name] == entry.rows_per_case * len(cases), name


def test_layers_that_read_one_tensor_are_recorded_as_one(tiny: Path) -> None:
    readers = [entry.readers for entry in record(TorchNetwork(load_network(tiny), 2, emulated=True), cases_of(tiny, 1), 0, Progress())]
    assert ("language.blocks.0.mlp.gate", "language.blocks.0.mlp.up") in readers
    assert sum(len(names) for names in readers) == len(readers) + 1


def test_a_digest_tells_other_observations_from_the_same(tiny: Path) -> None:
    assert digest_of(cases_of(tiny)) == digest_of(cases_of(tiny))
    assert digest_of(cases_of(tiny)) != digest_of(cases_of(tiny, source="random:1"))


# --- the store


def test_what_was_written_is_what_is_read(tiny: Path, calibrated: Path) -> None:
    target, manifest = target_for(tiny), read_manifest(calibrated, "")
    found = read_calibration(calibrated, target)
    assert set(found.scales) == set(linear_layers(load_network(tiny)))
    assert found.scales["language.blocks.0.mlp.gate"] is found.scales["language.blocks.0.mlp.up"]
    assert len(manifest.quantisation["calibration"]["digest"]) == 64
    again = export.calibrate.parse(["--model_path=x", *manifest.flags])  # the message that names the command can be typed
    assert (again.denoising_steps, again.frames, again.observations) == (2, 4, "random:0")


def test_a_missing_calibration_names_the_command(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"Run: gr00t-fast calibrate --model_path=.* --observations=DATASET"):
        read_calibration(tmp_path / "nothing", target_for(tiny))


def test_other_weights_and_statistics_make_it_stale(tiny: Path, calibrated: Path, tmp_path: Path) -> None:
    other = write_network(tmp_path / "weights", TINY, seed=1)
    with pytest.raises(StaleEngineError, match=r"(?s)other weights.*gr00t-fast calibrate"):
        read_calibration(calibrated, target_for(other))
    other = Path(shutil.copytree(tiny, tmp_path / "statistics"))
    edit_json(other / "experiment_cfg" / "metadata.json", "new_embodiment.statistics.state.single_arm.max", [100.0, 101.0, 102.0, 103.0, 104.0])
    with pytest.raises(StaleEngineError, match="other metadata"):
        read_calibration(calibrated, target_for(other))
    two = write_network(tmp_path / "two", TINY, data_config="so100_dualcam")
    with pytest.raises(StaleEngineError, match="cameras: made for"):
        read_calibration(calibrated, target_for(two, "so100_dualcam"))


@pytest.mark.parametrize("damage", ["cut", "altered", "negative", "removed"])
def test_damaged_scales_are_refused(tiny: Path, calibrated: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(calibrated, tmp_path / "copy"))
    file = copy / SCALES_NAME
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "altered":
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(bytes(raw))
    elif damage == "removed":
        file.unlink()
    else:  # with a manifest that agrees
        tensors = load_file(str(file))
        key = next(key for key in tensors if key.endswith(".largest"))
        save_file({**tensors, key: torch.tensor(-1.0)}, str(file))
        manifest = read_manifest(copy, "")
        Manifest(**{**vars(manifest), "files": describe_files(copy)}).write(copy)
    with pytest.raises(EngineError, match=r"gr00t-fast calibrate"):
        read_calibration(copy, target_for(tiny))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--observations=random:0", "--frames=4"), 1, "4 frames, expected at least 128"),
        (("--observations=nowhere",), 1, "neither a LeRobotDataset"),
        ((*FEW, "--denoising_steps=0"), 2, "must be at least 1"),
        ((*FEW, "--camera_map=front"), 2, "--camera_map: expected names"),
        ((), 2, "--observations is missing"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], code: int, message: str
) -> None:
    assert export.calibrate([f"--model_path={tiny}", f"--out={tmp_path / 'out'}", *flags]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(tiny: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny, calibrated, *FEW) == 1
    assert "say --overwrite" in capsys.readouterr().err


def test_parts_that_are_not_named_stay_as_they_are(tiny: Path, tmp_path: Path) -> None:
    assert run(tiny, tmp_path / "out", "--parts", "vision", "refine", "--trial_frames=0", *FEW) == 0
    found = read_calibration(tmp_path / "out", target_for(tiny))
    assert {part_of(name) for name in found.scales} == {"vision", "refine"}


def test_a_limit_that_nothing_meets_keeps_every_layer(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny, tmp_path / "out", "--trial_frames=1", "--limit=1e-9", "--json", *FEW) == 0
    assert json.loads(capsys.readouterr().out)["work_in_8_bits"] == 0
    assert read_calibration(tmp_path / "out", target_for(tiny)).scales == {}


# --- from a name to an engine


def test_load_policy_says_what_is_missing_before_it_reads_weights(tiny: Path, calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="engine 'fp8' needs a CUDA GPU of compute capability 8.9"):
        load_policy(tiny, engine="fp8", device="cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    with pytest.raises(EngineError, match=r"exports/fp8 holds no exported engine.*gr00t-fast calibrate"):
        prepare("fp8", tiny / "exports" / "fp8", target_for(tiny), CUDA)
    assert set(prepare("fp8", calibrated, target_for(tiny), CUDA).keywords["calibration"].scales) == set(linear_layers(load_network(tiny)))
    with pytest.raises(ConfigError, match="needs files besides the torch model"):
        make_engine("fp8", load_network(tiny))


def test_in_the_fused_model_the_rounded_layers_do_what_they_do_in_the_plain_one(tiny: Path, calibrated: Path) -> None:
    """What the engine runs but for the compiler and the kernel of the steps, which have tests of their own; gate and up are one layer here."""
    rounded = rewritten(load_network(tiny), read_calibration(calibrated, target_for(tiny)).scales, emulated=True)
    twin = EagerEngine(rounded)
    twin.device, twin.dtype = rounded.device, rounded.dtype
    expecting = load_policy(tiny, engine=twin, denoising_steps=2)
    policy = load_policy(tiny, engine=GraphEngine("fp8", FusedModel(rounded), continues=frozenset({"prefix"})), denoising_steps=2)
    seen, noise = policy.example_observation("pick"), np.random.default_rng(0).standard_normal((1, 16, 32)).astype(np.float32)
    got, expected = policy.get_action(seen, noise=noise), expecting.get_action(seen, noise=noise)
    # rounding falls to the other side now and then
    np.testing.assert_allclose(got["action.single_arm"], expected["action.single_arm"], atol=0.5)
    with pytest.raises(ConfigError, match="'fp8' cannot continue a chunk by 'rtc'.*--smoothing=prefix"):
        policy.get_action(seen, prefix=ActionPrefix({key: rows[3:] for key, rows in expected.items()}, 1, "rtc"))


@pytest.mark.parametrize("half", ["gate", "up"])
def test_a_calibration_that_rounds_gate_without_up_is_refused(tiny: Path, half: str) -> None:
    with pytest.raises(EngineError, match=r"gate and up.*gr00t-fast calibrate"):
        FusedModel(rewritten(load_network(tiny), {f"language.blocks.0.mlp.{half}": InputScale(1.0)}))


# --- a trained network


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Episodes of the scripted expert, every third tick, in two directories: to calibrate with, and to compare on."""
    pytest.importorskip("mujoco", reason="needs `pip install 'gr00t_fast[sim]'`")
    from gr00t_fast.robots.sim.expert import expert
    from gr00t_fast.robots.sim.simulation import TICK_S, Simulation

    simulation, directories = Simulation("reach", 0), []
    for name, seeds in (("calibration", range(500, 508)), ("held_out", range(600, 612))):
        directory = tmp_path_factory.mktemp(name)
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
        directories.append(directory)
    return tuple(directories)


class Trained:
    """The demo's network, what calibration says of it, and trials on observations that calibration did not see."""

    def __init__(self, recordings: tuple[Path, Path]) -> None:
        checkpoint = open_checkpoint(TRAINED)
        self.model = load_model(checkpoint, "new_embodiment", torch.device("cpu"), torch.float32)
        calibration, self.held_out = (cases_of(TRAINED, 128, str(directory)) for directory in recordings)
        self.network = TorchNetwork(self.model, 4, emulated=True)
        self.statistics = record(self.network, calibration, 0, Progress())
        self.plain = self.trials(self.held_out, 4)

    def trials(self, cases: list[Case], steps: int) -> Trials:
        return Trials(TorchNetwork(self.model, steps, emulated=True), cases, {})

    def rounded(self, parts: tuple[str, ...] = tuple(PARTS)) -> Gr00t:
        """Every layer of `parts`."""
        scales, _ = scales_of(self.network, self.statistics, Settings("fp8", "torch", 4), parts, Progress())
        return rewritten(self.model, scales, emulated=True)


@pytest.fixture(scope="module")
def trained(recordings: tuple[Path, Path]) -> Trained:
    return Trained(recordings)


@pytest.mark.parametrize("parts", [tuple(PARTS), ("dit",)])
def test_a_trained_networks_actions_move_by_little(trained: Trained, parts: tuple[str, ...]) -> None:
    """Every layer of the parts rounded, on 100 observations of other episodes."""
    assert len(trained.held_out) >= 100
    error = trained.plain.error_of(trained.rounded(parts), parts)
    print(parts, error.describe())
    assert error.p50 > 0.001
    assert error.p99 < ACTION_LIMITS["fp8"]
    assert error.displacement < 0.03


def test_each_part_of_the_network_can_be_rounded_alone(trained: Trained) -> None:
    few = trained.trials(trained.held_out[::4], 4)
    parts = {part: few.error_of(trained.rounded((part,)), (part,)).rms for part in PARTS}
    everything = few.error_of(trained.rounded(), PARTS).rms
    assert min(parts.values()) > 0
    assert everything < 1.5 * np.linalg.norm(list(parts.values()))  # parts' errors are independent, about


def test_fewer_denoising_steps_are_covered(trained: Trained) -> None:
    for steps in (1, 2):
        assert trained.trials(trained.held_out[::4], steps).error_of(trained.rounded(), PARTS).p99 < ACTION_LIMITS["fp8"], steps


def test_opting_layers_out_lowers_the_error_on_other_observations(trained: Trained, recordings: tuple[Path, Path], tmp_path: Path) -> None:
    flags = [f"--observations={recordings[0]}", "--allow_few", "--limit=0.7", "--device=cpu", "--trial_frames=6", "--parts", "vision", "dit"]
    assert export.calibrate([f"--model_path={TRAINED}", f"--out={tmp_path / 'fp8'}", *flags]) == 0
    calibration = read_calibration(tmp_path / "fp8", target_for(TRAINED))
    everything = trained.plain.error_of(trained.rounded(("vision", "dit")), PARTS)
    chosen = trained.plain.error_of(rewritten(trained.model, calibration.scales, emulated=True), PARTS)
    assert 0 < len(calibration.scales) < sum(part_of(name) in ("vision", "dit") for name in linear_layers(trained.model))
    assert chosen.p99 < min(0.9 * everything.p99, ACTION_LIMITS["fp8"])
    assert chosen.rms < 0.9 * everything.rms


def test_fp8_still_reaches_the_block(trained: Trained) -> None:
    model = trained.rounded()
    engine = EagerEngine(model)
    engine.device, engine.dtype = model.device, model.dtype
    policy = load_policy(TRAINED, engine=engine, action_horizon=8)
    assert all(outcome.solved_s is not None for outcome in reach_for_still_blocks(policy, (16, 32), range(2)))
