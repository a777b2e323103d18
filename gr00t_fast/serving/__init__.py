"""The server baseline: a policy behind a socket, in the protocol of NVIDIA's GR00T N1.5 inference service (ZeroMQ, or its HTTP twin)."""

from __future__ import annotations

from typing import Any

_HOME = {"PolicyClient": "client", "PolicyServer": "server", "HttpPolicyServer": "http"}
__all__ = ["HttpPolicyServer", "PolicyClient", "PolicyServer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gr00t_fast.serving' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"gr00t_fast.serving.{_HOME[name]}"), name)
