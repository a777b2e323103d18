"""Samples in degrees and bytes -> what the network trains on, and the statistics that the checkpoint will carry.

Axis alphabet: N samples, B batch, H horizon, P padded state width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.checkpoint.metadata import parse_metadata
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.data_config import DATA_CONFIGS
from gr00t_fast.model import ModelInputs
from gr00t_fast.prompt import PromptEncoder
from gr00t_fast.transforms import ActionTransform, StateTransform
from training.flow import Batch
from training.labels import FPS, GRIPPER
from training.network import EMBODIMENT_TAG
from training.samples import RESOLUTION, Samples

DATA_CONFIG = "so100"
_PARTS = {"single_arm": slice(0, GRIPPER), "gripper": slice(GRIPPER, GRIPPER + 1)}


def metadata_of(samples: Samples) -> dict[str, Any]:
    """experiment_cfg/metadata.json: statistics of states and of all actions of all chunks, the camera, the rate."""
    values = {"state": samples.joints, "action": samples.chunks.reshape(-1, len(SO100_JOINTS))}
    statistics = {kind: {part: _statistics(rows[:, columns]) for part, columns in _PARTS.items()} for kind, rows in values.items()}
    shapes = {
        part: {"absolute": True, "rotation_type": None, "shape": [columns.stop - columns.start], "continuous": True}
        for part, columns in _PARTS.items()
    }
    camera = {"resolution": list(RESOLUTION), "channels": 3, "fps": float(FPS)}
    videos = {key.removeprefix("video."): camera for key in DATA_CONFIGS[DATA_CONFIG].video_keys}
    modalities = {"video": videos, "state": shapes, "action": shapes}
    return {EMBODIMENT_TAG: {"statistics": statistics, "modalities": modalities, "embodiment_tag": EMBODIMENT_TAG}}


def _statistics(rows: np.ndarray) -> dict[str, list[float]]:
    rows = rows.astype(np.float64)
    found = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    found |= {name: np.quantile(rows, q, axis=0) for name, q in (("q01", 0.01), ("q99", 0.99))}
    return {name: [round(float(value), 4) for value in values] for name, values in found.items()}


@dataclass(frozen=True)
class TrainingSet:
    """Normalised as the policy normalises. pictures uint8 (N, side, side, 3); states (N, P); actions (N, H, joints); block (N, 2)."""

    pictures: np.ndarray
    states: Tensor
    actions: Tensor
    block: Tensor

    @classmethod
    def of(cls, samples: Samples, metadata: dict[str, Any], padded_state: int) -> TrainingSet:
        known, config = parse_metadata(metadata, EMBODIMENT_TAG), DATA_CONFIGS[DATA_CONFIG]
        joints, chunks = samples.joints.astype(np.float64), samples.chunks
        states = StateTransform(config, known, padded_state)({f"state.{part}": joints[:, columns] for part, columns in _PARTS.items()})
        actions = ActionTransform(config, known, len(SO100_JOINTS)).normalised({f"action.{p}": chunks[..., c] for p, c in _PARTS.items()})
        return cls(samples.pictures, torch.from_numpy(states), torch.from_numpy(actions), torch.from_numpy(samples.block))

    def __len__(self) -> int:
        return len(self.states)

    def batch(self, rows: np.ndarray, prompts: PromptEncoder, instruction: str, generator: torch.Generator, device: torch.device) -> Batch:
        """One instruction for the whole batch, so that no prompt is padded."""
        pictures = torch.from_numpy(self.pictures[rows]).to(device)
        pixels = (pictures.permute(0, 3, 1, 2).float() - 127.5) / 127.5  # as transforms.pixel_values ends
        ids = torch.from_numpy(prompts(instruction).copy())
        positions = (ids == prompts.image_token_id).nonzero().squeeze(1)
        chosen = torch.from_numpy(rows)
        inputs = ModelInputs(pixels[:, None], ids.expand(len(rows), -1).to(device), positions.to(device), self.states[chosen].to(device))
        return Batch(inputs, self.actions[chosen].to(device), self.block[chosen].to(device), generator)
