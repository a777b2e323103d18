"""The import arrow, and what importing costs and touches. Each rule is also shown to fail on a sample that breaks it."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import import_rules as rules
import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = (
    *("lerobot", "scservo_sdk", "serial", "mujoco", "matplotlib", "imageio", "imageio_ffmpeg", "zmq", "msgpack", "onnx", "onnxruntime"),
    *("tensorrt", "tensorrt_rtx", "transformers", "diffusers", "psutil", "pandas", "PIL", "rerun", "gr00t", "triton"),
)
DECORATED = ("gr00t_fast.engine.fp8_kernel", "gr00t_fast.serving.ray_app")  # by Triton, by Ray, when the module is imported
IMPORT_BUDGET_S = 1.5
# Module of each optional package -> the requirement of setup.cfg that brings it.
REQUIREMENT_OF = {
    "prometheus_client": "prometheus-client",
    "lerobot": "lerobot[feetech]",
    "av": "lerobot[feetech]",
    "datasets": "lerobot[feetech]",
    "scservo_sdk": "lerobot[feetech]",
    "serial": "lerobot[feetech]",
    "zmq": "pyzmq",
    "rerun": "rerun-sdk",
    "imageio_ffmpeg": "imageio-ffmpeg",
}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return rules.read_sources(ROOT)


def test_imports_follow_the_arrow(sources: dict[str, str]) -> None:
    assert rules.arrow_violations(sources) == []


def test_only_core_packages_are_imported_at_import_time(sources: dict[str, str]) -> None:
    assert rules.package_violations(sources) == []


def test_every_required_package_is_brought_by_the_extra_that_the_message_names(sources: dict[str, str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    wanted = rules.required_extras(sources)
    assert wanted, "no call of require() found: the reader of sources is broken"
    for module, extra in wanted:
        assert REQUIREMENT_OF.get(module, module) in extras.get(extra, ""), f"require('{module}', '{extra}') names the wrong extra"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("gr00t_fast.model.action_head", "from gr00t_fast.engine import eager"),
        ("gr00t_fast.model.action_head", "from gr00t_fast.errors import ConfigError"),  # the model knows only its configuration
        ("gr00t_fast.checkpoint.load", "def f():\n    from gr00t_fast.engine import ENGINES"),
        ("gr00t_fast.control.loop", "from gr00t_fast.robots.config import RobotConfig"),
        ("gr00t_fast.cli", "from benchmarks import bench_policy"),
        ("benchmarks.bench_policy", "import tests.conftest"),
        ("gr00t_fast.model.config", "from gr00t_fast.unheard_of import x"),
        ("gr00t_fast.unheard_of", "from gr00t_fast.errors import ConfigError"),
    ],
)
def test_the_arrow_rule_refuses(sources: dict[str, str], module: str, line: str) -> None:
    sample = {**sources, module: line, "gr00t_fast.unheard_of": "", "gr00t_fast.serving": ""} | {module: line}
    assert len([found for found in rules.arrow_violations(sample) if found.startswith(f"{module}:")]) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("gr00t_fast.model.action_head", "import torch\nfrom gr00t_fast.model.config import DiTConfig\nfrom gr00t_fast.model.layers import GeluMLP"),
        ("gr00t_fast.serving.server", "from gr00t_fast.policy import load_policy\nfrom gr00t_fast.contracts import Policy"),
        ("benchmarks.one", "from benchmarks import two\nfrom benchmarks.lib.random_checkpoint import write"),
        ("some_script", "from gr00t_fast.control.loop import ControlLoop\nfrom gr00t_fast.engine import ENGINES"),
    ],
)
def test_the_arrow_rule_allows(sources: dict[str, str], module: str, line: str) -> None:
    sample = {**sources, module: line}
    assert [found for found in rules.arrow_violations(sample) if found.startswith(f"{module}:")] == []


@pytest.mark.parametrize(
    ("module", "line", "allowed"),
    [
        ("gr00t_fast.control.report", "try:\n    import matplotlib\nexcept ImportError:\n    pass", False),
        ("gr00t_fast.control.report", "def plot():\n    import matplotlib", True),
        ("gr00t_fast.control.report", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import matplotlib", True),
        ("gr00t_fast.policy", "import yaml", False),
        ("gr00t_fast.flags", "import yaml", True),
        ("gr00t_fast.model.action_head", "import numpy", False),
        ("gr00t_fast.inputs.transforms", "import cv2, json, torch.nn", True),
    ],
)
def test_the_package_rule(module: str, line: str, allowed: bool) -> None:
    assert (rules.package_violations({module: line}) == []) is allowed


def test_the_other_rules_refuse() -> None:
    assert rules.required_extras({"m": "def f():\n    return require('a.b', 'extra').x"}) == {("a", "extra")}
    with pytest.raises(ValueError, match="relative import"):
        rules.imports("from . import x", "gr00t_fast.m")


# --- what importing does, measured in fresh interpreters -----------------------------------------------------------------------------

_BLOCKER = """
import sys
class Blocker:
    def __init__(self, names): self.names = set(names)
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked: it must not be needed here", name=name)
def block(*names): sys.meta_path.insert(0, Blocker(names))
"""

_FACADE = """
import sys, time
before = set(sys.modules)
start = time.perf_counter()
import gr00t_fast
print(time.perf_counter() - start)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
print(*sorted(name for name in sys.modules if name.startswith("gr00t_fast")))
"""

_SIDE_EFFECTS = """
import importlib, logging, os, random, signal, threading, torch
def state():
    return {
        "grad": torch.is_grad_enabled(), "dtype": torch.get_default_dtype(), "threads": torch.get_num_threads(),
        "torch seed": torch.initial_seed(), "matmul": torch.get_float32_matmul_precision(), "cuda": torch.cuda.is_initialized(),
        "log handlers": list(logging.getLogger().handlers), "log level": logging.getLogger().level, "environment": dict(os.environ),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], "running threads": threading.active_count(),
        "random": random.getstate(), "directory": os.getcwd(),
    }
before = state()
for module in modules: importlib.import_module(module)
print([name for name, value in state().items() if value != before[name]])
"""


def _run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == "", f"importing wrote to stderr: {done.stderr[-2000:]}"
    return done.stdout.splitlines()


def _importable(sources: dict[str, str]) -> list[str]:
    own = (name for name in sources if name.split(".")[0] == "gr00t_fast" or ("." not in name and name not in rules.OUTSIDE))
    return sorted(name for name in own if not name.endswith("__main__") and not name.startswith(DECORATED))


def test_importing_the_package_is_quick_and_imports_nothing_else() -> None:
    seconds, packages, modules = _run(_FACADE)
    assert float(seconds) < IMPORT_BUDGET_S
    assert packages.split() == ["gr00t_fast"]
    assert modules.split() == ["gr00t_fast"]


def test_model_engine_and_checkpoint_need_only_torch_safetensors_numpy_and_opencv(sources: dict[str, str]) -> None:
    modules = [name for name in _importable(sources) if rules.unit_of(name) in ("model", "engine", "checkpoint") and name != "gr00t_fast"]
    assert len(modules) > 10
    blocked = (*OPTIONAL, "yaml", "tokenizers", "huggingface_hub", "tqdm", "requests", "httpx")
    assert _run(f"{_BLOCKER}\nimport torch\nblock(*{blocked})\nmodules = {modules}\n{_SIDE_EFFECTS}") == ["[]"]


def test_every_module_imports_without_the_extras_and_without_side_effects(sources: dict[str, str]) -> None:
    modules = _importable(sources)
    assert "gr00t_fast.robots.lerobot_glue" in modules
    assert "so100_inference_optimized" in modules
    assert _run(f"{_BLOCKER}\nblock(*{OPTIONAL})\nmodules = {modules}\n{_SIDE_EFFECTS}") == ["[]"]


def test_the_blocker_blocks_and_side_effects_are_seen(tmp_path: Path) -> None:
    code = f"{_BLOCKER}\nblock('wave')\ntry:\n    import wave\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert _run(code) == ["wave"]
    (tmp_path / "careless.py").write_text("import logging, os\nlogging.getLogger().setLevel(1)\nos.environ['LEFT_BY_AN_IMPORT'] = '1'\n")
    found = _run(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nmodules = ['careless']\n{_SIDE_EFFECTS}")
    assert found == ["['log level', 'environment']"]
