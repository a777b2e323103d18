"""8-bit exports: the arithmetic, what is chosen, and the program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from random_networks import TINY

from export import quantise as program
from gr00t_fast.engine.manifest import read_manifest
from gr00t_fast.errors import ConfigError
from gr00t_fast.export.action_error import ActionError
from gr00t_fast.export.layer_statistics import InputRecorder, InputStatistics, plan_inputs
from gr00t_fast.export.linear_layers import Graph
from gr00t_fast.export.observations import textured_picture
from gr00t_fast.export.qdq import LARGEST, LayerPlan, quantised_weight, rounded, write_quantised
from gr00t_fast.export.sensitivity import NEGLIGIBLE, Group, choose
from gr00t_fast.export.stage_chain import OrtStage
from gr00t_fast.export.upcast import as_fp32

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
    return program.main([*common, *flags])


FEW = ("--calibration=random:0", "--frames=4", "--allow_few")


# --- arithmetic


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_weights_are_rounded_per_output_channel(scheme: str) -> None:
    weight = np.random.default_rng(0).normal(size=(K, N)).astype(np.float32) * np.logspace(-3, 3, N, dtype=np.float32)
    values, scales = quantised_weight(weight, scheme)
    assert scales.shape == (N,)
    assert np.abs(values).max() == LARGEST[scheme]
    step = scales if scheme == "int8" else np.abs(weight) * 2**-3 + scales * 2**-8  # three mantissa bits; and subnormals
    assert (np.abs(values * scales - weight) <= step * 0.5001 + 1e-12).all()


def test_fp8_is_e4m3() -> None:
    assert rounded(np.float32([1.0, 1.06, 1.07, 447.0, 1e6, -1e6]), "fp8").tolist() == [1.0, 1.0, 1.125, 448.0, 448.0, -448.0]


def test_balancing_is_taken_where_it_helps_and_only_there() -> None:
    generator = np.random.default_rng(0)
    rows, weight = generator.normal(size=(200, K)).astype(np.float32), generator.normal(size=(K, N)).astype(np.float32)
    even = InputStatistics(np.abs(rows).max(axis=0), len(rows), [rows])
    rows = rows.copy()
    rows[:, 3] *= 100  # a channel of outliers, as trained transformers have
    uneven = InputStatistics(np.abs(rows).max(axis=0), len(rows), [rows])
    plans, report = plan_inputs(uneven, {"a": weight}, "int8")
    assert report.balance is not None
    assert plans["a"].smoothing is not None
    assert report.error < 0.25 * report.error_plain
    _, plain = plan_inputs(uneven, {"a": weight}, "int8", balance=False)
    assert plain.balance is None
    assert plain.error > 4 * report.error
    _, unneeded = plan_inputs(even, {"a": weight}, "int8")
    assert unneeded.error <= unneeded.error_plain < 0.02


def test_layers_that_read_one_tensor_share_its_rounding() -> None:
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(64, K)).astype(np.float32)
    weights = {name: generator.normal(size=(K, N)).astype(np.float32) for name in ("gate", "up")}
    plans, _ = plan_inputs(InputStatistics(np.abs(rows).max(axis=0), 64, [rows]), weights, "int8")
    assert plans["gate"] is plans["up"]


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
def test_a_quantised_graph_computes_what_the_formulas_say(tmp_path: Path, scheme: str, smooth: bool) -> None:
    a, b = _graph(tmp_path / "plain.onnx")
    smoothing = np.linspace(0.25, 4, K, dtype=np.float32) if smooth else None
    plan = LayerPlan(2.0 if smooth else 3.0, smoothing)
    write_quantised(tmp_path / "plain.onnx", tmp_path / "out" / "q.onnx", {"a": plan, "b": plan}, scheme)
    onnx.checker.check_model(str(tmp_path / "out" / "q.onnx"), full_check=True)
    h = OrtStage(Graph(tmp_path / "plain.onnx"), ["h"])({"x": _rows()})["h"]
    scale = np.float32(plan.range / LARGEST[scheme])
    inputs = rounded((h if smoothing is None else h / smoothing) / scale, scheme) * scale
    expected = 0.0
    for weight in (a, b):
        values, scales = quantised_weight(weight if smoothing is None else weight * smoothing[:, None], scheme)
        expected = expected + inputs @ (values * scales)
    got = OrtStage(Graph(tmp_path / "out" / "q.onnx"))({"x": _rows()})["y"]
    # rounding may fall to the other side for a value on the boundary: one step of one input
    assert np.median(np.abs(got - expected)) < 1e-5
    assert np.abs(got - expected).max() < scale * np.abs(np.concatenate((a, b))).max() * 4


def test_smoothing_goes_into_the_norm_unless_others_read_it(tmp_path: Path) -> None:
    _graph(tmp_path / "plain.onnx")
    plan = LayerPlan(2.0, np.linspace(0.25, 4, K, dtype=np.float32))
    for labels, products in ((("a", "b"), 0), (("a",), 1)):
        write_quantised(tmp_path / "plain.onnx", tmp_path / "q.onnx", dict.fromkeys(labels, plan), "int8")
        kinds = [node.op_type for node in Graph(tmp_path / "q.onnx").proto.graph.node]
        assert kinds.count("Mul") == products
        assert kinds.count("QuantizeLinear") == 1
        assert kinds.count("DequantizeLinear") == 1 + len(labels)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_scales_have_the_graphs_own_type(tmp_path: Path, kind: int) -> None:
    _graph(tmp_path / "plain.onnx", kind)
    write_quantised(tmp_path / "plain.onnx", tmp_path / "q.onnx", {"a": LayerPlan(3.0), "b": LayerPlan(3.0)}, "int8")
    onnx.checker.check_model(str(tmp_path / "q.onnx"), full_check=True)  # infers types: a scale of another type is refused
    graph = Graph(tmp_path / "q.onnx")
    scales = [tensor for name, tensor in graph.initializers.items() if name.endswith("_scale")]
    assert len(scales) == 3
    assert all(tensor.data_type == kind for tensor in scales)
    assert graph.initializers["a.weight"].data_type == TensorProto.INT8


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_16_bit_graph_is_measured_in_fp32(tmp_path: Path, kind: int) -> None:
    (tmp_path / "wide").mkdir()
    _graph(tmp_path / "narrow.onnx", kind)
    _graph(tmp_path / "plain.onnx")
    wide = as_fp32(tmp_path / "narrow.onnx", tmp_path / "wide")
    got, truth = (OrtStage(Graph(path))({"x": _rows()})["y"] for path in (wide, tmp_path / "plain.onnx"))
    assert got.dtype == np.float32
    assert np.linalg.norm(got - truth) < 0.02 * np.linalg.norm(truth)
    assert as_fp32(tmp_path / "plain.onnx", tmp_path / "wide") == tmp_path / "plain.onnx"


def test_a_plan_for_another_graph_is_refused(tmp_path: Path) -> None:
    _graph(tmp_path / "plain.onnx")
    with pytest.raises(ConfigError, match="no linear layer is called c"):
        write_quantised(tmp_path / "plain.onnx", tmp_path / "q.onnx", {"c": LayerPlan(1.0)}, "int8")


def test_every_linear_layer_of_the_network_is_found(made: Made) -> None:
    labels = {
        stage: [layer.label for layer in Graph(made.onnx / f"{stage}.onnx").linear_layers()] for stage in ("vision", "language", "denoise_step")
    }
    vision_layers, language_layers, dit_layers = TINY.vision[2], TINY.language[2], TINY.dit[0]
    assert len(labels["vision"]) == 2 + 4 * vision_layers
    assert len(labels["language"]) == 5 * language_layers + 4 * TINY.vl[0] + 1
    assert len(labels["denoise_step"]) == 6 + 4 * dit_layers
    assert all(len(set(names)) == len(names) for names in labels.values())


def test_rows_are_kept_from_all_runs_and_the_largest_among_them(made: Made) -> None:
    layers = Graph(made.onnx / "vision.onnx").linear_layers()[:1]
    recorder = InputRecorder(layers, runs=500, seed=0)
    for run in range(500):
        values = np.full((1, 7, 5), run, np.float32)
        values[0, 3, 2] = 1000 + run
        recorder.see({layers[0].input: values})
    kept = recorder.statistics[layers[0].input]
    assert kept.largest.tolist() == [499, 499, 1499, 499, 499]
    assert kept.rows_per_run == 7
    assert len(kept.sample) <= 250
    assert kept.sample[:, 0].min() < 50
    assert kept.sample[:, 0].max() > 450
    assert (kept.sample[:, 2] >= 1000).sum() >= 40


# --- which layers


class FakeTrials:
    """Errors add up in squares; each group's own is given."""

    def __init__(self, alone: dict[str, float]) -> None:
        self.alone = alone

    def error(self, groups) -> ActionError:
        total = float(np.sqrt(sum(self.alone[group.kind] ** 2 for group in groups)))
        return ActionError(total, total, total, total, total, ())


def _groups(work: dict[str, float]) -> list[Group]:
    return [Group("vision", kind, (kind,), share) for kind, share in work.items()]


def test_the_worst_for_its_work_is_kept_first_and_no_more_than_needed() -> None:
    groups = _groups({"big": 0.6, "costly": 0.3, "sensitive": 0.0995, "tiny": 0.0005})
    verdicts, total = choose(groups, FakeTrials({"big": 0.5, "costly": 0.5, "sensitive": 2.0, "tiny": 9.0}), limit=1.0)
    kept = {verdict.group.kind: verdict.kept for verdict in verdicts}
    assert kept["big"] is kept["costly"] is None
    assert "p99 was 2.12" in kept["sensitive"]
    assert f"{NEGLIGIBLE:.1%}" in kept["tiny"]
    assert total.p99 == pytest.approx(np.sqrt(0.5))


def test_nan_is_above_every_limit() -> None:
    verdicts, total = choose(_groups({"good": 0.5, "broken": 0.5}), FakeTrials({"good": 0.1, "broken": float("nan")}), limit=1e9)
    assert total is None or total.p99 == pytest.approx(0.1)
    assert next(v for v in verdicts if v.group.kind == "broken").kept


# --- the program


def test_one_command_from_export_to_openvino(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(made, tmp_path / "out", "--target=openvino", *FEW, "--trial_frames=2", "--limit=50") == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
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
    assert _run(made, tmp_path / "out", "--target=tensorrt", f"--scheme={scheme}", *FEW, "--trial_frames=0") == 0
    picture = textured_picture(np.random.default_rng(0), TINY.image, TINY.image)  # noise has ranges that calibration never saw
    pixels = (picture.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None, None]
    got, truth = (OrtStage(Graph(path / "vision.onnx"))({"pixel_values": pixels})["tokens"] for path in (tmp_path / "out", made.onnx))
    error = np.linalg.norm(got - truth) / np.linalg.norm(truth)
    assert 1e-5 < error < (0.05 if scheme == "int8" else 0.15)  # rounded, and not by more than the format's step
    assert (tmp_path / "out" / "vision.onnx.data").stat().st_size < 0.6 * (made.onnx / "vision.onnx.data").stat().st_size


def test_a_strict_limit_keeps_every_layer(made: Made, tmp_path: Path) -> None:
    assert _run(made, tmp_path / "out", "--target=tensorrt", *FEW, "--trial_frames=1", "--limit=1e-9") == 0
    report = json.loads((tmp_path / "out" / "quantisation.json").read_text())
    assert report["work_in_8_bits"] == 0
    assert all(group["kept_in_16_bits"] for group in report["groups"])


def test_onnx_runtime_needs_no_calibration(made: Made, tmp_path: Path) -> None:
    assert _run(made, tmp_path / "out", "--target=onnxruntime") == 0
    manifest = read_manifest(tmp_path / "out", "")
    assert manifest.kind == "onnx"
    assert manifest.quantisation["runtime"] == "onnxruntime"
    kinds = {node.op_type for node in Graph(tmp_path / "out" / "vision.onnx").proto.graph.node}
    assert "MatMulInteger" in kinds or "DynamicQuantizeMatMul" in kinds


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target=openvino",), "needs --calibration"),
        (("--target=openvino", "--scheme=fp8", *FEW), "no CPU computes in FP8"),
        (("--target=openvino", "--calibration=random:0", "--frames=4"), "4 frames, expected at least 128"),
        (("--target=openvino", "--calibration=nowhere"), "neither a LeRobotDataset"),
        (("--target=openvino", *FEW, "--denoising_steps=7"), "tables for 1, 2, 3, 4, 8 steps"),
        (("--target=openvino", *FEW, "--device=cuda"), "Expected auto or cpu"),
        (("--target=openvino", *FEW, "--camera_map=front"), "expected a mapping"),
        (("--target=tensorrt", *FEW, "--frames=0"), "must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str) -> None:
    assert _run(made, tmp_path / "out", *flags) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_quantising_twice_is_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(made, tmp_path / "once", "--target=onnxruntime") == 0
    assert _run(Made(made.checkpoint, tmp_path / "once"), tmp_path / "twice", "--target=onnxruntime") == 1
    assert "is in int8 already" in capsys.readouterr().err


def test_torch_threads_are_left_alone(made: Made) -> None:
    before = torch.get_num_threads()
    OrtStage(Graph(made.onnx / "vision.onnx"))
    assert torch.get_num_threads() == before
