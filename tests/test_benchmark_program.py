"""What benchmarks have in common: where they write, and the random checkpoint they measure when they are given none."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import bench_engines
from benchmarks.program import checkpoint_of, finish, make_directory
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.errors import ConfigError


def arguments(out: Path, **more: object) -> argparse.Namespace:
    return argparse.Namespace(**{"model_path": None, "out": out, "seed": 0} | more)


def test_an_out_that_cannot_be_a_directory_is_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    for out, told in ((tmp_path / "taken", "it is a file"), (tmp_path / "taken" / "below", "Not a directory")):
        assert finish("x", arguments(out), lambda _: pytest.fail("it ran"), str) == 1
        shown = capsys.readouterr().err
        assert shown.startswith(f"error: --out={out}: expected a directory to write to, but {told}")
        with pytest.raises(ConfigError):
            make_directory(out)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "name", "cameras"),
    [
        ({}, "checkpoint-tiny", 1),
        ({"data_config": "so100"}, "checkpoint-tiny", 1),
        ({"data_config": "so100_dualcam"}, "checkpoint-tiny-so100_dualcam", 2),
        ({"data_config": "mine:Robot"}, "checkpoint-tiny", 1),
        ({"seed": 1}, "checkpoint-tiny-seed1", 1),
    ],
)
def test_a_random_checkpoint_is_that_of_the_flags(more: dict[str, object], name: str, cameras: int, tmp_path: Path) -> None:
    path = checkpoint_of(arguments(tmp_path, **more), "tiny")
    assert path == tmp_path / name
    assert len(open_checkpoint(path).embodiment("new_embodiment").cameras) == cameras
    assert checkpoint_of(arguments(tmp_path, model_path=Path("given")), "tiny") == Path("given")


def test_two_cameras_need_no_checkpoint_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data_config=so100_dualcam", "--size=tiny", "--device=cpu", "--engines", "eager", "--rounds=1", "--threads=1", f"--out={tmp_path}"]
    assert bench_engines.main(flags) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == "bench_engines"
