"""The linear layers of an exported graph: matrix products with a constant weight [in, out]. These are what 8 bits are for.

Attention's own products (queries x keys, weights x values) stay as they are: runtimes fuse them, and they are a few per cent of the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.optional import require


@dataclass(frozen=True)
class LinearLayer:
    """One matrix product: its path in the graph's module, its node, the tensor that goes in, and its weight of shape (in, out)."""

    label: str
    node: str
    input: str
    weight: str
    shape: tuple[int, int]

    @property
    def kind(self) -> str:
        """Layers at the same place of every block: `blocks.*.mlp.up`."""
        return ".".join("*" if part.isdecimal() else part for part in self.label.split("."))


class Graph:
    """An ONNX file whose large tensors stay on the disk until they are asked for."""

    def __init__(self, path: Path) -> None:
        self.onnx = require("onnx", "export")
        self.path = path
        self.proto = self.onnx.load(str(path), load_external_data=False)
        self.initializers = {tensor.name: tensor for tensor in self.proto.graph.initializer}

    def array(self, name: str) -> np.ndarray:
        """An initializer's values as they are stored; bf16 comes as ml_dtypes.bfloat16."""
        tensor = self.onnx.TensorProto()
        tensor.CopyFrom(self.initializers[name])
        helper = self.onnx.external_data_helper
        if helper.uses_external_data(tensor):
            helper.load_external_data_for_tensor(tensor, str(self.path.parent))
            tensor.data_location = self.onnx.TensorProto.DEFAULT
        return self.onnx.numpy_helper.to_array(tensor)

    def linear_layers(self) -> list[LinearLayer]:
        """In the order of execution."""
        return [
            LinearLayer(node.input[1].removesuffix(".weight"), node.name, node.input[0], node.input[1], tuple(self.initializers[node.input[1]].dims))
            for node in self.proto.graph.node
            if node.op_type == "MatMul" and self._is_weight(node.input[1])
        ]

    def _is_weight(self, name: str) -> bool:
        return name in self.initializers and len(self.initializers[name].dims) == 2

    def type_of(self, layer: LinearLayer) -> Any:
        """The weight's ONNX element type."""
        return self.initializers[layer.weight].data_type
