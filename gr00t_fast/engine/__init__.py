"""Ways to run the network: over the plain torch model, or over files exported from it. Same noise, same actions.

Importing this package imports nothing else, since the processes that build TensorRT's engines need no torch; names are looked up when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gr00t_fast.engine.choose import (
        ENGINES,
        EXPORTED,
        check_engine,
        make_engine,
        open_engine,
        prepare_engine,
        select_device,
        select_precision,
    )
    from gr00t_fast.engine.eager import PRECISIONS, Continuation, Engine, PolicyInputs, check_own_engine, prefix_weights, warming_up
    from gr00t_fast.engine.manifest import Target

__all__ = [
    "ENGINES",
    "EXPORTED",
    "PRECISIONS",
    "Continuation",
    "Engine",
    "PolicyInputs",
    "Target",
    "check_engine",
    "check_own_engine",
    "make_engine",
    "open_engine",
    "prefix_weights",
    "prepare_engine",
    "select_device",
    "select_precision",
    "warming_up",
]
_HOME = dict.fromkeys(("PRECISIONS", "Continuation", "Engine", "PolicyInputs", "check_own_engine", "prefix_weights", "warming_up"), "eager")
_HOME |= {"Target": "manifest"}  # all others: choose

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'gr00t_fast.engine' has no attribute '{name}'")
        import importlib

        return getattr(importlib.import_module(f"gr00t_fast.engine.{_HOME.get(name, 'choose')}"), name)
