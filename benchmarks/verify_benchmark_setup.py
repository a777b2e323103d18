"""Can simple_benchmark run here? Checks packages, memory, disk and the device, then builds each policy small and asks it for two actions.

    python benchmarks/verify_benchmark_setup.py

Exit code 0 when every policy answered. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np
import torch

from benchmarks.lib.policy_zoo import BUILDERS, JOINTS, PUBLISHED_DISK_GB, PUBLISHED_MEMORY_GB, Setting, observation_of
from benchmarks.lib.program import count_of, provenance, read_flags
from gr00t_fast.engine import select_device
from gr00t_fast.errors import Gr00tFastError, attempt, install_command

_PACKAGES = {"lerobot": "robot", "num2words": "bench", "diffusers": "bench", "transformers": "bench", "matplotlib": "plots"}


@dataclass
class Config:
    device: str = "auto"  # cpu, cuda, ...; auto: a GPU where there is one
    seed: int = 0  # of weights and observations
    json: bool = False  # also print the result as one line of JSON, the last of the output
    out: Path = Path("outputs/simple_benchmark")  # where simple_benchmark will write: its disk is looked at


def main(argv: Sequence[str] | None = None) -> int:
    config = read_flags(Config, argv, __doc__)
    failed, code = attempt(lambda: _check(config), "interrupted: not everything was checked")
    return code if failed is None else int(bool(failed))


def _check(config: Config) -> list[str]:
    """Says what was found; returns what failed."""
    device = select_device(config.device)
    outcomes = {f"package {name}": _package(name, extra) for name, extra in _PACKAGES.items()}
    outcomes |= {f"policy {name}": _policy(name, device, config.seed) for name in BUILDERS}
    for what, problem in outcomes.items():
        print(f"{'ok  ' if problem is None else 'FAIL'} {what}{'' if problem is None else f': {problem}'}")
    for note in _notes(config.out):
        print(f"note {note}")
    failed = [what for what, problem in outcomes.items() if problem is not None]
    print("simple_benchmark can run here" if not failed else f"simple_benchmark cannot run all of it here: {count_of(len(failed), 'check')} failed")
    if config.json:
        print(json.dumps({"benchmark": "verify_benchmark_setup", "device": str(device), "failed": failed, **provenance(config.seed)}))
    return failed


def _package(name: str, extra: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"not installed. Install it with: {install_command(extra)}"


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
