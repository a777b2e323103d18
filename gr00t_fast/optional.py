"""One door to optional packages, so that a missing one is explained by the pip extra that brings it."""

from __future__ import annotations

import importlib
from types import ModuleType

from gr00t_fast.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise MissingExtraError naming `pip install gr00t_fast[extra]`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise  # the module is there but broken inside: hiding that would mislead
        raise MissingExtraError(
            f"this needs the package '{module.split('.')[0]}', which is not installed. Install it with: {install_command(extra)}"
        ) from error


def install_command(extra: str) -> str:
    """What to type, in either way to have this package."""
    return f"pip install 'gr00t_fast[{extra}]' (in a clone: pip install -e '.[{extra}]' -c constraints.txt)"
