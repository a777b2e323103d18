"""What all kernels share: triton itself, checks of what they are given, and facts about the device that decide how they are launched."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gr00t_fast.optional import require

triton = require("triton", "triton")
tl = require("triton.language", "triton")

# With TRITON_INTERPRET=1, set before this import, kernels run in numpy on the CPU: slow, and the same program.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ELEMENTS = 2**31 - 1  # offsets are 32-bit integers


@dataclass(frozen=True)
class Processor:
    """What of a GPU decides about tile sizes: how many programs run at once without sharing a multiprocessor, and the shared memory of one."""

    multiprocessors: int
    shared_bytes: int

    @property
    def deep(self) -> bool:
        """A data-centre card: three to five times the memory bandwidth per multiprocessor, hence more bytes to be under way, and room for them."""
        return self.shared_bytes >= 160 * 1024


_INTERPRETED = Processor(4, 99 * 1024)  # few, so that tests of small shapes still split the work


@functools.cache
def processor_of(device: torch.device) -> Processor:
    if device.type != "cuda":
        return _INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Processor(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on `tensor`'s GPU, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def power_of_two(count: int) -> int:
    """The smallest one that is not below `count`: extents inside a kernel are powers of two."""
    return 1 << max(count - 1, 0).bit_length()


def dot_extent(count: int) -> int:
    """Extent of a matrix product's axis: a power of two, and at least 16, the smallest that tensor cores take."""
    return max(power_of_two(count), 16)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 stays fp32: the default, TF32, keeps 10 bits of the fraction."""
    return "ieee" if dtype == torch.float32 else "tf32"  # ignored for 16-bit operands


def check(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None, contiguous: bool = True) -> None:
    """Raise ValueError unless `tensor` has this shape (None: any extent), a dtype that kernels know, rows that lie in memory without gaps, and
    the dtype and device of `like`."""
    expected = ", ".join("any" if extent is None else str(extent) for extent in shape)
    if tensor.dim() != len(shape) or any(extent not in (None, got) for extent, got in zip(shape, tensor.shape, strict=True)):
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(tensor.shape)}")
    if tensor.numel() == 0 or tensor.numel() > MAX_ELEMENTS:
        raise ValueError(f"{name}: expected 1 to {MAX_ELEMENTS} elements, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected fp32, bf16 or fp16, got {tensor.dtype}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous memory, got strides {tensor.stride()} for shape {tuple(tensor.shape)}; call .contiguous()")
    if like is not None and (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(f"{name}: expected {like.dtype} on {like.device} as the first argument, got {tensor.dtype} on {tensor.device}")
