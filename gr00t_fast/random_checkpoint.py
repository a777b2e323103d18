"""Write a checkpoint with random weights in NVIDIA's published N1.5 format: for demonstrations, tests and timing where no real one is at hand.

    python -m gr00t_fast.random_checkpoint --size=demo --out=outputs/demo/checkpoint

It carries a small tokenizer of its own (every byte is a token), so nothing is downloaded. What it does with an arm means nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from gr00t_fast.checkpoint.rename import UNUSED_PREFIXES, published_shapes
from gr00t_fast.config import PUBLISHED_CONFIG, PUBLISHED_EAGLE, ModelConfig
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.data_config import DATA_CONFIGS
from gr00t_fast.errors import ConfigError, attempt, exit_code_of
from gr00t_fast.model import Gr00tN1d5
from gr00t_fast.prompt import IMAGE_TOKEN

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN, "<img>", "</img>")
_MAX_SHARD_BYTES = 5_000_000_000  # the published checkpoint's shards are just below this
# Joint ranges of a plausible SO-100 data set in degrees (gripper in per cent), around the simulated arm's first pose.
_RANGES_DEG = {
    "shoulder_pan": (-40.0, 40.0),
    "shoulder_lift": (-60.0, 20.0),
    "elbow_flex": (-20.0, 60.0),
    "wrist_flex": (40.0, 95.0),
    "wrist_roll": (-120.0, -60.0),
    "gripper": (0.0, 60.0),
}
_SIZES: dict[str, dict[str, Any]] = {
    # vision: width, inner, layers, heads; language: width, inner, layers, heads, kv heads, head dim; dit and vl: layers, heads, head dim
    "tiny": {"vision": (32, 64, 1, 2), "language": (32, 64, 1, 4, 2, 8), "hidden": 32, "dit": (2, 4, 8), "vl": (1, 4, 8)},
    "demo": {"vision": (96, 256, 3, 4), "language": (128, 256, 3, 4, 2, 32), "hidden": 96, "dit": (4, 4, 32), "vl": (1, 4, 32)},
}
SIZES = (*_SIZES, "full")
SO100_CONFIGS = tuple(name for name, config in DATA_CONFIGS.items() if config.action_keys == DATA_CONFIGS["so100"].action_keys)


def write_random_checkpoint(
    out: Path,
    size: str = "demo",
    data_config: str = "so100",
    resolution: tuple[int, int] = (640, 480),
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    published_tokenizer: bool = False,
    weights: bool = True,
) -> Path:
    """Create directory `out`. Size `full` has the published sizes (2.4 billion parameters); resolution is (width, height). Raises ConfigError.

    It is written beside `out` and put in its place when it is complete: one that was interrupted is never taken for a checkpoint.
    `weights=False`: the small files alone, for a network of `random_network`.
    `published_tokenizer`: keep the published vocabulary and image token id and write no tokenizer files (pass --processor_path when loading).
    """
    if size not in SIZES or data_config not in SO100_CONFIGS:
        raise ConfigError(f"size must be one of {', '.join(SIZES)} and data_config one of {', '.join(SO100_CONFIGS)}; got '{size}', '{data_config}'.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a directory for the checkpoint, or a name that is free.")
    config, eagle = network_config(size, published_tokenizer or size == "full")
    unfinished = (out if out.is_dir() else out.parent) / f"{out.name}.unfinished-{os.getpid()}"  # on the same disk: it can be renamed
    try:
        if not published_tokenizer:
            _write_tokenizer(unfinished / "eagle2_hg_model" / "tokenizer.json", eagle["image_token_index"])
        _write_json(unfinished / "config.json", config)
        _write_json(unfinished / "eagle2_hg_model" / "config.json", eagle)
        _write_json(unfinished / "experiment_cfg" / "metadata.json", _metadata(data_config, resolution))
        if weights:
            _write_weights(unfinished, ModelConfig.from_dicts(config, eagle), seed, dtype, max_shard_bytes)
        _put_in_place(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def checkpoint_in(directory: Path, name: str, size: str, data_config: str = "so100", seed: int = 0) -> Path:
    """The random checkpoint of these settings in `directory`, written once. Its name begins with `name` and tells what is not the default."""
    path = directory / "-".join([name, size, *([data_config] if data_config != "so100" else []), *([f"seed{seed}"] if seed else [])])
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not ((path / "config.json").exists() and any((path / file).exists() for file in weights)):
        write_random_checkpoint(path, size, data_config, seed=seed)
    return path


def _put_in_place(finished: Path, out: Path) -> None:
    """Files of `out` that are no part of a checkpoint stay, such as exports. config.json comes last: it is what a checkpoint is known by."""
    if not out.exists():
        finished.rename(out)
        return
    for stale in (out / "config.json", *out.glob("model*.safetensors*")):
        stale.unlink(missing_ok=True)
    for file in sorted(finished.rglob("*"), key=lambda file: file == finished / "config.json"):
        if file.is_file():
            place = out / file.relative_to(finished)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)


def network_config(size: str, published_vocabulary: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and Eagle's config.json of a network of that size."""
    config, eagle = copy.deepcopy(PUBLISHED_CONFIG), copy.deepcopy(PUBLISHED_EAGLE)
    vision, text = eagle["vision_config"], eagle["text_config"]
    vision.update(model_type="siglip_vision_model", num_channels=3, hidden_act="gelu_pytorch_tanh", attention_dropout=0)
    text.update(model_type="qwen3", hidden_act="silu", attention_bias=False, rope_scaling=None, tie_word_embeddings=True)
    if size == "full":
        return config, eagle
    sizes, head = _SIZES[size], config["action_head_cfg"]
    vision.update(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), sizes["vision"], strict=True))
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    text.update(zip(keys, sizes["language"], strict=True))
    width, layers = text["hidden_size"], text["num_hidden_layers"]
    for name, part in (("diffusion_model_cfg", "dit"), ("vl_self_attention_cfg", "vl")):
        head[name].update(zip(("num_layers", "num_attention_heads", "attention_head_dim"), sizes[part], strict=True))
    head["diffusion_model_cfg"].update(cross_attention_dim=width, output_dim=sizes["hidden"])
    head.update(backbone_embedding_dim=width, hidden_size=sizes["hidden"], input_embedding_dim=math.prod(sizes["dit"][1:]))
    config.update(hidden_size=width)
    config["backbone_cfg"]["select_layer"] = layers
    if not published_vocabulary:
        tokenizer = byte_tokenizer()
        text["vocab_size"], eagle["image_token_index"] = tokenizer.get_vocab_size(), tokenizer.token_to_id(IMAGE_TOKEN)
    return config, eagle


def byte_tokenizer() -> Tokenizer:
    """One token per byte, plus the special tokens of the prompt: the smallest tokenizer that can read any instruction."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    return tokenizer


def _write_tokenizer(path: Path, image_token_id: int) -> None:
    """The image token gets the id that the configuration has; the library itself would complain of the unused ids below the published one."""
    content = json.loads(byte_tokenizer().to_str())
    for token in content["added_tokens"]:
        if token["content"] == IMAGE_TOKEN:
            token["id"] = image_token_id
        content["model"]["vocab"][token["content"]] = token["id"]
    _write_json(path, content)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _metadata(data_config: str, resolution: tuple[int, int]) -> dict[str, Any]:
    parts = {"single_arm": SO100_JOINTS[:-1], "gripper": SO100_JOINTS[-1:]}
    statistics = {part: _part_statistics([_RANGES_DEG[joint] for joint in joints]) for part, joints in parts.items()}
    shapes = {part: {"absolute": True, "rotation_type": None, "shape": [len(joints)], "continuous": True} for part, joints in parts.items()}
    camera = {"resolution": list(resolution), "channels": 3, "fps": 30.0}
    videos = {key.removeprefix("video."): camera for key in DATA_CONFIGS[data_config].video_keys}
    modalities = {"video": videos, "state": shapes, "action": shapes}
    entry = {"statistics": {"state": statistics, "action": statistics}, "modalities": modalities, "embodiment_tag": "new_embodiment"}
    return {"new_embodiment": entry}


def _part_statistics(ranges: list[tuple[float, float]]) -> dict[str, list[float]]:
    low, high = zip(*ranges, strict=True)
    mean = [(a + b) / 2 for a, b in ranges]
    std = [(b - a) / 4 for a, b in ranges]
    return {"min": list(low), "max": list(high), "mean": mean, "std": std, "q01": list(low), "q99": list(high)}


def _write_weights(out: Path, config: ModelConfig, seed: int, dtype: torch.dtype, max_shard_bytes: int) -> None:
    shapes = _published_shapes(config)
    shards = list(_shards(shapes, dtype, max_shard_bytes))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random_tensor(name, shapes[name], generator, dtype) for name in names}
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        print(f"wrote {file}: {len(names)} tensors", file=sys.stderr)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Gr00tN1d5(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        shapes.update(published_shapes(name, tuple(parameter.shape), config))
    return {**shapes, **_pooling_head_shapes(config)}


def _pooling_head_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """SigLIP's pooling head: published files hold it although the policy never uses it."""
    width, inner = config.vision.hidden_size, config.vision.intermediate_size
    prefix = UNUSED_PREFIXES[0]
    shapes = {"probe": (1, 1, width), "attention.in_proj_weight": (3 * width, width), "attention.in_proj_bias": (3 * width,)}
    for name, rows, columns in (("attention.out_proj", width, width), ("mlp.fc1", inner, width), ("mlp.fc2", width, inner)):
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})
    shapes.update({"layernorm.weight": (width,), "layernorm.bias": (width,)})
    return {prefix + name: shape for name, shape in shapes.items()}


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit_bytes: int) -> Iterator[list[str]]:
    names, filled = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if names and filled + size > limit_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Norm weights near 1, biases near 0, matrices scaled by their fan-in so that activations stay of order one."""
    is_norm = "norm" in name.rsplit(".", 2)[-2] or "vlln" in name
    if len(shape) == 1 and name.endswith("weight") and is_norm:
        return (1 + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    if len(shape) == 1 or name.endswith(".b"):
        return (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    fan_in = shape[1] if name.endswith(".W") else math.prod(shape[1:])
    scale = 0.02 if "embedding" in name or "embed_tokens" in name or "future_tokens" in name else fan_in**-0.5
    return torch.randn(shape, generator=generator).mul_(scale).to(dtype)


def random_network(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Gr00tN1d5:
    """A network of such weights, made where it runs: on a GPU in a second, without a file. On another device the numbers are others."""
    with torch.device("meta"):
        model = Gr00tN1d5(config).to(dtype)
    model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name.rsplit(".", 2)[-2] or "vlln" in name
        fan_in = parameter.shape[0] if "_encoder." in name or "_decoder." in name else math.prod(parameter.shape[1:])
        scale = 0.02 if parameter.dim() == 1 or ("embedding" in name and "patch" not in name) or "future_tokens" in name else fan_in**-0.5
        if parameter.dim() == 1 and name.endswith("weight") and is_norm:
            parameter.normal_(1.0, 0.1, generator=generator)
        else:
            parameter.normal_(0.0, scale, generator=generator)
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--size", choices=SIZES, default="demo", help="full: the published sizes, 4.7 GB")
    parser.add_argument("--data_config", choices=SO100_CONFIGS, default="so100")
    parser.add_argument("--resolution", type=int, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"), help="of the imagined training videos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_shard_bytes", type=int, default=_MAX_SHARD_BYTES, help="start another weight file beyond this")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of a checkpoint that is there")
    arguments = parser.parse_args(argv)
    written, code = attempt(lambda: _write_as_asked(arguments), "interrupted: no checkpoint was written")
    if written is not None:
        print(f"{written}: a GR00T N1.5 checkpoint of size '{arguments.size}' with RANDOM weights. Its actions mean nothing.")
    return code


def _write_as_asked(arguments: argparse.Namespace) -> Path:
    out: Path = arguments.out
    if out.is_dir() and any(out.iterdir()) and not arguments.overwrite:
        raise ConfigError(f"{out} exists and is not empty. Choose another --out, or say --overwrite.")
    resolution = tuple(arguments.resolution)
    return write_random_checkpoint(out, arguments.size, arguments.data_config, resolution, arguments.seed, max_shard_bytes=arguments.max_shard_bytes)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
