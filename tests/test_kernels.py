"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux: pip install 'gr00t_fast[triton]'")

from compiled_kernels import BINARIES, GPUS, Compiled, Gpu, compiling_for, launch_everything, with_8_bit_steps

from gr00t_fast.config import ModelConfig
from gr00t_fast.engine.kernels import attention, gemm
from gr00t_fast.engine.kernels.launch import INTERPRETED, Processor, dot_extent, power_of_two
from gr00t_fast.model import Gr00tN1d5
from gr00t_fast.random_checkpoint import network_config

ROOT = Path(__file__).parent.parent
INTERPRETER_LIMIT_S = 600  # it takes 20 s of an idle core
KERNELS = {"_norm_kernel", "_rotary_kernel", "_linear_kernel", "_attention_kernel"}


def test_in_the_interpreter_every_kernel_computes_what_its_twin_does() -> None:
    """In a process of its own: kernels are interpreted or compiled from when they are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "tests/interpreter"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=INTERPRETER_LIMIT_S)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


# --- compiled for a GPU -------------------------------------------------------------------------------------------------------------------


def full_size(dtype: torch.dtype) -> Gr00tN1d5:
    """The published sizes, without memory."""
    with torch.device("meta"):
        return Gr00tN1d5(ModelConfig.from_dicts(*network_config("full", published_vocabulary=True))).to(dtype)


def compiled(gpu: Gpu, dtype: torch.dtype, eight_bit: bool, monkeypatch: pytest.MonkeyPatch, directory: Path) -> list[Compiled]:
    """What an observation of the full size launches (on an H200 also two of them): one camera, a prompt of 288 tokens; eight_bit: with the step's
    weights in FP8."""
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    if not (BINARIES / "ptxas").exists() or not (BINARIES / "cuobjdump").exists():
        pytest.skip(f"this Triton has no ptxas and cuobjdump in {BINARIES}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(directory))
    model = with_8_bit_steps(full_size(dtype)) if eight_bit else full_size(dtype)
    with torch.no_grad(), compiling_for(gpu, monkeypatch) as found:
        for batch in (1, 2) if gpu is GPUS["H200"] and dtype == BF16 else (1,):
            launch_everything(model, prompt_tokens=288, cameras=1, batch=batch)
    return found


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "dtype", "eight_bit"),
    [
        *((name, BF16, False) for name in ("RTX 3090", "RTX 4090", "H200", "RTX 5090")),
        *((name, BF16, True) for name in ("RTX 4090", "H200", "RTX 5090")),
        ("H200", FP32, False),
    ],
)
def test_at_full_size_every_kernel_compiles_and_fits(
    name: str, dtype: torch.dtype, eight_bit: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = GPUS[name]
    found = compiled(gpu, dtype, eight_bit, monkeypatch, tmp_path)
    assert {kernel.name for kernel in found} == KERNELS
    for kernel in found:
        said = f"{kernel.name} ({kernel.options}): {kernel.registers} registers, {kernel.stack_bytes} B stack, {kernel.shared_bytes} B shared"
        assert kernel.stack_bytes == 0, f"registers spill: {said}"
        assert kernel.shared_bytes <= gpu.processor.shared_bytes, said
        multiplies = kernel.name in ("_linear_kernel", "_attention_kernel")
        if dtype == torch.float32:
            assert "tf32" not in kernel.ptx, f"fp32 is rounded to 10 bits: {said}"
        elif multiplies:
            assert "mma" in kernel.ptx, f"no tensor cores: {said}"
        if multiplies:
            assert "cp.async" in kernel.ptx, f"nothing is loaded ahead: {said}"
        elif kernel.name != "_norm_kernel" or "PARTS=0" in kernel.options:
            assert "ld.global.v4" in kernel.ptx, f"loads are not of 16 bytes: {said}"


# --- launch configurations ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1536, 1536), (16, 32, 1024), (49, 6144, 1536), (49, 1536, 6144), (98, 4608, 1536), (300, 33, 40)])
def test_tiles_cover_the_work_and_fit_shared_memory(gpu: Gpu, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    for splits in (False, True):
        config = gemm.choose_config(m, n, k, dtype, splits, gpu.processor)
        stage_bytes = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
        assert stage_bytes * config.num_stages <= gpu.processor.shared_bytes
        assert config.parts == 1 or (splits and k % (config.parts * config.block_k) == 0)
        assert min(config.block_m, config.block_n, config.block_k) >= 16


def test_products_that_read_the_most_weights_occupy_the_gpu() -> None:
    h200 = GPUS["H200"].processor
    for n, k, splits in ((1536, 1536, True), (1536, 6144, True), (6144, 1536, False), (4608, 1536, False)):
        config = gemm.choose_config(49, n, k, torch.bfloat16, splits, h200)
        assert config.parts * -(-n // config.block_n) >= 0.65 * h200.multiprocessors


def test_few_queries_are_spread_over_the_gpu_and_many_are_not() -> None:
    h200 = GPUS["H200"].processor
    assert attention.choose_config(1, 32, 49, 288, 48, torch.bfloat16, h200).block_t == 16
    assert attention.choose_config(1, 32, 288, 288, 64, torch.bfloat16, h200).block_t == 64
    assert attention.choose_config(1, 32, 288, 288, 64, torch.float32, h200).block_t == 32


def test_extents_are_powers_of_two() -> None:
    assert [power_of_two(count) for count in (1, 2, 3, 48, 64, 1152)] == [1, 2, 4, 64, 64, 2048]
    assert [dot_extent(count) for count in (1, 16, 48)] == [16, 16, 64]
    assert not Processor(128, 99 * 1024).deep
