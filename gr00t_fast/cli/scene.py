"""`gr00t-fast scene`: what the cameras of a data set saw when its episodes began, as a small file to compare live pictures with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.cli.main import EXIT_OK, Command, show
from gr00t_fast.cli.shared_flags import OutputFlags
from gr00t_fast.evaluation.scene import as_lines, build_card, card_path
from gr00t_fast.record.pictures import png
from gr00t_fast.record.recorder import dataset_directory


@dataclass(kw_only=True)
class SceneFlags(OutputFlags):
    """Write the scene card of a data set, which `run`, `doctor` and `eval` compare with (--recordings), and a picture of it: of each camera the
    median, and what of it is steady.

        gr00t-fast scene --dataset=./my-lerobot-dataset
    """

    dataset: str  # a LeRobotDataset (v2.1 or v3): its directory, or user/name in lerobot's cache or on the hub
    out: Path | None = None  # the card's file; default: in the data set, where --recordings=DIR finds it

    def check(self) -> None:
        super().check()
        if self.out is not None and (self.out.is_dir() or self.out.suffix != ".npz"):
            raise ConfigError(f"--out={self.out} must be a file that ends in .npz.")


def run(config: SceneFlags) -> int:
    """Raises Gr00tFastError."""
    directory = here if (here := Path(config.dataset).expanduser()).is_dir() else dataset_directory(config.dataset)
    if not directory.is_dir() and config.dataset.count("/") == 1 and not config.dataset.startswith((".", "~", "/")):
        _fetch(config.dataset, directory)
    card, out = build_card(directory), config.out or card_path(directory)
    card.save(out)
    overview = out.with_suffix(".png")
    if card.cameras:
        rows = [np.hstack([camera.median, camera.median * camera.steady[..., None]]) for camera in card.cameras.values()]
        overview.write_bytes(png(np.vstack(rows)))
    wrote = f"wrote {out}" + (f"; look at {overview}" if card.cameras else "")
    result = {"program": "scene", "card": str(out), "episodes": card.episodes, "cameras": list(card.cameras), "notes": list(card.notes)}
    show(result, "\n".join(as_lines(card)), wrote, config)
    return EXIT_OK


def _fetch(name: str, directory: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, repo_type="dataset", local_dir=directory)
    except Exception as error:  # the hub's client raises many kinds: no network, no such name, no permission
        why = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise ConfigError(f"--dataset={name} is no directory, and cannot be fetched from the hub ({why}). Name a directory.") from error


main = Command(SceneFlags, run, "usage: gr00t-fast scene --dataset=DIR [--out=FILE.npz]")
