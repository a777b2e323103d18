"""Write a checkpoint with random weights in NVIDIA's published format: for demonstrations, tests and timing where no real one is at hand.

    gr00t-fast random-checkpoint --size=demo --out=outputs/demo/checkpoint
    gr00t-fast random-checkpoint --network=n1.7 --size=demo --out=outputs/demo/n1d7        (or n1.6)

It carries a small tokenizer of its own (every byte is a token), so nothing is downloaded. What it does with an arm means nothing.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gr00t_fast.base.contracts import SO100_JOINTS, NetworkName
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.inputs.data_config import DATA_CONFIGS
from gr00t_fast.model import Gr00t
from gr00t_fast.model.config import ModelConfig, QwenVisionConfig, Siglip2VisionConfig, VisionConfig
from gr00t_fast.networks import n1d5, n1d6, n1d7
from gr00t_fast.networks.n1d5 import PUBLISHED_EAGLE
from gr00t_fast.networks.n1d7 import BACKBONE_FILE
from gr00t_fast.networks.spec import published_shapes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_IMAGE_TOKENS = {"n1.5": n1d5.IMAGE_TOKEN, "n1.6": n1d6.IMAGE_TOKEN, "n1.7": n1d7.IMAGE_TOKEN}
_SPECIAL_TOKENS = {
    **dict.fromkeys(("n1.5", "n1.6"), (*_CHAT_TOKENS, n1d5.IMAGE_TOKEN, "<img>", "</img>")),
    "n1.7": (*_CHAT_TOKENS, "<|vision_start|>", "<|vision_end|>", n1d7.IMAGE_TOKEN),
}
# Those that would make a checkpoint of the one network be taken for the other's.
_TELLING_FILES = ("config.json", BACKBONE_FILE, "processor_config.json", "experiment_cfg/metadata.json")
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
# vision: width, inner, layers, heads, of N1.7 deepstack, and of N1.6 and N1.7 positions; language: width, inner, layers, heads, kv heads, head dim;
# sections of N1.7's rotary frequencies; dit and vl: layers, heads, head dim
_SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("n1.5", "tiny"): {"vision": (32, 64, 1, 2), "language": (32, 64, 1, 4, 2, 8), "hidden": 32, "dit": (2, 4, 8), "vl": (1, 4, 8)},
    ("n1.5", "demo"): {"vision": (96, 256, 3, 4), "language": (128, 256, 3, 4, 2, 32), "hidden": 96, "dit": (4, 4, 32), "vl": (1, 4, 32)},
    ("n1.6", "tiny"): {"vision": (32, 64, 2, 2, 36), "language": (32, 64, 3, 4, 2, 8), "hidden": 32, "dit": (4, 4, 8)},
    ("n1.6", "demo"): {"vision": (96, 256, 4, 4, 256), "language": (128, 256, 4, 4, 2, 32), "hidden": 96, "dit": (8, 4, 32)},
    ("n1.7", "tiny"): {
        **{"vision": (32, 64, 3, 2, [0, 1], 36), "language": (32, 64, 3, 4, 2, 8), "sections": [2, 1, 1]},
        **{"hidden": 32, "dit": (4, 4, 8), "vl": (1, 4, 8)},
    },
    ("n1.7", "demo"): {
        **{"vision": (96, 256, 4, 4, [0, 1, 2], 144), "language": (128, 256, 4, 4, 2, 32), "sections": [6, 5, 5]},
        **{"hidden": 96, "dit": (8, 4, 32), "vl": (1, 4, 32)},
    },
}
SIZES = ("tiny", "demo", "full")
_VISION_KEYS = {
    "n1.5": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "n1.6": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_patches"),
    "n1.7": ("hidden_size", "intermediate_size", "depth", "num_heads", "deepstack_visual_indexes", "num_position_embeddings"),
}
_LANGUAGE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
SO100_CONFIGS = tuple(name for name, config in DATA_CONFIGS.items() if config.action_keys == DATA_CONFIGS["so100"].action_keys)


def write_random_checkpoint(
    out: Path,
    size: str = "demo",
    data_config: str = "so100",
    resolution: tuple[int, int] = (640, 480),
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    published_tokenizer: bool = False,
    weights: bool = True,
    network: NetworkName = "n1.5",
    frame_offsets: tuple[int, ...] = (0,),
) -> Path:
    """Create directory `out`. Size `full` has the published sizes (2.4 billion parameters, N1.6 3.0, N1.7 3.1). Raises ConfigError.

    resolution: (width, height), of N1.5's training videos; the others' files do not say it. frame_offsets: times of their pictures, steps back from
    now.

    One that was interrupted is never taken for a checkpoint. Other files of `out` stay, such as exports.
    `weights=False`: the small files alone, for a network of `random_network`.
    `published_tokenizer`: keep the published vocabulary and image token id and write no tokenizer files (pass --processor_path when loading).
    """
    if size not in SIZES or data_config not in SO100_CONFIGS:
        raise ConfigError(f"size must be one of {', '.join(SIZES)} and data_config one of {', '.join(SO100_CONFIGS)}; got '{size}', '{data_config}'.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a directory for the checkpoint, or a name that is free.")
    config, backbone = network_config(size, published_tokenizer or size == "full", network)
    if network == "n1.5":
        files = {"eagle2_hg_model/config.json": backbone, "experiment_cfg/metadata.json": metadata_of_random(data_config, resolution)}
        tokenizer = "eagle2_hg_model/tokenizer.json"
    else:
        processor, statistics = (processor_n1d7 if network == "n1.7" else _processor_n1d6)(data_config, frame_offsets)
        files = {"processor_config.json": processor, "statistics.json": statistics, "embodiment_id.json": {"new_embodiment": 10}}
        files |= {} if size == "full" else {BACKBONE_FILE: backbone}
        tokenizer = "tokenizer.json"
    sizes = _NETWORKS[network].read_config(config, backbone)
    for stale in (*(out / name for name in _TELLING_FILES), *out.glob("model*.safetensors*")):
        stale.unlink(missing_ok=True)
    if not published_tokenizer:
        write_tokenizer(out / tokenizer, sizes.language.image_token_id, network)
    for name, content in files.items():
        write_json(out / name, content)
    if weights:
        write_weights(out, sizes, seed, dtype, _MAX_SHARD_BYTES)
    write_json(out / "config.json", config)  # last: it is what a checkpoint is known by
    return out


def network_config(size: str, published_vocabulary: bool, network: NetworkName = "n1.5") -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, and Eagle's config.json or the backbone_config.json of N1.6 and N1.7, of a network of that size."""
    if size != "full":
        return sized_config(network, _SIZES[network, size], published_vocabulary)
    module = _NETWORKS[network]
    config, backbone = copy.deepcopy((module.PUBLISHED_CONFIG, PUBLISHED_EAGLE if network == "n1.5" else module.PUBLISHED_BACKBONE))
    if network == "n1.5":
        backbone["vision_config"].update(model_type="siglip_vision_model", num_channels=3, hidden_act="gelu_pytorch_tanh", attention_dropout=0)
        backbone["text_config"].update(model_type="qwen3", hidden_act="silu", attention_bias=False, rope_scaling=None, tie_word_embeddings=True)
    return config, backbone


def sized_config(network: NetworkName, sizes: Mapping[str, Any], published_vocabulary: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `network_config`, of sizes with the keys that `_SIZES` has."""
    config, backbone = network_config("full", True, network)
    vision, text, of_head = backbone["vision_config"], backbone["text_config"], config
    vision.update(zip(_VISION_KEYS[network], sizes["vision"], strict=True))
    text.update(zip(_LANGUAGE_KEYS, sizes["language"], strict=True))
    width, layers = text["hidden_size"], text["num_hidden_layers"]
    if network == "n1.5":
        of_head = config["action_head_cfg"]
        of_head["diffusion_model_cfg"].update(cross_attention_dim=width)
        config.update(hidden_size=width)
        config["backbone_cfg"]["select_layer"] = layers
    else:
        config.update(select_layer=layers, max_num_embodiments=16, max_seq_len=64)
    if network == "n1.7":
        vision["out_hidden_size"], text["rope_scaling"]["mrope_section"] = width, sizes["sections"]
    for name, part in (("diffusion_model_cfg", "dit"), ("vl_self_attention_cfg", "vl"))[: 1 if network == "n1.6" else 2]:
        of_head[name].update(zip(("num_layers", "num_attention_heads", "attention_head_dim"), sizes[part], strict=True))
    of_head["diffusion_model_cfg"].update(output_dim=sizes["hidden"])
    of_head.update(backbone_embedding_dim=width, hidden_size=sizes["hidden"], input_embedding_dim=math.prod(sizes["dit"][1:]))
    if not published_vocabulary:
        tokenizer, key = byte_tokenizer(_SPECIAL_TOKENS[network]), "image_token_id" if network == "n1.7" else "image_token_index"
        text["vocab_size"], backbone[key] = tokenizer.get_vocab_size(), tokenizer.token_to_id(_IMAGE_TOKENS[network])
    return config, backbone


def byte_tokenizer(special_tokens: Sequence[str] = _SPECIAL_TOKENS["n1.5"]) -> Tokenizer:
    """One token per byte, plus the special tokens of the prompt: the smallest tokenizer that can read any instruction."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return tokenizer


def write_tokenizer(path: Path, image_token_id: int, network: NetworkName = "n1.5") -> None:
    """The image token gets the id that the configuration has; the library itself would complain of the unused ids below the published one."""
    content = json.loads(byte_tokenizer(_SPECIAL_TOKENS[network]).to_str())
    for token in content["added_tokens"]:
        if token["content"] == _IMAGE_TOKENS[network]:
            token["id"] = image_token_id
        content["model"]["vocab"][token["content"]] = token["id"]
    write_json(path, content)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def metadata_of_random(data_config: str, resolution: tuple[int, int]) -> dict[str, Any]:
    parts = {"single_arm": SO100_JOINTS[:-1], "gripper": SO100_JOINTS[-1:]}
    statistics = {part: _part_statistics([_RANGES_DEG[joint] for joint in joints]) for part, joints in parts.items()}
    shapes = {part: {"absolute": True, "rotation_type": None, "shape": [len(joints)], "continuous": True} for part, joints in parts.items()}
    camera = {"resolution": list(resolution), "channels": 3, "fps": 30.0}
    videos = {key.removeprefix("video."): camera for key in DATA_CONFIGS[data_config].video_keys}
    modalities = {"video": videos, "state": shapes, "action": shapes}
    entry = {"statistics": {"state": statistics, "action": statistics}, "modalities": modalities, "embodiment_tag": "new_embodiment"}
    return {"new_embodiment": entry}


def processor_n1d7(data_config: str, frame_offsets: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """processor_config.json and statistics.json of the same imagined recordings: an arm relative to its pose, an absolute gripper."""
    known = DATA_CONFIGS[data_config]
    steps, unlisted = list(known.action_indices), dict.fromkeys(("sin_cos_embedding_keys", "mean_std_embedding_keys", "action_configs"))
    parts = ["single_arm", "gripper"]
    plain = {"type": "NON_EEF", "format": "DEFAULT", "state_key": None}
    modalities = {
        "video": {**unlisted, "delta_indices": list(frame_offsets), "modality_keys": [key.removeprefix("video.") for key in known.video_keys]},
        "state": {**unlisted, "delta_indices": [0], "modality_keys": parts},
        "action": {**unlisted, "delta_indices": steps, "modality_keys": parts},
        "language": {**unlisted, "delta_indices": [0], "modality_keys": [known.language_key]},
    }
    modalities["action"]["action_configs"] = [{"rep": "RELATIVE", **plain}, {"rep": "ABSOLUTE", **plain}]
    settings = {"image_crop_size": [230, 230], "image_target_size": [256, 256], "use_albumentations": True, "shortest_image_edge": 256}
    settings |= {"crop_fraction": 0.95, "letter_box_transform": False, "model_type": "qwen", "formalize_language": True, "max_state_dim": 132}
    settings |= {"max_action_dim": 132, "max_action_horizon": 40, "use_percentiles": True, "use_mean_std": False, "clip_outliers": True}
    settings |= {"apply_sincos_state_encoding": False, "use_relative_action": True, "exclude_state": False}
    absolute = metadata_of_random(data_config, (640, 480))["new_embodiment"]["statistics"]
    arm_joints = len(_RANGES_DEG) - 1
    rows = [_part_statistics([(-2.0 - step, 2.0 + step)] * arm_joints) for step in steps]  # degrees away from the pose, step by step
    relative = {"single_arm": {name: [row[name] for row in rows] for name in rows[0]}}
    processor = {"processor_class": "Gr00tN1d7Processor", "processor_kwargs": {"modality_configs": {"new_embodiment": modalities}, **settings}}
    return processor, {"new_embodiment": {**absolute, "relative_action": relative}}


def _processor_n1d6(data_config: str, frame_offsets: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `processor_n1d7`, as N1.6's training writes it."""
    processor, statistics = processor_n1d7(data_config, frame_offsets)
    settings = processor["processor_kwargs"]
    processor["processor_class"] = "Gr00tN1d6Processor"
    for key in ("letter_box_transform", "use_mean_std", "exclude_state"):
        del settings[key]
    settings |= {"image_crop_size": None, "image_target_size": None, "model_name": "nvidia/Eagle-Block2A-2B-v2", "model_type": "eagle"}
    settings |= {"max_state_dim": 128, "max_action_dim": 128, "max_action_horizon": 50, "use_percentiles": False, "apply_sincos_state_encoding": True}
    return processor, statistics


_NETWORKS: dict[str, Any] = {"n1.5": n1d5, "n1.6": n1d6, "n1.7": n1d7}


def _part_statistics(ranges: list[tuple[float, float]]) -> dict[str, list[float]]:
    low, high = zip(*ranges, strict=True)
    mean = [(a + b) / 2 for a, b in ranges]
    std = [(b - a) / 4 for a, b in ranges]
    return {"min": list(low), "max": list(high), "mean": mean, "std": std, "q01": list(low), "q99": list(high)}


def write_weights(out: Path, config: ModelConfig, seed: int, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """One shard is in memory at a time."""
    shapes, generator, filled = _published_shapes(config), torch.Generator().manual_seed(seed), 0
    shards: list[list[str]] = [[]]
    for name, shape in shapes.items():
        filled += math.prod(shape) * dtype.itemsize
        if shards[-1] and filled > max_shard_bytes:
            shards.append([])
            filled = math.prod(shape) * dtype.itemsize
        shards[-1].append(name)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)] if shards[1:] else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        save_file({name: random_tensor(name, shapes[name], generator, dtype) for name in names}, out / file, metadata={"format": "pt"})
        print(f"wrote {file}: {len(names)} tensors", file=sys.stderr)
    if shards[1:]:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Gr00t(config)
    module = {QwenVisionConfig: n1d7, Siglip2VisionConfig: n1d6, VisionConfig: n1d5}[type(config.vision)]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        shapes.update(published_shapes(module.WEIGHTS, name, tuple(parameter.shape), config))
    if module is n1d7:  # the final norm that published files hold and nothing reads
        return {**shapes, f"{n1d7.UNUSED[-1]}weight": (config.language.hidden_size,)}
    if module is n1d6:  # likewise the language head
        shapes[f"{n1d6.UNUSED[1]}weight"] = (config.language.vocab_size, config.language.hidden_size)
    return {**shapes, **_pooling_head_shapes(config, module.UNUSED[0])}


def _pooling_head_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """SigLIP's pooling head: published files hold it although the policy never uses it."""
    width, inner = config.vision.hidden_size, config.vision.intermediate_size
    shapes = {"probe": (1, 1, width), "attention.in_proj_weight": (3 * width, width), "attention.in_proj_bias": (3 * width,)}
    for name, rows, columns in (("attention.out_proj", width, width), ("mlp.fc1", inner, width), ("mlp.fc2", width, inner)):
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})
    shapes.update({"layernorm.weight": (width,), "layernorm.bias": (width,)})
    return {prefix + name: shape for name, shape in shapes.items()}


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation: norm weights near 1, biases near 0, matrices scaled by their fan-in so that activations stay of order one."""
    is_norm = "norm" in name.rsplit(".", 2)[-2] or "vlln" in name
    if len(shape) == 1 or name.endswith(".b"):
        return (1.0, 0.1) if is_norm and name.endswith("weight") else (0.0, 0.02)
    if "embedding" in name or "embed_tokens" in name or "future_tokens" in name:
        return 0.0, 0.02
    by_category = any(part in name for part in ("state_encoder.", "action_encoder.", "action_decoder."))  # stored [in, out]
    return 0.0, (shape[-2] if by_category else math.prod(shape[1:])) ** -0.5


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    mean, deviation = _distribution(name, shape)
    return (mean + deviation * torch.randn(shape, generator=generator)).to(dtype)


def random_network(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Gr00t:
    """A network of such weights, made where it runs: on a GPU in a second, without a file. On another device the numbers are others."""
    with torch.device("meta"):
        model = Gr00t(config).to(dtype)
    model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(*_distribution(name, tuple(parameter.shape)), generator=generator)
    return model
