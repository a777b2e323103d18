"""README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ say what is so: commands parse with their own parsers, files, links, flags and names exist."""

from __future__ import annotations

import argparse
import ast
import configparser
import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import io
import re
import shlex
import subprocess
from pathlib import Path

import import_rules
import pytest

import gr00t_fast
from gr00t_fast import flags
from gr00t_fast.cli import main as command
from gr00t_fast.engine import choose

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "checkpoints/so100-sim-reach/README.md", *DOCS)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
TEXTS["CHANGELOG.md"] = re.sub(r"### Removed.*?(?=\n## |\Z)", "", TEXTS["CHANGELOG.md"], flags=re.DOTALL)  # what is gone is no longer checked
README = TEXTS["README.md"]
BENCHMARKS = {name: TEXTS[name] for name in ("docs/benchmarks.md", "docs/benchmarks.zh.md")}
PROGRAMS = ("make ", "python ", "pip ", "gr00t-fast ", "lerobot-")
FOREIGN = {"docs/coming_from.md"}  # the first column of its tables has flags of other programs
DECODE, ARGPARSE_PARSE = flags._decode, argparse.ArgumentParser.parse_args


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def lines_to_type() -> list[str]:
    """Of all pages, each once: the lines of bash blocks, and the commands in the benchmarks' tables."""
    lines = "\n".join(block for text in TEXTS.values() for block in blocks("bash", text)).replace("\\\n", " ").splitlines()
    lines += [line for text in BENCHMARKS.values() for line in commands_in_tables(text)]
    return [line for line in dict.fromkeys(lines) if shlex.split(line, comments=True)]


def commands_in_tables(text: str) -> list[str]:
    return re.findall(r"`((?:python|gr00t-fast) [^`]+)`", "\n".join(line for line in text.splitlines() if line.startswith("|")))


def commands_in_sentences() -> list[str]:
    """Those in backticks, which may leave out flags that are required."""
    found = [code for text in TEXTS.values() for code in re.findall(r"`([^`\n]+)`", without_blocks(text)) if code.startswith(PROGRAMS)]
    return [code for code in dict.fromkeys(found) if " " in code and code not in lines_to_type() and "-c " not in code]


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def test_there_are_commands_to_check() -> None:
    assert {shlex.split(line)[0] for line in lines_to_type()} >= {"make", "python", "pip", "gr00t-fast", "lerobot-calibrate"}
    assert len(commands_in_sentences()) > 10


@pytest.mark.parametrize("line", lines_to_type())
def test_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "pip":
        check_pip(line)
    elif words[0].startswith("lerobot-"):
        check_lerobot(words)
    else:
        check_parses(words, monkeypatch)


def check_pip(line: str) -> None:
    if "./plugins/" in line:
        assert (ROOT / line.split()[-1] / "pyproject.toml").is_file()
        return
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(re.search(r"\[(.*)\]", line).group(1).split(",")) <= set(setup["options.extras_require"])


LATER_SCRIPTS = {"lerobot-rollout"}  # of lerobot 0.6; tests/test_lerobot_plugin.py runs it where it is installed


def check_lerobot(words: list[str]) -> None:
    scripts = {point.name for point in importlib.metadata.distribution("lerobot").entry_points}
    assert words[0] in scripts | LATER_SCRIPTS


class Parsed(BaseException):
    """The program has taken its flags, and would begin now."""


def check_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, argv = program_of(words)
    if "--help" in argv:
        return

    def decode(*args: object) -> None:
        DECODE(*args)
        raise Parsed

    def parse_args(*args: object) -> None:
        ARGPARSE_PARSE(*args)
        raise Parsed

    monkeypatch.setattr(flags, "_decode", decode)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(argv)


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """The module whose `main(argv)` a command line calls, and argv."""
    if words[0] == "gr00t-fast":
        return command.__name__, words[1:]
    assert words[0] == "python", f"nobody checks `{words[0]}`"
    if words[1:3] == ["-m", "gr00t_fast"]:
        return command.__name__, words[3:]
    if words[1] == "-m":
        return (f"{words[2]}.__main__" if (ROOT / words[2].replace(".", "/")).is_dir() else words[2]), words[3:]
    return words[1].removesuffix(".py").replace("/", "."), words[2:]


@pytest.mark.parametrize("code", commands_in_sentences())
def test_command_in_a_sentence_exists(code: str) -> None:
    words = shlex.split(code)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[0] == "pip":
        check_pip(code)
    elif words[0].startswith("lerobot-"):
        check_lerobot(words)
    elif words[:3] != ["python", "-m", "pytest"]:
        named = re.findall(r"(?<!\w)--[a-z_.]+", code)
        text = help_of(*program_words(words))
        assert [flag for flag in named if flag != "--help" and not re.search(rf"{re.escape(flag)}\b", text)] == []


def program_words(words: list[str]) -> list[str]:
    """A command without its flags."""
    return [word for word in words if not word.startswith(("--", "DIR"))]


@functools.cache
def help_of(*program: str) -> str:
    module, argv = program_of(list(program))
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*argv, "--help"])
    assert text.getvalue(), program
    return text.getvalue()


@functools.cache
def all_help() -> str:
    return "\n".join(help_of("gr00t-fast", *name.split()) for name in command.COMMANDS)


@pytest.mark.parametrize("name", PAGES)
def test_flags_exist(name: str) -> None:
    text = without_blocks(TEXTS[name])
    if name in FOREIGN:
        text = re.sub(r"^\|.*?(?<!\\)\|", "", text, flags=re.MULTILINE)
    if name == "CHANGELOG.md":  # which also names former flags
        text = re.sub(r"\(was .*?\)", "", text, flags=re.DOTALL).replace("`--max_step_deg`", "")
    known = all_help() + "".join(
        help_of("python", f"benchmarks/{path.name}") for path in programs_of_benchmarks() if path.stem in text or name == "CHANGELOG.md"
    )
    unknown = [flag for flag in set(re.findall(r"`(--[a-z_]+)", text)) if not re.search(rf"{re.escape(flag)}\b", known)]
    assert set(unknown) <= {"--help", "--name"}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[name]):
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_files_exist(name: str) -> None:
    for file in set(re.findall(r"`((?:tests|benchmarks|configs|docs|gr00t_fast|training|checkpoints|\.ci)/[\w./-]*)`", TEXTS[name])):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("name", PAGES)
def test_python_examples_are_python(name: str) -> None:
    for block in blocks("python", TEXTS[name]):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_readme_is_a_page_with_a_light_picture() -> None:
    assert len(README.splitlines()) <= 150
    assert (ROOT / "docs" / "demo.gif").stat().st_size < 1_500_000


@pytest.mark.parametrize("name", ["README.md", "docs/engines.md"])
def test_engines_are_those_that_can_be_chosen(name: str) -> None:
    table = re.search(r"\| `--engine=` \|.*?\n\n", TEXTS[name], flags=re.DOTALL).group()
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == {*choose.ENGINES, *choose.CALIBRATED, *choose.EXPORTED}


def test_every_subcommand_is_named() -> None:
    for word in {name.split()[0] for name in command.COMMANDS}:
        assert re.search(rf"`(gr00t-fast )?{word}`", README), word


def test_arguments_of_load_policy_are_all_described() -> None:
    table = re.search(r"## load_policy\n(.*?)\n## ", TEXTS["docs/python.md"], flags=re.DOTALL).group(1)
    named = [name for row in table.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(inspect.signature(gr00t_fast.load_policy).parameters)


def test_the_drawn_arrow_is_the_tested_one() -> None:
    """Each `a <- b` is an import that the rules allow, and the other way they forbid it; every package is drawn."""
    drawing = blocks("text", TEXTS["CONTRIBUTING.md"])[0]
    drawn = [[unit.strip() for unit in line.split("<-")] for line in drawing.splitlines()]
    for lower, upper in ((a, b) for line in drawn for a, b in zip(line, line[1:], strict=False)):
        lowers = import_rules.BASE if lower == "base" else (lower,)
        assert any(not against_arrow(upper, each) for each in lowers), f"{upper} may not import {lower}"
        assert all(against_arrow(each, upper) for each in lowers), f"{lower} may import {upper}"
    packages = {path.parent.name for path in (ROOT / "gr00t_fast").glob("*/__init__.py")}
    assert packages <= {unit for line in drawn for unit in line}


def against_arrow(importer: str, imported: str) -> list[str]:
    importer, imported = (unit if unit in import_rules.OUTSIDE and unit != "export" else f"gr00t_fast.{unit}" for unit in (importer, imported))
    return import_rules.arrow_violations({f"{importer}.part": f"import {imported}.part", f"{imported}.part": ""})


def test_one_guess_finds_what_contributing_names() -> None:
    """A row names `symbol`s and last of all the file that has them."""
    table = TEXTS["CONTRIBUTING.md"].partition("## Where things live")[2]
    rows = [row for row in table.splitlines() if row.startswith("|") and "(`" in row.split("|")[1]]
    assert len(rows) >= 4
    for row in rows:
        what, where = row.split("|")[1:3]
        file = re.findall(r"`(gr00t_fast/[\w/]+\.py)`", where)[-1]
        for symbol in re.findall(r"\(`(\w+)`\)", what):
            assert symbol in (ROOT / file).read_text(encoding="utf-8"), f"{symbol} in {file}"


def programs_of_benchmarks() -> list[Path]:
    return [file for file in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_described(name: str) -> None:
    programs = [file.stem for file in programs_of_benchmarks()]
    assert "open_loop" in programs
    assert [program for program in programs if f"`{program}`" not in BENCHMARKS[name]] == []


def test_both_languages_have_the_same_commands() -> None:
    english, chinese = (
        [[shlex.split(line, comments=True) for line in block.splitlines()] for block in blocks("bash", text)] for text in BENCHMARKS.values()
    )
    assert english == chinese
    english, chinese = (commands_in_tables(text) for text in BENCHMARKS.values())
    assert english == chinese


def test_flags_of_the_policy_benchmark_are_its_own() -> None:
    text = help_of("python", "benchmarks/simple_benchmark.py")
    for content in BENCHMARKS.values():
        section = re.search(r"## simple_benchmark.*?(?=\n## )", content, flags=re.DOTALL).group()
        named = set(re.findall(r"`(--[a-z_]+)`", section))
        assert {"--policies", "--published", "--rounds", "--max_minutes"} <= named
        assert all(re.search(rf"{flag}\b", text) for flag in named - {"--controller"}), named


def test_versions_of_the_changelog_are_those_of_the_package() -> None:
    versions = re.findall(r"^## \[([\d.]+)\]", TEXTS["CHANGELOG.md"], flags=re.MULTILINE)
    assert versions[0] == gr00t_fast.__version__
