"""Figures and where they come from: stages of a call in milliseconds, percentiles, and the machine, versions and commit behind a figure."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.base.errors import ConfigError

_PACKAGES = (
    *("gr00t_fast", "torch", "numpy", "lerobot", "transformers", "mujoco-core", "opencv-python-headless"),
    *("onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "tensorrt_rtx", "tensorrt"),
)

# A path from the root, at the begin of a word or after `--flag=` and `measured:`, down to its last name; not what follows `tcp:`.
_DIRECTORIES = re.compile(r"(^|=|measured:)/(?:[^/]*/)*(?=[^/])")


class StageTimer:
    """Collects stage durations of one call. `synchronise` is called at each stage's end, so that asynchronous GPU work is counted where it ran."""

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        self.stages_ms: dict[str, float] = {}
        self._synchronise = synchronise or (lambda: None)
        self._start_s = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self._synchronise()
        self.stages_ms[name] = self.stages_ms.get(name, 0.0) + (time.perf_counter() - start_s) * 1e3

    def finish(self) -> dict[str, float]:
        """The stages and their `total`, which includes what lay between them."""
        self._synchronise()
        return {**self.stages_ms, "total": (time.perf_counter() - self._start_s) * 1e3}


def percentiles(samples: Iterable[float]) -> dict[str, float] | None:
    """Return {count, p50, p95, p99, max} of the finite samples, or None when there are none."""
    values = np.asarray(list(samples), np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    quantiles: np.ndarray = np.asarray(np.percentile(values, (50, 95, 99)))
    return {
        "count": int(values.size),
        **{k: round(float(v), 3) for k, v in zip(("p50", "p95", "p99", "max"), (*quantiles, values.max()), strict=True)},
    }


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times longer `slow` took, paired by round: median and quartiles."""
    ratios = np.asarray(slow) / np.maximum(fast, 1e-6)
    return {name: round(float(np.percentile(ratios, share)), 3) for name, share in (("median", 50), ("p25", 25), ("p75", 75))}


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927); sound also at 0 and 1, where the usual one has no width."""
    if not 0 <= successes <= trials or trials < 1:
        raise ConfigError(f"expected 0 <= successes <= trials and a trial at least; got {successes} of {trials}.")
    rate, n = successes / trials, trials
    centre, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def peak_rss_bytes() -> int:
    """The most memory that this process has held at once."""
    if held := linux_says("self/status", "VmHWM"):  # where getrusage also counts what the parent held when it started this program
        return int(held.split()[0]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def linux_says(file: str, name: str) -> str:
    """The value of the first line `name: value` of a file below /proc; empty on other systems, and without such a line."""
    path = Path("/proc") / file
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def saturates_8_bits() -> bool:
    """Whether this processor (x86 without VNNI) adds two 8-bit products in 16 bits, which large ones exceed: Linux alone says it."""
    known = linux_says("cpuinfo", "flags").split()
    return "avx2" in known and not {"avx512_vnni", "avx_vnni"} & set(known)


def machine() -> dict[str, Any]:
    """Host facts a reader needs to judge a latency; asks torch about the GPU only when torch is loaded already."""
    # platform.processor() is empty or just the architecture on Linux
    processor = linux_says("cpuinfo", "model name") or platform.processor() or platform.machine()
    facts: dict[str, Any] = {"system": platform.platform(), "processor": processor, "cpus": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["torch_threads"] = torch.get_num_threads()
        facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        if facts["gpu"]:
            facts |= {"driver": linux_says("driver/nvidia/version", "NVRM version"), "cuda": torch.version.cuda}
    return facts


def versions() -> dict[str, str]:
    """Installed versions of what shapes the result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional, or run from a checkout
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with `-dirty` when changed; None when it is not a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # git is not installed, or the repository has no commit yet


def command_line() -> str:
    """The command line of this program, as a shell would need it."""
    return shlex.join(sys.argv)


def without_machine_paths(words: Sequence[str]) -> str:
    """The words as a shell would need them, absolute paths shortened to their last name: fit to be published."""
    return shlex.join(_DIRECTORIES.sub(r"\1", word.rstrip("/")) for word in words)


def provenance() -> dict[str, Any]:
    """Where a result comes from."""
    return {"machine": machine(), "versions": versions(), "git_commit": git_commit(), "command_line": without_machine_paths(sys.argv)}
