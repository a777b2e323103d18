"""The published networks, each described in one file. A further one is a further file, and its name here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gr00t_fast.errors import CheckpointError, shown
from gr00t_fast.networks.n1d5 import N1D5
from gr00t_fast.networks.n1d7 import N1D7
from gr00t_fast.networks.spec import NetworkSpec

NETWORKS: dict[str, NetworkSpec] = {spec.model_type: spec for spec in (N1D5, N1D7)}


def network_of(config: Mapping[str, Any]) -> NetworkSpec:
    """By what config.json says. Raises CheckpointError."""
    found = config.get("model_type")
    if not isinstance(found, str) or found not in NETWORKS:
        known = " or ".join(f"'{spec.model_type}' ({spec.title})" for spec in NETWORKS.values())
        raise CheckpointError(f"config.json says model_type {shown(found)}, expected {known}. N1.6 and others have another network.")
    return NETWORKS[found]
