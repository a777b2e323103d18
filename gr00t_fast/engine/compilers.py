"""Compilers of the system that compiled engines need, looked for before gigabytes are read and not when the first kernel is built."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from gr00t_fast.errors import ConfigError

# In the order in which Inductor (C++) and triton (C) look. On a GPU C is enough: it is what loads a kernel.
_CXX, _C = ("g++", "clang++", "c++"), ("gcc", "clang")


def check_compiler(engine: str, device_type: str) -> None:
    """Raises ConfigError where Inductor would find no C++ compiler for a CPU, or triton no C compiler or no headers of Python for a GPU."""
    if device_type == "cpu":
        _check("CXX", _CXX, f"engine '{engine}' needs a C++ compiler on a CPU", "Install g++", "eager")
    elif not _has_built_before():
        _check("CC", _C, f"engine '{engine}' needs a C compiler", "Install gcc", "cuda_graph")
        include = sysconfig.get_paths("posix_prefix")["include"]
        if not (Path(include) / "Python.h").is_file():
            version = ".".join(map(str, sys.version_info[:2]))
            raise ConfigError(
                f"engine '{engine}' needs the headers of Python {version}, but there is no {include}/Python.h. Install python{version}-dev, "
                "or use --engine=cuda_graph."
            )


def _check(variable: str, usual: tuple[str, ...], needs: str, install: str, instead: str) -> None:
    named = os.environ.get(variable)
    if not any(shutil.which(compiler) for compiler in ((named,) if named else usual)):
        looked = f"{variable}={named}" if named else ", ".join(usual)
        raise ConfigError(
            f"{needs}, but there is none (looked for {looked}). {install} or name yours with {variable}=..., or use --engine={instead}."
        )


def _has_built_before() -> bool:
    """Whether triton can load kernels with what it keeps on disk, or builds in a way of its own: an image may come without a compiler."""
    if importlib.util.find_spec("triton") is None:
        return True  # the engine says so itself, or does without
    try:
        from triton import knobs
    except ImportError:  # before triton 3.3: where it looks is not known
        return True
    return knobs.build.impl is not None or any(Path(knobs.cache.dir).glob(f"*/*{sysconfig.get_config_var('EXT_SUFFIX')}"))
