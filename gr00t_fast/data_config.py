"""Which cameras and joints a fine-tune was trained on, in NVIDIA's naming, and how their numbers are normalised.

A DataConfig is NVIDIA's class of the same purpose without the transform objects: the key lists are the same, so a user's own class can usually
be passed as it is (`module:ClassName`).
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gr00t_fast.contracts import ModalityConfig
from gr00t_fast.errors import ConfigError, closest

log = logging.getLogger(__name__)
NORMALISATIONS = ("min_max", "q99", "mean_std", "binary")  # the modes of the reference's Normalizer that need no rotation maths
DEFAULT_NORMALISATION = "min_max"  # what NVIDIA's SO-100 data configs use for every part


@dataclass(frozen=True)
class DataConfig:
    """Key lists of one data configuration; every key carries its modality prefix (`video.`, `state.`, `action.`)."""

    video_keys: tuple[str, ...]
    state_keys: tuple[str, ...]
    action_keys: tuple[str, ...]
    language_key: str = "annotation.human.task_description"
    action_indices: tuple[int, ...] = tuple(range(16))
    normalisation: Mapping[str, str] = field(default_factory=dict)  # key -> mode; DEFAULT_NORMALISATION where absent

    def __post_init__(self) -> None:
        for prefix, keys in (("video.", self.video_keys), ("state.", self.state_keys), ("action.", self.action_keys)):
            if not keys:
                raise ConfigError(f"data config: no '{prefix}*' keys. Expected at least one.")
            for key in keys:
                if not isinstance(key, str) or not key.startswith(prefix):
                    raise ConfigError(f"data config: key '{key}' must begin with '{prefix}'.")
            if len(set(keys)) != len(keys):
                raise ConfigError(f"data config: a key is listed twice in {', '.join(keys)}.")
        parts = (*self.state_keys, *self.action_keys)
        for key, mode in self.normalisation.items():
            if key not in parts:
                raise ConfigError(f"data config: normalisation is given for '{key}', which is no state or action key.{closest(key, parts)}")
            if mode not in NORMALISATIONS:
                raise ConfigError(f"data config: normalisation '{mode}' of '{key}' is not supported; choose from {', '.join(NORMALISATIONS)}.")

    def normalisation_of(self, key: str) -> str:
        return self.normalisation.get(key, DEFAULT_NORMALISATION)

    def modality_config(self) -> dict[str, ModalityConfig]:
        """The same information in the form NVIDIA's clients ask a server for."""
        return {
            "video": ModalityConfig([0], list(self.video_keys)),
            "state": ModalityConfig([0], list(self.state_keys)),
            "action": ModalityConfig(list(self.action_indices), list(self.action_keys)),
            "language": ModalityConfig([0], [self.language_key]),
        }


_ARM = {"state_keys": ("state.single_arm", "state.gripper"), "action_keys": ("action.single_arm", "action.gripper")}
DATA_CONFIGS = {
    "so100": DataConfig(video_keys=("video.webcam",), **_ARM),
    "so100_dualcam": DataConfig(video_keys=("video.front", "video.wrist"), **_ARM),
}


def check_trained_cameras(config: DataConfig, cameras: Iterable[str]) -> None:
    """Raises ConfigError when `config` reads cameras that training did not have (`cameras`: those it had, as `video.webcam`)."""
    trained = list(cameras)
    absent = [key for key in config.video_keys if key not in trained]
    if absent:
        fitting = [name for name, known in DATA_CONFIGS.items() if set(known.video_keys) <= set(trained)]
        best = max(fitting, key=lambda name: len(DATA_CONFIGS[name].video_keys), default=None)
        use = f"Use --data_config={best}" if best else "Choose the data_config it was trained with (--data_config=module:ClassName)"
        had = ", ".join(trained) or "no camera"
        raise ConfigError(f"the data config reads {', '.join(absent)}, but this checkpoint was trained with {had}. {use}.")


def load_data_config(name: str | DataConfig) -> DataConfig:
    """Return a built-in configuration by name, or the user's own from `module:ClassName`. Raises ConfigError."""
    if isinstance(name, DataConfig):
        return name
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
    try:
        found = getattr(importlib.import_module(module_name), class_name)
        made = found() if isinstance(found, type) else found
    except ImportError as error:
        raise ConfigError(
            f"data_config '{spec}': cannot import '{module_name}' ({error}). Run from the folder that holds it, or install it."
        ) from error
    except AttributeError as error:
        raise ConfigError(f"data_config '{spec}': module '{module_name}' has no class '{class_name}', or it fails: {error}.") from error
    except Exception as error:
        raise ConfigError(f"data_config '{spec}': the module or class raised {type(error).__name__}: {error}.") from error
    _refuse_rotations(made, spec)
    return made if isinstance(made, DataConfig) else _from_nvidia_class(made, spec)


def _refuse_rotations(source: Any, spec: str) -> None:
    """Their maths is not here, and min_max in their place would be silently wrong."""
    told = [name for name in dir(source) if name.endswith("target_rotations") or name.startswith("sin_cos")]
    if used := [name for name in told if getattr(source, name)]:
        raise ConfigError(f"data_config '{spec}': {', '.join(used)} set; rotations and sin/cos states are not supported.")


def _from_nvidia_class(source: Any, spec: str) -> DataConfig:
    """Read NVIDIA-style attributes (`video_keys`, `state_keys`, `action_keys`, `language_keys`, `action_indices`)."""
    missing = [name for name in ("video_keys", "state_keys", "action_keys") if not hasattr(source, name)]
    if missing:
        raise ConfigError(f"data_config '{spec}': the class has no {', '.join(missing)}. Expected a DataConfig or NVIDIA-style key lists.")
    observation_indices = list(getattr(source, "observation_indices", [0]))
    if observation_indices != [0]:
        raise ConfigError(f"data_config '{spec}': observation_indices {observation_indices} are not supported; expected [0] (one frame).")
    language_keys = list(getattr(source, "language_keys", ["annotation.human.task_description"]))
    if len(language_keys) != 1:
        raise ConfigError(f"data_config '{spec}': expected one language key, got {language_keys}.")
    modes = [getattr(source, f"{modality}_normalization_modes", None) or {} for modality in ("state", "action")]
    normalisation = {key: mode for given in modes for key, mode in given.items()} or dict(getattr(source, "normalisation", {}))
    if not normalisation and hasattr(source, "transform"):  # NVIDIA's classes say it inside the transform, which cannot be read without their package
        log.warning("data_config '%s' does not say how parts are normalised: %s for all", spec, DEFAULT_NORMALISATION)
    return DataConfig(
        video_keys=tuple(source.video_keys),
        state_keys=tuple(source.state_keys),
        action_keys=tuple(source.action_keys),
        language_key=language_keys[0],
        action_indices=tuple(getattr(source, "action_indices", range(16))),
        normalisation=normalisation,
    )
