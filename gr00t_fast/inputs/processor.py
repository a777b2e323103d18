"""From an observation to what goes into an engine, and from an engine's actions to joint targets: all that a network needs around it.

Axis alphabet: B batch, T times, C images, S prompt tokens, V image tokens, H horizon, D joint values of a part, A padded action width, P padded state
width, L rows of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.base.contracts import ActionPrefix
from gr00t_fast.base.errors import ObservationError
from gr00t_fast.inputs.embodiment import Embodiment
from gr00t_fast.inputs.images import ImageTransform
from gr00t_fast.inputs.observation import CheckedObservation, parse_observation, parse_prefix
from gr00t_fast.inputs.prompt import PromptEncoder
from gr00t_fast.inputs.transforms import ActionTransform, StateTransform
from gr00t_fast.model import ModelInputs


@dataclass(frozen=True)
class PolicyInputs:
    """One batch on the host, checked and transformed; no tensor is made yet.

    frames: one uint8 (B, H, W, 3) per image, of the size that the network's pixels are made from; input_ids int64 (B, S), padded on the right;
    lengths int64 (B,); image_positions int64 (V,) where they are the same in every prompt, else (B, V), because images come behind texts of unequal
    length; state float32 (B, P), normalised. to_pixels: what makes the network's pixels, fp32 (B, 3, h, w) in [-1, 1], of frames on their device.
    batched: whether the observation was. joined: whether it was in lerobot's form, and one `action` is the answer. raw_state: `state.<part>` (B, T,
    D) as observed, which relative actions count from. camera_size: width and height of the first camera's frames, where they decide the size of the
    images.
    """

    frames: Sequence[np.ndarray]
    input_ids: np.ndarray
    lengths: np.ndarray
    image_positions: np.ndarray
    state: np.ndarray
    to_pixels: Callable[[Tensor], Tensor]
    batched: bool = True
    joined: bool = False
    raw_state: Mapping[str, np.ndarray] = field(default_factory=dict)
    camera_size: tuple[int, int] | None = None

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def padded(self) -> bool:
        return bool((self.lengths != self.input_ids.shape[1]).any())

    def item(self, index: int) -> PolicyInputs:
        """One of the batch alone, its prompt without padding."""
        one, tokens = slice(index, index + 1), int(self.lengths[index])
        frames = [frames[one] for frames in self.frames]
        raw_state = {key: values[one] for key, values in self.raw_state.items()}
        positions = self.image_positions if self.image_positions.ndim == 1 else self.image_positions[index]
        given: dict[str, Any] = {"input_ids": self.input_ids[one, :tokens], "lengths": self.lengths[one], "state": self.state[one]}
        given |= {"raw_state": raw_state, "image_positions": positions}
        return replace(self, frames=frames, **given)

    @staticmethod
    def together(parts: Sequence[PolicyInputs]) -> PolicyInputs:
        """Several as one batch, in their order. Raises ObservationError for pictures that differ in size or number."""
        first = parts[0]
        forms = [([view.shape[1:] for view in part.frames], part.camera_size, part.image_positions.shape[-1]) for part in parts]
        if any(form != forms[0] for form in forms):
            raise ObservationError("observations of one batch: expected pictures of the same number and size in each, got different ones.")
        places = [np.broadcast_to(part.image_positions, (part.batch, part.image_positions.shape[-1])) for part in parts]
        longest = max(part.input_ids.shape[1] for part in parts)
        return replace(
            first,
            frames=[np.concatenate(views) for views in zip(*(part.frames for part in parts), strict=True)],
            input_ids=np.concatenate([np.pad(part.input_ids, ((0, 0), (0, longest - part.input_ids.shape[1]))) for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            image_positions=_shared(np.concatenate(places)),
            state=np.concatenate([part.state for part in parts]),
            raw_state={key: np.concatenate([part.raw_state[key] for part in parts]) for key in first.raw_state},
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> ModelInputs:
        """The network's tensors. Bytes are uploaded; pixels are made of them on the device."""
        # copied only where a view is read-only or strided: torch warns of memory that it could but must not write
        frames = (torch.from_numpy(np.require(each, requirements=("C", "W"))).to(device) for each in self.frames)
        pixels = torch.stack([self.to_pixels(each) for each in frames], dim=1)  # (B, C, 3, h, w)
        mask = torch.from_numpy(np.arange(self.input_ids.shape[1]) < self.lengths[:, None]).to(device) if self.padded else None
        ids, positions, state = (torch.from_numpy(each).to(device) for each in (self.input_ids, self.image_positions, self.state))
        return ModelInputs(pixels.to(dtype), ids, positions, state.to(dtype), mask)


class Transform(Protocol):
    """One step of the pre-processing: fields of PolicyInputs from a checked observation."""

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]: ...


class EncodePrompts:
    """Instructions -> ids (B, S) padded on the right, lengths (B,), places of the image tokens (V,) or (B, V)."""

    def __init__(self, prompts: PromptEncoder, image_tokens: Callable[[CheckedObservation], int]) -> None:
        """image_tokens: of one image."""
        self._prompts, self._image_tokens = prompts, image_tokens

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]:
        tokens = self._image_tokens(observation)
        encoded = [self._prompts(instruction, tokens, observation.brackets) for instruction in observation.instructions]
        lengths = np.array([len(ids) for ids in encoded])
        padded = np.zeros((len(encoded), lengths.max()), dtype=np.int64)
        for row, ids in zip(padded, encoded, strict=True):
            row[: len(ids)] = ids
        places = np.stack([np.flatnonzero(ids == self._prompts.image_token_id) for ids in encoded])
        return {"input_ids": padded, "lengths": lengths, "image_positions": _shared(places)}

    def __repr__(self) -> str:
        return f"EncodePrompts(style={self._prompts.style!r})"


def _shared(places: np.ndarray) -> np.ndarray:
    """(B, V) -> (V,) where all rows are equal, as where images precede the instruction."""
    return places[0] if (places == places[0]).all() else places


class NormaliseState:
    """State parts -> one normalised, padded vector."""

    def __init__(self, embodiment: Embodiment) -> None:
        self._modes = {part.key: part.mode for part in embodiment.state}
        self._state = StateTransform(embodiment)

    def __call__(self, observation: CheckedObservation) -> dict[str, Any]:
        return {"state": self._state(observation.state), "raw_state": observation.state}

    def __repr__(self) -> str:
        return f"NormaliseState({self._modes})"


class Processor:
    """Built, and so checked, before weights are read. `transforms`: what happens to an observation, in order."""

    def __init__(
        self,
        embodiment: Embodiment,
        images: ImageTransform,
        prompts: PromptEncoder,
        to_pixels: Callable[[Tensor], Tensor],
        chunk_shape: tuple[int, int],
    ) -> None:
        """to_pixels: as of PolicyInputs. chunk_shape: trained horizon and padded action width of the network."""
        self.embodiment, self.data_config, self.prompts, self.chunk_shape = embodiment, embodiment.data_config, prompts, chunk_shape
        self.transforms: list[Transform] = [images, EncodePrompts(prompts, images.tokens), NormaliseState(embodiment)]
        self.action = ActionTransform(embodiment)
        self._images, self._to_pixels = images, to_pixels

    def describe(self) -> list[str]:
        """What is done with an observation and is not the same for all checkpoints, for a line before the start."""
        letterbox, notes = self.embodiment.letterbox, [*self.embodiment.notes]
        if letterbox is None:
            return notes
        return [f"pictures {'padded to a square' if letterbox.pads else 'in the shape of the cameras'} ({letterbox.why})", *notes]

    def expect_cameras(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """As `Policy.expect_cameras`."""
        self._images.expect_cameras({f"video.{camera}": size for camera, size in sizes.items()})

    def __call__(self, observation: Mapping[str, Any]) -> PolicyInputs:
        """Raises ObservationError."""
        checked = parse_observation(observation, self.data_config, self.embodiment.state_widths)
        fields: dict[str, Any] = {}
        for transform in self.transforms:
            fields |= transform(checked)
        return PolicyInputs(**fields, to_pixels=self._to_pixels, batched=checked.batched, joined=checked.joined)

    def known_rows(self, prefix: ActionPrefix | None, inputs: PolicyInputs) -> dict[str, np.ndarray]:
        """`action.<part>` -> float32 (B, L, D) of a prefix; empty when there is nothing to continue. Raises ObservationError."""
        embodiment = self.embodiment
        return {} if prefix is None else parse_prefix(prefix, embodiment.action_widths, inputs.batched, inputs.batch, embodiment.trained_horizon)

    def example_observation(self, instruction: str) -> dict[str, Any]:
        """An observation of the right form: mid-grey pictures, joints in the middle of their range."""
        config = self.data_config
        observation: dict[str, Any] = {config.language_key: [instruction]}
        for key in config.video_keys:
            width, height = self._images.example_size(key)
            observation[key] = np.full((len(config.video_indices), height, width, 3), 127, dtype=np.uint8)
        for part in self.embodiment.state:
            middle = (part.statistics["min"] + part.statistics["max"]) / 2
            observation[part.key] = np.stack([middle] * len(config.state_indices))
        return observation


def left_padded(inputs: PolicyInputs, padding_id: int) -> tuple[Tensor, Tensor]:
    """Ids int64 (B, S) and mask (B, S) as references have them, padded on the left."""
    lengths, longest = inputs.lengths, inputs.input_ids.shape[1]
    padded = np.where(np.arange(longest) < lengths[:, None], inputs.input_ids, padding_id)
    ids = np.stack([np.roll(row, longest - length) for row, length in zip(padded, lengths, strict=True)])
    return torch.from_numpy(ids), torch.from_numpy((np.arange(longest) >= longest - lengths[:, None]).astype(np.int64))
