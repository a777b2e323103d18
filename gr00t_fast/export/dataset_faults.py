"""What is wrong with a LeRobotDataset that cannot be used, and the way out, in words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gr00t_fast.optional import require


def conversion(path: Path, version: str) -> str:
    """How to bring a data set of an older version to v3. lerobot's converter joins --root and --repo-id, and pushes to the hub unless told not to."""
    if not version.startswith("v2.1"):
        return "lerobot's converter reads v2.1 alone: bring it to v2.1 first, with the lerobot that knows its version, or record it again."
    place = path.absolute()
    flags = f"--root={shlex.quote(str(place.parent))} --repo-id={shlex.quote(place.name)} --push-to-hub=false"
    return f"Convert it in its place (the old one stays as {place.name}_old): python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 {flags}"


def contradiction(path: Path, info: Mapping[str, Any]) -> str | None:
    """Where meta/info.json describes other columns than the files of data/ have: it is another data set's, or was edited. None when it does not."""
    file = next(iter(sorted(path.glob(re.sub(r"\{[^}]*\}", "*", info.get("data_path") or "no data_path")))), None)
    row = _first_row(file) if file else None
    if row is None:
        return None
    told = []
    for column, feature in info["features"].items():
        shape, value = feature.get("shape") or [], row.get(column)
        if feature.get("dtype") == "video":
            continue
        if column not in row:
            told.append(f"{column}, which they have not")
        elif len(shape) == 1 and isinstance(value, list) and len(value) != shape[0]:
            told.append(f"{column} with {shape[0]} values, they hold {len(value)}")
    if not told:
        return None
    return (
        f"meta/info.json does not fit the files of data/: it describes {'; '.join(told)}. Is it of another data set or robot, or was it edited? "
        "Put back the one that was recorded with them."
    )


def _first_row(file: Path) -> dict[str, Any] | None:
    """None when the file is damaged or empty; that is another fault."""
    try:
        batches = require("pyarrow.parquet", "bench").ParquetFile(file).iter_batches(batch_size=1)
        return next((batch.to_pylist()[0] for batch in batches if len(batch)), None)
    except (OSError, ValueError):
        return None
