"""A checkpoint to ONNX: three graphs, their tables and a manifest, one stage in memory at a time.

`gr00t-fast export onnx` is the program; the contract of the files is in `gr00t_fast/export/graphs.py` and `gr00t_fast/engine/manifest.py`.
"""

from __future__ import annotations

import contextlib
import filecmp
import gc
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from gr00t_fast.base.console import progress_bar
from gr00t_fast.base.errors import CheckpointError, ConfigError, require
from gr00t_fast.base.files import check_free, whole_directory
from gr00t_fast.base.measurement import command_line, versions
from gr00t_fast.checkpoint import load_model
from gr00t_fast.engine import PRECISIONS
from gr00t_fast.engine.eager import MAX_BATCH
from gr00t_fast.engine.exported import EMBEDDING, MODULATION, TABLES_NAME, TAU
from gr00t_fast.engine.manifest import TEXT_TOKENS, TOKENS, Digests, Manifest, Target, describe_files
from gr00t_fast.export import OnnxOptions, flags_given
from gr00t_fast.export.graphs import TABLE_PARAMETERS, VARYING, Layout, example_inputs, graph_tables, graphs_of, needs_spans
from gr00t_fast.export.verify import transforms_only
from gr00t_fast.model import Gr00t, ModelInputs
from gr00t_fast.model.config import ModelConfig

KIND = "onnx"
USUAL_STEPS = (1, 2, 4, 8)
_TEXT_BUCKETS = (64, 128, 256, 512, 1024)  # prompt lengths beyond the image tokens that are worth a profile of their own


def export_checkpoint(options: OnnxOptions) -> Manifest:
    """Check everything small, then export. Raises Gr00tFastError."""
    for package in ("onnx", "onnxscript"):
        require(package, "export")
    check_free(options.out, options.overwrite)
    _, target = options.opened()
    policy = transforms_only(options.model_path, **options.checkpoint_options())
    if (size := options.camera_px()) is not None:
        policy.expect_cameras(dict.fromkeys(policy.metadata.resolutions, size))
    example = policy.preprocess(policy.example_observation(options.lang_instruction))
    if size is not None and example.camera_size is None:
        raise ConfigError(f"--camera_size={options.camera_size} is for GR00T N1.6 and N1.7; N1.5 resizes frames of any size to one. Leave it out.")
    usual = example.to(torch.device("cpu"), torch.float32)
    return export_onnx(target, options, usual, command_line(), example.camera_size)


def export_onnx(target: Target, options: OnnxOptions, usual: ModelInputs, command: str, camera_size: tuple[int, int] | None = None) -> Manifest:
    """Write the export and return its manifest; `options.out` appears when all is written, or not at all.

    usual: an observation as the network gets it, with the prompt that is run most; of cameras of `camera_size` (width and height), where they decide
    the size of the pictures. Raises ConfigError for options that cannot be met and CheckpointError for a damaged checkpoint.
    """
    config = target.checkpoint.config
    dtype, steps = PRECISIONS[options.precision], step_counts(options.denoising_steps, config)
    shapes = shapes_of(config, usual, options.max_text_tokens, target.checkpoint.network.prompt.images_last)
    if any(not 1 < size <= MAX_BATCH for size in options.batch_sizes):
        raise ConfigError(f"--batch_sizes={','.join(map(str, options.batch_sizes))}: expected whole numbers from 2 to {MAX_BATCH}.")
    flags = [*flags_given(options, "precision", "max_text_tokens", "denoising_steps", "batch_sizes")]
    if camera_size is not None:
        shapes["camera_size"] = list(camera_size)
        flags.append("--camera_size={}x{}".format(*camera_size))
    graphs, stages = graphs_of(config), {}
    batches: dict[str, dict[str, str]] = {str(size): {} for size in sorted({*options.batch_sizes})}
    with whole_directory(options.out, options.overwrite) as directory, progress_bar("exporting", len(graphs) * (1 + len(batches)) + 2) as tick:
        digests = Digests(directory)
        identity = target.identity(digests)
        _write_tables(target, dtype, steps, directory)
        tick()
        for name in graphs:
            for size in (1, *map(int, batches)):
                graph = build_graph(name, target, dtype, shapes, size)
                entry = write_onnx(name, graph, config, Layout.of(shapes, config, size), dtype, directory)
                if size == 1:
                    stages[name] = entry
                else:
                    batches[str(size)][name] = entry["file"]
                del graph
                gc.collect()
                tick()
        files = describe_files(directory, digests)
        tick()
        manifest = Manifest(
            kind=KIND,
            precision=options.precision,
            identity=identity,
            shapes=shapes,
            denoising_steps=steps,
            stages=stages,
            files=files,
            versions=versions(),
            command=command,
            details={"opset": OPSET, **({"batches": batches} if batches else {})},
            program="to_onnx.py",
            flags=tuple(flags),
        )
        manifest.write(directory)
    return manifest


def shapes_of(config: ModelConfig, usual: ModelInputs, max_text_tokens: int, images_last: bool = False) -> dict[str, Any]:
    """`Manifest.shapes`. images_last: as of PromptForm. Raises ConfigError when the usual prompt is longer than the longest."""
    usual_tokens, images = usual.input_ids.shape[1], len(usual.image_positions)
    most = images + max_text_tokens
    if usual_tokens > most:
        raise ConfigError(
            f"--max_text_tokens={max_text_tokens}: the instruction makes {usual_tokens - images} tokens besides the {images} of the pictures. "
            f"Give at least {usual_tokens - images}."
        )
    buckets = {usual_tokens, most, *(images + text for text in _TEXT_BUCKETS)}
    pictures, _, height, width = usual.pixel_values.shape[1:]
    firsts, per_picture = usual.image_positions.tolist()[:: images // pictures], images // pictures  # each picture's tokens lie together
    origin = usual_tokens if images_last else 0
    spans = {"image_spans": [[first - origin, first - origin + per_picture] for first in firsts]} if needs_spans(config) else {}
    return {
        "cameras": pictures,
        "picture": [height, width],
        **spans,
        "image_tokens": images,
        "max_tokens": most,
        "prompt_buckets": sorted(bucket for bucket in buckets if usual_tokens <= bucket <= most),
        "horizon": config.head.action_horizon,
        "action_dim": config.head.action_dim,
        "state_dim": config.head.state_dim,
    }


def step_counts(asked: Sequence[int], config: ModelConfig) -> tuple[int, ...]:
    """The step counts to cover: what was asked, the checkpoint's own, and the usual ones, which cost kilobytes each. Raises ConfigError."""
    most = config.head.timestep_buckets
    if wrong := [steps for steps in asked if not 1 <= steps <= most]:
        raise ConfigError(f"--denoising_steps={wrong[0]}: expected whole numbers from 1 to {most}.")
    return tuple(sorted({*asked, *USUAL_STEPS, config.head.denoising_steps}))


def build_graph(name: str, target: Target, dtype: torch.dtype, shapes: Mapping[str, Any], batch: int = 1) -> nn.Module:
    """The torch module of one graph, for a number of observations, with the checkpoint's weights in `dtype` on the CPU; shapes: as in the manifest.

    Raises CheckpointError for weights that are not finite in `dtype`.
    """
    config = target.checkpoint.config
    spec = graphs_of(config)[name]
    return spec.build(_load(target, dtype, spec.parameters), Layout.of(shapes, config, batch)).eval()


def _write_tables(target: Target, dtype: torch.dtype, steps: tuple[int, ...], directory: Path) -> None:
    model = _load(target, dtype, ("language.embedding.", *TABLE_PARAMETERS))
    tensors = {EMBEDDING: model.language.embedding.weight.data}
    for count in steps:
        tables = graph_tables(model, count)
        tensors |= {f"{TAU}.{count}": tables.tau, f"{MODULATION}.{count}": tables.modulation}
    save_file(tensors, directory / TABLES_NAME, metadata={"format": "pt"})
    (directory / TABLES_NAME).chmod(0o644)  # the library makes it private; whoever runs the robot shall read it


def _load(target: Target, dtype: torch.dtype, only: tuple[str, ...]) -> Gr00t:
    model = load_model(target.checkpoint, target.embodiment_tag, torch.device("cpu"), dtype, only=only)
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not torch.isfinite(parameter).all():
            narrow = "it overflows in fp16: use --precision=bf16 or fp32." if dtype == torch.float16 else "copy or download the checkpoint again."
            raise CheckpointError(f"the weight '{name}' holds NaN or infinity in {dtype}; expected finite numbers: {narrow}")
    return model


OPSET = 20  # the first with Gelu; nothing in these graphs is shorter in a later one, and older runtimes read it


def write_onnx(name: str, graph: nn.Module, config: ModelConfig, layout: Layout, dtype: torch.dtype, directory: Path) -> dict[str, Any]:
    """Write `name`.onnx and `name`.onnx.data, or `name`.batchN.onnx, which has its weights there too; returns the stage's entry of the manifest.
    Raises MissingExtraError without the onnx packages."""
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    spec, path = graphs_of(config)[name], directory / (f"{name}.onnx" if layout.batch == 1 else f"{name}.batch{layout.batch}.onnx")
    varying = {
        TOKENS: torch.export.Dim(TOKENS, min=max(2, layout.least_tokens), max=layout.max_tokens),
        TEXT_TOKENS: torch.export.Dim(TEXT_TOKENS, min=2, max=layout.max_tokens - layout.image_tokens),
    }
    example = example_inputs(name, config, layout, layout.least_tokens + 1, dtype)
    sizes = tuple({VARYING[key][0]: varying[VARYING[key][1]]} if key in VARYING else None for key in spec.inputs)
    with _quiet():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            dynamic_shapes=_by_parameter(graph, sizes),
            verbose=False,
        )
    for node in program.model.graph:  # the exporter's stack traces: half of the file, and the directories of whoever exported
        node.metadata_props.clear()
    _name_sizes(program.model)
    program.save(str(path), external_data=True)
    del program
    gc.collect()
    if layout.batch > 1:
        _share_weights(onnx, path, directory / f"{name}.onnx.data")
    onnx.checker.check_model(str(path))  # by path: a model over 2 GB cannot be checked in memory
    return stage_entry(path)


def _share_weights(onnx: Any, path: Path, weights: Path) -> None:
    """Let a graph read its weights in another one's file, which holds the same bytes. Where it does not (the exporter ordered them otherwise), the
    graph keeps its own."""
    own = path.with_name(f"{path.name}.data")
    if not own.exists() or not filecmp.cmp(own, weights, shallow=False):
        return
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = weights.name
    onnx.save(model, str(path))
    own.unlink()


def _by_parameter(graph: nn.Module, sizes: tuple[Any, ...]) -> dict[str, Any]:
    """By the names of forward's parameters; those behind a star together."""
    parameters = list(inspect.signature(graph.forward).parameters.values())
    starred = parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL
    own = len(parameters) - starred
    found = {parameter.name: size for parameter, size in zip(parameters[:own], sizes, strict=False)}
    return found | ({parameters[-1].name: sizes[own:]} if starred else {})


def _name_sizes(model: Any) -> None:
    """The exporter calls a varying size of an output by how it follows from the inputs'."""
    for value in model.graph.outputs:
        if value.name in VARYING:
            axis, name = VARYING[value.name]
            value.shape = type(value.shape)([name if place == axis else size for place, size in enumerate(value.shape)])


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
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
