"""A network with some of its linear layers in 8 bits, and everything else shared with the network it was made from.

Only layers that run for an observation take part: AdaLN's and the time embedding's are tabulated beforehand, the per-embodiment ones and the patch
convolution are a thousandth of the work. So is vision's connector, whose weight also tells the network's own number format.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gr00t_fast.engine.eight_bit.linear import (
    Fp8Linear,
    InputScale,
    Int8Linear,
    emulated_fp8_product,
    emulated_int_product,
    fp8_product,
    int_product,
    inverse_of,
)
from gr00t_fast.errors import EngineError
from gr00t_fast.model import Gr00tN1d5

# Part of the network -> how the names of its layers begin; `refine` is the vision-language self-attention.
PARTS = {"vision": "vision.", "language": "language.", "refine": "head.vl_blocks.", "dit": "head.dit."}
_LEFT = ("ada_norm", "out_modulation", "time.linear1", "time.linear2", "vision.connector")


@dataclass(frozen=True)
class Rounding:
    """format: int8 or fp8. per_token: INT8 activations get their scale at run time. emulated: the products are written out instead of the
    hardware's own."""

    format: str
    per_token: bool = False
    emulated: bool = False


def linear_layers(model: Gr00tN1d5) -> dict[str, nn.Linear]:
    """Name -> layer, of all that can be done in 8 bits, in the order of the network."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(PARTS.values())) and not name.endswith(_LEFT)
    }


def part_of(name: str) -> str:
    return next(part for part, begin in PARTS.items() if name.startswith(begin))


def rounded_layers(model: Gr00tN1d5, scales: Mapping[str, InputScale], rounding: Rounding) -> dict[str, nn.Module]:
    """The 8-bit layer for each name in `scales`. Layers with one InputScale share its tensor, so a compiler rounds their input once.

    Raises EngineError for names that are no linear layers of `model`, or scales of another width.
    """
    layers = linear_layers(model)
    if unknown := sorted(set(scales) - set(layers)):
        raise EngineError(
            f"the calibration names layers that this network lacks ({', '.join(unknown[:3])}). Calibrate again with export/calibrate.py."
        )
    inverses: dict[int, Tensor] = {}
    made: dict[str, nn.Module] = {}
    for name, scale in scales.items():
        linear = layers[name]
        if scale.smoothing is not None and scale.smoothing.shape != (linear.in_features,):
            raise EngineError(
                f"{name}: the calibration is for {len(scale.smoothing)} inputs, the layer has {linear.in_features}. Calibrate again with "
                "export/calibrate.py."
            )
        if id(scale) not in inverses:
            inverses[id(scale)] = inverse_of(scale, linear.in_features, rounding.format, rounding.per_token, linear.weight.device)
        made[name] = _rounded(linear, scale, inverses[id(scale)], rounding)
    return made


def _rounded(linear: nn.Linear, scale: InputScale, inverse: Tensor, rounding: Rounding) -> nn.Module:
    if rounding.format == "int8":
        product = emulated_int_product if rounding.emulated else int_product
        return Int8Linear(linear, scale, inverse, rounding.per_token, product)
    return Fp8Linear(linear, scale, inverse, emulated_fp8_product if rounding.emulated else fp8_product)


def with_layers(model: Gr00tN1d5, layers: Mapping[str, nn.Module]) -> Gr00tN1d5:
    """A network of the same weights with `layers` in the places that their names say; `model` itself stays as it is."""
    return _replaced(model, layers, "")


def _replaced(module: nn.Module, layers: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name in layers:
        return layers[name]
    twin = copy.copy(module)  # its tables of parameters and modules are still the original's: each gets its own
    twin._parameters, twin._buffers, twin._modules = dict(module._parameters), dict(module._buffers), dict(module._modules)
    for key, child in module.named_children():
        twin._modules[key] = _replaced(child, layers, f"{name}.{key}".removeprefix("."))
    return twin


@torch.no_grad()
def rewritten(model: Gr00tN1d5, scales: Mapping[str, InputScale], rounding: Rounding) -> Gr00tN1d5:
    """`model` with the layers of `scales` in 8 bits."""
    return with_layers(model, rounded_layers(model, scales, rounding))


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, each once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
