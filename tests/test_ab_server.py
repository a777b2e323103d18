"""The A/B benchmark: what it compares, that it refuses to compare what disagrees, that its words follow its figures, and whole runs."""

from __future__ import annotations

import csv
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import nvidia_style_service as reference
import pytest
import torch
from golden_cases import recorded
from serving_fakes import ArithmeticPolicy

from benchmarks import ab_server
from benchmarks.ab_host import Addresses, Policies, ServerProcess, running
from benchmarks.ab_server import Arm, Config, DisagreementError, Setup, make_plan, measure, paired, resolved
from benchmarks.lib.random_checkpoint import write_random_checkpoint
from benchmarks.lib.reference import ReferencePreprocessing
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.errors import ConfigError, ObservationError, ServerError
from gr00t_fast.inputs.data_config import load_data_config

OURS = Setup("none", "ours", "eager", 4)
LEVELS = ("transport", "preprocessing", "engine", "steps")
OPTIONS = {
    **{"embodiment_tag": "new_embodiment", "data_config": "so100", "device": "cpu", "precision": "fp32"},
    **{"processor_path": None, "engine": "auto", "seed": 0},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("ab") / "checkpoint", size="tiny", resolution=(320, 240))


# --- what is compared --------------------------------------------------------------------------------------------------------------------


def plan_of(*factors: str, transports: tuple[str, ...] = ("none", "ipc", "tcp")):
    return make_plan(factors or LEVELS, transports, "eager", "eager", ["eager", "other"], 4, [4, 2, 8])


def test_every_contrast_changes_one_factor_and_the_waterfall_leads_from_the_baseline_to_ours() -> None:
    plan = plan_of()
    assert plan.baseline == Setup("tcp", "reference", "reference", 4)
    assert plan.ours == OURS
    for contrast in (*plan.path, *plan.alone):
        changed = [name for name in LEVELS if getattr(contrast.before, name) != getattr(contrast.after, name)]
        assert changed == [contrast.factor]
    assert [c.factor for c in plan.path] == ["transport", "preprocessing", "engine"]
    assert all(OURS in (c.before, c.after) for c in plan.alone)
    assert sorted(c.change for c in plan.alone if c.factor in ("steps", "transport", "engine")) == [
        *("engine: other → eager", "engine: reference → eager", "steps: 4 → 2", "steps: 4 → 8"),
        *("transport: ipc → in process", "transport: tcp → in process"),
    ]
    assert len(plan.setups) == len(set(plan.setups))


# --- how it is measured ------------------------------------------------------------------------------------------------------------------


def protocol(rounds: int = 5, warm_up: int = 2, settle: int = 1, max_s: float = 60.0) -> Config:
    return Config(rounds=rounds, warm_up=warm_up, settle=settle, max_minutes=max_s / 60)


INPUTS = [({"number": k}, np.full((1, 1), k, np.float32)) for k in range(3)]


def recording_arms(calls: list) -> dict[str, Arm]:
    def arm(name: str) -> Arm:
        def call(observation: dict, noise: np.ndarray) -> np.ndarray:
            calls.append((name, observation["number"], float(noise[0, 0])))
            return noise

        return Arm(call, lambda: {"stage": 1.0})

    return {name: arm(name) for name in "abc"}


def test_all_arms_get_the_same_inputs_each_round_in_an_order_that_changes() -> None:
    calls: list = []
    result = measure(recording_arms(calls), INPUTS, protocol())
    rounds = [calls[start : start + 6] for start in range(0, len(calls), 6)]
    assert len(rounds) == 7
    orders = set()
    for number, each in enumerate(rounds):
        assert {call[1:] for call in each} == {(number % 3, float(number % 3))}
        names = [name for name, *_ in each]
        assert names[::2] == names[1::2], "the uncounted call is the same arm's"
        assert sorted(names[::2]) == ["a", "b", "c"]
        orders.add(tuple(names[::2]))
    assert len(orders) > 1
    assert {name: len(samples) for name, samples in result.times_ms.items()} == {"a": 5, "b": 5, "c": 5}
    assert result.stages_ms["a"]["stage"] == [1.0] * 5
    assert not result.stopped_early


def test_the_time_limit_begins_with_the_first_counted_round() -> None:
    slow = Arm(lambda observation, noise: time.sleep(0.02) or noise)
    result = measure({"slow": slow}, INPUTS, protocol(rounds=50, warm_up=8, settle=0, max_s=0.1))
    assert result.stopped_early
    assert 2 <= result.rounds < 8, "eight rounds of warm-up take longer than the limit"
    assert measure({"slow": slow}, INPUTS, protocol(rounds=50, max_s=-1.0)).rounds == 1


def constant(value: float) -> Callable[..., np.ndarray]:
    return lambda observation, noise: np.full((16, 6), value, np.float32)


def test_a_last_bit_lost_in_transport_ends_the_run() -> None:
    served = replace(OURS, transport="tcp")
    measure({OURS: Arm(constant(1.0)), served: Arm(constant(1.0))}, INPUTS, protocol())
    with pytest.raises(DisagreementError, match=r"1\.19e-07 joint units apart.*server, tcp"):
        measure({OURS: Arm(constant(1.0)), served: Arm(constant(1.0 + 2**-23))}, INPUTS, protocol())


def test_arms_that_differ_in_more_than_transport_may_differ_up_to_their_limit() -> None:
    slow = replace(OURS, engine="reference")
    arms = {OURS: Arm(constant(1.0)), slow: Arm(constant(1.5))}
    assert measure(arms, INPUTS, protocol(), {(slow, OURS): 0.5}).differences[slow, OURS] == [0.5] * 7
    with pytest.raises(DisagreementError, match="must be the same function"):
        measure(arms, INPUTS, protocol(), {(slow, OURS): 0.4})


def test_differences_are_paired_by_round() -> None:
    disturbance = np.random.default_rng(0).exponential(50, 200)  # of the machine, which hits both arms of a round
    worth = paired(disturbance + 12, disturbance + 10)
    assert (worth["median"], worth["p25"], worth["p75"]) == (2, 2, 2)
    assert resolved(worth)
    noise = np.random.default_rng(1).normal(0, 10, (2, 200))
    assert not resolved(paired(*noise))
    assert [resolved(paired([3.0] * rounds, [1.0] * rounds)) for rounds in (1, 7, 8)] == [False, False, True]


# --- what it says ------------------------------------------------------------------------------------------------------------------------


def result_of(times_ms: dict[Setup, float], spread_ms: float = 0.1) -> dict:
    """A whole result from made-up times, transport alone at 2 ms."""
    plan, generator = plan_of(), np.random.default_rng(0)

    def arm(name: object) -> list[float]:
        return list(times_ms.get(name, 2.0) + generator.normal(0, spread_ms, 200))

    names = [*plan.setups, ("transport alone", "tcp"), ("ping", "tcp")]
    measured = ab_server.measure({name: Arm(constant(0.0)) for name in names}, INPUTS, protocol(rounds=1))
    measured.times_ms = {name: arm(name) for name in names}
    regime = {"cameras": 1, "resolution": [640, 480], "request_bytes": 921600}
    return regime | ab_server.evaluate(plan, measured, {}, {})


def falling(baseline_ms: float) -> dict[Setup, float]:
    """Transport worth 3 ms, pre-processing 5, the engine the rest."""
    first, second, third, ours = plan_of().waterfall
    return {first: baseline_ms, second: baseline_ms - 3, third: baseline_ms - 8, ours: 20.0}


def test_the_result_says_what_each_factor_is_worth_and_which_is_largest() -> None:
    result = result_of(falling(50.0))
    assert [round(row["worth_ms"]["median"]) for row in result["waterfall"]] == [3, 5, 22]
    assert result["speed_up_p50"] == pytest.approx(2.5, rel=0.02)
    assert result["ratio"]["median"] == pytest.approx(2.5, rel=0.02)
    said = " ".join(ab_server.sentences(result))
    assert re.search(r"costs (1\.9|2\.0)\d ms p50, .* p95\. A ping takes", said)
    assert "The largest part is engine: reference → eager" in said


def test_it_does_not_claim_what_it_cannot_tell() -> None:
    level = dict.fromkeys(plan_of().setups, 20.0)
    same = " ".join(ab_server.sentences(result_of(level, spread_ms=5.0)))
    assert "no difference that 200 rounds can tell from zero" in same
    assert re.search(r"(0\.9|1\.0)\d times \(quartiles", same), "the ratio is said whatever it is"
    slower = " ".join(ab_server.sentences(result_of({**level, OURS: 30.0})))
    assert "**slower** by 10.0 ms" in slower
    assert "takes 0.67 times" in slower


# --- the reference's pre-processing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["so100", "so100_dualcam"])
def test_the_reference_pre_processing_gives_what_nvidia_recorded(case: str, shared_dir: Path, eagle_dir: Path) -> None:
    golden = recorded(case, "plain", shared_dir)
    preprocessing = ReferencePreprocessing(open_checkpoint(golden.checkpoint), "new_embodiment", load_data_config(case), eagle_dir)
    observation = {key: value for key, value in golden.arrays.items() if key.startswith(("video.", "state.", "annotation."))}
    inputs = preprocessing(observation, torch.device("cpu"), torch.float32)
    assert torch.equal(inputs.pixel_values, golden.inputs.pixel_values)
    assert torch.equal(inputs.input_ids, golden.inputs.input_ids)
    assert torch.equal(inputs.image_positions, golden.inputs.image_positions)
    torch.testing.assert_close(inputs.state, golden.inputs.state)


def test_a_pre_processing_that_is_another_function_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = Policies(checkpoint, OPTIONS)
    config = load_data_config("so100")
    inputs = ab_server.example_inputs(policies.ours.metadata, config, (1, 16, 32), (320, 240), seed=0)
    assert ab_server.pixel_levels_apart(policies, inputs) == 0
    policy = policies.policy("reference", "eager", 4)
    for key, rows in policies.ours.get_action(*inputs).items():
        np.testing.assert_array_equal(policy.get_action(*inputs)[key], rows)
    with pytest.raises(ObservationError, match="training size only"):
        policy.get_action({**inputs[0], "video.webcam": np.zeros((1, 480, 640, 3), np.uint8)})
    monkeypatch.setattr("benchmarks.ab_host.makes_pixels", lambda engine: True)
    with pytest.raises(ConfigError, match="makes the pixels itself"):
        policies.policy("reference", "eager", 4)
    monkeypatch.undo()
    monkeypatch.setattr("benchmarks.lib.reference._CROP_SCALE", 0.9)
    with pytest.raises(DisagreementError, match="not the same function"):
        ab_server.pixel_levels_apart(policies, inputs)


# --- other processes ---------------------------------------------------------------------------------------------------------------------


def server_of(code: str, tmp_path: Path, address: str) -> ServerProcess:
    return ServerProcess([sys.executable, "-c", code], address, 3, tmp_path / "server.log", 5.0)


@pytest.mark.parametrize("preprocessing", ["ours", "reference"])
def test_every_arm_measures_the_same_function(preprocessing: str, checkpoint: Path) -> None:
    """With the engine exchanged, actions stay joint targets; pairs of engines have a limit at every precision."""
    policies = Policies(checkpoint, OPTIONS)
    inputs = ab_server.example_inputs(policies.ours.metadata, load_data_config("so100"), (1, 16, 32), (320, 240), seed=0)
    expected = policies.ours.get_action(*inputs)
    limits = ab_server.action_limits(plan_of(), policies.ours)
    assert all(np.isfinite(limit) for (before, after), limit in limits.items() if before.steps == after.steps)
    for key, rows in policies.policy(preprocessing, "reference", 4).get_action(*inputs).items():
        assert np.abs(rows - expected[key]).max() <= min(limits.values())


def test_a_server_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    code = "import os; print('x' * 10**6); raise SystemExit('no weights, threads=' + os.environ['OMP_NUM_THREADS'])"  # more than a pipe holds
    with (
        Addresses() as addresses,
        pytest.raises(ServerError, match="no weights, threads=3"),
        running([server_of(code, tmp_path, addresses.new("ipc"))], 30),
    ):
        pass


# --- whole runs --------------------------------------------------------------------------------------------------------------------------


def test_a_whole_run_leaves_table_plot_samples_and_one_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--size=tiny",
        "--resolution=320x240",
        "--device=cpu",
        "--precision=fp32",
        "--other_denoising_steps",
        "1",
    ]
    limits = ["--rounds=3", "--warm_up=1", "--cold_starts=1", "--first_calls=2", "--transports", "none", "tcp", f"--out={tmp_path}"]
    assert ab_server.main([*flags, *limits, "--json"]) == 0
    result = json.loads((tmp_path / "ab_server.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"machine", "versions", "git_commit", "command_line", "seed", "floor_ms"} <= result.keys()
    assert {arm["transport"]: arm["server"] for arm in result["arms"]} == {"none": None, "tcp": "-m gr00t_fast.serving"}
    assert all(arm["latency_ms"]["count"] == 3 for arm in result["arms"])
    assert result["agreement"]["same_bits_across_transports"]
    differs = {row["factor"]: row["largest_action_difference"] > 0 for row in result["alone"]}
    assert differs.keys() == {"transport", "preprocessing", "engine", "steps"}
    assert (differs["transport"], differs["steps"]) == (False, True)
    assert result["request_bytes"] > 320 * 240 * 3
    assert result["transport_alone"]["tcp"]["message_ms"]["p50"] > 0
    assert {row["served"] for row in result["cold_start"]} == {True, False}
    for row in result["cold_start"]:
        assert row["start_to_first_action_s"][0] > row["first_calls_ms"][0][0] / 1e3
    table = (tmp_path / "ab_server.md").read_text()
    assert "| transport: tcp → in process |" in table
    assert "Transport alone over tcp (1 x 320x240" in table
    assert (tmp_path / "ab_server.png").stat().st_size > 10_000
    with (tmp_path / "ab_server_samples.csv").open() as file:
        assert len(list(csv.reader(file))) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resolution=1280x720"], "was trained with 320x240"),
        (["--engine=warp"], "unknown engine 'warp'"),
        (["--denoising_steps=100000"], "denoising_steps"),
        (["--resolution=640"], "WIDTHxHEIGHT"),
        (["--rounds=0"], "--rounds=0"),
        (["--server=localhost:5555"], "expected an address such as tcp://"),
    ],
)
def test_mistakes_end_with_a_reason(flags: list[str], said: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ab_server.main([f"--model_path={checkpoint}", f"--out={tmp_path}", "--device=cpu", "--factors", "steps", "--rounds=1", *flags]) == 1
    assert said in capsys.readouterr().err


# --- a service that runs already ---------------------------------------------------------------------------------------------------------


def remote_flags(port: int, out: Path) -> list[str]:
    return [f"--server=tcp://127.0.0.1:{port}", "--calls=3", "--first_calls=2", "--timeout_s=20", "--device=cpu", f"--out={out}"]


def test_an_nvidia_style_service_is_timed_by_plain_requests(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with reference.Server(ArithmeticPolicy()) as service:
        assert ab_server.main([*remote_flags(service.port, tmp_path), f"--model_path={checkpoint}", "--precision=fp32"]) == 0
        asked = [request for request in service.requests if request.get("endpoint") == "get_action"]
        assert len(asked) == 2 + 2 * (3 + 3)  # first calls; then a settling and a timed one in each warm-up and counted round
        assert all("noise" not in request["data"] for request in asked)
    result = json.loads((tmp_path / "ab_server.json").read_text())
    assert {"theirs, served", "ours, in process", "ping"} <= result["latency_ms"].keys()
    assert result["theirs_minus_ours_ms"]["rounds"] == 3
    assert f"Theirs takes {result['theirs_over_ours']['median']:.2f} times" in (tmp_path / "ab_server.md").read_text()
    assert result["resolution"] == [320, 240]
    assert "its own and not known here" in (tmp_path / "ab_server.md").read_text()


def test_a_service_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Addresses() as addresses:
        port = int(addresses.new("tcp").rpartition(":")[2])
    assert ab_server.main(remote_flags(port, tmp_path)) == 1
    assert "nothing answers at" in capsys.readouterr().err
