"""Kernels run here in Triton's interpreter, which has to be chosen before they are imported: tests/test_kernels.py starts this directory in a
process of its own."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
