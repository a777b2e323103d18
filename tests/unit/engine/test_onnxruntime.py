"""The ONNX export on ONNX Runtime: each stage and the actions are the plain model's, and what cannot run says why and what to do."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import make_export, stages_of, target_for
from golden_cases import load_case, relative_error
from random_networks import Sizes, edit_json, load_network, observation, write_network
from waiting import until

from gr00t_fast import Gr00tPolicy, load_policy
from gr00t_fast.base.contracts import ActionPrefix
from gr00t_fast.base.errors import EngineError, StaleEngineError
from gr00t_fast.base.measurement import StageTimer
from gr00t_fast.cli.export import onnx as main
from gr00t_fast.engine.exported import OnnxRuntimeEngine

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ASKED = 1e-5  # relative L2 in fp32, each stage against the plain model
CLOSE_DEG = 2e-3  # of joint ranges near 100 degrees
ROOT = Path(__file__).resolve().parents[3]
NETWORK = Sizes(language=(48, 96, 2, 4, 2, 16), vl=(2, 4, 12), dit=(3, 4, 12), vision=(32, 64, 2, 2))
TWO = "so100_dualcam"


@pytest.fixture(scope="module")
def dualcam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("two_cameras"), NETWORK, data_config=TWO)


@pytest.fixture(scope="module")
def exported(dualcam: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(dualcam, tmp_path_factory.mktemp("exports") / "onnx", TWO)


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


def _load(checkpoint: Path, export: Path, **options) -> Gr00tPolicy:
    return load_policy(checkpoint, **({"data_config": TWO, "engine": "onnxruntime", "engine_path": export, "device": "cpu", "seed": 0} | options))


@pytest.fixture(scope="module")
def policy(dualcam: Path, exported: Path) -> Gr00tPolicy:
    return _load(dualcam, exported)


@pytest.fixture(scope="module")
def eager(dualcam: Path) -> Gr00tPolicy:
    return load_policy(dualcam, data_config=TWO, device="cpu", precision="fp32", seed=0)


def _noise(batch: int = 1) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, 16, 32)).astype(np.float32)


def _assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], rtol=0, atol=CLOSE_DEG)


@pytest.mark.slow
def test_memory_of_torch_gives_the_same_and_a_gpu_that_is_not_taken_is_refused(policy: Gr00tPolicy, dualcam: Path, exported: Path) -> None:
    bound = _load(dualcam, exported)
    bound.engine.runtime.bound = True  # as on a GPU
    _assert_close(*(each.get_action(observation(TWO, batch=2), noise=_noise(2)) for each in (bound, policy)))
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(EngineError, match=r"CPUExecutionProvider.*onnxruntime-gpu"), pytest.warns(UserWarning, match="CUDA"):
            _load(dualcam, exported, device="cuda")


# --- parity --------------------------------------------------------------------------------------------------------------------------


def _assert_stages_agree(export: Path, checkpoint: Path, inputs, noise: torch.Tensor) -> None:
    for stage, (given, expected) in stages_of(load_network(checkpoint), inputs, noise, steps=4).items():
        session = ort.InferenceSession(str(export / f"{stage}.onnx"), providers=["CPUExecutionProvider"])
        got = session.run(list(expected), {name: value.contiguous().numpy() for name, value in given.items()})
        for name, value in zip(expected, got, strict=True):
            assert relative_error(torch.from_numpy(value), expected[name]) < ASKED, f"{stage}: {name}"


@pytest.mark.slow
def test_each_stage_of_the_golden_network(golden_dir: Path, tmp_path: Path) -> None:
    golden = load_case(golden_dir / "so100", "plain")
    checkpoint = golden.checkpoint
    export = make_export(checkpoint, tmp_path / "onnx", "so100")
    _assert_stages_agree(export, checkpoint, golden.inputs, golden.noise)
    engine = OnnxRuntimeEngine(export, target_for(checkpoint), "cpu", "auto")
    actions = engine.run(golden.inputs, golden.noise, 1, StageTimer())
    assert relative_error(actions, golden.action_pred(1)) < ASKED  # NVIDIA's own recording


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_actions_are_those_of_the_eager_engine(policy: Gr00tPolicy, eager: Gr00tPolicy, steps: int) -> None:
    policy.denoising_steps = eager.denoising_steps = steps
    seen, noise = observation(TWO, instruction="put it there"), _noise()
    _assert_close(policy.get_action(seen, noise=noise), eager.get_action(seen, noise=noise))
    assert set(policy.last_timing) == {"preprocess", "vision", "language", "denoise", "postprocess", "total"}


@pytest.mark.parametrize("instructions", [["pick", "put the red block into the bowl"], ["pick a", "pick b"]], ids=["unequal", "equal"])
def test_batches_are_those_of_the_eager_engine(policy: Gr00tPolicy, eager: Gr00tPolicy, instructions: list[str]) -> None:
    policy.denoising_steps = eager.denoising_steps = 2
    seen, noise = observation(TWO, batch=2, instruction=instructions), _noise(2)
    together = policy.get_action(seen, noise=noise)
    _assert_close(together, eager.get_action(seen, noise=noise))
    for item in range(2):
        alone = policy.get_action({key: value[item] for key, value in seen.items()}, noise=noise[item : item + 1])
        assert all(np.array_equal(together[key][item], alone[key]) for key in alone), "an item depends on its neighbours"


def test_a_chunk_is_continued_by_prefix(policy: Gr00tPolicy, eager: Gr00tPolicy) -> None:
    policy.denoising_steps = eager.denoising_steps = 4
    seen, noise = observation(TWO), _noise()
    before = eager.get_action(observation(TWO, seed=5), noise=noise)
    prefix = ActionPrefix({key: value[4:12] for key, value in before.items()}, 2)
    ours, theirs = (each.get_action(seen, noise=noise, prefix=prefix) for each in (policy, eager))
    _assert_close(ours, theirs)
    assert np.abs(ours["action.single_arm"] - policy.get_action(seen, noise=noise)["action.single_arm"]).max() > 0.1


# --- the files -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["vision", "language", "denoise_step"])
def test_weights_are_stored_once_as_products_take_them_and_beside_the_graph(exported: Path, stage: str) -> None:
    model = onnx.load(str(exported / f"{stage}.onnx"))
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    weights = {weight.name: weight for weight in model.graph.initializer}
    fed = [name for node in model.graph.node if node.op_type == "Transpose" for name in node.input]
    assert not weights.keys() & set(fed), "a weight is transposed at run time"
    products = [node.input[1] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert len(products) == len(set(products)) > 3
    contents = [bytes(weight.raw_data) for name, weight in weights.items() if name in products]
    assert len(contents) == len(set(contents)), "a weight is there twice"
    own = {node.op_type for node in model.graph.node if node.domain}
    assert own == set(), f"operators that other runtimes do not know: {own}"
    assert {file.name for file in exported.glob(f"{stage}*")} == {f"{stage}.onnx", f"{stage}.onnx.data"}
    assert str(ROOT).encode() not in (exported / f"{stage}.onnx").read_bytes(), "the file tells where it was made"


# --- what is refused -----------------------------------------------------------------------------------------------------------------


def _refused(error: type[Exception], load: Callable[[], object], *told: str) -> None:
    with pytest.raises(error) as caught:
        load()
    assert all(text in str(caught.value) for text in told), str(caught.value)


def test_an_export_of_another_checkpoint_or_for_another_runtime(dualcam: Path, export: Path, tmp_path: Path) -> None:
    other = write_network(tmp_path / "other", NETWORK, seed=1, data_config=TWO)
    command = f"gr00t-fast export onnx --model_path={other} --embodiment_tag=new_embodiment --data_config={TWO} --out={export}"
    _refused(StaleEngineError, lambda: _load(other, export), "other weights", command, "--precision=fp32", "--overwrite")
    edit_json(export / "manifest.json", "quantisation", {"format": "int8", "runtime": "tensorrt"})
    _refused(EngineError, lambda: _load(dualcam, export), "made for 'tensorrt'", "--engine=tensorrt", "gr00t-fast quantise")


@pytest.fixture(scope="module")
def low(checkpoint: Path, tiny_engines: Path) -> Gr00tPolicy:
    """In fp16: graphs that TensorRT's engines were made from."""
    graphs = tiny_engines.with_name("engines-onnx")
    return load_policy(checkpoint, engine="onnxruntime", engine_path=graphs, device="cpu", precision="fp16")


@pytest.mark.slow
def test_fp16_is_computed_through_casts(checkpoint: Path, low: Gr00tPolicy) -> None:
    full = load_policy(checkpoint, device="cpu", precision="fp32")
    seen, noise = observation(), _noise()
    error = low.get_action(seen, noise=noise)["action.single_arm"] - full.get_action(seen, noise=noise)["action.single_arm"]
    assert 0 < np.abs(error).max() < 1.0  # degrees; fp16 keeps three digits of some hundred


# --- the program ---------------------------------------------------------------------------------------------------------------------


def test_the_program_leaves_no_half_export(dualcam: Path, tmp_path: Path) -> None:
    """By its older name."""
    words = [str(ROOT / "export" / "to_onnx.py"), f"--model_path={dualcam}", f"--out={tmp_path / 'killed'}", f"--data_config={TWO}"]
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    until(lambda: any(tmp_path.glob(".killed.partial-*/tables.safetensors")))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--precision=int8",), "is not one of fp32"),
        (("--data_config=so100",), "the data config reads video.webcam"),
        (("--embodiment_tag=new_embodimnt",), "Did you mean 'new_embodiment'?"),
        (("--denoising_steps", "0"), "--denoising_steps=0"),
        (("--max_text_tokens=3",), "Give at least"),
        (("--out=EXPORTED",), "exists and is not empty"),
    ],
)
def test_the_program_refuses(
    dualcam: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: str
) -> None:
    given = (flag.replace("EXPORTED", str(exported)) for flag in flags)
    assert main([f"--model_path={dualcam}", f"--out={tmp_path / 'out'}", f"--data_config={TWO}", *given]) != 0
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
