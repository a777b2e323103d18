"""ACT, Diffusion and SmolVLA through lerobot and GR00T N1.5 through gr00t_fast, behind one small interface, with random weights, offline.

What counts in a comparison: every arm starts from the same raw observation (uint8 frames, joints in degrees) and ends with one action on the
host, and says whether an action was waiting in its queue. lerobot's loop converts the observation on every tick, so its arms do.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.program import checkpoint_in
from gr00t_fast.base.errors import require
from gr00t_fast.virtual.random_checkpoint import byte_tokenizer, write_json

JOINTS = 6
_SMOLVLA_PROMPT_TOKENS = 10  # a short instruction in SmolVLM's own tokenizer
_GR00T_ACTION_KEYS = ("action.single_arm", "action.gripper")


@dataclass(frozen=True)
class Setting:
    """What all arms have in common. `published`: the sizes of the papers; otherwise small networks of the same architecture."""

    published: bool
    cameras: tuple[str, ...]
    resolution: tuple[int, int]  # width, height
    device: torch.device
    dtype: torch.dtype
    scratch: Path
    seed: int = 0


class LerobotArm:
    """A lerobot policy with its own queue, which is looked at and never touched.

    Of every arm: name, dtype, parameters, actions_per_chunk; `waiting`: actions in the queue (where there are none, the next call computes a chunk);
    `act`: raw observation (`frames` by camera, `joints`) -> one action (J,); `reset` empties the queue. `policy`: lerobot's own object.
    """

    def __init__(self, name: str, policy: Any, queue: Callable[[], Any], chunk: int, setting: Setting, extra: Mapping[str, torch.Tensor]) -> None:
        self.name, self.actions_per_chunk = name, chunk
        self.policy, self._queue, self._setting, self._extra = policy.to(setting.device).eval(), queue, setting, extra
        self.parameters = sum(parameter.numel() for parameter in policy.parameters())
        self.dtype = "+".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in policy.parameters()}))
        self.reset()

    @property
    def waiting(self) -> int:
        return len(self._queue())

    @torch.inference_mode()
    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        device = self._setting.device
        batch = {"observation.state": torch.from_numpy(observation["joints"]).float()[None].to(device)}
        for name, frame in observation["frames"].items():
            pixels = torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
            batch[f"observation.images.{name}"] = pixels
        return self.policy.select_action(batch | dict(self._extra)).float().cpu().numpy()[0]

    def reset(self) -> None:
        self.policy.reset()


class Gr00tArm:
    """gr00t_fast's policy; the queue is ours, as in the control loop."""

    name = "gr00t_n1.5"

    def __init__(self, policy: Any) -> None:
        self._policy, self._queue = policy, deque()
        self.dtype = str(policy.dtype).removeprefix("torch.")
        self.parameters = sum(parameter.numel() for parameter in policy.engine.model.parameters())
        self.actions_per_chunk = policy.action_horizon
        self._keys = tuple(policy.get_modality_config()["video"].modality_keys)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        if not self._queue:
            joints, frames = observation["joints"], observation["frames"].values()
            given = {key: frame[None] for key, frame in zip(self._keys, frames, strict=True)}
            given |= {"state.single_arm": joints[None, :5], "state.gripper": joints[None, 5:]}
            actions = self._policy.get_action(given | {"annotation.human.task_description": ["Place the block in the bowl"]})
            self._queue.extend(np.concatenate([actions[key] for key in _GR00T_ACTION_KEYS], axis=-1))
        return self._queue.popleft()

    def reset(self) -> None:
        self._queue.clear()
        self._policy.reset()


Arm = LerobotArm | Gr00tArm


def observation_of(setting: Setting, generator: np.random.Generator) -> dict[str, Any]:
    """Random frames and joints: never zeros, which can run faster."""
    width, height = setting.resolution
    frames = {name: generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for name in setting.cameras}
    return {"frames": frames, "joints": generator.uniform(-30, 30, JOINTS)}


def build_act(setting: Setting) -> Arm:
    require("lerobot", "robot")
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    small = {} if setting.published else {"dim_model": 64, "n_heads": 4, "dim_feedforward": 128, "n_encoder_layers": 1, "latent_dim": 8}
    config = ACTConfig(**_features(setting), pretrained_backbone_weights=None, device=str(setting.device), **small)
    policy = ACTPolicy(config)
    return LerobotArm("act", policy, lambda: policy._action_queue, config.n_action_steps, setting, {})


def build_diffusion(setting: Setting, scheduler: str = "DDPM", inference_steps: int | None = None) -> Arm:
    require("lerobot", "robot")
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    small = {} if setting.published else {"down_dims": (32, 64, 128), "num_train_timesteps": 10, "spatial_softmax_num_keypoints": 8}
    options = {"noise_scheduler_type": scheduler, "num_inference_steps": inference_steps, "device": str(setting.device), **small}
    policy = DiffusionPolicy(DiffusionConfig(**_features(setting), **options))
    name = "diffusion" if scheduler == "DDPM" else f"diffusion_{scheduler.lower()}{inference_steps}"
    return LerobotArm(name, policy, lambda: policy._queues["action"], policy.config.n_action_steps, setting, {})


def build_smolvla(setting: Setting) -> Arm:
    require("num2words", "bench")
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    with tempfile.TemporaryDirectory(dir=setting.scratch) as directory:
        write_smolvlm(Path(directory), setting.published)
        small = {} if setting.published else {"num_vlm_layers": 2, "num_steps": 2, "resize_imgs_with_padding": (64, 64)}
        options = {"vlm_model_name": directory, "load_vlm_weights": False, "device": str(setting.device), **small}
        policy = SmolVLAPolicy(SmolVLAConfig(**_features(setting), **options))
    if setting.dtype == torch.bfloat16:
        policy.model.vlm_with_expert.to(torch.bfloat16)  # the projections around it stay fp32, as lerobot trains them
    generator = torch.Generator().manual_seed(setting.seed)
    tokens = torch.randint(5, 200, (1, _SMOLVLA_PROMPT_TOKENS), generator=generator).to(setting.device)
    extra = {"observation.language.tokens": tokens, "observation.language.attention_mask": torch.ones_like(tokens, dtype=torch.bool)}
    return LerobotArm("smolvla", policy, lambda: policy._queues["action"], policy.config.n_action_steps, setting, extra)


def build_gr00t(setting: Setting) -> Arm:
    from gr00t_fast.policy import load_policy

    data_config = "so100" if len(setting.cameras) == 1 else "so100_dualcam"
    path = checkpoint_in(setting.scratch, "gr00t", "full" if setting.published else "tiny", data_config, setting.seed)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[setting.dtype]
    policy = load_policy(path, data_config=data_config, device=str(setting.device), precision=precision, seed=setting.seed)
    policy.warm_up()
    return Gr00tArm(policy)


BUILDERS: dict[str, Callable[[Setting], Arm]] = {
    "act": build_act,
    "diffusion": build_diffusion,
    "diffusion_ddim": lambda setting: build_diffusion(setting, "DDIM", 10 if setting.published else 2),
    "smolvla": build_smolvla,
    "gr00t": build_gr00t,
}


def _features(setting: Setting) -> dict[str, Any]:
    from lerobot.configs.types import FeatureType, PolicyFeature

    width, height = setting.resolution
    images = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, height, width)) for name in setting.cameras}
    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (JOINTS,)), **images}
    return {"input_features": inputs, "output_features": {"action": PolicyFeature(FeatureType.ACTION, (JOINTS,))}}


_SMOLVLM_TEXT = (960, 2560, 32, 15, 5, 64)  # SmolVLM2-500M
_SMOLVLM_VISION = (768, 3072, 12, 12, 512)
_SMALL_TEXT = (64, 128, 2, 4, 2, 16)
_SMALL_VISION = (32, 64, 1, 2, 64)
_SPECIAL = ("<|endoftext|>", "<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>")


def write_smolvlm(directory: Path, published: bool) -> None:
    """What lerobot reads of a SmolVLM2-500M to build its architecture: sizes, and a byte tokenizer with the two tokens it asks for."""
    width, inner, layers, heads, kv_heads, head_dim = _SMOLVLM_TEXT if published else _SMALL_TEXT
    text = {"model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": head_dim}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "rope_theta": 1e5, "rms_norm_eps": 1e-5, "vocab_size": 49280}
    width, inner, layers, heads, picture = _SMOLVLM_VISION if published else _SMALL_VISION
    vision = {"model_type": "smolvlm_vision", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": heads, "image_size": picture, "patch_size": 16}
    config = {"model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"], "text_config": text, "vision_config": vision}
    write_json(directory / "config.json", config | {"image_token_id": 49190, "scale_factor": 4, "tie_word_embeddings": False})
    write_json(directory / "preprocessor_config.json", {"image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor"})
    names = dict(zip(("fake_image_token", "global_image_token", "image_token", "end_of_utterance_token"), _SPECIAL[1:], strict=True))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "SmolVLMProcessor", "chat_template": "{{ messages }}"}
    tokenizer |= {"extra_special_tokens": names, "eos_token": _SPECIAL[0], "pad_token": _SPECIAL[0]}
    write_json(directory / "tokenizer_config.json", tokenizer)
    byte_tokenizer(_SPECIAL).save(str(directory / "tokenizer.json"))
