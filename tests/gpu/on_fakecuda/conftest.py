"""Tests here run on a CUDA device that is not there (tests/support/fakecuda.cpp): tests/gpu/test_fakecuda.py starts them in a process that has it."""

from __future__ import annotations

import os

import pytest

if "FAKECUDA_CC" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device():
    """What the stand-in has counted, from now on."""
    from fakecuda import Device

    device = Device()
    device.reset()
    return device
