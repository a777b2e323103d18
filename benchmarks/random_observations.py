"""Observations that no camera saw: random pictures, joints anywhere in their training range. Never zeros: they can run faster, and hide mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np

from gr00t_fast.policy import Gr00tPolicy


def random_observations(policy: Gr00tPolicy, seed: int, count: int) -> list[dict[str, Any]]:
    """Unbatched, with the example's instruction."""
    generator, example, facts = np.random.default_rng(seed), policy.example_observation(), policy.facts
    found = []
    for _ in range(count):
        observation = dict(example)
        for key, value in example.items():
            modality, _, name = key.partition(".")
            if modality == "video":
                observation[key] = generator.integers(0, 256, value.shape, dtype=np.uint8)
            elif modality == "state":
                ranges = facts.state_statistics[name]
                observation[key] = generator.uniform(ranges.min, ranges.max)[None]
        found.append(observation)
    return found


def random_noise(policy: Gr00tPolicy, seed: int) -> np.ndarray:
    """fp32 (1, H, A)."""
    return np.random.default_rng(seed).standard_normal((1, *policy.chunk_shape)).astype(np.float32)
