"""The benchmarks of 8-bit engines and of TensorRT at run time, as far as a machine without a GPU can go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_networks import TINY, write_network

from benchmarks import bench_eight_bit, bench_tensorrt_run, eight_bit_accuracy
from gr00t_fast import tensorrt_library
from gr00t_fast.engine.manifest import read_manifest

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.mark.parametrize("program", [bench_eight_bit, bench_tensorrt_run, eight_bit_accuracy])
def test_help_says_what_is_measured(program, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for word in ("--device", "--seed", "--out", "last line is JSON"):
        assert word in " ".join(told.split())


@without_gpu
@pytest.mark.parametrize(("program", "reason"), [(bench_eight_bit, "needs a CUDA GPU of compute capability 8.9"), (bench_tensorrt_run, "sees none")])
def test_without_a_gpu_they_say_so_and_write_nothing(program, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([f"--out={tmp_path}"]) == 1
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_refused_arm_is_a_finding(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole run, with the plain model in place of the CUDA graph and engines that are not there."""
    monkeypatch.setattr(bench_tensorrt_run, "check", lambda _: None)
    monkeypatch.setattr(bench_tensorrt_run, "BASELINE", "eager")
    flags = [f"--engines=fp16={tmp_path / 'nothing'}", "--observations=2", "--rounds=3", "--device=cpu", f"--out={tmp_path / 'out'}"]
    assert bench_tensorrt_run.main([f"--model_path={checkpoint}", *flags]) == 0
    told = capsys.readouterr().out
    result = json.loads(told.strip().splitlines()[-1])
    assert "holds no exported engine" in result["arms"]["fp16"]["refused"]
    assert result["arms"]["eager"]["within_limit"] is not None
    assert result["times_ms"]["eager"]["count"] == 3
    assert set(result["times_ms"]) == {"eager"}
    assert "refused: EngineError" in told
    assert (tmp_path / "out" / "bench_tensorrt_run.json").is_file()


def test_engines_that_are_built_without_a_gpu_are_named_with_the_librarys_reason(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Export and build are real; the run stops where the GPU is missing."""
    pytest.importorskip("tensorrt_rtx", reason="needs `pip install 'gr00t_fast[tensorrt_rtx]'`")
    pytest.importorskip("onnxscript", reason="needs `pip install 'gr00t_fast[export]'`")
    if torch.cuda.is_available():
        pytest.skip("says what happens without a GPU")
    monkeypatch.setattr(bench_tensorrt_run, "check", lambda _: None)
    monkeypatch.setattr(bench_tensorrt_run, "BASELINE", "eager")
    flags = ["--builder=tensorrt_rtx", "--observations=1", "--rounds=1", "--device=cpu", f"--out={tmp_path}"]
    assert bench_tensorrt_run.main([f"--model_path={checkpoint}", *flags]) == 0
    arm = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["arms"]["built_fp16"]
    assert arm["builder"] == "tensorrt_rtx"
    assert arm["bytes"] > 0
    assert "ConfigError" in arm["refused"]
    assert "cpu" in arm["refused"] or "CUDA" in arm["refused"]
    assert read_manifest(tmp_path / "engines-fp16", "").kind == "tensorrt"


@pytest.mark.parametrize("word", ["fp16", "=somewhere", "cuda_graph=somewhere"])
def test_engines_without_a_name_are_refused(word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench_tensorrt_run.main([f"--engines={word}", f"--out={tmp_path}"]) == 1
    assert "expected NAME=DIRECTORY" in capsys.readouterr().err


def test_the_library_is_chosen_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tensorrt_run, "rtx_capabilities", lambda _: {"8.9": None})
    monkeypatch.setattr(tensorrt_library, "load", lambda name: name)
    both = list(tensorrt_library.BUILDERS)
    for installed, here, expected in (
        (both, "8.9", ("tensorrt_rtx", "auto")),
        (both, "9.0", ("tensorrt", "auto")),
        (["tensorrt_rtx"], "9.0", ("tensorrt_rtx", "any")),
        (["tensorrt"], "9.0", ("tensorrt", "auto")),
    ):
        monkeypatch.setattr(tensorrt_library, "installed", lambda installed=installed: installed)
        monkeypatch.setattr(tensorrt_library, "gpu_capability", lambda here=here: here)
        assert bench_tensorrt_run.choose_builder("auto") == expected


def test_a_calibration_is_made_once(checkpoint: Path, tmp_path: Path) -> None:
    def calibrated(*flags: str) -> Path:
        arguments = bench_eight_bit._parser().parse_args(["--frames=2", "--device=cpu", f"--out={tmp_path}", *flags])
        return bench_eight_bit.calibrated("int8", checkpoint, bench_eight_bit.with_defaults(arguments)) / "manifest.json"

    stamp = calibrated().stat().st_mtime_ns
    assert calibrated().stat().st_mtime_ns == stamp
    other = calibrated("--calibration=random:1")
    assert other.stat().st_mtime_ns != stamp, "with other settings it is made again"
    assert json.loads(other.read_text())["quantisation"]["calibration"]["source"] == "random:1"


def test_with_a_data_set_calibration_is_as_careful_as_the_engines_own(tmp_path: Path) -> None:
    def chosen(*flags: str) -> tuple:
        found = bench_eight_bit.with_defaults(bench_eight_bit._parser().parse_args(flags))
        return found.frames, found.trial_frames, found.allow_few

    assert chosen() == (16, 0, True)
    assert chosen(f"--calibration={tmp_path}") == (128, 8, False)
    assert chosen(f"--calibration={tmp_path}", "--frames=3", "--trial_frames=0", "--allow_few") == (3, 0, True)


def test_accuracy_is_told_for_every_part(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--calibration=random:0", "--observations=random:1", "--frames=3", "--held_out=2", "--allow_few", "--trial_frames=1", "--device=cpu"]
    assert eight_bit_accuracy.main([f"--model_path={checkpoint}", f"--out={tmp_path}", "--limit=1000", *flags]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    for variant in result["variants"].values():
        assert set(variant["errors"]) == {"vision", "language", "refine", "dit", "all", "chosen", "chosen, over bf16"}
        assert all(error["p50"] > 0 for error in variant["errors"].values())
        assert variant["kept_in_16_bits"] == []
        assert variant["weight_bytes"] > 0
    assert result["held_out"]["digest"] != result["calibration"]["digest"]
