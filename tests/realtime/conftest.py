"""Tests here drive processes, ports and servos in real time: they are marked, and `make test` runs them alone, one after the other, at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("realtime")
