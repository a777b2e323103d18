"""A flow whose chunks are smooth and whose velocity is known exactly: what a trained policy's looks like, without a trained policy.

Actions of each dimension are drawn from a Gaussian process over the rows of a chunk (squared-exponential covariance S plus a little white noise).
Along `a_t = (1 - t) noise + t actions` everything stays Gaussian, so the best velocity `E[actions - noise | a_t]` is linear in a_t:
`(t S - (1 - t) I) (t² S + (1 - t)² I)⁻¹ a_t`. Two chunks know nothing of each other, as two samples of a multimodal policy.

Axis alphabet: B batch, H horizon, A padded action width.
"""

from __future__ import annotations

import torch
from torch import Tensor

LENGTH_ROWS = 6.0  # over which actions stay similar: a fifth of a second at 30 Hz
ROUGHNESS = 0.01  # deviation of the white part; the smooth part has 0.5 (joints then use about half of their range)
DEVIATION = 0.5


class SmoothFlow:
    """Callable as `velocity(actions (B, H, A), step)` for `steps` Euler steps."""

    def __init__(self, horizon: int, steps: int) -> None:
        rows = torch.arange(horizon, dtype=torch.float64)
        self.covariance = DEVIATION**2 * torch.exp(-0.5 * ((rows[:, None] - rows) / LENGTH_ROWS) ** 2) + ROUGHNESS**2 * torch.eye(horizon)
        self.steps = steps
        self._matrices = [self._matrix(step / steps) for step in range(steps)]

    def _matrix(self, t: float) -> Tensor:
        s, one = self.covariance, torch.eye(len(self.covariance), dtype=torch.float64)
        return ((t * s - (1 - t) * one) @ torch.linalg.inv(t**2 * s + (1 - t) ** 2 * one)).float()

    def __call__(self, actions: Tensor, step: int) -> Tensor:
        return self._matrices[step] @ actions
