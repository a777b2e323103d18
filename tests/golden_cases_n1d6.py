"""N1.6's recorded outputs beside the checkout (golden_n1d6/), and our own stages in the same shapes.

Axis alphabet: B batch (1), C pictures, T patches of all pictures, V image tokens, S prompt tokens, D width, H horizon, A padded action width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from golden_cases_n1d7 import STEPS, TAG, GoldenN1d7
from torch import Tensor

from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.model import ModelInputs
from gr00t_fast.model.layers import rotary_tables
from gr00t_fast.model.siglip2 import joined_patches

IMAGE_TOKEN_ID = 151669


class GoldenN1d6(GoldenN1d7):
    @property
    def inputs(self) -> ModelInputs:
        """From the recorded pixels, ids and state."""
        ids = self.tensor("in.input_ids")
        places = torch.nonzero(ids[0] == IMAGE_TOKEN_ID)[:, 0]
        return ModelInputs(self.tensor("in.pixel_values")[None], ids, places, self.tensor("in.state").flatten(1).float())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, the same of all pictures."""
        ((rows, columns),) = np.unique(self.arrays["grids"], axis=0).tolist()
        return rows, columns


def load_golden(case: Path) -> GoldenN1d6:
    checkpoint = open_checkpoint(case / "checkpoint")
    model = load_model(checkpoint, TAG, torch.device("cpu"), torch.float32)
    with np.load(case / "observation.npz") as observation, np.load(case / "expected.npz") as arrays:
        return GoldenN1d6(checkpoint, checkpoint.embodiment(TAG), model, dict(observation), dict(arrays))


@torch.inference_mode()
def stages_of(golden: GoldenN1d6) -> dict[str, Tensor]:
    """Ours by the recording's names, from the recorded inputs; `action_pred.N` among them."""
    model, inputs, noise = golden.model, golden.inputs, golden.tensor("noise")
    tower, language, head = model.vision, model.language, model.head
    x = tower.embed(inputs.pixel_values[0])
    found = {"vision_embeddings": x.flatten(0, 1), "vision_block_0": tower.blocks[0](x).flatten(0, 1)}
    for block in tower.blocks:
        x = block(x)
    x = tower.norm(x)
    joined = joined_patches(x, *golden.grid, 2)
    found |= {"vision_tower": x.flatten(0, 1), "vision_shuffled": joined.flatten(0, 1)}
    tokens = model.encode_vision(inputs.pixel_values)
    found["vision_features"] = tokens[0]
    cos, sin = rotary_tables(inputs.input_ids.shape[1], language.config.head_dim, language.config.rope_theta, tokens)
    found |= {"rope_cos": cos[None], "rope_sin": sin[None]}
    x = language.embedding(inputs.input_ids).index_copy(1, inputs.image_positions, tokens)
    found["language_layer_0"] = language.blocks[0](x, cos, sin)
    for block in language.blocks:
        x = block(x, cos, sin)
    found |= {"before_norm": x, "backbone_features": model.encode_language(inputs, tokens)}
    found["vl_features"] = head.refine(found["backbone_features"])
    condition = head.condition(found["vl_features"], inputs.state, None, inputs.image_positions)
    found["state_features"], tables = condition.prefix, head.step_tables(4)
    found["action_features.0"] = head.action_encoder(noise, tables.tau[0])
    tokens = torch.cat((condition.prefix, found["action_features.0"] + head.position_embedding.weight[: noise.shape[1]]), dim=1)  # (1, 1 + H, D)
    found["dit_output.4.0"] = head.dit(tokens, tables.modulation[0], condition.cross, condition.key_mask, last=tokens.shape[1])
    actions, velocities = noise, []
    for step in range(4):
        velocities.append(head.velocity(actions, condition, tables.tau[step], tables.modulation[step]))
        actions = actions + velocities[-1] / 4
    found["velocity.4"] = torch.cat(velocities)
    return found | {f"action_pred.{steps}": head.denoise(noise, condition, head.step_tables(steps)) for steps in STEPS}
