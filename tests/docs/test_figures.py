"""Every figure of README.md and docs/results.md stands beside a file that says how it was made, and is the number of that file."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.lib import program, results
from benchmarks.lib.quotes import QUOTES, Quote
from benchmarks.lib.results import CERTIFICATES, RESULTS, ROOT, certificates, faults_of, publish
from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.flags import parse
from gr00t_fast.engine.manifest import sha256

PAGES = ("README.md", "docs/results.md")
KEPT = sorted(RESULTS.rglob("*.json"))
# Names with digits in them, versions among them, and what stands between backquotes or in a link.
NAMES = re.compile(r"`[^`]*`|\]\([^)]*\)|GR00T N\d\.\d|\b[NHp]\d[\w.]*|\b(?:fp|bf|INT|AVX|SO-)\d+|Python \d\.\d+")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")
FILE = re.compile(r"`((?:benchmarks/results|tests/parity|benchmarks/certificates)[\w./-]*)`")


def section(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page == "README.md":
        text = re.search(r"^## Figures.*?(?=^## )", text, flags=re.DOTALL | re.MULTILINE).group()
    text = re.sub(r"<!-- certificates -->.*?<!-- end -->", "", text, flags=re.DOTALL)  # a test of its own
    return re.sub(r"^#.*$", "", text, flags=re.MULTILINE).replace("**", "")


def figures_of(page: str) -> list[tuple[str, str]]:
    """(text with figures, the same with the paragraph before it): paragraphs, and rows of tables."""
    found, before = [], ""
    for block in re.split(r"\n\s*\n", section(page).strip()):
        if block.startswith("|"):
            found += [(row, f"{before}\n{row}") for row in block.splitlines()[2:]]
        else:
            found.append((block, block))
            before = block
    found = [(" ".join(text.split()), with_file) for text, with_file in found]  # a sentence may go on in the next line
    return [(text, with_file) for text, with_file in found if NUMBER.search(NAMES.sub("", text))]


def files_in(text: str) -> list[Path]:
    places = [ROOT / name for name in FILE.findall(text)]
    return [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*.json")))]


BLOCKS = [pytest.param(page, *block, id=f"{page}: {block[0][:60]}") for page in PAGES for block in figures_of(page)]


@pytest.mark.parametrize(("page", "text", "with_file"), BLOCKS)
def test_every_figure_is_that_of_a_file(page: str, text: str, with_file: str) -> None:
    """A number is one that a sentence of benchmarks/lib/quotes.py has, recomputed; or it stands in the file or its command as it is."""
    named = FILE.findall(with_file)
    assert named, "figures without a file"
    assert all((ROOT / name).exists() for name in named)
    if not any(name.startswith("benchmarks/results") for name in named):
        return  # what tests hold
    files = files_in(with_file)
    assert files
    quoted = [quote.said().replace("**", "") for quote in QUOTES if quote.page == page and RESULTS / quote.file in files]
    left = text
    for said in quoted:
        left = left.replace(said, "")
    left = NAMES.sub("", left)
    stated = {number for file in files for number in NUMBER.findall(file.read_text(encoding="utf-8"))}
    unknown = {number for number in NUMBER.findall(left) if number not in stated and f"{number}.0" not in stated}
    assert not unknown, f"in no file: {unknown}"


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: f"{quote.page}: {quote.text[:50]}")
def test_every_quote_stands_on_its_page(quote: Quote) -> None:
    said = quote.said().replace("**", "")
    assert any(said in text and RESULTS / quote.file in files_in(with_file) for text, with_file in figures_of(quote.page)), said


def test_ratios_of_the_first_table_stand_among_the_figures() -> None:
    row = re.search(r"^\| time per inference.*$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE).group()
    ratios = re.findall(r"\d\.\d\d times", row)
    assert ratios
    assert [ratio for ratio in ratios if f"{ratio} as fast" not in section("README.md")] == []


@pytest.mark.parametrize("file", KEPT, ids=lambda file: str(file.relative_to(RESULTS)))
def test_every_result_says_how_it_was_made(file: Path) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    assert faults_of(result) == []
    if not (ROOT / ".git").exists() or git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("this copy has no history")
    assert git("cat-file", "-e", f"{result['git_commit']}^{{commit}}").returncode == 0, "a commit that nobody else has"


def git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)


def test_every_result_is_named_by_a_page() -> None:
    pages = [ROOT / "README.md", ROOT / "DECISIONS.md", *(ROOT / "docs").rglob("*.md"), ROOT / "checkpoints/so100-sim-reach/README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages) + (ROOT / "gr00t_fast/scene/look.py").read_text(encoding="utf-8")
    lost = [file for file in KEPT if not any(name.as_posix() in text for name in (file.relative_to(ROOT), file.parent.relative_to(ROOT)))]
    assert lost == []


# --- what writes there


GOOD = {"command_line": "x", "git_commit": "0123456789ab", "machine": {"cpus": 2}, "versions": {"torch": "2"}}


@pytest.mark.parametrize("lacks", ["command_line", "git_commit", "machine", "versions", "-dirty"])
def test_a_result_that_nobody_can_make_again_is_not_kept(lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    result = GOOD | {"git_commit": "0123456789ab-dirty"} if lacks == "-dirty" else {key: value for key, value in GOOD.items() if key != lacks}
    for name, content in (("good", GOOD), ("bad", result)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    pairs = [(tmp_path / f"{name}.json", tmp_path / "results" / f"{name}.json") for name in ("good", "bad")]
    with pytest.raises(ConfigError, match=r"bad\.json"):
        publish(pairs)
    assert not (tmp_path / "results").exists()
    publish(pairs[:1])
    assert json.loads((tmp_path / "results" / "good.json").read_text()) == GOOD


def test_benchmarks_do_not_write_there_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    @program.dataclass
    class Config(program.Flags):
        out: Path = RESULTS / "of_a_test"

    assert program.finish("x", Config(), lambda _: pytest.fail("minutes for nothing"), str) == program.EXIT_USAGE
    assert "make figures" in capsys.readouterr().err
    assert not (RESULTS / "of_a_test").exists()


def test_figures_are_not_made_from_changed_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(figures, "git_commit", lambda: "0123456789ab-dirty")
    monkeypatch.setattr(figures, "make", lambda *_: pytest.fail("minutes for nothing"))
    assert figures.main(["--figures", "open_loop"]) == program.EXIT_USAGE
    assert "0123456789ab-dirty" in capsys.readouterr().err


def test_what_cannot_be_made_here_is_said_and_what_fails_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept: list = []
    monkeypatch.setattr(figures, "git_commit", lambda: "0123456789ab")
    monkeypatch.setattr(figures, "make", lambda name, out: name == "sync")
    monkeypatch.setattr(figures, "publish", kept.extend)
    monkeypatch.setitem(figures.FIGURES, "gpu", figures.Figure((), {}, 1, lambda: "needs a CUDA GPU"))
    assert figures.main(["--figures", "sync", "threaded", "gpu"]) == 1
    said = capsys.readouterr().out
    assert "skipped: gpu: needs a CUDA GPU" in said
    assert "about 10 min" in said
    assert "FAILED" in said
    assert [target for _, target in kept] == [RESULTS / "evaluate" / "speed_up_sync.json"]
    assert figures.main(["--figures", "snyc"]) == program.EXIT_USAGE
    assert "Did you mean 'sync'" in capsys.readouterr().err


class Parsed(BaseException):
    """The program has taken its flags, and would begin now."""


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_command_is_understood_by_its_program(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = parse.build

    def build_and_end(*arguments: object) -> None:
        build(*arguments)
        raise Parsed

    monkeypatch.setattr(parse, "build", build_and_end)
    monkeypatch.chdir(ROOT)
    for command in figures.FIGURES[name].commands:
        words = figures.words_of(command, tmp_path)
        if words[0].startswith("$VLA_CPP/scripts/"):
            continue  # another project's program
        module = {"gr00t_fast": "gr00t_fast.cli.main"}.get(words[1], words[1]) if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
        with pytest.raises(Parsed):
            importlib.import_module(module).main(words[2:] if words[0] == "-m" else words[1:])
        assert words[0] == "training/record.py" or any(str(tmp_path) in word for word in words), "what it leaves is kept elsewhere"


def test_every_quoted_file_is_made_by_a_figure() -> None:
    made = {kept for figure in figures.FIGURES.values() for kept in figure.leaves.values()}
    assert {quote.file for quote in QUOTES} <= made


def test_the_chinese_page_is_in_step() -> None:
    """The same programs with the same flags, the same commands, the same links."""

    def facts(page: str) -> list[list[str]]:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        return [
            re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL)
            for pattern in (r"^\|`(\w+)`", r"`(--[^`]*)`", r"^```bash\n(.*?)^```", r"\]\((.*?)\)")
        ]

    assert facts("benchmarks.md") == facts("benchmarks.zh.md")


# --- certificates


def test_the_table_of_certificates_is_that_of_the_files() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- certificates -->\n\n(.*?)\n\n<!-- end -->", page, flags=re.DOTALL).group(1)
    assert shown == certificates(), "write it again: python -c 'from benchmarks.lib.results import certificates; print(certificates())'"


def test_a_certificate_of_the_demo_is_of_the_shipped_weights() -> None:
    found = [json.loads(file.read_text(encoding="utf-8")) for file in CERTIFICATES.glob("*demo*.json")]
    assert found
    assert all(each["weights"] == [sha256(ROOT / "checkpoints/so100-sim-reach/model.safetensors")] for one in found for each in one["measured"])
