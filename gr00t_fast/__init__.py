"""GR00T N1.5, N1.6 and N1.7 on an SO-100 arm: one process, and the actions of the code that trained the checkpoint.

Importing this package imports nothing else; `load_policy` and the types are looked up when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gr00t_fast.base.contracts import ActionChunk, Observation
    from gr00t_fast.base.errors import Gr00tFastError
    from gr00t_fast.inputs.data_config import DataConfig
    from gr00t_fast.policy import Gr00tPolicy, load_policy

__version__ = "0.2.0"

_HOME = {
    "load_policy": "policy",
    "Gr00tPolicy": "policy",
    "DataConfig": "inputs.data_config",
    "Observation": "base.contracts",
    "ActionChunk": "base.contracts",
    "Gr00tFastError": "base.errors",
}
__all__ = ["ActionChunk", "DataConfig", "Gr00tFastError", "Gr00tPolicy", "Observation", "__version__", "load_policy"]

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'gr00t_fast' has no attribute '{name}'")
        import importlib

        return getattr(importlib.import_module(f"gr00t_fast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
