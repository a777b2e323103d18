"""All that GR00T N1.7 needs around its network, as its checkpoint's processor_config.json, statistics.json and embodiment_id.json say it.

Axis alphabet: B batch, T times, C pictures (times x cameras, time-major), H horizon, D joint values of a part, A padded action width, L rows of a
prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gr00t_fast.checkpoint import Checkpoint, EmbodimentN1d7
from gr00t_fast.checkpoint.metadata import data_config_of, policy_metadata_of_n1d7
from gr00t_fast.contracts import ModalityConfig, PolicyMetadata
from gr00t_fast.engine import PolicyInputs
from gr00t_fast.errors import ObservationError
from gr00t_fast.inputs.images import Size, accepted_size, picture, view_size
from gr00t_fast.inputs.observation import CheckedObservation, parse_observation
from gr00t_fast.inputs.prompt import PromptEncoderN1d7, find_tokenizer
from gr00t_fast.inputs.transforms import ActionTransformN1d7, StateTransformN1d7
from gr00t_fast.model.vision import patches_of, picture_values
from gr00t_fast.processor import EncodePrompts, NormaliseState, Processor

EXAMPLE_CAMERA = (640, 480)  # width and height; a checkpoint does not say what its cameras delivered
_MAX_ASPECT = 8  # of a frame that is not padded: the longer side by the shorter; a chosen limit, the widest cameras have less than 4
_PADDING_ID = 151643  # Qwen's <|endoftext|>


class MakePictures:
    """Frames, one (B, T, H, W, 3) for each camera -> C pictures (B, h, w, 3), all of one size, which that of the frames decides."""

    def __init__(self, embodiment: EmbodimentN1d7, multiple: int) -> None:
        self._embodiment, self._multiple = embodiment, multiple

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]:
        cameras = [observation.frames[f"video.{camera}"] for camera in self._embodiment.cameras]
        times = range(len(self._embodiment.frame_offsets))
        self._size_in(observation)  # refuses what does not go together before it is resized
        height, width = cameras[0].shape[2:4]
        pictures = [np.stack([self._picture(item[time]) for item in frames]) for time in times for frames in cameras]
        return {"frames": pictures, "camera_size": (width, height)}

    def tokens(self, observation: CheckedObservation) -> int:
        """Of one picture."""
        height, width = self._size_in(observation)
        return (height // self._multiple) * (width // self._multiple)

    def _size_in(self, observation: CheckedObservation) -> Size:
        return self.size({key.removeprefix("video."): frames.shape[2:4] for key, frames in observation.frames.items()})

    def size(self, frames: Mapping[str, Size]) -> Size:
        """(h, w) of all pictures, from each camera's (height, width). Raises ObservationError for views that the reference cannot stack."""
        settings, told = self._embodiment.pictures, ", ".join(f"{camera} {width}x{height}" for camera, (height, width) in frames.items())
        if not settings.letterbox and settings.albumentations and any(max(size) > _MAX_ASPECT * min(size) for size in frames.values()):
            raise ObservationError(f"cameras: expected pictures at most {_MAX_ASPECT} times as long as wide, got {told}.")
        views = {camera: view_size(*size, settings) for camera, size in frames.items()}
        if len(set(views.values())) > 1:
            made = ", ".join(f"{camera} {width}x{height}" for camera, (height, width) in views.items())
            raise ObservationError(
                f"cameras: expected views of one size once they are resized, got {made} of {told}: this checkpoint's pictures are not padded to a "
                "square, and NVIDIA's code refuses these as well. Set all cameras to one shape (all 640x480, or all 1280x720 and 640x360), as in the "
                "recordings; or, if it was trained on padded pictures, say --letterbox=always."
            )
        return accepted_size(*next(iter(views.values())), self._multiple)

    def _picture(self, frame: np.ndarray) -> np.ndarray:
        return picture(frame, self._embodiment.pictures, self._multiple)

    def __repr__(self) -> str:
        return f"MakePictures({self._embodiment.pictures})"


class ProcessorN1d7(Processor):
    """As Processor. An observation brings the frames and states of all times that the network reads."""

    name = "n1.7"

    def __init__(self, checkpoint: Checkpoint, embodiment: EmbodimentN1d7, prompts: PromptEncoderN1d7) -> None:
        self.network, self.embodiment, self.prompts = checkpoint.config, embodiment, prompts
        self.data_config = data_config_of(embodiment)
        self.state, self.action = StateTransformN1d7(embodiment), ActionTransformN1d7(embodiment)
        self._pictures = MakePictures(embodiment, token_side(checkpoint))
        self.transforms = [self._pictures, EncodePrompts(prompts, self._pictures.tokens), NormaliseState(self.state)]
        self._camera_sizes = dict.fromkeys(embodiment.cameras, EXAMPLE_CAMERA)

    def modality_config(self) -> dict[str, ModalityConfig]:
        configs = super().modality_config()
        return {**configs, "action": replace(configs["action"], action_configs=self.embodiment.action_configs)}

    @property
    def max_horizon(self) -> int:
        return self.embodiment.action_steps

    @property
    def metadata(self) -> PolicyMetadata:
        return policy_metadata_of_n1d7(self.embodiment)

    def describe(self) -> list[str]:
        letterbox = self.embodiment.letterbox
        return [f"pictures {'padded to a square' if letterbox.pads else 'in the shape of the cameras'} ({letterbox.why})"]

    def expect_cameras(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        sizes = {**self._camera_sizes, **sizes}
        self._pictures.size({camera: (height, width) for camera, (width, height) in sizes.items()})
        self._camera_sizes = sizes

    def __call__(self, observation: Mapping[str, Any]) -> PolicyInputs:
        checked = self._checked(observation)
        fields: dict[str, Any] = {}
        for transform in self.transforms:
            fields |= transform(checked)
        return PolicyInputs(**fields, to_pixels=picture_values, batched=checked.batched, raw_state=checked.state)

    def _checked(self, observation: Mapping[str, Any]) -> CheckedObservation:
        """With an axis for time in all frames (B, T, H, W, 3) and states (B, T, D)."""
        checked = parse_observation(observation, self.data_config, self.state.widths)
        frames = {key: values if values.ndim == 5 else values[:, None] for key, values in checked.frames.items()}
        state = {key: values if values.ndim == 3 else values[:, None] for key, values in checked.state.items()}
        return replace(checked, frames=frames, state=state)

    def normalised(self, known: Mapping[str, np.ndarray], inputs: PolicyInputs) -> np.ndarray:
        return self.action.normalised(known, inputs.raw_state)

    def joint_targets(self, chunk: np.ndarray, inputs: PolicyInputs) -> dict[str, np.ndarray]:
        return self.action(chunk, inputs.raw_state)

    def unapplied(self, chunk: np.ndarray, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises ObservationError where actions are relative to a part that `state` lacks."""
        absent = sorted({f"state.{part.reference}" for part in self.embodiment.action if part.reference is not None} - state.keys())
        if absent:
            raise ObservationError(f"actions are relative to {', '.join(absent)}, which was not given; expected it under 'state'.")
        return self.action(chunk[:, : self.max_horizon], state)

    def example_observation(self, instruction: str) -> dict[str, Any]:
        embodiment = self.embodiment
        observation: dict[str, Any] = {embodiment.language_key: [instruction]}
        for camera in embodiment.cameras:
            width, height = self._camera_sizes[camera]
            observation[f"video.{camera}"] = np.full((len(embodiment.frame_offsets), height, width, 3), 127, dtype=np.uint8)
        for part in embodiment.state:
            statistics = embodiment.statistics[f"state.{part.name}"]
            observation[f"state.{part.name}"] = np.stack([(statistics["min"] + statistics["max"]) / 2] * len(embodiment.state_offsets))
        return observation

    def reference_inputs(self, inputs: PolicyInputs, device: torch.device) -> dict[str, torch.Tensor]:
        """input_ids (B, S) padded on the left and attention_mask, pixel_values (patches of all pictures, 1536), image_grid_thw (B x C, 3),
        state (B, T, P), embodiment_id (B,)."""
        ids, lengths, longest = inputs.input_ids, inputs.lengths, inputs.input_ids.shape[1]
        padded = np.where(np.arange(longest) < lengths[:, None], ids, _PADDING_ID)
        left = np.stack([np.roll(row, longest - length) for row, length in zip(padded, lengths, strict=True)])
        pixels = inputs.to(device, torch.float32).pixel_values.flatten(0, 1)  # (B C, 3, h, w)
        patch = self.network.vision.patch_size
        grid = [1, pixels.shape[-2] // patch, pixels.shape[-1] // patch]
        return {
            "input_ids": torch.from_numpy(left),
            "attention_mask": torch.from_numpy((np.arange(longest) >= longest - lengths[:, None]).astype(np.int64)),
            "pixel_values": patches_of(pixels, self.network.vision).flatten(0, 1),
            "image_grid_thw": torch.tensor([grid] * len(pixels)),
            "state": torch.from_numpy(inputs.state).reshape(inputs.batch, len(self.embodiment.state_offsets), -1),
            "embodiment_id": torch.full((inputs.batch,), self.embodiment.row),
        }


def token_side(checkpoint: Checkpoint) -> int:
    """Pixels per side of what becomes one token."""
    return checkpoint.config.vision.patch_size * checkpoint.config.vision.merge_size


def processor_n1d7(checkpoint: Checkpoint, embodiment_tag: str, processor_path: Any, prompt_style: str) -> ProcessorN1d7:
    """Read what is around the network. Raises ConfigError and CheckpointError."""
    embodiment, tokenizer = checkpoint.embodiment_n1d7(embodiment_tag), find_tokenizer(processor_path, checkpoint.base, n1d7=True)
    image_token, formalize = checkpoint.config.language.image_token_id, embodiment.formalize_language
    prompts = PromptEncoderN1d7(tokenizer, embodiment.pictures_per_observation, image_token, prompt_style, formalize)
    return ProcessorN1d7(checkpoint, embodiment, prompts)
