#!/usr/bin/env python
"""`gr00t-fast calibrate` by its former name: it says what to use instead."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from gr00t_fast.cli.main import leave, main

if __name__ == "__main__":
    leave(main(["calibrate"]))
