"""The raw observation dict becomes one typed value here, once; every mistake in it is found here.

Axis alphabet: B batch, T times, H and W height and width, D joint values.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import MAX_FRAME_PX, MAX_PIXELS, MIN_FRAME_PX, ActionPrefix
from gr00t_fast.base.errors import ObservationError, closest
from gr00t_fast.inputs.data_config import DataConfig

# An error shows the beginning of a value: it may travel to a client and into a log.
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80
_SHOWN_ITEMS = 12
# What one call may cost, checked before anything is computed. NVIDIA's code has no such limits; these are chosen.
MAX_BATCH = 64
MAX_INSTRUCTION_CHARACTERS = 2048
LEROBOT_STATE, LEROBOT_TASK = "observation.state", "task"  # besides observation.images.<camera>


@dataclass(frozen=True)
class CheckedObservation:
    """A checked observation. frames: key -> uint8 (B, T, H, W, 3); state: key -> float64 (B, T, D); one instruction per item.

    T is as many times as the policy reads. brackets: the reference prints what is left of the texts' array when it has taken the batch apart, and
    adds the batch axis itself to a single observation: 0 for a list of texts in a batch, 1 for `[["..."]]` in a batch and for a single observation.
    joined: whether it came in lerobot's form.
    """

    frames: Mapping[str, np.ndarray]
    state: Mapping[str, np.ndarray]
    instructions: list[str]
    batched: bool
    brackets: int = 1
    joined: bool = False

    @property
    def batch(self) -> int:
        return len(self.instructions)


def parse_observation(observation: Mapping[str, Any], config: DataConfig, state_widths: Mapping[str, int]) -> CheckedObservation:
    """Check and convert; NVIDIA's nested form and lerobot's too. Raises ObservationError that names the key, what was expected, and what
    came."""
    if not isinstance(observation, Mapping):
        raise ObservationError(f"observation: expected a dict of arrays by key, got {type(observation).__name__}.")
    joined = any(isinstance(key, str) and key.startswith("observation.") for key in observation)
    if joined:
        observation = _from_lerobot(observation, config, state_widths)
    elif is_nested(observation):
        observation = flat_observation(observation)
    language_key = _language_key(observation, config)
    needed = [*config.video_keys, *config.state_keys, language_key]
    for key in needed:
        if key not in observation:
            given = [str(name) for name in observation]
            misspelt = closest(key, [name for name in given if name not in needed])
            raise ObservationError(f"observation: '{key}' is missing.{misspelt} Expected {', '.join(needed)}; got {_names(sorted(given))}.")
    times = {"video": len(config.video_indices), "state": len(config.state_indices)}
    frames = {key: _frames(key, observation[key], times["video"]) for key in config.video_keys}
    check_pixels(sum(array[..., 0].size for array, _ in frames.values()), "as they come")
    state = {key: _state(key, observation[key], state_widths[key], times["state"]) for key in config.state_keys}
    batched = _agree({**{k: v[1] for k, v in frames.items()}, **{k: v[1] for k, v in state.items()}}, "batched or unbatched alike")
    batch = _agree({**{k: len(v[0]) for k, v in frames.items()}, **{k: len(v[0]) for k, v in state.items()}}, "of one batch size")
    instructions, axes = _instructions(language_key, observation[language_key], batch)
    frames_of, state_of = ({key: array for key, (array, _) in found.items()} for found in (frames, state))
    return CheckedObservation(frames_of, state_of, instructions, batched, axes - batched, joined)


def _from_lerobot(observation: Mapping[str, Any], config: DataConfig, state_widths: Mapping[str, int]) -> dict[str, Any]:
    """`observation.images.<camera>` uint8 ([B,] H, W, 3), `observation.state` ([B,] J) and `task` by NVIDIA's keys, with an axis of one time."""
    pictures = {f"observation.images.{key.removeprefix('video.')}": key for key in config.video_keys}
    expected, width = [*pictures, LEROBOT_STATE, LEROBOT_TASK], sum(state_widths.values())
    given = {key for key in observation if key == LEROBOT_TASK or str(key).startswith("observation.")}
    if given != {*expected}:  # lerobot would show the network a further camera too
        raise ObservationError(f"observation: expected {', '.join(expected)}; got {_names(sorted(map(str, given)))}.")
    state = _array(LEROBOT_STATE, observation[LEROBOT_STATE], f"numbers of shape ({width},)")
    if state.ndim not in (1, 2) or state.shape[-1] != width:
        raise ObservationError(f"{LEROBOT_STATE}: expected shape ({width},), or (batch, {width}); got {state.shape}.")
    parts = np.split(state[..., None, :], np.cumsum([*state_widths.values()])[:-1], axis=-1)
    frames = {key: _array(name, observation[name], "uint8 RGB pixels") for name, key in pictures.items()}
    flat: dict[str, Any] = {key: array[..., None, :, :, :] if array.ndim in (3, 4) else array for key, array in frames.items()}
    return {**flat, **dict(zip(state_widths, parts, strict=True)), config.language_key: observation[LEROBOT_TASK]}


def _language_key(observation: Mapping[str, Any], config: DataConfig) -> str:
    """The data config's, or the only `annotation` key that there is: the reference goes by that word alone."""
    given = [key for key in observation if isinstance(key, str) and "annotation" in key]
    return given[0] if len(given) == 1 else config.language_key


def check_pixels(pixels: int, how: str) -> None:
    """Raises ObservationError for more than a call may hold."""
    if pixels > MAX_PIXELS:
        raise ObservationError(
            f"observation: the pictures have {pixels} pixels {how}, expected at most {MAX_PIXELS} in one call. Use smaller batches."
        )


def parse_prefix(prefix: ActionPrefix, widths: Mapping[str, int], batched: bool, batch: int, horizon: int) -> dict[str, np.ndarray]:
    """`action.<part>` -> float32 (B, L, D), at most `horizon` rows; empty when there are none. Raises ObservationError.

    batched, batch: as the observation is that the chunk is for.
    """
    absent = [key for key in widths if key not in prefix.actions]
    if absent:
        raise ObservationError(f"prefix: {', '.join(absent)} missing. Expected {', '.join(widths)}; got {_names(map(str, prefix.actions))}.")
    known = {key: _prefix_rows(key, prefix.actions[key], width, batched, batch) for key, width in widths.items()}
    lengths = sorted({rows.shape[1] for rows in known.values()})
    if len(lengths) != 1 or not 0 <= prefix.inference_delay <= lengths[0]:
        raise ObservationError(
            f"prefix: expected parts of equal length and a delay within it, got lengths {lengths}, delay {prefix.inference_delay}."
        )
    return {key: rows[:, :horizon] for key, rows in known.items()} if lengths[0] else {}


def _prefix_rows(key: str, value: Any, width: int, batched: bool, batch: int) -> np.ndarray:
    array = _array(f"prefix {key}", value, f"numbers of shape (rows, {width})")
    rows = array if batched else array[None]
    numeric = np.issubdtype(array.dtype, np.floating)
    if not numeric or rows.ndim != 3 or rows.shape[0] != batch or rows.shape[2] != width or not np.isfinite(rows).all():
        expected = f"({batch}, rows, {width})" if batched else f"(rows, {width})"
        raise ObservationError(f"prefix {key}: expected finite numbers of shape {expected}, got {array.dtype} of shape {array.shape}.")
    return rows.astype(np.float32)


def _frames(key: str, value: Any, times: int) -> tuple[np.ndarray, bool]:
    """-> (B, T, H, W, 3), and whether it came batched."""
    array = _array(key, value, "uint8 RGB pixels")
    if array.dtype != np.uint8:
        raise ObservationError(f"{key}: expected uint8 RGB pixels 0..255, got {array.dtype}. Convert the frame before passing it.")
    batched = array.ndim == 5
    if array.ndim not in (4, 5) or array.shape[-1] != 3 or 0 in array.shape:
        raise ObservationError(f"{key}: expected shape ({times}, height, width, 3), or (batch, {times}, height, width, 3); got {array.shape}.")
    height, width = array.shape[-3:-1]
    if not (min(height, width) >= MIN_FRAME_PX and max(height, width) <= MAX_FRAME_PX):
        raise ObservationError(f"{key}: expected pictures of {MIN_FRAME_PX} to {MAX_FRAME_PX} pixels each way, got {width}x{height}.")
    return _in_time(key, array if batched else array[None], times), batched


def _state(key: str, value: Any, width: int, times: int) -> tuple[np.ndarray, bool]:
    """-> float64 (B, T, D), and whether it came batched."""
    array = _array(key, value, f"numbers of shape (1, {width})")
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise ObservationError(f"{key}: expected numbers of shape (1, {width}), got dtype {array.dtype}.")
    if array.ndim not in (2, 3) or array.shape[-1] != width:
        raise ObservationError(f"{key}: expected shape (1, {width}), or (batch, 1, {width}); got {array.shape}.")
    batched = array.ndim == 3
    array = _in_time(key, array if batched else array[None], times).astype(np.float64)
    if not np.isfinite(array).all():
        shown = ", ".join(map(str, array.ravel()[:_SHOWN_ITEMS].tolist())) + (", ..." if array.size > _SHOWN_ITEMS else "")
        raise ObservationError(f"{key}: expected finite joint values, got [{shown}]. Check the robot's readings and calibration.")
    return array, batched


def _array(key: str, value: Any, expected: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged nested lists; a tensor on a GPU, or one that needs gradients
        raise ObservationError(f"{key}: expected {expected} as a NumPy array, got {type(value).__name__} ({error}).") from error


def _in_time(key: str, array: np.ndarray, times: int) -> np.ndarray:
    """`array` (B, T, ...), of which T is `times`."""
    if len(array) > MAX_BATCH:
        raise ObservationError(f"{key}: a batch of {len(array)}, expected at most {MAX_BATCH} in one call. Use several calls.")
    if array.shape[1] != times:
        expected = "one time step" if times == 1 else f"{times} time steps, the oldest first and the present one last"
        reads = "The checkpoint reads the present only." if times == 1 else "Keep the earlier ones: get_modality_config says which (delta_indices)."
        raise ObservationError(f"{key}: expected {expected}, got {array.shape[1]}. {reads}")
    return array


def _instructions(key: str, value: Any, batch: int) -> tuple[list[str], int]:
    """One for each item, and how many axes their array had; a bare text counts as a list of it."""
    given = value if isinstance(value, np.ndarray) else np.asarray(value, dtype=object)
    if given.size > MAX_BATCH:
        raise ObservationError(f"{key}: expected {batch} instructions for a batch of {batch}, got {given.size}.")
    longest = given.dtype.itemsize // 4 if given.dtype.kind == "U" else max((len(item) for item in given.flat if isinstance(item, str)), default=0)
    if longest > MAX_INSTRUCTION_CHARACTERS:
        raise ObservationError(f"{key}: the instruction has {longest} characters, expected at most {MAX_INSTRUCTION_CHARACTERS}. Shorten it.")
    items = given.ravel().tolist()
    if not items or not all(isinstance(item, str) for item in items) or given.size > max(given.shape, default=1):
        raise ObservationError(f"{key}: expected an instruction (str, or a list of {batch} str), got {_SHOWN.repr(value)}.")
    if len(items) == 1:
        items = items * batch
    if len(items) != batch:
        raise ObservationError(f"{key}: expected {batch} instructions for a batch of {batch}, got {len(items)}.")
    for item in items:
        if not item.strip():
            raise ObservationError(f"{key}: the instruction is empty. Say what the robot shall do.")
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise ObservationError(f"{key}: expected text that UTF-8 can hold, got {item[: _SHOWN.maxstring]!a} ({error.reason}).") from error
    return [str(item) for item in items], max(given.ndim, 1)


def _names(names: Iterable[str]) -> str:
    """The names of what was given, for an error."""
    given = [name[: _SHOWN.maxstring] for name in names]
    more = f" and {len(given) - _SHOWN_ITEMS} more" if len(given) > _SHOWN_ITEMS else ""
    return ", ".join(given[:_SHOWN_ITEMS]) + more or "nothing"


def _agree(values: Mapping[str, Any], what: str) -> Any:
    first = next(iter(values.values()))
    if any(value != first for value in values.values()):
        raise ObservationError(f"observation: expected all pictures and states {what}, got {dict(values)}.")
    return first


_MODALITIES = ("video", "state", "language")


def is_nested(observation: Any) -> bool:
    return isinstance(observation, Mapping) and all(isinstance(observation.get(modality), Mapping) for modality in _MODALITIES)


def flat_observation(observation: Mapping[str, Any]) -> dict[str, Any]:
    """A nested observation -> a flat one. The policy names what makes no sense."""
    flat = {f"{modality}.{key}": value for modality in ("video", "state") for key, value in observation[modality].items()}
    for key, value in observation["language"].items():
        one_each = isinstance(value, list | tuple) and all(isinstance(item, list | tuple) and len(item) == 1 for item in value)
        flat[key] = [item[0] for item in value] if one_each else value
    return flat


def nested_observation(observation: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], bool]:
    """A flat observation -> a nested one, and whether it was batched; states as float32, as NVIDIA's strict check wants them."""
    nested: dict[str, dict[str, Any]] = {modality: {} for modality in _MODALITIES}
    batched = any(key.startswith("state.") and np.ndim(value) == 3 for key, value in observation.items())
    for key, value in observation.items():
        modality, _, name = key.partition(".")
        if modality in ("video", "state"):
            array = np.asarray(value, np.float32) if modality == "state" else np.asarray(value)
            nested[modality][name] = array if batched else array[None]
        else:
            nested["language"][key] = [[str(text)] for text in ([value] if isinstance(value, str) else np.ravel(value).tolist())]
    return nested, batched


def nested_actions(actions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix("action."): value for key, value in actions.items()}


def flat_actions(actions: Mapping[str, Any], batched: bool) -> dict[str, Any]:
    return {f"action.{key}": value if batched or np.ndim(value) != 3 else value[0] for key, value in actions.items()}
