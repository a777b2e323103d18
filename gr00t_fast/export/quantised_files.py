"""One stage's 8-bit file, in the form that its runtime executes fast."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from gr00t_fast.export.linear_layers import Graph
from gr00t_fast.export.qdq import LayerPlan, write_quantised
from gr00t_fast.optional import require


def write_stage(source: Path, out: Path, plans: Mapping[str, LayerPlan] | None, scheme: str, target: str) -> str:
    """Write `source` (an ONNX file) to the directory `out` with the layers of `plans` in 8 bits; returns the file's name."""
    if target == "openvino":
        return _write_openvino(source, out, plans or {}, scheme)
    if target == "onnxruntime":
        return _write_dynamic(source, out, plans)
    write_quantised(source, out / source.name, plans or {}, scheme)
    return source.name


def _write_openvino(source: Path, out: Path, plans: Mapping[str, LayerPlan], scheme: str) -> str:
    """OpenVINO's own format: it maps its weights from the file, and opens in a fraction of the time that ONNX takes."""
    openvino = require("openvino", "openvino")
    with tempfile.TemporaryDirectory(dir=out, prefix=".qdq-") as work:
        path = Path(work) / source.name
        write_quantised(source, path, plans, scheme)
        model = openvino.Core().read_model(str(path))
        openvino.save_model(model, str(out / f"{source.stem}.xml"), compress_to_fp16=False)
        del model  # it maps the file that is about to go
    return f"{source.stem}.xml"


def _write_dynamic(source: Path, out: Path, plans: Mapping[str, LayerPlan] | None) -> str:
    """ONNX Runtime: INT8 weights with one scale per output channel, activations rounded with scales found at run time."""
    quantisation = require("onnxruntime.quantization", "export")
    layers = Graph(source).linear_layers()
    chosen = [layer.node for layer in layers if plans is None or layer.label in plans]
    quantisation.quantize_dynamic(
        str(source),
        str(out / source.name),
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=chosen,
        per_channel=True,
        weight_type=quantisation.QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )
    return source.name
