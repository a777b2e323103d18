"""Inductor's lowering of every compiled stage for sm_90 on a machine without a GPU: how many launches each takes, in bf16 and in fp8. Prints JSON.

    PYTHONPATH=.:tests python tests/lowering.py n1.7       # a process of its own: it tells torch of a GPU that is not there

A stage is traced on tensors without memory and lowered by Inductor as on an H200; instead of compiling Triton, launches in the generated code are
counted. Towers of two depths are lowered, and the published ones follow from the difference: each further layer launches the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import CASES, on_a_gpu_that_is_not_there, published_network, stages_of
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module

from gr00t_fast.engine import fp8, quantized
from gr00t_fast.engine.fused import fused_model
from gr00t_fast.model import Network

H200 = types.SimpleNamespace(
    **{"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 140 << 30, "warp_size": 32},
    **{"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "gcnArchName": ""},
    **{"shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448, "shared_memory_per_multiprocessor": 233472},
    **{"L2_cache_size": 60 << 20, "is_integrated": 0, "is_multi_gpu_board": 0, "clock_rate": 1980000, "memory_clock_rate": 3201000},
    memory_bus_width=6144,
)


def pretend() -> list[str]:
    """Tell torch, Inductor and Triton of the GPU. The list will hold the code that Inductor generates."""
    os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # before Inductor is imported
    import torch._inductor.codecache as codecache
    import torch._inductor.config as inductor
    import torch.utils._triton as triton_of_torch
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import async_compile
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Device(contextlib.nullcontext):
        def __init__(self, *_: Any) -> None:
            super().__init__()

    cuda = {"get_device_properties": H200, "get_device_capability": (9, 0), "current_device": 0, "device_count": 1, "synchronize": None}
    for name, value in cuda.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.version.cuda = torch.version.cuda or "12.8"
    interface = {"current_device": 0, "device_count": 1, "is_available": True, "get_device_properties": H200, "get_compute_capability": 90}
    interface |= {"is_bf16_supported": True, "is_triton_capable": True, "raise_if_triton_unavailable": None, "synchronize": None, "set_device": None}
    for name, value in interface.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, value=value, **__: value))
    CudaInterface.device = Device
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: H200)
    triton_of_torch.has_triton = lambda: True
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(types.SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target))
    inductor.triton.cudagraphs = inductor.shape_padding = inductor.joint_graph_constant_folding = False
    async_compile.AsyncCompile.triton = lambda *_, **__: types.SimpleNamespace(run=lambda *_, **__: None)
    generated: list[str] = []
    load = codecache.PyCodeCache.load_by_key_path

    def keep(key: str, path: str, *rest: Any, **options: Any) -> Any:
        generated.append(Path(path).read_text())
        return load(key, path, *rest, **options)

    codecache.PyCodeCache.load_by_key_path = staticmethod(keep)
    return generated


def lower(stage: Callable[..., Any], root: torch.nn.Module, arguments: list[Any], generated: list[str]) -> int:
    """Launches of `stage(*arguments)`, whose weights are `root`'s: Triton's, and those of libraries."""
    from torch._inductor.compile_fx import compile_fx

    named = dict([*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)])
    values = [tensor.detach() for tensor in named.values()]

    def function(weights: list[torch.Tensor], given: list[Any]) -> Any:
        with _reparametrize_module(root, dict(zip(named, weights, strict=True)), tie_weights=False):
            return stage(*given)

    graph = make_fx(function)(values, arguments)
    flat = [*values, *torch.utils._pytree.tree_leaves(arguments)]
    used = []
    for node, value in zip([node for node in graph.graph.nodes if node.op == "placeholder"], flat, strict=True):
        if node.users:
            used.append(value)
        else:
            graph.graph.erase_node(node)
    output = next(node for node in graph.graph.nodes if node.op == "output")
    output.args = (tuple(torch.utils._pytree.tree_leaves(output.args)),)
    graph.graph.set_codegen(torch.fx.graph.CodeGen())
    graph.recompile()
    generated.clear()
    compile_fx(graph, used)
    (code,) = generated
    body = code[code.find("def call(") :]
    return body.count(".run(") + len(re.findall(r"extern_kernels\.\w+\(|= torch\.ops\.aten\.\w+", body))


def rounded(model: Network) -> Network:
    """As the engine fp8 has it, but for the DiT, which is not compiled there."""
    scales = {name: quantized.InputScale(1.0) for name in quantized.linear_layers(model) if quantized.part_of(name) != quantized.WEIGHTS_ONLY}
    up = {name: scales[name.replace("mlp.up", "mlp.gate")] for name in scales if name.startswith("language") and name.endswith("mlp.up")}
    return quantized.rewritten(model, scales | up)


def main(version: str) -> None:
    generated, patch, case = pretend(), pytest.MonkeyPatch(), CASES[version]
    patch.setattr(quantized, "_finite", lambda sizes: sizes)  # tensors without memory cannot be asked
    # Of N1.7 in bf16 alone: how Inductor joins its rounded vision layers changes with the depth (71 launches of 4 layers, 124 of 8).
    found: dict[str, dict[str, list[int]]] = {"bf16": {}, **({"fp8": {}} if version == "n1.5" else {})}
    with on_a_gpu_that_is_not_there(patch), torch.no_grad():
        for format in found:
            for depth in case.depths:
                model = published_network(version, depth)
                fused = fused_model(rounded(model) if format == "fp8" else model)
                for name, stage, arguments in stages_of(fused, case):
                    if format == "bf16" or name in fp8.COMPILED:
                        found[format].setdefault(name, []).append(lower(stage, fused, arguments, generated))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
