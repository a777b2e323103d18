"""How each linear layer of a network is best rounded to 8 bits, and which layers its actions cannot spare.

`record` runs observations through the exported graphs in torch, with hooks on the linear layers. `choose_scale` then rounds the inputs of each
layer in a few ways and takes the one that changes the layer's outputs least. `keep_sensitive` decides on the actions, in joint units: layers at the
same place of every block are one group (`vision blocks.*.mlp.down`); each group alone is rounded, the rest stays as it is, and actions are compared.
Then all groups are rounded together; as long as that is above the limit, the group with the most squared error per multiplication stays in 16 bits.
Groups with a negligible share of the multiplications stay in 16 bits without a trial.

Axis alphabet: n observations, H horizon, A padded action width, R kept rows, K input width, N output width.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gr00t_fast.base.console import progress_bar
from gr00t_fast.engine.exported import ExportTables
from gr00t_fast.engine.manifest import Target
from gr00t_fast.export import CalibrationOptions
from gr00t_fast.export.graphs import MatMulLinear, graphs_of
from gr00t_fast.export.onnx import build_graph
from gr00t_fast.export.qdq import LARGEST, InputScale, quantised_weight, rounded
from gr00t_fast.export.verify import ActionError, Case, action_error
from gr00t_fast.model.layers import CategoryLinear

NEGLIGIBLE = 0.002  # share of all multiplications of an inference: nothing to gain from 8 bits
_ROWS = 192  # per tensor: enough to rank a handful of choices, little enough to hold those of a whole network
_ROWS_PER_RUN = 4  # a run: one observation, or one denoising step of one
_COLUMNS = 384  # of the weights take part in the search: one scale per column makes them alike
# Exponents of SmoothQuant (Xiao et al. 2023, section 4): how much of the activations' spread moves into the weights. None: no balancing.
_BALANCES = (None, 0.35, 0.5, 0.65)
_CLIPS = {"int8": (1.0, 0.9, 0.8, 0.65, 0.5), "fp8": (1.0,)}  # of the largest value seen; FP8's relative precision gains nothing from clipping
_WORTH = 0.75  # another choice must lower the error at least to this, or the plainer one stays: a range fitted closely clips what was not seen
_SMALLEST = 1e-5


# --- the network --------------------------------------------------------------------------------------------------------------------------


class GraphNetwork:
    """The graphs of an ONNX export as torch modules, in fp32 on the CPU: layer `a` of the file `vision.onnx` is `vision.a` here. Its parts are the
    graphs, which run one after the other."""

    def __init__(self, target: Target, shapes: Mapping[str, Any], tables: ExportTables, denoising_steps: int, scheme: str) -> None:
        """Loads the checkpoint's weights, 8 GB at full size. shapes, tables: of the export; scheme: "int8" or "fp8"; denoising_steps: of a run."""
        self._graphs, self._tables, self._step_tables = graphs_of(target.checkpoint.config), tables, tables.steps(denoising_steps)
        self.parts, self.scheme, self.steps = tuple(self._graphs), scheme, denoising_steps
        self.module = nn.ModuleDict({name: build_graph(name, target, torch.float32, shapes) for name in self.parts})
        # name within `module` -> linear layer, of all that can be rounded
        self.layers = {name: layer for name, layer in self.module.named_modules() if isinstance(layer, MatMulLinear | CategoryLinear)}

    def place(self, name: str) -> tuple[str, str]:
        """The part a layer belongs to, and a name that it shares with the layers at its place in other blocks: `blocks.*.mlp.down`. Gate and up of
        the language model read one tensor: both or neither are rounded."""
        part, _, rest = name.partition(".")
        kind = re.sub(r"\b\d+\b", "*", rest)
        return part, re.sub(r"mlp\.(gate|up)$", "mlp.gate_up", kind) if part == "language" else kind

    def weight(self, name: str) -> Tensor:
        """fp32 (K, N) on the CPU."""
        return self.layers[name].weight.detach().float().cpu()

    def rounded(self, scales: Mapping[str, InputScale]) -> dict[str, nn.Module]:
        """The 8-bit form of each layer in `scales`."""
        return {name: RoundedMatMul(self.layers[name], scale, self.scheme) for name, scale in scales.items()}

    def run(self, module: nn.ModuleDict, part: str, case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of one part of `module`, which is the network's own or has some layers replaced. `outputs`: of the parts before it. Those of the
        last part are `actions` (1, H, A)."""
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


def with_layers(module: nn.ModuleDict, layers: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """A module of the same weights with `layers` in the places that their names say; `module` itself stays as it is."""

    def replaced(module: nn.Module, name: str) -> nn.Module:
        if name in layers:
            return layers[name]
        twin = copy.copy(module)  # its tables of parameters and modules are still the original's: each gets its own
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {key: child and replaced(child, f"{name}.{key}".removeprefix(".")) for key, child in module._modules.items()}
        return twin

    whole: nn.ModuleDict = replaced(module, "")
    return whole


# --- how each layer is rounded ------------------------------------------------------------------------------------------------------------


@dataclass
class InputStatistics:
    """What one tensor that `readers` (layers) read has been: largest |value| per channel (K,), rows per observation, and kept rows (R, K): the
    largest of a run and some at random."""

    readers: tuple[str, ...]
    largest: Tensor
    rows_per_case: int = 0
    rows: list[Tensor] = field(default_factory=list)

    def add(self, tensors: Sequence[Tensor], case: int, cases: int, generator: torch.Generator) -> None:
        """tensors: of each step of observation number `case` of `cases`, fp32 (rows, K)."""
        runs = cases * len(tensors)
        keep = max(_ROWS_PER_RUN, -(-_ROWS // runs))  # few runs: more of each, so that the search has something to go by
        every = max(1, runs * keep // _ROWS)
        self.rows_per_case = sum(len(values) for values in tensors)
        for run, values in enumerate(tensors, case * len(tensors)):
            sizes = values.abs()
            self.largest = torch.maximum(self.largest, sizes.amax(dim=0))
            if run % every == 0:
                picked = torch.randint(0, len(values), (keep - 1,), generator=generator)
                self.rows.append(values[torch.cat((sizes.amax(dim=1).argmax()[None], picked))])


@torch.inference_mode()
def record(network: GraphNetwork, cases: Sequence[Case], seed: int) -> list[InputStatistics]:
    """Statistics of every tensor that linear layers read, over all observations and denoising steps, in the order of execution."""
    found: dict[tuple[str, ...], InputStatistics] = {}
    calls: list[tuple[str, Tensor]] = []  # of one part: a layer, and its input
    generator = torch.Generator().manual_seed(seed)
    with contextlib.ExitStack() as hooks, progress_bar("calibrating", len(cases)) as tick:
        for name, layer in network.layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, inputs, name=name: calls.append((name, inputs[0]))))
        for number, case in enumerate(cases):
            outputs: dict[str, Tensor] = {}
            for part in network.parts:
                outputs |= network.run(network.module, part, case, outputs)
                for readers, tensors in _by_tensor(calls).items():
                    entry = found.setdefault(readers, InputStatistics(readers, torch.zeros(tensors[0].shape[-1])))
                    entry.add(tensors, number, len(cases), generator)
                calls.clear()
            tick()
    return list(found.values())


def _by_tensor(calls: Sequence[tuple[str, Tensor]]) -> dict[tuple[str, ...], list[Tensor]]:
    """Layers that read one tensor -> what they read in each denoising step: fp32 (rows, K) on the CPU."""
    readers: dict[int, dict[str, None]] = {}  # names in order; the state is read once per step
    for name, tensor in calls:
        readers.setdefault(id(tensor), {})[name] = None
    tensors = {id(tensor): tensor.reshape(-1, tensor.shape[-1]).float().cpu() for _, tensor in calls}
    together: dict[tuple[str, ...], list[Tensor]] = {}
    for key, names in readers.items():
        together.setdefault(tuple(names), []).append(tensors[key])
    return together


def scales_of(network: GraphNetwork, statistics: Sequence[InputStatistics]) -> dict[str, InputScale]:
    """The input scale of each layer, by name; layers that read one tensor share one."""
    scales: dict[str, InputScale] = {}
    with progress_bar("scales", len(statistics)) as tick:
        for entry in statistics:
            scale = choose_scale(entry, [network.weight(name) for name in entry.readers], network.scheme)
            scales |= dict.fromkeys(entry.readers, scale)
            tick()
    return scales


def choose_scale(statistics: InputStatistics, weights: Sequence[Tensor], scheme: str) -> InputScale:
    """For layers with `weights` (each (K, N)) that read one tensor: of all choices the one with the least error of their outputs on the kept rows."""
    rows, joined = torch.cat(statistics.rows), torch.cat(list(weights), dim=1).float()  # (R, K), (K, N)
    spread = joined.abs().amax(dim=1)  # (K,), of all columns
    joined = joined[:, :: max(1, joined.shape[1] // _COLUMNS)].contiguous()
    truth = rows @ joined  # (R, N)
    chosen, least = InputScale(0.0), np.inf
    for exponent in _BALANCES:
        smoothing = None if exponent is None else _smoothing(statistics.largest, spread, exponent)
        divisor = torch.ones_like(spread) if smoothing is None else smoothing
        values, scales = quantised_weight(joined * divisor[:, None], scheme)
        inputs, largest = rows / divisor, float((statistics.largest / divisor).max())
        for clip in _CLIPS[scheme]:
            limit = max(largest * clip, _SMALLEST)
            step = limit / LARGEST[scheme]
            error = float((rounded(inputs / step, scheme) * step @ (values * scales) - truth).norm())
            if chosen.largest == 0 or error < least * _WORTH:
                chosen, least = InputScale(limit, smoothing), error
    return chosen


def _smoothing(inputs: Tensor, weights: Tensor, exponent: float) -> Tensor:
    """Largest |input| and |weight| per channel (K,) -> what the channel is divided by, and its weights multiplied with; geometric mean 1."""
    ratio = inputs.clamp_min(_SMALLEST) ** exponent / weights.clamp_min(_SMALLEST) ** (1 - exponent)
    return ratio / ratio.log().mean().exp()


# --- which layers -------------------------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Layers of one part at the same place of every block, and their share of an inference's multiplications.

    alone: what rounding these alone does to the actions (None: not measured). kept: why they stay in 16 bits, if they do.
    """

    part: str
    kind: str
    layers: tuple[str, ...]
    work: float
    alone: ActionError | None = None
    kept: str | None = None

    def __post_init__(self) -> None:
        if self.work < NEGLIGIBLE:
            self.kept = f"less than {NEGLIGIBLE:.1%} of the multiplications"

    def describe(self) -> dict[str, Any]:
        return {
            "group": f"{self.part} {self.kind}",
            "layers": len(self.layers),
            "share_of_multiplications": round(self.work, 5),
            "alone": self.alone and self.alone.describe(),
            "kept_in_16_bits": self.kept,
        }


def groups_of(network: GraphNetwork, statistics: Iterable[InputStatistics]) -> list[Group]:
    """All layers that were recorded, in groups."""
    alike: dict[tuple[str, str], dict[str, int]] = {}
    for entry in statistics:
        for name in entry.readers:
            alike.setdefault(network.place(name), {})[name] = entry.rows_per_case * network.weight(name).numel()
    total = sum(sum(work.values()) for work in alike.values())
    return [Group(part, kind, tuple(work), sum(work.values()) / total) for (part, kind), work in alike.items()]


class Trials:
    """Runs the network with some layers rounded. It runs once as it is; a trial begins at the first part that differs, with the outputs before it."""

    def __init__(self, network: GraphNetwork, cases: Sequence[Case]) -> None:
        self._network, self._cases = network, cases
        self._known: list[dict[str, Tensor]] = [{} for _ in cases]
        self._truth = self._actions(network.module, network.parts, self._known)

    def error(self, module: nn.ModuleDict, parts: Collection[str]) -> ActionError:
        """The error of the actions of `module`, which differs from the network's own in `parts` only, in joint units."""
        order = self._network.parts
        actions = self._actions(module, order[min(map(order.index, parts)) :], [dict(known) for known in self._known])
        return action_error(actions, self._truth, self._cases)

    @torch.inference_mode()
    def _actions(self, module: nn.ModuleDict, parts: Iterable[str], known: Sequence[dict[str, Tensor]]) -> np.ndarray:
        """(n, H, A). Adds to `known` what `parts` give."""
        for part in parts:
            for case, outputs in zip(self._cases, known, strict=True):
                outputs |= self._network.run(module, part, case, outputs)
        return np.concatenate([outputs["actions"].float().cpu().numpy() for outputs in known])


def keep_sensitive(groups: Sequence[Group], error_of: Callable[[Sequence[Group]], ActionError], limit: float) -> ActionError | None:
    """Measure each of `groups` alone, and keep in 16 bits what it takes; returns the error with the others rounded. error_of: of the actions with
    some groups rounded; limit: p99 in joint units."""
    left = [group for group in groups if not group.kept]
    with progress_bar("sensitivity", len(left)) as tick:
        for group in left:
            group.alone = error_of([group])
            tick()
    while left:
        total = error_of(left)
        if total.p99 <= limit:  # NaN is above every limit
            return total
        worst = max(left, key=lambda group: np.nan_to_num(group.alone.rms**2 / group.work, nan=np.inf, posinf=np.inf))  # type: ignore[union-attr]
        left.remove(worst)
        worst.kept = f"p99 was {total.p99:.3g} with it, limit {limit:g}"
    return None


def calibrate(network: GraphNetwork, cases: Sequence[Case], options: CalibrationOptions) -> tuple[dict[str, InputScale], dict[str, Any]]:
    """Decide how to round each linear layer, and which stay in 16 bits. Returns layer -> how it is rounded,
    without those that stay; and how that was decided, for quantisation.json."""
    statistics = record(network, cases, options.seed)
    groups, scales = groups_of(network, statistics), scales_of(network, statistics)
    picked = np.linspace(0, len(cases) - 1, min(options.trial_frames, len(cases))).round()  # evenly from first to last
    few = [cases[index] for index in np.unique(picked.astype(int))]
    error = None
    if few:
        trials, layers = Trials(network, few), network.rounded(scales)

        def error_of(some: Sequence[Group]) -> ActionError:
            replaced = {name: layers[name] for group in some for name in group.layers}
            return trials.error(with_layers(network.module, replaced), {group.part for group in some})

        error = keep_sensitive(groups, error_of, options.limit)
    kept = [group for group in groups if group.kept]
    report = {
        "denoising_steps": network.steps,
        "limit_p99": options.limit,
        "trial_samples": len(few),
        "action_error_on_trial_samples": error and error.describe(),
        "work_in_8_bits": round(1.0 - sum(group.work for group in kept), 4),
        "groups": [group.describe() for group in groups],
    }
    in_16_bits = {name for group in kept for name in group.layers}
    return {name: scale for name, scale in scales.items() if name not in in_16_bits}, report
