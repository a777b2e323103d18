"""What a certificate says, that a failing engine fails it, and that it tells nothing of whose machine it was."""

from __future__ import annotations

import getpass
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

from gr00t_fast import __version__
from gr00t_fast.cli.main import main
from gr00t_fast.engine.manifest import sha256
from gr00t_fast.evaluation import bench
from gr00t_fast.evaluation.certificate import certificate

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.cfg").is_file())
TRAINED = ROOT / "checkpoints" / "so100-sim-reach"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TRAINED, tmp_path / "annas-secret-network"))


def tuned(checkpoint: Path, tmp_path: Path, code: int = 0, engines: str = "eager,fused,cuda_graph") -> dict:
    file = tmp_path / "sent" / "certificate.json"
    few = ["--observations=random:0", "--frames=3", "--rounds=4", f"--engines={engines}", f"--out={tmp_path / 'out'}"]
    assert main(["tune", f"--model_path={checkpoint}", *few, f"--certificate={file}", "--quiet"]) == code
    return json.loads(file.read_text(encoding="utf-8"))


def test_it_has_what_a_reader_needs_and_nothing_of_whose_machine_it_was(checkpoint: Path, tmp_path: Path) -> None:
    found = tuned(checkpoint, tmp_path)
    assert found["passed"] is True
    assert found["versions"]["gr00t_fast"] == __version__
    assert {"torch", "numpy", "python"} <= set(found["versions"])
    assert {"processor", "gpu", "driver", "cuda", "torch_threads"} <= set(found["machine"])
    (measured,) = found["measured"]
    assert measured["weights"] == [sha256(TRAINED / "model.safetensors")]
    assert (measured["kind"], measured["recorded"], measured["observations"]) == ("n1.5", False, 3)
    assert measured["not_usable"] == ["cuda_graph"]
    assert set(measured["engines"]) == {"eager", "fused"}
    for engine in measured["engines"].values():
        total, stages = engine["times_ms"]["4"], engine["stages_ms"]["4"]
        assert {"vision", "language", "denoise", "preprocess", "total"} <= set(stages)
        for times in (total, *stages.values()):
            assert times["count"] == 4
            assert 0 < times["p50"] <= times["p95"] <= times["p99"]
        assert 0 <= engine["error_joint_units"]["p99"] <= engine["error_limit"]
    text = json.dumps(found)
    for private in (getpass.getuser(), platform.node(), "annas-secret-network", str(tmp_path), str(ROOT), str(Path.home())):
        assert len(private) < 4 or private not in text, private


@pytest.mark.slow
def test_files_of_an_export_are_named_by_their_content(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    (measured,) = tuned(checkpoint, tmp_path, engines="onnxruntime")["measured"]
    exported = measured["engines"]["onnxruntime fp32"]["files"]
    assert exported == sorted(
        sha256(file) for file in (checkpoint / "exports" / "onnx-fp32").iterdir() if "manifest" not in file.name and file.name[0] != "."
    )


@pytest.mark.parametrize("wrong_by", [30.0, np.nan], ids=["far off", "NaN"])
def test_an_engine_that_is_wrong_fails_it(wrong_by: float, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 joint units, or no number at all, are added to what one of two engines answers."""
    answers = bench.Bench.answers

    def altered(self: bench.Bench, policy: object) -> list[dict[str, np.ndarray]]:
        found = answers(self, policy)
        return [{key: value + wrong_by for key, value in each.items()} for each in found] if policy.engine.name == "fused" else found

    monkeypatch.setattr(bench.Bench, "answers", altered)
    found = tuned(checkpoint, tmp_path)
    engines = found["measured"][0]["engines"]
    assert (found["passed"], engines["eager"]["passed"], engines["fused"]["passed"]) == (False, True, False)


def test_nothing_measured_is_no_pass() -> None:
    origin = {"machine": {}, "versions": {}, "git_commit": None}
    assert certificate([], origin)["passed"] is False


def test_a_file_that_cannot_be_written_is_an_error(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sent").write_text("a file")
    words = [f"--model_path={checkpoint}", "--frames=1", "--rounds=1", "--engines=eager", f"--out={tmp_path / 'out'}"]
    assert main(["bench", *words, f"--certificate={tmp_path / 'sent' / 'x.json'}"]) == 2
    assert "--certificate=" in capsys.readouterr().err
