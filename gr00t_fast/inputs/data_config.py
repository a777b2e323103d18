"""Which cameras and joints a fine-tune was trained on, in NVIDIA's naming, and how their numbers are normalised.

A DataConfig is NVIDIA's class of the same purpose without the transform objects. A user's own class is passed as `module:ClassName`: one
that was written for NVIDIA's package is read by what its `transform()` does (nvidia_config.py), one that holds key lists alone as it is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gr00t_fast.contracts import ModalityConfig
from gr00t_fast.errors import ConfigError, closest
from gr00t_fast.inputs.nvidia_config import DEFAULT_ACTION_INDICES, check_present_only, published_class, read_steps, stand_ins

# The modes of the reference's Normalizer; "sin_cos" is its StateActionSinCosTransform, "none" a part that no transform normalises.
NORMALISATIONS = ("min_max", "q99", "mean_std", "binary", "sin_cos", "none")
DEFAULT_DATA_CONFIG = "so100"  # of an N1.5 checkpoint
DEFAULT_NORMALISATION = "min_max"  # what NVIDIA's SO-100 data configs use for every part
DEFAULT_LANGUAGE_KEY = "annotation.human.task_description"


@dataclass(frozen=True)
class DataConfig:
    """Key lists of one data configuration; every key carries its modality prefix (`video.`, `state.`, `action.`).

    action_indices: 0, 1, ... n - 1, one per control tick: n actions are returned unless more of what training predicts are asked for.
    video_indices, state_indices: which times of pictures and states are read, steps back from now (N1.7; N1.5's read the present only).
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
    with stand_ins(_published(), module_name.split(".")[0]):
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
        return _from_steps(source) if for_nvidia else _from_key_lists(source)
    except ConfigError as error:
        what = str(error).removeprefix("data config: ").rstrip(".")
        raise ConfigError(f"data_config '{spec}': {what}.{f' {_REMEDY}' if for_nvidia else ''}") from error
    except Exception as error:  # a transform() may do anything
        what = "what its modality_config() and transform() do cannot be read without NVIDIA's gr00t package" if for_nvidia else "cannot be read"
        raise ConfigError(f"data_config '{spec}': {what} ({type(error).__name__}: {error}). {_bare(source)}") from error


def _from_steps(source: Any) -> DataConfig:
    fields = read_steps(source)
    modes = {key: mode for key, mode in fields.pop("normalisation").items() if mode != DEFAULT_NORMALISATION}
    return DataConfig(**fields, normalisation=modes)


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
