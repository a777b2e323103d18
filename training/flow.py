"""The training loss: flow matching as GR00T N1.5 is trained, on the model's own modules.

The model's tables hold one time for all items of a batch, because inference needs no more. Training draws a time per item; the functions here make
tables with an item axis, which `ActionHead.velocity` takes as they are. tests/test_training.py compares the two.
Axis alphabet: B batch, K draws of noise and time per observation, V image tokens, H horizon, A padded action width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.model import Gr00tN1d5, ModelInputs
from gr00t_fast.model.action_head import ActionHead, Condition
from gr00t_fast.model.dit import DiT

# Of the published config.json (noise_beta_alpha, noise_beta_beta, noise_s): more often near the noise than near the action.
_BETA_ALPHA, _BETA_BETA, _NOISE_S = 1.5, 1.0, 0.999
_PATCH_SIGMA = 0.6  # width in patches of the target of `BlockFinder`


def item_tables(head: ActionHead, buckets: Tensor) -> tuple[Tensor, Tensor]:
    """Buckets int64 (B,) -> tau (B, 1, D) and modulation (blocks + 1, 2, B, 1, D): the model's own tables with an item axis."""
    return head.action_encoder.tau(buckets)[:, None], _item_modulation(head.dit, buckets)


def _item_modulation(dit: DiT, buckets: Tensor) -> Tensor:
    time = F.silu(dit.time(buckets))  # (B, D)
    pairs = [block.ada_norm(time).chunk(2, dim=-1) for block in dit.blocks]  # scale, shift
    pairs.append(dit.out_modulation(time).chunk(2, dim=-1)[::-1])  # stored as shift, scale: the other order
    rows = [torch.stack((1 + scale, shift)) for scale, shift in pairs]  # (2, B, D) each
    return torch.stack(rows).unsqueeze(3)  # (blocks + 1, 2, B, 1, D)


def repeat_items(condition: Condition, times: int) -> Condition:
    """Each item `times` times: what an observation costs is paid once for several draws of noise and time."""
    cross = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in condition.cross]
    return Condition(condition.prefix.repeat_interleave(times, 0), cross, None)


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """(count,) in [0, 1): (s - b) / s with b from Beta(1.5, 1), drawn by inverting its distribution b**1.5."""
    b = torch.rand(count, generator=generator) ** (1 / _BETA_ALPHA)
    return ((_NOISE_S - b) / _NOISE_S).clamp(min=0.0)


class BlockFinder(nn.Module):
    """Where is the block? A read-out of the refined image tokens, for training only: without it so small a network seldom starts to look."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.score = nn.Linear(width, 1)

    def loss(self, image_tokens: Tensor, block: Tensor) -> Tensor:
        """image_tokens (B, V, D), block (B, 2) in 0..1 from left and top -> mean cross-entropy with a bump over the patches at the block."""
        centres = (torch.arange(self.side, device=block.device) + 0.5) / self.side
        across, down = (-(((centres - block[:, axis, None]) * self.side / _PATCH_SIGMA) ** 2) / 2 for axis in (0, 1))  # (B, side) each
        target = (down[:, :, None] + across[:, None, :]).flatten(1).softmax(-1)  # (B, V), rows first
        return F.cross_entropy(self.score(image_tokens).squeeze(-1), target)


@dataclass(frozen=True)
class Batch:
    """inputs as the model takes them; actions (B, H, joints) normalised; block (B, 2); generator: of noise and times."""

    inputs: ModelInputs
    actions: Tensor
    block: Tensor
    generator: torch.Generator


def losses(model: Gr00tN1d5, finder: BlockFinder, batch: Batch, draws: int) -> tuple[Tensor, Tensor]:
    """Mean squared error of the velocity over the arm's own joints, and the block finder's loss."""
    inputs, head = batch.inputs, model.head
    features = head.refine(model.encode_language(inputs, model.encode_vision(inputs.pixel_values)))  # (B, S, D)
    finding = finder.loss(features[:, inputs.image_positions], batch.block)
    return flow_loss(head, head.condition(features, inputs.state), batch.actions, draws, batch.generator), finding


def flow_loss(head: ActionHead, condition: Condition, actions: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity over the joints that `actions` (B, H, joints) has, at `draws` noises and times per item."""
    condition = repeat_items(condition, draws)
    actions = actions.repeat_interleave(draws, 0)  # (B*K, H, joints)
    noise = torch.randn(actions.shape, generator=generator).to(actions)
    times = draw_times(len(actions), generator).to(actions)
    noisy = torch.lerp(noise, actions, times[:, None, None])
    padded = F.pad(noisy, (0, head.config.action_dim - noisy.shape[-1]))  # zeros: see network.begin_quietly
    buckets = (times * head.config.timestep_buckets).long()
    velocity = head.velocity(padded, condition, *item_tables(head, buckets))[..., : actions.shape[-1]]
    return F.mse_loss(velocity, actions - noise)
