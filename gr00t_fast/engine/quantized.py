"""Linear layers of 8 bits (FP8, E4M3), a network with some of its layers replaced by them, and the engine `fp8` that runs it.

Where rows are many (vision, language, refinement) arithmetic is what costs, and both factors are rounded (W8A8):

    y = row_scale * weight_scale * (rounded(x * inverse) @ weight.T) + bias

`inverse` holds one number per input channel: what a channel of outliers is divided by (its weights are multiplied with the same), and the step of
the 8-bit grid. Weights are rounded once, when the layer is made, with one scale per tensor, because FP8's numbers keep their relative precision over
15 powers of two. Inputs have a scale from calibration.

Where rows are few (a denoising step has 49 per observation) reading the weights is what costs, and only they are rounded (W8A16), with a scale per
output: nothing to calibrate, half the bytes.

Each product is a function, so that each layer has a twin that differs in nothing else. The engine compiles the network, as `compiled` does: rounding
inputs costs a kernel per layer where nothing fuses it with the norm or activation function before it.

A calibration on the disk is a scale per input of the chosen layers, and a manifest as of an export (engine/manifest.py). Weights are not in it: they
are rounded from the checkpoint when it is loaded.

Axis alphabet: R rows (tokens), K input width, N output width. Weights are stored (N, K), as torch stores them.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_fast.engine.cuda_graph import GraphEngine, check_compiler, compiled
from gr00t_fast.engine.fused import fused_model
from gr00t_fast.engine.manifest import Manifest, Target, check_manifest, describe_files, remedy_for
from gr00t_fast.errors import CheckpointError, EngineError
from gr00t_fast.model import Gr00t

LARGEST = 448.0  # of E4M3 without infinity (Micikevicius et al. 2022)
_SMALLEST = 1e-6  # a scale of what is always zero: any will do, but not zero
_ALIGNMENT = 16  # of K and N, as torch._scaled_mm asks for

# Part of the network -> how the names of its layers begin; `refine` is the vision-language self-attention.
PARTS = {"vision": "vision.", "language": "language.", "refine": "head.vl_blocks.", "dit": "head.dit."}
WEIGHTS_ONLY = "dit"
# AdaLN's and the time embedding's are tabulated beforehand; vision's connector also tells the network's own number format, and its patch embedding is
# packed anew; the DiT's keys and values are read once per inference, and its last layer is multiplied with the decoder's first (engine/fused.py).
_LEFT = ("ada_norm", "out_modulation", "time.linear1", "time.linear2", "vision.connector", "patch_embedding", "attention.kv", "dit.out")

# fp8 (R, K) and (N, K), their scales (fp32, no axis), bias (N,) or None, the type of the answer -> (R, N)
Fp8Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
# (R, K), fp8 (N, K), fp32 (N,), bias (N,) or None -> (R, N) of the type of the first
Fp8WeightProduct = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class InputScale:
    """How the inputs of one or more layers are rounded. largest: |input| that the largest 8-bit number stands for, after division by `smoothing`
    (fp32 (K,), positive), if any."""

    largest: float
    smoothing: Tensor | None = None


def fp8_product(rows: Tensor, weight: Tensor, row_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """On the tensor cores. `use_fast_accum`: Hopper keeps 14 bits of the running sums, where E4M3 keeps 4 of each factor."""
    return torch._scaled_mm(rows, weight.t(), scale_a=row_scale, scale_b=weight_scale, bias=bias, out_dtype=dtype, use_fast_accum=True)


def emulated_fp8_product(rows: Tensor, weight: Tensor, row_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same up to the order of summation in fp32: products of two E4M3 numbers are exact there."""
    product = (rows.float() @ weight.float().t()) * (row_scale * weight_scale)
    return (product if bias is None else product + bias.float()).to(dtype)


def emulated_fp8_weight_product(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """As the kernel of engine/fp8_kernel.py, up to the order of summation."""
    product = F.linear(rows.float(), weight.float()) * scale
    return (product if bias is None else product + bias.float()).to(rows.dtype)


class Fp8Linear(nn.Module):
    """W8A8: E4M3 weights (N, K) and inputs, sums in fp32."""

    def __init__(self, linear: nn.Linear, scale: InputScale, inverse: Tensor, weight_step: Tensor, product: Fp8Product) -> None:
        """inverse: of `inverse_of`; weight_step: of `weight_step_of`. Both are shared by layers that read the same tensor, so that these can be
        joined."""
        super().__init__()
        self.out_features, self._product = linear.out_features, product
        self.register_buffer("weight", _padded(to_fp8(_smoothed(linear, scale) / weight_step)))
        self.register_buffer("inverse", inverse)  # fp32 (K,)
        self.register_buffer("row_scale", torch.tensor(_step(scale), dtype=torch.float32, device=self.weight.device))
        self.register_buffer("weight_scale", weight_step)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", None if bias is None else F.pad(bias, (0, self.weight.shape[0] - len(bias))))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) of any float type -> (..., N) of the same."""
        rows = to_fp8(x.reshape(-1, x.shape[-1]).float() * self.inverse)  # (R, K)
        if columns := self.weight.shape[1] - rows.shape[1]:
            rows = F.pad(rows.view(torch.uint8), (0, columns)).view(rows.dtype)  # padding is not implemented for fp8; 0 is the byte 0
        inside = None if x.dtype == torch.float32 else self.bias  # the product adds a 16-bit bias only
        y = self._product(rows, self.weight, self.row_scale, self.weight_scale, inside, x.dtype)
        if self.bias is not None and inside is None:
            y = y + self.bias
        return y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)

    def joined_with(self, others: Sequence[nn.Module]) -> Fp8Linear:
        """One layer whose outputs are those of this one and `others` side by side. Raises EngineError where they read different tensors."""
        layers = [self, *others]
        if not all(isinstance(layer, Fp8Linear) and layer.inverse is self.inverse and layer.bias is None for layer in layers):
            raise EngineError("the calibration rounds one of two layers that are joined, gate and up. Calibrate again with gr00t-fast calibrate.")
        whole = copy.copy(self)
        whole._buffers, whole.out_features = dict(self._buffers), sum(layer.out_features for layer in layers)
        rows = torch.cat([layer.weight.view(torch.uint8)[: layer.out_features] for layer in layers])
        whole._buffers["weight"] = _padded(rows.view(self.weight.dtype))
        if all(layer.out_features == len(layer.weight) for layer in layers):  # without padding between them: nothing is held twice
            for layer, part in zip(layers, whole.weight.split([layer.out_features for layer in layers]), strict=True):
                layer._buffers["weight"] = part
        return whole


class Fp8WeightLinear(nn.Module):
    """W8A16: E4M3 weights (N, K) with a scale per output; inputs as they are."""

    def __init__(self, linear: nn.Linear, product: Fp8WeightProduct = emulated_fp8_weight_product) -> None:
        super().__init__()
        self._product, self.out_features, weight = product, linear.out_features, linear.weight.detach().float()
        step = _finite(weight.abs().amax(dim=1).clamp_min(_SMALLEST)) / LARGEST
        self.register_buffer("weight", to_fp8(weight / step[:, None]))
        self.register_buffer("weight_scale", step)  # fp32 (N,)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) of any float type -> (..., N) of the same."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return self._product(rows, self.weight, self.weight_scale, self.bias).reshape(*x.shape[:-1], self.out_features)


def inverse_of(scale: InputScale, width: int, device: torch.device) -> Tensor:
    """fp32 (K,): what inputs are multiplied with before they are rounded."""
    channels = torch.ones(width) if scale.smoothing is None else 1.0 / scale.smoothing.float().cpu()
    return (channels / _step(scale)).to(device)


def weight_step_of(layers: Sequence[nn.Linear], scale: InputScale) -> Tensor:
    """fp32, no axis: one for all layers that share `scale`. Raises CheckpointError for weights that are NaN or infinite."""
    return _finite(torch.stack([_smoothed(layer, scale).abs().amax() for layer in layers]).amax().clamp_min(_SMALLEST)) / LARGEST


def to_fp8(values: Tensor) -> Tensor:
    """fp32 -> E4M3, saturating: the cast alone makes NaN of what is too large."""
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _step(scale: InputScale) -> float:
    return max(scale.largest, _SMALLEST) / LARGEST


def _smoothed(linear: nn.Linear, scale: InputScale) -> Tensor:
    weight = linear.weight.detach().float()
    return weight if scale.smoothing is None else weight * scale.smoothing.to(weight.device, torch.float32)


def _finite(sizes: Tensor) -> Tensor:
    """Rounding would turn NaN into an ordinary number, and hide it from every later check."""
    if not torch.isfinite(sizes).all():
        raise CheckpointError("a weight to be rounded to 8 bits is NaN or infinite; expected finite ones. Copy or download the checkpoint again.")
    return sizes


def _padded(weight: Tensor) -> Tensor:
    """(N, K) with zeros up to the alignment, contiguous."""
    rows, columns = (_ALIGNMENT * math.ceil(size / _ALIGNMENT) for size in weight.shape)
    raw = F.pad(weight.view(torch.uint8), (0, columns - weight.shape[1], 0, rows - weight.shape[0]))
    return raw.view(weight.dtype).contiguous()


# --- the network --------------------------------------------------------------------------------------------------------------------------


def linear_layers(model: Gr00t) -> dict[str, nn.Linear]:
    """Name -> layer, of all that can be done in 8 bits, in the order of the network: those that run for an observation and are worth it."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(PARTS.values())) and not name.endswith(_LEFT)
    }


def part_of(name: str) -> str:
    return next(part for part, begin in PARTS.items() if name.startswith(begin))


@torch.no_grad()
def rounded_layers(model: Gr00t, scales: Mapping[str, InputScale], emulated: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The 8-bit layer for each name in `scales`, made when it is asked for; of those of the DiT weights alone are rounded, with no use for a scale.
    Layers with one InputScale share its tensor and the scale of their weights. emulated: products are written out instead of the hardware's own.

    Raises EngineError for names that are no linear layers of `model`, or scales of another width, CheckpointError for weights that are not finite,
    and MissingExtraError without triton, unless emulated.
    """
    layers = linear_layers(model)
    if unknown := sorted(set(scales) - set(layers)):
        raise EngineError(
            f"the calibration names layers that this network lacks ({', '.join(unknown[:3])}). Calibrate again with gr00t-fast calibrate."
        )
    readers: dict[int, list[nn.Linear]] = {}
    for name, scale in scales.items():
        if part_of(name) == WEIGHTS_ONLY:
            continue
        if scale.smoothing is not None and scale.smoothing.shape != (layers[name].in_features,):
            raise EngineError(
                f"{name}: the calibration is for {len(scale.smoothing)} inputs, the layer has {layers[name].in_features}. Calibrate again with "
                "gr00t-fast calibrate."
            )
        readers.setdefault(id(scale), []).append(layers[name])
    shared = {
        id(scale): (inverse_of(scale, of[0].in_features, of[0].weight.device), weight_step_of(of, scale))
        for scale in scales.values()
        if (of := readers.pop(id(scale), None))
    }
    weight_product = emulated_fp8_weight_product
    if not emulated and any(part_of(name) == WEIGHTS_ONLY for name in scales):
        from gr00t_fast.engine.fp8_kernel import fp8_weight_product as weight_product  # imports triton
    for name, scale in scales.items():
        linear = layers.pop(name)  # which may be dropped by the caller before the next one is made
        if part_of(name) == WEIGHTS_ONLY:
            yield name, Fp8WeightLinear(linear, weight_product)
        else:
            yield name, Fp8Linear(linear, scale, *shared[id(scale)], emulated_fp8_product if emulated else fp8_product)


def round_layers(model: Gr00t, scales: Mapping[str, InputScale]) -> None:
    """Replace the layers of `scales` in `model` itself, one by one: at no time more than one of them is there in both forms."""
    for name, layer in rounded_layers(model, scales):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def with_layers(model: Gr00t, layers: Mapping[str, nn.Module]) -> Gr00t:
    """A network of the same weights with `layers` in the places that their names say; `model` itself stays as it is."""

    def replaced(module: nn.Module, name: str) -> nn.Module:
        if name in layers:
            return layers[name]
        twin = copy.copy(module)  # its tables of parameters and modules are still the original's: each gets its own
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {key: child and replaced(child, f"{name}.{key}".removeprefix(".")) for key, child in module._modules.items()}
        return twin

    return replaced(model, "")


def rewritten(model: Gr00t, scales: Mapping[str, InputScale], emulated: bool = False) -> Gr00t:
    """`model` with the layers of `scales` in 8 bits."""
    return with_layers(model, dict(rounded_layers(model, scales, emulated)))


# --- the engine ---------------------------------------------------------------------------------------------------------------------------

FP8 = "fp8"
PROGRAM = "calibrate.py"
SCALES_NAME = "scales.safetensors"
_CAPABILITY = (8, 9)  # from which tensor cores have the format
_LARGEST, _SMOOTHING = "largest", "smoothing"


def prepare_fp8(directory: Path, target: Target, device: torch.device) -> Callable[[Gr00t], GraphEngine]:
    """What makes the engine from the model; GPU and calibration are checked here, before weights are read.

    Raises EngineError and StaleEngineError, naming the command to run.
    """
    check_gpu(device)
    return functools.partial(fp8_engine, scales=read_calibration(directory, target))


def fp8_engine(model: Gr00t, scales: Mapping[str, InputScale]) -> GraphEngine:
    """`model` itself gets 8-bit layers, one after the other, so that its 16-bit weights are never held beside all of the 8-bit ones.

    Raises EngineError for a GPU that lacks the format, or a calibration of another network; MissingExtraError without triton, ConfigError without a
    C compiler.
    """
    check_gpu(model.device)
    round_layers(model, scales)
    fused = fused_model(model)
    engine = GraphEngine(FP8, fused, compiled(fused.stages()), continues=frozenset({"prefix"}))
    engine.precision = FP8
    return engine


def check_gpu(device: torch.device) -> None:
    """Raises EngineError where `device` is no GPU with tensor cores for FP8, ConfigError without what compiles for it."""
    needs = "engine 'fp8' needs a CUDA GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell)"
    if device.type != "cuda":
        raise EngineError(f"{needs}, but the device is {device}. Use --device=cuda, or --engine=eager; for INT8 on a CPU --engine=openvino.")
    if not has_product(device):
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise EngineError(f"{needs}; {torch.cuda.get_device_name(device)} has {found}. Use --engine=cuda_graph, or --engine=tensorrt with INT8.")
    check_compiler(FP8, device.type)


def has_product(device: torch.device) -> bool:
    """Whether torch multiplies in FP8 on `device` as fast as it should; elsewhere the product is written out. A CPU's is emulation too, six times as
    slow as fp32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


# --- calibrations on the disk -------------------------------------------------------------------------------------------------------------


def write_calibration(
    directory: Path,
    scales: Mapping[str, InputScale],
    identity: Mapping[str, Any],
    data: Mapping[str, Any],
    versions: Mapping[str, str],
    command: str,
    flags: Sequence[str],
) -> Manifest:
    """Into a directory that is there. data: what it was calibrated with, a digest of the observations among it; flags: as `Manifest.flags`."""
    groups = {id(scale): name for name, scale in reversed(scales.items())}  # named after their first layer
    tensors = {}
    for scale in scales.values():
        group = groups[id(scale)]
        tensors[f"{group}.{_LARGEST}"] = torch.tensor(scale.largest, dtype=torch.float32)
        if scale.smoothing is not None:
            tensors[f"{group}.{_SMOOTHING}"] = scale.smoothing.float().cpu().contiguous()
    save_file(tensors, str(directory / SCALES_NAME))
    manifest = Manifest(
        kind=FP8,
        precision="auto",
        identity=identity,
        shapes={},
        denoising_steps=(),
        stages={},
        files=describe_files(directory),
        versions=versions,
        command=command,
        quantisation={"format": FP8, "runtime": "torch", "calibration": dict(data)},
        details={"inputs": {name: groups[id(scale)] for name, scale in scales.items()}},
        program=PROGRAM,
        flags=tuple(flags),
    )
    manifest.write(directory)
    return manifest


def read_calibration(directory: Path, target: Target) -> dict[str, InputScale]:
    """Layer -> how its input is rounded (of the DiT's nothing but the name counts); layers that read one tensor have one InputScale.

    Raises EngineError when there is none in `directory` or it is damaged, and StaleEngineError when it was made for other weights, statistics,
    cameras or data configuration. Every message names the command that makes it.
    """
    remedy = remedy_for(directory, target, PROGRAM, "--observations=DATASET")
    manifest = check_manifest(directory, FP8, target, remedy)
    try:
        return _parsed(manifest, load_file(str(directory / SCALES_NAME)))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{directory} cannot be read ({error!r}). Run: {remedy}") from error


def _parsed(manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, InputScale]:
    """Raises KeyError, TypeError, ValueError or AttributeError for what is not a calibration."""
    inputs = dict(manifest.details["inputs"])
    scales = {
        group: InputScale(float(tensors[f"{group}.{_LARGEST}"]), tensors.get(f"{group}.{_SMOOTHING}")) for group in dict.fromkeys(inputs.values())
    }
    for group, scale in scales.items():
        positive = scale.smoothing is None or bool((torch.isfinite(scale.smoothing) & (scale.smoothing > 0)).all())
        if not (0 <= scale.largest < float("inf") and positive):
            raise ValueError(f"the scale of {group} is no positive number")
    return {name: scales[group] for name, group in inputs.items()}
