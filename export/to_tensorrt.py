#!/usr/bin/env python
"""`gr00t-fast export tensorrt` by its former name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

from gr00t_fast.cli.export import tensorrt as main
from gr00t_fast.cli.main import leave

if __name__ == "__main__":
    leave(main())
