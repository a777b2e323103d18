"""One door to optional packages, so that a missing one is explained by the pip extra that brings it."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

from gr00t_fast.errors import MissingExtraError

_ROOT = Path(__file__).parent.parent  # of the clone


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise MissingExtraError with the command that installs `extra`. OpenVINO is imported without its telemetry."""
    if module.split(".")[0] == "openvino":
        _leave_out_telemetry()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise  # the module is there but broken inside: hiding that would mislead
        raise MissingExtraError(
            f"this needs the package '{module.split('.')[0]}', which is not installed. Install it with: {install_command(extra)}"
        ) from error


def _leave_out_telemetry() -> None:
    """`import openvino` (2026.4) writes a client id into ~/intel and posts an event to an analytics address, unless that package cannot be imported.

    Its own switches are no use here: `opt_in_out` writes into the user's home, and an environment variable for CI acts on child processes too.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # makes `import openvino_telemetry` an ImportError


def install_command(extra: str = "") -> str:
    """What to type to add an extra to this installation, a clone or a wheel; without `extra`, to install it again.

    In a clone it names the pins that this environment can have: lerobot 0.6, which needs Python 3.12, breaks with those of lerobot 0.4.
    """
    bracket = f"[{extra}]" if extra else ""
    if not (_ROOT / "constraints.txt").is_file():
        return f"pip install 'gr00t_fast{bracket}'"
    try:
        with_06 = importlib.metadata.version("lerobot") >= "0.5"
    except importlib.metadata.PackageNotFoundError:
        with_06 = sys.version_info >= (3, 12)
    return f"pip install -e '.{bracket}' -c constraints{'-py312' if with_06 else ''}.txt (in the clone)"
