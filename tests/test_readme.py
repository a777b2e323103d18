"""The READMEs' commands are those of the code: targets, modules, flags and extras exist, and the long command parses as printed."""

from __future__ import annotations

import ast
import configparser
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gr00t_fast import cli
from gr00t_fast.serving import __main__ as serving

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = {name: (ROOT / "benchmarks" / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Of all READMEs, each once: those in blocks, and those of the benchmarks' tables."""
    texts = (README, *BENCHMARKS.values())
    lines = "\n".join(block for text in texts for block in blocks("bash", text)).replace("\\\n", " ").splitlines()
    lines += [command for text in BENCHMARKS.values() for command in commands_in_tables(text)]
    found = [shlex.split(line, comments=True) for line in dict.fromkeys(lines) if line.strip()]
    return [words for words in found if words]


def commands_in_tables(text: str) -> list[str]:
    return re.findall(r"`((?:python|pip) [^`]+)`", text)


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
    text = help_of(*program)
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    assert all(re.search(rf"{flag}\b", text) for flag in flags), f"{flags} not all in the help of {program}"


@functools.cache
def help_of(*program: str) -> str:
    return subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout


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
    text = cli.help_text() + serving.help_text()
    for flag in set(re.findall(r"`(--[a-z_.]+)", README)) - {"--help", "--scene", "--fault", "--config_path"}:
        assert re.search(rf"{re.escape(flag)}\b", text), flag


def test_python_examples_are_python() -> None:
    for block in blocks("python"):
        ast.parse(block)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_described(name: str) -> None:
    programs = [file.stem for file in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")]
    assert "open_loop" in programs
    assert [program for program in programs if f"`{program}`" not in BENCHMARKS[name]] == []
    for linked in re.findall(r"\]\(([\w./-]+)\)", BENCHMARKS[name]):
        assert (ROOT / "benchmarks" / linked).exists(), linked


def test_both_languages_have_the_same_commands() -> None:
    english, chinese = (
        [[shlex.split(line, comments=True) for line in block.splitlines()] for block in blocks("bash", text)] for text in BENCHMARKS.values()
    )
    assert english == chinese
    english, chinese = (commands_in_tables(text) for text in BENCHMARKS.values())
    assert english == chinese


def test_flags_of_the_policy_benchmark_are_its_own() -> None:
    text = help_of("benchmarks/simple_benchmark.py")
    for content in BENCHMARKS.values():
        section = re.search(r"## simple_benchmark.*?(?=\n## )", content, flags=re.DOTALL).group()
        named = set(re.findall(r"`(--[a-z_]+)`", section))
        assert {"--policies", "--published", "--steps", "--minutes"} <= named
        assert all(re.search(rf"{flag}\b", text) for flag in named - {"--controller"}), named
