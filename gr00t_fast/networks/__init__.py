"""The published networks, each described in one file, and what lerobot makes of them. A further one is a further file, and its name here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gr00t_fast.base.errors import CheckpointError, shown
from gr00t_fast.networks.lerobot import LEROBOT_N1D5, LEROBOT_N1D7, model_type_of
from gr00t_fast.networks.n1d5 import N1D5
from gr00t_fast.networks.n1d6 import N1D6
from gr00t_fast.networks.n1d7 import N1D7
from gr00t_fast.networks.spec import NetworkSpec

NETWORKS: dict[str, NetworkSpec] = {spec.model_type: spec for spec in (N1D5, N1D6, N1D7, LEROBOT_N1D5, LEROBOT_N1D7)}


def network_of(directory: Path, config: Mapping[str, Any]) -> NetworkSpec:
    """By what a checkpoint's directory and its config.json say. Raises CheckpointError."""
    found = config.get("model_type") or (model_type_of(directory, config) if "type" in config else None)
    if not isinstance(found, str) or found not in NETWORKS:
        known = " or ".join(f"'{spec.model_type}' ({spec.title})" for spec in NETWORKS.values() if not spec.prefix)
        raise CheckpointError(f"config.json says model_type {shown(found)}, expected {known}, or type 'groot' (lerobot).")
    return NETWORKS[found]
