"""N1.7's processor_config.json, statistics.json and embodiment_id.json: what one embodiment's observations and actions look like.

They lie beside config.json, or in `processor/` if there are none. Each holds all embodiments that the checkpoint ever saw.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gr00t_fast.contracts import MAX_FRAME_PX, MIN_FRAME_PX, Letterbox
from gr00t_fast.errors import CheckpointError, ConfigError, closest, shown
from gr00t_fast.files import parse_json, read_text
from gr00t_fast.inputs.embodiment import STATISTICS, ActionPart, EmbodimentN1d7, PictureSettings, StatePart, Statistics, check_std, part_statistics

PROCESSOR_FILE, STATISTICS_FILE, EMBODIMENT_FILE = "processor_config.json", "statistics.json", "embodiment_id.json"
PROCESSOR_FILES = (PROCESSOR_FILE, STATISTICS_FILE, EMBODIMENT_FILE)
SUBDIRECTORY = "processor"
# What a fine-tune leaves besides; only these tell how it was trained.
TRAINING_FILES = tuple(f"experiment_cfg/{file}" for file in ("final_processor_config.json", "final_model_config.json", "config.yaml"))
_TRAINING_BYTES = 2**26  # the first holds all statistics as text
LETTERBOX_WORDS = ("auto", "always", "never")

# Rows of the per-embodiment weights by tag (the reference's table); embodiment_id.json comes first.
EMBODIMENT_ROWS_N1D7 = {
    "simpler_env_google": 0,
    "simpler_env_widowx": 1,
    "libero_sim": 2,
    **dict.fromkeys(("new_embodiment", "robocasa_panda_omron", "robocasa_gr1_tabletop"), 10),
    "unitree_g1_sonic": 11,
    "oxe_droid_relative_eef_relative_joint": 24,
    **dict.fromkeys(("real_g1_relative_eef_relative_joints", "unitree_g1_full_body_with_waist_height_nav_cmd"), 25),
    **{f"real_r1_pro_sharpa_relative_eef{source}": 26 for source in ("", "_human", "_maxinsights", "_mecka")},
    **dict.fromkeys(("xdof_relative_eef_relative_joint", "xdof_relative_eef_relative_joint_subtask"), 27),
}
# What an absent key means to the reference's processor. Sizes that an absent key takes from config.json are None.
_DEFAULTS: dict[str, Any] = {
    "image_crop_size": None,
    "image_target_size": None,
    "shortest_image_edge": 256,
    "crop_fraction": 0.95,
    "use_albumentations": False,
    "formalize_language": True,
    "max_state_dim": None,
    "max_action_dim": None,
    "max_action_horizon": None,
    "use_percentiles": False,
    "clip_outliers": True,
    "apply_sincos_state_encoding": False,
    "use_relative_action": False,
    "exclude_state": False,
    "letter_box_transform": False,
}
_WITHOUT_EFFECT = {  # on inference
    *("random_rotation_angle", "color_jitter_params", "extra_augmentation_config", "model_name", "state_dropout_prob"),
    *("use_mean_std", "transformers_loading_kwargs", "statistics", "embodiment_id_mapping", "tactile_state_keys", "tactile_input_shape"),
    *("tactile_embed_dim", "modality_configs"),
}
# Also in config.json, where they have no effect; different values there mean that the files are not of one checkpoint.
_SAID_TWICE = ("use_percentiles", "use_relative_action", "apply_sincos_state_encoding", "exclude_state", "formalize_language")
_ASSUMED = {"model_type": "qwen", "use_tactile": False}
_MODALITY_KEYS = {"delta_indices", "modality_keys", "sin_cos_embedding_keys", "mean_std_embedding_keys", "action_configs"}
_MOST_HISTORY = 1000  # steps back; a chosen limit
_EEF_WIDTHS = {"XYZ_ROT6D": 9, "XYZ_ROTVEC": 6}


def processor_directory(checkpoint: Path) -> Path:
    """Where the processor's files are: the root wins."""
    inside = checkpoint / SUBDIRECTORY
    return inside if not (checkpoint / PROCESSOR_FILE).exists() and (inside / PROCESSOR_FILE).exists() else checkpoint


@dataclass(frozen=True)
class ProcessorFiles:
    """The contents of the three files and of config.json, as they are; and what was decided on letterboxing, from what `asked` word."""

    config: Mapping[str, Any]
    statistics: Mapping[str, Any]
    rows: Mapping[str, Any]
    network: Mapping[str, Any]
    letterbox: Letterbox
    asked: str = "auto"

    def embodiment(self, tag: str, sizes: Mapping[str, int]) -> EmbodimentN1d7:
        """Read what belongs to `tag`; sizes: state_dim, action_dim, action_horizon, state_history and embodiments of the network.

        Raises ConfigError for an unknown tag, CheckpointError for files that are damaged, contradict the network or ask for what is not computed.
        """
        kwargs = self.config.get("processor_kwargs")
        if not isinstance(kwargs, Mapping) or not isinstance(kwargs.get("modality_configs"), Mapping):
            raise _damaged(PROCESSOR_FILE, "no processor_kwargs.modality_configs")
        _check_settings(kwargs, sizes)
        settings = {**_DEFAULTS, **kwargs}
        for key in _SAID_TWICE:
            if self.network.get(key, settings[key]) != settings[key]:
                raise CheckpointError(
                    f"{key} is {settings[key]} in {PROCESSOR_FILE} and {shown(self.network[key])} in config.json. NVIDIA's code goes by the former, "
                    "in training too: if that is how this checkpoint was trained, write the same into config.json."
                )
        self._check_tag(tag, kwargs["modality_configs"])
        try:
            reader = _Reader(kwargs["modality_configs"][tag], self.statistics[tag], settings)
            return reader.read(tag, self._row(tag, sizes["embodiments"]), sizes, self.letterbox)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise _damaged(f"{PROCESSOR_FILE} and {STATISTICS_FILE}", f"the entry '{tag}' is incomplete or damaged ({error!r})") from error

    def record(self, tag: str, row: int) -> dict[str, Any]:
        """What decides an observation's and an action's form for `tag`, which was read without an error, and `row` of its weights."""
        kwargs = self.config["processor_kwargs"]
        settings = {key: value for key, value in kwargs.items() if key not in (*_WITHOUT_EFFECT, "letter_box_transform")}
        return {"settings": settings, "modalities": kwargs["modality_configs"][tag], "statistics": self.statistics[tag], "row": row}

    def _check_tag(self, tag: str, modalities: Mapping[str, Any]) -> None:
        usable = [name for name in modalities if name in self.statistics and (name in self.rows or name in EMBODIMENT_ROWS_N1D7)]
        if tag in usable:
            return
        has = ", ".join(f"--embodiment_tag={name}" for name in usable) or "none"
        what = "this checkpoint has no statistics for" if tag in modalities else "unknown"
        raise ConfigError(f"{what} embodiment_tag '{tag}'.{closest(tag, usable)} This checkpoint has: {has}.")

    def _row(self, tag: str, embodiments: int) -> int:
        row = self.rows.get(tag, EMBODIMENT_ROWS_N1D7.get(tag))
        if type(row) is not int or not 0 <= row < embodiments:
            raise CheckpointError(
                f"{EMBODIMENT_FILE}: '{tag}' selects row {shown(row)} of the per-embodiment weights; by config.json there are {embodiments}."
            )
        return row


def letterbox_of(checkpoint: Path, config: Mapping[str, Any], asked: str) -> Letterbox:
    """asked: "auto", "always" or "never". The flag in processor_config.json says how the checkpoint was trained from July 2026 on; before mid-June
    all were padded, also those that say false. Raises CheckpointError for a damaged file, ConfigError for another word."""
    if asked not in LETTERBOX_WORDS:
        raise ConfigError(f"unknown letterbox '{asked}'.{closest(asked, LETTERBOX_WORDS)} Expected one of: {', '.join(LETTERBOX_WORDS)}.")
    if asked != "auto":
        return Letterbox(asked == "always", f"--letterbox={asked}", True)

    found = {}
    for name in TRAINING_FILES:
        try:
            found[name] = read_text(checkpoint / name, _TRAINING_BYTES)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise _damaged(name, f"cannot be read ({error})") from error
    processor, model, settings = (found.get(name) for name in TRAINING_FILES)
    if processor is not None and "eval_image_transform" in processor:
        try:
            pipeline = str(parse_json(processor)["eval_image_transform"])  # as text; the padding step of either kind is called LetterBox...
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(TRAINING_FILES[0], f"cannot be read as JSON ({error!r})") from error
        if any(step in pipeline for step in ("LetterBox", "Resize", "SmallestMaxSize")):  # else it is no list of steps
            return Letterbox("LetterBox" in pipeline, f"it was trained so, by {TRAINING_FILES[0]}", True)
    if model is not None and "letter_box_transform" not in model:
        return Letterbox(True, f"it was trained before the flag counted: {TRAINING_FILES[1]} does not have it", True)
    if settings is not None and re.search(r"^\s+video_backend:", settings, re.MULTILINE):
        return Letterbox(True, f"it was trained before the flag counted: {TRAINING_FILES[2]} has a video_backend", True)
    kwargs = config.get("processor_kwargs")
    pads = (kwargs if isinstance(kwargs, Mapping) else {}).get("letter_box_transform", False) is True
    return Letterbox(pads, f"letter_box_transform is {str(pads).lower()} in {PROCESSOR_FILE}", pads or model is not None or settings is not None)


def _damaged(file: str, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: {why}. Copy or download the checkpoint again.")


def _check_settings(kwargs: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    known = {*_DEFAULTS, *_WITHOUT_EFFECT, *_ASSUMED}
    for key in kwargs:
        if key not in known:
            raise CheckpointError(f"{PROCESSOR_FILE}: unknown key '{key}'.{closest(key, known)} It may change the computation, so it is refused.")
    for key, assumed in _ASSUMED.items():
        if kwargs.get(key, assumed) != assumed:
            raise CheckpointError(f"{PROCESSOR_FILE}: {key} is {shown(kwargs[key])}; this implementation computes with {assumed!r} only.")
    for key, default in _DEFAULTS.items():
        if isinstance(default, bool) and not isinstance(kwargs.get(key, default), bool):
            raise _damaged(PROCESSOR_FILE, f"{key} must be true or false, got {shown(kwargs[key])}")
    for key, size in (("max_state_dim", "state_dim"), ("max_action_dim", "action_dim"), ("max_action_horizon", "action_horizon")):
        if kwargs.get(key, sizes[size]) != sizes[size]:
            raise CheckpointError(f"{PROCESSOR_FILE}: {key} is {shown(kwargs[key])}, but the network's is {sizes[size]} (config.json).")


class _Reader:
    """One embodiment's modality configuration and statistics, and the settings of all."""

    def __init__(self, modalities: Mapping[str, Any], statistics: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self._modalities, self._settings = modalities, settings
        self._statistics = {modality: _statistics_of(modality, statistics.get(modality, {})) for modality in ("state", "action", "relative_action")}
        for modality, config in modalities.items():
            for key in config:
                if key not in _MODALITY_KEYS:
                    raise CheckpointError(f"{PROCESSOR_FILE}: unknown key '{key}' in {modality}.{closest(key, _MODALITY_KEYS)}")

    def read(self, tag: str, row: int, sizes: Mapping[str, int], letterbox: Letterbox) -> EmbodimentN1d7:
        settings, steps = self._settings, self._offsets("action")
        if list(steps) != list(range(len(steps))) or len(steps) > sizes["action_horizon"]:
            raise CheckpointError(
                f"{PROCESSOR_FILE}: action delta_indices {shown(list(steps))} are not supported; expected 0, 1, 2 and so on, at most "
                f"{sizes['action_horizon']} of them: one action for each tick."
            )
        state_offsets = self._past("state")
        if len(state_offsets) != sizes["state_history"]:
            raise CheckpointError(
                f"{PROCESSOR_FILE}: state delta_indices {list(state_offsets)} are {len(state_offsets)} time steps; the network takes "
                f"{sizes['state_history']} (state_history_length in config.json)."
            )
        state, action = tuple(self._state()), tuple(self._action(len(steps)))
        for what, parts, width in (("state", state, sizes["state_dim"]), ("action", action, sizes["action_dim"])):
            total = sum(part.width * (2 if part.mode == "sin_cos" else 1) for part in parts)
            if total > width:
                raise CheckpointError(f"{PROCESSOR_FILE}: the {what} parts have {total} values together; the network takes {width}.")
        return EmbodimentN1d7(
            tag=tag,
            row=row,
            cameras=self._keys("video"),
            frame_offsets=self._past("video"),
            state_offsets=state_offsets,
            state=state,
            action=action,
            action_steps=len(steps),
            language_key=self._keys("language")[0],
            pictures=_pictures(settings, letterbox.pads),
            letterbox=letterbox,
            formalize_language=settings["formalize_language"],
            clip_state=settings["clip_outliers"],
            exclude_state=settings["exclude_state"],
            state_dim=sizes["state_dim"],
            statistics={
                f"{what}.{part.name}": self._statistics[what][part.name] for what, parts in (("state", state), ("action", action)) for part in parts
            },
            action_configs=self._modalities["action"].get("action_configs"),
        )

    def _keys(self, modality: str) -> tuple[str, ...]:
        keys = self._modalities[modality]["modality_keys"]
        if not isinstance(keys, list) or not keys or not all(isinstance(key, str) and key for key in keys) or len(set(keys)) != len(keys):
            raise ValueError(f"{modality}.modality_keys {shown(keys)}")
        return tuple(keys)

    def _offsets(self, modality: str) -> tuple[int, ...]:
        offsets = self._modalities[modality]["delta_indices"]
        if not isinstance(offsets, list) or not offsets or not all(type(offset) is int for offset in offsets):
            raise ValueError(f"{modality}.delta_indices {shown(offsets)}")
        return tuple(offsets)

    def _past(self, modality: str) -> tuple[int, ...]:
        offsets = self._offsets(modality)
        if sorted(set(offsets)) != list(offsets) or offsets[-1] != 0 or offsets[0] < -_MOST_HISTORY:
            raise CheckpointError(
                f"{PROCESSOR_FILE}: {modality} delta_indices {list(offsets)} are not supported; expected steps back from -{_MOST_HISTORY} on, in "
                "order, the last one 0."
            )
        return offsets

    def _listed(self, modality: str, which: str) -> tuple[str, ...]:
        return tuple(self._modalities[modality].get(f"{which}_embedding_keys") or ())

    def _state(self) -> Iterable[StatePart]:
        sin_cos = self._listed("state", "sin_cos") if self._settings["apply_sincos_state_encoding"] else ()
        mean_std = self._listed("state", "mean_std")
        for name in self._keys("state"):
            statistics = self._statistics["state"][name]
            mode = "sin_cos" if name in sin_cos else "mean_std" if name in mean_std else "min_max"
            low, high = self._range(statistics, mode, f"state.{name}")
            yield StatePart(name, len(statistics["min"]), mode, low, high)

    def _action(self, steps: int) -> Iterable[ActionPart]:
        names, mean_std = self._keys("action"), self._listed("action", "mean_std")
        configs = self._modalities["action"].get("action_configs") or [{}] * len(names)
        if len(configs) != len(names):
            raise ValueError(f"{len(configs)} action_configs for {len(names)} parts")
        for name, config in zip(names, configs, strict=True):
            width = len(self._statistics["action"][name]["min"])
            mode = "mean_std" if name in mean_std else "min_max"
            rep = config.get("rep", "ABSOLUTE")
            if rep not in ("RELATIVE", "ABSOLUTE", "DELTA"):
                raise ValueError(f"rep {shown(rep)} of action part '{name}'")
            if rep == "DELTA":
                raise CheckpointError(
                    f"{PROCESSOR_FILE}: action part '{name}' has rep DELTA: its values are differences, which no arm may get as positions. Expected "
                    "RELATIVE or ABSOLUTE."
                )
            if rep == "ABSOLUTE" and name in self._statistics["relative_action"]:
                raise CheckpointError(
                    f"{PROCESSOR_FILE} says that action part '{name}' is absolute, but {STATISTICS_FILE} has statistics of it in relative_action. "
                    f"Take both files from one checkpoint. If it was trained with absolute values, delete relative_action.{name} there: training "
                    "copies what an earlier one left beside the data set."
                )
            if rep == "RELATIVE" and self._settings["use_relative_action"]:
                yield self._relative(name, width, mode, config, steps)
            else:
                yield ActionPart(name, width, mode, *self._range(self._statistics["action"][name], mode, f"action.{name}"))

    def _relative(self, name: str, width: int, mode: Literal["min_max", "mean_std"], config: Mapping[str, Any], steps: int) -> ActionPart:
        """Its statistics are min and max (or mean and deviation) for each step, percentiles never."""
        if name not in self._statistics["relative_action"]:
            raise CheckpointError(f"{STATISTICS_FILE}: action part '{name}' is relative, but relative_action has no statistics of it.")
        statistics, reference = self._statistics["relative_action"][name], config.get("state_key") or name
        if statistics["min"].shape != (steps, width):
            raise CheckpointError(
                f"{STATISTICS_FILE}: relative_action.{name} has shape {statistics['min'].shape}, expected {(steps, width)}: one row for each action."
            )
        kind, form = config.get("type", "NON_EEF"), config.get("format", "DEFAULT")
        if kind not in ("EEF", "NON_EEF") or (kind == "EEF" and _EEF_WIDTHS.get(form) != width):
            raise CheckpointError(
                f"{PROCESSOR_FILE}: action part '{name}' of {width} values has type {shown(kind)} and format {shown(form)}; expected NON_EEF, or EEF "
                f"with {' or '.join(f'{known} ({size} values)' for known, size in _EEF_WIDTHS.items())}."
            )
        if reference not in self._keys("state") or len(self._statistics["state"][reference]["min"]) != width:
            raise CheckpointError(
                f"{PROCESSOR_FILE}: relative action part '{name}' counts from state part '{reference}', which is none of {width} values."
            )
        low, high = self._range(statistics, mode, f"relative_action.{name}", percentiles=False)
        return ActionPart(name, width, mode, low, high, reference, form if kind == "EEF" else None)

    def _range(self, statistics: Statistics, mode: str, where: str, percentiles: bool | None = None) -> tuple[np.ndarray, np.ndarray]:
        """percentiles: None: as the settings say."""
        if mode == "mean_std":
            return statistics["mean"], check_std(where, statistics["std"])
        by_percentiles = self._settings["use_percentiles"] if percentiles is None else percentiles
        low, high = ("q01", "q99") if by_percentiles else ("min", "max")
        return statistics[low], statistics[high]


def _pictures(settings: Mapping[str, Any], letterbox: bool) -> PictureSettings:
    def size(key: str) -> tuple[int, int] | None:
        if settings[key] is None:
            return None
        pair = tuple(settings[key])
        if len(pair) != 2 or not all(type(side) is int and MIN_FRAME_PX <= side <= MAX_FRAME_PX for side in pair):
            raise ValueError(f"{key} {shown(settings[key])}")
        return pair

    crop, target = size("image_crop_size"), size("image_target_size")
    edge, fraction = settings["shortest_image_edge"], settings["crop_fraction"]
    if settings["use_albumentations"]:
        if (edge is None and target is None) or (fraction is None and (crop is None or target is None)):
            raise ValueError("shortest_image_edge, or crop_fraction, and the sizes that stand for them are null")
        edge = target[0] if edge is None else edge
        fraction = crop[0] / target[0] if fraction is None else fraction
        if type(edge) is not int or not MIN_FRAME_PX <= edge <= MAX_FRAME_PX or not 0 < float(fraction) <= 1:
            raise ValueError(f"shortest_image_edge {shown(edge)}, crop_fraction {shown(fraction)}")
        return PictureSettings(letterbox, True, edge, float(fraction), crop, target)
    if crop is None or target is None:
        raise ValueError("use_albumentations is false, and image_crop_size or image_target_size is null")
    return PictureSettings(letterbox, False, min(target), 1.0, crop, target)


def _statistics_of(modality: str, parts: Mapping[str, Any]) -> dict[str, Statistics]:
    """Part -> name -> float64 (D,), or (steps, D) of relative actions."""
    for part, values in parts.items():
        if absent := [name for name in STATISTICS if name not in values]:
            raise ValueError(f"{modality}.{part} without {', '.join(absent)}")
    return {part: part_statistics(f"{modality}.{part}", values, 2 if modality == "relative_action" else 1) for part, values in parts.items()}
