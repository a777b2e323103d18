"""`PolicyFacts` as a message of plain maps, lists, text and numbers, and back; for the endpoint `get_facts`, which NVIDIA's server lacks.

Reading trusts nothing: what is checked against these facts is an arm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from gr00t_fast.contracts import PartStatistics, PolicyFacts
from gr00t_fast.errors import WireError


def facts_to_message(facts: PolicyFacts) -> dict[str, Any]:
    """Numbers travel as float64, so they arrive as they were."""
    return {name: _plain(value) for name, value in asdict(facts).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def facts_from_message(message: Any) -> PolicyFacts:
    """Raises WireError that names the field unless every fact is of the right form."""
    read = _Reader(message)
    state_widths, action_widths = (read.map(f"{modality}_widths", _count) for modality in ("state", "action"))
    return PolicyFacts(
        embodiment_tag=read.one("embodiment_tag", _text),
        resolutions=read.map("resolutions", _resolution),
        fps=read.one("fps", _rate),
        state_widths=state_widths,
        action_widths=action_widths,
        state_statistics=read.statistics("state_statistics", state_widths),
        action_statistics=read.statistics("action_statistics", action_widths),
        trained_horizon=read.one("trained_horizon", _count),
    )


class _Reader:
    """Fields of a message, each through a function that raises ValueError or TypeError for what it cannot take."""

    def __init__(self, message: Any) -> None:
        self._message = message if isinstance(message, dict) else {}

    def one(self, name: str, take: Callable[[Any], Any]) -> Any:
        value = self._message.get(name)
        try:
            return take(value)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise WireError(f"get_facts: the server's '{name}' makes no sense: {str(value)[:80]}. Do both ends have the same version?") from error

    def map(self, name: str, take: Callable[[Any], Any]) -> dict[str, Any]:
        return self.one(name, lambda value: {_text(key): take(item) for key, item in _filled(value).items()})

    def statistics(self, name: str, widths: Mapping[str, int]) -> dict[str, PartStatistics]:
        return self.one(name, lambda value: {part: _statistics(value[part], width) for part, width in widths.items()})


def _filled(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise ValueError("no map, or nothing in it")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("no positive whole number")
    return value


def _resolution(value: Any) -> tuple[int, int]:
    width, height = value
    return _count(width), _count(height)


def _rate(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
        raise ValueError("no positive number")
    return float(value)


def _statistics(value: Any, width: int) -> PartStatistics:
    arrays = {name: np.asarray(value[name], np.float64) for name in ("min", "max", "q01", "q99")}
    if any(array.shape != (width,) or not np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f"expected {width} finite numbers")
    return PartStatistics(**arrays)
