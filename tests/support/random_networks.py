"""Small random checkpoints of any shape in the published format, for tests: `Sizes` says the shape, `write_network` makes the directory."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.model import Gr00t, ModelInputs
from gr00t_fast.model.config import ModelConfig
from gr00t_fast.networks import n1d5, n1d7
from gr00t_fast.networks.n1d7 import BACKBONE_FILE
from gr00t_fast.virtual import random_checkpoint as rc
from gr00t_fast.virtual.random_checkpoint import write_json

PICTURE = (64, 48)  # width and height of the imagined training videos


@dataclass(frozen=True)
class Sizes:
    """vision: width, inner, layers, heads; language: width, inner, layers, heads, kv heads, head dim; dit and vl: layers, heads, head dim."""

    vision: tuple[int, int, int, int] = (32, 64, 1, 2)
    language: tuple[int, int, int, int, int, int] = (32, 64, 1, 4, 2, 8)
    hidden: int = 32
    dit: tuple[int, int, int] = (2, 4, 8)
    vl: tuple[int, int, int] = (1, 4, 8)
    image: int = 56  # 16 tokens per picture: the tests' time goes elsewhere
    horizon: int = 16
    future: int = 32
    state_dim: int = 64
    action_dim: int = 32
    use_vlln: bool = True
    extra_language_layers: int = 0  # announced by Eagle's configuration, cut by select_layer

    def configuration(self) -> tuple[dict[str, Any], dict[str, Any]]:
        config, eagle = rc.sized_config("n1.5", vars(self))
        head = config["action_head_cfg"]
        eagle["vision_config"].update(image_size=self.image)
        eagle["text_config"]["num_hidden_layers"] += self.extra_language_layers
        head.update(action_horizon=self.horizon, num_target_vision_tokens=self.future, use_vlln=self.use_vlln)
        head.update(action_dim=self.action_dim, max_action_dim=self.action_dim, max_state_dim=self.state_dim)
        config.update(action_horizon=self.horizon, action_dim=self.action_dim)
        return config, eagle


TINY = Sizes()


def write_network(
    directory: Path,
    sizes: Sizes = TINY,
    seed: int = 0,
    data_config: str = "so100",
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 10**9,
    resolution: tuple[int, int] = PICTURE,
) -> Path:
    config, eagle = sizes.configuration()
    write_json(directory / "config.json", config)
    write_json(directory / "eagle2_hg_model" / "config.json", eagle)
    write_json(directory / "experiment_cfg" / "metadata.json", rc.metadata_of_random(data_config, resolution))
    rc.write_tokenizer(directory / "eagle2_hg_model" / "tokenizer.json", eagle["image_token_index"])
    rc.write_weights(directory, n1d5.read_config(config, eagle), seed, dtype, shard_bytes)
    return directory


@dataclass(frozen=True)
class SizesN1d7:
    """vision: width, inner, layers, heads, deepstack, positions; language: width, inner, layers, heads, kv heads, head dim; dit and vl as `Sizes`."""

    vision: tuple[int, int, int, int, tuple[int, ...], int] = (32, 64, 3, 2, (0, 1), 36)
    language: tuple[int, int, int, int, int, int] = (32, 64, 3, 4, 2, 8)
    sections: tuple[int, int, int] = (2, 1, 1)
    hidden: int = 32
    dit: tuple[int, int, int] = (4, 4, 8)
    vl: tuple[int, int, int] = (1, 4, 8)
    horizon: int = 40
    state_dim: int = 132
    action_dim: int = 132
    use_vlln: bool = True
    text_every: int | None = 2  # None: each cross-attending block sees all tokens
    extra_language_layers: int = 0
    row: int = 10  # of new_embodiment

    def configuration(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """config.json and backbone_config.json."""
        config, backbone = rc.sized_config("n1.7", vars(self))
        backbone["text_config"]["num_hidden_layers"] += self.extra_language_layers
        config.update(use_vlln=self.use_vlln, use_alternate_vl_dit=self.text_every is not None, attend_text_every_n_blocks=self.text_every or 2)
        config.update(action_horizon=self.horizon, max_state_dim=self.state_dim, max_action_dim=self.action_dim)
        return config, backbone


TINY_N1D7 = SizesN1d7()


def write_network_n1d7(
    directory: Path, sizes: SizesN1d7 = TINY_N1D7, seed: int = 0, dtype: torch.dtype = torch.bfloat16, shard_bytes: int = 10**9
) -> Path:
    """Without a tokenizer: a network, and what tells its embodiment."""
    config, backbone = sizes.configuration()
    processor, statistics = rc.processor_n1d7("so100", (0,))
    processor["processor_kwargs"].update(max_state_dim=sizes.state_dim, max_action_dim=sizes.action_dim, max_action_horizon=sizes.horizon)
    files = {"config.json": config, BACKBONE_FILE: backbone, "processor_config.json": processor, "statistics.json": statistics}
    for name, content in {**files, "embodiment_id.json": {"new_embodiment": sizes.row}}.items():
        write_json(directory / name, content)
    config, backbone = (json.loads((directory / name).read_text()) for name in ("config.json", BACKBONE_FILE))  # lists, as files hold them
    rc.write_weights(directory, n1d7.read_config(config, backbone), seed, dtype, shard_bytes)
    return directory


def edit_json(file: Path, dotted: str, value: Any) -> None:
    """Set the value of a dotted key; `...` as value removes it."""
    raw = json.loads(file.read_text())
    *parents, last = dotted.split(".")
    node = raw
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    file.write_text(json.dumps(raw))


def load_network(checkpoint: Path, dtype: torch.dtype = torch.float32, tag: str = "new_embodiment") -> Gr00t:
    return load_model(open_checkpoint(checkpoint), tag, torch.device("cpu"), dtype)


def random_inputs(config: ModelConfig, batch: int = 1, cameras: int = 1, text_tokens: int = 20, seed: int = 0) -> tuple[ModelInputs, torch.Tensor]:
    """Inputs of equal prompt lengths, and noise."""
    images, side = cameras * config.vision.tokens, config.vision.image_size
    positions = torch.arange(images) + text_tokens // 2
    words = min(config.language.vocab_size - 8, config.language.image_token_id)
    return _inputs(config, positions, (batch, images + text_tokens), words, (batch, cameras, 3, side, side), seed)


def random_inputs_n1d7(
    config: ModelConfig, batch: int = 1, pictures: int = 1, patches: tuple[int, int] = (4, 4), text_tokens: int = 9, seed: int = 0
) -> tuple[ModelInputs, torch.Tensor]:
    """Inputs of equal prompt lengths with a text token on either side of each picture of `patches` rows and columns, and noise."""
    each = math.prod(patches) // config.vision.merge_size**2
    positions = torch.cat([3 + picture * (each + 2) + torch.arange(each) for picture in range(pictures)])
    height, width = (count * config.vision.patch_size for count in patches)
    prompt = (batch, int(positions[-1]) + 1 + text_tokens)
    return _inputs(config, positions, prompt, 256, (batch, pictures, 3, height, width), seed)  # 256: letters of the byte tokenizer


def _inputs(
    config: ModelConfig, positions: torch.Tensor, prompt: tuple[int, int], words: int, pictures: tuple[int, ...], seed: int
) -> tuple[ModelInputs, torch.Tensor]:
    """Image tokens at `positions` of prompts of this shape, otherwise ids below `words`."""
    generator, head, image_token = torch.Generator().manual_seed(seed), config.head, config.language.image_token_id
    assert image_token >= words, "text must not hold the image token"
    ids = torch.randint(0, words, prompt, generator=generator)
    ids[:, positions] = image_token
    pixels = torch.rand(pictures, generator=generator) * 2 - 1
    state = torch.randn((prompt[0], head.state_dim), generator=generator)
    noise = torch.randn((prompt[0], head.action_horizon, head.action_dim), generator=generator)
    return ModelInputs(pixels, ids, positions, state), noise


def cast(inputs: ModelInputs, dtype: torch.dtype) -> ModelInputs:
    return replace(inputs, pixel_values=inputs.pixel_values.to(dtype), state=inputs.state.to(dtype))


def observation(
    data_config: str = "so100", batch: int | None = None, instruction: Any = "pick", seed: int = 0, size: tuple[int, int] = PICTURE
) -> dict:
    """A random observation, unbatched when `batch` is None."""
    generator = np.random.default_rng(seed)
    config, lead = DATA_CONFIGS[data_config], () if batch is None else (batch,)
    frames = {key: generator.integers(0, 256, (*lead, 1, size[1], size[0], 3), dtype=np.uint8) for key in config.video_keys}
    widths = dict(zip(config.state_keys, (5, 1), strict=True))
    states = {key: generator.uniform(-30, 30, (*lead, 1, width)) for key, width in widths.items()}
    return {**frames, **states, config.language_key: instruction}
