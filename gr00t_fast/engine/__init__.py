"""Ways to run the network. Each wraps the plain model from outside and gives the same actions for the same noise."""

from gr00t_fast.engine.base import Engine
from gr00t_fast.engine.continuation import Goal, soft_mask
from gr00t_fast.engine.select import ENGINES, check_engine, make_engine, select_device, select_precision

__all__ = ["ENGINES", "Engine", "Goal", "check_engine", "make_engine", "select_device", "select_precision", "soft_mask"]
