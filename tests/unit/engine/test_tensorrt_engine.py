"""What can be known of the TensorRT engine without a GPU: the sequence of its stages, how it calls the library, and everything it refuses."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exports import inputs_for, layout_of
from random_networks import edit_json, load_network, random_inputs, write_network, write_network_n1d7
from safetensors.torch import save_file
from torch import Tensor

from gr00t_fast.base.errors import ConfigError, EngineError, MissingExtraError, StaleEngineError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.engine import tensorrt, warming_up
from gr00t_fast.engine import tensorrt_library as library
from gr00t_fast.engine.eager import Continuation, EagerEngine, prefix_weights
from gr00t_fast.engine.manifest import STAGES, Digests, Manifest, Target, describe_files, read_manifest, target_of
from gr00t_fast.engine.tensorrt import LoadedStage, TensorRTEngine, check_capability
from gr00t_fast.export.graphs import Layout, example_inputs, graph_tables, graphs_of
from gr00t_fast.model.config import ModelConfig
from gr00t_fast.policy import load_policy

ROOT = Path(__file__).resolve().parents[3]
has_gpu = library.gpu_capability() is not None
TEXT = 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("checkpoint"))


# the engine over the exported graphs' own modules, on the CPU


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


class StageModule:
    """Stands in for a loaded stage: runs the exported graph's torch module on the inputs that it is given, and writes down that it ran."""

    def __init__(self, name: str, checkpoint: Path, layout: Layout, calls: list[str]) -> None:
        self._name, self._spec, self._calls = name, graphs_of(open_checkpoint(checkpoint).config)[name], calls
        self._graph = self._spec.build(load_network(checkpoint), layout).eval()

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], stream: Any) -> dict[str, Tensor]:
        assert set(inputs) == set(self._spec.inputs)
        self._calls.append(self._name)
        outputs = self._graph(*(inputs[name] for name in self._spec.inputs))
        return dict(zip(self._spec.outputs, (outputs,) if isinstance(outputs, Tensor) else outputs, strict=True))


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, layout: Layout, calls: list[str]) -> None:
    """Replace CUDA and the execution of stages in gr00t_fast.engine.tensorrt."""
    cuda = SimpleNamespace(Stream=lambda device: None, device=contextlib.nullcontext, synchronize=lambda: None)
    cuda.get_device_capability = lambda _: (8, 6)

    def loaded(trt: Any, name: str, directory: Path, manifest: Manifest, remedy: str) -> StageModule:
        return StageModule(name, checkpoint, layout, calls)

    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(tensorrt, "cuda_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(tensorrt, "LoadedStage", loaded)


def opened_over(checkpoint: Path, engines: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> tuple[TensorRTEngine, list[str]]:
    """A TensorRTEngine whose stages are the exported graphs' modules, in fp32 on the CPU; and which of them it has run."""
    trt = pytest.importorskip("tensorrt_rtx")
    model = load_network(checkpoint)
    tables = {"embedding": model.language.embedding.weight.detach().clone()}
    for steps in (1, 2, 3, 4):
        with torch.no_grad():
            of_steps = graph_tables(model, steps)
        tables |= {f"tau.{steps}": of_steps.tau, f"modulation.{steps}": of_steps.modulation}
    save_file(tables, engines / "tables.safetensors")
    manifest = json.loads((engines / "manifest.json").read_text())
    manifest |= {"precision": "fp32", "files": describe_files(engines)}
    manifest["details"]["builder_version"] = trt.__version__
    (engines / "manifest.json").write_text(json.dumps(manifest))
    calls: list[str] = []
    stand_in_for_cuda(monkeypatch, checkpoint, layout, calls)
    return TensorRTEngine(engines, target_for(checkpoint), "cuda", "auto"), calls


@pytest.fixture
def opened(checkpoint: Path, engines: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRTEngine:
    return opened_over(checkpoint, engines, LAYOUT, monkeypatch)[0]


@pytest.mark.parametrize("network", ["n1.5", "n1.7"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_stages_give_the_eager_actions(checkpoint: Path, steps: int, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint if network == "n1.5" else write_network_n1d7(tmp_path / "checkpoint")
    model = load_network(checkpoint)
    inputs, noise = inputs_for(model.config, 2, TEXT)
    expected = EagerEngine(model).run(inputs, noise, steps, StageTimer())
    layout = layout_of(model.config, inputs)
    engine, calls = opened_over(checkpoint, write_engines(tmp_path / "engines", checkpoint, layout), layout, monkeypatch)
    for _ in range(2):  # the second call must not see what the first left behind
        assert distance(engine.run(inputs, noise, steps, StageTimer()), expected, noise) < 1e-4
    assert calls == ["vision", "language", *["denoise_step"] * steps] * 2


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
    assert "27 prompt tokens" in record.getMessage()


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
    known = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    continuation = Continuation(known, prefix_weights(16, 3, 10)[:, None].expand(1, 16, 32))
    expected = eager.run(inputs, noise, 4, StageTimer(), continuation)
    assert distance(opened.run(inputs, noise, 4, StageTimer(), continuation), expected, noise) < 1e-4


# a stage over a library that is not there: one graph, x (1, tokens, 3) -> y of the same shape, that doubles what it is given


class StandInLibrary:
    """What LoadedStage asks of TensorRT-RTX, as one object in place of its module and of its engine, context, configuration and cache."""

    __name__, __version__, num_io_tensors = "stand_in", "1.0", 2
    TensorIOMode = SimpleNamespace(INPUT="input")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    ILogger = type("ILogger", (), {"WARNING": 2})
    IRuntimeCache = object
    ranges = (((1, 1, 3), (1, 4, 3), (1, 4, 3)), ((1, 5, 3), (1, 8, 3), (1, 8, 3)))  # of x, least, usual and most of each profile
    num_optimization_profiles = len(ranges)

    def __init__(self, kind: str = "FLOAT") -> None:
        self.kind, self.kept, self.profiles = kind, list[bytes](), list[int]()
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        if name in ("Runtime", "deserialize_cuda_engine", "create_runtime_config", "create_runtime_cache", "create_execution_context"):
            return lambda *_: self
        if name in ("set_runtime_cache", "infer_shapes"):
            return lambda *_: None
        raise AttributeError(name)

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "x" else "output"

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.kind)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (1, -1, 3) if name == "x" else self._shape

    def get_tensor_profile_shape(self, name: str, index: int) -> tuple[tuple[int, ...], ...]:
        return self.ranges[index]

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profiles.append(index)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address % 256 == 0 or name == "y"
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        x, y = ((ctypes.c_float * math.prod(self._shape)).from_address(self._addresses[name]) for name in "xy")
        y[:] = [2 * value for value in x]
        return True

    def serialize(self) -> bytes:
        return b"compiled"

    def deserialize(self, content: bytes) -> None:
        self.kept.append(content)


class AtOnce:
    """A stream: everything has already run."""

    cuda_stream, device = 0, torch.device("cpu")

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


def stage_over(library: StandInLibrary, directory: Path) -> LoadedStage:
    (directory / "language.engine").write_bytes(b"engine")
    manifest = SimpleNamespace(stages={"language": {"file": "language.engine"}}, details={"builder_version": "1.0"}, precision="fp32")
    return LoadedStage(library, "language", directory, manifest, "build")


def test_a_stage_runs_at_the_shapes_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the profile that holds them; what was compiled is kept for the next start."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    library, memory = StandInLibrary(), torch.zeros(1024)
    stage, stream, begin = stage_over(library, tmp_path), AtOnce(), -memory.data_ptr() % 256 // 4
    # a GPU's allocations are aligned as the library wants them, which a CPU's are not
    monkeypatch.setattr(Tensor, "clone", lambda given: memory[begin + 512 :][: given.numel()].view(given.shape).copy_(given))
    for offset, length in ((begin, 3), (begin, 6), (begin + 1, 3)):
        x = memory[offset : offset + 3 * length].view(1, length, 3).copy_(torch.arange(3 * length).view(1, length, 3))
        assert torch.equal(stage.run({"x": x}, stream)["y"], 2 * x)
    assert library.profiles == [0, 1, 0]
    with pytest.raises(EngineError, match=r"not built for x \(1, 9, 3\).*--max_text_tokens: build"):
        stage.run({"x": memory[begin : begin + 27].view(1, 9, 3)}, stream)
    (kept,) = tmp_path.glob(".language.*")
    assert kept.read_bytes() == b"compiled"
    again = StandInLibrary()
    stage_over(again, tmp_path)
    assert again.kept == [b"compiled"]


def test_a_stage_of_another_number_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"language: 'x' is HALF, expected FLOAT\. Run: build"):
        stage_over(StandInLibrary("HALF"), tmp_path)


# refusals, in the order in which they are checked


def target_for(checkpoint: Path, data_config: str = "so100") -> Target:
    return target_of(open_checkpoint(checkpoint), "new_embodiment", data_config)


@pytest.fixture
def engines(checkpoint: Path, tmp_path: Path) -> Path:
    return write_engines(tmp_path / "engines", checkpoint, LAYOUT)


def write_engines(directory: Path, checkpoint: Path, layout: Layout) -> Path:
    """Engine files as far as the manifest's checks go: what is in them does not matter before they are loaded."""
    directory.mkdir()
    for name in (*(f"{stage}.engine" for stage in STAGES), "tables.safetensors"):
        (directory / name).write_bytes(name.encode() * 100)
    config = open_checkpoint(checkpoint).config
    stages = {name: {"file": f"{name}.engine", **entry} for name, entry in stages_of(config, layout).items()}
    Manifest(
        kind="tensorrt",
        precision="fp16",
        identity=target_for(checkpoint).identity(Digests(directory)),
        shapes={"cameras": layout.pictures, "image_tokens": layout.image_tokens, "max_tokens": layout.max_tokens},
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
    with pytest.raises(EngineError, match=r"libnvinfer.*pip install --force-reinstall tensorrt"):
        library.load(library.STANDARD)


def test_engines_of_another_version_are_refused(engines: Path, checkpoint: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(StaleEngineError, match=r"tensorrt_rtx 0\.0\.1.*gr00t-fast export tensorrt"):
        open_it(engines, checkpoint)


def test_another_precision_replaces_the_engines_that_are_there(engines: Path, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"gr00t-fast export tensorrt .*--precision=bf16 --overwrite"):
        open_it(engines, checkpoint, precision="bf16")


@pytest.mark.skipif(has_gpu or torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_what_to_use_instead(engines: Path, checkpoint: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    edit_json(engines / "manifest.json", "details.builder_version", trt.__version__)
    with pytest.raises(EngineError, match=r"CUDA.*--engine=onnxruntime.*--engine=eager --device=cpu"):
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
