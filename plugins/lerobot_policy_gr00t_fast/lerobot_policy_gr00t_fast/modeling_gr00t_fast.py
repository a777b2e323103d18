"""lerobot's policy interface over `gr00t_fast.load_policy`.

lerobot's batch in: `observation.images.<camera>` float (1, 3, height, width) in 0..1, `observation.state` (1, J), `task`. Actions out in joint
units, in the robot's joint order. Axis alphabet: H horizon, J joints, L rows of a chunk that are left over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from gr00t_fast import load_policy
from gr00t_fast.base.contracts import SO100_JOINTS, ActionPrefix, Observation
from gr00t_fast.base.errors import ConfigError, ObservationError, PreflightError, UnsafeActionError
from gr00t_fast.control.binding import RobotBinding, resolve_camera_map
from lerobot_policy_gr00t_fast.configuration_gr00t_fast import Gr00tFastConfig

_IMAGES, _STATE = "observation.images.", "observation.state"


class Gr00tFastPolicy(PreTrainedPolicy):
    """A GR00T checkpoint that runs in lerobot's process. It has no weights of its own that lerobot could load, move or save."""

    config_class = Gr00tFastConfig
    name = "gr00t_fast"

    def __init__(self, config: Gr00tFastConfig, dataset_meta: Any = None, **_: Any) -> None:
        """Reads the weights and pays first-call costs, before lerobot connects the robot. `dataset_meta`: of the data set that is recorded, whose
        joints are compared. Raises what `load_policy` raises, and ConfigError or PreflightError for cameras or joints that do not fit."""
        super().__init__(config)
        if not config.model_path:
            raise ConfigError("--policy.model_path is required: a GR00T checkpoint, as a directory or a hub id.")
        _check_joints(dataset_meta)
        self.policy = load_policy(
            config.model_path,
            embodiment_tag=config.embodiment_tag,
            data_config=config.data_config,
            denoising_steps=config.denoising_steps,
            action_horizon=config.action_horizon,
            device=config.device or "auto",
            precision=config.precision,
            engine=config.engine,
            engine_path=config.engine_path,
            processor_path=config.processor_path,
            prompt_style=config.prompt_style,
            seed=config.seed,
            revision=config.revision,
            letterbox=config.letterbox,
        )
        self._binding: RobotBinding | None = None
        if config.input_features:  # lerobot-record knows them by now
            sizes = {key.removeprefix(_IMAGES): feature.shape for key, feature in config.image_features.items()}  # (3, H, W)
            self._binding = self._bind(sizes)
            names = resolve_camera_map(sizes, self.policy.metadata.resolutions, config.camera_map)
            self.policy.expect_cameras({names[camera]: (shape[2], shape[1]) for camera, shape in sizes.items() if camera in names})
        self._queue: deque[Tensor] = deque()
        self._calls = 0  # observations seen
        self.policy.warm_up()

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: Any = None, *, config: Gr00tFastConfig | None = None, **kwargs: Any) -> Gr00tFastPolicy:
        """The policy of `config`. Raises ConfigError for --policy.path: the weights are those of `model_path`."""
        if pretrained_name_or_path is not None or config is None:
            raise ConfigError(
                f"--policy.path={pretrained_name_or_path} is not for this policy: use --policy.type=gr00t_fast --policy.model_path=CHECKPOINT."
            )
        return cls(config, dataset_meta=kwargs.get("dataset_meta")).eval()

    def _save_pretrained(self, save_directory: Path, **_: Any) -> None:
        self.config._save_pretrained(save_directory)  # the weights stay where `model_path` says

    def reset(self) -> None:
        """Begin an episode: no action of the one before is played, what was seen is forgotten, and a seeded policy repeats its noise."""
        self._queue.clear()
        if self._binding is not None:
            self._binding.reset()
        self.policy.reset()

    def supports_rtc(self) -> bool:
        """Whether a chunk can continue the one before (lerobot asks before --inference.type=rtc). Not of a policy that reads earlier observations:
        lerobot shows those between two chunks to `select_action` only."""
        return self.policy.continues and not self._reads_earlier

    def init_rtc_processor(self) -> None:
        """lerobot calls this where chunks will be continued: pay the first-call costs of that, too."""
        self.policy.warm_up(continuing=True)

    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any) -> Tensor:
        """(1, J) the next action of the chunk; infers when it is used up. A policy that reads earlier observations gets those of earlier calls, one
        call being one step of its training data. Raises as `predict_action_chunk`."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch, noise=noise).unbind(dim=1))
        elif self._reads_earlier:
            self._seen(batch)
        return self._queue.popleft()

    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
        noise: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """One inference -> float32 (1, H, J) on the CPU.

        prev_chunk_left_over: (L, J) or (1, L, J) as this method gave them, row 0 due at the observation's tick; at most `execution_horizon` of them
        count. inference_delay: so many of them will have been executed when this chunk arrives. noise: (1, trained horizon, padded width).
        Raises ObservationError for a batch of several or of another form, UnsafeActionError for NaN or infinity.
        """
        observation = self._seen(batch)
        built = self._binding.policy_observation(observation, _instruction(batch))
        prefix = self._prefix(prev_chunk_left_over, inference_delay or 0, execution_horizon)
        options = {} if prefix is None else {"prefix": prefix}
        # lerobot may call within inference_mode, in which compiled stages would be compiled once more, and within autocast, for its own policies
        with torch.inference_mode(False), torch.autocast(self.policy.device.type, enabled=False):
            actions = self.policy.get_action(built, noise=noise, **options)
        targets = self._binding.action_targets(actions)  # (H, J)
        if not np.isfinite(targets).all():
            raise UnsafeActionError("the network answered NaN or infinity; nothing was sent. Try --policy.precision=fp32, and check the camera.")
        return torch.from_numpy(targets)[None]  # (1, H, J)

    def forward(self, batch: dict[str, Any]) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError("gr00t_fast runs policies and does not train them.")

    def get_optim_params(self) -> dict[str, Any]:
        """Raises NotImplementedError."""
        raise NotImplementedError("gr00t_fast runs policies and does not train them.")

    @property
    def _reads_earlier(self) -> bool:
        modalities = self.policy.get_modality_config()
        return any(modalities[name].delta_indices != [0] for name in ("video", "state"))

    def _seen(self, batch: Mapping[str, Any]) -> Observation:
        """The observation, remembered for the calls to come. Its time is counted in calls."""
        self._calls += 1
        observation = _observation(batch, float(self._calls))
        if self._binding is None:
            self._binding = self._bind(observation.frames)
        self._binding.remember(observation)
        return observation

    def _bind(self, cameras: Any) -> RobotBinding:
        metadata = self.policy.metadata
        try:
            camera_map = resolve_camera_map(list(cameras), metadata.resolutions, self.config.camera_map)
        except PreflightError as error:
            raise PreflightError(str(error).replace("--camera_map", "--policy.camera_map")) from error
        modalities = self.policy.get_modality_config()
        return RobotBinding(modalities, metadata.state_widths, metadata.action_widths, SO100_JOINTS, camera_map, fps=1.0)  # a call is a step

    def _prefix(self, left_over: Tensor | None, inference_delay: int, execution_horizon: int | None) -> ActionPrefix | None:
        """lerobot fills up a short remainder with rows of zeros; they are not actions, and are left out."""
        if left_over is None:
            return None
        rows = left_over.reshape(-1, left_over.shape[-1])[:execution_horizon].float().numpy(force=True)  # (L, J)
        planned = np.flatnonzero(rows.any(axis=1))
        rows = rows[: planned[-1] + 1] if len(planned) else rows[:0]
        if not len(rows):
            return None
        return ActionPrefix(self._binding.action_parts(rows), min(max(inference_delay, 0), len(rows)))


def _check_joints(dataset_meta: Any) -> None:
    names = None if dataset_meta is None else dataset_meta.features["action"]["names"]
    if names is not None and [str(name).removesuffix(".pos") for name in names] != list(SO100_JOINTS):
        raise ConfigError(f"gr00t_fast drives an SO-100 or SO-101 with the joints {', '.join(SO100_JOINTS)}; this robot has {', '.join(names)}.")


def _observation(batch: Mapping[str, Any], time_s: float) -> Observation:
    """Pictures as the bytes that they were: lerobot divides them by 255, and rounding takes that back exactly."""
    if _STATE not in batch:
        raise ObservationError(f"the batch has no {_STATE}; it has {', '.join(batch)}.")
    frames = {key.removeprefix(_IMAGES): value for key, value in batch.items() if key.startswith(_IMAGES)}
    several = {key: tuple(value.shape) for key, value in {_STATE: batch[_STATE], **frames}.items() if value.shape[0] != 1}
    if several:
        raise ObservationError(f"gr00t_fast takes one observation at a time in lerobot's programs, got {several}.")
    pixels = {name: (value[0] * 255).round().to(torch.uint8).permute(1, 2, 0) for name, value in frames.items()}  # (height, width, 3)
    joints = batch[_STATE][0].numpy(force=True).astype(np.float64)  # (J,)
    return Observation(joints, {name: value.numpy(force=True) for name, value in pixels.items()}, time_s)


def _instruction(batch: Mapping[str, Any]) -> str:
    task = batch.get("task", "")
    return task if isinstance(task, str) else task[0]
