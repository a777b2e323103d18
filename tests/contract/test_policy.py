"""The contract of `load_policy` and `get_action`: shapes, reproducibility, cheap changes, and one clear error for each wrong input."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_networks import cast, load_network, observation, random_inputs

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.base.errors import CheckpointError, ConfigError, EngineError, Gr00tFastError, ObservationError, UnsafeActionError
from gr00t_fast.engine import Engine
from gr00t_fast.model import language

TASK = "annotation.human.task_description"
LOAD = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Gr00tPolicy:
    return load_policy(checkpoint, **LOAD, seed=0)


@pytest.fixture
def policy(loaded: Gr00tPolicy) -> Gr00tPolicy:
    """As freshly loaded."""
    loaded.denoising_steps, loaded.action_horizon = 4, None
    loaded.reset()
    return loaded


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((1, 16, 32)).astype(np.float32)


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    assert a.keys() == b.keys()
    return all(np.array_equal(a[key], b[key]) for key in a)


# --- shapes --------------------------------------------------------------------------------------------------------------------------


def test_unbatched_in_unbatched_out(policy: Gr00tPolicy) -> None:
    actions = policy.get_action(observation())
    assert {key: (value.shape, value.dtype) for key, value in actions.items()} == {
        "action.single_arm": ((16, 5), np.float32),
        "action.gripper": ((16, 1), np.float32),
    }
    assert all(np.isfinite(value).all() for value in actions.values())


@pytest.mark.parametrize("task", ["pick", ["pick"], ("pick",), np.array(["pick"]), np.array([["pick"]]), np.str_("pick"), np.array("pick")], ids=repr)
def test_forms_of_the_instruction(policy: Gr00tPolicy, noise: np.ndarray, task: object) -> None:
    assert _same(policy.get_action(observation(instruction=task), noise=noise), policy.get_action(observation(instruction="pick"), noise=noise))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, "list", "torch"])
def test_forms_of_the_state(policy: Gr00tPolicy, noise: np.ndarray, kind: object) -> None:
    whole = observation() | {"state.single_arm": np.array([[1.0, 2.0, 3.0, 4.0, 5.0]]), "state.gripper": np.array([[6.0]])}
    convert = {"list": np.ndarray.tolist, "torch": torch.from_numpy}.get(kind, lambda value: value.astype(kind))
    given = whole | {key: convert(whole[key]) for key in ("state.single_arm", "state.gripper")}
    assert _same(policy.get_action(given, noise=noise), policy.get_action(whole, noise=noise))


@pytest.mark.filterwarnings("error")
def test_the_observation_is_not_changed(policy: Gr00tPolicy) -> None:
    given = observation()
    before = {key: value.copy() for key, value in given.items() if isinstance(value, np.ndarray)}
    for value in before:
        given[value].setflags(write=False)  # a camera's frame may be read-only
    policy.get_action(given)
    assert all(np.array_equal(given[key], before[key]) for key in before)


# --- horizon and steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 8, 16])
def test_a_shorter_horizon_is_the_beginning_of_the_whole(checkpoint: Path, policy: Gr00tPolicy, noise: np.ndarray, horizon: int) -> None:
    whole = policy.get_action(observation(), noise=noise)
    short = load_policy(checkpoint, **LOAD, action_horizon=horizon)
    assert short.action_horizon == horizon
    assert _same(short.get_action(observation(), noise=noise), {key: value[:horizon] for key, value in whole.items()})


@pytest.mark.parametrize("horizon", [0, 17, -1, 8.0, "8", True])
def test_a_horizon_that_was_not_trained(checkpoint: Path, policy: Gr00tPolicy, horizon: object) -> None:
    pattern = "action_horizon must be from 1 to 16, the number of actions this checkpoint was trained to predict"
    with pytest.raises(ConfigError, match=pattern):
        load_policy(checkpoint, **LOAD, action_horizon=horizon)
    with pytest.raises(ConfigError, match=pattern):
        policy.action_horizon = horizon


def test_denoising_steps_change_without_reloading(checkpoint: Path, policy: Gr00tPolicy, noise: np.ndarray) -> None:
    weights = {name: parameter.data_ptr() for name, parameter in policy.engine.model.named_parameters()}
    results = {}
    for steps in (1, 2, 4, 8, 2):
        policy.denoising_steps = steps
        actions = policy.get_action(observation(), noise=noise)
        assert _same(actions, results.setdefault(steps, actions))
        assert _same(actions, load_policy(checkpoint, **LOAD, denoising_steps=steps).get_action(observation(), noise=noise))
    assert not _same(results[1], results[2])
    assert weights == {name: parameter.data_ptr() for name, parameter in policy.engine.model.named_parameters()}


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, "4", True, None])
def test_impossible_steps(checkpoint: Path, policy: Gr00tPolicy, steps: object) -> None:
    with pytest.raises(ConfigError, match=r"denoising_steps .*\b1 .*1000"):
        policy.denoising_steps = steps
    assert policy.denoising_steps == 4
    if steps is not None:
        with pytest.raises(ConfigError, match="denoising_steps"):
            load_policy(checkpoint, **LOAD, denoising_steps=steps)


# --- noise ---------------------------------------------------------------------------------------------------------------------------


def _sequence(policy: Gr00tPolicy, calls: int = 3) -> list[dict[str, np.ndarray]]:
    return [policy.get_action(observation()) for _ in range(calls)]


def test_a_seed_repeats_and_warming_up_does_not_disturb(checkpoint: Path) -> None:
    plain, warmed, other = (load_policy(checkpoint, **LOAD, seed=seed) for seed in (5, 5, 6))
    first = _sequence(plain)
    warmed.warm_up()
    warmed.warm_up("another instruction")
    assert all(map(_same, first, _sequence(warmed)))
    assert not _same(first[0], first[1])
    assert not _same(first[0], _sequence(other, 1)[0])
    plain.reset()
    assert all(map(_same, first, _sequence(plain)))


@pytest.mark.parametrize(
    ("wrong", "pattern"),
    [
        (np.zeros((16, 32)), r"got shape \(16, 32\)"),
        (np.full((1, 16, 32), np.nan), "got values that are not finite"),
        ("loud", "expected numbers"),
    ],
)
def test_wrong_noise(policy: Gr00tPolicy, wrong: object, pattern: str) -> None:
    with pytest.raises(ObservationError, match=f"noise: .*{pattern}"):
        policy.get_action(observation(), noise=wrong)


# --- what NVIDIA's Gr00tPolicy has and takes -------------------------------------------------------------------------------------------


class EmbodimentTag(Enum):
    NEW_EMBODIMENT = "new_embodiment"


@pytest.mark.parametrize(
    "changes", [{"embodiment_tag": EmbodimentTag.NEW_EMBODIMENT}, {"embodiment_tag": "NEW_EMBODIMENT"}, {"device": torch.device("cpu")}]
)
def test_values_of_nvidias_types_are_accepted(checkpoint: Path, policy: Gr00tPolicy, noise: np.ndarray, changes: dict) -> None:
    assert _same(load_policy(checkpoint, **{**LOAD, **changes}).get_action(observation(), noise=noise), policy.get_action(observation(), noise=noise))


def test_unapplied_transforms_give_joint_units(policy: Gr00tPolicy) -> None:
    middle = policy.unapply_transforms({"action": torch.zeros(2, 16, 32, dtype=torch.bfloat16)})
    known = policy.metadata.action_statistics["single_arm"]
    np.testing.assert_allclose(middle["action.single_arm"], np.broadcast_to((known.min + known.max) / 2, (2, 16, 5)), rtol=1e-5)
    assert middle["action.gripper"].shape == (2, 16, 1)


# --- wrong observations --------------------------------------------------------------------------------------------------------------

_FRAME = np.zeros((1, 48, 64, 3), dtype=np.uint8)
WRONG = {
    "missing camera": ({"video.webcam": ...}, r"'video.webcam' is missing.*Expected video.webcam, state.single_arm.*got annotation"),
    "misspelt camera": ({"video.webcam": ..., "video.web_cam": _FRAME}, "'video.webcam' is missing. Did you mean 'video.web_cam'"),
    "missing state": ({"state.gripper": ...}, "'state.gripper' is missing. Expected"),  # not: did you mean state.single_arm, which is there
    "missing instruction": ({TASK: ...}, f"'{TASK}' is missing"),
    "float frame": ({"video.webcam": _FRAME.astype(np.float32)}, "video.webcam: expected uint8 RGB pixels 0..255, got float32"),
    "no time axis": ({"video.webcam": _FRAME[0]}, r"expected shape \(1, height, width, 3\).*got \(48, 64, 3\)"),
    "two times": ({"video.webcam": np.zeros((2, 48, 64, 3), np.uint8)}, "expected one time step, got 2"),
    "ragged frame": ({"video.webcam": [[1, 2], [3]]}, "expected uint8 RGB pixels as a NumPy array, got list"),
    "NaN state": ({"state.single_arm": np.array([[0, 0, np.nan, 0, 0]])}, "expected finite joint values, got .*nan"),
    "state of words": ({"state.gripper": np.array([["open"]])}, "expected numbers"),
    "state with gradients": ({"state.gripper": torch.zeros(1, 1, requires_grad=True)}, "expected numbers .* got Tensor"),
    "empty instruction": ({TASK: ""}, "the instruction is empty"),
    "no instruction": ({TASK: []}, r"expected an instruction .* got \[\]"),
    "two instructions": ({TASK: ["a", "b"]}, "expected 1 instructions for a batch of 1, got 2"),
    "image token": ({TASK: "look <IMG_CONTEXT>"}, "contains the image token"),
    "keys that are no words": ({"video.webcam": ..., 3: 4}, "'video.webcam' is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_observation_is_refused(policy: Gr00tPolicy, name: str) -> None:
    changes, pattern = WRONG[name]
    wrong = {key: value for key, value in (observation() | changes).items() if value is not ...}
    expected = policy.get_action(observation())
    policy.reset()
    with pytest.raises(ObservationError, match=pattern):
        policy.get_action(wrong)
    assert _same(policy.get_action(observation()), expected), "a refused call must not use up noise"


# --- cameras of another size ---------------------------------------------------------------------------------------------------------


def test_another_resolution_is_resized_and_told_once(checkpoint: Path, noise: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    fresh = load_policy(checkpoint, **LOAD)
    caplog.set_level(logging.INFO, logger="gr00t_fast")
    fresh.warm_up()
    fresh.get_action(observation())
    assert not caplog.records
    for _ in range(3):
        fresh.get_action(observation(size=(128, 96)))
    assert [record.getMessage() for record in caplog.records] == ["video.webcam is 128x96, training saw 64x48: resizing every frame"]
    # a picture without detail means the same at any size
    grey = {size: observation() | {"video.webcam": np.full((1, size[1], size[0], 3), 90, np.uint8)} for size in ((64, 48), (128, 96), (33, 77))}
    first, *others = [fresh.get_action(given, noise=noise) for given in grey.values()]
    assert all(_same(first, other) for other in others)


# --- loading -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "error", "pattern"),
    [
        ("data_config", "so10", ConfigError, "unknown data_config 'so10'. Did you mean 'so100'"),
        ("data_config", "so100_dualcam", ConfigError, "reads video.front, video.wrist, but this checkpoint was trained with video.webcam"),
        ("embodiment_tag", "new", ConfigError, "unknown embodiment_tag 'new'"),
        ("device", "cuda:99", ConfigError, "device 'cuda:99' was asked for, but torch"),
        ("precision", "fp8", ConfigError, "unknown precision 'fp8'"),
        ("engine", "cuda_graph", ConfigError, "'cuda_graph' needs a CUDA GPU"),
        ("engine", "compiled", ConfigError, "compiler.*CXX=no-such-compiler"),
        ("prompt_style", "bracketed", ConfigError, "unknown prompt_style"),
        ("seed", -1, ConfigError, "seed must be a whole number from 0"),
        ("model_path", "/nowhere", CheckpointError, "model_path '/nowhere' does not exist"),
    ],
)
def test_wrong_options_are_found_before_weights_are_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: object, error: type, pattern: str
) -> None:
    def load_model(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("gr00t_fast.policy.load_model", load_model)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(error, match=pattern):
        load_policy(**({"model_path": checkpoint, **LOAD, option: value}))
    assert issubclass(error, Gr00tFastError)


# --- what else is promised -----------------------------------------------------------------------------------------------------------


def test_timing_names_every_stage(policy: Gr00tPolicy) -> None:
    shares = []
    for _ in range(20):  # another program may take the processor between two stages
        policy.get_action(observation())
        stages = dict(policy.last_timing)
        total = stages.pop("total")
        assert set(stages) == {"preprocess", "vision", "language", "refine", "denoise", "postprocess"}
        assert min(stages.values()) > 0
        shares.append(sum(stages.values()) / total)
    assert 0.9 < max(shares) <= 1 + 1e-9
    assert policy.warm_up() == policy.last_timing


# --- the three calls, and engines and configurations of one's own -------------------------------------------------------------------------


class OwnEngine(Engine):
    """Answers with what it was made with."""

    name, device, dtype = "own", torch.device("cpu"), torch.float32

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def run(self, inputs, noise, denoising_steps, timer, continuation=None):
        return self.answer


@pytest.mark.parametrize("lacks", ["synchronise", "device", "run"])
def test_an_engine_that_lacks_something_is_refused_when_it_is_given(checkpoint: Path, lacks: str) -> None:
    class Lacking:
        name, device, dtype, continues = "own", torch.device("cpu"), torch.float32, False
        run = OwnEngine.run

        def synchronise(self) -> None: ...

    delattr(Lacking, lacks)
    with pytest.raises(ConfigError, match=lacks):
        load_policy(checkpoint, engine=Lacking())


@pytest.mark.parametrize("answer", [torch.zeros(1, 8, 32), np.zeros((16, 32)), None], ids=["rows", "axes", "none"])
def test_an_answer_of_another_shape_names_engine_and_shape(checkpoint: Path, answer: object) -> None:
    with pytest.raises(EngineError, match=r"'own'.*\(1, 16, 32\)"):
        load_policy(checkpoint, engine=OwnEngine(answer)).get_action(observation())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_reaches_nobody(checkpoint: Path, value: float) -> None:
    answer = torch.zeros(1, 16, 32)
    answer[0, 3, 5] = value
    broken = load_policy(checkpoint, engine=OwnEngine(answer))
    with pytest.raises(UnsafeActionError, match=r"action\.gripper"):
        broken.get_action(observation())
    with pytest.raises(CheckpointError, match="NaN"):
        broken.warm_up()
    broken.action_horizon = 3
    assert np.isfinite(broken.get_action(observation())["action.gripper"]).all(), "what is not returned does not matter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_is_given_is_causal_attention_too(checkpoint: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MPS gets in half precision, whose own causal attention lets tokens see later ones."""
    model = load_network(checkpoint, dtype)
    inputs, _ = random_inputs(model.config)
    inputs = cast(inputs, dtype)
    vision = model.encode_vision(inputs.pixel_values)
    own = model.encode_language(inputs, vision)
    asked = []
    monkeypatch.setattr(language, "leaks", lambda x: asked.append(x) is None)
    masked = model.encode_language(inputs, vision)
    assert asked
    assert (masked - own).float().norm() / own.float().norm() < (1e-6 if dtype == torch.float32 else 1e-2)
    monkeypatch.undo()
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    numbers = {(device, kind): SimpleNamespace(device=torch.device(device), dtype=kind) for device in ("cpu", "mps") for kind in kinds}
    assert [key for key, x in numbers.items() if language.leaks(x)] == [("mps", torch.float16), ("mps", torch.bfloat16)]
