"""`--policy.*` flags: the arguments of `gr00t_fast.load_policy`, by its names and with its defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig

_INFERENCE_ONLY = "gr00t_fast runs policies and does not train them."


@PreTrainedConfig.register_subclass("gr00t_fast")
@dataclass
class Gr00tFastConfig(PreTrainedConfig):
    """`device` is a field of lerobot's own class, which puts the best one there is in place of none."""

    model_path: str = ""  # checkpoint directory or hub id; required
    embodiment_tag: str = "new_embodiment"
    data_config: str | None = None  # of N1.5, default so100; an N1.7 checkpoint says it itself
    denoising_steps: int | None = None
    action_horizon: int | None = None  # so many actions of a chunk are played before the next inference
    precision: str = "auto"
    engine: str = "auto"
    engine_path: str | None = None
    processor_path: str | None = None
    prompt_style: str = "plain"
    seed: int | None = None
    revision: str | None = None
    letterbox: str = "auto"  # of N1.7: always or never, where its files cannot tell whether it was trained on padded pictures
    camera_map: dict[str, str] = field(default_factory=dict)  # {robot camera: policy camera}

    def validate_features(self) -> None:
        """Nothing to do: the policy itself compares cameras and joints with what the checkpoint was trained on."""

    def get_optimizer_preset(self) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(_INFERENCE_ONLY)

    def get_scheduler_preset(self) -> None:
        """No training, no schedule."""

    @property
    def observation_delta_indices(self) -> None:
        """The present observation only."""

    @property
    def action_delta_indices(self) -> list[int]:
        """What a data set for training this policy would hold per frame."""
        return list(range(self.action_horizon or 16))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
