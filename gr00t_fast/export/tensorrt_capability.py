"""For which GPUs an engine is built, and what those GPUs cannot compute: asked before minutes are spent.

Sources: the support matrices of TensorRT-RTX 1.x ("by default portable" to Ampere and later; Turing only when named) and what the builder of
1.7.1 itself refuses: bf16, fp8 and fp32 matrix products on 7.5, fp8 below 8.9.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gr00t_fast.errors import ConfigError, install_command, require
from gr00t_fast.tensorrt_library import ANY_GPU, RTX, STANDARD, gpu_capability, version_tuple

ANY, AUTO = "any", "auto"
# Oldest compute capability with the arithmetic. fp32 is not listed: only Turing under TensorRT-RTX lacks its matrix products.
_OLDEST = {"bf16": ("8.0", "Ampere"), "fp8": ("8.9", "Ada and Hopper"), "int8": ("7.5", "Turing"), "fp4": ("10.0", "Blackwell")}
_FAMILIES = {"7.5": "Turing", "8.0": "A100", "8.6": "RTX 30", "8.7": "Jetson Orin", "8.9": "RTX 40", "9.0": "H100, H200", "10.0": "B200"}
_FAMILIES |= {"11.0": "Jetson Thor", "12.0": "RTX 50", "12.1": "GB10"}
_ONNX_TYPES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT8": "int8", "FLOAT8E4M3FN": "fp8", "FLOAT4E2M1": "fp4"}
_MATRIX_NODES = ("MatMul", "Gemm", "Conv", "Attention")


def parse_capabilities(text: str, builder: str) -> tuple[str, ...]:
    """`8.6`, `8.6,8.9`, `any`, or `auto`: the GPU that is here, else `any`. Returns compute capabilities, empty for any. Raises ConfigError."""
    words = [word for word in re.split(r"[,\s]+", str(text).strip()) if word]
    if words == [AUTO]:
        here = gpu_capability()
        return () if here is None else (here,)
    if words == [ANY]:
        return ()
    capabilities = tuple(dict.fromkeys(_capability(word) for word in words))
    if not capabilities:
        raise ConfigError("--compute_capability is empty. Expected auto, any, or compute capabilities such as 8.6 or 8.6,8.9,12.0.")
    if builder == STANDARD and len(capabilities) > 1:
        raise ConfigError(
            f"`tensorrt` builds for the GPU it runs on; got {', '.join(capabilities)}. Build on each machine with --compute_capability=auto, "
            "or name --builder=tensorrt_rtx for one engine for several RTX GPUs."
        )
    return capabilities


def _capability(word: str) -> str:
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", word.lower())
    if not match:
        raise ConfigError(f"--compute_capability: '{word}' is none. Expected auto, any, or compute capabilities such as 8.6 or 8.6,8.9,12.0.")
    return f"{int(match[1])}.{match[2]}"


def describe(capabilities: Sequence[str]) -> str:
    named = (f"{each} ({_FAMILIES[each]})" if each in _FAMILIES else each for each in capabilities)
    return ", ".join(named) or f"any, {ANY_GPU} and newer"


def precisions_of(onnx_file: Path) -> set[str]:
    """Number formats a graph computes and stores in, among fp32, fp16, bf16, int8, fp8, fp4; its weights are not read.

    fp32 counts only where it enters a matrix product: norms in fp32 are no hindrance.
    """
    onnx = require("onnx", "export")
    graph = onnx.load(str(onnx_file), load_external_data=False).graph
    names = {code: name for name, code in onnx.TensorProto.DataType.items()}
    types = {tensor.name: names[tensor.data_type] for tensor in graph.initializer}
    types |= {value.name: names[value.type.tensor_type.elem_type] for value in (*graph.input, *graph.output, *graph.value_info)}
    found = {_ONNX_TYPES[kind] for kind in types.values() if kind in _ONNX_TYPES} - {"fp32"}
    in_products = {types.get(name) for node in graph.node if node.op_type in _MATRIX_NODES for name in node.input}
    return found | ({"fp32"} if "FLOAT" in in_products else set())


def check_capabilities(trt: ModuleType, builder: str, capabilities: Sequence[str]) -> None:
    """Raises ConfigError for a GPU the library cannot build for, naming the one that can."""
    if builder == RTX:
        known = rtx_capabilities(trt)
        foreign = [capability for capability in capabilities if capability not in known]
        if foreign:
            raise ConfigError(
                f"tensorrt_rtx {trt.__version__} builds for compute capability {', '.join(known)}; got {describe(foreign)}. For that GPU use "
                f"--builder=tensorrt on the machine that has it (Jetson: part of JetPack; data centre: {install_command('tensorrt')})."
            )
        return
    here = gpu_capability()
    if here is None:
        raise ConfigError(
            "`tensorrt` measures kernels on the GPU it builds for, and this machine has no CUDA GPU. Build on the machine that will run the engine; "
            "for an RTX GPU, --builder=tensorrt_rtx builds without one."
        )
    if capabilities and capabilities[0] != here:
        raise ConfigError(f"`tensorrt` builds for the GPU it runs on: this one is {describe([here])}, asked for was {describe(capabilities)}.")


def rtx_capabilities(trt: ModuleType) -> dict[str, Any]:
    """`8.6` -> the library's own name for it, for every GPU generation this version of tensorrt_rtx knows."""
    members: Mapping[str, Any] = trt.ComputeCapability.__members__
    return {f"{int(name[2:-1])}.{name[-1]}": value for name, value in members.items() if re.fullmatch(r"SM\d+", name)}


def check_precisions(precisions: Collection[str], capabilities: Sequence[str], builder: str, stage: str) -> None:
    """Raises ConfigError when a target GPU is known not to compute in one of the graph's formats."""
    for precision in sorted(precisions):
        for capability in capabilities or (ANY_GPU,):
            reason = _why_not(precision, capability, builder)
            if reason:
                asked = f"compute capability {describe([capability])}" if capabilities else "any GPU (8.0 and newer)"
                remedy = _instead(precision, bool(capabilities))
                raise ConfigError(f"{stage}: the graph is in {precision}, which {asked} cannot compute: {reason}. {remedy}")


def _why_not(precision: str, capability: str, builder: str) -> str | None:
    if precision == "fp32" and builder == RTX and version_tuple(capability) < version_tuple("8.0"):
        return "TensorRT-RTX has no fp32 matrix products for Turing"
    if precision not in _OLDEST:
        return None
    oldest, family = _OLDEST[precision]
    return f"{precision} needs {oldest} or newer ({family})" if version_tuple(capability) < version_tuple(oldest) else None


def _instead(precision: str, named: bool) -> str:
    if precision not in ("fp8", "fp4"):
        return "Export it again with --precision=fp16 (gr00t-fast export onnx)."
    other = "use an INT8 variant (gr00t-fast quantise) or the 16-bit graphs (gr00t-fast export onnx)."
    return f"For those GPUs, {other}" if named else f"Name the GPUs, e.g. --compute_capability={_OLDEST[precision][0]},12.0, or {other}"
