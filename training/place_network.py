"""GR00T N1.5's action head before tokens that say where things are: the whole head as deployed, the towers that would look replaced by the truth.

Three tokens stand where the backbone's vision-language features stand: block, bowl and grip, each a linear map of its part of the scene vector. They
pass the head's own LayerNorm and self-attention, and the diffusion transformer attends to them; the joints enter through the state encoder.
Axis alphabet: B batch, S scene tokens (3), H horizon, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.config import ActionHeadConfig, TransformerConfig
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.model.action_head import ActionHead, Condition, StepTables
from gr00t_fast.robots.so100_sim.units import GRIPPER
from training.flow import flow_loss
from training.labels import HORIZON
from training.network import begin_quietly, initialise
from training.place_episodes import Episodes
from training.place_world import SCENE_PARTS
from training.run import Options, Run

_HEADS, _HEAD_DIM, _LAYERS, _FUTURE_TOKENS = 4, 32, 4, 4  # published: 32, 48, 16, 32
_JOINTS = len(SO100_JOINTS)


def head_config() -> ActionHeadConfig:
    """Published but for the sizes: 32 padded actions, 64 padded state values, 16 actions in a chunk, 1000 times."""
    width = _HEADS * _HEAD_DIM
    return ActionHeadConfig(
        action_dim=32,
        state_dim=64,
        action_horizon=HORIZON,
        hidden_size=width,
        future_tokens=_FUTURE_TOKENS,
        max_positions=HORIZON,
        embodiments=32,
        denoising_steps=4,
        timestep_buckets=1000,
        output_dim=width,
        use_vlln=True,
        dit=TransformerConfig(_LAYERS, _HEADS, _HEAD_DIM),
        vl_attention=TransformerConfig(1, _HEADS, _HEAD_DIM),
    )


class SceneTokens(nn.Module):
    """Scene vector (B, SCENE_WIDTH), normalised -> tokens (B, S, D). The learned part of each says which it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kinds = nn.Embedding(len(SCENE_PARTS), width)
        self.parts = nn.ModuleList(nn.Linear(part.stop - part.start, width, bias=False) for part in SCENE_PARTS.values())

    def forward(self, scene: Tensor) -> Tensor:
        tokens = [linear(scene[:, part]) for linear, part in zip(self.parts, SCENE_PARTS.values(), strict=True)]
        return torch.stack(tokens, 1) + self.kinds.weight  # (B, S, D)


class PlaceNetwork(nn.Module):
    """Trainable, fp32, with first weights from `seed`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        config = head_config()
        self.head = ActionHead(config, config.dit.width)
        self.tokens = SceneTokens(config.dit.width)
        initialise(self, torch.Generator().manual_seed(seed))
        begin_quietly(self.head)

    def condition(self, joints: Tensor, scene: Tensor) -> Condition:
        """joints (B, 6) and scene (B, SCENE_WIDTH), both normalised -> what the head's velocity is conditioned on."""
        state = F.pad(joints, (0, self.head.config.state_dim - joints.shape[-1]))
        return self.head.condition(self.head.refine(self.tokens(scene)), state)

    def forward(self, joints: Tensor, scene: Tensor, noise: Tensor, tables: StepTables) -> Tensor:
        """noise (B, H, 32) -> normalised actions (B, H, 6)."""
        return self.head.denoise(noise, self.condition(joints, scene), tables)[..., :_JOINTS]


@dataclass(frozen=True)
class Scaling:
    """Smallest and largest values in the training data; -1 to 1 for the network, as the policy normalises. Each (width,)."""

    joints: np.ndarray
    scene: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, episodes: Episodes) -> Scaling:
        columns = (getattr(episodes, field.name) for field in fields(cls))
        return cls(*(np.stack((values.min(0), values.max(0))).astype(np.float64) for values in columns))

    def normalised(self, values: np.ndarray, of: str) -> Tensor:
        """float32 (..., width); a value that never changes becomes 0."""
        low, high = getattr(self, of)
        span = np.where(high > low, high - low, 1.0)
        return torch.from_numpy(np.where(high > low, 2 * (values - low) / span - 1, 0.0).astype(np.float32))

    def targets_deg(self, actions: Tensor) -> np.ndarray:
        """Normalised actions (..., 6) -> degrees and per cent."""
        low, high = self.targets
        return (actions.double().numpy() + 1) / 2 * (high - low) + low


class PlaceRun(Run):
    """See Run."""

    def __init__(self, episodes: Episodes, options: Options) -> None:
        self.network, self.scaling, self._episodes = PlaceNetwork(options.seed), Scaling.of(episodes), episodes
        super().__init__({"network": self.network}, len(episodes), options, torch.device("cpu"))

    def losses(self, rows: np.ndarray, generator: torch.Generator) -> dict[str, tuple[Tensor, float]]:
        return {"flow": (self._flow(self._episodes, rows, generator), 1.0)}

    def _flow(self, episodes: Episodes, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        joints, scene, actions = self._tensors(episodes, rows)
        return flow_loss(self.network.head, self.network.condition(joints, scene), actions, self.options.draws, generator)

    def _tensors(self, episodes: Episodes, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        normalised = self.scaling.normalised
        chunks = normalised(episodes.chunks(rows), "targets")
        return normalised(episodes.joints[rows], "joints"), normalised(episodes.scene[rows], "scene"), chunks

    @torch.no_grad()
    def check(self, held_out: Episodes, steps: int = 4, rows: int = 500) -> dict[str, float]:
        """On layouts that training does not see: the loss, and how far denoised actions are from the expert's, in degrees (body joints)."""
        generator = torch.Generator().manual_seed(1)
        chosen = np.linspace(0, len(held_out) - 1, min(rows, len(held_out))).astype(int)
        flow = self._flow(held_out, chosen, generator)
        joints, scene, _ = self._tensors(held_out, chosen)
        noise = torch.randn((len(chosen), HORIZON, self.network.head.config.action_dim), generator=generator)
        actions = self.scaling.targets_deg(self.network(joints, scene, noise, self.network.head.step_tables(steps)))
        error = np.abs(actions - held_out.chunks(chosen))[..., :GRIPPER].mean()
        return {"held_out_flow": flow.item(), "action_error_deg": float(error)}
