"""Can simple_benchmark run here? Checks packages, memory, disk and the device, then builds each policy small and asks it for two actions.

    python benchmarks/verify_benchmark_setup.py

Exit code 0 when every policy answered. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from benchmarks.policy_zoo import BUILDERS, JOINTS, PUBLISHED_DISK_GB, PUBLISHED_MEMORY_GB, Setting, observation_of
from gr00t_fast.engine import select_device
from gr00t_fast.errors import Gr00tFastError, attempt
from gr00t_fast.measurement import machine, versions

_PACKAGES = {"lerobot": "robot", "num2words": "bench", "diffusers": "bench", "transformers": "bench", "matplotlib": "plots"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/simple_benchmark"), help="where simple_benchmark will write: its disk is looked at")
    arguments = parser.parse_args(argv)
    failed, code = attempt(lambda: _check(arguments), "interrupted: not everything was checked")
    return code if failed is None else int(bool(failed))


def _check(arguments: argparse.Namespace) -> list[str]:
    """Says what was found; returns what failed."""
    device = select_device(arguments.device)
    outcomes = {f"package {name}": _package(name, extra) for name, extra in _PACKAGES.items()}
    outcomes |= {f"policy {name}": _policy(name, device, arguments.seed) for name in BUILDERS}
    for what, problem in outcomes.items():
        print(f"{'ok  ' if problem is None else 'FAIL'} {what}{'' if problem is None else f': {problem}'}")
    for note in _notes(arguments.out):
        print(f"note {note}")
    failed = [what for what, problem in outcomes.items() if problem is not None]
    print(json.dumps({"benchmark": "verify_benchmark_setup", "device": str(device), "failed": failed, "machine": machine(), "versions": versions()}))
    return failed


def _package(name: str, extra: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"not installed. Install it with: pip install -e '.[{extra}]'"


def _policy(name: str, device: torch.device, seed: int) -> str | None:
    """What is wrong with it, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(False, ("front",), (160, 120), device, torch.float32, Path(scratch), seed)
        observation = observation_of(setting, np.random.default_rng(seed))
        try:
            arm = BUILDERS[name](setting)
            if arm.waiting:
                return "a new policy has actions waiting"
            first = arm.act(observation)
            if not arm.waiting:
                return "no action waits after a refill: steps and refills cannot be told apart"
            second = arm.act(observation)
        except (Gr00tFastError, ImportError, RuntimeError, ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}"
    good = all(action.shape == (JOINTS,) and np.isfinite(action).all() for action in (first, second))
    return None if good else f"expected {JOINTS} finite joints, got {first} and {second}"


def _notes(out: Path) -> list[str]:
    """What may be too little for the published sizes."""
    existing = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.exists())
    notes, free = [], shutil.disk_usage(existing).free
    if free < 1e9 * PUBLISHED_DISK_GB:
        notes.append(f"{free / 1e9:.0f} GB are free where --out points; --published needs {PUBLISHED_DISK_GB}")
    if importlib.util.find_spec("psutil"):
        import psutil

        available = psutil.virtual_memory().available
        if available < 1e9 * PUBLISHED_MEMORY_GB:
            notes.append(f"{available / 1e9:.0f} GB of memory are available; --published needs about {PUBLISHED_MEMORY_GB}")
    return notes


if __name__ == "__main__":
    sys.exit(main())
