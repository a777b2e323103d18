"""8-bit exports: the arithmetic, what is chosen, and the program."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exports import make_export, target_for
from onnx import TensorProto, helper, numpy_helper
from random_networks import TINY
from torch import Tensor

from gr00t_fast.cli import export
from gr00t_fast.console import Progress
from gr00t_fast.dataset import textured_picture
from gr00t_fast.engine import open_engine
from gr00t_fast.engine.exported import ExportTables
from gr00t_fast.engine.manifest import read_manifest
from gr00t_fast.engine.quantized import InputScale
from gr00t_fast.errors import ConfigError
from gr00t_fast.export.calibrate import NEGLIGIBLE, Group, InputStatistics, choose_scale, keep_sensitive, record
from gr00t_fast.export.graphs import MatMulLinear
from gr00t_fast.export.networks import GraphNetwork, RoundedMatMul
from gr00t_fast.export.qdq import LARGEST, Graph, quantised_weight, rounded, write_quantised
from gr00t_fast.export.samples import Case, collect_cases
from gr00t_fast.export.verify import ActionError
from gr00t_fast.measurement import StageTimer

K, N, ROWS = 24, 16, 10


@dataclass(frozen=True)
class Made:
    checkpoint: Path
    onnx: Path


@pytest.fixture(scope="module")
def made(tiny_export: tuple[Path, Path]) -> Made:
    return Made(*tiny_export)


def _run(made: Made, out: Path, *flags: str) -> int:
    common = [f"--model_path={made.checkpoint}", f"--onnx={made.onnx}", f"--out={out}", "--denoising_steps=2"]
    return export.quantise([*common, *flags])


FEW = ("--observations=random:0", "--frames=4", "--allow_few")


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


# --- arithmetic


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_weights_are_rounded_per_output_channel(scheme: str) -> None:
    weight = seeded(K, N) * torch.logspace(-3, 3, N)
    values, scales = quantised_weight(weight, scheme)
    assert scales.shape == (N,)
    assert values.abs().max() == LARGEST[scheme]
    step = scales if scheme == "int8" else weight.abs() * 2**-3 + scales * 2**-8  # three mantissa bits; and subnormals
    assert ((values * scales - weight).abs() <= step * 0.5001 + 1e-12).all()


def test_fp8_is_e4m3() -> None:
    assert rounded(torch.tensor([1.0, 1.06, 1.07, 447.0, 1e6, -1e6]), "fp8").tolist() == [1.0, 1.0, 1.125, 448.0, 448.0, -448.0]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def seen(rows: Tensor) -> InputStatistics:
    return InputStatistics(("a",), rows.abs().amax(dim=0), len(rows), [rows])


def test_balancing_is_taken_where_it_helps_and_only_there() -> None:
    rows, weight = seeded(200, K), seeded(K, N, seed=1)
    uneven = rows.clone()
    uneven[:, 3] *= 100  # a channel of outliers, as trained transformers have
    scale, report = choose_scale(seen(uneven), [weight], "int8")
    assert report.balance is not None
    assert scale.smoothing is not None
    assert report.error < 0.25 * report.error_plain
    _, plain = choose_scale(seen(uneven), [weight], "int8", balance=False)
    assert plain.balance is None
    assert plain.error > 4 * report.error
    _, unneeded = choose_scale(seen(rows), [weight], "int8")
    assert unneeded.error <= unneeded.error_plain < 0.02


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
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], weights), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, str(path))
    return arrays["a.weight"].astype(np.float32), arrays["b.weight"].astype(np.float32)


def _rows() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(ROWS, K)).astype(np.float32)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_quantised_graph_computes_what_its_torch_twin_does(tmp_path: Path, scheme: str, smooth: bool) -> None:
    a, b = _graph(tmp_path / "plain.onnx")
    smoothing = torch.linspace(0.25, 4, K) if smooth else None
    given = InputScale(2.0 if smooth else 3.0, smoothing)
    write_quantised(tmp_path / "plain.onnx", tmp_path / "out" / "q.onnx", {"a": given, "b": given}, scheme)
    onnx.checker.check_model(str(tmp_path / "out" / "q.onnx"), full_check=True)
    (h,) = run_graph(tmp_path / "plain.onnx", {"x": _rows()}, "h")
    expected = 0.0
    for weight in (a, b):
        layer = MatMulLinear(torch.from_numpy(weight), None)
        expected = expected + RoundedMatMul(layer, given, scheme)(torch.from_numpy(h)).numpy()
    (got,) = run_graph(tmp_path / "out" / "q.onnx", {"x": _rows()}, "y")
    # rounding may fall to the other side for a value on the boundary: one step of one input
    assert np.median(np.abs(got - expected)) < 1e-5
    assert np.abs(got - expected).max() < given.largest / LARGEST[scheme] * np.abs(np.concatenate((a, b))).max() * 4


def test_smoothing_goes_into_the_norm_unless_others_read_it(tmp_path: Path) -> None:
    _graph(tmp_path / "plain.onnx")
    scale = InputScale(2.0, torch.linspace(0.25, 4, K))
    for labels, products in ((("a", "b"), 0), (("a",), 1)):
        write_quantised(tmp_path / "plain.onnx", tmp_path / "q.onnx", dict.fromkeys(labels, scale), "int8")
        kinds = [node.op_type for node in Graph(tmp_path / "q.onnx").proto.graph.node]
        assert kinds.count("Mul") == products
        assert kinds.count("QuantizeLinear") == 1
        assert kinds.count("DequantizeLinear") == 1 + len(labels)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_scales_have_the_graphs_own_type(tmp_path: Path, kind: int) -> None:
    _graph(tmp_path / "plain.onnx", kind)
    write_quantised(tmp_path / "plain.onnx", tmp_path / "q.onnx", {"a": InputScale(3.0), "b": InputScale(3.0)}, "int8")
    onnx.checker.check_model(str(tmp_path / "q.onnx"), full_check=True)  # infers types: a scale of another type is refused
    graph = Graph(tmp_path / "q.onnx")
    scales = [tensor for name, tensor in graph.initializers.items() if name.endswith("_scale")]
    assert len(scales) == 3
    assert all(tensor.data_type == kind for tensor in scales)
    assert graph.initializers["a.weight"].data_type == TensorProto.INT8


def test_a_plan_for_another_graph_is_refused(tmp_path: Path) -> None:
    _graph(tmp_path / "plain.onnx")
    with pytest.raises(ConfigError, match="no linear layer is called c"):
        write_quantised(tmp_path / "plain.onnx", tmp_path / "q.onnx", {"c": InputScale(1.0)}, "int8")


@pytest.fixture(scope="module")
def network(made: Made) -> GraphNetwork:
    tables = ExportTables(made.onnx, "")
    return GraphNetwork(target_for(made.checkpoint), read_manifest(made.onnx, "").shapes, tables, denoising_steps=2, scheme="int8")


@pytest.fixture(scope="module")
def cases(made: Made) -> list[Case]:
    return collect_cases(target_for(made.checkpoint), "random:0", frames=3, seed=0, noise_seed=0, progress=Progress(), allow_few=True)[0]


def test_the_files_have_the_layers_that_are_calibrated(made: Made, network: GraphNetwork, cases: list[Case]) -> None:
    labels = [f"{stage}.{layer.label}" for stage in network.parts for layer in Graph(made.onnx / f"{stage}.onnx").linear_layers()]
    assert len(labels) == 2 + 4 * TINY.vision[2] + 5 * TINY.language[2] + 4 * TINY.vl[0] + 1 + 6 + 4 * TINY.dit[0]
    assert sorted(labels) == sorted(network.layers())
    statistics = record(network, cases, 0, Progress())
    assert sorted(labels) == sorted(name for entry in statistics for name in entry.readers)
    assert ("language.blocks.0.mlp.gate", "language.blocks.0.mlp.up") in [entry.readers for entry in statistics]


def test_the_calibrated_network_computes_what_the_files_do(made: Made, network: GraphNetwork, cases: list[Case]) -> None:
    outputs: dict[str, Tensor] = {}
    with torch.inference_mode():
        for part in network.parts:
            outputs |= network.run(network.module, part, cases[0], outputs)
    (tokens,) = run_graph(made.onnx / "vision.onnx", {"pixel_values": cases[0].inputs.pixel_values.numpy()}, "tokens")
    np.testing.assert_allclose(outputs["tokens"], tokens, atol=1e-4)
    engine = open_engine("onnxruntime", made.onnx, target_for(made.checkpoint), "cpu", "fp32")
    actions = engine.run(cases[0].inputs, cases[0].noise, 2, StageTimer(engine.synchronise))
    torch.testing.assert_close(outputs["actions"], actions, atol=1e-4, rtol=1e-4)


def test_rows_are_kept_from_all_observations_and_the_largest_among_them() -> None:
    network = CountingNetwork()
    (kept,) = record(network, [Case(index, None, None) for index in range(500)], 0, Progress())
    assert kept.readers == ("layer",)
    assert kept.largest.tolist() == [499, 499, 1499, 499, 499]
    assert kept.rows_per_case == 7
    rows = torch.cat(kept.rows)
    assert len(rows) <= 250
    assert rows[:, 0].min() < 50
    assert rows[:, 0].max() > 450
    assert (rows[:, 2] >= 1000).sum() >= 40


class CountingNetwork:
    """One layer, which sees rows that tell the number of the observation."""

    parts, weights_only = ("only",), ()

    def __init__(self) -> None:
        self.module = torch.nn.ModuleDict({"layer": torch.nn.Identity()})

    def layers(self) -> dict[str, torch.nn.Module]:
        return dict(self.module.items())

    def run(self, module: torch.nn.ModuleDict, part: str, case: Case, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = torch.full((1, 7, 5), float(case.inputs))
        values[0, 3, 2] = 1000.0 + case.inputs
        return {"actions": module["layer"](values)}


# --- which layers


def _chosen(alone: dict[str, float], work: dict[str, float], limit: float) -> tuple[dict[str, str | None], ActionError | None]:
    """Errors add up in squares; each group's own is given."""

    def error_of(groups: list[Group]) -> ActionError:
        total = float(np.sqrt(sum(alone[group.kind] ** 2 for group in groups)))
        return ActionError(total, total, total, total, total, ())

    results, total = keep_sensitive([Group("vision", kind, (kind,), share) for kind, share in work.items()], error_of, limit)
    return {result.group.kind: result.kept for result in results}, total


def test_the_worst_for_its_work_is_kept_first_and_no_more_than_needed() -> None:
    work = {"big": 0.6, "costly": 0.3, "sensitive": 0.0995, "tiny": 0.0005}
    kept, total = _chosen({"big": 0.5, "costly": 0.5, "sensitive": 2.0, "tiny": 9.0}, work, limit=1.0)
    assert kept["big"] is kept["costly"] is None
    assert "p99 was 2.12" in kept["sensitive"]
    assert f"{NEGLIGIBLE:.1%}" in kept["tiny"]
    assert total.p99 == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize("order", [("good", "broken"), ("broken", "good")])
def test_nan_is_above_every_limit_and_goes_first(order: tuple[str, str]) -> None:
    kept, total = _chosen({"good": 0.1, "broken": float("nan")}, dict.fromkeys(order, 0.5), limit=1e9)
    assert total.p99 == pytest.approx(0.1)
    assert kept["broken"]
    assert kept["good"] is None


# --- the program


def test_one_command_from_export_to_openvino(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(made, tmp_path / "out", "--target=openvino", *FEW, "--trial_frames=2", "--limit=50", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["work_in_8_bits"] > 0.95
    assert result["calibration"]["synthetic"]
    manifest = read_manifest(tmp_path / "out", "")
    assert manifest.kind == "openvino"
    assert manifest.quantisation["format"] == "int8"
    assert manifest.program == "quantise.py"
    assert manifest.quantisation["calibration"]["source"] == "random:0"
    assert len(manifest.quantisation["calibration"]["warnings"]) == 2
    assert {"vision.xml", "vision.bin", "tables.safetensors", "quantisation.md", "quantisation.json"} <= manifest.files.keys()
    report = (tmp_path / "out" / "quantisation.md").read_text()
    assert "| vision blocks.*.mlp.down (1) |" in report
    assert "Warning: 4 frames" in report
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing temporary is left


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_tensorrt_files_agree_with_the_plain_graphs(made: Made, tmp_path: Path, scheme: str) -> None:
    assert _run(made, tmp_path / "out", "--target=tensorrt", f"--format={scheme}", *FEW, "--trial_frames=0") == 0
    picture = textured_picture(np.random.default_rng(0), TINY.image, TINY.image)  # noise has ranges that calibration never saw
    pixels = (picture.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None, None]
    got, truth = (run_graph(path / "vision.onnx", {"pixel_values": pixels}, "tokens")[0] for path in (tmp_path / "out", made.onnx))
    error = np.linalg.norm(got - truth) / np.linalg.norm(truth)
    assert 1e-5 < error < (0.05 if scheme == "int8" else 0.15)  # rounded, and not by more than the format's step
    assert (tmp_path / "out" / "vision.onnx.data").stat().st_size < 0.6 * (made.onnx / "vision.onnx.data").stat().st_size


def test_a_16_bit_export_is_calibrated_in_fp32(made: Made, tmp_path: Path) -> None:
    narrow = Made(made.checkpoint, make_export(made.checkpoint, tmp_path / "fp16", precision="fp16"))
    for name, source in (("narrow", narrow), ("wide", made)):
        assert _run(source, tmp_path / name, "--target=tensorrt", *FEW, "--trial_frames=0") == 0
    reports = [json.loads((tmp_path / name / "quantisation.json").read_text())["layers"] for name in ("narrow", "wide")]
    assert reports[0].keys() == reports[1].keys()
    vision = [name for name in reports[0] if name.startswith("vision.")]
    assert [reports[0][name] for name in vision] == [reports[1][name] for name in vision]  # later parts read embeddings of the export's own type


def test_a_strict_limit_keeps_every_layer(made: Made, tmp_path: Path) -> None:
    assert _run(made, tmp_path / "out", "--target=tensorrt", *FEW, "--trial_frames=1", "--limit=1e-9") == 0
    report = json.loads((tmp_path / "out" / "quantisation.json").read_text())
    assert report["work_in_8_bits"] == 0
    assert all(group["kept_in_16_bits"] for group in report["groups"])


def test_onnx_runtime_needs_no_calibration(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    assert _run(made, tmp_path / "out", "--target=onnxruntime") == 0
    assert "WARNING:" not in capfd.readouterr().err  # the form that Python's root logger gives to what follows, too
    assert logging.root.handlers == []
    manifest = read_manifest(tmp_path / "out", "")
    assert manifest.kind == "onnx"
    assert manifest.quantisation["runtime"] == "onnxruntime"
    kinds = {node.op_type for node in Graph(tmp_path / "out" / "vision.onnx").proto.graph.node}
    assert "MatMulInteger" in kinds or "DynamicQuantizeMatMul" in kinds


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--target=openvino",), 2, "needs --observations"),
        (("--target=openvino", "--format=fp8", *FEW), 2, "no CPU computes in FP8"),
        (("--target=openvino", "--observations=random:0", "--frames=4"), 1, "4 frames, expected at least 128"),
        (("--target=openvino", "--observations=nowhere"), 1, "neither a LeRobotDataset"),
        (("--target=openvino", *FEW, "--denoising_steps=7"), 1, "tables for 1, 2, 3, 4, 8 steps"),
        (("--target=openvino", *FEW, "--camera_map=front"), 2, "--camera_map: expected names"),
        (("--target=tensorrt", *FEW, "--frames=0"), 2, "must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], code: int, message: str
) -> None:
    assert _run(made, tmp_path / "out", *flags) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_quantising_twice_is_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(made, tmp_path / "once", "--target=onnxruntime") == 0
    assert _run(Made(made.checkpoint, tmp_path / "once"), tmp_path / "twice", "--target=onnxruntime") == 1
    assert "is in int8 already" in capsys.readouterr().err
