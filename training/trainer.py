"""The run that trains the whole small network, from pixels to actions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.config import ModelConfig
from gr00t_fast.prompt import IMAGE_TOKEN, PromptEncoder
from training.data import TrainingSet, metadata_of
from training.flow import BlockFinder, losses
from training.network import INSTRUCTIONS, configuration, new_network, small_tokenizer, write_checkpoint
from training.run import Options, Run
from training.samples import IMAGE_SIZE, Samples

_FINDER_WEIGHT = 0.2


class Trainer(Run):
    """See Run. Makes the network for the samples, and its checkpoint."""

    def __init__(self, samples: Samples, options: Options, device: torch.device) -> None:
        tokenizer = small_tokenizer()
        self.dicts, self.metadata = configuration(tokenizer, IMAGE_SIZE), metadata_of(samples)
        self.config = ModelConfig.from_dicts(*self.dicts)
        vision = self.config.vision
        self.prompts = PromptEncoder(tokenizer, 1, vision.tokens, tokenizer.token_to_id(IMAGE_TOKEN), "plain")
        self.data = TrainingSet.of(samples, self.metadata, self.config.head.state_dim)
        self.model = new_network(self.config, options.seed).to(device)
        torch.manual_seed(options.seed)  # of the finder's first weights
        self.finder = BlockFinder(self.config.language.hidden_size, vision.image_size // vision.patch_size).to(device)
        super().__init__({"model": self.model, "finder": self.finder}, len(samples), options, device)

    def losses(self, rows: np.ndarray, generator: torch.Generator) -> dict[str, tuple[Tensor, float]]:
        """One instruction for all rows, drawn for this step."""
        drawn = np.random.default_rng([self.options.seed, self.steps_done, 1]).integers(len(INSTRUCTIONS))
        batch = self.data.batch(rows, self.prompts, INSTRUCTIONS[int(drawn)], generator, self.device)
        flow, finding = losses(self.model, self.finder, batch, self.options.draws)
        return {"flow": (flow, 1.0), "finder": (finding, _FINDER_WEIGHT)}

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

    def write_checkpoint(self, out: Path, dtype: torch.dtype) -> None:
        write_checkpoint(out, self.model, self.dicts, self.metadata, dtype)
