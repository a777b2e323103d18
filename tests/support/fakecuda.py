"""Run engines on a CUDA device that is not there, and count what they ask of it (fakecuda.cpp). Figures at the published size are committed:

    python tests/support/fakecuda.py       # writes tests/golden/gpu_graphs.json; some ten minutes, most of them in Inductor

torch's CUDA build, Inductor and Triton run as on a GPU, in a process of its own with the stand-in loaded first; kernels compute nothing.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "tests" / "golden" / "gpu_graphs.json"
SHORT = {"n1.5": 2, "n1.6": 4, "n1.7": 4}  # blocks after which the transformer repeats itself: what `make test` compiles in some seconds


@dataclass(frozen=True)
class Case:
    """One engine with an observation of `cameras` pictures and an instruction of some words.

    wide: N1.7, pictures of 4:3 (N1.6's always are). short: the published network with one block in each tower and as few in the transformer as have
    all that is in it.
    """

    network: str
    engine: str
    cameras: int = 1
    wide: bool = False
    continues: bool = False
    short: bool = False

    @property
    def name(self) -> str:
        words = (
            self.network,
            self.engine,
            f"{self.cameras} cameras" if self.cameras > 1 else "",
            "4:3" if self.wide else "",
            "prefix" if self.continues else "",
        )
        return ", ".join(filter(None, (*words, "short" if self.short else "")))


def groups(quick: bool) -> list[list[Case]]:
    """What is committed, by process: what ran before in one is seen in what the next engine reserves.

    quick: Inductor compiles only once, with few blocks, of the network with more in it.
    """
    found = []
    for network in ("n1.5", "n1.6", "n1.7"):
        case = functools.partial(Case, network, "cuda_graph")
        compiled = functools.partial(Case, network, "compiled", short=True)
        recorded = [case(), case(cameras=2), case(continues=True)]
        if quick:
            found += [[compiled()], recorded] if network == "n1.7" else [recorded]
        else:
            found.append([compiled(), compiled(cameras=2), compiled(continues=True)])
            found += [recorded, [Case(network, "compiled")]]
        if network == "n1.7":
            recorded.append(case(wide=True))
    return found


# --- outside: build the stand-in, start a process with it ----------------------------------------------------------------------------------


def missing() -> str | None:
    """Why the stand-in cannot be used here."""
    if sys.platform != "linux" or not shutil.which("g++"):
        return "needs Linux and g++"
    site = Path(sysconfig.get_paths()["purelib"])
    if not all((site / each).is_dir() for each in ("nvidia/cuda_runtime/include", "nvidia/cublas/include", "triton/backends/nvidia/include")):
        return "needs torch's CUDA build for Linux and triton, with the headers that their wheels bring"
    return None


def build(directory: Path) -> Path:
    """Compile the stand-in in `directory`. Raises CalledProcessError."""
    site, stub = Path(sysconfig.get_paths()["purelib"]), directory / "nv"
    stub.mkdir()
    # the wheels lack this header of libcu++, of which nothing here is used
    (stub / "target").write_text("#define NV_IF_TARGET(...)\n#define NV_IF_ELSE_TARGET(...)\n#define NV_DISPATCH_TARGET(...)\n")
    includes = [f"-I{site}/nvidia/cuda_runtime/include", f"-I{site}/nvidia/cublas/include"]
    includes += ["-idirafter", f"{site}/triton/backends/nvidia/include", "-idirafter", str(directory)]
    flags = ["-O1", "-shared", "-fPIC", "-std=c++17", "-w", "-fpermissive", "-Wl,-soname,libcuda.so.1"]
    library = directory / "libcuda.so.1"
    subprocess.run(["g++", *flags, *includes, str(ROOT / "tests" / "support" / "fakecuda.cpp"), "-o", str(library), "-ldl", "-lpthread"], check=True)
    return library


def environment(library: Path, capability: int = 90, multiprocessors: int = 132, memory_gb: float = 141) -> dict[str, str]:
    """For a process that finds such a GPU. What it compiles stays beside `library`, apart for each capability."""
    kept = library.parent / f"sm_{capability}"
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TRITON_CACHE_DIR": str(kept / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        "FAKECUDA_CC": str(capability),
        "FAKECUDA_SMS": str(multiprocessors),
        "FAKECUDA_MEM_GB": str(memory_gb),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
    }


def run(library: Path, wanted: list[Case], timeout_s: float, **device: float) -> dict[str, dict[str, Any]]:
    """Figures of each case, by name, from a process of its own. Raises RuntimeError with its last output."""
    command = [sys.executable, "-W", "ignore", __file__, *(json.dumps(dataclasses.asdict(case)) for case in wanted)]
    done = subprocess.run(command, cwd=ROOT, env=environment(library, **device), capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


# --- inside --------------------------------------------------------------------------------------------------------------------------------


class Device:
    """What the stand-in has counted."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.fake_number.restype, self._library.fake_number.argtypes = ctypes.c_long, [ctypes.c_char_p]

    def reset(self) -> None:
        self._library.fake_reset()

    def __getattr__(self, name: str) -> int:
        """violations; mallocs and hostallocs, of the device and of pinned memory; peak (bytes)."""
        return self._library.fake_number(name.encode())

    def counted(self) -> Counter[str]:
        """What was launched or asked for, and how often; inside a recording with `captured ` before its name."""
        with tempfile.NamedTemporaryFile("r") as file:
            self._library.fake_dump(file.name.encode())
            return Counter({line.rstrip("\n").split("\t", 1)[1]: int(line.split("\t", 1)[0]) for line in file})


def published_network(version: str, short: bool = False) -> Any:
    """bf16, on the device, with the published vocabulary. Its weights are whatever lies there: nothing is computed."""
    import torch

    from gr00t_fast.model import Gr00t
    from gr00t_fast.networks import n1d5, n1d6, n1d7
    from gr00t_fast.virtual.random_checkpoint import network_config

    config, backbone = network_config("full", True, version)
    head, last = (config["action_head_cfg"], config["backbone_cfg"]) if version == "n1.5" else (config, config)
    if short:
        last["select_layer"] = backbone["text_config"]["num_hidden_layers"] = head.get("vl_self_attention_cfg", {})["num_layers"] = 1
        head["diffusion_model_cfg"]["num_layers"] = SHORT[version]
        backbone["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0]} if version == "n1.7" else {"num_hidden_layers": 1}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            made = Gr00t({"n1.5": n1d5, "n1.6": n1d6, "n1.7": n1d7}[version].read_config(config, backbone))
            return made.requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def call(engine: Any, case: Case, seed: int = 0) -> Any:
    """One inference: four steps, a picture of the usual size per camera, an instruction of as many tokens as `Place the block in the bowl`."""
    import numpy as np
    import torch

    from gr00t_fast.base.measurement import StageTimer
    from gr00t_fast.engine import Continuation, PolicyInputs

    usual = {"n1.5": ((480, 640), 256), "n1.6": ((252, 336), 108), "n1.7": ((256, 256), 64)}
    size, tokens = ((256, 352), 88) if case.wide else usual[case.network]
    head, images, generator = engine.model.config.head, tokens * case.cameras, np.random.default_rng(seed)
    text = {"n1.5": 32, "n1.6": 29, "n1.7": 15}[case.network]
    frames = [generator.integers(0, 255, (1, *size, 3), dtype=np.uint8) for _ in range(case.cameras)]
    ids, lengths = np.full((1, images + text), 7), np.full(1, images + text)
    state = np.zeros((1, head.state_dim), np.float32)
    inputs = PolicyInputs(frames, ids, lengths, np.arange(images) + 3, state, engine.model.to_pixels)
    noise = torch.randn(1, head.action_horizon, head.action_dim)
    continued = {"continuation": Continuation(noise, torch.ones(noise.shape))} if case.continues else {}
    return engine.run(inputs, noise, 4, StageTimer(), **continued)


def figures(engine: Any, case: Case, device: Device) -> dict[str, Any]:
    """Of a first call, which records the graph, and of a second one with other contents."""

    device.reset()
    call(engine, case)
    nodes = sum(count for name, count in device.counted().items() if name.startswith("captured "))
    violations, memory = device.violations, device.peak
    device.reset()
    before = allocations()
    call(engine, case, seed=1)
    return {
        "nodes": nodes,
        "violations": violations + device.violations,
        "recording_gb": round(memory / 1e9, 2),
        "second_call": dict(device.counted()),
        "second_call_allocations": device.mallocs + device.hostallocs + allocations() - before,
    }


def allocations() -> int:
    """What was taken so far from torch's own stores, of the device and of pinned memory, which ask CUDA for nothing while they have room."""
    import torch

    return torch.cuda.memory_stats()["allocation.all.allocated"] + torch.cuda.host_memory_stats()["active_requests.allocated"]


def inside(wanted: list[Case]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One network for all of them, one engine at a time."""
    import torch

    from gr00t_fast.engine import make_engine

    device = Device()
    model = published_network(wanted[0].network, wanted[0].short)
    for name in dict.fromkeys(case.engine for case in wanted):
        device.reset()
        engine = make_engine(name, model)
        making_gb = round(device.peak / 1e9, 2)
        gc.collect()
        torch.cuda.empty_cache()
        for case in (case for case in wanted if case.engine == name):
            yield case.name, {**figures(engine, case, device), "making_gb": making_gb}
            engine.forget()
            gc.collect()
            torch.cuda.empty_cache()
        del engine


def main(arguments: list[str]) -> None:
    if arguments:
        print(json.dumps(dict(inside([Case(**json.loads(each)) for each in arguments]))))
        return
    if why := missing():
        sys.exit(f"error: {why}")
    with tempfile.TemporaryDirectory() as directory:
        library, found = build(Path(directory)), {}
        for group in groups(quick=False):
            found |= run(library, group, timeout_s=3600)
    import torch
    import triton

    what = "what engines ask of a CUDA device of compute capability 9.0, counted by tests/support/fakecuda.py on one that is not there"
    COMMITTED.write_text(json.dumps({"what": what, "torch": torch.__version__, "triton": triton.__version__, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
