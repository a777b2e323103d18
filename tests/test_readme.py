"""The README's commands are those of the code: targets, modules, flags and extras exist, and the long command parses as printed."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gr00t_fast import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line.strip()]


def test_there_are_commands_to_check() -> None:
    assert {words[0] for words in commands()} >= {"make", "python", "pip"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_exists(words: list[str]) -> None:
    check = {"make": check_make, "python": check_python, "pip": check_pip}.get(words[0])
    assert check is not None, f"nobody checks `{words[0]}`"
    check(words)


def check_make(words: list[str]) -> None:
    subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def check_python(words: list[str]) -> None:
    if words[1] == "so100_inference_optimized.py":
        if "--help" not in words:
            cli.parse(words[2:])
        return
    program = words[1:3] if words[1] == "-m" else words[1:2]
    text = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    assert all(re.search(rf"{flag}\b", text) for flag in flags), f"{flags} not all in the help of {program}"


def check_pip(words: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = re.search(r"\[(.*)\]", " ".join(words))
    assert set(extras.group(1).split(",")) <= set(setup["options.extras_require"])


def test_targets_and_files_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)`", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for name in set(re.findall(r"`((?:tests|benchmarks|configs|docs)/[\w./-]+)`", README)) | set(re.findall(r"\]\(([\w./-]+)\)", README)):
        assert (ROOT / name).exists(), name


def test_flags_it_names_exist() -> None:
    text = cli.help_text()
    for flag in set(re.findall(r"`(--[a-z_.]+)", README)) - {"--help", "--scene", "--fault", "--config_path", "--api_token", "--http"}:
        assert re.search(rf"{re.escape(flag)}\b", text), flag


def test_python_examples_are_python() -> None:
    for block in blocks("python"):
        ast.parse(block)
