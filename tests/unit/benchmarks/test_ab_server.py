"""The A/B benchmark: it refuses to compare what disagrees, and a whole run with servers in other processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import nvidia_style_service as nvidia
import pytest
import torch
from golden_cases import load_case
from serving_fakes import ArithmeticPolicy

from benchmarks import ab_server
from benchmarks.ab_server import Config, Contrast, DisagreementError, Setup, make_plan, measure, paired
from benchmarks.lib.reference import ReferencePreprocessing
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.inputs.data_config import load_data_config

OURS = Setup("none", "ours", "eager", 4)
INPUTS = [({"number": k}, np.full((1, 1), k, np.float32)) for k in range(3)]
FAST = Config(rounds=3, warm_up=1, settle=1)


def test_every_contrast_changes_one_factor_and_the_waterfall_leads_from_the_baseline_to_ours() -> None:
    plan = make_plan(Config(other_denoising_steps=[4, 2]), OURS)
    assert plan.waterfall[0] == Setup("tcp", "reference", "reference", 4)
    assert plan.waterfall[-1] == OURS
    assert [c.factor for c in plan.path] == ["transport", "preprocessing", "engine"]
    changes = ["engine: reference → eager", "preprocessing: reference → ours", "steps: 4 → 2"]
    assert sorted(c.change for c in plan.alone) == [*changes, "transport: ipc → in process", "transport: tcp → in process"]


def constant(value: float):
    return lambda observation, noise: np.full((16, 6), value, np.float32)


def test_all_arms_get_the_same_inputs_each_round_in_an_order_that_changes() -> None:
    calls: list[tuple[str, int]] = []

    def arm(name: str):
        return lambda observation, noise: calls.append((name, observation["number"])) or noise

    result = measure({name: arm(name) for name in "abc"}, INPUTS, replace(FAST, rounds=6), {})
    rounds = [calls[start : start + 6] for start in range(0, len(calls), 6)]
    assert [{number for _, number in each} for each in rounds] == [{k % 3} for k in range(7)]
    assert all(sorted(name for name, _ in each[::2]) == ["a", "b", "c"] and each[::2] == each[1::2] for each in rounds)
    assert len({tuple(each) for each in rounds[::3]}) > 1
    assert {name: len(samples) for name, samples in result.times_ms.items()} == {"a": 6, "b": 6, "c": 6}


def test_arms_that_disagree_end_the_run() -> None:
    pair, next_value = Contrast(replace(OURS, engine="other"), OURS), float(np.nextafter(np.float32(1), np.float32(2)))
    for other, limit in ((1.0, 0.0), (1.25, 0.5)):
        measured = measure({OURS: constant(1.0), pair.before: constant(other)}, INPUTS, FAST, {pair: limit})
        assert measured.differences == {pair: other - 1}
    for other, limit in ((next_value, 0.0), (2.0, 0.5), (np.nan, np.inf)):
        with pytest.raises(DisagreementError, match="other engine"):
            measure({OURS: constant(1.0), pair.before: constant(other)}, INPUTS, FAST, {pair: limit})


def test_a_difference_is_claimed_only_where_it_can_be_told() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(20, 0.1, 200)
    assert paired(base + 3, base)["resolved"]
    assert paired(base + 3, base)["median"] == pytest.approx(3, abs=0.05)
    assert not paired(base + generator.normal(0, 5, 200), base)["resolved"]
    assert not paired([3.0] * 7, [1.0] * 7)["resolved"], "seven rounds cannot"


@pytest.mark.parametrize("case", ["so100", "so100_dualcam"])
def test_the_reference_pre_processing_gives_what_nvidia_recorded(case: str, golden_dir: Path, eagle_dir: Path) -> None:
    golden = load_case(golden_dir / case, "plain")
    preprocessing = ReferencePreprocessing(open_checkpoint(golden.checkpoint), "new_embodiment", load_data_config(case), eagle_dir)
    observation = {key: value for key, value in golden.arrays.items() if key.startswith(("video.", "state.", "annotation."))}
    inputs = preprocessing(observation, torch.device("cpu"), torch.float32)
    assert torch.equal(inputs.pixel_values, golden.inputs.pixel_values)
    assert torch.equal(inputs.input_ids, golden.inputs.input_ids)
    assert torch.equal(inputs.image_positions, golden.inputs.image_positions)
    torch.testing.assert_close(inputs.state, golden.inputs.state)


def run(out: Path, *flags: str) -> int:
    small = ("--size=tiny", "--resolution=320x240", "--device=cpu", "--precision=fp32", "--rounds=3", "--warm_up=1", "--settle=0")
    return ab_server.main([*small, *flags, f"--out={out}"])


@pytest.mark.slow
def test_a_whole_run_beside_a_service_that_runs_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nvidia.Server(ArithmeticPolicy()) as service:
        flags = ("--other_denoising_steps=1", "--transports", "none", "tcp", "--json")
        assert run(tmp_path, *flags, f"--server=tcp://127.0.0.1:{service.port}") == 0
        assert all("noise" not in request["data"] for request in service.requests if request.get("endpoint") == "get_action")
    result = json.loads((tmp_path / "ab_server.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"machine", "versions", "git_commit", "command_line", "seed"} <= result.keys()
    assert {arm["transport"] for arm in result["arms"]} == {"none", "tcp"}
    assert all(arm["latency_ms"]["count"] == 3 for arm in result["arms"])
    assert len(result["others"]) == 1
    assert result["pixel_levels_apart"] == 0
    differs = {row["factor"]: row["largest_action_difference"] > 0 for row in result["alone"]}
    assert differs.keys() == {"transport", "preprocessing", "engine", "steps"}
    assert (differs["transport"], differs["steps"]) == (False, True)
    assert "| transport: tcp → in process |" in (tmp_path / "ab_server.md").read_text()


def test_a_pre_processing_that_is_another_function_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("benchmarks.lib.reference._CROP_SCALE", 0.9)
    assert run(tmp_path, "--factors=preprocessing") == 1
    assert "grey levels" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "named"), [("--engine=warp", "warp"), ("--resolution=640", "WIDTHxHEIGHT"), ("--rounds=0", "--rounds=0")])
def test_mistakes_end_with_a_reason(flag: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--factors=steps", flag) in (1, 2)
    assert named in capsys.readouterr().err
