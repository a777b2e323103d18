"""Configuration files that want more than to set flags, and output that cannot be written: an explanation and an exit code, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gr00t_fast.cli.serve import ServeConfig, parse
from gr00t_fast.flags import UsageError

ROOT = Path(__file__).parent.parent
BOMB = "a: &a [x, x]\n" + "".join(f"{this}: &{this} [*{last}, *{last}]\n" for last, this in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model_path: !!python/name:os.system", "python/name"),
        ("model_path: !!python/object/apply:os.system ['touch hacked']", "python/object"),
        ("model_path: !include /etc/hostname", "!include"),
        ("<<: !include /etc/hostname", "merging"),
        (BOMB, "references"),
        ("port: 1\nport: 2", "twice"),
        ("[" * 100_000, "cannot read"),
        ("model_path: \x00", "cannot read"),
        ("prot: 5555", "Did you mean 'port'"),
    ],
)
def test_configuration_files_set_flags_and_nothing_else(tmp_path: Path, text: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=named) as caught:
        parse([f"--config_path={file}", "--model_path=x"])
    assert str(file) in str(caught.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("text", ["!!python/name:os.system", "!include /etc/hostname", "{a: !!python/tuple [1]}"])
def test_values_of_flags_are_plain(text: str) -> None:
    with pytest.raises(UsageError, match="--port"):
        parse([f"--port={text}", "--model_path=x"])


def test_a_pipe_as_configuration_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(UsageError, match=r"config\.yaml"):
        parse([f"--config_path={tmp_path / 'config.yaml'}"])


def test_a_plain_configuration_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# served in the lab\nmodel_path: some/where\nport: 6000\nhttp: true\n")
    assert parse([f"--config_path={tmp_path / 'config.yaml'}", "--port=6001"]) == ServeConfig(model_path="some/where", port=6001, http=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("command", [["-m", "gr00t_fast.serving", "--help"], ["so100_inference_optimized.py", "--help"]])
def test_a_full_disk_as_output_is_said(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
