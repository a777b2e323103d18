"""From an observation to what goes into an engine, and from an engine's actions to joint targets: what both networks
need around them, and all that GR00T N1.5 does.

Axis alphabet: B batch, H horizon, D joint values of a part, A padded action width, L rows of a prefix.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from gr00t_fast.checkpoint import EMBODIMENT_ROWS, Checkpoint, EmbodimentMetadata
from gr00t_fast.checkpoint.metadata import policy_metadata_of
from gr00t_fast.contracts import ActionPrefix, ModalityConfig, PolicyMetadata
from gr00t_fast.engine import Continuation, PolicyInputs, prefix_weights
from gr00t_fast.inputs.data_config import DataConfig, check_trained_cameras
from gr00t_fast.inputs.embodiment import CameraMetadata
from gr00t_fast.inputs.images import to_trained_size
from gr00t_fast.inputs.observation import CheckedObservation, check_pixels, parse_observation, parse_prefix
from gr00t_fast.inputs.prompt import PromptEncoder
from gr00t_fast.inputs.transforms import ActionTransform, StateTransform, reference_inputs
from gr00t_fast.model.vision import pixel_values

log = logging.getLogger(__name__)
_MAX_DENOISING_STEPS = 1000  # one per time bucket of training; more would repeat buckets


class Transform(Protocol):
    """One step of the pre-processing: fields of PolicyInputs from a checked observation."""

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]: ...


class ResizeFrames:
    """Frames of any size -> the training videos' resolution. Pixels are made of them on the device (model.vision.pixel_values)."""

    def __init__(self, cameras: Mapping[str, CameraMetadata]) -> None:
        self._cameras = cameras
        self._told: set[str] = set()

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]:
        sizes = [self._cameras[key].width * self._cameras[key].height for key in observation.frames]
        check_pixels(observation.batch * sum(sizes), "at the size of the training videos")
        return {"frames": [self._resized(key, frames) for key, frames in observation.frames.items()]}

    def _resized(self, key: str, frames: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3)."""
        camera, (height, width) = self._cameras[key], frames.shape[1:3]
        if (height, width) != (camera.height, camera.width) and key not in self._told:
            self._told.add(key)
            log.info("%s is %dx%d, training saw %dx%d: resizing every frame", key, width, height, camera.width, camera.height)
        return to_trained_size(frames, camera.width, camera.height)

    def __repr__(self) -> str:
        return f"ResizeFrames({', '.join(f'{key}: {camera.width}x{camera.height}' for key, camera in self._cameras.items())})"


class EncodePrompts:
    """Instructions -> ids (B, S) padded on the right, lengths (B,), places of the image tokens (V,)."""

    def __init__(self, prompts: PromptEncoder, picture_tokens: Callable[[CheckedObservation], int] | None = None) -> None:
        """picture_tokens: of one picture, where the frames decide that."""
        self._prompts, self._picture_tokens = prompts, picture_tokens

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]:
        tokens = self._picture_tokens and self._picture_tokens(observation)
        encoded = [self._prompts(instruction, observation.brackets, tokens) for instruction in observation.instructions]
        lengths = np.array([len(ids) for ids in encoded])
        padded = np.zeros((len(encoded), lengths.max()), dtype=np.int64)
        for row, ids in zip(padded, encoded, strict=True):
            row[: len(ids)] = ids
        # pictures precede the instruction: their places are the same for every item
        return {"input_ids": padded, "lengths": lengths, "image_positions": np.flatnonzero(encoded[0] == self._prompts.image_token_id)}

    def __repr__(self) -> str:
        return f"EncodePrompts(style={self._prompts.style!r})"


class NormaliseState:
    """State parts -> one normalised, padded vector."""

    def __init__(self, state: StateTransform) -> None:
        self._state = state

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]:
        return {"state": self._state(observation.state)}

    def __repr__(self) -> str:
        return f"NormaliseState({self._state.modes})"


class Processor:
    """Built, and so checked, before weights are read. `transforms`: what happens to an observation, in order."""

    name = "n1.5"

    def __init__(self, checkpoint: Checkpoint, metadata: EmbodimentMetadata, config: DataConfig, prompts: PromptEncoder) -> None:
        """Raises ConfigError where the data configuration does not fit the checkpoint."""
        head = checkpoint.config.head
        check_trained_cameras(config, metadata.cameras)
        self.network, self.embodiment, self.data_config, self.prompts = checkpoint.config, metadata, config, prompts
        self.state, self.action = StateTransform(config, metadata, head.state_dim), ActionTransform(config, metadata, head.action_dim)
        cameras = {key: metadata.cameras[key] for key in config.video_keys}
        self._to_pixels = functools.partial(pixel_values, image_size=self.network.vision.image_size)
        self.transforms: list[Transform] = [ResizeFrames(cameras), EncodePrompts(prompts), NormaliseState(self.state)]

    def modality_config(self) -> dict[str, ModalityConfig]:
        """As `Policy.get_modality_config`."""
        return self.data_config.modality_config()

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """Trained horizon and padded action width."""
        return self.network.head.action_horizon, self.network.head.action_dim

    @property
    def max_horizon(self) -> int:
        """How many actions can be returned."""
        return self.chunk_shape[0]

    @property
    def default_horizon(self) -> int:
        """How many actions are returned unless others are asked for."""
        return min(self.max_horizon, len(self.data_config.action_indices))

    @property
    def max_denoising_steps(self) -> int:
        return min(_MAX_DENOISING_STEPS, self.network.head.timestep_buckets)

    @property
    def metadata(self) -> PolicyMetadata:
        return policy_metadata_of(self.embodiment, self.data_config, self.state.widths, self.action.widths, self.chunk_shape[0])

    def describe(self) -> list[str]:
        """What is done with an observation and is not the same for all checkpoints, for a line before the start."""
        return []

    def expect_cameras(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """As `Policy.expect_cameras`. N1.5 resizes frames to the training videos' size."""

    def __call__(self, observation: Mapping[str, Any]) -> PolicyInputs:
        """Raises ObservationError."""
        checked = parse_observation(observation, self.data_config, self.state.widths)
        fields: dict[str, Any] = {}
        for transform in self.transforms:
            fields |= transform(checked)
        return PolicyInputs(**fields, to_pixels=self._to_pixels, batched=checked.batched)

    def known_rows(self, prefix: ActionPrefix | None, inputs: PolicyInputs) -> dict[str, np.ndarray]:
        """`action.<part>` -> float32 (B, L, D) of a prefix; empty when there is nothing to continue. Raises ObservationError."""
        return {} if prefix is None else parse_prefix(prefix, self.action.widths, inputs.batched, inputs.batch, self.max_horizon)

    def continuation(self, known: Mapping[str, np.ndarray], prefix: ActionPrefix, inputs: PolicyInputs) -> Continuation:
        """Normalised and padded, on the host. Dimensions beyond the arm's own carry no weight: nothing is known of them."""
        horizon, width = self.chunk_shape
        rows = torch.from_numpy(self.normalised(known, inputs))  # (B, L, widths together)
        actions, weights = torch.zeros(inputs.batch, horizon, width), torch.zeros(horizon, width)
        actions[:, : rows.shape[1], : rows.shape[2]] = rows
        weights[:, : rows.shape[2]] = prefix_weights(horizon, prefix.inference_delay, rows.shape[1])[:, None]
        return Continuation(actions, weights, prefix.method)

    def normalised(self, known: Mapping[str, np.ndarray], inputs: PolicyInputs) -> np.ndarray:
        """`action.<part>` (B, L, D) in joint units -> float32 (B, L, widths together)."""
        return self.action.normalised(known)

    def joint_targets(self, chunk: np.ndarray, inputs: PolicyInputs) -> dict[str, np.ndarray]:
        """Normalised actions (B, H, A) -> `action.<part>` float32 (B, H, D) in joint units."""
        return self.action(chunk)

    def unapplied(self, chunk: np.ndarray, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`joint_targets` of actions whose observation is not at hand."""
        return self.action(chunk)

    def example_observation(self, instruction: str) -> dict[str, Any]:
        """An observation of the right form: mid-grey pictures, joints in the middle of their range."""
        observation: dict[str, Any] = {self.data_config.language_key: [instruction]}
        for key in self.data_config.video_keys:
            camera = self.embodiment.cameras[key]
            observation[key] = np.full((1, camera.height, camera.width, 3), 127, dtype=np.uint8)
        for key in self.data_config.state_keys:
            statistics = self.embodiment.statistics[key]
            observation[key] = ((statistics["min"] + statistics["max"]) / 2)[None]
        return observation

    def reference_inputs(self, inputs: PolicyInputs, device: torch.device) -> dict[str, torch.Tensor]:
        """What the network reads, by the reference's names (transforms.reference_inputs)."""
        pixels, row = inputs.to(device, torch.float32).pixel_values, EMBODIMENT_ROWS[self.embodiment.tag]
        return reference_inputs(inputs.input_ids, inputs.lengths, pixels, inputs.state, self.state.network_width, row)
