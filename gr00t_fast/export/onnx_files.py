"""One graph to one ONNX file with its weights beside it, and back to facts about that file."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gr00t_fast.config import ModelConfig
from gr00t_fast.export.graphs import DYNAMIC, GRAPHS, example_inputs
from gr00t_fast.optional import require

OPSET = 20  # the first with Gelu; nothing in these graphs is shorter in a later one, and older runtimes read it
TOKENS = "tokens"  # name of the prompt length, the one size that varies


def write_onnx(
    name: str, graph: nn.Module, config: ModelConfig, cameras: int, max_tokens: int, dtype: torch.dtype, directory: Path
) -> dict[str, Any]:
    """Write `name`.onnx and `name`.onnx.data; returns the stage's entry of the manifest. Raises MissingExtraError without the onnx packages."""
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    spec, path = GRAPHS[name], directory / f"{name}.onnx"
    tokens = torch.export.Dim(TOKENS, min=2, max=max_tokens)
    example = example_inputs(name, config, cameras, cameras * config.vision.tokens + 2, dtype)
    sizes = {key: {DYNAMIC[key]: tokens} if key in DYNAMIC else None for key in spec.inputs}
    with _quiet():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            dynamic_shapes=sizes,
            verbose=False,
        )
    _forget_sources(program.model)
    program.save(str(path), external_data=True)
    del program
    gc.collect()
    onnx.checker.check_model(str(path))  # by path: a model over 2 GB cannot be checked in memory
    return stage_entry(path)


def _forget_sources(model: Any) -> None:
    """The exporter writes stack traces into every node: half of the file, and the directories of whoever exported."""
    for node in model.graph:
        for key in [key for key in node.metadata_props if key != "namespace"]:
            del node.metadata_props[key]


def stage_entry(path: Path) -> dict[str, Any]:
    """{"file", "inputs", "outputs"} of an ONNX file, as the manifest holds it; weights are not read."""
    graph = require("onnx", "export").load(str(path), load_external_data=False).graph
    weights = {weight.name for weight in graph.initializer}
    return {
        "file": path.name,
        "inputs": {value.name: _shape(value) for value in graph.input if value.name not in weights},
        "outputs": {value.name: _shape(value) for value in graph.output},
    }


def _shape(value: Any) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress, and warns of its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
