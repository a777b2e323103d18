"""The state-conditioned study of `place`: what is known of the scene, labels under disturbance, exact continuation, layouts apart, a run in small."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mujoco")
from gr00t_fast.errors import ConfigError
from gr00t_fast.robots.so100_sim.expert import expert
from gr00t_fast.robots.so100_sim.simulation import HOME_DEG, Simulation
from gr00t_fast.robots.so100_sim.units import GRIPPER
from training import place_episodes, place_state
from training.labels import HORIZON
from training.place_episodes import Disturbance, Episodes, episode, load_episodes, make_shard, write_shards
from training.place_network import PlaceNetwork, PlaceRun, Scaling
from training.place_report import as_table
from training.place_trial import Outcome, PlaceTrials, expert_outcomes, paired, summary
from training.place_world import SCENE_PARTS, SUCCESS_TICKS, PlaceWorld
from training.run import Options
from training.samples import FIRST_LAYOUT_SEED

SMALL = Options(steps=40, batch=16, draws=1, rate=1e-3, seed=3)


@pytest.fixture(scope="session")
def episodes() -> Episodes:
    return make_shard(FIRST_LAYOUT_SEED, 4)


@pytest.fixture
def world() -> PlaceWorld:
    return PlaceWorld()


# --- what is known, and what counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("yaw", [-0.7, 0.0, 0.5])
@pytest.mark.parametrize("side", [np.array([1, 0, 0, 0]), np.array([1, 1, 0, 0]) / np.sqrt(2), np.array([1, 0, 1, 0]) / np.sqrt(2)])
def test_the_turn_of_the_block_is_that_of_its_sides_whichever_side_is_up(yaw: float, side: np.ndarray) -> None:
    simulation = Simulation("place", 0)
    turned = np.zeros(4)
    simulation._mujoco.mju_mulQuat(turned, np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]), side.astype(float))
    simulation.data.joint("block").qpos[3:] = turned
    simulation._update_poses()
    assert simulation.block_yaw_rad == pytest.approx(yaw, abs=1e-9)


def test_the_scene_says_where_things_are(world: PlaceWorld) -> None:
    world.reset(7)
    layout, scene = world.simulation.layout, world.scene
    np.testing.assert_allclose(scene[SCENE_PARTS["block"]][:2], layout.block_xy_m, atol=1e-6)
    np.testing.assert_allclose(np.arctan2(scene[4], scene[3]) / 4, layout.block_yaw_rad, atol=1e-6)
    np.testing.assert_allclose(scene[SCENE_PARTS["bowl"]], layout.bowl_xy_m, atol=1e-6)
    assert scene[SCENE_PARTS["grip"]] == 0


def test_the_expert_holds_once_lifts_once_and_solves(world: PlaceWorld) -> None:
    world.reset(0)
    held, failed = [], set()
    for target in expert(world.simulation):
        world.send(target)
        held.append(world.held)
        failed.add(world.failed_at)
        assert not world.lost
    assert np.count_nonzero(np.diff(held)) == 2, "taken once, let go once"
    assert failed == {"grasp", "transport", "release", None}, "in this order an episode would have failed"
    assert world.solved is not None
    assert world.solved <= world.tick
    assert world.lifts == 1


def test_a_block_left_behind_is_lost(world: PlaceWorld) -> None:
    """The jaw closes on nothing."""
    world.reset(0)
    shut = HOME_DEG.copy()
    shut[GRIPPER] = 2
    for _ in range(5):
        world.send(shut)
    assert world.lost
    assert not world.held


def test_success_takes_some_ticks_in_a_row(world: PlaceWorld) -> None:
    world.reset(0)
    world.simulation.data.joint("block").qpos[:3] = world.simulation.bowl_m + [0, 0, 0.02]
    ticks = 0
    while world.solved is None:
        world.send(HOME_DEG)
        ticks += 1
        assert ticks < 30
    assert ticks >= SUCCESS_TICKS


# --- demonstrations ----------------------------------------------------------------------------------------------------------------------


def test_labels_are_what_the_expert_wants_where_the_arm_is(world: PlaceWorld) -> None:
    """The same script, looking at the same disturbed arm, wants what was recorded; what the arm was sent is something else."""
    seed, played = FIRST_LAYOUT_SEED, []
    sent, send = [], world.send
    world.send = lambda targets: (sent.append(targets.copy()), send(targets))[1]
    for _, _, targets, _ in episode(world, seed):
        played.append(targets)
    rng = np.random.default_rng([seed, 11])
    disturbance, twin = Disturbance(rng), PlaceWorld()
    twin.reset(seed)
    twin.begin_at(HOME_DEG + rng.normal(0, place_episodes._START_DEG, 6) * place_episodes._BODY)
    for wanted, target, label in zip(expert(twin.simulation), sent, played, strict=False):
        np.testing.assert_array_equal(wanted, label)
        twin.send(target)
    away = np.abs(np.array(sent) - np.array(played))
    assert away[:, :GRIPPER].max() > 1, "nothing was disturbed: the comparison would prove nothing"
    assert not away[:, GRIPPER].any(), "the jaw is left alone"
    assert disturbance(clear=True).shape == (6,)


def test_a_chunk_ends_with_its_episode(episodes: Episodes) -> None:
    first_end = int(episodes.ends[0])
    chunks = episodes.chunks(np.array([0, first_end - 3, first_end]))
    np.testing.assert_array_equal(chunks[0], episodes.targets[:HORIZON])
    np.testing.assert_array_equal(chunks[1][:3], episodes.targets[first_end - 3 : first_end])
    np.testing.assert_array_equal(chunks[1][3:], np.repeat(episodes.targets[first_end - 1 : first_end], HORIZON - 3, 0))
    np.testing.assert_array_equal(chunks[2], episodes.targets[first_end : first_end + HORIZON])


def test_training_layouts_are_apart_from_those_that_are_evaluated(episodes: Episodes) -> None:
    assert episodes.seeds.min() >= FIRST_LAYOUT_SEED
    arguments = ["--out=unused", f"--first_seed={FIRST_LAYOUT_SEED - 10}", "--trials=11"]
    assert place_state.main(arguments) == 1


def test_shards_are_continued_and_the_same_from_any_number_of_processes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(place_episodes, "SHARD", 2)
    one, two = tmp_path / "one", tmp_path / "two"
    count = 2 * place_episodes.SHARD
    done = list(write_shards(two, count, 1, processes=2))
    assert done == [0, count // 2, count]
    list(write_shards(one, count // 2, 1, processes=1))
    file = next(one.glob("*.npz"))
    written = file.stat().st_mtime_ns
    assert list(write_shards(one, count // 2, 1, processes=1)) == [count // 2]
    assert file.stat().st_mtime_ns == written
    for name, column in vars(load_episodes(one, count // 2)).items():
        np.testing.assert_array_equal(column, getattr(load_episodes(two, count // 2), name), err_msg=name)
    assert len(load_episodes(two, count)) > len(load_episodes(one, count // 2))
    with pytest.raises(ConfigError, match="'seed': 1"):
        list(write_shards(one, count, 2, processes=1))


# --- training ----------------------------------------------------------------------------------------------------------------------------


def test_a_continued_run_is_the_same_run(episodes: Episodes, tmp_path: Path) -> None:
    whole, first = PlaceRun(episodes, SMALL), PlaceRun(episodes, SMALL)
    straight = [whole.step()["flow"] for _ in range(6)]
    pieces = [first.step()["flow"] for _ in range(3)]
    first.save(tmp_path / "state.pt")
    second = PlaceRun(episodes, SMALL)
    second.load(tmp_path / "state.pt")
    pieces += [second.step()["flow"] for _ in range(3)]
    assert pieces == straight
    for (name, one), two in zip(whole.network.state_dict().items(), second.network.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    with pytest.raises(ConfigError, match=r"rate 0\.001 there, 0\.002 here"):
        PlaceRun(episodes, replace(SMALL, rate=2e-3)).load(tmp_path / "state.pt")


def test_training_learns_and_uses_the_scene(episodes: Episodes) -> None:
    run = PlaceRun(episodes, replace(SMALL, steps=40))
    before = run.check(episodes, rows=100)
    while not run.done:
        run.step()
    after = run.check(episodes, rows=100)
    assert after["held_out_flow"] < 0.6 * before["held_out_flow"]
    assert after["action_error_deg"] < 0.7 * before["action_error_deg"]
    joints, scene, _ = run._tensors(episodes, np.arange(4))
    noise = torch.randn((4, HORIZON, 32), generator=torch.Generator().manual_seed(0))
    for name, part in SCENE_PARTS.items():
        elsewhere = scene.clone()
        elsewhere[:, part] += 0.5
        with torch.no_grad():
            here, there = (run.network(joints, place, noise, run.network.head.step_tables(2)) for place in (scene, elsewhere))
        assert (here - there).abs().max() > 1e-3, f"{name} changes nothing"


def test_scaling_and_back(episodes: Episodes) -> None:
    scaling = Scaling.of(episodes)
    values = scaling.normalised(episodes.targets, "targets")
    assert values.abs().max() <= 1 + 1e-6
    np.testing.assert_allclose(scaling.targets_deg(values), episodes.targets, atol=1e-3)
    still = replace(scaling, joints=np.zeros((2, 6)))
    assert not still.normalised(np.ones((3, 6)), "joints").any()


# --- closed loop -------------------------------------------------------------------------------------------------------------------------


class Recall(PlaceNetwork):
    """Remembers the noise it is given."""

    def forward(self, joints, scene, noise, tables):
        self.noises = [*getattr(self, "noises", []), noise]
        return super().forward(joints, scene, noise, tables)


def test_settings_meet_the_same_noise_and_an_untrained_network_fails(episodes: Episodes) -> None:
    network = Recall(0)
    trials = PlaceTrials(network, Scaling.of(episodes), range(3), max_ticks=16)
    first = trials.play(1, 8)
    trials.play(4, 16)
    assert [len(noise) for noise in network.noises] == [3, 3, 3]
    assert torch.equal(network.noises[0], network.noises[2]), "the first inference of each layout, whatever the setting"
    assert not torch.equal(network.noises[0], network.noises[1])
    assert not torch.equal(network.noises[0][0], network.noises[0][1])
    assert first == trials.play(1, 8), "an episode repeats"
    assert first == [Outcome(seed, None, "grasp", lifts=0) for seed in range(3)]


def test_the_expert_is_judged_by_the_same_rules() -> None:
    outcomes = expert_outcomes(range(4))
    assert all(outcome.ticks is not None and 60 < outcome.ticks < 130 for outcome in outcomes)
    assert {outcome.failed_at for outcome in expert_outcomes(range(2), max_ticks=10)} == {"grasp"}


def test_a_summary_counts() -> None:
    found = summary([Outcome(0, 90, None, lifts=2), Outcome(1, None, "grasp"), Outcome(2, 30, None), Outcome(3, None, "grasp")])
    assert (found["successes"], found["rate"], found["failed_seeds"]) == (2, 0.5, [1, 3])
    assert found["solved_after_a_fall"] == 1
    assert found["failed_at"] == {"grasp": 2, "transport": 0, "release": 0}
    assert found["seconds_p50_p95"] == [2.0, 2.9]
    assert found["wilson_95"] == pytest.approx([0.15, 0.85], abs=1e-3)
    assert summary([Outcome(0, None, "release")])["seconds_p50_p95"] is None


def test_pairs_are_layouts_that_only_one_setting_solved() -> None:
    one, two = (
        [Outcome(seed, 90 if solved else None, None) for seed, solved in enumerate(row)] for row in ([1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0])
    )
    assert paired(one, two) == {"only_here": 1, "only_there": 4, "p": 0.375}  # (1 + 5) / 32, twice
    assert paired(one, one)["p"] == 1
    with pytest.raises(ValueError, match="same layouts"):
        paired(one[:2], [one[1], one[0]])
    settings = place_state.settings_of({(8, 2): one, (8, 4): two, (16, 2): one})
    assert [setting.get("against_4_steps") for setting in settings] == [paired(one, two), None, None]


# --- the command -------------------------------------------------------------------------------------------------------------------------


def test_the_command_in_small_goes_on_and_says_what_it_is(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(place_episodes, "SHARD", 3)
    monkeypatch.setattr(place_state, "_HELD_OUT", 3)
    arguments = [f"--out={tmp_path}", "--episodes=3", "--steps=4", "--batch=8", "--trials=2", "--max_ticks=24", "--check_every=2"]
    arguments += ["--denoising_steps", "1", "2", "--horizons", "8", "--processes=1"]
    assert place_state.main([*arguments, "--minutes=1e-6"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["training"]["steps"] == 1
    assert place_state.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["training"]["steps"], result["training"]["stopped_by"]) == (4, "the last step")
    assert [(s["horizon"], s["denoising_steps"], s["episodes"]) for s in result["settings"]] == [(8, 1, 2), (8, 2, 2)]
    assert result == json.loads((tmp_path / "place_state.json").read_text())
    table = (tmp_path / "place_state.md").read_text()
    assert "not a\nvision-language-action policy" in table.replace("**", "")
    assert table == as_table(result) + "\n"
    assert (tmp_path / "place_state.png").stat().st_size > 5000
    kept = json.loads((tmp_path / "episodes.json").read_text())
    assert set(kept) == {"expert", "horizon 8, steps 1", "horizon 8, steps 2"}
    assert set(kept["expert"][0]) == set(asdict(Outcome(0, None, None)))
    assert place_state.main([*arguments, "--rate=0.5"]) == 1
    assert "another run" in capsys.readouterr().err


def test_ctrl_c_during_training_says_where_and_is_no_result(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(place_episodes, "SHARD", 3)
    monkeypatch.setattr(place_state, "_HELD_OUT", 3)
    step = PlaceRun.step

    def step_and_ctrl_c(run: PlaceRun) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return step(run)

    monkeypatch.setattr(PlaceRun, "step", step_and_ctrl_c)
    arguments = [f"--out={tmp_path}", "--episodes=3", "--steps=4", "--batch=8", "--trials=2", "--processes=1"]
    assert place_state.main(arguments) == 130
    assert "stopped by SIGINT at step 1 of 4; the same command goes on from there" in capsys.readouterr().err
    assert (tmp_path / "state.pt").exists()
    assert not (tmp_path / "place_state.json").exists()


def test_ctrl_c_while_processes_demonstrate_ends_them(tmp_path: Path) -> None:
    """A shard takes seconds; the processes are not asked to finish theirs, and say nothing."""
    shards = write_shards(tmp_path, 10 * place_episodes.SHARD, 1, 2)
    assert next(shards) == 0
    next(shards)
    with pytest.raises(KeyboardInterrupt):
        shards.throw(KeyboardInterrupt())
    assert multiprocessing.active_children() == []
    assert len(list(tmp_path.glob("*.npz"))) < 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
