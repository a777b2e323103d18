"""Packages of others: what importing them must not do, and that those which build them are pinned."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import gr00t_fast
from gr00t_fast import errors

ROOT = Path(__file__).parent.parent
# Audit hooks see every thread of the process; a refused connection is tried again by nobody. The sender's thread gets a moment.
WATCHED = """if True:
    import sys, time
    def note(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.posix_spawn"):
            print("AUDIT", event, arguments, flush=True)
            raise OSError("not allowed here")
    sys.addaudithook(note)
    from gr00t_fast.errors import require
    openvino = require("openvino", "openvino")
    openvino.Core().available_devices
    from openvino.tools import ovc
    time.sleep(0.5)
    print("done", flush=True)
    """


def test_openvino_posts_nothing_and_writes_no_client_id(tmp_path: Path) -> None:
    pytest.importorskip("openvino_telemetry")
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    command = [sys.executable, "-c", WATCHED]
    done = subprocess.run(command, cwd=ROOT, env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["done"], done.stdout + done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == []


@pytest.mark.parametrize(
    ("lerobot", "python", "pins"),
    [("0.4.4", (3, 12), "constraints.txt"), ("0.6.1", (3, 12), "constraints-py312.txt"), (None, (3, 11), "constraints.txt")]
    + [(None, (3, 12), "constraints-py312.txt")],
)
def test_the_advice_fits_this_environment(lerobot: str | None, python: tuple[int, int], pins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With constraints.txt lerobot 0.6.1's own packages are taken back to versions that it does not start with."""

    def version(name: str) -> str:
        if lerobot is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return lerobot

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "version_info", python)
    command = errors.install_command("sim")
    assert shlex.split(command.partition(" (")[0]) == ["pip", "install", "-e", ".[sim]", "-c", pins]
    assert re.search(r"^lerobot==", (ROOT / pins).read_text(), re.MULTILINE)


def test_a_wheel_gets_no_advice_about_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_ROOT", tmp_path)
    assert errors.install_command("sim") == "pip install 'gr00t_fast[sim]'"
    assert errors.install_command() == "pip install 'gr00t_fast'"


def test_a_type_checker_sees_the_signatures_behind_the_lazy_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "import gr00t_fast, gr00t_fast.serving\ngr00t_fast.load_policy('DIR', denoising_stps=2)\ngr00t_fast.serving.PolicyClient().get_action([])\n"
    )
    command = [sys.executable, "-m", "mypy", f"--cache-dir={tmp_path / 'cache'}", "--python-version=3.11", str(tmp_path / "user.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [re.search(r"user.py:(\d)", line)[1] for line in found] == ["2", "3"], done.stdout + done.stderr
    assert "denoising_steps" in found[0]
    assert set(gr00t_fast.__all__) <= set(dir(gr00t_fast))


def test_the_tools_that_build_packages_are_pinned() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    build = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.findall(r'"([^"]*)"', build[1]) == [f"setuptools=={pins['setuptools']}"]
    assert "wheel" in pins  # what pip adds for packages that do not say how they are built
    done = subprocess.run(["make", "-n", "-B", ".venv/.dev"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    installs = [line for line in done.stdout.replace("\\\n", " ").splitlines() if "pip install" in line]
    assert installs
    for line in installs:
        assert f'PIP_CONSTRAINT="{ROOT}/constraints.txt"' in line
        assert f'PIP_BUILD_CONSTRAINT="{ROOT}/constraints.txt"' in line


def test_lerobot_06_is_installed_from_its_own_pins_and_a_missing_python_is_named() -> None:
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(["make", "-n", "-B", ".venv312/.robottest", f"PYTHON312={sys.executable}"], check=True, **options)
    (line,) = [line for line in done.stdout.replace("\\\n", " ").splitlines() if "pip install" in line]
    assert f'PIP_CONSTRAINT="{ROOT}/constraints-py312.txt"' in line
    pins = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "constraints-py312.txt").read_text(), re.MULTILINE))
    usual = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pins["lerobot"].startswith("0.6")
    assert {name: pins[name] for name in ("torch", "setuptools", "wheel")} == {name: usual[name] for name in ("torch", "setuptools", "wheel")}
    missing = subprocess.run(["make", "python312", "PYTHON312="], check=False, **options)
    assert missing.returncode != 0
    assert "PYTHON312=" in missing.stdout
