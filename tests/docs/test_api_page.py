"""`make docs` makes pages in which a user of Python finds what docs/python.md names."""

from __future__ import annotations

import html
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import gr00t_fast

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command of the target writes to, with this interpreter and another directory."""
    out = tmp_path_factory.mktemp("docs")
    recipe = subprocess.run(["make", "--no-print-directory", "-n", "docs"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    words = shlex.split(recipe[-1])
    assert words[-1] == "outputs/docs"
    done = subprocess.run([sys.executable, *words[1:-1], str(out)], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "Warn" not in done.stderr  # a module or name that pdoc does not find
    return out


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8").partition("<main")[2]))


def test_load_policy_stands_there_with_each_argument_described(pages: Path) -> None:
    page = text_of(pages / "gr00t_fast.html")
    _, _, described = page.partition("Load a checkpoint of GR00T")
    for name in inspect.signature(gr00t_fast.load_policy).parameters:
        assert re.search(rf"\b{name}:", described), name


def test_each_public_name_and_what_is_said_of_a_field(pages: Path) -> None:
    page = text_of(pages / "gr00t_fast.html")
    assert all(name in page for name in gr00t_fast.__all__)
    assert "stages of the last call in ms" in text_of(pages / "gr00t_fast" / "base" / "contracts.html")  # a comment in the source
