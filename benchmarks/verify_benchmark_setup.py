"""Can simple_benchmark run here? It does, small: each policy is built and asked for two actions, a refill and a step.

    python benchmarks/verify_benchmark_setup.py

A policy that cannot be built is told in its row, with what to install. Exit code 0 when every policy answered. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks import simple_benchmark


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    return simple_benchmark.main(["--rounds=2", "--out=outputs/verify_benchmark_setup", *words])


if __name__ == "__main__":
    sys.exit(main())
