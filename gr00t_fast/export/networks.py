"""The two forms of the network that are calibrated (gr00t_fast/export/calibrate.py): the plain model, and the graphs that are exported.

Axis alphabet: H horizon, A padded action width, K input width, N output width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gr00t_fast.engine.exported import ExportTables
from gr00t_fast.engine.manifest import Target
from gr00t_fast.engine.quantized import PARTS, WEIGHTS_ONLY, InputScale, linear_layers, rounded_layers
from gr00t_fast.export.graphs import MatMulLinear, graphs_of
from gr00t_fast.export.onnx import build_graph
from gr00t_fast.export.qdq import LARGEST, quantised_weight, rounded
from gr00t_fast.export.samples import Case
from gr00t_fast.model import Gr00t
from gr00t_fast.model.layers import CategoryLinear


class Network(ABC):
    """A network in parts that run one after the other.

    layers: name within `module` -> linear layer, of all that can be rounded. parts: in the order of execution; weights_only: those whose inputs are
    not rounded. scheme: "int8" or "fp8". steps: denoising steps of a run.
    """

    weights_only: Collection[str] = ()

    def __init__(self, module: nn.Module, layers: Mapping[str, nn.Module], prefixes: Mapping[str, str], scheme: str, steps: int) -> None:
        """prefixes: part -> how the names of its layers begin."""
        self.module, self.layers, self._prefixes, self.scheme, self.steps = module, layers, prefixes, scheme, steps
        self.parts = tuple(prefixes)

    def place(self, name: str) -> tuple[str, str]:
        """The part a layer belongs to, and a name that it shares with the layers at its place in other blocks: `blocks.*.mlp.up`."""
        part = next(part for part, begin in self._prefixes.items() if name.startswith(begin))
        label = name.removeprefix(self._prefixes[part])
        return part, ".".join("*" if word.isdecimal() else word for word in label.split("."))

    def weight(self, name: str) -> Tensor:
        """fp32 (K, N) on the CPU."""
        layer = self.layers[name]
        weight = layer.weight.detach().float().cpu()
        return weight.t() if isinstance(layer, nn.Linear) else weight

    @abstractmethod
    def rounded(self, scales: Mapping[str, InputScale]) -> dict[str, nn.Module]:
        """The 8-bit form of each layer in `scales`."""

    @abstractmethod
    def run(self, module: Any, part: str, case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of one part of `module`, which is the network's own or has some layers replaced. `outputs`: of the parts before it. Those of the
        last part are `actions` (1, H, A)."""


class TorchNetwork(Network):
    """The plain model, for the torch engine `fp8`. Of the diffusion transformer only weights are rounded."""

    weights_only = (WEIGHTS_ONLY,)

    def __init__(self, model: Gr00t, denoising_steps: int, emulated: bool) -> None:
        """emulated: 8-bit products are written out, for devices that lack them."""
        super().__init__(model, linear_layers(model), PARTS, "fp8", denoising_steps)
        self._emulated, self._tables = emulated, model.head.step_tables(denoising_steps)

    def place(self, name: str) -> tuple[str, str]:
        """Gate and up of the decoder are one product in the fused model: both or neither are rounded."""
        part, kind = super().place(name)
        return part, kind.replace("mlp.gate", "mlp.gate_up").replace("mlp.up", "mlp.gate_up") if part == "language" else kind

    def rounded(self, scales: Mapping[str, InputScale]) -> dict[str, nn.Module]:
        return dict(rounded_layers(self.module, scales, self._emulated))

    def run(self, module: Gr00t, part: str, case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = case.inputs.to(self.module.device, self.module.dtype)
        if part == "vision":
            return {"tokens": module.encode_vision(inputs.pixel_values)}
        if part == "language":
            return {"features": module.encode_language(inputs, outputs["tokens"])}
        if part == "refine":
            return {"refined": module.head.refine(outputs["features"])}
        condition = module.head.condition(outputs["refined"], inputs.state, None, inputs.image_positions)
        return {"actions": module.head.denoise(case.noise.to(self.module.device, self.module.dtype), condition, self._tables)}


class GraphNetwork(Network):
    """The graphs of an ONNX export as torch modules, in fp32 on the CPU: layer `a` of the file `vision.onnx` is `vision.a` here."""

    def __init__(self, target: Target, shapes: Mapping[str, Any], tables: ExportTables, denoising_steps: int, scheme: str) -> None:
        """Loads the checkpoint's weights, 8 GB at full size. shapes, tables: of the export."""
        self._graphs, self._tables, self._step_tables = graphs_of(target.checkpoint.config), tables, tables.steps(denoising_steps)
        module = nn.ModuleDict({name: build_graph(name, target, torch.float32, shapes) for name in self._graphs})
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, MatMulLinear | CategoryLinear)}
        super().__init__(module, layers, {name: f"{name}." for name in self._graphs}, scheme, denoising_steps)

    def rounded(self, scales: Mapping[str, InputScale]) -> dict[str, nn.Module]:
        return {name: RoundedMatMul(self.layers[name], scale, self.scheme) for name, scale in scales.items()}

    def run(self, module: nn.ModuleDict, part: str, case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs, spec = case.inputs, self._graphs[part]
        known = {**outputs, "pixel_values": inputs.pixel_values, "state": inputs.state}
        if part == "denoise_step":
            known |= {"actions": case.noise, "step_size": torch.full((1,), 1.0 / self.steps)}
            for tau, modulation in zip(self._step_tables.tau.float(), self._step_tables.modulation.float(), strict=True):
                known |= {"tau": tau, "modulation": modulation}
                known["actions"] = module[part](*(known[name] for name in spec.inputs))
            return {"actions": known["actions"]}
        if part == "language":
            known["embeddings"] = self._tables.embed(inputs.input_ids[0]).float().index_copy(1, inputs.image_positions, outputs["tokens"])
        made = module[part](*(known[name] for name in spec.inputs))
        return dict(zip(spec.outputs, made if isinstance(made, tuple) else (made,), strict=True))


class RoundedMatMul(nn.Module):
    """What QuantizeLinear and DequantizeLinear around a matrix product compute (gr00t_fast/export/qdq.py); weights are held in 8 bits."""

    def __init__(self, layer: nn.Module, scale: InputScale, scheme: str) -> None:
        super().__init__()
        weight = layer.weight.detach().float()  # (K, N)
        values, self.steps = quantised_weight(weight if scale.smoothing is None else weight * scale.smoothing[:, None], scheme)
        self.values = values.to(torch.int8 if scheme == "int8" else torch.float8_e4m3fn)
        self.step, self.smoothing, self.scheme = scale.largest / LARGEST[scheme], scale.smoothing, scheme
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.smoothing is None else x / self.smoothing
        product = (rounded(x / self.step, self.scheme) * self.step) @ (self.values.float() * self.steps)
        return product if self.bias is None else product + self.bias
