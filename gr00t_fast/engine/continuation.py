r"""Make a chunk that continues the one before: real-time chunking, as other ways to integrate the same velocity.

GR00T N1.5's flow runs from noise at t = 0 to actions at t = 1 along `a_t = (1 - t) noise + t actions`, and the network gives the velocity
`v(a_t, t) = E[actions - noise | a_t]`. That is the direction of Black et al. 2025 (arXiv 2506.07339, tau = t), so their formulas hold without
a change of sign. Derived once more:

* The network's guess of the end is `â = a_t + (1 - t) v`.
* `noise = (a_t - t actions) / (1 - t)` and the score of p_t is `-E[noise | a_t] / (1 - t)`; eliminating the expectations gives
  `v = (a_t + (1 - t) score) / t`. Conditioning on known actions Y adds `grad log p(Y | a_t)` to the score, hence `(1 - t) / t` of it to v.
* With `p(Y | a_t)` taken as normal around â, of variance `r² = (1 - t)² / (t² + (1 - t)²)` (the posterior variance of an action of unit
  variance), `grad log p(Y | a_t) = (W (Y - â))ᵀ (d â / d a_t) / r²`: a vector-Jacobian product through the network. W weights the rows.
* Together: `v + w(t) (W (Y - â))ᵀ (d â / d a_t)` with `w = (1 - t) / (t r²) = (t² + (1 - t)²) / (t (1 - t))`, infinite at t = 0 and clipped.

The clip is the paper's beta = 5, and never above the number of Euler steps N: a step moves the end by `w / N` of the gap (where d â / d a_t is
near the identity), so a larger weight overshoots. At the paper's N = 5 the two are the same.

The cheaper way needs no derivative: at every step the known rows are put back on their own path `(1 - t) noise + t Y`, which the other rows see
through attention, and on Y at the end.

Axis alphabet: B batch, H horizon, A padded action width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gr00t_fast.model.action_head import Velocity, integrate

MAX_GUIDANCE_WEIGHT = 5.0  # beta in Black et al. 2025


@dataclass(frozen=True)
class Continuation:
    """What a chunk shall continue: actions fp32 (B, H, A), normalised, and how much each counts: weights fp32 (H, A), 0..1."""

    actions: Tensor
    weights: Tensor
    method: Literal["rtc", "prefix"]

    def to(self, device: torch.device) -> Continuation:
        return Continuation(self.actions.to(device), self.weights.to(device), self.method)

    def item(self, index: int) -> Continuation:
        """Of one item of the batch."""
        return Continuation(self.actions[index : index + 1], self.weights, self.method)


def prefix_weights(horizon: int, inference_delay: int, execution_horizon: int) -> Tensor:
    """Weights (H,): 1 for the first `inference_delay` rows, 0 from row `execution_horizon` on, falling in between.

    `c (e^c - 1) / (e - 1)` with `c` falling linearly from 1 to 0 (Black et al. 2025; lerobot's prefix_attention_schedule EXP).
    """
    fall = (execution_horizon - torch.arange(horizon, dtype=torch.float32)) / (execution_horizon - inference_delay + 1)
    fall = fall.clamp(0.0, 1.0)
    weights = fall * torch.expm1(fall) / math.expm1(1.0)
    weights[:inference_delay] = 1.0
    return weights


def guidance_weight(t: float, steps: int) -> float:
    """w(t) of the module's text, at most lerobot's max_guidance_weight."""
    limit = min(MAX_GUIDANCE_WEIGHT, float(steps))
    return limit if t == 0 else min(limit, (t**2 + (1 - t) ** 2) / (t * (1 - t)))


def denoise_towards(velocity: Velocity, noise: Tensor, steps: int, continuation: Continuation) -> Tensor:
    """Integrate in fp32: noise (B, H, A) -> normalised actions (B, H, A). `velocity` must be differentiable for method "rtc"."""
    noise, known, weights = noise.float(), continuation.actions, continuation.weights

    def guided(actions: Tensor, step: int) -> Tensor:
        t = step / steps
        with torch.enable_grad():
            start = actions.detach().requires_grad_()
            flow = velocity(start, step).float()
            end = start + (1 - t) * flow  # (B, H, A)
        (pull,) = torch.autograd.grad(end, start, weights * (known - end.detach()))
        return flow.detach() + guidance_weight(t, steps) * pull

    def on_path(actions: Tensor, step: int) -> Tensor:
        t = step / steps
        return torch.lerp(actions, (1 - t) * noise + t * known, weights)  # exactly the path where the weight is 1

    if continuation.method == "rtc":
        return integrate(guided, noise, steps)
    actions = integrate(lambda actions, step: velocity(actions, step).float(), noise, steps, before=on_path)
    return torch.lerp(actions, known, weights)
