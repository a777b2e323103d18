"""What `ab_server.py` makes sure of before it times anything: the memory is there, and what is compared is the same function."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks.ab_arms import NONE, OURS, DisagreementError, Plan, Setup
from benchmarks.ab_host import REFERENCE, Policies, makes_pixels
from benchmarks.ab_processes import available_bytes
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.errors import ConfigError

_PUBLISHED_ITEM_BYTES = 2  # checkpoints are published in bf16
_PROCESS_BYTES = 700_000_000  # interpreter, torch and libraries, beside the weights
_FP32_TOLERANCE = 0.005  # of a joint's range, as tests/parity/ asks of the whole policy
_MAX_PIXEL_LEVELS = 1.5  # one level, and the rounding of a narrow number format


def check_memory(plan: Plan, policies: Policies) -> None:
    """Raises ConfigError when the servers' weights will not fit beside what is loaded. Knows nothing of a GPU's memory."""
    ours, free = policies.ours, available_bytes()
    if free is None or ours.device.type != "cpu":
        return
    files = open_checkpoint(policies.model_path).weight_files
    weights = sum(file.stat().st_size for file in files) * ours.dtype.itemsize / _PUBLISHED_ITEM_BYTES
    servers = sum(setup.transport != NONE for setup in plan.setups)
    needed = max(servers, 1) * (weights + _PROCESS_BYTES)
    if needed > free:
        raise ConfigError(
            f"{servers} servers need about {needed / 1e9:.1f} GB beside what is loaded; {free / 1e9:.1f} GB are free. Leave servers out, for example "
            "with --transports none tcp: what transport alone costs is measured without weights."
        )


class _Recorder:
    """Stands where an engine does and keeps what it is given."""

    name, continues = "recorder", False

    def run(self, inputs: Any, noise: Any, denoising_steps: int, timer: Any) -> Any:
        self.inputs = inputs
        return noise

    def synchronise(self) -> None:
        """Nothing runs."""


def pixel_levels_apart(policies: Policies, inputs: tuple[dict[str, Any], np.ndarray]) -> float:
    """Largest difference of the two pre-processings in grey levels. Raises DisagreementError beyond one level, or when the prompts differ."""
    seen = []
    for way in (OURS, REFERENCE):
        policy = policies.policy(way, "eager" if makes_pixels(policies.ours.engine) else policies.ours.engine.name, 1)
        policy.engine = recorder = _Recorder()
        policy.get_action(*inputs)
        seen.append(recorder.inputs)
    levels = 127.5 * float((seen[0].pixel_values.float() - seen[1].pixel_values.float()).abs().max())
    same_prompt = seen[0].input_ids.tolist() == seen[1].input_ids.tolist()
    if levels > _MAX_PIXEL_LEVELS or not same_prompt:
        raise DisagreementError(
            f"the reference's pre-processing and ours are not the same function: pictures differ by {levels:.1f} grey levels, prompts are "
            f"{'equal' if same_prompt else 'different'}. Comparing their times would be meaningless."
        )
    return round(levels, 3)


def action_limits(plan: Plan, ours: Any) -> dict[tuple[Setup, Setup], float]:
    """Pairs whose actions are compared, and the largest difference allowed: in fp32 an engine is held to the parity tests' tolerance."""
    ranges = [float((part.max - part.min).min()) for part in ours.facts.action_statistics.values()]
    fp32_limit = _FP32_TOLERANCE * min(ranges) if str(ours.dtype) == "torch.float32" else math.inf
    pairs = (contrast for contrast in (*plan.path, *plan.alone) if contrast.factor != "transport")
    return {(pair.before, pair.after): fp32_limit if pair.factor == "engine" else math.inf for pair in pairs}
