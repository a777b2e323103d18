"""Linear layers in 8 bits for the torch model: FP8 and INT8, with scales from export/calibrate.py."""

from gr00t_fast.engine.eight_bit.engines import EightBitEngine, EightBitTwin, check_gpu, has_product, prepare
from gr00t_fast.engine.eight_bit.linear import FORMATS, InputScale
from gr00t_fast.engine.eight_bit.rewrite import PARTS, Rounding, linear_layers, part_of, rewritten, rounded_layers, weight_bytes, with_layers
from gr00t_fast.engine.eight_bit.store import Calibration, read_calibration, write_calibration

__all__ = [
    "FORMATS",
    "PARTS",
    "Calibration",
    "EightBitEngine",
    "EightBitTwin",
    "InputScale",
    "Rounding",
    "check_gpu",
    "has_product",
    "linear_layers",
    "part_of",
    "prepare",
    "read_calibration",
    "rewritten",
    "rounded_layers",
    "weight_bytes",
    "with_layers",
    "write_calibration",
]
