"""Which cameras and joints a fine-tune was trained on, in NVIDIA's naming, and how their numbers are normalised.

A DataConfig is NVIDIA's class of the same purpose without the transform objects. A user's own class is passed as `module:ClassName`: one
that was written for NVIDIA's package is read by what its `transform()` does, one that holds key lists alone as it is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from gr00t_fast.base.contracts import ModalityConfig
from gr00t_fast.base.errors import ConfigError, closest

# The modes of the reference's Normalizer; "sin_cos" is its StateActionSinCosTransform, "none" a part that no transform normalises.
NORMALISATIONS = ("min_max", "q99", "mean_std", "binary", "sin_cos", "none")
DEFAULT_DATA_CONFIG = "so100"  # of an N1.5 checkpoint
DEFAULT_NORMALISATION = "min_max"  # what NVIDIA's SO-100 data configs use for every part
DEFAULT_ACTION_INDICES = tuple(range(16))
DEFAULT_LANGUAGE_KEY = "annotation.human.task_description"


@dataclass(frozen=True)
class DataConfig:
    """Key lists of one data configuration; every key carries its modality prefix (`video.`, `state.`, `action.`).

    action_indices: 0, 1, ... n - 1, one per control tick. A call returns n actions unless `action_horizon` asks for another number.
    video_indices, state_indices: which times of pictures and states are read, steps back from now (N1.6, N1.7; N1.5's read the present only).
    normalisation: key -> mode; DEFAULT_NORMALISATION where absent.
    """

    video_keys: tuple[str, ...]
    state_keys: tuple[str, ...]
    action_keys: tuple[str, ...]
    language_key: str = DEFAULT_LANGUAGE_KEY
    action_indices: tuple[int, ...] = DEFAULT_ACTION_INDICES
    normalisation: Mapping[str, str] = field(default_factory=dict)
    video_indices: tuple[int, ...] = (0,)
    state_indices: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for prefix, keys in (("video.", self.video_keys), ("state.", self.state_keys), ("action.", self.action_keys)):
            if not keys:
                raise ConfigError(f"data config: no '{prefix}*' keys. Expected at least one.")
            for key in keys:
                if not isinstance(key, str) or not key.startswith(prefix):
                    raise ConfigError(f"data config: key '{key}' must begin with '{prefix}'.")
            if len(set(keys)) != len(keys):
                raise ConfigError(f"data config: a key is listed twice in {', '.join(keys)}.")
        indices = list(self.action_indices)
        if not indices or indices != list(range(len(indices))):
            raise ConfigError(f"data config: action_indices {indices} are not supported; expected 0, 1, 2 and so on: one action for each tick.")
        parts = (*self.state_keys, *self.action_keys)
        for key, mode in self.normalisation.items():
            if key not in parts:
                raise ConfigError(f"data config: normalisation is given for '{key}', which is no state or action key.{closest(key, parts)}")
            if mode not in NORMALISATIONS:
                raise ConfigError(f"data config: normalisation '{mode}' of '{key}' is not supported; choose from {', '.join(NORMALISATIONS)}.")
            if mode == "sin_cos" and key in self.action_keys:
                raise ConfigError(f"data config: normalisation 'sin_cos' of '{key}' has no inverse that gives an action; it is for states only.")

    def normalisation_of(self, key: str) -> str:
        return self.normalisation.get(key, DEFAULT_NORMALISATION)

    def modality_config(self, action_configs: list[dict[str, Any]] | None = None) -> dict[str, ModalityConfig]:
        """The same information in the form NVIDIA's clients ask a server for. action_configs: as of ModalityConfig."""
        return {
            "video": ModalityConfig(list(self.video_indices), list(self.video_keys)),
            "state": ModalityConfig(list(self.state_indices), list(self.state_keys)),
            "action": ModalityConfig(list(self.action_indices), list(self.action_keys), action_configs),
            "language": ModalityConfig([0], [self.language_key]),
        }


_ARM: dict[str, Any] = {"state_keys": ("state.single_arm", "state.gripper"), "action_keys": ("action.single_arm", "action.gripper")}
# NVIDIA's own for this arm (Isaac-GR00T, branch n1.5-release, gr00t/experiment/data_config.py), by their names there.
DATA_CONFIGS = {
    "so100": DataConfig(video_keys=("video.webcam",), **_ARM),
    "so100_dualcam": DataConfig(video_keys=("video.front", "video.wrist"), **_ARM),
}
_NVIDIA_CLASSES = {"So100DataConfig": "so100", "So100DualCamDataConfig": "so100_dualcam"}
_REMEDY = "Such a checkpoint needs NVIDIA's own code."


def check_trained_cameras(config: DataConfig, cameras: Iterable[str]) -> None:
    """Raises ConfigError when `config` reads cameras that training did not have (`cameras`: those it had, as `video.webcam`)."""
    trained = list(cameras)
    absent = [key for key in config.video_keys if key not in trained]
    if absent:
        fitting = [name for name, known in DATA_CONFIGS.items() if known.action_keys == config.action_keys and set(known.video_keys) <= set(trained)]
        best = max(fitting, key=lambda name: len(DATA_CONFIGS[name].video_keys), default=None)
        use = f"Use --data_config={best}" if best else "Choose the data_config it was trained with (--data_config=module:ClassName)"
        had = ", ".join(trained) or "no camera"
        raise ConfigError(f"the data config reads {', '.join(absent)}, but this checkpoint was trained with {had}. {use}.")


def load_data_config(name: str | DataConfig | None) -> DataConfig:
    """Return a built-in configuration by name, or the user's own from `module:ClassName`; None: N1.5's default. Raises ConfigError."""
    if name is None:
        return DATA_CONFIGS[DEFAULT_DATA_CONFIG]
    if isinstance(name, DataConfig):
        return name
    if not isinstance(name, str):
        return _from_object(name, type(name).__name__)
    if name in DATA_CONFIGS:
        return DATA_CONFIGS[name]
    if ":" in name:
        return _from_user_class(name)
    raise ConfigError(
        f"unknown data_config '{name}'.{closest(name, DATA_CONFIGS)} Expected {', '.join(DATA_CONFIGS)} or your own class as 'module:ClassName'."
    )


def _from_user_class(spec: str) -> DataConfig:
    module_name, class_name = spec.split(":", 1)
    if str(Path.cwd()) not in sys.path:  # a user's my_config.py lies where they run the command
        sys.path.insert(0, str(Path.cwd()))
    if not module_name or not class_name or module_name.startswith("."):
        raise ConfigError(f"data_config '{spec}': expected 'module:ClassName', e.g. my_config:MyRobot.")
    with stand_ins(module_name.split(".")[0]):
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            where = "Run from the folder that holds it, or install it." if error.name in (None, module_name) else _bare(None)
            raise ConfigError(f"data_config '{spec}': cannot import '{module_name}' ({error}). {where}") from error
        except Exception as error:
            raise ConfigError(f"data_config '{spec}': the module raised {type(error).__name__}: {error}. {_bare(None)}") from error
        found = getattr(module, class_name, None)
        if found is None:
            raise ConfigError(f"data_config '{spec}': module '{module_name}' has no class '{class_name}'.{closest(class_name, vars(module))}")
        try:
            made = found() if isinstance(found, type) else found
        except Exception as error:
            raise ConfigError(f"data_config '{spec}': the class raised {type(error).__name__}: {error}. {_bare(None)}") from error
        return _from_object(made, spec)


def _published() -> dict[str, Any]:
    """What gr00t.experiment.data_config holds besides the base class: users' classes derive from its classes."""
    classes = {class_name: published_class(class_name, DATA_CONFIGS[name]) for class_name, name in _NVIDIA_CLASSES.items()}
    instances = {name: classes[class_name]() for class_name, name in _NVIDIA_CLASSES.items()}
    return {**classes, "DATA_CONFIG_MAP": instances, "load_data_config": instances.__getitem__}


def _from_object(source: Any, spec: str) -> DataConfig:
    if isinstance(source, DataConfig):
        return source
    for_nvidia = hasattr(source, "transform")
    try:
        return read_steps(source) if for_nvidia else _from_key_lists(source)
    except ConfigError as error:
        what = str(error).removeprefix("data config: ").rstrip(".")
        raise ConfigError(f"data_config '{spec}': {what}.{f' {_REMEDY}' if for_nvidia else ''}") from error
    except Exception as error:  # a transform() may do anything
        what = "what its modality_config() and transform() do cannot be read without NVIDIA's gr00t package" if for_nvidia else "cannot be read"
        raise ConfigError(f"data_config '{spec}': {what} ({type(error).__name__}: {error}). {_bare(source)}") from error


def _from_key_lists(source: Any) -> DataConfig:
    """A class of key lists (`video_keys`, `state_keys`, `action_keys`, `language_keys`, `action_indices`) and `normalisation`."""
    missing = [name for name in ("video_keys", "state_keys", "action_keys") if not hasattr(source, name)]
    if missing:
        raise ConfigError(f"the class has no {', '.join(missing)}. Expected a DataConfig, key lists or NVIDIA's modality_config() and transform()")
    if rotated := [name for name in dir(source) if name.endswith("target_rotations") and getattr(source, name)]:
        raise ConfigError(f"{', '.join(rotated)} set; rotations are not supported")
    if "observation_indices" in dir(source):
        check_present_only(source.observation_indices)
    language_keys = list(getattr(source, "language_keys", [DEFAULT_LANGUAGE_KEY]))
    if len(language_keys) != 1:
        raise ConfigError(f"expected one language key, got {language_keys}")
    normalisation = dict(getattr(source, "normalisation", {}))
    for modality in ("state", "action"):
        given = getattr(source, f"{modality}_normalization_modes", None) or {}
        unsaid = [key for key in getattr(source, f"{modality}_keys") if given and key not in {**given, **normalisation}]
        if unsaid:  # NVIDIA's transform would leave it as it is, and our default is another
            raise ConfigError(f"{modality}_normalization_modes does not say how {', '.join(unsaid)} is normalised; 'none' leaves a part as it is")
        normalisation |= given
    return DataConfig(
        video_keys=tuple(source.video_keys),
        state_keys=tuple(source.state_keys),
        action_keys=tuple(source.action_keys),
        language_key=language_keys[0],
        action_indices=tuple(getattr(source, "action_indices", DEFAULT_ACTION_INDICES)),
        normalisation=normalisation,
    )


def _bare(source: Any) -> str:
    """The class to write instead, with what is known of it."""
    example = DATA_CONFIGS["so100"]
    names = {"video_keys": example.video_keys, "state_keys": example.state_keys, "action_keys": example.action_keys}
    lists = {name: list(getattr(source, name, None) or keys) for name, keys in names.items()}
    lists["language_keys"] = list(getattr(source, "language_keys", None) or [example.language_key])
    modes = dict.fromkeys([*lists["state_keys"], *lists["action_keys"]], "MODE")
    lines = [f"    {name} = {value}" for name, value in {**lists, "normalisation": modes}.items()]
    what = f"A class of key lists needs no import; MODE is what its transform() does to the part, one of {', '.join(NORMALISATIONS)}:"
    return "\n".join([what, "class MyRobot:", *lines])


# --- classes written for NVIDIA's package ----------------------------------------------------------------------------------------------------
#
# Such a class says in `modality_config()` which keys there are, and in `transform()` what is done to them. While it is imported and called, the
# modules `gr00t.*` are stand-ins whose classes keep what their constructors were given and do nothing. Every step is then compared with what
# this library computes; one that is anything else is refused by name. The steps and their defaults are those of Isaac-GR00T's branch
# n1.5-release (gr00t/data/transform, gr00t/model/transforms.py).

_PACKAGE = "gr00t"
_CONFIG_MODULE = "gr00t.experiment.data_config"
_PRESENT = [0]  # observation_indices of every published configuration

# What evaluation does to pictures, in order, with the settings that `model.vision.pixel_values` has.
_PICTURE_STEPS: dict[str, dict[str, Any]] = {
    "VideoToTensor": {},
    "VideoCrop": {"scale": 0.95},
    "VideoResize": {"height": 224, "width": 224},
    "VideoToNumpy": {},
}
_PICTURE_DEFAULTS = {"backend": "torchvision", "interpolation": "linear", "antialias": True, "height": None, "width": None}
_TRAINING_STEPS = {  # augmentations: in evaluation they hand on what they are given
    *("VideoColorJitter", "VideoRandomRotation", "VideoHorizontalFlip", "VideoGrayscale", "VideoRandomGrayscale", "VideoRandomPosterize"),
    *("StateActionPerturbation", "StateActionDropout"),
}
_JOINT_STEPS = {  # name -> the settings that are understood
    "StateActionToTensor": {"apply_to"},
    "StateActionTransform": {"apply_to", "normalization_modes", "target_rotations"},
    "StateActionSinCosTransform": {"apply_to"},
}
_CONCAT, _MODEL = "ConcatTransform", "GR00TTransform"
_ORDERS = {"video": "video_concat_order", "state": "state_concat_order", "action": "action_concat_order"}
_MODEL_SETTINGS = {  # widths are the checkpoint's, and the language settings act in training only
    *("state_horizon", "action_horizon", "max_state_dim", "max_action_dim", "max_length"),
    *("default_instruction", "language_dropout_prob", "formalize_language", "apply_to"),
}


class Step:
    """Stands for any class of the `gr00t` package: an instance has the keyword arguments that it was made with as attributes."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)


def step(name: str, **settings: Any) -> Step:
    """An instance of a stand-in class of that name."""
    return type(name, (Step,), {})(**settings)


class BaseDataConfig:
    """Stands for the class of that name which users' configurations derive from."""

    def modality_config(self: Any) -> dict[str, Step]:
        seen = getattr(self, "observation_indices", _PRESENT)
        keys = {"video": self.video_keys, "state": self.state_keys, "action": self.action_keys, "language": self.language_keys}
        indices = dict.fromkeys(keys, seen) | {"action": getattr(self, "action_indices", list(DEFAULT_ACTION_INDICES))}
        return {name: step("ModalityConfig", delta_indices=indices[name], modality_keys=keys[name]) for name in keys}


def published_class(name: str, config: Any) -> type:
    """Stands for one of NVIDIA's own configurations, for users' classes that derive from it: the key lists of a DataConfig, and a transform that
    normalises every part by min_max."""

    def transform(self: Any) -> Step:
        parts = (self.action_keys, self.state_keys)
        joints = [step("StateActionTransform", apply_to=keys, normalization_modes=dict.fromkeys(keys, "min_max")) for keys in parts]
        pictures = [step(picture, apply_to=self.video_keys, **settings) for picture, settings in _PICTURE_STEPS.items()]
        orders = {_ORDERS["video"]: self.video_keys, _ORDERS["state"]: self.state_keys, _ORDERS["action"]: self.action_keys}
        return step("ComposedModalityTransform", transforms=[*pictures, *joints, step(_CONCAT, **orders), step(_MODEL)])

    lists = {name: list(getattr(config, name)) for name in ("video_keys", "state_keys", "action_keys")}
    return type(name, (BaseDataConfig,), {**lists, "language_keys": [config.language_key], "transform": transform})


class _Package(ModuleType):
    """A module whose every capitalised name is a stand-in class; other names are its modules."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Step,), {"__module__": self.__name__}) if name[0].isupper() else importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == _PACKAGE else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == _CONFIG_MODULE:
            vars(module).update(_published(), BaseDataConfig=BaseDataConfig)


@contextmanager
def stand_ins(user_package: str) -> Iterator[None]:
    """Inside, `gr00t` and its modules are stand-ins, installed or not: the real ones load a tokenizer and pytorch3d, and reading needs neither.

    Afterwards the stand-ins and the modules of `user_package` that were imported with them are forgotten. A process that has imported the real
    `gr00t` keeps it: its objects have the same attributes.
    """
    if _PACKAGE in sys.modules:
        yield
        return
    finder, before = _Finder(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        new = set(sys.modules) - before
        if _PACKAGE in new:
            for name in new:
                if name.split(".")[0] in (_PACKAGE, user_package):
                    del sys.modules[name]


def read_steps(source: Any) -> DataConfig:
    """From an object with NVIDIA's `modality_config()` and `transform()`.

    Raises ConfigError that names the first setting or step which is not what this library computes.
    """
    steps = list(source.transform().transforms)
    keys, action_indices = _modalities(source.modality_config())
    names = [type(each).__name__ for each in steps]
    unknown = [name for name in names if name not in {*_PICTURE_STEPS, *_TRAINING_STEPS, *_JOINT_STEPS, _CONCAT, _MODEL}]
    if unknown:
        raise ConfigError(f"its transform() has the step {', '.join(unknown)}, and what that computes is not known here")
    _check_pictures([(name, each) for name, each in zip(names, steps, strict=True) if name in _PICTURE_STEPS], keys["video"])
    modes = _modes([(name, each) for name, each in zip(names, steps, strict=True) if name in _JOINT_STEPS], keys)
    if [name for name in names if name in (_CONCAT, _MODEL)] != names[-2:] or names[-2:] != [_CONCAT, _MODEL]:
        raise ConfigError(f"its transform() is expected to end with one {_CONCAT} and one {_MODEL}")
    orders = _orders(steps[-2], keys)
    _check_model_step(steps[-1], len(action_indices))
    return DataConfig(
        video_keys=tuple(orders["video"]),
        state_keys=tuple(orders["state"]),
        action_keys=tuple(orders["action"]),
        language_key=keys["language"][0],
        action_indices=tuple(action_indices),
        normalisation={key: mode for key, mode in modes.items() if mode != DEFAULT_NORMALISATION},
    )


def _modalities(config: Mapping[str, Any]) -> tuple[dict[str, list[str]], list[int]]:
    keys = {name: list(modality.modality_keys) for name, modality in config.items()}
    if set(keys) != {*_ORDERS, "language"}:
        raise ConfigError(f"its modality_config() has {', '.join(keys)}; expected video, state, action and language")
    for modality in ("video", "state"):
        check_present_only(list(config[modality].delta_indices))
    if len(keys["language"]) != 1:
        raise ConfigError(f"expected one language key, got {keys['language']}")
    return keys, list(config["action"].delta_indices)


def check_present_only(observation_indices: Sequence[int]) -> None:
    """Raises ConfigError for a history of frames."""
    if list(observation_indices) != _PRESENT:
        raise ConfigError(f"observation_indices {list(observation_indices)} are not supported (a history of observations); expected [0]")


def _settings(given: Any, understood: AbstractSet[str] | None = None) -> dict[str, Any]:
    """What a step was made with; of a real one, which is a pydantic model, what differs from its class's defaults. Raises ConfigError for others than
    those `understood`; None: any."""
    settings = dict(vars(given)) if isinstance(given, Step) else {name: getattr(given, name) for name in given.model_fields_set}
    if understood is not None and (other := sorted(set(settings) - understood - {"training"})):
        raise ConfigError(f"its {type(given).__name__} has {', '.join(other)}, which is not supported")
    return settings


def _check_pictures(steps: Sequence[tuple[str, Any]], keys: Sequence[str]) -> None:
    names = [name for name, _ in steps]
    if names != list(_PICTURE_STEPS):
        raise ConfigError(
            f"its transform() treats pictures with {', '.join(names) or 'nothing'}; supported is {', '.join(_PICTURE_STEPS)}, in this order"
        )
    for name, each in steps:
        settings = {"training": True, **_settings(each)}
        expected = {**_PICTURE_DEFAULTS, **_PICTURE_STEPS[name], "apply_to": list(keys), "training": settings["training"]}
        for setting, value in settings.items():
            found, supported = (sorted(each) if setting == "apply_to" else each for each in (value, expected.get(setting, ...)))
            if found != supported:
                instead = "" if supported is ... else f"; supported is {supported}"
                raise ConfigError(f"its {name} has {setting}={value}{instead}")
        missing = [setting for setting in _PICTURE_STEPS[name] if setting not in settings]
        if missing:
            raise ConfigError(f"its {name} does not say {', '.join(missing)}")


def _modes(steps: Sequence[tuple[str, Any]], keys: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Key -> mode; "none" for a part that no step normalises, as the reference has it."""
    modes: dict[str, str] = {}
    for name, each in steps:
        settings = _settings(each, _JOINT_STEPS[name])
        if rotations := settings.get("target_rotations"):
            raise ConfigError(
                f"its {name} has target_rotations ({', '.join(f'{key} to {to}' for key, to in rotations.items())}); rotations are not supported"
            )
        for key in settings.get("apply_to", ()):
            mode = "sin_cos" if name == "StateActionSinCosTransform" else settings.get("normalization_modes", {}).get(key)
            if mode is not None and key in modes:
                raise ConfigError(f"its transform() changes '{key}' twice ({modes[key]}, {mode}); expected one step for each part")
            if mode is not None:
                modes[key] = str(mode)
    return {key: modes.get(key, "none") for key in (*keys["state"], *keys["action"])}


def _orders(concat: Any, keys: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The order in which pictures and parts reach the network is the concatenation's, not modality_config's."""
    settings = _settings(concat, {*_ORDERS.values(), "apply_to"})
    orders = {modality: list(settings.get(name) or ()) for modality, name in _ORDERS.items()}
    for modality, order in orders.items():
        if sorted(order) != sorted(keys[modality]):
            raise ConfigError(
                f"its {_CONCAT} joins {modality} from {', '.join(order) or 'nothing'}; modality_config() has {', '.join(keys[modality])}"
            )
    return orders


def _check_model_step(model: Any, actions: int) -> None:
    settings = _settings(model, _MODEL_SETTINGS)
    for name, expected in (("state_horizon", 1), ("action_horizon", actions)):
        if settings.get(name, expected) != expected:
            raise ConfigError(f"its {_MODEL} has {name}={settings[name]}, but modality_config() has {expected}")
