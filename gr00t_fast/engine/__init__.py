"""Ways to run the network: over the plain torch model, or over files exported from it. Same noise, same actions."""

from gr00t_fast.engine.base import Engine, PolicyInputs, check_own_engine, warming_up
from gr00t_fast.engine.choose import (
    CALIBRATED,
    ENGINES,
    EXPORTED,
    check_engine,
    make_engine,
    open_engine,
    prepare_engine,
    select_device,
    select_precision,
)
from gr00t_fast.engine.continuation import Continuation, prefix_weights
from gr00t_fast.engine.manifest import Target

__all__ = [
    "CALIBRATED",
    "ENGINES",
    "EXPORTED",
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
