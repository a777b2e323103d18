"""`--controller=auto`: what it chooses, that the choice keeps the arm moving, and that it gives way when inferences turn out longer. Virtual time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from control_fakes import FakeClock, FakePolicy, FakeRobot

from benchmarks.evaluate import Cell, EpisodeRunner, Settings
from benchmarks.lib.latency import VirtualWorker
from gr00t_fast import load_policy
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.control.binding import RobotBinding
from gr00t_fast.control.controller import ChunkController, ControllerOptions
from gr00t_fast.control.limits import DEFAULT_MAX_SPEED_DEG_S
from gr00t_fast.control.loop import ControlLoop, LoopOptions
from gr00t_fast.control.pacer import StopSignals
from gr00t_fast.control.report import as_text, build_report

FPS = 30.0
DEMO = Path(__file__).resolve().parent.parent / "checkpoints" / "so100-sim-reach"


class TimedPolicy(FakePolicy):
    """Says at warm-up what an inference will take (or nothing: None)."""

    told_ms: float | None = None

    def warm_up(self, instruction=None, prefix_method=None):
        return {} if self.told_ms is None else {"total": self.told_ms}


class Run:
    """A loop whose controller chooses, and whose policy takes `inference_ms` of virtual time and says at warm-up that it takes `told_ms`."""

    def __init__(
        self,
        inference_ms: float,
        told_ms: float | None,
        horizon: int = 16,
        when_late: str = "hold",
        **options: object,
    ) -> None:
        self.clock = FakeClock()
        self.robot, self.policy = FakeRobot(self.clock), TimedPolicy(self.clock, inference_ms / 1000)
        self.policy.told_ms = told_ms
        known = self.policy.metadata
        binding = RobotBinding(self.policy.get_modality_config(), known.state_widths, known.action_widths, SO100_JOINTS, {"front": "webcam"})
        self.said: list[str] = []
        control = ControllerOptions("auto", when_late=when_late, action_horizon=horizon)
        self.auto = ChunkController(self.policy, binding, "go", self.clock, FPS, control, VirtualWorker(self.clock), echo=self.said.append)
        options.setdefault("timeout_s", 3.0)
        self.loop = ControlLoop(
            self.robot, self.auto, LoopOptions(FPS, camera_fault=None, **options), self.clock, StopSignals(), echo=lambda line: None
        )

    def play(self) -> Run:
        self.auto.warm_up()
        self.loop.run()
        return self

    @property
    def underrun(self) -> int:
        return int(self.loop.trace.arrays()["underrun"].sum())


CHOICES = [
    (20, 16, False, "less than a tick"),
    (40, 16, True, "16 actions per chunk bridge it"),
    (200, 16, True, "longer than a tick"),
    (200, 8, False, "leave out --action_horizon"),
    (400, 16, False, "24 actions would"),
    (None, 16, True, "not known"),
]


@pytest.mark.parametrize(("told_ms", "horizon", "overlaps", "reason"), CHOICES)
def test_the_choice_and_its_reason_are_said_in_one_line(told_ms: float | None, horizon: int, overlaps: bool, reason: str) -> None:
    run = Run(0 if told_ms is None else told_ms, told_ms, horizon)
    run.auto.warm_up()
    assert run.auto.overlaps is overlaps
    (line,) = run.said
    assert reason in line
    assert "--controller=auto" in line
    assert "\n" not in line


def test_a_bridged_inference_pauses_the_arm_before_the_first_action_only() -> None:
    run = Run(200, 200).play()
    assert (run.underrun, run.loop.pacer.waiting_ticks, run.loop.pacer.missed_ticks) == (0, 0, 0)
    assert len(run.robot.sent) > 80
    assert np.diff([time_s for time_s, _ in run.robot.sent]).max() == pytest.approx(1 / FPS)


def test_a_short_inference_costs_no_pause_either() -> None:
    run = Run(20, 20, horizon=8).play()
    assert run.loop.pacer.waiting_ticks == 0
    assert run.auto.summary()["kind"] == "sync"


def test_one_that_no_chunk_bridges_is_waited_for() -> None:
    run = Run(400, 400, timeout_s=5.0).play()
    assert run.auto.summary()["kind"] == "sync"
    assert run.underrun == 0


@pytest.mark.parametrize(("inference_ms", "when"), [(700, "first chunk"), (400, "later chunks")])
def test_inferences_that_turn_out_longer_are_waited_for_instead_of_ending_the_run(inference_ms: int, when: str) -> None:
    run = Run(inference_ms, 40, timeout_s=20.0).play()
    assert run.loop.trace.ended_by == "done"
    assert run.auto.summary()["kind"] == "sync", when
    assert [line for line in run.said if "waits" in line and "does not bridge" in line]
    data = run.loop.trace.arrays()
    assert not data["underrun"][len(data["underrun"]) // 2 :].any()
    steps = np.abs(np.diff(np.array([targets for _, targets in run.robot.sent]), axis=0))
    assert steps.max() <= DEFAULT_MAX_SPEED_DEG_S / FPS + 1e-6, "going over to waiting is no leap"


def slow_at(run: Run, slow_s: float, is_slow: Callable[[int], bool]) -> Run:
    """Inferences take `slow_s` where `is_slow` says so of their number, else as long as the run was made with."""
    usual_s, answer = run.policy.inference_s, run.policy.get_action

    def get_action(*args: object, **options: object) -> dict[str, np.ndarray]:
        run.policy.inference_s = slow_s if is_slow(len(run.policy.seen)) else usual_s
        return answer(*args, **options)

    run.policy.get_action = get_action
    return run


def test_one_slow_inference_is_waited_for_and_then_the_arm_moves_again() -> None:
    run = slow_at(Run(180, 180, timeout_s=20.0), 0.7, lambda number: number == 0).play()
    assert run.auto.summary()["kind"] == "threaded"
    assert [("moves" in line, "waits" in line) for line in run.said] == [(True, False), (False, True), (True, False)]
    assert "bridge" in run.said[-1]
    assert "\n" not in run.said[-1]
    times_s = np.array([time_s for time_s, _ in run.robot.sent])
    assert np.diff(times_s[times_s > times_s[0] + 5.0]).max() == pytest.approx(1 / FPS), "no pause after it has gone back"
    steps = np.abs(np.diff(np.array([targets for _, targets in run.robot.sent]), axis=0))
    assert steps.max() <= DEFAULT_MAX_SPEED_DEG_S / FPS + 1e-6, "going back to moving is no leap"
    assert run.underrun == 0
    assert run.policy.resets == 1, "an episode goes on: the policy keeps what it remembers of it"


def test_inferences_that_are_slow_now_and_then_do_not_change_the_way_again_and_again() -> None:
    run = slow_at(Run(180, 180, timeout_s=300.0), 0.5, lambda number: number % 12 >= 8).play()
    assert run.loop.trace.ended_by == "done"
    assert len(run.loop.trace.chunks) > 200
    assert 3 <= len(run.said) <= 6


def test_inferences_within_a_tick_are_waited_for_without_a_pause() -> None:
    run = slow_at(Run(20, 200, timeout_s=20.0), 0.7, lambda number: number == 0).play()
    assert run.auto.summary()["kind"] == "sync"
    assert len(run.said) == 2


@pytest.mark.parametrize(("inference_ms", "kind", "why"), [(224, "threaded", "bridge it"), (400, "sync", "does not bridge")])
def test_inferences_that_take_longer_than_at_warm_up_are_chosen_for_again(inference_ms: int, kind: str, why: str) -> None:
    run = Run(inference_ms, 13, timeout_s=20.0).play()
    assert run.auto.summary()["kind"] == kind
    assert len(run.said) == 2
    reason = build_report(run.loop, {})["controller"]["chosen_because"]
    assert f"{inference_ms} ms" in reason
    assert why in reason
    if kind == "threaded":
        times_s = np.array([time_s for time_s, _ in run.robot.sent])
        assert np.diff(times_s[times_s > times_s[0] + 4.0]).max() == pytest.approx(1 / FPS), "no pause any more"
        steps = np.abs(np.diff(np.array([targets for _, targets in run.robot.sent]), axis=0))
        assert steps.max() <= DEFAULT_MAX_SPEED_DEG_S / FPS + 1e-6


def test_an_episode_after_one_that_went_back_to_moving_begins_as_any_other() -> None:
    run = slow_at(Run(180, 180, episodes=3, timeout_s=10.0), 0.7, lambda number: number == 0).play()
    assert run.auto.summary()["kind"] == "threaded"
    assert run.loop.trace.episodes == run.policy.resets == 3
    assert run.underrun == 0


def test_a_flag_about_overlap_decides() -> None:
    run = Run(20, 20, when_late="resume").play()
    assert run.auto.summary()["kind"] == "threaded"
    assert "--when_late" in run.said[0]


def test_episodes_after_the_first_keep_the_choice() -> None:
    run = Run(200, 200, episodes=3, timeout_s=1.0).play()
    assert run.loop.trace.episodes == 3
    assert (run.underrun, run.loop.pacer.waiting_ticks) == (0, 0)
    report = build_report(run.loop, {})
    assert "because" in as_text(report)
    assert report["controller"]["chosen_because"].startswith("an inference took 200 ms at warm-up")


def test_the_demo_network_at_200_ms_never_freezes_after_its_first_chunk() -> None:
    """Played by the product's loop in the simulated world, the network's own answers 200 ms late."""
    policy = load_policy(str(DEMO), precision="fp32", device="cpu", seed=0)
    runner = EpisodeRunner(policy.metadata, (16, 32), Settings("", episode_s=2.0))
    outcomes = {name: runner.play(policy, Cell(controller=name, latency_ms=200, action_horizon=16), seed=9_000_001) for name in ("auto", "threaded")}
    assert outcomes["auto"] == outcomes["threaded"]
    assert outcomes["auto"].underrun_ticks == 0
    assert outcomes["auto"].inferences > 3
