"""Conversion between the robot's names and the policy's, one function each way.

A robot has cameras with names of its own and joints in motor order; a policy wants `video.<cam>`, `state.<part>` and answers
`action.<part>`. Axis alphabet of this file: H horizon (actions in a chunk), J joints of the arm, D width of a part.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import ModalityConfig, Observation
from gr00t_fast.base.errors import ObservationError, PreflightError, UnsafeActionError, closest


def resolve_camera_map(robot_cameras: Iterable[str], policy_cameras: Iterable[str], requested: Mapping[str, str] | None) -> dict[str, str]:
    """Return {robot camera: policy camera}, naming every policy camera once.

    `requested` (the flag `--camera_map`) comes first; policy cameras it leaves open are filled by equal names; one camera on each side
    needs neither. Raises PreflightError with both lists and the flag to use.
    """
    robot_names, policy_names = list(robot_cameras), list(policy_cameras)
    mapping = dict(requested or {})
    _check_requested(mapping, robot_names, policy_names)
    open_names = [name for name in policy_names if name not in mapping.values()]
    if len(robot_names) == 1 and len(policy_names) == 1 and open_names:
        return {robot_names[0]: policy_names[0]}
    by_name = [name for name in open_names if name in robot_names and name not in mapping]
    mapping.update((name, name) for name in by_name)
    missing = [name for name in open_names if name not in by_name]
    if missing:
        spare = [name for name in robot_names if name not in mapping]
        raise PreflightError(
            f"no camera of the robot provides {_listed(missing)}. The robot has {_listed(robot_names)}, the policy was trained with "
            f"{_listed(policy_names)}. {_advice(spare, missing)}"
        )
    return mapping


def _check_requested(mapping: Mapping[str, str], robot_names: list[str], policy_names: list[str]) -> None:
    if mapping and all(robot in policy_names and policy in robot_names and robot not in robot_names for robot, policy in mapping.items()):
        turned = ", ".join(f"{policy}: {robot}" for robot, policy in mapping.items())
        raise PreflightError(f'--camera_map is the other way round: the robot\'s camera comes first, --camera_map="{{{turned}}}".')
    for names, side, known in ((mapping, "robot", robot_names), (mapping.values(), "policy", policy_names)):
        for name in names:
            if name not in known:
                raise PreflightError(f"--camera_map: the {side} has no camera '{name}', only {_listed(known)}.{closest(name, known)}")
    if len(set(mapping.values())) < len(mapping):
        raise PreflightError(f"--camera_map: two robot cameras are given to the same policy camera: {dict(mapping)}.")


def _advice(spare: list[str], missing: list[str]) -> str:
    if spare:
        pairs = ", ".join(f"{robot}: {policy}" for robot, policy in zip([*spare, *["<camera>"] * len(missing)], missing, strict=False))
        return f'Say which is which with --camera_map="{{{pairs}}}", or name the cameras in --robot.cameras alike.'
    cameras = ", ".join(f"{name}: {{type: opencv, index_or_path: 0, width: 640, height: 480, fps: 30}}" for name in missing)
    return f'Add to --robot.cameras="{{{cameras}}}", each with its own index; `lerobot-find-cameras opencv` lists what is plugged in.'


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def joints_of_parts(widths: Mapping[str, int], joint_names: tuple[str, ...], what: str) -> dict[str, list[int]]:
    """Return part -> indices of its joints in robot order.

    A part of width one that is called like a joint (`gripper`) is that joint; the other parts take the remaining joints in order, as
    NVIDIA's SO-100 data configs do. Raises PreflightError when the widths do not add up to the arm's joints.
    """
    if sum(widths.values()) != len(joint_names):
        parts = ", ".join(f"{part} ({width})" for part, width in widths.items())
        raise PreflightError(
            f"the policy's {what} has {sum(widths.values())} numbers: {parts}; the arm has "
            f"{len(joint_names)} joints: {', '.join(joint_names)}. "
            "This checkpoint or --data_config is for another robot."
        )
    named = {part: joint_names.index(part) for part, width in widths.items() if width == 1 and part in joint_names}
    rest = iter([index for index in range(len(joint_names)) if index not in named.values()])
    return {part: [named[part]] if part in named else [next(rest) for _ in range(width)] for part, width in widths.items()}


class _History:
    """Observations by time, of which a policy's offsets ask for some. The loop's thread adds, the inference's looks."""

    def __init__(self, offsets_s: Sequence[float], tolerance_s: float) -> None:
        """offsets_s: 0 and before it, ascending. tolerance_s: by how much one may be later than an offset says, and still be taken for it."""
        self._offsets_s, self._tolerance_s = offsets_s, tolerance_s
        self._lock, self._kept = threading.Lock(), deque[Observation]()

    def add(self, observation: Observation) -> None:
        with self._lock:
            while self._kept and self._kept[-1].time_s >= observation.time_s:
                self._kept.pop()
            self._kept.append(observation)
            while len(self._kept) > 1 and self._kept[1].time_s <= observation.time_s + self._offsets_s[0]:
                self._kept.popleft()

    def before(self, now: Observation) -> list[Observation]:
        """One for each offset but 0: the latest that is old enough, or the first one; `now` itself where nothing was added."""
        with self._lock:
            kept = list(self._kept) or [now]
        latest_s = [now.time_s + offset_s + self._tolerance_s for offset_s in self._offsets_s[:-1]]
        return [next((seen for seen in reversed(kept) if seen.time_s <= late_s), kept[0]) for late_s in latest_s]

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()


class RobotBinding:
    """Turns an Observation and an instruction into the policy's dict, and the policy's answer into joint targets."""

    def __init__(
        self,
        modality_config: Mapping[str, ModalityConfig],
        state_widths: Mapping[str, int],
        action_widths: Mapping[str, int],
        joint_names: tuple[str, ...],
        camera_map: Mapping[str, str],
        fps: float | None = None,
    ) -> None:
        """`camera_map` is complete (`resolve_camera_map`). Widths by part name. fps: control rate, for a policy that reads earlier observations too,
        which `remember` then has to be given. Raises PreflightError when parts and joints do not fit."""
        self._histories: dict[str, _History] = {}
        for modality in ("video", "state"):
            offsets = list(modality_config[modality].delta_indices)
            if offsets == [0]:
                continue
            if fps is None:
                raise PreflightError(f"the policy reads {modality} at the steps {offsets}, and how long a step is was not given (fps).")
            # half a step: a camera's frame is the tick's that it is nearest to
            self._histories[modality] = _History([offset / fps for offset in offsets], 0.5 / fps)
        parts = {what: [key.split(".", 1)[1] for key in modality_config[what].modality_keys] for what in ("state", "action")}
        self._state = joints_of_parts({part: state_widths[part] for part in parts["state"]}, joint_names, "state")
        self._action = joints_of_parts({part: action_widths[part] for part in parts["action"]}, joint_names, "action")
        self._language_key = modality_config["language"].modality_keys[0]
        self._cameras = dict(camera_map)
        self._joint_count = len(joint_names)

    def remember(self, observation: Observation) -> None:
        """Every tick's, as it comes: what a policy that reads earlier observations will be shown. Costs nothing for others."""
        for history in self._histories.values():
            history.add(observation)

    def reset(self) -> None:
        """An episode begins: what was seen before it is forgotten."""
        for history in self._histories.values():
            history.clear()

    def policy_observation(self, observation: Observation, instruction: str) -> dict[str, Any]:
        """Return `video.<cam>` uint8 (T, H, W, 3), `state.<part>` float64 (T, D) and the instruction as a list of one str. T is 1, or as many as the
        policy reads; before the first remembered observation that one is repeated.

        Raises ObservationError when a mapped camera or a joint is missing from the observation.
        """
        if observation.joints.shape != (self._joint_count,):
            raise ObservationError(f"the robot delivered joints of shape {observation.joints.shape}, expected ({self._joint_count},).")
        built: dict[str, Any] = {}
        for robot_camera, policy_camera in self._cameras.items():
            if robot_camera not in observation.frames:
                raise ObservationError(f"the robot delivered no frame of camera '{robot_camera}'; it delivered {_listed(observation.frames)}.")
            frames = [seen.frames.get(robot_camera, observation.frames[robot_camera]) for seen in self._seen("video", observation)]
            built[f"video.{policy_camera}"] = np.asarray(frames[0])[None] if len(frames) == 1 else np.stack(frames)
        states = np.stack([seen.joints for seen in self._seen("state", observation)]).astype(np.float64)  # (T, J)
        for part, joints in self._state.items():
            built[f"state.{part}"] = states[:, joints]
        built[self._language_key] = [instruction]
        return built

    def _seen(self, modality: str, observation: Observation) -> list[Observation]:
        """Oldest first; the last is the observation itself."""
        history = self._histories.get(modality)
        return [*(history.before(observation) if history else ()), observation]

    def action_targets(self, actions: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return float32 (H, J) in robot joint order. Raises UnsafeActionError when a part is missing or has a wrong shape."""
        horizons = {np.asarray(actions[key]).shape[0] if np.ndim(actions[key]) else 0 for key in actions if key.startswith("action.")}
        if len(horizons) != 1 or 0 in horizons:
            shapes = {key: np.shape(value) for key, value in actions.items()}
            raise UnsafeActionError(f"the policy's action parts must have the same number of steps, at least one; got {shapes}.")
        targets = np.empty((horizons.pop(), self._joint_count), np.float32)  # (H, J)
        for part, joints in self._action.items():
            values = np.asarray(actions.get(f"action.{part}", ()))
            if values.dtype.kind not in "fiu" and values.size:  # NumPy would take text and complex numbers too
                raise UnsafeActionError(f"the policy returned action.{part} of dtype {values.dtype}, expected real numbers. Nothing was sent.")
            if values.shape != (len(targets), len(joints)):
                raise UnsafeActionError(
                    f"the policy returned action.{part} of shape {values.shape}, expected {(len(targets), len(joints))} (steps, joints). "
                    "Nothing was sent; checkpoint and --data_config do not belong together."
                )
            targets[:, joints] = values
        return targets

    def action_parts(self, targets: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `action_targets`: (H, J) in robot joint order -> `action.<part>` (H, D)."""
        return {f"action.{part}": targets[:, joints] for part, joints in self._action.items()}
