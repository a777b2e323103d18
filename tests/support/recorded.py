"""What a recording left in its directory."""

from __future__ import annotations

import json
from pathlib import Path

from gr00t_fast.record.recorder import ROLLOUTS


def read_back(out: Path) -> list[dict]:
    """Every frame, by lerobot's own loader."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/read", root=out, video_backend="pyav")
    return [dataset[index] for index in range(len(dataset))]


def info(out: Path) -> dict:
    return json.loads((out / "meta" / "info.json").read_text())


def entries(out: Path) -> list[dict]:
    return json.loads((out / ROLLOUTS).read_text())["episodes"]


def left_beside(out: Path) -> list[Path]:
    return list(out.parent.glob(f".{out.name}.recording-*"))
