"""From the words of the command line (`auto`, `cuda`, `bf16`) to a device and a number format."""

from __future__ import annotations

import torch

from gr00t_fast.errors import ConfigError, closest

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"unknown device '{name}'.{closest(name, ('auto', 'cuda', 'cpu', 'mps'))} Expected auto, cuda, cuda:N, cpu or mps."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device '{name}' was asked for, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs. Use --device=cpu."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device 'mps' was asked for, but torch {torch.__version__} has no MPS here. Use --device=cpu.")
    if device.type not in ("cuda", "cpu", "mps"):
        raise ConfigError(f"device '{name}' is not supported. Expected auto, cuda, cuda:N, cpu or mps.")
    return device


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16, the format NVIDIA trains and runs in, where the device computes in it; else fp32."""
    if name == "auto":
        return torch.bfloat16 if _computes_bf16(device) else torch.float32
    if name not in PRECISIONS:
        raise ConfigError(f"unknown precision '{name}'.{closest(name, PRECISIONS)} Expected auto or one of: {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # on a CPU without bf16 dot products the conversion costs more than the saved bandwidth
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
