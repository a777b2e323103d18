"""`gr00t-fast random-checkpoint`: a checkpoint with random weights, where no trained one is at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gr00t_fast.base.contracts import NetworkName
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.flags import size_of
from gr00t_fast.cli.main import Command


@dataclass(kw_only=True)
class RandomCheckpointConfig:
    """Write a checkpoint with random weights in NVIDIA's published format, for demonstrations, tests and timing."""

    out: Path  # directory to create
    network: NetworkName = "n1.5"  # which of the published networks
    size: Literal["tiny", "demo", "full"] = "demo"  # full: the published sizes, 4.7 GB, of N1.6 6.6, of N1.7 6.3
    data_config: str = "so100"  # one of NVIDIA's for this arm: so100, so100_dualcam
    resolution: str = "640x480"  # of the imagined training videos
    seed: int = 0  # of the weights
    overwrite: bool = False  # replace the files of a checkpoint that is there


def _write_as_asked(config: RandomCheckpointConfig) -> int:
    from gr00t_fast.virtual.random_checkpoint import write_random_checkpoint

    if config.out.is_dir() and any(config.out.iterdir()) and not config.overwrite:
        raise ConfigError(f"{config.out} exists and is not empty. Choose another --out, or say --overwrite.")
    written = write_random_checkpoint(config.out, config.size, config.data_config, size_of(config.resolution), config.seed, network=config.network)
    print(f"{written}: a GR00T {config.network.upper()} checkpoint of size '{config.size}' with RANDOM weights. Its actions mean nothing.")
    return 0


main = Command(
    RandomCheckpointConfig,
    _write_as_asked,
    "usage: gr00t-fast random-checkpoint --out=DIR [--flag=value ...]",
    interrupted="interrupted: no checkpoint was written",
)
