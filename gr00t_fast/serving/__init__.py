"""The server baseline: a policy behind a socket, in the protocol of NVIDIA's GR00T N1.5 inference service (ZeroMQ, or its HTTP twin)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gr00t_fast.serving.client import PolicyClient
    from gr00t_fast.serving.http import HttpPolicyServer
    from gr00t_fast.serving.server import PolicyServer

_HOME = {"PolicyClient": "client", "PolicyServer": "server", "HttpPolicyServer": "http"}
__all__ = ["HttpPolicyServer", "PolicyClient", "PolicyServer"]

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'gr00t_fast.serving' has no attribute '{name}'")
        import importlib

        return getattr(importlib.import_module(f"gr00t_fast.serving.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
