"""Packages of others: what importing them must not do, and that those which build them are pinned."""

from __future__ import annotations

import ast
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
    monkeypatch.setattr(errors, "_ROOT", ROOT / "tests")  # as of a wheel, beside which no pins lie
    assert [errors.install_command(extra) for extra in ("sim", "")] == ["pip install 'gr00t_fast[sim]'", "pip install 'gr00t_fast'"]


def test_a_type_checker_sees_what_is_looked_up_at_first_use() -> None:
    body = ast.parse(Path(gr00t_fast.__file__).read_text()).body
    imports = [node for each in body if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING" for node in each.body]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert {*seen, "__version__"} == set(gr00t_fast.__all__) <= set(dir(gr00t_fast))
    assert seen == {name: getattr(gr00t_fast, name).__module__ for name in seen}


@pytest.mark.parametrize(("target", "pins"), [(".venv/.dev", "constraints.txt"), (".venv312/.robottest", "constraints-py312.txt")])
def test_environments_are_installed_from_their_pins(target: str, pins: str) -> None:
    words = ["make", "-n", "-B", target, f"PYTHON312={sys.executable}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    installs = [line for line in done.stdout.replace("\\\n", " ").splitlines() if "pip install" in line and "--no-deps" not in line]
    assert installs
    assert all(f'PIP_CONSTRAINT="{ROOT}/{pins}"' in line for line in installs)
    setuptools = re.search(r"^setuptools==(.+)$", (ROOT / pins).read_text(), re.MULTILINE).group(1)
    assert f'requires = ["setuptools=={setuptools}"]' in (ROOT / "pyproject.toml").read_text()
