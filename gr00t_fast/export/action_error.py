"""How far two sets of actions are apart, in what the arm would do about it.

Joint units are those of the fine-tune's data: degrees for the body joints in most data sets, per cent for the gripper. The relative figure divides
by the displacement (action minus noise): the noise, equal in both, would flatter a ratio to the actions themselves.
Axis alphabet: n observations, H horizon, A padded action width, J joints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gr00t_fast.transforms import ActionTransform


@dataclass(frozen=True)
class ActionError:
    """|difference| over all observations, times and joints, in joint units; and relative to the displacement (L2, normalised)."""

    p50: float
    p99: float
    largest: float
    rms: float
    displacement: float
    per_joint_p99: tuple[float, ...]

    def describe(self) -> dict[str, Any]:
        return {
            "p50": round(self.p50, 5),
            "p99": round(self.p99, 5),
            "max": round(self.largest, 5),
            "rms": round(self.rms, 5),
            "relative_to_displacement": round(self.displacement, 6),
            "p99_per_joint": [round(value, 5) for value in self.per_joint_p99],
        }


def action_error(got: np.ndarray, truth: np.ndarray, noise: np.ndarray, transform: ActionTransform) -> ActionError:
    """All (n, H, A), normalised. NaN and infinity in `got` give NaN figures, which no limit lets pass."""
    gap = np.abs(joints(got, transform) - joints(truth, transform))  # (n, H, J)
    width = gap.shape[-1]  # of the padded actions, only these move a joint
    moved = np.linalg.norm((truth - noise)[..., :width].astype(np.float64))
    relative = np.linalg.norm((got - truth)[..., :width].astype(np.float64)) / max(moved, 1e-12)
    p50, p99 = np.percentile(gap, (50, 99))
    per_joint = tuple(float(value) for value in np.percentile(gap.reshape(-1, width), 99, axis=0))
    return ActionError(float(p50), float(p99), float(gap.max()), float(np.sqrt((gap**2).mean())), float(relative), per_joint)


def joints(actions: np.ndarray, transform: ActionTransform) -> np.ndarray:
    """(n, H, A) normalised -> float64 (n, H, J) in joint units."""
    return np.concatenate(list(transform(actions).values()), axis=-1).astype(np.float64)
