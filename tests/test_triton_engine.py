"""What the `triton` engine says where it cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_networks import load_network, write_network

from gr00t_fast.engine import make_engine
from gr00t_fast.engine.triton_engine import TritonEngine
from gr00t_fast.errors import ConfigError

ROOT = Path(__file__).parent.parent


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine 'triton' needs a CUDA GPU.*--engine=eager"):
        make_engine("triton", load_network(write_network(tmp_path)), lambda frames: frames)


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    engine = SimpleNamespace(model=SimpleNamespace(device=torch.device("cuda")))
    with pytest.raises(ConfigError, match=r"needs compute capability 8.0, but this GPU has 7.5. Use --engine=cuda_graph"):
        TritonEngine._make_stages(engine)


def test_a_gpu_of_another_maker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ConfigError, match="ROCm"):
        TritonEngine._make_stages(SimpleNamespace())


def test_without_triton_the_message_names_the_extra_and_the_other_engines_import() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import gr00t_fast.engine.triton_engine\n"
        "from gr00t_fast.errors import MissingExtraError\n"
        "try:\n    import gr00t_fast.engine.kernels.stages\nexcept MissingExtraError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "needs the package 'triton'" in done.stdout, done.stderr
    assert "gr00t_fast[triton]" in done.stdout
