"""The wheel alone, in an empty directory: what is in it, how large it is, and that the demo runs from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.cfg").is_file())
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "gr00t_fast", "checkpoints", "configs")
LARGEST_BYTES = 4_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves files beside the sources. Links stay links, as in a clone."""
    copy, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns("__pycache__", "exports")
    for name in SOURCES:
        source = ROOT / name
        shutil.copytree(source, copy / name, symlinks=True, ignore=unwanted) if source.is_dir() else shutil.copy(source, copy / name)
    (copy / "checkpoints" / "so100-sim-reach" / "exports").mkdir()
    (copy / "checkpoints" / "so100-sim-reach" / "exports" / "left.json").write_text("{}")  # what `tune` leaves there is nobody else's
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True, text=True)
    (built,) = out.glob("*.whl")
    return built


def test_it_has_the_package_and_the_demo_and_is_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("gr00t_fast/")}
    tracked = subprocess.run(
        ["git", "ls-files", "gr00t_fast/*.py", "checkpoints/so100-sim-reach", "configs"], cwd=ROOT, check=False, capture_output=True, text=True
    ).stdout.split()
    expected = {name.replace("checkpoints/", "gr00t_fast/demo/").replace("configs/", "gr00t_fast/demo/configs/") for name in tracked}
    assert {"gr00t_fast/py.typed", "gr00t_fast/demo/configs/so100_sim.yaml", "gr00t_fast/demo/so100-sim-reach/model.safetensors"} <= inside
    assert expected <= inside, "a file of the clone that the wheel lacks"
    assert not [name for name in inside if "exports" in name]
    assert wheel.stat().st_size <= LARGEST_BYTES


@pytest.mark.slow
def test_the_demo_runs_from_it_in_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    pytest.importorskip("imageio_ffmpeg")
    site, here = tmp_path / "site", tmp_path / "empty"
    here.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gr00t_fast", "demo", "--timeout=0.7", "--episodes=1"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    left = here / "outputs" / "demo"
    report = json.loads((left / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["model_path"].startswith(str(site)), "another gr00t_fast ran"
    assert report["settings"]["timeout"] == 0.7
    for name in ("demo.mp4", "joints.png", "report.html"):
        assert (left / name).stat().st_size > 0
        assert name in done.stdout
