"""Reads an exported graph's linear layers and writes an 8-bit version of it, in the form that a runtime executes fast.

TensorRT since version 11 and OpenVINO read 8 bits from explicit QuantizeLinear and DequantizeLinear (Q/DQ) around the inputs of matrix products:
weights are stored in 8 bits with one scale per output channel, activations are rounded at run time with one scale per tensor, and both scales have
the graph's own float type. INT8 is symmetric (zero point 0); FP8 is E4M3 (`float8e4m3fn`, largest number 448). ONNX Runtime does not execute such
graphs in 8 bits; for it, activations are rounded with scales found at run time, which needs no calibration.

Linear layers are matrix products with a constant weight [in, out]. Attention's own products (queries x keys, weights x values) stay as they are:
runtimes fuse them, and they are a few per cent of the work.
Axis alphabet: K input width, N output width.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr00t_fast.base.errors import ConfigError, require
from gr00t_fast.base.measurement import versions
from gr00t_fast.engine.exported import TABLES_NAME
from gr00t_fast.engine.manifest import Manifest, describe_files

LARGEST = {"int8": 127.0, "fp8": 448.0}
_SMALLEST_RANGE = 1e-6  # of a channel that is always zero: any scale will do, but not zero


@dataclass(frozen=True)
class InputScale:
    """How the inputs of one or more layers are rounded. largest: |input| that the largest 8-bit number stands for, after division by `smoothing`
    (fp32 (K,), positive), if any."""

    largest: float
    smoothing: Tensor | None = None


def quantised_weight(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """fp32 (K, N) -> 8-bit values as fp32 (K, N) and scales (N,); the product of the two approximates the weight."""
    scales = weight.abs().amax(dim=0).clamp_min(_SMALLEST_RANGE) / LARGEST[scheme]  # (N,)
    return rounded(weight / scales, scheme), scales


def rounded(values: Tensor, scheme: str) -> Tensor:
    """To the nearest representable number, saturating as QuantizeLinear does; still fp32."""
    if scheme == "int8":
        return values.round().clamp(-128, 127)
    return values.clamp(-LARGEST[scheme], LARGEST[scheme]).to(torch.float8_e4m3fn).float()


# --- an export ----------------------------------------------------------------------------------------------------------------------------


def write_quantised_export(
    source: Path,
    manifest: Manifest,
    out: Path,
    scales: Mapping[str, InputScale] | None,
    quantisation: Mapping[str, Any],
    command: str,
    flags: Sequence[str],
) -> None:
    """Fill the directory `out` with files, tables and manifest. manifest: that of `source`; scales: `<stage>.<layer>` -> how its input is rounded,
    None where ONNX Runtime finds that at run time; quantisation, command, flags: as of `Manifest`."""
    stages = {}
    for stage, entry in manifest.stages.items():
        of_stage = {name.removeprefix(f"{stage}."): scale for name, scale in (scales or {}).items() if name.startswith(f"{stage}.")}
        graph = source / f"{stage}.onnx"
        if quantisation["runtime"] == "onnxruntime":
            _write_dynamic(graph, out, None if scales is None else of_stage)
        elif quantisation["runtime"] == "openvino":
            _write_openvino(graph, out, of_stage, quantisation["format"])
        else:
            write_quantised(graph, out / graph.name, of_stage, quantisation["format"])
        stages[stage] = {**entry, "file": f"{stage}.xml" if quantisation["runtime"] == "openvino" else graph.name}
    shutil.copyfile(source / TABLES_NAME, out / TABLES_NAME)
    replace(
        manifest,
        kind="openvino" if quantisation["runtime"] == "openvino" else "onnx",
        stages=stages,
        files=describe_files(out),
        versions=versions(),
        command=command,
        program="quantise.py",
        flags=tuple(flags),
        quantisation=quantisation,
        details={name: value for name, value in manifest.details.items() if name != "batches"} | {"made_from": manifest.command},
    ).write(out)


def _write_openvino(source: Path, out: Path, scales: Mapping[str, InputScale], scheme: str) -> None:
    """OpenVINO's own format: it maps its weights from the file, and opens in a fraction of the time that ONNX takes."""
    openvino = require("openvino", "openvino")
    with tempfile.TemporaryDirectory(dir=out, prefix=".qdq-") as work:
        path = Path(work) / source.name
        write_quantised(source, path, scales, scheme)
        model = openvino.Core().read_model(str(path))
        openvino.save_model(model, str(out / f"{source.stem}.xml"), compress_to_fp16=False)
        del model  # it maps the file that is about to go


def _write_dynamic(source: Path, out: Path, scales: Mapping[str, InputScale] | None) -> None:
    """ONNX Runtime: INT8 weights with one scale per output channel, activations rounded with scales found at run time."""
    quantisation = require("onnxruntime.quantization", "export")
    silent = logging.NullHandler()  # without a handler the library's warnings set up the root logger, and our later messages get its form
    logging.root.addHandler(silent)
    try:
        quantisation.quantize_dynamic(
            str(source),
            str(out / source.name),
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[layer.node for layer in Graph(source).linear_layers() if scales is None or layer.label in scales],
            per_channel=True,
            weight_type=quantisation.QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.root.removeHandler(silent)


def write_quantised(source: Path, target: Path, scales: Mapping[str, InputScale], scheme: str) -> None:
    """Copy the graph `source` to `target` with the layers of `scales` (label -> scale of its input) in 8 bits; weights go to `<target>.data`.

    Raises ConfigError for an unknown label.
    """
    graph = Graph(source)
    layers = {layer.label: layer for layer in graph.linear_layers()}
    if unknown := sorted(set(scales) - set(layers)):
        raise ConfigError(f"{source}: no linear layer is called {', '.join(unknown[:3])}. Export it again with gr00t-fast export onnx.")
    by_input: dict[str, list[LinearLayer]] = defaultdict(list)
    for label in scales:
        by_input[layers[label].input].append(layers[label])
    writer = _Writer(graph, scheme)
    for tensor, sharing in by_input.items():
        writer.quantise_input(tensor, sharing, scales[sharing[0].label])
        for layer in sharing:
            writer.quantise_weight(layer, scales[layer.label])
    proto = writer.finish()
    graph.onnx.external_data_helper.load_external_data_for_model(proto, str(source.parent))
    target.parent.mkdir(parents=True, exist_ok=True)
    data = target.with_name(target.name + ".data")
    data.unlink(missing_ok=True)  # the library appends to a file that is there
    graph.onnx.save_model(proto, str(target), save_as_external_data=True, all_tensors_to_one_file=True, location=data.name, size_threshold=1024)


# --- a graph ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearLayer:
    """One matrix product: its path in the graph's module, its node, the tensor that goes in, and its weight."""

    label: str
    node: str
    input: str
    weight: str


class Graph:
    """An ONNX file whose large tensors stay on the disk until they are asked for."""

    def __init__(self, path: Path) -> None:
        self.onnx = require("onnx", "export")
        self.path = path
        self.proto = self.onnx.load(str(path), load_external_data=False)
        self.initializers = {tensor.name: tensor for tensor in self.proto.graph.initializer}

    def array(self, name: str) -> np.ndarray:
        """An initializer's values in fp32."""
        tensor = self.onnx.TensorProto()
        tensor.CopyFrom(self.initializers[name])  # older libraries leave the data in the tensor that they read
        return self.onnx.numpy_helper.to_array(tensor, str(self.path.parent)).astype(np.float32)

    def linear_layers(self) -> list[LinearLayer]:
        """In the order of execution."""
        products = [node for node in self.proto.graph.node if node.op_type == "MatMul"]
        return [
            LinearLayer(node.input[1].removesuffix(".weight"), node.name, node.input[0], node.input[1])
            for node in products
            if node.input[1] in self.initializers and len(self.initializers[node.input[1]].dims) == 2
        ]


class _Writer:
    def __init__(self, graph: Graph, scheme: str) -> None:
        self.graph, self.scheme, self.onnx = graph, scheme, graph.onnx
        self.eight_bit = {"int8": self.onnx.TensorProto.INT8, "fp8": self.onnx.TensorProto.FLOAT8E4M3FN}[scheme]
        self.new: dict[str, Any] = {}  # initialisers by name
        self.before: dict[str, list[Any]] = defaultdict(list)  # node name -> nodes to stand in front of it
        self.nodes = {node.name: node for node in graph.proto.graph.node}

    def quantise_input(self, tensor: str, layers: list[LinearLayer], input_scale: InputScale) -> None:
        """One Q/DQ pair for all products that read `tensor`."""
        first, source = layers[0], tensor
        smoothing = None if input_scale.smoothing is None else input_scale.smoothing.numpy()
        if smoothing is not None and not self._fold(tensor, layers, smoothing):
            source = f"{tensor}_smoothed"
            self._constant(f"{tensor}_smoothing", 1.0 / smoothing, first)
            self._add_node(first, "Mul", [tensor, f"{tensor}_smoothing"], source)
        scale, zero = self._scale(f"{tensor}_scale", np.float32(input_scale.largest / LARGEST[self.scheme]), first)  # type: ignore[arg-type]
        self._add_node(first, "QuantizeLinear", [source, scale, zero], f"{tensor}_q")
        self._add_node(first, "DequantizeLinear", [f"{tensor}_q", scale, zero], f"{tensor}_dq")
        for layer in layers:
            self.nodes[layer.node].input[0] = f"{tensor}_dq"

    def quantise_weight(self, layer: LinearLayer, input_scale: InputScale) -> None:
        weight = torch.from_numpy(self.graph.array(layer.weight))  # (K, N)
        if input_scale.smoothing is not None:
            weight = weight * input_scale.smoothing[:, None]
        values, scales = quantised_weight(weight, self.scheme)
        name = layer.weight
        eight = values.to(torch.int8 if self.scheme == "int8" else torch.float8_e4m3fn)
        self.new[name] = self.onnx.helper.make_tensor(name, self.eight_bit, values.shape, eight.view(torch.uint8).numpy().tobytes(), raw=True)
        scale, zero = self._scale(f"{name}_scale", scales.numpy(), layer)
        self._add_node(layer, "DequantizeLinear", [name, scale, zero], f"{name}_dq", axis=1)
        self.nodes[layer.node].input[1] = f"{name}_dq"

    def _fold(self, tensor: str, layers: list[LinearLayer], smoothing: np.ndarray) -> bool:
        """Divide the gains of the norm before the products by `smoothing`, where they are constant and nothing else reads the norm's output. Returns
        whether that was possible."""
        graph, constants = self.graph.proto.graph, self.graph.initializers
        node = next((n for n in graph.node if tensor in n.output), None)
        readers = {n.name for n in graph.node if tensor in n.input}
        if node is None or tensor in {output.name for output in graph.output} or readers != {layer.node for layer in layers}:
            return False
        # LayerNormalization(x, gain, bias), or the last product of a written-out RMSNorm: x * gain
        gains = [place for place in {"LayerNormalization": (1, 2), "Mul": (1,)}.get(node.op_type, ()) if place < len(node.input)]
        shapes = [list(constants[node.input[place]].dims) if node.input[place] in constants else None for place in gains]
        if not gains or any(shape != [len(smoothing)] for shape in shapes):
            return False
        for place in gains:
            name = f"{tensor}_folded_{place}"
            self._constant(name, self.graph.array(node.input[place]) / smoothing, layers[0])
            node.input[place] = name
        return True

    def _scale(self, name: str, values: np.ndarray, layer: LinearLayer) -> tuple[str, str]:
        """Scale and zero point initialisers; the scale in the graph's own float type."""
        self._constant(name, values, layer)
        zero, shape = f"{name}_zero", np.shape(values)
        raw = bytes(int(np.prod(shape, dtype=np.int64)))  # zero in INT8 and in FP8 is the byte 0
        self.new[zero] = self.onnx.helper.make_tensor(zero, self.eight_bit, shape, raw, raw=True)
        return name, zero

    def _constant(self, name: str, values: np.ndarray, layer: LinearLayer) -> None:
        data_type = self.graph.initializers[layer.weight].data_type
        dtype = self.onnx.helper.tensor_dtype_to_np_dtype(data_type)
        raw = np.asarray(values, np.float32).astype(dtype).tobytes()
        self.new[name] = self.onnx.helper.make_tensor(name, data_type, np.shape(values), raw, raw=True)

    def _add_node(self, before: LinearLayer, kind: str, inputs: list[str], output: str, **attributes: int) -> None:
        self.before[before.node].append(self.onnx.helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes))

    def finish(self) -> Any:
        graph = self.graph.proto.graph
        nodes = [new for node in graph.node for new in (*self.before[node.name], node)]
        used = {name for node in nodes for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in used and tensor.name not in self.new]
        del graph.node[:], graph.initializer[:], graph.value_info[:]  # value infos of replaced tensors would be stale
        graph.node.extend(nodes)
        graph.initializer.extend([*self.new.values(), *kept])
        return self.graph.proto
