"""`gr00t-fast export tensorrt`: engines for TensorRT-RTX, really built; it needs no GPU. Running them does: see test_gpu_tensorrt.py."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exports import target_for
from random_networks import write_network
from tiny_graphs import IMAGE_TOKENS, STAGES, write_export, write_graph
from waiting import until

from gr00t_fast.base.errors import ConfigError, EngineError
from gr00t_fast.cli import export
from gr00t_fast.engine import tensorrt_library as library
from gr00t_fast.engine.manifest import Digests, read_manifest
from gr00t_fast.export.tensorrt import build, check_feasible, prompt_profiles, run_alone

pytestmark = pytest.mark.slow

trt = pytest.importorskip("tensorrt_rtx", reason="needs `pip install 'gr00t_fast[tensorrt_rtx]'`")
RTX = library.RTX
ROOT = Path(__file__).resolve().parents[3]


def built(graph: Path, *capabilities: str, **tokens: tuple[int, int, int]) -> dict[str, Any]:
    return build(graph, graph.with_suffix(".engine"), RTX, capabilities, [tokens])


@pytest.fixture(scope="module")
def graphs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("graphs")
    return write_export(directory, identity=target_for(checkpoint).identity(Digests(directory)))


def run(checkpoint: Path, out: Path, *flags: str) -> int:
    return export.tensorrt([f"--model_path={checkpoint}", f"--out={out}", f"--builder={RTX}", "--compute_capability=any", *flags])


def test_without_graphs_they_are_exported_and_every_stage_becomes_an_engine(checkpoint: Path, tiny_engines: Path) -> None:
    """In processes of their own, with the flags that both commands know."""
    exported, manifest = read_manifest(tiny_engines.with_name("engines-onnx"), ""), read_manifest(tiny_engines, "")
    assert (exported.kind, manifest.kind, manifest.precision) == ("onnx", "tensorrt", exported.precision) == ("onnx", "tensorrt", "fp16")
    assert 3 in manifest.denoising_steps
    images, most = exported.shapes["image_tokens"], exported.shapes["max_tokens"]
    assert manifest.shapes["max_tokens"] == most == images + 99
    assert manifest.identity == target_for(checkpoint).identity(Digests(tiny_engines)), "what an engine is checked against when it is loaded"
    assert set(manifest.files) == {*(f"{name}.engine" for name in STAGES), "tables.safetensors"}
    assert manifest.details["builder_version"] == trt.__version__
    assert manifest.details["profiles"] == [{"tokens": [images + 1, exported.shapes["prompt_buckets"][0], most]}]
    for entry in manifest.stages.values():
        facts = entry["build"]
        assert facts["bytes"] == (tiny_engines / entry["file"]).stat().st_size
        assert facts["layers"] >= 5
        assert 1e7 < facts["peak_memory_bytes"] < 4e9


def test_engines_that_are_there_are_replaced_when_asked(checkpoint: Path, graphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_export(tmp_path / "engines")  # an earlier export of any kind
    assert run(checkpoint, out, f"--onnx={graphs}") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(checkpoint, out, f"--onnx={graphs}", "--json", "--overwrite", "--max_text_tokens=20") == 0
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)["stages"]) == set(STAGES)
    assert all(f"| {name} |" in captured.err for name in STAGES)
    manifest = read_manifest(out, "")
    assert (manifest.kind, manifest.shapes["max_tokens"]) == ("tensorrt", IMAGE_TOKENS + 20)


# what is refused


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--onnx=GRAPHS", "--model_path=OTHER"], 1, ["other weights", "gr00t-fast export onnx"]),
        (["--onnx=GRAPHS", "--max_text_tokens=99"], 2, ["--max_text_tokens", "1 to 36"]),
        (["--onnx=GRAPHS", "--precision=bf16", "--denoising_steps=3"], 2, ["--precision, --denoising_steps", "--onnx"]),
        (["--onnx=NOWHERE"], 1, ["NOWHERE", "gr00t-fast export onnx"]),
        (["--onnx=ALTERED"], 1, ["vision.onnx.data is altered"]),
        (["--onnx=FOREIGN"], 1, ["for onnxruntime", "--target=tensorrt"]),
        (["--precision=bf16", "--compute_capability=7.5"], 2, ["bf16 needs compute capability 8.0"]),
        (["--builder=tensorrt", "--compute_capability=8.6,8.9"], 2, ["builds for the GPU it runs on"]),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(
    checkpoint: Path, graphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, said: list[str]
) -> None:
    identity, made = read_manifest(graphs, "").identity, {"GRAPHS": graphs}
    if "--model_path=OTHER" in flags:
        made["OTHER"] = write_network(tmp_path / "network", seed=3)
    if "--onnx=ALTERED" in flags:
        made["ALTERED"] = write_export(tmp_path / "altered", identity=identity)
        weights = made["ALTERED"] / "vision.onnx.data"
        weights.write_bytes(bytes(weights.stat().st_size))
    if "--onnx=FOREIGN" in flags:
        made["FOREIGN"] = write_export(tmp_path / "foreign", quantised="int8", runtime="onnxruntime", identity=identity)
    named = [f"{name}={made.get(value, value)}" for name, value in (flag.split("=") for flag in flags)]
    assert run(checkpoint, tmp_path / "out" / "engines", *named) == code
    error = capsys.readouterr().err
    assert all(word in error for word in said), error
    assert not (tmp_path / "out").exists()


# capabilities and number formats


@pytest.mark.parametrize(
    ("capability", "formats", "expected"),
    [
        ("ada", (), "'ada' is none"),
        ("8.6,", (), "'' is none"),
        ("9.0", (), r"got 9\.0.*--builder=tensorrt "),
        ("7.5", ("bf16",), r"bf16 needs .*8\.0 or newer.*--precision=fp16"),
        ("8.6", ("fp16", "fp8"), r"fp8 needs .*8\.9 or newer.*INT8"),
        ("any", ("fp8",), r"any.*--compute_capability=8\.9,12\.0"),
        ("7.5", ("fp32",), r"fp32 needs .*8\.0"),
        ("7.5", ("fp16", "int8"), ("7.5",)),
        ("8.9, 12.0,8.9", ("fp8",), ("8.9", "12.0")),
        ("any", ("fp32", None), ()),
    ],
)
def test_what_the_gpu_or_library_lacks_is_refused_before_building(capability: str, formats: tuple[str, ...], expected: str | tuple[str, ...]) -> None:
    """And nothing else is."""
    if isinstance(expected, tuple):
        assert check_feasible(RTX, capability, *formats) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            check_feasible(RTX, capability, *formats)


def test_eight_bit_graphs_build_and_what_is_refused_beforehand_the_builder_refuses_too(tmp_path: Path) -> None:
    for quantised, capabilities in (("int8", ("8.6",)), ("fp8", ("8.9", "12.0"))):
        graph = tmp_path / f"{quantised}.onnx"
        write_graph(graph, *STAGES["language"], "bf16", 0, quantised)
        assert built(graph, *capabilities, tokens=(5, 12, 40))["bytes"] == graph.with_suffix(".engine").stat().st_size
    with pytest.raises(EngineError, match="fp8"):
        built(graph, "8.6", tokens=(5, 12, 40))


# prompt lengths

SHAPES = {"image_tokens": 256, "max_tokens": 512, "prompt_buckets": [290, 320, 512]}


def test_tensorrt_gets_a_range_per_bucket_and_rtx_one_tuned_for_the_usual_prompt() -> None:
    profiles = [profile["tokens"] for profile in prompt_profiles(SHAPES, None, one=False)]
    assert profiles == [(257, 290, 290), (291, 320, 320), (321, 512, 512)]
    assert prompt_profiles(SHAPES, 100, one=True) == ({"tokens": (257, 290, 356)},)
    assert prompt_profiles(SHAPES, 20, one=True) == ({"tokens": (257, 276, 276)},)
    for most in (0, -1, 257):
        with pytest.raises(ConfigError, match="from 1 to 256"):
            prompt_profiles(SHAPES, most, one=True)


# the process of its own


def script(file: Path, code: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(code)
    return file


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_what_goes_wrong_in_the_process_is_reported(tmp_path: Path) -> None:
    killed = script(tmp_path / "killed.py", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(EngineError, match=r"run_path .*killed\.py was killed.*ran out of memory"):
        run_alone(runpy.run_path, killed)
    refused = script(tmp_path / "refused.py", "from gr00t_fast.base.errors import ConfigError\nraise ConfigError('too small')")
    with pytest.raises(ConfigError, match="too small"):
        run_alone(runpy.run_path, refused)
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    work = "import os, pathlib, time\nhere = pathlib.Path(__file__).parent\n(here / 'began').write_text(str(os.getpid()))\ntime.sleep(100)"
    parents = {}
    for number in (signal.SIGINT, signal.SIGKILL):
        file = script(tmp_path / str(number) / "work.py", f"{work}\n(here / 'ended').touch()")
        program = f"import runpy; from gr00t_fast.export.tensorrt import run_alone; run_alone(runpy.run_path, {str(file)!r})"
        parents[number, file.parent] = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    for (number, directory), parent in parents.items():
        began = directory / "began"
        until(lambda began=began: began.exists() and began.read_text())
        child = Path(f"/proc/{began.read_text()}/stat")
        parent.send_signal(number)
        assert parent.wait(timeout=60) != 0
        until(lambda child=child: not child.exists() or child.read_text().split()[2] == "Z")
        assert not (directory / "ended").exists()
