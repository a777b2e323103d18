"""Training of the small network: labels, samples, the loss against the model's own forward, runs that continue exactly, and what ships."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mujoco")
from benchmarks.closed_loop.episode import reach_for_still_blocks
from gr00t_fast import load_policy
from gr00t_fast.errors import ConfigError
from gr00t_fast.measurement import wilson_interval
from gr00t_fast.robots.so100_sim.kinematics import GraspKinematics
from gr00t_fast.robots.so100_sim.simulation import HOME_DEG, TICK_S, Simulation
from training.data import TrainingSet, metadata_of
from training.flow import BlockFinder, draw_times, item_tables, repeat_items
from training.labels import GRIPPER, HORIZON, expert_chunk, waypoints
from training.network import INSTRUCTIONS, small_tokenizer
from training.run import Options
from training.samples import FIRST_LAYOUT_SEED, IMAGE_SIZE, RESOLUTION, Sampler, Samples, as_the_network_sees
from training.session import StopRequest
from training.trainer import Trainer

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "checkpoints" / "so100-sim-reach"
CPU = torch.device("cpu")
SMALL = Options(steps=40, batch=8, draws=2, seed=3)


@pytest.fixture(scope="session")
def samples() -> Samples:
    return Sampler(seed=5).draw(48)


@pytest.fixture
def trainer(samples: Samples) -> Trainer:
    return Trainer(samples, SMALL, CPU)


# --- the expert's labels -----------------------------------------------------------------------------------------------------------------


def ticks_to_success(seed: int, executed: int = 8, max_ticks: int = 75) -> int | None:
    """Play the labels in closed loop, looking anew every `executed` ticks."""
    simulation = Simulation("reach", seed)
    kinematics, tick = GraspKinematics(simulation), 0
    while tick < max_ticks:
        for target in expert_chunk(simulation.joints_deg, waypoints(simulation, kinematics))[:executed]:
            simulation.set_targets(target)
            simulation.advance(TICK_S)
            tick += 1
            if simulation.success:
                return tick
    return None


def test_the_labels_solve_the_task_when_they_are_played() -> None:
    ticks = [ticks_to_success(seed) for seed in range(20)]
    assert sum(tick is not None for tick in ticks) >= 19, ticks
    assert max(tick for tick in ticks if tick) <= 40


def test_a_chunk_keeps_the_speed_goes_over_the_block_and_then_holds() -> None:
    simulation = Simulation("reach", 1)
    points = waypoints(simulation, GraspKinematics(simulation))
    chunk = expert_chunk(HOME_DEG, points, 60)
    assert np.abs(np.diff(chunk, axis=0))[:, :GRIPPER].max() <= 4.0 + 1e-9
    np.testing.assert_allclose(chunk[-1], points.goal, atol=1e-6)
    assert np.abs(chunk - points.hover)[:, :GRIPPER].max(axis=1).min() < 12 + 4, "it never came near the pose above the block"
    np.testing.assert_allclose(expert_chunk(points.goal, points), np.tile(points.goal, (HORIZON, 1)))


def test_beside_the_block_the_way_leads_up_first() -> None:
    simulation = Simulation("reach", 2)
    points = waypoints(simulation, GraspKinematics(simulation))
    beside = points.goal + [25, 0, 0, 0, 0, 0]
    toward_hover = points.hover - beside
    first = expert_chunk(beside, points)[0] - beside
    cosine = first[:GRIPPER] @ toward_hover[:GRIPPER] / np.linalg.norm(first[:GRIPPER]) / np.linalg.norm(toward_hover[:GRIPPER])
    assert cosine > 0.999


# --- samples -----------------------------------------------------------------------------------------------------------------------------


def test_samples_repeat_and_differ_by_seed(samples: Samples) -> None:
    again, other = Sampler(seed=5).draw(6), Sampler(seed=6).draw(6)
    for name in Samples.__annotations__:
        np.testing.assert_array_equal(getattr(again, name), getattr(samples, name)[:6])
    assert not np.array_equal(again.pictures, other.pictures)


def test_the_block_is_where_the_sample_says(samples: Samples) -> None:
    """Strongly red pixels lie around it, wherever the arm does not hide it."""
    pictures = samples.pictures.astype(int)
    red = (pictures[..., 0] > 100) & (pictures[..., 1] < 60) & (pictures[..., 2] < 60)
    visible = np.flatnonzero(red.sum((1, 2)) >= 6)
    assert len(visible) > len(samples) / 2
    offsets = []
    for index in visible:
        rows, columns = np.nonzero(red[index])
        offsets.append(np.abs((np.array([columns.mean(), rows.mean()]) + 0.5) - samples.block[index] * IMAGE_SIZE).max())
    assert np.median(offsets) < 1.5  # pixels
    assert max(offsets) < 7, "half a patch: a finger may hide a part of the block"


# --- the loss ----------------------------------------------------------------------------------------------------------------------------


def disturb(trainer: Trainer) -> None:
    """Weights without the zeros of the beginning, so that time and every joint matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_times_of_the_batch_give_the_velocities_of_the_inference_path(trainer: Trainer) -> None:
    """Item i of a batch with a time each = the model's own velocity of that item alone, at that time, from the tables of inference."""
    disturb(trainer)
    model, head, steps = trainer.model, trainer.model.head, 4
    batch = trainer.data.batch(np.arange(steps), trainer.prompts, INSTRUCTIONS[0], torch.Generator(), CPU)
    noisy = torch.randn((steps, HORIZON, 32), generator=torch.Generator().manual_seed(1))
    buckets = torch.tensor([int(step / steps * 1000) for step in range(steps)])
    with torch.no_grad():
        features = head.refine(model.encode_language(batch.inputs, model.encode_vision(batch.inputs.pixel_values)))
        together = head.velocity(noisy, head.condition(features, batch.inputs.state), *item_tables(head, buckets))
        tables = head.step_tables(steps)
        for step in range(steps):
            condition = head.condition(features[step : step + 1], batch.inputs.state[step : step + 1])
            alone = head.velocity(noisy[step : step + 1], condition, tables.tau[step], tables.modulation[step])
            torch.testing.assert_close(together[step : step + 1], alone, rtol=1e-5, atol=1e-5)
    swapped = head.velocity(noisy, head.condition(features, batch.inputs.state), *item_tables(head, buckets.flip(0)))
    assert (swapped - together).abs().max() > 1e-2, "time has no influence: the comparison would prove nothing"


def test_repeated_items_are_the_items(trainer: Trainer) -> None:
    batch = trainer.data.batch(np.arange(2), trainer.prompts, INSTRUCTIONS[0], torch.Generator(), CPU)
    head = trainer.model.head
    condition = head.condition(torch.randn((2, 70, 96)), batch.inputs.state)
    repeated = repeat_items(condition, 3)
    assert torch.equal(repeated.prefix[3:], condition.prefix[1:].expand(3, -1, -1))
    assert torch.equal(repeated.cross[0][1][:3], condition.cross[0][1][:1].expand(3, -1, -1, -1))


def test_times_follow_the_published_distribution() -> None:
    times = draw_times(200_000, torch.Generator().manual_seed(0))
    drawn = torch.distributions.Beta(1.5, 1.0).sample((200_000,))
    expected = ((0.999 - drawn) / 0.999).clamp(min=0)
    levels = torch.linspace(0.01, 0.99, 21)
    torch.testing.assert_close(times.quantile(levels), expected.quantile(levels), rtol=0, atol=0.01)
    assert times.min() >= 0
    assert times.max() < 1


def test_the_finder_is_content_only_where_the_block_is() -> None:
    finder, side = BlockFinder(1, 8), 8
    with torch.no_grad():
        finder.score.weight.fill_(1)
        finder.score.bias.zero_()
    block = torch.tensor([[(5 + 0.5) / side, (2 + 0.5) / side]])  # column 5, row 2
    scores = torch.full((side, side), -1.0)
    right, wrong = scores.clone(), scores.clone()
    right[2, 5] = wrong[5, 2] = 1.0
    good, bad = (finder.loss(grid.reshape(1, -1, 1), block).item() for grid in (right, wrong))
    assert good < bad - 0.5


def test_statistics_put_states_and_actions_between_minus_one_and_one(samples: Samples) -> None:
    data = TrainingSet.of(samples, metadata_of(samples), 64)
    for values in (data.states[:, :6], data.actions):
        assert values.abs().max() <= 1 + 1e-4  # metadata is rounded to four places
        assert values.abs().amax(dim=tuple(range(values.dim() - 1))).min() > 0.99
    assert not data.states[:, 6:].any()


# --- a run -------------------------------------------------------------------------------------------------------------------------------


def test_training_on_a_few_samples_learns_them(samples: Samples) -> None:
    few = Samples(**{name: column[:8] for name, column in vars(samples).items()})
    trainer = Trainer(few, replace(SMALL, steps=40), CPU)
    before = trainer.check(trainer.data)
    while not trainer.done:
        trainer.step()
    after = trainer.check(trainer.data)
    assert after["held_out_flow"] < 0.6 * before["held_out_flow"]
    assert after["held_out_finder"] < 0.8 * before["held_out_finder"]
    assert after["action_error_deg"] < 0.7 * before["action_error_deg"]


def test_a_continued_run_is_the_same_run(trainer: Trainer, samples: Samples, tmp_path: Path) -> None:
    straight = [trainer.step()["flow"] for _ in range(8)]  # into the second epoch: 48 samples are six batches
    other = Trainer(samples, SMALL, CPU)
    pieces = [other.step()["flow"] for _ in range(5)]
    other.save(tmp_path / "state.pt")
    resumed = Trainer(samples, SMALL, CPU)
    resumed.load(tmp_path / "state.pt")
    pieces += [resumed.step()["flow"] for _ in range(3)]
    assert pieces == straight
    for (name, one), two in zip(trainer.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_a_state_of_another_run_is_refused(trainer: Trainer, samples: Samples, tmp_path: Path) -> None:
    trainer.save(tmp_path / "state.pt")
    with pytest.raises(ConfigError, match=r"rate 0\.0015 there, 0\.001 here"):
        Trainer(samples, replace(SMALL, rate=1e-3), CPU).load(tmp_path / "state.pt")


def test_ctrl_c_is_noted_and_not_raised() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- the checkpoint ----------------------------------------------------------------------------------------------------------------------


def policy_observation(instruction: str = INSTRUCTIONS[0]) -> dict:
    frame = Simulation("reach", 4).render("front", *RESOLUTION)
    return {
        "video.webcam": frame[None],
        "state.single_arm": HOME_DEG[None, :5],
        "state.gripper": HOME_DEG[None, 5:],
        "annotation.human.task_description": [instruction],
    }


def test_what_is_written_is_what_was_trained(trainer: Trainer, tmp_path: Path) -> None:
    """Through files, loader and policy: the actions of the network in memory."""
    disturb(trainer)
    trainer.write_checkpoint(tmp_path, torch.float32)
    policy = load_policy(tmp_path, device="cpu", precision="fp32")
    observation = policy_observation()
    noise = torch.randn((1, HORIZON, 32), generator=torch.Generator().manual_seed(2))
    got = policy.get_action(observation, noise=noise)
    one = Samples(
        as_the_network_sees(observation["video.webcam"][0])[None],
        HOME_DEG[None].astype(np.float32),
        np.zeros((1, HORIZON, 6), np.float32),
        np.zeros((1, 2), np.float32),
    )
    data = TrainingSet.of(one, trainer.metadata, 64)
    inputs = data.batch(np.arange(1), trainer.prompts, INSTRUCTIONS[0], torch.Generator(), CPU).inputs
    with torch.no_grad():
        expected = trainer.model(inputs, noise, trainer.model.head.step_tables(4))[0, :, :6].numpy()
    statistics = trainer.metadata["new_embodiment"]["statistics"]["action"]
    low, high = (np.concatenate([statistics[part][name] for part in ("single_arm", "gripper")]) for name in ("min", "max"))
    np.testing.assert_allclose(
        np.concatenate([got["action.single_arm"], got["action.gripper"]], 1), (expected + 1) / 2 * (high - low) + low, atol=2e-3
    )


def test_padded_joints_do_not_disturb_the_others(trainer: Trainer) -> None:
    for _ in range(2):
        trainer.step()
    batch = trainer.data.batch(np.arange(2), trainer.prompts, INSTRUCTIONS[0], torch.Generator(), CPU)
    noise = torch.randn((2, HORIZON, 32), generator=torch.Generator().manual_seed(3))
    other = noise.clone()
    other[..., 6:] = 7
    with torch.no_grad():
        one, two = (trainer.model(batch.inputs, start, trainer.model.head.step_tables(2)) for start in (noise, other))
    assert torch.equal(one[..., :6], two[..., :6])
    assert torch.equal(one[..., 6:], noise[..., 6:])


def test_the_tokenizer_reads_anything_and_the_trained_words_in_few_tokens() -> None:
    tokenizer = small_tokenizer()
    for text in ("Reach the block", "ブロックを取る", "a\tb\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("Reach the block").ids) <= 4
    assert tokenizer.to_str() == small_tokenizer().to_str()


# --- evaluation --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (38, 40, 0.8350, 0.9862), (200, 200, 0.9812, 1.0)])
def test_wilson_interval_of_known_cases(successes: int, trials: int, low: float, high: float) -> None:
    np.testing.assert_allclose(wilson_interval(successes, trials), (low, high), atol=5e-5)
    with pytest.raises(ConfigError, match="successes"):
        wilson_interval(trials + 1, trials)


def test_an_untrained_network_fails(trainer: Trainer, tmp_path: Path) -> None:
    trainer.write_checkpoint(tmp_path, torch.float32)
    outcomes = reach_for_still_blocks(load_policy(tmp_path, device="cpu"), (HORIZON, 32), (0, 1))
    assert [outcome.solved_s for outcome in outcomes] == [None, None]


@pytest.fixture(scope="session")
def shipped():
    return load_policy(SHIPPED, device="cpu", action_horizon=8)


class SeesGrey:
    """The policy behind a covered lens."""

    def __init__(self, policy) -> None:
        self._policy, self.facts = policy, policy.facts
        self.get_modality_config, self.reset = policy.get_modality_config, policy.reset

    def get_action(self, observation: dict, noise=None) -> dict[str, np.ndarray]:
        return self._policy.get_action({**observation, "video.webcam": np.full_like(observation["video.webcam"], 127)}, noise=noise)


def test_the_shipped_network_is_small_and_reaches_the_block(shipped) -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 15e6
    outcomes = reach_for_still_blocks(shipped, (HORIZON, 32), range(6))
    assert sum(outcome.solved_s is not None for outcome in outcomes) >= 5, outcomes
    assert FIRST_LAYOUT_SEED > 6, "these layouts were not trained on"


def test_the_shipped_network_needs_its_eyes(shipped) -> None:
    outcomes = reach_for_still_blocks(SeesGrey(shipped), (HORIZON, 32), range(4))
    assert sum(outcome.solved_s is not None for outcome in outcomes) <= 1, outcomes
