"""N1.7's recorded outputs beside the checkout (golden_n1d7/), and our own stages in the same shapes.

Axis alphabet: B batch (1), C pictures, V image tokens, S prompt tokens, D width, H horizon, A padded action width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.checkpoint import Checkpoint, load_model, open_checkpoint
from gr00t_fast.inputs.embodiment import Embodiment
from gr00t_fast.model import Gr00t, ModelInputs

TAG = "new_embodiment"
STEPS = (1, 2, 4, 8)
IMAGE_TOKEN_ID = 151655


@dataclass(frozen=True)
class GoldenN1d7:
    """One case: its checkpoint, what was observed, and what came out of each of the reference's stages."""

    checkpoint: Checkpoint
    embodiment: Embodiment
    model: Gr00t
    observation: Mapping[str, np.ndarray]
    arrays: Mapping[str, np.ndarray]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    @property
    def state(self) -> dict[str, np.ndarray]:
        return {key: value for key, value in self.observation.items() if key.startswith("state.")}

    @property
    def inputs(self) -> ModelInputs:
        """From the recorded patches (blocks of 2 x 2, each of two equal frames), ids and state."""
        rows, columns = self.grid
        patches = self.tensor("in.pixel_values").unflatten(0, (-1, rows // 2, columns // 2, 2, 2)).unflatten(-1, (3, 2, 16, 16))[..., 0, :, :]
        pixels = patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, 16 * rows, 16 * columns)  # (C, 3, h, w)
        ids = self.tensor("in.input_ids")
        places = torch.nonzero(ids[0] == IMAGE_TOKEN_ID)[:, 0]
        return ModelInputs(pixels[None], ids, places, self.tensor("in.state").flatten(1).float())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, the same of all pictures."""
        ((_, rows, columns),) = np.unique(self.arrays["in.image_grid_thw"], axis=0).tolist()
        return rows, columns

    def flat_observation(self) -> dict:
        """What `get_action` takes, batched."""
        frames = {key: value for key, value in self.observation.items() if key.startswith("video.")}
        return {**frames, **self.state, self.embodiment.data_config.language_key: [str(self.observation["instruction"])]}


def load_golden(case: Path) -> GoldenN1d7:
    checkpoint = open_checkpoint(case / "checkpoint")
    model = load_model(checkpoint, TAG, torch.device("cpu"), torch.float32)
    with np.load(case / "observation.npz") as observation, np.load(case / "expected.npz") as arrays:
        return GoldenN1d7(checkpoint, checkpoint.embodiment(TAG), model, dict(observation), dict(arrays))


@torch.inference_mode()
def stages_of(golden: GoldenN1d7) -> dict[str, Tensor]:
    """Ours by the recording's names, from the recorded inputs; `action_pred.N` among them."""
    model, inputs, noise = golden.model, golden.inputs, golden.tensor("noise")
    vision, head = model.vision, model.head
    pictures = inputs.pixel_values.flatten(0, 1)
    found = {"in.pixel_values": vision.patches(pictures).flatten(0, 1), "patch_embed": vision.patch_embedding(vision.patches(pictures)).flatten(0, 1)}
    embedded = vision.embed(pictures)
    found["vision_block_0"] = vision.blocks[0](embedded, rotary=vision.rotary(*vision.grid_of(pictures), embedded)).flatten(0, 1)
    tokens = model.encode_vision(inputs.pixel_values)
    found["vision_features"], deepstack = tokens[0, 0], tokens[1:, 0]
    found |= {f"deepstack.{index}": each for index, each in enumerate(deepstack)}
    found["rope_cos"], found["rope_sin"] = (table[None] for table in model.rotary(inputs))
    found["backbone_features"] = model.encode_language(inputs, tokens)
    found["vlln_features"] = head.vlln(found["backbone_features"])
    found["vl_features"] = head.refine(found["backbone_features"])
    condition = head.condition(found["vl_features"], inputs.state, None, inputs.image_positions)
    found["state_features"] = condition.prefix
    tables = head.step_tables(4)
    found["action_features.0"] = head.action_encoder(noise, tables.tau[0])
    tokens = torch.cat((condition.prefix, found["action_features.0"] + head.position_embedding.weight[: noise.shape[1]]), dim=1)  # (1, 1 + H, D)
    found["dit_output.4.0"] = head.dit(tokens, tables.modulation[0], condition.cross, condition.key_mask, last=tokens.shape[1])
    actions, velocities = noise, []
    for step in range(4):
        velocities.append(head.velocity(actions, condition, tables.tau[step], tables.modulation[step]))
        actions = actions + velocities[-1] / 4
    found["velocity.4"] = torch.cat(velocities)
    return found | {f"action_pred.{steps}": head.denoise(noise, condition, head.step_tables(steps)) for steps in STEPS}
