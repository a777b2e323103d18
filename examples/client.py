"""Actions from a policy server, ours or NVIDIA's: python examples/client.py [HOST] [PORT]

    gr00t-fast serve --model_path=checkpoints/so100-sim-reach &
    python examples/client.py 127.0.0.1 5555

To drive an arm with a server take `gr00t-fast run --server=tcp://HOST:PORT`, which holds the arm while the server is away.
"""

from __future__ import annotations

import sys

import numpy as np

from gr00t_fast.base.errors import ServerUnreachableError
from gr00t_fast.serving import PolicyClient


def main(host: str = "127.0.0.1", port: str | int = 5555, instruction: str = "Reach the block") -> dict[str, np.ndarray]:
    """The actions, by part of the arm: float32 (horizon, joints of the part), in the units of the training data."""
    with PolicyClient(host, int(port), timeout_s=30.0) as policy:
        try:
            keys = policy.get_modality_config()  # what the server's checkpoint takes: cameras, parts, the name of the instruction
        except ServerUnreachableError as error:
            sys.exit(f"{error} Start one: gr00t-fast serve --model_path=DIR")
        print({kind: config.modality_keys for kind, config in keys.items()})

        # Stand-ins for a camera and for the servos of an SO-100: 5 joints and the gripper.
        observation = {key: np.zeros((1, 480, 640, 3), np.uint8) for key in keys["video"].modality_keys}
        observation |= {"state.single_arm": np.zeros((1, 5)), "state.gripper": np.zeros((1, 1))}
        observation |= {key: [instruction] for key in keys["language"].modality_keys}

        actions = policy.get_action(observation)
        for key, rows in actions.items():
            print(f"{key}: {rows.shape}, the first {np.round(rows[0], 1)}")
    return actions


if __name__ == "__main__":
    if any(word.startswith("-") for word in sys.argv[1:]):
        sys.exit(__doc__)
    main(*sys.argv[1:])
