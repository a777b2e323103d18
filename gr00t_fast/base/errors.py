"""Every error this package raises on purpose.

One class per thing the user can act on. Each message has three parts: what was expected, what came, what to do next.
`Gr00tFastError` is the only base class that command-line programs catch; anything else is a bug and keeps its traceback. `require` imports optional
packages: a missing one is explained by the pip extra that brings it.
"""

from __future__ import annotations

import difflib
import importlib
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

AT_LEAST_1, AT_LEAST_0 = (1, math.inf), (0, math.inf)  # ranges of counts, for `check_ranges`
_ROOT = Path(__file__).parents[2]  # of the clone
_HEAD_CHARACTERS, _TAIL_CHARACTERS, _SHOWN_CHARACTERS = 4000, 1000, 80


class Gr00tFastError(Exception):
    """Base of all errors with an explanation for the user. One that quotes a hostile file or message at length shows its beginning and its end."""

    def __str__(self) -> str:
        text = super().__str__()
        left_out = len(text) - _HEAD_CHARACTERS - _TAIL_CHARACTERS
        return text if left_out <= 0 else f"{text[:_HEAD_CHARACTERS]} ... ({left_out} characters left out) ... {text[-_TAIL_CHARACTERS:]}"


class ConfigError(Gr00tFastError, ValueError):
    """A flag, configuration file or model configuration holds a value that cannot be used: exit code 2. Not raised while an arm moves."""


class CheckpointError(Gr00tFastError, ValueError):
    """The checkpoint directory is incomplete, damaged, or not GR00T N1.5, N1.6 or N1.7."""


class EngineError(Gr00tFastError, RuntimeError):
    """An exported engine is incomplete, damaged, or cannot run on this machine; the message names the command that makes one."""


class StaleEngineError(EngineError):
    """An exported engine belongs to other weights, cameras, another embodiment or data configuration; the message names the command to run."""


class ObservationError(Gr00tFastError, ValueError):
    """An observation given to the policy has a missing key or a wrong dtype, shape or value."""


class PreflightError(Gr00tFastError):
    """Robot and checkpoint do not fit together; raised before the arm may move."""


class RobotError(Gr00tFastError, RuntimeError):
    """The arm, its bus or a camera failed in a way that retries and reconnecting did not cure."""


class BusFault(RobotError):  # noqa: N818 - what it is called, as an emergency stop is
    """The servo bus or a servo cannot be relied on: a slow move down is not possible, so that the torque goes off at once."""


class MissedReadingError(RobotError):
    """An exchange with the servos failed in a way that usually passes; the arm holds its last goal meanwhile."""


class ArmAwayError(RobotError):
    """The arm is out of reach for a while, or was: its port is lost, or its torque was and is on again. `patience_s`: how long to wait for it."""

    def __init__(self, message: str, patience_s: float) -> None:
        super().__init__(message)
        self.patience_s = patience_s


class CameraError(RobotError):
    """A camera failed; arm and bus are sound."""


class UnsafeActionError(Gr00tFastError, RuntimeError):
    """The policy returned actions that must not reach the motors (NaN or infinite)."""


class InferenceTimeoutError(Gr00tFastError, RuntimeError):
    """Inference in this process has given the arm nothing to do for longer than it may hold its pose."""


class WireError(Gr00tFastError, ValueError):
    """A message between policy client and server is damaged, too large, or holds what the protocol does not carry."""


class ServerError(Gr00tFastError, RuntimeError):
    """A policy server refused a request or cannot serve; the message carries its reason, and `code` its kind, where a program may have to know it."""

    BUSY, STOPPING, REPLACED, UNAUTHORISED, UNKNOWN_ENDPOINT = "busy", "stopping", "replaced", "unauthorised", "unknown_endpoint"

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class ServerUnreachableError(ServerError):
    """A policy server did not answer in time, or the connection to it was lost; the next call connects anew."""


class RecordingError(Gr00tFastError, RuntimeError):
    """What a run leaves cannot be written any more: the disk is full, a camera changed, or the process that writes it has ended."""


class MissingExtraError(Gr00tFastError, ImportError):
    """An optional dependency is not installed; the message names the pip extra that brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise MissingExtraError with the command that installs `extra`. OpenVINO is imported without its telemetry."""
    package = module.split(".")[0]
    if package == "openvino":
        # `import openvino` (2026.4) writes a client id into ~/intel and posts an event, unless this package cannot be imported. Its own switches are
        # no use: `opt_in_out` writes into the user's home, and an environment variable for CI acts on child processes too.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or package != error.name.split(".")[0]:
            raise  # the module is there but broken inside: hiding that would mislead
        raise MissingExtraError(f"this needs the package '{package}', which is not installed. Install it with: {install_command(extra)}") from error


def install_command(extra: str = "") -> str:
    """What to type to add an extra to this installation, a clone or a wheel; without `extra`, to install it again.

    In a clone it names the pins that this environment can have: lerobot 0.6, which needs Python 3.12, breaks with those of lerobot 0.4, and the extra
    `bench` with those of lerobot 0.6.
    """
    import importlib.metadata  # not needed by programs that lack nothing

    bracket = f"[{extra}]" if extra else ""
    if not (_ROOT / "requirements/constraints.txt").is_file():
        return f"pip install 'gr00t_fast{bracket}'"
    try:
        with_06 = importlib.metadata.version("lerobot") >= "0.5"
    except importlib.metadata.PackageNotFoundError:
        with_06 = sys.version_info >= (3, 12)
    if with_06 and extra == "bench":
        return f"pip install -e '.{bracket}' -c requirements/constraints.txt (in the clone, on Python 3.11: lerobot 0.6 does not go with it)"
    return f"pip install -e '.{bracket}' -c requirements/constraints{'-py312' if with_06 else ''}.txt (in the clone)"


def closest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ` Did you mean 'x'?` for the nearest of `known`, shown with `prefix`, or an empty string when none is a slip of the keys away."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.66 if len(word) <= 4 else 0.75)
    return f" Did you mean '{prefix}{match[0]}'?" if match else ""


def check_ranges(options: object, prefix: str = "", /, **ranges: tuple[float, float]) -> None:
    """Raises ConfigError for a field outside its range, or a list with such a number; fields are called as the flags that set them, without `prefix`.
    None and "auto" are no numbers and pass."""
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        for each in value if isinstance(value, list) else [value]:
            if each not in (None, "auto") and not low <= each <= high:
                raise ConfigError(f"--{prefix}{name}={each:g} must be {f'at least {low:g}' if math.isinf(high) else f'from {low:g} to {high:g}'}.")


def one_line(error: object) -> str:
    """An error of several lines as a part of another message."""
    return " ".join(str(error).split())


def shown(value: object) -> str:
    """The beginning of a value, for an error: it may come from a hostile file."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a huge number"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
