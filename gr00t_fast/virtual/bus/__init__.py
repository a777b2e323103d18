"""A virtual bus of six Feetech STS3215 servos: try any SO-100 program without an arm, and every fault without breaking one.

In a process: `VirtualBus`. From the command line: `gr00t-fast bus --link=PATH`. Standard library only.
"""

from gr00t_fast.virtual.bus.bus import VirtualBus
from gr00t_fast.virtual.bus.faults import Fault
from gr00t_fast.virtual.bus.servo import Plant, Servo

__all__ = ["Fault", "Plant", "Servo", "VirtualBus"]
