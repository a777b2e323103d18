"""How much work one inference is, and how fast this machine could possibly do it.

FLOP count multiplications and additions of the matrix products and attention (2 per multiply-add); bytes count each weight once. The
floor of a stage is the larger of FLOP over the machine's best matrix rate and bytes over its best read rate, both measured in the same run. On a CPU
the matrix rate is that of packed weights where oneDNN has such products: a plain weight is copied in every call, and its rate gives no floor. In
8 bits all products count as such, and a weight as one byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.engine.packed import PLAIN, packed, packing_obstacle, product
from gr00t_fast.model import Gr00t
from gr00t_fast.model.config import ModelConfig
from gr00t_fast.model.siglip2 import Siglip2Tower
from gr00t_fast.model.vision import QwenVisionTower


@dataclass(frozen=True)
class Work:
    flop: float
    weight_bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.weight_bytes + other.weight_bytes)

    def floor_ms(self, ceilings: Ceilings) -> float:
        return 1e3 * max(self.flop / ceilings.flop_per_s, self.weight_bytes / ceilings.bytes_per_s)


@dataclass(frozen=True)
class Ceilings:
    """Best rates seen on this machine: large matrix products in the model's dtype, a read of more memory than the caches hold."""

    flop_per_s: float
    bytes_per_s: float

    def best(self, other: Ceilings) -> Ceilings:
        return Ceilings(max(self.flop_per_s, other.flop_per_s), max(self.bytes_per_s, other.bytes_per_s))


def stage_work(model: Gr00t, prompt_tokens: int, image_tokens: int, pictures: int, steps: int, itemsize: int = 0) -> dict[str, Work]:
    """Work of one inference of one observation, by the stage names of the engines. image_tokens: of all pictures, among the prompt's. itemsize: bytes
    of a weight, if not the model's."""
    c: ModelConfig = model.config
    v, la, h = c.vision, c.language, c.head
    joined = getattr(v, "merge_size", 1) ** 2  # patches that become one token
    mergers = [model.vision.merger, *model.vision.deepstack_mergers] if isinstance(model.vision, QwenVisionTower) else []
    mergers += [model.vision.connector] if isinstance(model.vision, Siglip2Tower) else []
    patches = image_tokens * joined
    seen = {"all": prompt_tokens, "text": prompt_tokens - image_tokens, "image": image_tokens}  # by cross-attending blocks
    sequence = 1 + h.future_tokens + h.action_horizon
    itemsize = itemsize or model.dtype.itemsize
    blocks = list(model.head.dit.blocks)
    cross = {block.attention.kv: seen[block.context] for block in blocks if block.crosses}

    def linear(module: torch.nn.Module, rows: int) -> float:
        return 2.0 * rows * sum(p.numel() for p in module.parameters() if p.dim() > 1)

    def weights(module: torch.nn.Module) -> float:
        return float(sum(p.numel() for p in module.parameters()) * itemsize)

    vision = linear(model.vision, patches) - 2.0 * patches * model.vision.position_embedding.weight.numel()
    vision -= sum(linear(merger, patches - image_tokens) for merger in mergers)  # which have a row per token
    vision += v.num_layers * 4.0 * patches * (patches / pictures) * v.hidden_size
    language = linear(model.language.blocks, prompt_tokens) + la.num_layers * 4.0 * prompt_tokens**2 * la.num_heads * la.head_dim / 2  # causal
    refine = linear(model.head.vl_blocks, prompt_tokens) + len(model.head.vl_blocks) * 4.0 * prompt_tokens**2 * la.hidden_size
    refine += sum(linear(kv, tokens) for kv, tokens in cross.items())
    step_modules = [*(b.attention for b in blocks), *(b.mlp for b in blocks)]
    step = sum(linear(module, sequence) for module in step_modules) - sum(linear(kv, sequence) for kv in cross)
    step += sum(4.0 * sequence * seen.get(b.context, sequence) * h.dit.width for b in blocks)
    step += linear(model.head.action_encoder, h.action_horizon) + linear(model.head.action_decoder, h.action_horizon)
    step_bytes = sum(map(weights, step_modules)) - sum(map(weights, cross)) + weights(model.head.action_encoder) + weights(model.head.action_decoder)
    return {
        "vision": Work(vision, weights(model.vision)),
        "language": Work(language, weights(model.language.blocks)),
        "refine": Work(refine, weights(model.head.vl_blocks) + sum(map(weights, cross))),
        "denoise": Work(step * steps, step_bytes * steps),
    }


def measure_ceilings(device: torch.device, dtype: torch.dtype, int8: bool = False) -> Ceilings:
    """Best of several runs, and on a CPU of plain and packed weights; takes a few seconds there. int8: of products in 8 bits, on a CPU."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    weights = {PLAIN: b}
    if device.type == "cpu" and not packing_obstacle(dtype):
        weights[1] = packed(b, size)
    repeats = 20 if on_gpu else 8
    products = [partial(product, a, weight, way, None, None, None) for way, weight in weights.items()]
    matrix_s = min(_best_s(run, device, repeats) for run in ([_int8_product(size)] if int8 else products))
    big = torch.randn(2**30 // 4 if on_gpu else 2**28 // 4, device=device)  # 1 GiB, 256 MiB: beyond any cache
    read_s = _best_s(lambda: big.sum(), device, repeats=10)
    return Ceilings(2.0 * size**3 / matrix_s, big.numel() * 4 / read_s)


def _int8_product(size: int) -> Callable[[], torch.Tensor]:
    """size x size unsigned by signed, packed, with one scale per output: what oneDNN offers to torch for VNNI and AMX."""
    x, weight = torch.randint(0, 256, (size, size), dtype=torch.uint8), torch.randint(-128, 128, (size, size), dtype=torch.int8)
    packed_weight = torch.ops.onednn.qlinear_prepack(weight, [size, size])
    scales, zero_points = torch.ones(size), torch.zeros(size, dtype=torch.int64)
    others = (None, 1.0, 0, torch.float32, "none", [], "")  # bias, scale and zero of the output, its dtype, no activation
    return partial(torch.ops.onednn.qlinear_pointwise, x, 1.0, 0, packed_weight, scales, zero_points, *others)


def _best_s(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    def once_s() -> float:
        timer = StageTimer(partial(torch.cuda.synchronize, device) if device.type == "cuda" else None)
        run()
        return timer.finish()["total"] / 1000

    once_s()  # warms up
    return min(once_s() for _ in range(repeats))
