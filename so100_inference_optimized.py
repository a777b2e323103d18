#!/usr/bin/env python
"""`gr00t-fast run` by its former name:

python so100_inference_optimized.py --robot.type=so100_follower --robot.port=/dev/ttyACM0 --model_path=DIR --lang_instruction="Place the block"
"""

from gr00t_fast.cli.main import leave
from gr00t_fast.cli.run import main

if __name__ == "__main__":
    leave(main())
