"""8-bit exports: the arithmetic, what is chosen, and the program."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exports import FEW, Made, cases_of, target_for
from onnx import TensorProto, helper, numpy_helper
from random_networks import TINY
from torch import Tensor

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.cli import export
from gr00t_fast.cli.main import main
from gr00t_fast.engine import open_engine
from gr00t_fast.engine.exported import ExportTables
from gr00t_fast.engine.manifest import read_manifest
from gr00t_fast.export.calibrate import NEGLIGIBLE, GraphNetwork, Group, RoundedMatMul, keep_sensitive, record
from gr00t_fast.export.graphs import MatMulLinear
from gr00t_fast.export.qdq import LARGEST, Graph, InputScale, write_quantised
from gr00t_fast.export.verify import ActionError, digest_of
from gr00t_fast.inputs.dataset import textured_picture

K, N, ROWS = 24, 16, 10


def run(made: Made, out: Path, *flags: str) -> int:
    return export.quantise([f"--model_path={made.checkpoint}", f"--onnx={made.onnx}", f"--out={out}", "--denoising_steps=2", *flags])


def run_graph(path: Path, feeds: dict[str, np.ndarray], output: str) -> list[np.ndarray]:
    """An output or inner tensor of a graph on ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime")
    graph = Graph(path)
    if output not in {value.name for value in graph.proto.graph.output}:
        graph.proto.graph.output.append(onnx.ValueInfoProto(name=output))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # above it FP8 Q/DQ is fused into an operator FP8 lacks
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return ort.InferenceSession(graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run([output], feeds)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


# --- arithmetic


# --- graphs


def _graph(path: Path, kind: int = TensorProto.FLOAT) -> tuple[np.ndarray, np.ndarray]:
    """x -> LayerNormalization -> two products -> sum; returns the weights (fp32)."""
    generator, dtype = np.random.default_rng(2), helper.tensor_dtype_to_np_dtype(kind)
    arrays = {"gain": generator.uniform(0.5, 2, K), "bias": generator.normal(size=K), "a.weight": generator.normal(size=(K, N))}
    arrays["b.weight"] = generator.normal(size=(K, N))
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain", "bias"], ["h"], name="norm"),
        helper.make_node("MatMul", ["h", "a.weight"], ["ya"], name="a"),
        helper.make_node("MatMul", ["h", "b.weight"], ["yb"], name="b"),
        helper.make_node("Add", ["ya", "yb"], ["y"], name="sum"),
    ]
    values = [helper.make_tensor_value_info(name, kind, shape) for name, shape in (("x", (ROWS, K)), ("y", (ROWS, N)))]
    weights = [numpy_helper.from_array(array.astype(np.float32).astype(dtype), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return arrays["a.weight"].astype(np.float32), arrays["b.weight"].astype(np.float32)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_quantised_graph_computes_what_its_torch_twin_does(tmp_path: Path, scheme: str, smooth: bool) -> None:
    weights, rows = _graph(tmp_path / "plain.onnx"), seeded(ROWS, K, seed=3).numpy()
    given = InputScale(2.0 if smooth else 3.0, torch.linspace(0.25, 4, K) if smooth else None)
    write_quantised(tmp_path / "plain.onnx", tmp_path / "out" / "q.onnx", {"a": given, "b": given}, scheme)
    onnx.checker.check_model(str(tmp_path / "out" / "q.onnx"), full_check=True)
    (h,) = run_graph(tmp_path / "plain.onnx", {"x": rows}, "h")
    twins = [RoundedMatMul(MatMulLinear(torch.from_numpy(weight), None), given, scheme) for weight in weights]
    expected = sum(twin(torch.from_numpy(h)).numpy() for twin in twins)
    (got,) = run_graph(tmp_path / "out" / "q.onnx", {"x": rows}, "y")
    # rounding may fall to the other side for a value on the boundary: one step of one input
    assert np.median(np.abs(got - expected)) < 1e-5
    assert np.abs(got - expected).max() < given.largest / LARGEST[scheme] * np.abs(np.concatenate(weights)).max() * 4


def test_smoothing_goes_into_the_norm_unless_others_read_it(tmp_path: Path) -> None:
    _graph(tmp_path / "plain.onnx")
    scale = InputScale(2.0, torch.linspace(0.25, 4, K))
    for labels, products in ((("a", "b"), 0), (("a",), 1)):
        write_quantised(tmp_path / "plain.onnx", tmp_path / "q.onnx", dict.fromkeys(labels, scale), "int8")
        kinds = [node.op_type for node in Graph(tmp_path / "q.onnx").proto.graph.node]
        assert [kinds.count(kind) for kind in ("Mul", "QuantizeLinear", "DequantizeLinear")] == [products, 1, 1 + len(labels)]
    _graph(tmp_path / "half.onnx", TensorProto.BFLOAT16)
    write_quantised(tmp_path / "half.onnx", tmp_path / "q.onnx", dict.fromkeys("ab", InputScale(3.0)), "int8")
    onnx.checker.check_model(str(tmp_path / "q.onnx"), full_check=True)  # infers types: scales have the graph's own, or are refused
    with pytest.raises(ConfigError, match="no linear layer is called c"):
        write_quantised(tmp_path / "plain.onnx", tmp_path / "q.onnx", {"c": scale}, "int8")


@pytest.mark.slow
def test_the_calibrated_network_has_the_layers_of_the_files_and_computes_what_they_do(tiny_export: Made) -> None:
    target = target_for(tiny_export.checkpoint)
    cases = cases_of(tiny_export.checkpoint)
    network = GraphNetwork(target, read_manifest(tiny_export.onnx, "").shapes, ExportTables(tiny_export.onnx, ""), 2, "int8")
    labels = [f"{stage}.{layer.label}" for stage in network.parts for layer in Graph(tiny_export.onnx / f"{stage}.onnx").linear_layers()]
    assert len(labels) == 2 + 4 * TINY.vision[2] + 5 * TINY.language[2] + 4 * TINY.vl[0] + 1 + 6 + 4 * TINY.dit[0]
    readers = [entry.readers for entry in record(network, cases, 0)]
    assert sorted(labels) == sorted(network.layers) == sorted(name for names in readers for name in names)
    assert ("language.blocks.0.mlp.gate", "language.blocks.0.mlp.up") in readers
    outputs: dict[str, Tensor] = {}
    with torch.inference_mode():
        for part in network.parts:
            outputs |= network.run(network.module, part, cases[0], outputs)
    engine = open_engine("onnxruntime", tiny_export.onnx, target, "cpu", "fp32")
    actions = engine.run(cases[0].inputs, cases[0].noise, 2, StageTimer(engine.synchronise))
    torch.testing.assert_close(outputs["actions"], actions, atol=1e-4, rtol=1e-4)


# --- which layers


@pytest.mark.parametrize(
    ("alone", "work", "limit", "kept", "total"),
    [
        pytest.param(
            {"big": 0.5, "costly": 0.5, "sensitive": 2.0, "tiny": 9.0},
            {"big": 0.6, "costly": 0.3, "sensitive": 0.0995, "tiny": 0.0005},
            1.0,
            {"sensitive": "p99 was 2.12", "tiny": f"{NEGLIGIBLE:.1%}"},
            0.5**0.5,
            id="the worst for its work first, and no more than needed",
        ),
        pytest.param({"nan": np.nan, "good": 0.1}, {"nan": 0.5, "good": 0.5}, 1e9, {"nan": "nan"}, 0.1, id="NaN is above every limit"),
    ],
)
def test_what_is_kept_in_16_bits(alone: dict[str, float], work: dict[str, float], limit: float, kept: dict[str, str], total: float) -> None:
    """Errors add up in squares."""

    def error_of(groups: list[Group]) -> ActionError:
        error = float(np.sqrt(sum(alone[group.kind] ** 2 for group in groups)))
        return ActionError(error, error, error, error, error, ())

    groups = [Group("vision", kind, (kind,), share) for kind, share in work.items()]
    assert keep_sensitive(groups, error_of, limit).p99 == pytest.approx(total)
    assert {group.kind for group in groups if group.kept} == kept.keys()
    assert all(kept[group.kind] in group.kept for group in groups if group.kept)


# --- the program


@pytest.mark.slow
def test_one_command_from_export_to_openvino(tiny_export: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_export, tmp_path / "out", "--target=openvino", *FEW, "--trial_frames=2", "--limit=50", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["work_in_8_bits"] > 0.95
    assert result["calibration"]["synthetic"]
    manifest = read_manifest(tmp_path / "out", "")
    assert (manifest.kind, manifest.program, manifest.quantisation["format"]) == ("openvino", "quantise.py", "int8")
    assert manifest.quantisation["calibration"]["source"] == "random:0"
    same, other = cases_of(tiny_export.checkpoint, 4), cases_of(tiny_export.checkpoint, 4, "random:1")
    assert manifest.quantisation["calibration"]["digest"] == digest_of(same) != digest_of(other)
    again = export.quantise.parse(["--model_path=x", "--out=y", *manifest.flags])  # the message that names the command can be typed
    assert (again.target, again.frames, again.trial_frames, again.observations) == ("openvino", 4, 2, "random:0")
    assert len(manifest.quantisation["calibration"]["warnings"]) == 2
    assert {"vision.xml", "vision.bin", "tables.safetensors", "quantisation.md", "quantisation.json"} <= manifest.files.keys()
    report = (tmp_path / "out" / "quantisation.md").read_text()
    assert "| vision blocks.*.mlp.down (1) |" in report
    assert "Warning: 4 frames" in report
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing temporary is left


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_tensorrt_files_agree_with_the_plain_graphs(tiny_export: Made, tmp_path: Path, scheme: str) -> None:
    assert run(tiny_export, tmp_path / "out", "--target=tensorrt", f"--format={scheme}", *FEW, "--trial_frames=0") == 0
    picture = textured_picture(np.random.default_rng(0), TINY.image, TINY.image)  # noise has ranges that calibration never saw
    pixels = (picture.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None, None]
    got, truth = (run_graph(path / "vision.onnx", {"pixel_values": pixels}, "tokens")[0] for path in (tmp_path / "out", tiny_export.onnx))
    error = np.linalg.norm(got - truth) / np.linalg.norm(truth)
    assert 1e-5 < error < (0.05 if scheme == "int8" else 0.15)  # rounded, and not by more than the format's step
    assert (tmp_path / "out" / "vision.onnx.data").stat().st_size < 0.6 * (tiny_export.onnx / "vision.onnx.data").stat().st_size


@pytest.mark.slow
def test_a_16_bit_export_is_calibrated_in_fp32(tiny_export: Made, tiny_engines: Path, tmp_path: Path) -> None:
    narrow = tiny_export._replace(onnx=tiny_engines.with_name("engines-onnx"))
    for name, source in (("narrow", narrow), ("wide", tiny_export)):
        assert run(source, tmp_path / name, "--target=tensorrt", *FEW, "--trial_frames=0") == 0
    first, second = (Graph(tmp_path / name / "vision.onnx") for name in ("narrow", "wide"))
    scales = [name for name in second.initializers if name.endswith("_scale")]
    assert scales
    for name in scales:
        np.testing.assert_allclose(first.array(name), second.array(name), rtol=2e-3)  # of 16 bits


@pytest.mark.slow
def test_onnx_runtime_needs_no_calibration(
    tiny_export: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    assert run(tiny_export, tmp_path / "out", "--target=onnxruntime") == 0
    assert "WARNING:" not in capfd.readouterr().err  # the form that Python's root logger gives to what follows, too
    assert logging.root.handlers == []
    manifest = read_manifest(tmp_path / "out", "")
    assert (manifest.kind, manifest.quantisation["runtime"]) == ("onnx", "onnxruntime")
    kinds = {node.op_type for node in Graph(tmp_path / "out" / "vision.onnx").proto.graph.node}
    assert kinds & {"MatMulInteger", "DynamicQuantizeMatMul"}
    assert run(tiny_export._replace(onnx=tmp_path / "out"), tmp_path / "twice", "--target=onnxruntime") == 2
    assert "is in int8 already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "needs --observations"),
        (("--format=fp8", *FEW), "no CPU computes in FP8"),
        ((*FEW, "--denoising_steps=7"), "tables for 1, 2, 3, 4, 8 steps"),
        (("--observations=random:0", "--frames=4"), "4 frames, expected at least 128"),
        (("--observations=nowhere",), "neither a LeRobotDataset"),
        ((*FEW, "--camera_map=front"), "--camera_map: expected names"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tiny_export: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    given = [f"--model_path={tiny_export.checkpoint}", f"--onnx={tiny_export.onnx}", f"--out={tmp_path / 'out'}", "--target=openvino"]
    assert main(["quantise", *given, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
