"""The network that is trained: its sizes, tokenizer and first weights, its loss, and how it becomes a checkpoint in the published format.

Everything is that of GR00T N1.5 but the sizes: one camera at 112 pixels (64 image tokens), about a million weights for one embodiment. The loss is
flow matching on the modules of `gr00t_fast.model`, whose tables hold one time for all items of a batch: inference needs no more. Training draws a
time per item; `item_tables` makes tables with an item axis, which `ActionHead.velocity` takes as they are. A test compares the
two.

Axis alphabet: B batch, K draws of noise and time per observation, V image tokens, H horizon, A padded action width, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.model import Gr00t, ModelInputs
from gr00t_fast.model.action_head import ActionHead, Condition
from gr00t_fast.model.config import ModelConfig
from gr00t_fast.model.layers import CategoryLinear
from gr00t_fast.networks.n1d5 import EMBODIMENT_ROWS, IMAGE_TOKEN, WEIGHTS, render_prompt
from gr00t_fast.networks.spec import Layout, published_shapes, sources_of
from gr00t_fast.virtual.random_checkpoint import network_config

# --- sizes, tokenizer, first weights ------------------------------------------------------------------------------------------------------------

EMBODIMENT_TAG = "new_embodiment"
INSTRUCTIONS = (  # of training; the first is the one that is documented
    "Reach the block",
    "Reach for the red block",
    "Move to the block",
    "Go to the red block",
    "Move the gripper to the block",
)
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE_TOKEN, "<img>", "</img>")
_VOCABULARY = 384  # 256 bytes, the special tokens, and merges of what prompts say
_WIDTH, _HEADS, _HEAD_DIM = 96, 4, 24
_FUTURE_TOKENS = 8  # published: 32; they are scratch space of the diffusion transformer


def configuration(tokenizer: Tokenizer, image_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and Eagle's config.json."""
    config, eagle = network_config("tiny", published_vocabulary=False)
    vision, text, head = eagle["vision_config"], eagle["text_config"], config["action_head_cfg"]
    vision.update(hidden_size=_WIDTH, intermediate_size=256, num_hidden_layers=3, num_attention_heads=_HEADS, image_size=image_size)
    text.update(hidden_size=_WIDTH, intermediate_size=192, num_hidden_layers=1, num_attention_heads=_HEADS, num_key_value_heads=2, head_dim=_HEAD_DIM)
    text.update(vocab_size=tokenizer.get_vocab_size())
    eagle.update(image_token_index=tokenizer.token_to_id(IMAGE_TOKEN))
    for name, layers in (("diffusion_model_cfg", 4), ("vl_self_attention_cfg", 1)):
        head[name].update(num_layers=layers, num_attention_heads=_HEADS, attention_head_dim=_HEAD_DIM)
    head["diffusion_model_cfg"].update(cross_attention_dim=_WIDTH, output_dim=_WIDTH)
    head.update(
        backbone_embedding_dim=_WIDTH, hidden_size=_WIDTH, input_embedding_dim=_WIDTH, num_target_vision_tokens=_FUTURE_TOKENS, max_seq_len=16
    )
    config.update(hidden_size=_WIDTH)
    config["backbone_cfg"]["select_layer"] = 1
    return config, eagle


def small_tokenizer() -> Tokenizer:
    """A byte-level BPE in the manner of Qwen2's, whose merges are those of the prompt: it reads any instruction, and ours in few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - len(_SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1, show_progress=False
    )
    prompts = [render_prompt(text, images=1, tokens=0) for text in (*INSTRUCTIONS, "Place the block in the bowl")]
    for token in _SPECIAL_TOKENS:
        prompts = [prompt.replace(token, " ") for prompt in prompts]
    tokenizer.train_from_iterator(prompts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    return tokenizer


def new_network(config: ModelConfig, seed: int) -> Gr00t:
    """Trainable, fp32, on the CPU, with first weights from `seed`."""
    model = Gr00t(config)
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)
    with torch.no_grad():
        # Small random positions keep a network of this size from ever finding where things are; waves in two dimensions do not.
        model.vision.position_embedding.weight.copy_(grid_positions(config.vision.image_size // config.vision.patch_size, _WIDTH))
    begin_quietly(model.head)
    return model


@torch.no_grad()
def begin_quietly(head: ActionHead) -> None:
    """AdaLN begins as a plain norm, and the padded joints carry nothing: their noise is not seen and their velocity is 0, so it stays noise."""
    for block in head.dit.blocks:
        block.ada_norm.weight.zero_()
    head.dit.out_modulation.weight.zero_()
    joints = len(SO100_JOINTS)
    head.state_encoder.layer1.weight[joints:].zero_()
    head.action_encoder.w1.weight[joints:].zero_()
    head.action_decoder.layer2.weight[:, joints:].zero_()


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """First weights of every layer, in the order of `modules()`."""
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Linear | nn.Conv2d | CategoryLinear):
            fan_in = module.weight.shape[0] if isinstance(module, CategoryLinear) else math.prod(module.weight.shape[1:])
            module.weight.normal_(0, fan_in**-0.5, generator=generator)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 0.5, generator=generator)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.weight.fill_(1)
        else:
            continue
        if bias is not None:
            bias.zero_()


def grid_positions(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of the row, then of the column, wavelengths from 2 pi to 200 pi patches."""
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    waves = torch.arange(side)[:, None] * frequencies  # (side, width/4)
    table = torch.cat((waves.sin(), waves.cos()), dim=1)  # (side, width/2)
    rows, columns = table[:, None].expand(-1, side, -1), table[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=2).reshape(side * side, width)


# --- the published format -----------------------------------------------------------------------------------------------------------------


def published_tensors(model: Gr00t, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's weights under their published names; of the per-embodiment ones only our row is not zero. The way back of checkpoint/load.py."""
    tensors: dict[str, Tensor] = {}
    row = EMBODIMENT_ROWS[EMBODIMENT_TAG]
    for name, parameter in model.named_parameters():
        shapes, start = published_shapes(WEIGHTS, name, tuple(parameter.shape), model.config), 0
        for source, shape in shapes.items():
            if sources_of(WEIGHTS, name).layout is Layout.CATEGORY:
                tensors[source] = torch.zeros(shape, dtype=dtype)
                tensors[source][row] = parameter.detach().cpu()
            else:
                tensors[source] = parameter.detach()[start : start + shape[0]].to("cpu", dtype).contiguous()
                start += shape[0]
    return tensors


def write_checkpoint(out: Path, model: Gr00t, dicts: tuple[dict[str, Any], dict[str, Any]], metadata: Mapping[str, Any], dtype: torch.dtype) -> None:
    """A directory that `gr00t_fast.load_policy` opens. `dicts` as from `configuration`."""
    eagle = out / "eagle2_hg_model"
    eagle.mkdir(parents=True, exist_ok=True)
    (out / "experiment_cfg").mkdir(exist_ok=True)
    for path, value in ((out / "config.json", dicts[0]), (eagle / "config.json", dicts[1]), (out / "experiment_cfg" / "metadata.json", metadata)):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    small_tokenizer().save(str(eagle / "tokenizer.json"))
    save_file(published_tensors(model, dtype), out / "model.safetensors", metadata={"format": "pt"})


# --- the loss -----------------------------------------------------------------------------------------------------------------------------------

# Of the published config.json (noise_beta_alpha, noise_s; noise_beta_beta is 1): more often near the noise than near the action.
_BETA_ALPHA, _NOISE_S = 1.5, 0.999
_PATCH_SIGMA = 0.6  # width in patches of the target of `finding_loss`


def item_tables(head: ActionHead, buckets: Tensor) -> tuple[Tensor, Tensor]:
    """Buckets int64 (B,) -> tau (B, 1, D) and modulation (blocks + 1, 2, B, 1, D): the model's own tables with an item axis."""
    time = F.silu(head.dit.time(buckets))  # (B, D)
    pairs = [block.ada_norm(time).chunk(2, dim=-1) for block in head.dit.blocks]  # scale, shift
    pairs.append(head.dit.out_modulation(time).chunk(2, dim=-1)[::-1])  # stored as shift, scale: the other order
    modulation = torch.stack([torch.stack((1 + scale, shift)) for scale, shift in pairs])  # (blocks + 1, 2, B, D)
    return head.action_encoder.tau(buckets)[:, None], modulation.unsqueeze(3)


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """(count,) in [0, 1): (s - b) / s with b from Beta(1.5, 1), drawn by inverting its distribution b**1.5."""
    b = torch.rand(count, generator=generator) ** (1 / _BETA_ALPHA)
    return ((_NOISE_S - b) / _NOISE_S).clamp(min=0.0)


def finding_loss(scores: Tensor, block: Tensor) -> Tensor:
    """Where is the block? Scores (B, V) of the refined image tokens, block (B, 2) in 0..1 from left and top -> mean cross-entropy with a bump over
    the patches at the block. For training only: without it so small a network seldom starts to look."""
    side = math.isqrt(scores.shape[1])
    centres = (torch.arange(side, device=block.device) + 0.5) / side
    across, down = (-(((centres - block[:, axis, None]) * side / _PATCH_SIGMA) ** 2) / 2 for axis in (0, 1))  # (B, side) each
    return F.cross_entropy(scores, (down[:, :, None] + across[:, None, :]).flatten(1).softmax(-1))  # rows first


def losses(
    model: Gr00t, finder: nn.Linear, inputs: ModelInputs, actions: Tensor, block: Tensor, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the velocity over the joints of `actions` (B, H, joints), which are normalised, at `draws` noises and times per item; and
    the loss of the block finder for block (B, 2)."""
    head = model.head
    features = head.refine(model.encode_language(inputs, model.encode_vision(inputs.pixel_values)))  # (B, S, D)
    finding = finding_loss(finder(features[:, inputs.image_positions]).squeeze(-1), block)
    once = head.condition(features, inputs.state)  # what an observation costs is paid once for several draws
    cross = [(k.repeat_interleave(draws, 0), v.repeat_interleave(draws, 0)) for k, v in once.cross]
    condition = Condition(once.prefix.repeat_interleave(draws, 0), cross, None)
    actions = actions.repeat_interleave(draws, 0)  # (B*K, H, joints)
    noise = torch.randn(actions.shape, generator=generator).to(actions)
    times = draw_times(len(actions), generator).to(actions)
    noisy = torch.lerp(noise, actions, times[:, None, None])
    padded = F.pad(noisy, (0, head.config.action_dim - noisy.shape[-1]))  # zeros: see begin_quietly
    velocity = head.velocity(padded, condition, *item_tables(head, (times * head.config.timestep_buckets).long()))[..., : actions.shape[-1]]
    return F.mse_loss(velocity, actions - noise), finding
