"""What can be known of the TensorRT engine without a GPU: the sequence it records, and everything it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exports import inputs_for, layout_of
from random_networks import edit_json, load_network, random_inputs, write_network, write_network_n1d7
from safetensors.torch import save_file
from torch import Tensor

from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.engine import tensorrt, warming_up
from gr00t_fast.engine import tensorrt_library as library
from gr00t_fast.engine.eager import Continuation, EagerEngine, prefix_weights
from gr00t_fast.engine.manifest import STAGES, Digests, Manifest, Target, describe_files, read_manifest, target_of, varying_sizes
from gr00t_fast.engine.tensorrt import RunStage, StageProgram, TensorRTEngine, check_capability, stage_shapes
from gr00t_fast.errors import ConfigError, EngineError, MissingExtraError, StaleEngineError
from gr00t_fast.export.graphs import Layout, example_inputs, graph_tables, graphs_of
from gr00t_fast.measurement import StageTimer
from gr00t_fast.model import StepTables
from gr00t_fast.model.config import ModelConfig
from gr00t_fast.policy import load_policy

ROOT = Path(__file__).parent.parent
has_gpu = library.gpu_capability() is not None
TEXT = 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("checkpoint"))


# the sequence that is recorded, over the exported graphs' own modules


MARK = 997  # a prompt length that no other size is
LAYOUT = Layout(pictures=1, height=56, width=56, image_tokens=16, max_tokens=64)


def stages_of(config: ModelConfig, layout: Layout) -> dict[str, dict]:
    """`Manifest.stages` of a network, from the shapes of example inputs and outputs."""
    graphs = graphs_of(config)
    shapes = {
        key: tensor.shape
        for name, spec in graphs.items()
        for key, tensor in zip(spec.inputs, example_inputs(name, config, layout, MARK, torch.float32), strict=True)
    }
    shapes |= {"tokens": (1, layout.image_tokens, config.language.hidden_size), "next_actions": shapes["actions"]}
    shapes |= dict.fromkeys(("backbone_features", "vl_features"), shapes["embeddings"])
    names = {MARK: "tokens", MARK - layout.image_tokens: "text_tokens"}
    written = {key: [names.get(size, size) for size in shape] for key, shape in shapes.items()}
    return {
        name: {"inputs": {key: written[key] for key in spec.inputs}, "outputs": {key: written[key] for key in spec.outputs}}
        for name, spec in graphs.items()
    }


class GraphModules:
    """Stands in for TensorRT: runs the exported graphs' torch modules on the buffers it is given, and writes down what ran."""

    def __init__(self, checkpoint: Path, layout: Layout) -> None:
        self.calls: list[str] = []
        self._specs = graphs_of(open_checkpoint(checkpoint).config)
        self._graphs = {name: spec.build(load_network(checkpoint), layout).eval() for name, spec in self._specs.items()}

    @torch.no_grad()
    def __call__(self, stage: str, tensors: Mapping[str, Tensor]) -> None:
        self.calls.append(stage)
        outputs = self._graphs[stage](*(tensors[name] for name in self._specs[stage].inputs))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        for name, value in zip(self._specs[stage].outputs, outputs, strict=True):
            assert tensors[name].shape == value.shape, name
            tensors[name].copy_(value)


@pytest.mark.parametrize("network", ["n1.5", "n1.7"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_recorded_sequence_gives_the_eager_actions(checkpoint: Path, steps: int, network: str, tmp_path: Path) -> None:
    checkpoint = checkpoint if network == "n1.5" else write_network_n1d7(tmp_path)
    model = load_network(checkpoint)
    inputs, noise = inputs_for(model.config, 2, TEXT)
    expected = EagerEngine(model).run(inputs, noise, steps, StageTimer())
    tokens, images = inputs.input_ids.shape[1], len(inputs.image_positions)
    layout = layout_of(model.config, inputs)
    graphs = GraphModules(checkpoint, layout)
    shapes = stage_shapes(stages_of(model.config, layout), varying_sizes({"image_tokens": images}, tokens))
    with torch.no_grad():
        tables = graph_tables(model, steps)
    program = StageProgram(shapes, images, StepTables(tables.tau, tables.modulation), model.language.embedding.weight.detach())
    before = [buffer.data_ptr() for buffer in program.buffers.values()]
    for _ in range(2):  # the second call must not see what the first left behind
        program.fill(inputs.pixel_values, inputs.input_ids[0], inputs.image_positions, inputs.state, noise)
        program.enqueue(graphs)
        error = (program.actions - expected).norm() / (expected - noise).norm()
        assert error < 1e-4
    assert graphs.calls == ["vision", "language", *["denoise_step"] * steps] * 2
    assert [buffer.data_ptr() for buffer in program.buffers.values()] == before, "a recording keeps its addresses"


# the engine around it, on a stand-in for CUDA, on the CPU: streams that run at once, graphs that repeat what was recorded


class AtOnce:
    """A stream or an event: everything has already run."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class RepeatingGraph:
    """Repeats the sequence that was submitted while it was recorded, on the same tensors."""

    recording: RepeatingGraph | None = None

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        for submit in self.work:
            submit()

    @classmethod
    @contextlib.contextmanager
    def record(cls, graph: RepeatingGraph, **_: Any) -> Iterator[None]:
        cls.recording = graph
        yield
        cls.recording = None


class RecordedProgram(StageProgram):
    def enqueue(self, run_stage: RunStage) -> None:
        if RepeatingGraph.recording is None:
            super().enqueue(run_stage)
        else:  # what is recorded does not run
            RepeatingGraph.recording.work.append(functools.partial(StageProgram.enqueue, self, run_stage))


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch, run_stage: RunStage) -> None:
    """Replace CUDA and the execution of stages in gr00t_fast.engine.tensorrt."""
    cuda = SimpleNamespace(Stream=AtOnce, Event=AtOnce, current_stream=AtOnce, CUDAGraph=RepeatingGraph, graph=RepeatingGraph.record)
    cuda.stream = cuda.device = contextlib.nullcontext
    cuda.synchronize = lambda *_: None
    cuda.get_device_capability = lambda _: (8, 6)

    class StandInExecution:
        capturable = True

        def __init__(self, stage: SimpleNamespace, shapes: Mapping[str, tuple[int, ...]], scratch: Tensor, stream: Any) -> None:
            self._name, self._shapes = stage.name, shapes

        def enqueue(self, tensors: Mapping[str, Tensor]) -> None:
            assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(self._shapes), self._name
            run_stage(self._name, tensors)

    def loaded(trt: Any, name: str, directory: Path, manifest: Manifest, remedy: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, scratch_bytes=64, check_dtypes=lambda dtype: None, save_cache=lambda: None)

    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(tensorrt, "StageExecution", StandInExecution)
    monkeypatch.setattr(tensorrt, "StageProgram", RecordedProgram)
    monkeypatch.setattr(tensorrt, "cuda_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(tensorrt, "LoadedStage", loaded)


@pytest.fixture
def opened(checkpoint: Path, engines: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRTEngine:
    """A TensorRTEngine whose stages are the exported graphs' modules, in fp32 on the CPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    model = load_network(checkpoint)
    tables = {"embedding": model.language.embedding.weight.detach().clone()}
    for steps in (1, 2, 4):
        with torch.no_grad():
            of_steps = graph_tables(model, steps)
        tables |= {f"tau.{steps}": of_steps.tau, f"modulation.{steps}": of_steps.modulation}
    save_file(tables, engines / "tables.safetensors")
    manifest = json.loads((engines / "manifest.json").read_text())
    manifest |= {"precision": "fp32", "files": describe_files(engines)}
    manifest["details"]["builder_version"] = trt.__version__
    (engines / "manifest.json").write_text(json.dumps(manifest))
    stand_in_for_cuda(monkeypatch, GraphModules(checkpoint, LAYOUT))
    return TensorRTEngine(engines, target_for(checkpoint), "cuda", "auto")


def distance(got: Tensor, expected: Tensor, noise: Tensor) -> float:
    return float((got - expected).norm() / (expected - noise).norm())


def test_a_new_length_in_mid_run_is_said_aloud(opened: TensorRTEngine, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = open_checkpoint(checkpoint).config
    with caplog.at_level(logging.WARNING):
        with warming_up(opened):
            opened.run(*random_inputs(config, text_tokens=10), 2, StageTimer())
        opened.run(*random_inputs(config, text_tokens=10, seed=1), 2, StageTimer())
        assert not caplog.records
        opened.run(*random_inputs(config, text_tokens=11), 2, StageTimer())
    (record,) = caplog.records
    assert "27 prompt tokens, 2 denoising steps" in record.getMessage()


def test_recordings_beyond_the_limit_are_dropped(opened: TensorRTEngine, checkpoint: Path) -> None:
    config = open_checkpoint(checkpoint).config
    for text in range(10, 20):
        inputs, noise = random_inputs(config, text_tokens=text)
        opened.run(inputs, noise, 1, StageTimer())
    assert len(opened.recordings) == 8
    assert min(length for length, _ in opened.recordings) == 16 + 12, "the oldest went first"


def test_a_padded_batch_gives_each_item_its_own_actions(opened: TensorRTEngine, checkpoint: Path) -> None:
    config = open_checkpoint(checkpoint).config
    inputs, noise = random_inputs(config, batch=2, text_tokens=24)
    mask = torch.ones_like(inputs.input_ids, dtype=torch.bool)
    mask[1, -5:] = False
    together = opened.run(dataclasses.replace(inputs, prompt_mask=mask), noise, 2, StageTimer())
    for item, length in ((0, 40), (1, 35)):
        one = slice(item, item + 1)
        alone = dataclasses.replace(inputs, pixel_values=inputs.pixel_values[one], input_ids=inputs.input_ids[one, :length], state=inputs.state[one])
        torch.testing.assert_close(together[one], opened.run(alone, noise[one], 2, StageTimer()), rtol=0, atol=0)


def test_a_chunk_is_continued_as_by_the_eager_engine(opened: TensorRTEngine, checkpoint: Path) -> None:
    eager = EagerEngine(load_network(checkpoint))
    inputs, noise = random_inputs(eager.model.config, text_tokens=TEXT)
    continuation = Continuation(
        torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)), prefix_weights(16, 3, 10)[:, None].expand(1, 16, 32), "prefix"
    )
    expected = eager.run(inputs, noise, 4, StageTimer(), continuation)
    assert distance(opened.run(inputs, noise, 4, StageTimer(), continuation), expected, noise) < 1e-4


# refusals, in the order in which they are checked


def target_for(checkpoint: Path, data_config: str = "so100") -> Target:
    return target_of(open_checkpoint(checkpoint), "new_embodiment", data_config)


@pytest.fixture
def engines(checkpoint: Path, tmp_path: Path) -> Path:
    """Engine files as far as the manifest's checks go: what is in them is nobody's business before they are loaded."""
    directory = tmp_path / "engines"
    directory.mkdir()
    for name in (*(f"{stage}.engine" for stage in STAGES), "tables.safetensors"):
        (directory / name).write_bytes(name.encode() * 100)
    config = open_checkpoint(checkpoint).config
    stages = {name: {"file": f"{name}.engine", **entry} for name, entry in stages_of(config, LAYOUT).items()}
    Manifest(
        kind="tensorrt",
        precision="fp16",
        identity=target_for(checkpoint).identity(Digests(directory)),
        shapes={"cameras": 1, "image_tokens": 16, "max_tokens": 64},
        denoising_steps=(4,),
        stages=stages,
        files=describe_files(directory),
        versions={},
        command="",
        details={"builder": library.RTX, "builder_version": "0.0.1", "compute_capability": ["8.6"]},
        program="to_tensorrt.py",
        flags=("--compute_capability=8.6",),
    ).write(directory)
    return directory


def open_it(directory: Path, checkpoint: Path, device: str = "auto", precision: str = "auto", data_config: str = "so100") -> TensorRTEngine:
    return TensorRTEngine(directory, target_for(checkpoint, data_config), device, precision)


@pytest.mark.parametrize("key", ["builder", "builder_version", "compute_capability"])
def test_an_incomplete_manifest_is_refused(engines: Path, checkpoint: Path, key: str) -> None:
    edit_json(engines / "manifest.json", f"details.{key}", ...)
    with pytest.raises(EngineError, match=rf"incomplete \({key}\)"):
        open_it(engines, checkpoint)


@pytest.mark.parametrize("builder", library.BUILDERS)
def test_a_missing_library_names_its_extra(engines: Path, checkpoint: Path, builder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_json(engines / "manifest.json", "details.builder", builder)
    monkeypatch.setitem(sys.modules, builder, None)
    with pytest.raises(MissingExtraError, match=rf"pip install .*\[{builder}\]'"):
        open_it(engines, checkpoint)


def test_a_library_that_does_not_load_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EngineError, match=r"does not load \(libnvinfer.*pip install --force-reinstall tensorrt"):
        library.load(library.STANDARD)


def test_engines_of_another_version_are_refused(engines: Path, checkpoint: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(StaleEngineError, match=r"built by tensorrt_rtx 0\.0\.1, and tensorrt_rtx .* is installed.*gr00t-fast export tensorrt"):
        open_it(engines, checkpoint)


def test_another_precision_replaces_the_engines_that_are_there(engines: Path, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"gr00t-fast export tensorrt .*--precision=bf16 --overwrite"):
        open_it(engines, checkpoint, precision="bf16")


@pytest.mark.skipif(has_gpu or torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_what_to_use_instead(engines: Path, checkpoint: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    edit_json(engines / "manifest.json", "details.builder_version", trt.__version__)
    with pytest.raises(EngineError, match=r"needs a CUDA GPU.*--engine=onnxruntime.*--engine=eager --device=cpu"):
        open_it(engines, checkpoint)
    with pytest.raises(EngineError, match="needs a CUDA GPU"):
        load_policy(checkpoint, engine="tensorrt", engine_path=engines)


@pytest.mark.parametrize(
    ("targets", "here", "fits"),
    [(["8.6"], "8.6", True), (["8.6", "12.0"], "12.0", True), ([], "8.0", True), ([], "12.0", True)]
    + [(["8.6"], "8.9", False), (["8.6", "12.0"], "8.0", False), ([], "7.5", False)],
)
def test_only_a_gpu_that_the_engines_were_built_for_passes(engines: Path, targets: list[str], here: str, fits: bool) -> None:
    edit_json(engines / "manifest.json", "details.compute_capability", targets)
    with contextlib.nullcontext() if fits else pytest.raises(StaleEngineError, match=rf"this GPU has {here}.*--compute_capability={here}: build"):
        check_capability(read_manifest(engines, ""), here, "build")


def test_what_the_runtime_calls_exists_in_the_library() -> None:
    """Without a GPU there is no engine to call: at least no name is misspelt."""
    trt = pytest.importorskip("tensorrt_rtx")
    source = (ROOT / "gr00t_fast" / "engine" / "tensorrt.py").read_text()
    owners = {"self._runtime": trt.Runtime, "self._engine": trt.ICudaEngine, "self._context": trt.IExecutionContext, "config": trt.IRuntimeConfig}
    owners |= {"context": trt.IExecutionContext, "cache": trt.IRuntimeCache, "self._cache": trt.IRuntimeCache}
    used = {
        (owner, name) for owner in owners for name in re.findall(rf"(?<![\w.]){re.escape(owner)}\.([a-z]\w*)", source) if name != "device_memory_size"
    }
    assert len(used) > 15
    assert [f"{owner}.{name}" for owner, name in sorted(used) if not hasattr(owners[owner], name)] == []
