"""README.md, CONTRIBUTING.md, CHANGELOG.md, docs/ and the Dockerfile say what is so: commands parse with their own parsers; what is named exists."""

from __future__ import annotations

import ast
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

import pytest

import gr00t_fast
from gr00t_fast.base.flags import parse
from gr00t_fast.cli import main as command

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "checkpoints/so100-sim-reach/README.md", *DOCS)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
TEXTS["CHANGELOG.md"] = re.sub(r"### Removed.*?(?=\n## |\Z)", "", TEXTS["CHANGELOG.md"], flags=re.DOTALL)  # what is gone is no longer checked
LATER_SCRIPTS = {"lerobot-rollout"}  # of lerobot 0.6; tests/contract/test_lerobot_plugin.py runs it where it is installed
SETUP = (ROOT / "setup.cfg").read_text(encoding="utf-8")
BUILD = parse.build


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def lines_to_type() -> list[str]:
    """Of all pages, each once: the lines of bash blocks."""
    lines = "\n".join(block for text in TEXTS.values() for block in blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [line for line in dict.fromkeys(lines) if shlex.split(line, comments=True)]


@pytest.mark.parametrize("line", lines_to_type())
def test_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "pip" and "./plugins/" in line:
        assert (ROOT / line.split()[-1] / "pyproject.toml").is_file()
    elif words[0] == "pip":
        extras = re.search(r"\[(.*)\]", line).group(1).split(",")
        assert all(re.search(rf"^{extra} *=", SETUP, flags=re.MULTILINE) for extra in extras)
    elif words[0].startswith("lerobot-"):
        assert words[0] in {point.name for point in importlib.metadata.distribution("lerobot").entry_points} | LATER_SCRIPTS
    elif not {"--help", "--help-all"} & set(words):
        module, argv = program_of(words)
        monkeypatch.setattr(parse, "build", build_and_end)
        monkeypatch.chdir(ROOT)
        with pytest.raises(Parsed):
            importlib.import_module(module).main(argv)


class Parsed(BaseException):
    """The program has taken its flags, and would begin now."""


def build_and_end(*args: object) -> None:
    BUILD(*args)
    raise Parsed


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


@functools.cache
def help_of(*program: str) -> str:
    module, argv = program_of(list(program))
    wish = "--help-all" if program[0] == "gr00t-fast" else "--help"
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*argv, wish])
    assert text.getvalue(), program
    return text.getvalue()


@pytest.mark.parametrize("name", PAGES)
def test_flags_exist(name: str) -> None:
    text = without_blocks(TEXTS[name])
    if name == "docs/coming_from.md":  # the first column of its tables has flags of other programs
        text = re.sub(r"^\|.*?(?<!\\)\|", "", text, flags=re.MULTILINE)
    if name == "CHANGELOG.md":  # which also names what is gone
        text = re.sub(r"### (Removed|Changed).*?(?=\n##+ |\Z)", "", text, flags=re.DOTALL)
    programs = [file for file in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")]
    known = "\n".join(help_of("gr00t-fast", *words.split()) for words in command.COMMANDS)
    known += "".join(help_of("python", f"benchmarks/{file.name}") for file in programs if file.stem in text or name == "CHANGELOG.md")
    assert set(re.findall(r"`(--[a-z_]+)", text)) <= {*re.findall(r"--\w+", known), "--help", "--name"}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_lead_somewhere(name: str) -> None:
    text = TEXTS[name].partition("### Removed")[0]  # of the changelog, which also names what is gone
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target
    for file in set(re.findall(r"`((?:tests|benchmarks|configs|docs|gr00t_fast|training|checkpoints|examples|\.ci)/[\w./-]*)`", text)):
        assert (ROOT / file).exists(), file


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_python_examples_are_python(name: str) -> None:
    for block in blocks("python", TEXTS[name]):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_arguments_of_load_policy_that_the_page_describes_exist() -> None:
    """That all are described test_api_page.py holds."""
    table = re.search(r"## load_policy\n(.*?)\n## ", TEXTS["docs/python.md"], flags=re.DOTALL).group(1)
    named = [name for row in table.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert named
    assert set(named) <= set(inspect.signature(gr00t_fast.load_policy).parameters)


def test_what_the_dockerfile_names_is_there_and_goes_to_the_builder() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    sources = {word for words in re.findall(r"^COPY (.+) \S+$", dockerfile, flags=re.MULTILINE) for word in words.split()}
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert sources >= {"setup.cfg", "gr00t_fast", "requirements/constraints.txt", "README.md", "LICENSE"}
    assert all((ROOT / source).exists() and f"!{source}" in allowed for source in sources)
    assert '"tini", "--", "gr00t-fast"' in dockerfile, "the program must not be the first process"
