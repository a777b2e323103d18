"""Data configurations: the built-in names, a user's key lists, and classes written for NVIDIA's package, read without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.inputs.data_config import DATA_CONFIGS, DataConfig, load_data_config


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"video_keys": ()}, r"no 'video.\*' keys"),
        ({"state_keys": ("single_arm",)}, "key 'single_arm' must begin with 'state.'"),
        ({"video_keys": ("video.front", "video.front")}, "listed twice"),
        ({"normalisation": {"state.gripper": "minmax"}}, "normalisation 'minmax' of 'state.gripper' is not supported; choose from min_max"),
        ({"normalisation": {"state.griper": "q99"}}, "'state.griper', which is no state or action key. Did you mean 'state.gripper'"),
        ({"normalisation": {"action.gripper": "sin_cos"}}, "'sin_cos' of 'action.gripper'"),
        ({"action_indices": (0, 2, 4)}, r"action_indices \[0, 2, 4\]"),
    ],
)
def test_a_data_config_checks_itself(changes: dict, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        replace(DATA_CONFIGS["so100"], **changes)


def test_built_in_names() -> None:
    assert load_data_config("so100") is DATA_CONFIGS["so100"]
    with pytest.raises(ConfigError, match="'so100_dualcamera'.*'so100_dualcam'"):
        load_data_config("so100_dualcamera")


# --- a user's own classes ------------------------------------------------------------------------------------------------------------

_KEY_LISTS = """
from gr00t_fast import DataConfig
mine = DataConfig(video_keys=("video.top",), state_keys=("state.arm",), action_keys=("action.arm",), normalisation={"action.arm": "q99"})
class Lists:
    video_keys = ["video.top"]
    state_keys = ["state.arm", "state.hand"]
    action_keys = ["action.arm"]
    language_keys = ["annotation.task"]
    observation_indices = [0]
    action_indices = list(range(8))
    state_normalization_modes = {"state.arm": "mean_std", "state.hand": "none"}
class Past(Lists): observation_indices = [-1, 0]
class Mute(Lists): language_keys = []
class Half(Lists): state_normalization_modes = {"state.arm": "mean_std"}
class Turned(Lists): state_target_rotations = {"state.arm": "rotation_6d"}
class Other: video_keys = ["video.top"]
class Nothing(Lists): state_keys = None
"""

# As NVIDIA's guide has users write it; STEPS is what a test puts between the picture and the concatenation.
_NVIDIA_STYLE = """
from gr00t.data.dataset import ModalityConfig
from gr00t.data.transform.base import ComposedModalityTransform, ModalityTransform
from gr00t.data.transform.concat import ConcatTransform
from gr00t.data.transform import state_action
from gr00t.data.transform.state_action import *
from gr00t.data.transform.state_action import StateActionSinCosTransform, StateActionToTensor, StateActionTransform
from gr00t.data.transform.video import VideoColorJitter, VideoCrop, VideoResize, VideoToNumpy, VideoToTensor
from gr00t.experiment.data_config import BaseDataConfig, So100DataConfig
from gr00t.model.transforms import GR00TTransform

class Robot(BaseDataConfig):
    video_keys = ["video.top", "video.side"]
    state_keys = ["state.arm", "state.hand"]
    action_keys = ["action.arm", "action.hand"]
    language_keys = ["annotation.task"]
    observation_indices = [0]
    action_indices = list(range(8))
    scale, size, extra, orders, model = 0.95, 224, [], {}, {}

    def joints(self):
        return [
            StateActionToTensor(apply_to=self.state_keys),
            StateActionTransform(apply_to=self.state_keys, normalization_modes={key: "min_max" for key in self.state_keys}),
            StateActionToTensor(apply_to=self.action_keys),
            StateActionTransform(apply_to=self.action_keys, normalization_modes={"action.arm": "mean_std", "action.hand": "binary"}),
        ]

    def transform(self) -> ModalityTransform:
        orders = {"video_concat_order": self.video_keys, "state_concat_order": self.state_keys, "action_concat_order": self.action_keys}
        return ComposedModalityTransform(transforms=[
            VideoToTensor(apply_to=self.video_keys),
            VideoCrop(apply_to=self.video_keys, scale=self.scale),
            VideoResize(apply_to=self.video_keys, height=self.size, width=self.size, interpolation="linear"),
            VideoColorJitter(apply_to=self.video_keys, brightness=0.3, contrast=0.4, saturation=0.5, hue=0.08),
            VideoToNumpy(apply_to=self.video_keys),
            *self.joints(),
            *self.extra,
            ConcatTransform(**{**orders, **self.orders}),
            GR00TTransform(**{
                "state_horizon": len(self.observation_indices), "action_horizon": len(self.action_indices),
                "max_state_dim": 64, "max_action_dim": 32, **self.model,
            }),
        ])
"""


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], DataConfig]:
    """Writes a module and loads a class of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    count = iter(range(100))

    def load(source: str, name: str) -> DataConfig:
        module = f"robot_{abs(hash(str(tmp_path)))}_{next(count)}"
        (tmp_path / f"{module}.py").write_text(source)
        return load_data_config(f"{module}:{name}")

    return load


def test_key_lists(loaded: Callable) -> None:
    assert loaded(_KEY_LISTS, "mine").normalisation_of("action.arm") == "q99"
    lists = loaded(_KEY_LISTS, "Lists")
    modes = {"state.arm": "mean_std", "state.hand": "none"}
    assert lists == DataConfig(("video.top",), ("state.arm", "state.hand"), ("action.arm",), "annotation.task", tuple(range(8)), modes)
    assert lists.modality_config()["action"].delta_indices == list(range(8))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("Mutee", "has no class 'Mutee'. Did you mean 'Mute'"),
        ("Past", r"observation_indices \[-1, 0\]"),
        ("Mute", r"expected one language key, got \[\]"),
        ("Half", "does not say how state.hand is normalised"),
        ("Turned", "state_target_rotations.*rotations are not supported"),
        ("Other", "the class has no state_keys, action_keys"),
        ("Nothing", "(?s)cannot be read.*class MyRobot"),
    ],
)
def test_key_lists_that_cannot_be_used(loaded: Callable, name: str, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        loaded(_KEY_LISTS, name)


def test_a_module_that_cannot_be_imported(loaded: Callable) -> None:
    with pytest.raises(ConfigError, match="'nowhere_to_be_found'.*folder"):
        load_data_config("nowhere_to_be_found:X")
    with pytest.raises(ConfigError, match="(?s)No module named 'a_package_of_theirs'.*class MyRobot"):
        loaded("import a_package_of_theirs", "X")


# --- classes written for NVIDIA's package --------------------------------------------------------------------------------------------


def test_an_object_is_as_good_as_its_name(loaded: Callable) -> None:
    class Lists:
        video_keys, state_keys, action_keys = ["video.top"], ["state.arm"], ["action.arm"]

    assert load_data_config(Lists()) == DataConfig(("video.top",), ("state.arm",), ("action.arm",))


def test_sines_and_cosines_of_the_state(loaded: Callable) -> None:
    body = "    def joints(self): return [StateActionSinCosTransform(apply_to=['state.arm'])]"
    assert loaded(f"{_NVIDIA_STYLE}\nclass Mine(Robot):\n{body}\n", "Mine").normalisation_of("state.arm") == "sin_cos"
    with pytest.raises(ConfigError, match="'state.arm' twice"):
        loaded(f"{_NVIDIA_STYLE}\nclass Mine(Robot):\n    extra = [StateActionSinCosTransform(apply_to=['state.arm'])]\n", "Mine")


def test_a_class_that_derives_from_one_of_nvidias(loaded: Callable) -> None:
    source = f"{_NVIDIA_STYLE}\nclass Mine(So100DataConfig):\n    video_keys = ['video.mine']\n"
    assert loaded(source, "Mine") == replace(DATA_CONFIGS["so100"], video_keys=("video.mine",))


def test_nvidias_own_module_needs_no_package() -> None:
    assert load_data_config("gr00t.experiment.data_config:So100DualCamDataConfig") == DATA_CONFIGS["so100_dualcam"]
    assert "gr00t" not in sys.modules


_ROTATED = (
    "extra = [StateActionTransform(apply_to=['state.arm'], normalization_modes={}, target_rotations={'state.arm': 'rotation_6d'})]",
    "target_rotations .state.arm to rotation_6d",
)


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        _ROTATED,
        ("extra = [StateActionTransform(apply_to=['action.arm'], clip=True)]", "StateActionTransform has clip"),
        ("def joints(self): return [StateActionTransform(apply_to=['state.arm'], normalization_modes={'state.arm': 'scale'})]", "'scale'"),
        ("def joints(self): return [StateActionSinCosTransform(apply_to=['action.arm'])]", "'sin_cos' of 'action.arm'"),
        ("scale = 0.9", "VideoCrop has scale=0.9; supported is 0.95"),
        ("extra = [VideoResize(apply_to=['video.top'], height=224, width=224)]", "treats pictures with"),
        ("observation_indices = [-1, 0]", r"observation_indices \[-1, 0\]"),
        ("action_indices = list(range(0, 32, 2))", "action_indices"),
        ("orders = {'action_concat_order': ['action.arm']}", "joins action from action.arm"),
        ("model = {'action_horizon': 16}", "action_horizon=16.*has 8"),
        ("extra = [GR00TTransform()]", "expected to end with"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(loaded: Callable, body: str, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        loaded(f"{_NVIDIA_STYLE}\nclass Mine(Robot):\n    {body}\n", "Mine")


@pytest.mark.parametrize(
    "body",
    [
        "def transform(self): raise RuntimeError('needs a GPU')",
        "def transform(self): return GR00TTransform.build()",
        "def transform(self): return None",
        "def __init__(self): raise RuntimeError('no')",
    ],
)
def test_a_class_that_cannot_be_read_gets_the_one_to_write(loaded: Callable, body: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(f"{_NVIDIA_STYLE}\nclass Mine(Robot):\n    {body}\n", "Mine")
    example = str(caught.value).partition("class MyRobot:")
    assert example[1]
    with pytest.raises(ConfigError, match="MODE"):  # the modes are left to the user: a default would be a guess
        loaded(f"class MyRobot:{example[2]}\n", "MyRobot")


@pytest.mark.parametrize("spec", [":Y", "..x:Y", "x:"])
def test_a_malformed_name_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="module:ClassName"):
        load_data_config(spec)
