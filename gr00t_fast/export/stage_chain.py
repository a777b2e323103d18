"""Many observations through the exported stages, one stage's graph in memory at a time; what one stage hands to the next lies on the disk.

The graphs run on ONNX Runtime in fp32. A *variant* is one way to run them (`reference`, a quantised trial): its outputs are kept apart under its
name, and a stage may read another variant's, so that a change in the last stage costs the last stage only.
Axis alphabet: H horizon, A padded action width, D width, C cameras, S prompt tokens, V image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gr00t_fast.export.linear_layers import Graph
from gr00t_fast.optional import require

STAGES = ("vision", "language", "denoise_step")
REFERENCE = "reference"
_OUTPUTS = {"vision": ("tokens",), "language": ("backbone_features", "vl_features", "keys", "values")}

Arrays = dict[str, np.ndarray]
Infer = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class StageSample:
    """One observation as the network gets it, fp32: pixel_values (1, C, 3, h, w), text (1, S, D) with whatever at the image tokens' places,
    image_positions (V,), state (1, state_dim), noise (1, H, A). `number` names its files."""

    number: int
    pixel_values: np.ndarray
    text: np.ndarray
    image_positions: np.ndarray
    state: np.ndarray
    noise: np.ndarray


class StageChain:
    def __init__(self, directory: Path, samples: Sequence[StageSample], tau: np.ndarray, modulation: np.ndarray) -> None:
        """tau (N, D) and modulation (N, L + 1, 2, D) of the step count to run. `directory` takes some 30 MB per full-size sample and variant."""
        self.directory, self.samples, self._tau, self._modulation = directory, samples, tau, modulation

    @property
    def steps(self) -> int:
        return len(self._tau)

    def of(self, samples: Sequence[StageSample]) -> StageChain:
        """The same stored outputs, for fewer samples."""
        return StageChain(self.directory, samples, self._tau, self._modulation)

    def run(self, stage: str, infer: Infer, reads: str, writes: str, tick: Callable[[], None] = lambda: None) -> None:
        """Every sample through one stage; `tick` is called after each."""
        (self.directory / writes).mkdir(parents=True, exist_ok=True)
        for sample in self.samples:
            if stage == "denoise_step":
                self._store(writes, sample, {"actions": self._denoise(sample, infer, reads)})
            else:
                outputs = infer(self._feeds(stage, sample, reads))
                self._store(writes, sample, {name: outputs[name] for name in _OUTPUTS[stage]})
            tick()

    def actions(self, variant: str) -> np.ndarray:
        """(samples, H, A), normalised."""
        return np.concatenate([self._load(variant, sample, "actions") for sample in self.samples])

    def _feeds(self, stage: str, sample: StageSample, reads: str) -> Arrays:
        if stage == "vision":
            return {"pixel_values": sample.pixel_values}
        embeddings = sample.text.copy()
        embeddings[:, sample.image_positions] = self._load(reads, sample, "tokens")
        return {"embeddings": embeddings}

    def _denoise(self, sample: StageSample, infer: Infer, reads: str) -> np.ndarray:
        actions, step_size = sample.noise, np.array([1.0 / self.steps], np.float32)
        fixed = {"state": sample.state, "keys": self._load(reads, sample, "keys"), "values": self._load(reads, sample, "values")}
        for tau, modulation in zip(self._tau, self._modulation, strict=True):
            outputs = infer({"actions": actions, **fixed, "tau": tau, "modulation": modulation, "step_size": step_size})
            actions = outputs["next_actions"]  # (1, H, A)
        return actions

    def _store(self, variant: str, sample: StageSample, arrays: Mapping[str, np.ndarray]) -> None:
        for name, values in arrays.items():
            np.save(self.directory / variant / f"{sample.number}.{name}.npy", values)

    def _load(self, variant: str, sample: StageSample, name: str) -> np.ndarray:
        return np.load(self.directory / variant / f"{sample.number}.{name}.npy")


class OrtStage:
    """One graph on ONNX Runtime's CPU kernels, optionally with inner tensors among its outputs."""

    def __init__(self, graph: Graph, watched: Sequence[str] = ()) -> None:
        """Weights that are not in `graph` itself are mapped from its file."""
        ort = require("onnxruntime", "export")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # it warns of initialisers that its own optimiser leaves over
        # BASIC: above it FP8 Q/DQ is fused into an operator that does not exist for FP8
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of every weight, for a few per cent
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.path.parent))
        self._session = ort.InferenceSession(_with_outputs(graph, watched), options, providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, feeds: Arrays) -> Arrays:
        return dict(zip(self._names, self._session.run(None, feeds), strict=True))


def _with_outputs(graph: Graph, watched: Sequence[str]) -> bytes:
    """The graph that also returns `watched`."""
    known = {value.name for value in (*graph.proto.graph.input, *graph.proto.graph.output)}
    graph.proto.graph.output.extend(graph.onnx.ValueInfoProto(name=name) for name in dict.fromkeys(watched) if name not in known)
    return graph.proto.SerializeToString()
