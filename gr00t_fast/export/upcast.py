"""A 16-bit graph as fp32, to measure it on a CPU: ONNX Runtime has no bf16 kernels there, and calibration should not see 16-bit rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.export.qdq import save_with_data
from gr00t_fast.optional import require


def as_fp32(source: Path, directory: Path) -> Path:
    """`source` itself when it holds no 16-bit floats, else a copy of the same names in `directory` with every one of them widened."""
    onnx = require("onnx", "export")
    proto = onnx.load(str(source), load_external_data=False)
    narrow = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    if not any(tensor.data_type in narrow for tensor in proto.graph.initializer):
        return source
    onnx.external_data_helper.load_external_data_for_model(proto, str(source.parent))
    for tensor in proto.graph.initializer:
        if tensor.data_type in narrow:
            _widen(onnx, tensor)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type in narrow:
                _widen(onnx, attribute.t)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del proto.graph.value_info[:]  # they tell the old types
    target = directory / source.name
    save_with_data(onnx, proto, target)
    return target


def _widen(onnx: Any, tensor: Any) -> None:
    values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
