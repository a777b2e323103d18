"""export/to_tensorrt.py as a program: from flags to engines, and which graphs it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from random_networks import write_network
from tiny_graphs import STAGES, write_export

from gr00t_fast import tensorrt_library as library
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.cli import export_onnx, export_tensorrt
from gr00t_fast.cli.policy_flags import parse_with
from gr00t_fast.engine.manifest import Digests, Target, read_manifest
from gr00t_fast.export import tensorrt
from gr00t_fast.export.tensorrt import UP_TO_DATE, SourceOptions
from gr00t_fast.inputs.data_config import DATA_CONFIGS

pytest.importorskip("tensorrt_rtx", reason="needs `pip install 'gr00t_fast[tensorrt_rtx]'`")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("checkpoint"))


def identity_of(checkpoint: Path, directory: Path) -> dict:
    return Target(open_checkpoint(checkpoint), "new_embodiment", DATA_CONFIGS["so100"], "so100").identity(Digests(directory))


@pytest.fixture(scope="module")
def graphs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("graphs")
    return write_export(directory, identity=identity_of(checkpoint, directory))


def run(checkpoint: Path, out: Path, *flags: str) -> int:
    target = [f"--model_path={checkpoint}", f"--out={out}", f"--builder={library.RTX}", "--compute_capability=any"]
    return export_tensorrt.main([*target, *flags])


def test_graphs_that_are_named_become_engines_and_only_once(
    checkpoint: Path, graphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "engines"
    for expected in ("not built yet", UP_TO_DATE):
        assert run(checkpoint, out, f"--onnx={graphs}", "--json") == 0
        captured = capsys.readouterr()
        lines, result = [line for line in captured.err.splitlines() if line.split()[0] in ("stage", *STAGES)], json.loads(captured.out)
        assert {name: stage["reason"] for name, stage in result["stages"].items()} == dict.fromkeys(STAGES, expected)
        assert [line.split()[0] for line in lines] == ["stage", *STAGES]
    manifest = read_manifest(out, "")
    assert manifest.identity == identity_of(checkpoint, out), "what an engine is checked against when it is loaded"
    assert (manifest.program, manifest.flags) == (
        "to_tensorrt.py",
        [f"--onnx={graphs}", f"--builder={library.RTX}", "--compute_capability=any"],
    )


def test_graphs_of_another_checkpoint_are_refused(graphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_network(tmp_path / "other", seed=3)
    assert run(other, tmp_path / "engines", f"--onnx={graphs}") == 1
    error = capsys.readouterr().err
    assert "other weights" in error
    assert "gr00t-fast export onnx" in error
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--precision=bf16", "the graphs are fp16, asked for was --precision=bf16"),
        ("--denoising_steps=3", "tables for 4 denoising steps, asked for was 3"),
        ("--max_text_tokens=99", "take 36 text tokens, asked for were 99"),
    ],
)
def test_graphs_that_hold_something_else_are_refused(
    checkpoint: Path, graphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, said: str
) -> None:
    assert run(checkpoint, tmp_path / "engines", f"--onnx={graphs}", flag) == 1
    assert said in capsys.readouterr().err


def test_a_gpu_that_cannot_is_refused_before_anything_is_exported(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, tmp_path / "engines", "--precision=bf16", "--compute_capability=7.5") == 1
    assert "bf16 needs 8.0 or newer" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_graphs_they_are_exported_once_and_again_when_stale(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = []

    def export(options: SourceOptions) -> None:
        exported.append(options.flags())
        options.directory.mkdir(exist_ok=True)
        write_export(options.directory, identity=identity_of(Path(options.model_path), options.directory))

    monkeypatch.setattr(tensorrt, "export_graphs", export)
    for _ in range(2):
        assert run(checkpoint, tmp_path / "engines") == 0
    assert exported == [("--precision=fp16",)]
    other = write_network(tmp_path / "other", seed=3)
    assert run(other, tmp_path / "engines") == 0
    assert len(exported) == 2
    assert "was not made for this checkpoint" in capsys.readouterr().err


def test_the_exporter_understands_the_flags_that_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own parser reads them: no flag is misspelt."""
    seen = []
    monkeypatch.setattr(tensorrt.subprocess, "run", lambda command, **_: seen.append(command) or type("Done", (), {"returncode": 0}))
    other = ("--lang_instruction=pick: the cube", "--prompt_style=nvidia", "--processor_path=somewhere")
    options = SourceOptions("model", "gr1", "so100_dualcam", tmp_path / "engines", denoising_steps=(3, 5), max_text_tokens=77, other_flags=other)
    tensorrt.export_graphs(options)
    words = seen[0][len(("python", "-m", "gr00t_fast", "export", "onnx")) :]
    arguments = parse_with(export_onnx.ExportOnnxConfig, words, export_onnx.check)
    assert (arguments.model_path, arguments.embodiment_tag, arguments.data_config) == ("model", "gr1", "so100_dualcam")
    assert (arguments.precision, arguments.denoising_steps, arguments.max_text_tokens) == ("fp16", [3, 5], 77)
    assert (arguments.out, arguments.overwrite) == (tmp_path / "engines-onnx", True)
    assert (arguments.lang_instruction, arguments.prompt_style) == ("pick: the cube", "nvidia")


def test_an_exporter_that_fails_is_reported(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('error: out of paper')")
    monkeypatch.setattr(tensorrt, "EXPORTER", (str(broken),))
    assert run(checkpoint, tmp_path / "engines") == 1
    assert "exporting the graphs ended with code 1" in capfd.readouterr().err
