"""Can simple_benchmark run here? It does, small: each policy is built and asked for two actions, a refill and a step.

    python benchmarks/verify_benchmark_setup.py

The row of a policy that cannot be built says what to install. Exit code 0 when every policy answered. Nothing is downloaded.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from benchmarks import simple_benchmark


def main(words: list[str]) -> int:
    return simple_benchmark.main(["--rounds=2", "--out=outputs/verify_benchmark_setup", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
