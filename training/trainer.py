"""One training run: everything that a step needs and everything that a resumed run must find again.

All randomness of a step comes from (seed, step), so a run that is stopped and continued does bit for bit what one in a piece does.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gr00t_fast.config import ModelConfig
from gr00t_fast.errors import ConfigError
from gr00t_fast.prompt import IMAGE_TOKEN, PromptEncoder
from training.data import TrainingSet, metadata_of
from training.flow import BlockFinder, losses
from training.network import INSTRUCTIONS, configuration, new_network, small_tokenizer, write_checkpoint
from training.samples import IMAGE_SIZE, Samples

_WARM_UP_STEPS = 100
_FINAL_RATE = 0.01  # of the peak
_BETAS, _CLIP_NORM = (0.9, 0.95), 1.0
_FINDER_WEIGHT = 0.2
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


class Trainer:
    """`step` until `done`; `save` and `load` carry a run over. Raises ConfigError for samples or a state that do not fit."""

    def __init__(self, samples: Samples, options: Options, device: torch.device) -> None:
        if len(samples) < options.batch:
            raise ConfigError(f"{len(samples)} samples are fewer than a batch of {options.batch}. Make more with training/samples.py.")
        self.options, self.device, self.steps_done = options, device, 0
        tokenizer = small_tokenizer()
        self.dicts, self.metadata = configuration(tokenizer, IMAGE_SIZE), metadata_of(samples)
        self.config = ModelConfig.from_dicts(*self.dicts)
        vision = self.config.vision
        self.prompts = PromptEncoder(tokenizer, 1, vision.tokens, tokenizer.token_to_id(IMAGE_TOKEN), "plain")
        self.data = TrainingSet.of(samples, self.metadata, self.config.head.state_dim)
        self.model = new_network(self.config, options.seed).to(device)
        torch.manual_seed(options.seed)  # of the finder's first weights
        self.finder = BlockFinder(self.config.language.hidden_size, vision.image_size // vision.patch_size).to(device)
        matrices = [p for p in self._parameters() if p.dim() > 1]
        vectors = [p for p in self._parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": options.decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=_BETAS)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def done(self) -> bool:
        return self.steps_done >= self.options.steps

    def step(self) -> dict[str, float]:
        """One update; the losses before it."""
        rate = self._rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        flow, finding = losses(self.model, self.finder, self._batch(), self.options.draws)
        self.optimiser.zero_grad(set_to_none=True)
        (flow + _FINDER_WEIGHT * finding).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), _CLIP_NORM)
        self.optimiser.step()
        self.steps_done += 1
        return {"flow": flow.item(), "finder": finding.item(), "gradient_norm": float(norm), "rate": rate}

    @torch.no_grad()
    def check(self, held_out: TrainingSet, steps: int = 4, rows: int = 250) -> dict[str, float]:
        """On samples that training does not see: both losses, and how far denoised actions are from the expert's, in degrees (body joints)."""
        generator = torch.Generator().manual_seed(1)
        rows = min(rows, len(held_out))
        batch = held_out.batch(np.arange(rows), self.prompts, INSTRUCTIONS[0], generator, self.device)
        flow, finding = losses(self.model, self.finder, batch, self.options.draws)
        head = self.config.head
        noise = torch.randn((rows, head.action_horizon, head.action_dim), generator=generator).to(self.device)
        actions = self.model(batch.inputs, noise, self.model.head.step_tables(steps))[..., : batch.actions.shape[-1]]
        statistics = next(iter(self.metadata.values()))["statistics"]["action"]["single_arm"]
        half = torch.tensor(np.subtract(statistics["max"], statistics["min"]) / 2, device=self.device)
        error = ((actions - batch.actions)[..., : len(half)].abs() * half).mean()
        return {"held_out_flow": flow.item(), "held_out_finder": finding.item(), "action_error_deg": error.item()}

    def save(self, path: Path) -> None:
        state = {
            "options": asdict(self.options),
            "samples": len(self.data),
            "steps_done": self.steps_done,
            "model": self.model.state_dict(),
            "finder": self.finder.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        half_written = path.with_suffix(".tmp")
        torch.save(state, half_written)
        half_written.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a saved state. Raises ConfigError when it is of other options or samples."""
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        told, here = {**state["options"], "samples": state["samples"]}, {**asdict(self.options), "samples": len(self.data)}
        if told != here:
            different = ", ".join(f"{name} {told[name]} there, {here[name]} here" for name in here if told.get(name) != here[name])
            raise ConfigError(f"{path} is of another run ({different}). Give the same options, or another --out.")
        self.model.load_state_dict(state["model"])
        self.finder.load_state_dict(state["finder"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps_done = state["steps_done"]

    def write_checkpoint(self, out: Path, dtype: torch.dtype) -> None:
        write_checkpoint(out, self.model, self.dicts, self.metadata, dtype)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.model.parameters(), *self.finder.parameters()]

    def _rate(self) -> float:
        """Linear warm-up, then a cosine down to one per cent."""
        options, step = self.options, self.steps_done
        warm_up = min(1.0, (step + 1) / min(_WARM_UP_STEPS, max(1, options.steps // 10)))
        cosine = (1 + math.cos(math.pi * step / options.steps)) / 2
        return options.rate * warm_up * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)

    def _batch(self) -> Any:
        """Each epoch is a permutation of the samples; what does not fill a batch is left to the next epoch."""
        size, seed = self.options.batch, self.options.seed
        epoch, place = divmod(self.steps_done, len(self.data) // size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([seed, epoch]).permutation(len(self.data))
        rows = np.sort(self._order[place * size : (place + 1) * size])
        instruction = INSTRUCTIONS[int(np.random.default_rng([seed, self.steps_done, 1]).integers(len(INSTRUCTIONS)))]
        generator = torch.Generator().manual_seed(seed * _STEP_SEEDS + self.steps_done)
        return self.data.batch(rows, self.prompts, instruction, generator, self.device)
