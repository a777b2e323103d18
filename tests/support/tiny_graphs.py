"""A tiny export in the published form, written node by node: what the TensorRT builder sees, without a network behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gr00t_fast.engine.manifest import Manifest, describe_files

onnx = pytest.importorskip("onnx", reason="needs `pip install 'gr00t_fast[export]'`")
helper, TensorProto = onnx.helper, onnx.TensorProto
WIDTH, IMAGE_TOKENS, MAX_TOKENS = 16, 4, 40
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
STAGES = {
    "vision": ({"pixel_values": [1, IMAGE_TOKENS, WIDTH]}, {"tokens": [1, IMAGE_TOKENS, WIDTH]}),
    "language": ({"embeddings": [1, "tokens", WIDTH]}, {"features": [1, "tokens", WIDTH]}),
    "denoise_step": ({"features": [1, "tokens", WIDTH]}, {"next_actions": [1, "tokens", WIDTH]}),
}


def write_export(
    directory: Path,
    precision: str = "fp16",
    seed: int = 0,
    quantised: str | None = None,
    operator: str = "Tanh",
    runtime: str = "tensorrt",
    identity: dict[str, Any] | None = None,
) -> Path:
    """Three graphs of two matrix products, tables and a manifest. `quantised`: "int8" or "fp8" for the first product of each."""
    directory.mkdir(parents=True, exist_ok=True)
    for index, (name, (inputs, outputs)) in enumerate(STAGES.items()):
        write_graph(directory / f"{name}.onnx", inputs, outputs, precision, seed + index, quantised, operator)
    save_file({"embedding": np.full((8, WIDTH), seed, np.float32)}, directory / "tables.safetensors")
    stages = {name: {"file": f"{name}.onnx", "inputs": inputs, "outputs": outputs} for name, (inputs, outputs) in STAGES.items()}
    Manifest(
        kind="onnx",
        precision=precision,
        identity=identity or {"weights": {"model.safetensors": str(seed)}},
        shapes={"cameras": 1, "image_tokens": IMAGE_TOKENS, "max_tokens": MAX_TOKENS, "prompt_buckets": [12, 24]},
        denoising_steps=(4,),
        stages=stages,
        files=describe_files(directory),
        versions={"onnx": onnx.__version__},
        command="gr00t-fast export onnx",
        quantisation=None if quantised is None else {"format": quantised, "runtime": runtime},
    ).write(directory)
    return directory


def write_graph(
    file: Path, inputs: dict[str, list], outputs: dict[str, list], precision: str, seed: int, quantised: str | None = None, operator: str = "Tanh"
) -> None:
    """input -> product -> `operator` -> product -> output; weights in a file beside the graph, as at full size."""
    kind, generator = TYPES[precision], np.random.default_rng(seed)
    (start, shape), (end, _) = next(iter(inputs.items())), next(iter(outputs.items()))
    constants = [_weight(f"{name}.weight", kind, generator) for name in ("first", "second")]
    nodes, source = [], start
    if quantised is not None:
        nodes, more, source = _quantised(start, kind, quantised, generator)
        constants = [constants[1], *more]
    nodes += [
        helper.make_node("MatMul", [source, "first.weight"], ["a"], name="first"),
        helper.make_node(operator, ["a"], ["b"], name="between"),
        helper.make_node("MatMul", ["b", "second.weight"], [end], name="second"),
    ]
    values = [helper.make_tensor_value_info(name, kind, shape) for name in (start, end)]
    graph = helper.make_graph(nodes, "tiny", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, file, save_as_external_data=True, location=f"{file.name}.data", size_threshold=0)


def _weight(name: str, kind: int, generator: np.random.Generator) -> Any:
    values = generator.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
    return helper.make_tensor(name, kind, values.shape, values.astype(helper.tensor_dtype_to_np_dtype(kind)).tobytes(), raw=True)


def _quantised(start: str, kind: int, quantised: str, generator: np.random.Generator) -> tuple[list, list, str]:
    """Q/DQ around the first product: one scale for the activations, one per output column for the weight."""
    eight = TensorProto.INT8 if quantised == "int8" else TensorProto.FLOAT8E4M3FN
    values = np.clip(generator.standard_normal((WIDTH, WIDTH)) * 40, -127, 127).astype(helper.tensor_dtype_to_np_dtype(eight))
    constants = [
        helper.make_tensor("first.quantised", eight, values.shape, values.tobytes(), raw=True),
        helper.make_tensor("scale", kind, [], [0.02]),
        helper.make_tensor("zero", eight, [], b"\0", raw=True),
        helper.make_tensor("scales", kind, [WIDTH], [0.01] * WIDTH),
        helper.make_tensor("zeros", eight, [WIDTH], bytes(WIDTH), raw=True),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", [start, "scale", "zero"], ["q"], name="quantise"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], name="dequantise"),
        helper.make_node("DequantizeLinear", ["first.quantised", "scales", "zeros"], ["first.weight"], name="weight", axis=1),
    ]
    return nodes, constants, "dq"
