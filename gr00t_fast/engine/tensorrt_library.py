"""The two libraries called TensorRT behind one door: `tensorrt_rtx` (RTX desktop and laptop) and `tensorrt` (Jetson, data centre).

They share their Python interface as far as this project uses it. What differs is asked of the module itself, never of its version number.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from types import ModuleType
from typing import Any

from gr00t_fast.base.errors import ConfigError, EngineError, MissingExtraError, closest, install_command, require

RTX, STANDARD = "tensorrt_rtx", "tensorrt"
BUILDERS = (RTX, STANDARD)  # in the order of preference of `auto`: the first builds without a GPU
ANY_GPU = "8.0"  # the oldest compute capability that "any GPU" means to both libraries: Ampere
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute, cuda.h


def installed() -> list[str]:
    """Which of the two can be imported here; looks for them without importing."""
    return [name for name in BUILDERS if importlib.util.find_spec(name) is not None]


def choose(name: str) -> str:
    """`auto` -> what is installed, tensorrt_rtx first. Raises ConfigError for an unknown name and MissingExtraError when nothing is there."""
    if name != "auto":
        if name not in BUILDERS:
            raise ConfigError(f"unknown builder '{name}'.{closest(name, BUILDERS)} Expected auto, {' or '.join(BUILDERS)}.")
        return name
    found = installed()
    if not found:
        raise MissingExtraError(
            "this needs TensorRT, and neither 'tensorrt_rtx' nor 'tensorrt' is installed. For GeForce and RTX GPUs: "
            f"{install_command('tensorrt_rtx')}. For data-centre GPUs the extra is 'tensorrt'. On a Jetson it comes with JetPack."
        )
    return found[0]


def load(name: str) -> ModuleType:
    """Import `tensorrt_rtx` or `tensorrt`. Raises MissingExtraError with the command that installs it, EngineError when it is there but broken."""
    try:
        return require("tensorrt_rtx", "tensorrt_rtx") if name == RTX else require("tensorrt", "tensorrt")
    except MissingExtraError:
        raise
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{name} is installed and does not load ({error}): its own libraries are missing or for another CUDA. "
            f"Run: pip install --force-reinstall {name}"
        ) from error


def strongly_typed(trt: ModuleType) -> int:
    """Flags of a network whose types are those of the ONNX file; TensorRT 11 knows no other kind."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def make_log(trt: ModuleType) -> Any:
    """A TensorRT logger that keeps warnings and errors in `lines`, for messages of our own, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[name-defined]  # the base class exists only once the library is loaded
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                self.lines.append((severity.name, message.strip()))

        @property
        def errors(self) -> list[str]:
            return [message for severity, message in self.lines if severity != "WARNING"]

        def last_error(self) -> str:
            return self.errors[-1] if self.errors else "the library gave no reason"

        def first_error(self) -> str:
            """What follows the first error is mostly its echo through the library's layers."""
            return self.errors[0] if self.errors else "the library gave no reason"

    return Log()


def version_tuple(capability: str) -> tuple[int, ...]:
    """A compute capability as numbers, to be compared: `10.0` -> (10, 0)."""
    return tuple(int(part) for part in capability.split("."))


def gpu_capability() -> str | None:
    """Compute capability of the first GPU, e.g. `8.9`, asked of the CUDA driver itself; None without a driver or GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device),
    )
    return f"{major.value}.{minor.value}" if all(call() == 0 for call in calls) else None
