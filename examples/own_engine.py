"""An engine of one's own: another way to run the same network, compared with the plain one. python examples/own_engine.py CHECKPOINT

An engine gets tensors and noise and returns normalised actions; pictures, joints and units before and after it stay the policy's. This one remembers
what the vision tower made of the last picture: worth something for a camera that delivers fewer frames than the arm asks for.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast import load_policy
from gr00t_fast.engine import Engine


class SamePictureEngine(Engine):
    """Everything but the vision tower is run anew for each call."""

    name = "same_picture"

    def __init__(self, model: Any) -> None:
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.reused = 0
        self._seen: tuple[Tensor, Any] | None = None

    @torch.inference_mode()
    def run(self, inputs: Any, noise: Tensor, denoising_steps: int, timer: Any, continuation: Any = None) -> Tensor:
        """noise (B, H, A) -> normalised actions (B, H, A). `continues` is False, so that `continuation` is never given."""
        head = self.model.head
        with timer.stage("preprocess"):
            inputs = inputs.to(self.device, self.dtype)
        with timer.stage("vision"):
            tokens = self._vision(inputs.pixel_values)
        with timer.stage("language"):
            features = self.model.encode_language(inputs, tokens)
        with timer.stage("denoise"):
            condition = head.condition(head.refine(features, inputs.key_mask), inputs.state, inputs.key_mask, inputs.image_positions)
            return head.denoise(noise.to(self.device, self.dtype), condition, head.step_tables(denoising_steps))

    def _vision(self, pixels: Tensor) -> Any:
        if self._seen is not None and torch.equal(self._seen[0], pixels):
            self.reused += 1
        else:
            self._seen = pixels.clone(), self.model.encode_vision(pixels)
        return self._seen[1]


def main(model_path: str) -> float:
    """The largest difference from the plain engine, in joint units; 0 on a CPU."""
    plain = load_policy(model_path, engine="eager", precision="fp32", device="cpu")
    engine = SamePictureEngine(plain.engine.model)
    policy = load_policy(model_path, engine=engine)
    observation, noise = plain.example_observation(), np.random.default_rng(0).standard_normal((1, *plain.chunk_shape)).astype(np.float32)
    expected = plain.get_action(observation, noise=noise)
    for _ in range(2):
        got = policy.get_action(observation, noise=noise)
    print(f"vision reused {engine.reused} time(s), {policy.last_timing['vision']:.2f} ms instead of {plain.last_timing['vision']:.2f}")
    return max(float(np.abs(got[key] - expected[key]).max()) for key in expected)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(f"largest difference from eager: {main(*sys.argv[1:]):g}")
