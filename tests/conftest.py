"""What all tests share: one thread, markers that say how to enable what they skip, and where reference data lie."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from exports import Made

    from gr00t_fast.virtual.bus import VirtualBus

ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported, so that no test pays for the import only to set this. One thread: spinning OpenMP barriers on a busy machine
# make two threads slower than one, and results repeat.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
if "torch" in sys.modules:  # a plugin was faster
    sys.modules["torch"].set_num_threads(1)


_SCHEDULING = (os.sched_getscheduler(0), os.sched_getparam(0)) if hasattr(os, "sched_getscheduler") else None  # Linux has it


@functools.cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_configure() -> None:
    """Signals as on a terminal, for the tests and for the programs that they start: a script's background job has Ctrl-C ignored, nohup SIGHUP."""
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip here and not at collection: only tests that would run make torch look for a GPU."""
    if item.get_closest_marker("gpu") and not _has_cuda():
        pytest.skip("needs a CUDA GPU and a CUDA build of torch: run `make gpu-check` where there is one")
    if item.get_closest_marker("weights") and not os.environ.get("GR00T_CHECKPOINT"):
        pytest.skip("needs a trained checkpoint: set GR00T_CHECKPOINT=DIR")
    if item.get_closest_marker("hardware") and not os.environ.get("SO100_PORT"):
        pytest.skip("moves a real SO-100: clear its surroundings and set SO100_PORT=/dev/ttyACM0")


@pytest.fixture(autouse=True, scope="module")
def _few_garbage_collections() -> Iterator[None]:
    """A run begins with a full collection: a second, where tests have loaded everything. What the first of a module exempts stays so to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of N1.5 for `so100`, for all tests together: one that changes it makes a copy."""
    from random_networks import write_network

    return write_network(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def bus() -> Iterator[VirtualBus]:
    """A virtual servo bus that runs."""
    from gr00t_fast.virtual.bus import VirtualBus

    with VirtualBus() as bus:
        yield bus


@pytest.fixture(autouse=True)
def ordinary_priority() -> Iterator[None]:
    """A test that leaves the process with a real-time priority makes later ones fail: whatever they wait for gets no processor."""
    yield
    if _SCHEDULING is not None and (left := os.sched_getscheduler(0)) != _SCHEDULING[0]:
        os.sched_setscheduler(0, *_SCHEDULING)
        pytest.fail(f"the test, or a fixture of its, left this thread with another scheduling policy ({left})")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The unreduced recordings of the reference and its tokenizers, for tests that need more than tests/golden/ has."""
    from golden.restore import SHARED

    if not SHARED.is_dir():
        pytest.skip("needs the unreduced reference data: set GR00T_FAST_SHARED to the directory that holds them (tests/golden/README.md)")
    return SHARED


@pytest.fixture(scope="session")
def restored_dir() -> Iterator[Callable[[str], Path]]:
    """Name -> that directory of the reference data, written from the reduced ones in tests/golden/ when it is first asked for."""
    from golden.restore import restore

    with tempfile.TemporaryDirectory() as root:
        yield functools.cache(lambda name: restore(name, Path(root)))


@pytest.fixture(scope="session")
def reference_root(restored_dir: Callable[[str], Path]) -> Callable[..., Path]:
    """Paths in the reference data -> the directory that has all of them: the unreduced data's, else the restored ones'."""
    from golden.restore import SHARED

    def root(*paths: str) -> Path:
        if all((SHARED / path).exists() for path in paths):
            return SHARED
        directories = [restored_dir(path.partition("/")[0]) for path in paths]
        return directories[0].parent

    return root


def _reference(name: str, file: str = ".") -> Any:
    """A fixture: the directory `name` of the reference data, which holds `file`."""

    @pytest.fixture(scope="session")
    def directory(reference_root: Callable[..., Path]) -> Path:
        return reference_root(f"{name}/{file}") / name

    return directory


eagle_dir = _reference("eagle2_hg_model", "vocab.json")  # tokenizer and processor files of Eagle
qwen_dir = _reference("qwen3_vl_processor", "vocab.json")  # tokenizer files of Qwen3-VL
golden_dir = _reference("golden")  # recorded outputs of the reference's N1.5 code
golden_n1d7_dir = _reference("golden_n1d7")  # recorded outputs of the reference's N1.7 code
n1d6_dir = _reference("n1d6_processor", "vocab.json")  # tokenizer files of N1.6's Eagle
golden_n1d6_dir = _reference("golden_n1d6")  # recorded outputs of the reference's N1.6 code


@pytest.fixture(scope="session")
def tiny_export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The small checkpoint and its fp32 ONNX export; read-only: several modules use the same, because exporting takes seconds."""
    from exports import Made, make_export

    return Made(checkpoint, make_export(checkpoint, tmp_path_factory.mktemp("tiny") / "onnx"))


@pytest.fixture(scope="session")
def tiny_engines(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TensorRT-RTX engines of the small checkpoint, for any GPU, made by the command; the fp16 graphs it exports lie beside them, in engines-onnx."""
    pytest.importorskip("tensorrt_rtx", reason="needs `pip install 'gr00t_fast[tensorrt_rtx]'`")
    from gr00t_fast.cli import export

    out = tmp_path_factory.mktemp("tensorrt") / "engines"
    more = ("--lang_instruction=pick: the cube", "--denoising_steps=3", "--max_text_tokens=99", "--builder=tensorrt_rtx", "--compute_capability=any")
    assert export.tensorrt([f"--model_path={checkpoint}", f"--out={out}", *more]) == 0
    return out
