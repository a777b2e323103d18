"""One training run, whatever the network: updates, learning rate, epochs, and all that a resumed run must find again.

All randomness of a step comes from (seed, step), so a run that is stopped and continued does bit for bit what one in a piece does.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gr00t_fast.errors import ConfigError

_WARM_UP_STEPS = 100
_FINAL_RATE = 0.01  # of the peak
_BETAS, _CLIP_NORM = (0.9, 0.95), 1.0
_STEP_SEEDS = 1_000_003  # steps never share a generator's seed with those of the next --seed


@dataclass(frozen=True)
class Options:
    """What decides a run; a resumed one must have the same."""

    steps: int = 4000
    batch: int = 64
    draws: int = 2  # of noise and time per observation
    rate: float = 1.5e-3
    decay: float = 0.01
    seed: int = 0


class Run:
    """`step` until `done`; `save` and `load` carry a run over. A subclass says what the losses of some rows of its samples are.

    Raises ConfigError for samples or a state that do not fit.
    """

    def __init__(self, modules: dict[str, nn.Module], samples: int, options: Options, device: torch.device) -> None:
        if samples < options.batch:
            raise ConfigError(f"{samples} samples are fewer than a batch of {options.batch}. Make more of them, or lower --batch.")
        self.modules, self.samples, self.options, self.device, self.steps_done = modules, samples, options, device, 0
        matrices = [p for p in self._parameters() if p.dim() > 1]
        vectors = [p for p in self._parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": options.decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=_BETAS)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def losses(self, rows: np.ndarray, generator: torch.Generator) -> dict[str, tuple[Tensor, float]]:
        """Name -> loss of the samples `rows`, and its weight in the sum."""
        raise NotImplementedError(f"{type(self).__name__} has to say what its losses are")

    @property
    def done(self) -> bool:
        return self.steps_done >= self.options.steps

    def step(self) -> dict[str, float]:
        """One update; the losses before it."""
        rate = self._rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(self.options.seed * _STEP_SEEDS + self.steps_done)
        losses = self.losses(self._rows(), generator)
        self.optimiser.zero_grad(set_to_none=True)
        sum(weight * loss for loss, weight in losses.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), _CLIP_NORM)
        self.optimiser.step()
        self.steps_done += 1
        return {**{name: loss.item() for name, (loss, _) in losses.items()}, "gradient_norm": float(norm), "rate": rate}

    def save(self, path: Path) -> None:
        state = {
            "options": asdict(self.options),
            "samples": self.samples,
            "steps_done": self.steps_done,
            **{name: module.state_dict() for name, module in self.modules.items()},
            "optimiser": self.optimiser.state_dict(),
        }
        half_written = path.with_suffix(".tmp")
        torch.save(state, half_written)
        half_written.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a saved state. Raises ConfigError when it is of other options or samples."""
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        told, here = {**state["options"], "samples": state["samples"]}, {**asdict(self.options), "samples": self.samples}
        if told != here:
            different = ", ".join(f"{name} {told[name]} there, {here[name]} here" for name in here if told.get(name) != here[name])
            raise ConfigError(f"{path} is of another run ({different}). Give the same options, or another --out.")
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps_done = state["steps_done"]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules.values() for parameter in module.parameters()]

    def _rate(self) -> float:
        """Linear warm-up, then a cosine down to one per cent."""
        options, step = self.options, self.steps_done
        warm_up = min(1.0, (step + 1) / min(_WARM_UP_STEPS, max(1, options.steps // 10)))
        cosine = (1 + math.cos(math.pi * step / options.steps)) / 2
        return options.rate * warm_up * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)

    def _rows(self) -> np.ndarray:
        """Of this step. Each epoch is a permutation of the samples; what does not fill a batch is left to the next epoch."""
        size, seed = self.options.batch, self.options.seed
        epoch, place = divmod(self.steps_done, self.samples // size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([seed, epoch]).permutation(self.samples)
        return np.sort(self._order[place * size : (place + 1) * size])
