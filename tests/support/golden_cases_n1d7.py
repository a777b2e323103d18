"""N1.6's and N1.7's recorded outputs beside the checkout (golden_n1d6/, golden_n1d7/), and our own stages in the same shapes.

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
from gr00t_fast.model.layers import rotary_tables
from gr00t_fast.model.siglip2 import joined_patches
from gr00t_fast.model.vision import patches_of

TAG = "new_embodiment"
STEPS = (1, 2, 4, 8)
IMAGE_TOKEN_ID = {"n1.6": 151669, "n1.7": 151655}


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
        return self._inputs(pixels)

    def _inputs(self, pixels: Tensor) -> ModelInputs:
        ids = self.tensor("in.input_ids")
        places = torch.nonzero(ids[0] == IMAGE_TOKEN_ID[self.checkpoint.network.name])[:, 0]
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


class GoldenN1d6(GoldenN1d7):
    @property
    def inputs(self) -> ModelInputs:
        """From the recorded pixels, ids and state."""
        return self._inputs(self.tensor("in.pixel_values"))

    @property
    def grid(self) -> tuple[int, int]:
        ((rows, columns),) = np.unique(self.arrays["grids"], axis=0).tolist()
        return rows, columns


def load_golden(case: Path) -> GoldenN1d7:
    checkpoint = open_checkpoint(case / "checkpoint")
    model = load_model(checkpoint, TAG, torch.device("cpu"), torch.float32)
    with np.load(case / "observation.npz") as observation, np.load(case / "expected.npz") as arrays:
        kind = GoldenN1d6 if checkpoint.network.name == "n1.6" else GoldenN1d7
        return kind(checkpoint, checkpoint.embodiment(TAG), model, dict(observation), dict(arrays))


@torch.inference_mode()
def stages_of(golden: GoldenN1d7) -> dict[str, Tensor]:
    """Ours by the recording's names, from the recorded inputs; `action_pred.N` among them."""
    found = _towers_n1d6(golden) if isinstance(golden, GoldenN1d6) else _towers_n1d7(golden)
    inputs, noise, head = golden.inputs, golden.tensor("noise"), golden.model.head
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


def _towers_n1d6(golden: GoldenN1d7) -> dict[str, Tensor]:
    model, inputs, tower, language = golden.model, golden.inputs, golden.model.vision, golden.model.language
    x = tower.embed(inputs.pixel_values[0])
    found = {"vision_embeddings": x.flatten(0, 1), "vision_block_0": tower.blocks[0](x).flatten(0, 1)}
    for block in tower.blocks:
        x = block(x)
    x = tower.norm(x)
    found |= {"vision_tower": x.flatten(0, 1), "vision_shuffled": joined_patches(x, *golden.grid, 2).flatten(0, 1)}
    tokens = model.encode_vision(inputs.pixel_values)
    cos, sin = rotary_tables(inputs.input_ids.shape[1], language.config.head_dim, language.config.rope_theta, tokens)
    x = language.embedding(inputs.input_ids).index_copy(1, inputs.image_positions, tokens)
    found |= {"vision_features": tokens[0], "rope_cos": cos[None], "rope_sin": sin[None], "language_layer_0": language.blocks[0](x, cos, sin)}
    for block in language.blocks:
        x = block(x, cos, sin)
    return found | {"before_norm": x, "backbone_features": model.encode_language(inputs, tokens)}


def _towers_n1d7(golden: GoldenN1d7) -> dict[str, Tensor]:
    model, inputs = golden.model, golden.inputs
    vision, head = model.vision, model.head
    pictures = inputs.pixel_values.flatten(0, 1)
    patches = patches_of(pictures, vision.config)
    found = {"in.pixel_values": patches.flatten(0, 1), "patch_embed": vision.patch_embedding(patches).flatten(0, 1)}
    embedded = vision.embed(pictures)
    found["vision_block_0"] = vision.blocks[0](embedded, rotary=vision.rotary(*vision.grid_of(pictures), embedded)).flatten(0, 1)
    tokens = model.encode_vision(inputs.pixel_values)
    found["vision_features"], deepstack = tokens[0, 0], tokens[1:, 0]
    found |= {f"deepstack.{index}": each for index, each in enumerate(deepstack)}
    found["rope_cos"], found["rope_sin"] = (table[None] for table in model.rotary(inputs))
    found["backbone_features"] = model.encode_language(inputs, tokens)
    found["vlln_features"] = head.vlln(found["backbone_features"])
    return found
