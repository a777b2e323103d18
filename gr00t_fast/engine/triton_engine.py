"""`triton`: the CUDA graph of cuda_graph.py, recorded over hand-written kernels (engine/kernels) in place of the plain model's own."""

from __future__ import annotations

import torch

from gr00t_fast.engine.compilers import check_compiler
from gr00t_fast.engine.cuda_graph import CudaGraphEngine
from gr00t_fast.engine.stages import Stages
from gr00t_fast.errors import ConfigError

_CAPABILITY = (8, 0)  # bf16 tensor cores, and asynchronous copies to shared memory, which the tile sizes count on


class TritonEngine(CudaGraphEngine):
    """Needs the package triton, which CUDA builds of torch for Linux bring, and compute capability 8.0. The first call compiles the kernels,
    and needs a C compiler to load them."""

    name = "triton"

    def _make_stages(self) -> Stages:
        """Raises MissingExtraError without triton, ConfigError for an older GPU, one that is not NVIDIA's, or without a C compiler."""
        if torch.version.hip is not None:
            raise ConfigError("engine 'triton' is written for NVIDIA GPUs, but this is a ROCm build of torch. Use --engine=cuda_graph.")
        capability = torch.cuda.get_device_capability(self.model.device)
        if capability < _CAPABILITY:
            needed, got = (".".join(map(str, version)) for version in (_CAPABILITY, capability))
            raise ConfigError(f"engine 'triton' needs compute capability {needed}, but this GPU has {got}. Use --engine=cuda_graph.")
        from gr00t_fast.engine.kernels.stages import fused_stages

        check_compiler(self.name, self.model.device.type)

        return fused_stages(self.model)
