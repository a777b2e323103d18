"""A virtual bus of six Feetech STS3215 servos: try any SO-100 program without an arm, and every fault without breaking one.

In a process: `VirtualBus`. From the command line: `gr00t-fast bus --link=PATH`. Standard library only.
"""

from gr00t_fast.robots.virtual_bus.bus import VirtualBus
from gr00t_fast.robots.virtual_bus.faults import Fault
from gr00t_fast.robots.virtual_bus.servo import JointCalibration, Plant, Register, Servo, default_calibration, load_calibration, save_calibration

__all__ = [
    "Fault",
    "JointCalibration",
    "Plant",
    "Register",
    "Servo",
    "VirtualBus",
    "default_calibration",
    "load_calibration",
    "save_calibration",
]
