"""The engine `fused`: the fused model on a CPU as it stands, its products over weights in the layout of oneDNN where that is measured to be faster.

With a plain weight oneDNN copies it into its own layout in every call, or leaves the product to another library; a bias, an activation and a residual
are passes of their own. With a packed one all is one call. Neither form is always faster: that depends on the shape, the number of rows and the
processor. So a layer of each shape is computed in every way, with its own input, and the fastest way becomes that of all layers of the shape. A
layer has one form and one copy of its weight: it is packed when it is called for the second time, and the plain copy goes.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.engine.cuda_graph import check_device
from gr00t_fast.engine.eager import Continuation, EagerEngine, Inputs, PolicyInputs
from gr00t_fast.engine.fused import ACTIVATIONS, Activation, Constants, fused_model
from gr00t_fast.model import Condition, Gr00t, ModelInputs, StepTables

log = logging.getLogger(__name__)
MIN_WEIGHT_BYTES = 2**20  # smaller weights stay in the caches, and plain: a small network has the same bits in every run
FASTER = 1.1  # than plain, to be packed: that costs as much as reading the weight a few times
_ROUNDS = 3  # of a measurement; the best counts
_BETWEEN_BYTES = 2**26  # read between two products of a measurement, so that no weight comes from a cache
_FEW_ROWS, _ROW_BLOCK = 64, 8  # up to so many rows, filling up to a multiple is tried: kernels take some odd numbers badly (49 on AMX)
_IN_THE_PRODUCT = {None: ("none", ""), "gelu": ("gelu", "tanh"), "silu": ("swish", ""), "relu": ("relu", "")}  # as oneDNN's operation names them
_FOR_TABLES = ("linear1", "linear2", "ada_norm", "out_modulation")  # layers that make the step tables, once
_KEPT_CONSTANTS = 32  # shapes of call

PLAIN = 0  # a way to compute a product is this, or, packed, the multiple that rows are filled up to
_WORDS = {PLAIN: "plain", 1: "packed", _ROW_BLOCK: f"filled up to a multiple of {_ROW_BLOCK}"}
chosen_ways: dict[tuple[Any, ...], int] = {}  # of this process: two networks of one shape are computed alike


class FusedEngine(EagerEngine):
    """The layers of its model become packed ones: an eager engine over the same model is no exact twin any more. A batch of unequal prompts runs one
    by one."""

    name = "fused"
    equal_prompts = True

    def __init__(self, model: Gr00t) -> None:
        """Raises ConfigError for a model that is not on a CPU."""
        check_device(self.name, model.device)
        super().__init__(model)
        self._fused = fused_model(model, join=False)
        if obstacle := packing_obstacle(self.dtype):
            log.warning("engine '%s': weights of %s stay plain, which is slower: %s", self.name, self.dtype, obstacle)
        else:
            pack(self._fused, between=self._fused.language.embedding.weight)
        self._constants: dict[tuple[Any, ...], Constants] = {}

    def run(self, inputs: Inputs, noise: Tensor, denoising_steps: int, timer: StageTimer, continuation: Continuation | None = None) -> Tensor:
        """As `Engine.run`. Raises ConfigError for tensors of prompts of unequal length."""
        if not isinstance(inputs, PolicyInputs) or not inputs.padded:
            return super().run(inputs, noise, denoising_steps, timer, continuation)
        items = [(inputs.item(index), noise[index : index + 1], continuation and continuation.item(index)) for index in range(inputs.batch)]
        return torch.cat([super(FusedEngine, self).run(item, start, denoising_steps, timer, continued) for item, start, continued in items])

    def constants(self, inputs: ModelInputs) -> Constants:
        """Made once for each shape of call."""
        if inputs.prompt_mask is not None:
            raise ConfigError(f"engine '{self.name}' takes a batch of unequal prompts as frames (PolicyInputs), not as tensors. Use --engine=eager.")
        key = inputs.input_ids.shape[1], inputs.pixel_values.shape, *inputs.image_positions.tolist()
        if key not in self._constants:
            if len(self._constants) == _KEPT_CONSTANTS:
                self._constants.clear()
            self._constants[key] = self._fused.constants(inputs)
        return self._constants[key]

    def vision(self, inputs: ModelInputs) -> Tensor:
        return self._fused.encode_vision(inputs.pixel_values, self.constants(inputs))

    def language(self, inputs: ModelInputs, tokens: Tensor) -> Tensor:
        return self._fused.encode_language(inputs.input_ids, tokens, self.constants(inputs))

    def condition(self, inputs: ModelInputs, features: Tensor) -> Condition:
        return self._fused.condition(self._fused.refine(features), inputs.state, self.constants(inputs))

    def velocity(self, actions: Tensor, condition: Condition, tau: Tensor, modulation: Tensor) -> Tensor:
        return self._fused.velocity(actions, condition, tau, modulation)

    def step_tables(self, steps: int) -> StepTables:
        return self._fused.step_tables(steps)


def pack(model: nn.Module, between: Tensor) -> None:
    """Put a PackedLinear in the place of each linear layer of `model`. between: memory to read between two products that are timed."""
    made: dict[nn.Module, nn.Module] = {}  # a layer can be in several places
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and name not in _FOR_TABLES and child.weight.nbytes >= MIN_WEIGHT_BYTES:
                made.setdefault(child, PackedLinear(child, between))
                setattr(module, name, made[child])


class PackedLinear(nn.Module):
    """activation(x W' + b) + residual, W (out, in) plain or packed."""

    def __init__(self, layer: nn.Linear, between: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self._between = layer.weight, layer.bias, between.detach()
        self._called = False
        self._packed: bool | None = None  # None: open

    def forward(self, x: Tensor, activation: Activation | None = None, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """As `engine.fused.linear`: x (..., in), `residual` broadcast to (..., out) -> (..., out)."""
        shape, rows = (*x.shape[:-1], len(self.weight)), x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.expand(shape).reshape(-1, len(self.weight))
        bias = self.bias if bias is None else bias

        def compute(way: int, weight: Tensor) -> Tensor:
            return product(rows, weight, way, activation, bias, added)

        call = (*rows.shape, len(self.weight), rows.dtype, activation, added is None, bias is None, torch.get_num_threads())
        return compute(self._way(compute, call), self.weight).reshape(shape)

    def _way(self, compute: Callable[[int, Tensor], Tensor], call: tuple[Any, ...]) -> int:
        """How to compute such a call from now on. A layer's first call is plain, so that the first action waits for no packing."""
        if self._packed is False or not self._called:
            self._called = True
            return PLAIN
        rows, key = call[0], (bool(self._packed), *call)
        ways = (1, _ROW_BLOCK) if rows % _ROW_BLOCK and rows <= _FEW_ROWS else (1,)
        if self._packed:
            if key not in chosen_ways:
                chosen_ways[key] = self._fastest(compute, call, dict.fromkeys(ways, self.weight)) if len(ways) > 1 else 1
            return chosen_ways[key]
        if chosen_ways.get(key) != PLAIN:
            weight = packed(self.weight, rows)
            if key not in chosen_ways:
                chosen_ways[key] = self._fastest(compute, call, {PLAIN: self.weight, **dict.fromkeys(ways, weight)})
        self._packed = chosen_ways[key] != PLAIN
        if self._packed:
            self.weight = nn.Parameter(weight, requires_grad=False)
            chosen_ways.setdefault((True, *call), chosen_ways[key])
        return chosen_ways[key]

    def _fastest(self, compute: Callable[[int, Tensor], Tensor], call: tuple[Any, ...], ways: dict[int, Tensor]) -> int:
        """The one of `ways`, each with its weight, that is fastest here and now, with the caches as cold as in a call."""
        times_s: dict[int, list[float]] = {way: [] for way in ways}
        for _ in range(_ROUNDS):
            for way, weight in ways.items():
                _read(self._between)
                start_s = time.perf_counter()
                compute(way, weight)
                times_s[way].append(time.perf_counter() - start_s)
        best_s = {way: min(times) for way, times in times_s.items()}
        best = min((way for way in ways if way != PLAIN), key=lambda way: best_s[way])
        best = PLAIN if best_s.get(PLAIN, math.inf) <= FASTER * best_s[best] else best
        said = ", ".join(f"{_WORDS[way]} {1000 * took_s:.2f} ms" for way, took_s in best_s.items())
        log.debug("%d rows, %d -> %d, %s: %s; from now on %s", *call[:3], call[4], said, _WORDS[best])
        return best


def product(rows: Tensor, weight: Tensor, way: int, activation: Activation | None, bias: Tensor | None, added: Tensor | None) -> Tensor:
    """rows (R, in), added (R, out) -> (R, out)."""
    if way == PLAIN:
        y = ACTIVATIONS[activation](F.linear(rows, weight, bias))
        return y if added is None else y.add_(added)
    count = len(rows)
    more = _filled(count, way) - count
    x, other = (each if each is None or not more else F.pad(each, (0, 0, 0, more)) for each in (rows, added))
    if other is not None and activation is None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")[:count]
    name, algorithm = _IN_THE_PRODUCT[activation]
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)[:count]
    return y if added is None else y.add_(added)


def packed(weight: Tensor, rows: int) -> Tensor:
    """weight (out, in) in the layout that oneDNN wants for so many rows; it takes other numbers of rows, too."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _filled(rows: int, multiple: int) -> int:
    return rows + -rows % multiple


def _read(between: Tensor) -> None:
    between.flatten()[: _BETWEEN_BYTES // between.element_size()].view(torch.int32).max()


@functools.cache
def packing_obstacle(dtype: torch.dtype) -> str:
    """Why products with packed weights cannot be used here, empty where they can: tried out, and compared with plain ones."""
    x, weight = torch.linspace(-1, 1, 4 * 64).reshape(4, 64).to(dtype), torch.linspace(1, -1, 32 * 64).reshape(32, 64).to(dtype)
    bias, added = torch.ones(32, dtype=dtype), torch.ones(4, 32, dtype=dtype)
    try:
        tried: tuple[tuple[Activation | None, Tensor | None], ...] = ((None, added), ("gelu", None), ("silu", None), ("relu", None))
        for activation, other in tried:
            plain, got = (product(x, w, way, activation, bias, other) for w, way in ((weight, PLAIN), (packed(weight, 4), 1)))
            torch.testing.assert_close(got, plain, rtol=0.02, atol=0.02 * float(plain.abs().max()))
    except (AttributeError, NotImplementedError, RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""
