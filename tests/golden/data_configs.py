"""Record what NVIDIA's transforms make of states and actions, one case for each data configuration.

    python tests/golden/data_configs.py             (in an environment that has the gr00t package, branch n1.5-release)

Each case is one configuration: random statistics, states and network outputs go through the configuration's own
`StateActionToTensor`, `StateActionTransform`, `StateActionSinCosTransform` and `ConcatTransform`, in evaluation. The last case has one part for
each mode. Statistics have constant dimensions and zero deviations, the values lie inside, at the borders of and outside the range.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from gr00t_fast.inputs.data_config import DATA_CONFIGS, DataConfig

FIGURES = Path(__file__).with_suffix(".npz")
BATCH, HORIZON, WIDTH = 3, 4, 32
_MODES = ("min_max", "q99", "mean_std", "binary", "none")
EVERY_MODE = DataConfig(
    ("video.view",),
    (*(f"state.{mode}" for mode in _MODES), "state.sin_cos"),
    tuple(f"action.{mode}" for mode in _MODES),
    normalisation={f"{kind}.{mode}": mode for kind, mode in (*((k, m) for k in ("state", "action") for m in _MODES), ("state", "sin_cos"))},
)
CASES = {**DATA_CONFIGS, "every_mode": EVERY_MODE}
SEEDS = {"so100": 0, "so100_dualcam": 1, "every_mode": 12}


def width_of(config: DataConfig, key: str) -> int:
    """Values of a part: as many as fit the network's padded widths, at most seven."""
    keys = config.state_keys if key in config.state_keys else config.action_keys
    return min(7, WIDTH // len(keys))


def statistics_of(config: DataConfig, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Key -> name -> float64 (D,); the last dimension of every part never moved."""
    generator, found = np.random.default_rng(seed), {}
    for key in (*config.state_keys, *config.action_keys):
        ordered = np.sort(generator.normal(0, 3, (5, width_of(config, key))), axis=0)
        found[key] = dict(zip(("min", "q01", "mean", "q99", "max"), ordered, strict=True)) | {"std": generator.uniform(0.1, 2, ordered.shape[1])}
        if ordered.shape[1] > 1:
            for name in ("q01", "q99", "max"):
                found[key][name][-1] = found[key]["min"][-1]
            found[key]["std"][-1] = 0.0
    return found


def values_of(config: DataConfig, statistics: dict[str, dict[str, np.ndarray]], seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """States by key, float64 (B, 1, D): within the range, at its border, far outside; and a network's output, float32 (B, H, 32)."""
    generator = np.random.default_rng(seed + 1000)
    states = {}
    for key in config.state_keys:
        part = statistics[key]
        inside = generator.uniform(part["min"], np.maximum(part["max"], part["min"] + 1e-9))
        states[key] = np.stack([inside, part["max"], part["max"] + generator.normal(0, 10, len(inside))])[:, None]
    return states, generator.standard_normal((BATCH, HORIZON, WIDTH)).astype(np.float32)


def reference(config: DataConfig, seed: int) -> dict[str, np.ndarray]:
    """NVIDIA's `state` (B, 1, P) float64 and each `action.<part>` (B, H, D) float32."""
    import torch
    from gr00t.data.schema import DatasetMetadata
    from gr00t.data.transform import base, concat, state_action

    statistics = statistics_of(config, seed)
    states, output = values_of(config, statistics, seed)
    steps: list[Any] = [state_action.StateActionToTensor(apply_to=list(config.state_keys))]
    plain = [key for key in config.state_keys if config.normalisation_of(key) != "sin_cos"]
    for keys in (plain, list(config.action_keys)):
        modes = {key: mode for key in keys if (mode := config.normalisation_of(key)) != "none"}
        steps.append(state_action.StateActionTransform(apply_to=keys, normalization_modes=modes))
    if turned := [key for key in config.state_keys if key not in plain]:
        steps.append(state_action.StateActionSinCosTransform(apply_to=turned))
    orders = {"video_concat_order": list(config.video_keys), "state_concat_order": list(config.state_keys)}
    steps.append(concat.ConcatTransform(**orders, action_concat_order=list(config.action_keys)))
    pipeline = base.ComposedModalityTransform(transforms=steps)
    pipeline.eval()
    pipeline.set_metadata(DatasetMetadata.model_validate(metadata_of(config, statistics)))
    made = {"state": pipeline(dict(states))["state"].numpy()}
    made |= {key: value.numpy() for key, value in pipeline.unapply({"action": torch.from_numpy(output.copy())}).items()}
    return made


def metadata_of(config: DataConfig, statistics: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """In the form of experiment_cfg/metadata.json."""
    named: dict[str, Any] = {"state": {}, "action": {}}
    shapes: dict[str, Any] = {"state": {}, "action": {}, "video": {}}
    for key, values in statistics.items():
        kind, part = key.split(".")
        named[kind][part] = {name: array.tolist() for name, array in values.items()}
        shapes[kind][part] = {"absolute": True, "rotation_type": None, "shape": [width_of(config, key)], "continuous": True}
    camera = {"resolution": [640, 480], "channels": 3, "fps": 30.0}
    shapes["video"] = {key.removeprefix("video."): camera for key in config.video_keys}
    return {"statistics": named, "modalities": shapes, "embodiment_tag": "new_embodiment"}


def main() -> None:
    figures = {f"{name}/{key}": values for name, seed in SEEDS.items() for key, values in reference(CASES[name], seed).items()}
    np.savez_compressed(FIGURES, **figures)
    print(f"{FIGURES}: {len(CASES)} configurations, {FIGURES.stat().st_size} bytes")


if __name__ == "__main__":
    main()
