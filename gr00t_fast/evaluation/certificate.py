"""A certificate: what was measured on a machine and whether it passed, fit to be published: no path, no host, no name of a user's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gr00t_fast import __version__
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.files import atomic_write

_OF_MACHINE = ("processor", "cpus", "torch_threads", "gpu", "driver", "cuda")
_OF_NETWORK = ("kind", "parameters", "weights", "device", "precision", "cameras", "observations", "recorded", "rounds")
_OF_ENGINE = ("engine", "arithmetic", "files", "times_ms", "stages_ms", "error_limit")


def certificate(results: Iterable[Mapping[str, Any]], origin: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready. results: of `bench.compare`, with device and precision; origin: of `measurement.provenance`. Engines that could not be used are
    named without their reasons, which may name files."""
    measured = []
    for result in results:
        engines = {name: {key: arm[key] for key in _OF_ENGINE} for name, arm in result["engines"].items()}
        for name, arm in result["engines"].items():  # JSON has no NaN
            errors = {part: value if math.isfinite(value) else None for part, value in arm["error_deg"].items()}
            engines[name] |= {"error_joint_units": errors, "passed": arm["within_limit"]}
        measured.append({key: result[key] for key in _OF_NETWORK} | {"engines": engines, "not_usable": sorted(result["refused"])})
    passed = [engine["passed"] for each in measured for engine in each["engines"].values()]
    machine = {name: origin["machine"].get(name) for name in _OF_MACHINE} | {"system": str(origin["machine"].get("system")).partition("-")[0]}
    head = {"certificate": 1, "commit": origin["git_commit"], "machine": machine, "versions": {**origin["versions"], "gr00t_fast": __version__}}
    return {**head, "measured": measured, "passed": bool(passed) and all(passed)}


def write_certificate(file: Path, results: Iterable[Mapping[str, Any]], origin: Mapping[str, Any]) -> bool:
    """Whether it passed. Raises ConfigError where the file cannot be written."""
    found = certificate(results, origin)
    try:
        with atomic_write(file) as part:
            part.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--certificate={file} cannot be written: {error.strerror}. Name another file.") from error
    return bool(found["passed"])
