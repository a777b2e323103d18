"""The state-conditioned study of `place`: what counts, demonstrations under disturbance, exact continuation, and the command in small."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mujoco")
from gr00t_fast.robots.so100_sim.scripted_expert import expert
from gr00t_fast.robots.so100_sim.simulation import HOME_DEG
from gr00t_fast.robots.so100_sim.units import GRIPPER
from training import place_state, place_world
from training.place_state import Outcome, PlaceNetwork, PlaceRun, PlaceTrials, Scaling, as_table, expert_outcomes, paired, summary
from training.place_world import SCENE_PARTS, SUCCESS_TICKS, Episodes, PlaceWorld, episode, load_episodes, make_shard, write_shards
from training.run import Options
from training.samples import FIRST_LAYOUT_SEED, HORIZON

SMALL = Options(steps=40, batch=16, draws=1, rate=1e-3, seed=3)
PUBLISHED = Path(__file__).parent.parent / "benchmarks" / "results" / "place_state.json"


@pytest.fixture(scope="session")
def episodes() -> Episodes:
    return make_shard(FIRST_LAYOUT_SEED, 3)


# --- what is known, and what counts ----------------------------------------------------------------------------------------------------------


def test_an_episode_of_the_expert_is_followed_from_the_grasp_to_success() -> None:
    world, held, failed = PlaceWorld(), [], []
    layout, scene = world.simulation.layout, world.scene
    np.testing.assert_allclose([*scene[:2], np.arctan2(scene[4], scene[3]) / 4], [*layout.block_xy_m, layout.block_yaw_rad], atol=1e-6)
    np.testing.assert_allclose(scene[SCENE_PARTS["bowl"]], layout.bowl_xy_m, atol=1e-6)
    for target in expert(world.simulation):
        world.send(target)
        held.append(world.held)
        failed.append(world.failed_at)
        assert not world.lost
    assert np.count_nonzero(np.diff(held)) == 2, "taken once, let go once"
    assert list(dict.fromkeys(failed)) == ["grasp", "transport", "release", None]
    assert (world.lifts, world.solved is not None) == (1, True)


def test_a_block_left_behind_is_lost_and_success_takes_some_ticks() -> None:
    world, shut = PlaceWorld(), np.array([*HOME_DEG[:GRIPPER], 2])
    for _ in range(5):
        world.send(shut)
    assert (world.lost, world.held) == (True, False)
    world.reset(0)
    world.simulation.data.joint("block").qpos[:3] = world.simulation.bowl_m + [0, 0, 0.02]
    while world.solved is None:
        world.send(HOME_DEG)
    assert SUCCESS_TICKS <= world.solved < 30


def test_labels_are_what_the_expert_wants_where_the_disturbed_arm_is() -> None:
    """A twin that is sent the same disturbed targets measures the same, and the same script wants there what was recorded."""
    world, sent = PlaceWorld(), []
    send = world.send
    world.send = lambda targets: (sent.append(targets.copy()), send(targets))[1]
    ticks = list(episode(world, FIRST_LAYOUT_SEED))
    twin = PlaceWorld()
    twin.reset(FIRST_LAYOUT_SEED)
    twin.begin_at(ticks[0][0])
    for wanted, target, (joints, _, label, _) in zip(expert(twin.simulation), sent, ticks, strict=False):
        np.testing.assert_allclose(twin.joints, joints, atol=1e-9)
        np.testing.assert_allclose(wanted, label, atol=1e-9)
        twin.send(target)
    away = np.abs(np.array(sent) - np.array([tick[2] for tick in ticks]))
    assert away[:, :GRIPPER].max() > 1, "nothing was disturbed: the comparison would prove nothing"
    assert not away[:, GRIPPER].any(), "the jaw is left alone"


def test_a_chunk_ends_with_its_episode(episodes: Episodes) -> None:
    end, targets = int(episodes.ends[0]), episodes.targets
    chunks = episodes.chunks(np.array([0, end - 3, end]))
    np.testing.assert_array_equal(chunks[0], targets[:HORIZON])
    np.testing.assert_array_equal(chunks[1], targets[[end - 3, end - 2, *[end - 1] * (HORIZON - 2)]])
    np.testing.assert_array_equal(chunks[2], targets[end : end + HORIZON])


def test_shards_are_the_same_from_any_number_of_processes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(place_world, "SHARD", 2)
    one, two = tmp_path / "one", tmp_path / "two"
    assert list(write_shards(two, 4, 1, processes=2)) == [0, 2, 4]
    list(write_shards(one, 2, 1, processes=1))
    for name, column in vars(load_episodes(one, 2)).items():
        np.testing.assert_array_equal(column, getattr(load_episodes(two, 2), name), err_msg=name)
    assert list(write_shards(one, 2, 1, processes=1)) == [2], "made once"


# --- training and closed loop ----------------------------------------------------------------------------------------------------------------


def test_training_continues_exactly_learns_and_uses_the_scene(episodes: Episodes, tmp_path: Path) -> None:
    run, first, second = (PlaceRun(episodes, SMALL) for _ in range(3))
    before = run.check(episodes, rows=100)
    straight = [run.step()["flow"] for _ in range(40)]
    pieces = [first.step()["flow"] for _ in range(3)]
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    assert pieces + [second.step()["flow"] for _ in range(3)] == straight[:6]
    after = run.check(episodes, rows=100)
    assert after["held_out_flow"] < 0.6 * before["held_out_flow"]
    assert after["action_error_deg"] < 0.7 * before["action_error_deg"]
    np.testing.assert_allclose(run.scaling.targets_deg(run.scaling.normalised(episodes.targets, "targets")), episodes.targets, atol=1e-3)
    joints, scene = (run.scaling.normalised(getattr(episodes, name)[:4], name) for name in ("joints", "scene"))
    noise = torch.randn((4, HORIZON, 32), generator=torch.Generator().manual_seed(0))
    for name, part in SCENE_PARTS.items():
        elsewhere = scene.clone()
        elsewhere[:, part] += 0.5
        with torch.no_grad():
            here, there = (run.network(joints, place, noise, run.network.head.step_tables(2)) for place in (scene, elsewhere))
        assert (here - there).abs().max() > 1e-3, f"{name} changes nothing"


def test_settings_meet_the_same_noise_and_an_untrained_network_fails(episodes: Episodes) -> None:
    noises = []

    class Recall(PlaceNetwork):
        def forward(self, joints, scene, noise, tables):
            noises.append(noise)
            return super().forward(joints, scene, noise, tables)

    trials = PlaceTrials(Recall(0), Scaling.of(episodes), range(3), max_ticks=16)
    first = trials.play(1, 8)
    trials.play(4, 16)
    assert torch.equal(noises[0], noises[2]), "the first inference of each layout, whatever the setting"
    assert not torch.equal(noises[0], noises[1])
    assert first == trials.play(1, 8) == [Outcome(seed, None, "grasp", lifts=0) for seed in range(3)]
    assert [outcome.failed_at for outcome in expert_outcomes(range(2))] == [None, None]


def test_summaries_and_pairs_count() -> None:
    found = summary([Outcome(0, 90, None, lifts=2), Outcome(1, None, "grasp"), Outcome(2, 30, None), Outcome(3, None, "grasp")])
    assert (found["successes"], found["rate"], found["failed_seeds"], found["solved_after_a_fall"]) == (2, 0.5, [1, 3], 1)
    assert (found["failed_at"], found["seconds_p50_p95"]) == ({"grasp": 2, "transport": 0, "release": 0}, [2.0, 2.9])
    rows = ([1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0])
    one, two = ([Outcome(seed, 90 if solved else None, None) for seed, solved in enumerate(row)] for row in rows)
    assert paired(one, two) == {"only_here": 1, "only_there": 4, "p": 0.375}  # (1 + 5) / 32, twice


# --- the command -----------------------------------------------------------------------------------------------------------------------------


def test_the_command_in_small_goes_on_and_says_what_it_is(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(place_world, "SHARD", 3)
    monkeypatch.setattr(place_state, "_HELD_OUT", 3)
    flags = [f"--out={tmp_path}", "--episodes=3", "--steps=4", "--batch_size=8", "--trials=2", "--max_ticks=24", "--check_every=2"]
    flags += ["--denoising_steps", "1", "2", "--action_horizon=8", "--processes=1"]
    assert place_state.main([*flags, "--max_minutes=1e-6"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["training"]["steps"] == 1
    step = PlaceRun.step
    with monkeypatch.context() as patched:
        patched.setattr(PlaceRun, "step", lambda run: (os.kill(os.getpid(), signal.SIGINT), step(run))[1])
        assert place_state.main(flags) == 130
    assert "stopped by SIGINT at step 2 of 4; the same command goes on" in capsys.readouterr().err
    assert place_state.main(flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["training"]["steps"], result["training"]["stopped_by"]) == (4, "the last step")
    assert [(s["horizon"], s["denoising_steps"], s["episodes"]) for s in result["settings"]] == [(8, 1, 2), (8, 2, 2)]
    assert result == json.loads((tmp_path / "place_state.json").read_text())
    assert "not a\nvision-language-action policy" in (tmp_path / "place_state.md").read_text().replace("**", "")
    assert (tmp_path / "place_state.png").stat().st_size > 5000
    assert set(json.loads((tmp_path / "episodes.json").read_text())) == {"expert", "horizon 8, steps 1", "horizon 8, steps 2"}
    for wrong, code, expected in (
        ("--learning_rate=0.5", 1, "another run"),
        ("--seed=1", 1, "'seed': 0"),
        (f"--first_seed={FIRST_LAYOUT_SEED - 1}", 2, "--first_seed"),
        ("--action_horizon=17", 2, "--action_horizon"),
    ):
        assert place_state.main([*flags, wrong]) == code
        assert expected in capsys.readouterr().err


def test_the_published_result_is_read() -> None:
    assert as_table(json.loads(PUBLISHED.read_text())) in PUBLISHED.with_suffix(".md").read_text()


def test_ctrl_c_while_processes_demonstrate_ends_them(tmp_path: Path) -> None:
    """A shard takes seconds; the processes are not asked to finish theirs, and say nothing."""
    shards = write_shards(tmp_path, 10 * place_world.SHARD, 1, 2)
    next(shards)
    next(shards)
    with pytest.raises(KeyboardInterrupt):
        shards.throw(KeyboardInterrupt())
    assert multiprocessing.active_children() == []
    assert len(list(tmp_path.glob("*.npz"))) < 10
