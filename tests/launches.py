"""How many kernels a call would launch on a GPU that is not there: counted on tensors of device "cuda" that have no memory, at the published size.

Counted is what torch's dispatcher is asked for, views aside, and what Triton would launch: an operation is one launch as a rule, two where a library
splits a product. What runs concurrently, and for how long, no count can say.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gr00t_fast.config import ModelConfig
from gr00t_fast.config_n1d7 import config_n1d7
from gr00t_fast.engine.fused import FusedModel
from gr00t_fast.model import Condition, ModelInputs, Network, network
from gr00t_fast.random_checkpoint import network_config, network_config_n1d7


@dataclass(frozen=True)
class OneCamera:
    """An observation with one picture and an instruction of eight tokens. depths: layers of towers that show what a further layer launches."""

    prompt_tokens: int
    image_tokens: int
    frame: tuple[int, int, int, int]
    picture: int  # pixels per side, to the network
    depths: tuple[int, int]


# N1.7's transformer repeats every four blocks, and its first three language layers have something behind them.
CASES = {"n1.5": OneCamera(288, 256, (1, 480, 640, 3), 224, (2, 4)), "n1.7": OneCamera(79, 64, (1, 256, 256, 3), 256, (4, 8))}
_VIEWS = (
    *("view", "_unsafe_view", "transpose", "permute", "t", "split", "split_with_sizes", "unsqueeze", "squeeze", "expand", "slice", "select", "alias"),
    *("detach", "unbind", "chunk", "as_strided", "empty", "empty_strided", "lift_fresh", "_reshape_alias", "unflatten", "new_empty", "empty_like"),
)


class Launches(TorchDispatchMode):
    """`counted`: operations that launch a kernel. `mixed`: those that would read tensors of two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.mixed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0}
        if len(devices) > 1:
            self.mixed.append(f"{func}: {sorted(devices)}")
        if not name.startswith("prim") and name not in _VIEWS:
            self.counted[name] += 1
        return out


def published_network(version: str = "n1.5", layers: int | None = None) -> Network:
    """bf16, on "cuda", to be called inside a FakeTensorMode; `layers`: of each tower, where all of them cost time and show nothing more."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return network((_n1d5 if version == "n1.5" else _n1d7)(layers)).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def _n1d5(layers: int | None) -> ModelConfig:
    config, eagle = network_config("full", published_vocabulary=True)
    if layers is not None:
        eagle["vision_config"]["num_hidden_layers"] = config["backbone_cfg"]["select_layer"] = eagle["text_config"]["num_hidden_layers"] = layers
        for part in ("diffusion_model_cfg", "vl_self_attention_cfg"):
            config["action_head_cfg"][part]["num_layers"] = layers
    return ModelConfig.from_dicts(config, eagle)


def _n1d7(layers: int | None) -> ModelConfig:
    config, backbone = network_config_n1d7("full", published_vocabulary=True)
    if layers is not None:
        backbone["vision_config"].update(depth=layers, deepstack_visual_indexes=[0, 1, 2])
        backbone["text_config"]["num_hidden_layers"] = config["select_layer"] = layers
        for part in ("diffusion_model_cfg", "vl_self_attention_cfg"):
            config[part]["num_layers"] = layers
    return config_n1d7(config, backbone)


@contextlib.contextmanager
def on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Attention is the flash kernel, which torch takes on a GPU where nothing is masked; without one it does not choose."""

    def flash(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, enable_gqa: bool = False) -> Any:
        assert attn_mask is None, "flash attention takes no mask"
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]

    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@contextlib.contextmanager
def counting_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Triton kernels are counted instead of launched."""
    from triton.runtime.jit import JITFunction

    from gr00t_fast.engine.kernels import attention, gemm
    from gr00t_fast.engine.kernels.launch import Processor

    counted: Counter[str] = Counter()

    def count(self: JITFunction, *_: Any, **__: Any) -> None:
        counted[self.__name__] += 1

    monkeypatch.setattr(JITFunction, "run", count)
    for module in (gemm, attention):
        monkeypatch.setattr(module, "processor_of", lambda _: Processor(132, 227 * 1024))
        monkeypatch.setattr(module, "on", lambda _: contextlib.nullcontext())
    from gr00t_fast.engine.kernels import norms, rotary

    for module in (norms, rotary):
        monkeypatch.setattr(module, "on", lambda _: contextlib.nullcontext())
    yield counted


def counted(work: Callable[[], Any]) -> tuple[int, list[str]]:
    """Launches of `work`, and the operations in it that mix devices."""
    with Launches() as launches, torch.no_grad():
        work()
    return sum(launches.counted.values()), launches.mixed


def stages_of(fused: FusedModel, case: OneCamera) -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    """Name, the stage as a function of tensors alone, and arguments for one observation with one camera."""
    head, bf16 = fused.config.head, {"dtype": torch.bfloat16, "device": "cuda"}
    width, images, deeper = fused.config.language.hidden_size, case.image_tokens, len(getattr(fused.config.vision, "deepstack", ()))
    tokens = torch.empty(*((1 + deeper,) if deeper else ()), 1, images, width, **bf16)
    pixels = torch.empty(1, 1, 3, case.picture, case.picture, **bf16)
    ids = torch.empty(1, case.prompt_tokens, dtype=torch.int64, device="cuda")
    positions = torch.empty(images, dtype=torch.int64, device="cuda")
    features, state = torch.empty(1, case.prompt_tokens, width, **bf16), torch.empty(1, head.state_dim, **bf16)
    seen = {"all": case.prompt_tokens, "text": case.prompt_tokens - images, "image": images}
    shapes = [(1, head.dit.num_heads, seen[block.context], head.dit.head_dim) for block in fused.head.dit.blocks if block.crosses]
    condition = [torch.empty(1, 1 + head.future_tokens, head.dit.width, **bf16), *(torch.empty(shape, **bf16) for shape in shapes for _ in range(2))]

    def flat(made: Condition) -> list[torch.Tensor]:
        return [made.prefix, *(tensor for pair in made.cross for tensor in pair)]

    def whole(given: list[torch.Tensor]) -> Condition:
        return Condition(given[0], list(zip(given[1::2], given[2::2], strict=True)), None)

    yield "encode_vision", fused.encode_vision, [pixels]
    yield "encode_language", lambda i, p, t: fused.encode_language(ModelInputs(pixels, i, p, None), t), [ids, positions, tokens]
    yield "refine", fused.refine, [features]
    yield "condition", lambda f, s, p: flat(fused.condition(f, s, p)), [features, state, positions]
    steps = [torch.empty(1, head.action_horizon, head.action_dim, **bf16), torch.empty(head.dit.width, **bf16)]
    modulation = torch.empty(head.dit.num_layers + 1, 2, head.dit.width, **bf16)
    yield "velocity", lambda a, t, m, *c: fused.velocity(a, whole(list(c)), t, m), [*steps, modulation, *condition]
