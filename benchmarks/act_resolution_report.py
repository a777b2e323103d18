"""The table and the picture of benchmarks/act_resolution.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gr00t_fast.optional import require

_MEGABYTE = 1e6
_NOTES = (
    "data_s is next(dataloader) + preprocessor and updt_s is update_policy (forward, backward, clipping, AdamW), as lerobot-train 0.4.4 logs "
    "them; a step is both. Frames are decoded by pyav in the training process (num_workers=0), so nothing is hidden.",
    "Where a resize is billed. `pipeline`: the policy's preprocessor (training/act_resize.py), which is always in data_s. `loader`: the data "
    "set resizes each frame (lerobot's image_transforms), which is in data_s here, and with workers only where they do not keep up. lerobot "
    "does not save image_transforms with the policy: these arms have the pipeline's resize as well, which passes small pictures through.",
    "data_s is unresolved between arms at so few steps (rounds times steps in a turn): all arms decode the same frames of the same video, so "
    "differences of the loader's p50 that are no larger than its way from p50 to p95 are noise. The resize itself is in `of it preprocessor`.",
    "Neither makes decoding cheaper: the video has its own resolution in all arms. Fewer pixels to decode take a transcoded data set.",
    "Memory is what a process needs beyond an idle one with everything imported: weights and one refill; then also gradients, AdamW's "
    "moments, activations and a batch. On a CPU the growth of the largest resident size, on a GPU what torch allocates.",
    "Floor: matrix and convolution FLOP as torch counts them over the best matrix rate of this machine in the same run, or the weights' "
    "bytes over the best read rate. `faster`: against the first arm, the median of ratios paired by round.",
    "Weights are random. This says nothing about how well a policy of lower resolution does its task.",
)
_NETWORK_COLUMNS = (
    *("ACT sees", "encoder tokens", "of one camera", "memory, inference MB", "memory, training MB"),
    *("refill p50 ms", "p95", "floor", "faster", "its preprocessor p50 ms", "p95"),
)
_TRAINING_COLUMNS = (
    *("training step", "resized by", "data_s p50", "p95", "of it loader", "of it preprocessor"),
    *("updt_s p50", "p95", "floor", "samples per s", "faster"),
)
_SMOLVLA_COLUMNS = (
    *("SmolVLA, camera gives", "network sees", "image tokens per camera", "patches that are padding"),
    *("forward p50 ms", "p95", "updt_s p50", "p95"),
)


def markdown(result: dict[str, Any]) -> str:
    act = result["act"]
    parts = [_regime(result), _network_table(act), _training_table(act)]
    if result["smolvla"] is not None:
        parts.append(_smolvla_table(result["smolvla"]))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in _NOTES)])


def _regime(result: dict[str, Any]) -> str:
    size = "published size" if result["published_sizes"] else "small transformer behind ResNet18"
    act, host = result["act"], result["machine"]
    where = host["gpu"] if result["device"] == "cuda" else f"{host['processor']}, {host.get('torch_threads')} threads"
    return (
        f"ACT, {size} ({act['parameters'] / 1e6:.1f} M parameters), {result['dtype']}, {act['cameras']} camera(s), batch {result['batch_size']}, "
        f"on {result['device']} ({where}). Data set: {result['dataset']}. {result['rounds']} rounds of {result['steps_per_turn']} training step(s) "
        f"and a refill for each arm, in turn, after a round that is not counted. Best rates seen: {act['ceilings']['tflop_per_s']} TFLOP/s, "
        f"{act['ceilings']['gb_per_s']} GB/s."
    )


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(columns), ["---"] + ["---:"] * (len(columns) - 1), *rows])


def _network_table(act: dict[str, Any]) -> str:
    rows = []
    for name, arm in act["arms"].items():
        if arm["resized_by"] == "loader" and any(_is_twin(other, arm) for other in act["arms"].values()):
            continue  # at inference there is no loader: its pipeline twin stands for both
        refill, before = arm["refill_ms"], arm["preprocess_ms"]
        row = [name.split()[0], str(arm["encoder_tokens"]), str(arm["tokens_per_camera"])]
        row += [_megabytes(arm, "inference"), _megabytes(arm, "training")]
        row += [f"{value:.1f}" for value in (refill["p50"], refill["p95"], arm["floor_ms"]["refill"])]
        rows.append([*row, f"{arm['times_faster_than_first']['refill_ms']:.2f}x", f"{before['p50']:.2f}", f"{before['p95']:.2f}"])
    return _table(_NETWORK_COLUMNS, rows)


def _is_twin(other: dict[str, Any], arm: dict[str, Any]) -> bool:
    return other["resolution"] == arm["resolution"] and other["resized_by"] == "pipeline"


def _megabytes(arm: dict[str, Any], what: str) -> str:
    return "-" if arm["memory_bytes"] is None else f"{arm['memory_bytes'][what] / _MEGABYTE:.0f}"


def _training_table(act: dict[str, Any]) -> str:
    rows = []
    for name, arm in act["arms"].items():
        data, update = arm["data_s"], arm["updt_s"]
        row = [name.split()[0], arm["resized_by"]]
        row += [f"{value:.4f}" for value in (data["p50"], data["p95"], arm["loader_s"]["p50"], arm["preprocessor_s"]["p50"])]
        row += [f"{value:.3f}" for value in (update["p50"], update["p95"], arm["floor_ms"]["training_step"] / 1e3)]
        rows.append([*row, f"{arm['samples_per_s']:.2f}", f"{arm['times_faster_than_first']['step_s']:.2f}x"])
    return _table(_TRAINING_COLUMNS, rows)


def _smolvla_table(smolvla: dict[str, Any]) -> str:
    rows = []
    for name, found in smolvla["resolutions"].items():
        row = [name, "x".join(map(str, found["square"])), str(found["image_tokens_per_camera"]), f"{found['padded_share']:.0%}"]
        row += [f"{found['forward_ms'][p]:.1f}" for p in ("p50", "p95")]
        rows.append(row + (["-", "-"] if found["updt_s"] is None else [f"{found['updt_s'][p]:.3f}" for p in ("p50", "p95")]))
    size = f"{smolvla['parameters'] / 1e6:.1f} M parameters, {smolvla['dtype']}, {smolvla['cameras']} camera(s)"
    said = f"SmolVLA ({size}) brings every picture to one square: its tokens do not depend on the camera's resolution."
    return said + "\n\n" + _table(_SMOLVLA_COLUMNS, rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Tokens, refill and training step per arm. Raises MissingExtraError without matplotlib."""
    require("matplotlib", "plots").use("Agg")
    pyplot = require("matplotlib.pyplot", "plots")
    arms = result["act"]["arms"]
    names, rows = [name.replace(" ", "\n") for name in arms], list(arms.values())
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    bars = left.bar(names, [row["encoder_tokens"] for row in rows])
    left.bar_label(bars, fontsize=8)
    left.set_title("tokens in ACT's encoder")
    bars = middle.bar(names, [row["refill_ms"]["p50"] for row in rows], label="refill")
    middle.bar_label(bars, fmt="%.0f", fontsize=8)
    middle.set_title("refill, one observation: p50 (ms)")
    bottom = [0.0] * len(rows)
    for what, label in (("loader_s", "data_s: loader"), ("preprocessor_s", "data_s: preprocessor"), ("updt_s", "updt_s")):
        values = [row[what]["p50"] for row in rows]
        right.bar(names, values, bottom=bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    right.set_title(f"training step, batch {result['batch_size']}: p50 (s)")
    right.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
