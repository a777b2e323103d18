"""One inference of a checkpoint, without an arm: python examples/infer.py CHECKPOINT [INSTRUCTION]

python examples/infer.py checkpoints/so100-sim-reach "Reach the block"
"""

from __future__ import annotations

import sys

import numpy as np

from gr00t_fast import load_policy


def main(model_path: str, instruction: str = "Reach the block") -> dict[str, np.ndarray]:
    """The actions, by part of the arm: float32 (horizon, joints of the part), in the units of the training data."""
    policy = load_policy(model_path, seed=0)  # seed: repeatable noise; engine="openvino" and the like: docs/engines.md
    policy.warm_up(instruction)
    print(", ".join(policy.describe()))

    # An observation has the keys of NVIDIA's code: a picture per camera, joints per part, the instruction. Times come first, (1, ...).
    # On an arm the pictures come from its cameras (RGB, any size) and the joints from its servos.
    observation = policy.example_observation(instruction)
    for key, value in observation.items():
        print(f"{key}: {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"{key}: {value}")

    actions = policy.get_action(observation)
    for key, rows in actions.items():
        print(f"{key}: {rows.shape}, the first {np.round(rows[0], 1)}")
    print("ms: " + ", ".join(f"{stage} {ms:.1f}" for stage, ms in policy.last_timing.items()))

    policy.denoising_steps = 2  # half of the steps: no reload
    policy.get_action(observation)
    print(f"{policy.last_timing['total']:.1f} ms at 2 denoising steps")
    return actions


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    main(*sys.argv[1:])
