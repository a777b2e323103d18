"""Engines for TensorRT-RTX, really built: it needs no GPU. Running them does: see test_gpu_tensorrt.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_graphs import IMAGE_TOKENS, MAX_TOKENS, STAGES, WIDTH, write_export, write_graph

from gr00t_fast import tensorrt_library as library
from gr00t_fast.engine.manifest import read_manifest
from gr00t_fast.errors import ConfigError, EngineError
from gr00t_fast.export.tensorrt import UP_TO_DATE, BuildOptions, as_table, build_engines, check_feasible, prompt_profiles
from gr00t_fast.export.tensorrt_capability import check_precisions, parse_capabilities, precisions_of
from gr00t_fast.export.tensorrt_stage import Request, check_plan, run_stage

trt = pytest.importorskip("tensorrt_rtx", reason="needs `pip install 'gr00t_fast[tensorrt_rtx]'`")
RTX = library.RTX
ROOT = Path(__file__).parent.parent
without_gpu = pytest.mark.skipif(library.gpu_capability() is not None, reason="says what happens where no CUDA driver is")


def silent(*_: object) -> None:
    """No progress shown."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(graphs, engines) of a small export; tests that change them copy them first."""
    graphs, out = tmp_path_factory.mktemp("graphs"), tmp_path_factory.mktemp("engines") / "out"
    write_export(graphs)
    build_engines(BuildOptions(graphs, out, RTX, "any"), "make it so")
    return graphs, out


@pytest.fixture
def copy(built: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    for name, source in zip(("graphs", "engines"), built, strict=True):
        (tmp_path / name).mkdir()
        for file in source.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    return tmp_path / "graphs", tmp_path / "engines"


def reasons(graphs: Path, out: Path, **options: object) -> dict[str, str]:
    _, rows = build_engines(BuildOptions(graphs, out, RTX, **{"compute_capability": "any", **options}), "again")
    return {row.name: row.reason for row in rows}


# what is built, and what is not


def test_every_stage_becomes_an_engine_and_the_manifest_describes_it(built: tuple[Path, Path]) -> None:
    _, out = built
    manifest = read_manifest(out, "")
    assert (manifest.kind, manifest.precision, manifest.command) == ("tensorrt", "fp16", "make it so")
    assert set(manifest.files) == {*(f"{name}.engine" for name in STAGES), "tables.safetensors"}
    assert manifest.details["builder_version"] == trt.__version__
    assert manifest.details["profiles"] == [{"tokens": [IMAGE_TOKENS + 1, 12, MAX_TOKENS]}]
    for name, entry in manifest.stages.items():
        facts = entry["build"]
        assert facts["bytes"] == (out / entry["file"]).stat().st_size == manifest.files[entry["file"]]["bytes"]
        assert facts["layers"] >= 5, f"{name}: two products, their weights and what lies between"
        assert 1e7 < facts["peak_memory_bytes"] < 4e9
        assert facts["check"]["parsed"] is True
    assert manifest.stages["language"]["build"]["inputs"]["embeddings"]["shape"] == [1, -1, WIDTH]
    assert not list(out.glob(".*.partial-*"))


@without_gpu
def test_without_a_driver_the_check_says_how_far_it_went(built: tuple[Path, Path]) -> None:
    check = read_manifest(built[1], "").stages["vision"]["build"]["check"]
    assert check == {"parsed": True, "deserialised": None, "reason": "no CUDA driver here"}


def test_nothing_is_built_twice(built: tuple[Path, Path]) -> None:
    assert reasons(*built) == dict.fromkeys(STAGES, UP_TO_DATE)


def test_only_the_stage_whose_graph_changed_is_built_again(copy: tuple[Path, Path], tmp_path: Path) -> None:
    graphs, out = copy
    other = write_export(tmp_path / "other", seed=7)
    for end in ("", ".data"):
        (graphs / f"language.onnx{end}").write_bytes((other / f"language.onnx{end}").read_bytes())
    raw = json.loads((graphs / "manifest.json").read_text())
    raw["files"] |= {name: entry for name, entry in json.loads((other / "manifest.json").read_text())["files"].items() if "language" in name}
    (graphs / "manifest.json").write_text(json.dumps(raw))
    assert reasons(graphs, out) == {"vision": UP_TO_DATE, "language": "other graph", "denoise_step": UP_TO_DATE}


def test_a_truncated_engine_is_built_again(copy: tuple[Path, Path]) -> None:
    engine = copy[1] / "vision.engine"
    engine.write_bytes(engine.read_bytes()[:-100])
    assert reasons(*copy) == {"vision": "damaged", "language": UP_TO_DATE, "denoise_step": UP_TO_DATE}


def test_an_engine_of_other_lengths_or_gpus_is_stale(copy: tuple[Path, Path]) -> None:
    seen = reasons(*copy, max_text_tokens=20, compute_capability="8.6")
    assert seen["language"] == "other GPUs, prompt lengths"
    assert read_manifest(copy[1], "").shapes["max_tokens"] == IMAGE_TOKENS + 20


def test_a_damaged_record_only_costs_time(copy: tuple[Path, Path]) -> None:
    (copy[1] / ".built.json").write_text("{")
    assert set(reasons(*copy).values()) == {"not built yet"}


def test_the_table_has_a_line_per_stage(built: tuple[Path, Path]) -> None:
    _, rows = build_engines(BuildOptions(*built, RTX, "any"), "again")
    table = as_table(rows).splitlines()
    assert [line.split()[0] for line in table] == ["stage", *STAGES]
    assert all(line.endswith(UP_TO_DATE) for line in table[1:])


# graphs that are refused


def test_the_directory_of_another_export_is_refused(copy: tuple[Path, Path]) -> None:
    """Its manifest would be replaced, and the graphs lost with it."""
    graphs, _ = copy
    before = (graphs / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="kind 'onnx'.*another --out"):
        build_engines(BuildOptions(graphs, graphs, RTX, "any"), "")
    assert (graphs / "manifest.json").read_bytes() == before


def test_altered_graphs_are_refused(copy: tuple[Path, Path]) -> None:
    weights = copy[0] / "vision.onnx.data"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    with pytest.raises(EngineError, match=r"vision\.onnx\.data.*altered.*gr00t-fast export onnx"):
        build_engines(BuildOptions(*copy, RTX, "any"), "")


def test_graphs_quantised_for_another_runtime_are_refused(tmp_path: Path) -> None:
    graphs = write_export(tmp_path / "graphs", quantised="int8", runtime="onnxruntime")
    with pytest.raises(EngineError, match=r"quantised for onnxruntime.*--target=tensorrt"):
        build_engines(BuildOptions(graphs, tmp_path / "out", RTX, "any"), "")


def test_a_directory_without_graphs_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"gr00t-fast export onnx"):
        build_engines(BuildOptions(tmp_path, tmp_path / "out", RTX, "any"), "")


def test_a_parser_error_names_the_node(tmp_path: Path) -> None:
    write_graph(tmp_path / "odd.onnx", *STAGES["vision"], "fp16", 0, operator="NoSuchOperator")
    with pytest.raises(EngineError, match=r"odd\.onnx: node 'between' \(NoSuchOperator\)"):
        run_stage(Request(str(tmp_path / "odd.onnx"), str(tmp_path / "odd.engine"), RTX, (), ()), silent)
    assert not (tmp_path / "odd.engine").exists()


def test_an_unknown_varying_size_is_refused(tmp_path: Path) -> None:
    write_graph(tmp_path / "odd.onnx", {"x": [1, "people", WIDTH]}, {"y": [1, "people", WIDTH]}, "fp16", 0)
    with pytest.raises(EngineError, match=r"input 'x' varies along axis 1 \('people'\)"):
        run_stage(Request(str(tmp_path / "odd.onnx"), str(tmp_path / "odd.engine"), RTX, (), ({"tokens": (1, 2, 3)},)), silent)


def test_the_builders_own_words_come_through(tmp_path: Path) -> None:
    write_graph(tmp_path / "wide.onnx", *STAGES["vision"], "fp32", 0)
    with pytest.raises(EngineError, match=r"cannot build wide\.onnx: .*Turing.*FP32"):
        run_stage(Request(str(tmp_path / "wide.onnx"), str(tmp_path / "wide.engine"), RTX, ("7.5",), ()), silent)


@pytest.mark.parametrize("damage", [lambda plan: plan[:-1], lambda plan: b"none" + plan[4:], lambda plan: plan[:64] + bytes(len(plan) - 64)])
def test_a_damaged_plan_is_not_read_back(built: tuple[Path, Path], damage: Callable[[bytes], bytes]) -> None:
    """Cut short, without its tag, without its table of sections: the library notices each of them without a GPU."""
    plan = (built[1] / "vision.engine").read_bytes()
    assert check_plan(trt, plan)["parsed"]
    with pytest.raises(EngineError, match="does not recognise the engine"):
        check_plan(trt, damage(plan))


# capabilities and number formats


@pytest.mark.parametrize(
    ("text", "expected"), [("8.6", ("8.6",)), ("sm_86", ("8.6",)), ("8.9, 12.0,8.9", ("8.9", "12.0")), ("any", ()), ("120", ("12.0",))]
)
def test_targets_are_read(text: str, expected: tuple[str, ...]) -> None:
    assert parse_capabilities(text, RTX) == expected


@pytest.mark.parametrize(("text", "match"), [("ada", "'ada' is none"), ("", "is empty"), ("8", "'8' is none")])
def test_other_words_are_no_targets(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_capabilities(text, RTX)


def test_tensorrt_builds_for_one_gpu_only() -> None:
    with pytest.raises(ConfigError, match="builds for the GPU it runs on"):
        parse_capabilities("8.6,8.9", library.STANDARD)


@pytest.mark.parametrize("capability", ["9.0", "8.7"])
def test_gpus_that_rtx_does_not_know_are_sent_to_tensorrt(capability: str) -> None:
    with pytest.raises(ConfigError, match=f"got {capability} .*--builder=tensorrt "):
        check_feasible(RTX, capability)


@pytest.mark.parametrize(
    ("precision", "capability", "match"),
    [
        ("bf16", "7.5", r"bf16 needs 8\.0 or newer \(Ampere\).*--precision=fp16"),
        ("fp8", "8.6", r"fp8 needs 8\.9 or newer.*INT8"),
        ("fp8", "any", r"any GPU.*--compute_capability=8\.9,12\.0"),
        ("fp32", "7.5", "no fp32 matrix products for Turing"),
    ],
)
def test_a_format_the_gpu_lacks_is_refused_before_building(precision: str, capability: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_feasible(RTX, capability, precision)


@pytest.mark.parametrize(("precision", "capability"), [("fp16", "7.5"), ("bf16", "8.0"), ("int8", "7.5"), ("fp8", "8.9,12.0"), ("fp32", "any")])
def test_a_format_the_gpu_has_is_not_refused(precision: str, capability: str) -> None:
    check_feasible(RTX, capability, precision)


@pytest.mark.parametrize(("precision", "quantised"), [("fp16", None), ("bf16", None), ("fp32", None), ("fp16", "int8"), ("bf16", "fp8")])
def test_number_formats_are_read_from_the_graph(tmp_path: Path, precision: str, quantised: str | None) -> None:
    write_graph(tmp_path / "g.onnx", *STAGES["language"], precision, 0, quantised)
    assert precisions_of(tmp_path / "g.onnx") == {precision, *([quantised] if quantised else [])}


@pytest.mark.parametrize(("quantised", "capabilities"), [("int8", ("8.6",)), ("fp8", ("8.9", "12.0"))])
def test_eight_bit_graphs_build(tmp_path: Path, quantised: str, capabilities: tuple[str, ...]) -> None:
    write_graph(tmp_path / "g.onnx", *STAGES["language"], "bf16", 0, quantised)
    facts = run_stage(Request(str(tmp_path / "g.onnx"), str(tmp_path / "g.engine"), RTX, capabilities, ({"tokens": (5, 12, 40)},)), silent)
    assert facts["bytes"] == (tmp_path / "g.engine").stat().st_size


def test_the_refusal_and_the_builder_agree(tmp_path: Path) -> None:
    """What `check_precisions` refuses, the builder refuses too: no GPU is refused for nothing."""
    write_graph(tmp_path / "g.onnx", *STAGES["vision"], "bf16", 0, "fp8")
    with pytest.raises(ConfigError):
        check_precisions({"fp8"}, ("8.6",), RTX, "vision")
    with pytest.raises(EngineError, match="fp8"):
        run_stage(Request(str(tmp_path / "g.onnx"), str(tmp_path / "g.engine"), RTX, ("8.6",), ()), silent)


# prompt lengths

SHAPES = {"image_tokens": 256, "max_tokens": 512, "prompt_buckets": [290, 320, 512]}


def test_tensorrt_gets_a_range_per_bucket_and_they_meet() -> None:
    profiles = [profile["tokens"] for profile in prompt_profiles(SHAPES, None, one=False)]
    assert profiles == [(257, 290, 290), (291, 320, 320), (321, 512, 512)]


def test_rtx_gets_one_range_tuned_for_the_usual_prompt() -> None:
    assert prompt_profiles(SHAPES, 100, one=True) == ({"tokens": (257, 290, 356)},)
    assert prompt_profiles(SHAPES, 20, one=True) == ({"tokens": (257, 276, 276)},)


@pytest.mark.parametrize("most", [0, -1, 257])
def test_a_length_that_was_not_exported_is_refused(most: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to 256"):
        prompt_profiles(SHAPES, most, one=True)


# interruption


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_stops_at_once_and_keeps_what_is_done(tmp_path: Path) -> None:
    graphs = write_export(tmp_path / "graphs")
    program = (
        "import sys\nfrom pathlib import Path\nfrom gr00t_fast.export.tensorrt import *\n"
        "show = BuildEvents(stage=lambda name, *_: print(name, flush=True))\n"
        f"build_engines(BuildOptions(Path({str(graphs)!r}), Path({str(tmp_path / 'out')!r}), 'tensorrt_rtx', 'any'), '', show)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert child.stdout.readline() == "vision\n"
        assert child.stdout.readline() == "language\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) != 0
    finally:
        child.kill()
        child.stdout.close()
    out = tmp_path / "out"
    assert (out / "vision.engine").is_file()
    assert not list(out.glob(".*.partial-*"))
    assert not (out / "manifest.json").exists()
    assert reasons(graphs, out)["vision"] == UP_TO_DATE


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_builder_that_is_killed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr("gr00t_fast.export.tensorrt_stage.BUILDER", dying)
    with pytest.raises(EngineError, match=r"building g\.onnx ended with code -9.*ran out of memory"):
        run_stage(Request("g.onnx", str(tmp_path / "g.engine"), RTX, (), ()), silent)


def test_progress_is_told(tmp_path: Path) -> None:
    write_graph(tmp_path / "g.onnx", *STAGES["language"], "fp16", 0)
    seen: list[str] = []
    request = Request(str(tmp_path / "g.onnx"), str(tmp_path / "g.engine"), RTX, (), ({"tokens": (5, 12, 40)},))
    run_stage(request, lambda name, done: seen.append(name or ""))
    assert [name for name in seen if name in ("parsing", "writing", "checking")] == ["parsing", "writing", "checking"]


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Its standard input closed, it ends without finishing, and leaves no file."""
    write_graph(tmp_path / "g.onnx", *STAGES["language"], "fp16", 0)
    request = Request(str(tmp_path / "g.onnx"), str(tmp_path / "g.engine"), RTX, (), ({"tokens": (5, 12, 40)},))
    command = [sys.executable, "-m", "gr00t_fast.export.tensorrt_stage"]
    start_s = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, input=request.to_json() + "\n", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, f"it should have been cut short, took {time.monotonic() - start_s:.1f} s: {done.stdout}"
    assert not (tmp_path / "g.engine").exists()
