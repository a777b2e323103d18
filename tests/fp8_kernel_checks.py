"""Checks of the kernel of 8-bit weights that need a process of their own; tests/test_fakecuda.py starts them.

TRITON_INTERPRET=1 python tests/fp8_kernel_checks.py interpret     # against its twin, on the CPU
python tests/fp8_kernel_checks.py compile                          # on a device that is not there: registers, shared memory, instructions
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor

from gr00t_fast.engine import fp8_kernel
from gr00t_fast.engine.quantized import Fp8WeightLinear, emulated_fp8_weight_product

# Relative to the norm of the result. fp32: sums in another order. 16 bits: a rounding at the end (at most 2^-9 for bf16, 2^-12 for fp16). Triton's
# interpreter cuts bf16 off instead of rounding it.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 1.2e-2}
AWKWARD = [(1, 1, 1), (5, 33, 40), (16, 16, 16), (17, 96, 129), (49, 100, 160), (130, 65, 257)]  # rows, outputs, width
FULL_SIZE = [(49, 1536, 1536), (49, 6144, 1536), (98, 1536, 6144)]  # of one observation, and of two: each makes another kernel of one of the GPUs


def arguments(m: int, n: int, k: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(m * n * k)
    linear = torch.nn.Linear(k, n, device=device, dtype=dtype)
    for parameter in linear.parameters():
        parameter.data.normal_(generator=generator)
    layer = Fp8WeightLinear(linear)
    return torch.randn(m, k, device=device, generator=generator).to(dtype), layer.weight, layer.weight_scale, layer.bias


def error(given: tuple[Tensor, ...]) -> float:
    """Of the kernel, against the same inputs in fp64; in whose own dtype a twin would be the less exact of the two."""
    rows, weight, scale, bias = given
    truth = rows.double() @ weight.double().t() * scale.double() + (0 if bias is None else bias.double())
    return float((fp8_kernel.fp8_weight_product(*given).double() - truth).norm() / truth.norm())


def guarded(given: Tensor) -> Tensor:
    """The same tensor between NaN: what is read past its ends shows."""
    bytes_of_nan = torch.full((given.numel() + 128,), 0x7F, dtype=torch.uint8).view(given.dtype) if given.itemsize == 1 else None
    buffer = torch.full((given.numel() + 128,), float("nan"), dtype=given.dtype) if bytes_of_nan is None else bytes_of_nan
    inside = buffer[64:-64].view(given.shape)
    inside.view(torch.uint8).copy_(given.contiguous().view(torch.uint8))
    return inside


def interpret() -> None:
    assert fp8_kernel.INTERPRETED
    for dtype, tolerance in TOLERANCE.items():
        for m, n, k in AWKWARD:
            *given, bias = (guarded(each.detach()) for each in arguments(m, n, k, dtype))
            for last in (bias, None):
                found = error((*given, last))
                assert found < tolerance, (m, n, k, dtype, found)
    given = arguments(17, 96, 129, torch.float32)
    torch.testing.assert_close(fp8_kernel.fp8_weight_product(*given), emulated_fp8_weight_product(*given), rtol=1e-5, atol=1e-4)


def compile_all() -> None:
    properties = torch.cuda.get_device_properties(0)
    for m, n, k in FULL_SIZE:
        fp8_kernel.fp8_weight_product(*arguments(m, n, k, torch.bfloat16, "cuda"))
    ((kernels, *_),) = fp8_kernel._kernel.device_caches.values()
    assert kernels
    for kernel in kernels.values():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=60).stdout
        assert re.search(r"\bSTACK:0\b", usage), f"registers spill: {usage}"
        assert kernel.metadata.shared <= properties.shared_memory_per_block_optin
        assert "mma" in kernel.asm["ptx"], "no tensor cores"
        assert "cp.async" in kernel.asm["ptx"], "nothing is loaded ahead"


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
