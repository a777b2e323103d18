"""The import arrow, what importing costs and touches, and packages of others."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import import_rules as rules
import pytest

from gr00t_fast.base import errors

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = (
    *("lerobot", "scservo_sdk", "serial", "mujoco", "matplotlib", "imageio", "imageio_ffmpeg", "zmq", "msgpack", "onnx", "onnxruntime"),
    *("tensorrt", "tensorrt_rtx", "transformers", "diffusers", "psutil", "pandas", "PIL", "rerun", "gr00t", "triton"),
    *("yaml", "tokenizers", "huggingface_hub", "tqdm", "requests", "httpx"),  # a plain policy, too, loads without importing them
)
DECORATED = ("gr00t_fast.serving.ray_app",)  # by Ray, when the module is imported
IMPORT_BUDGET_S = 1.5
# Module of each optional package -> the requirement of setup.cfg that brings it.
REQUIREMENT_OF = {
    **dict.fromkeys(("av", "datasets", "scservo_sdk", "serial"), "lerobot[feetech]"),
    "lerobot": "lerobot[feetech]",
    "prometheus_client": "prometheus-client",
    "zmq": "pyzmq",
    "rerun": "rerun-sdk",
    "imageio_ffmpeg": "imageio-ffmpeg",
}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return rules.read_sources(ROOT)


def test_imports_follow_the_arrow(sources: dict[str, str]) -> None:
    assert rules.arrow_violations(sources) == []
    against = "from gr00t_fast.control.loop import ControlLoop\ndef f():\n    from gr00t_fast.robots import RobotConfig"
    wrong = dict.fromkeys(("gr00t_fast.model.layers", "gr00t_fast.record.report", "gr00t_fast.robots.bus"), against)
    assert len(rules.arrow_violations(dict.fromkeys(sources, "") | wrong)) == 4, "the rule refuses what it should"


def test_every_required_package_is_brought_by_the_extra_that_the_message_names(sources: dict[str, str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = rules.required_extras(sources)
    assert wanted, "no call of require() found: the reader of sources is broken"
    for module, extra in wanted:
        brought = setup["options.extras_require"].get(extra, "")
        assert REQUIREMENT_OF.get(module, module) in brought, f"require('{module}', '{extra}') names the wrong extra"


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
print(*sorted(name for name in gr00t_fast.__all__ if getattr(gr00t_fast, name, None) is None))
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

# Audit hooks see every thread of the process; a refused connection is tried again by nobody. The sender's thread gets a moment.
_WATCHED = """
import sys, time
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.posix_spawn"):
        print("AUDIT", event, arguments, flush=True)
        raise OSError("not allowed here")
sys.addaudithook(note)
from gr00t_fast.base.errors import require
require("openvino", "openvino").Core().available_devices
from openvino.tools import ovc
time.sleep(0.5)
"""


def _run(code: str, **environment: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == "", f"importing wrote to stderr: {done.stderr[-2000:]}"
    return done.stdout.splitlines()


def test_importing_the_package_is_quick_and_imports_nothing_else() -> None:
    seconds, packages, modules, not_found = _run(_FACADE)
    assert float(seconds) < IMPORT_BUDGET_S
    assert packages.split() == ["gr00t_fast"]
    assert modules.split() == ["gr00t_fast"]
    assert not_found == "", "a name of the facade that is not there"


def test_what_builds_tensorrt_s_engines_in_processes_of_its_own_needs_no_torch() -> None:
    assert _run("import sys, gr00t_fast.export.tensorrt; print('torch' in sys.modules)") == ["False"]


def test_every_module_imports_without_the_extras_and_without_side_effects(sources: dict[str, str]) -> None:
    own = (name for name in sources if name.split(".")[0] == "gr00t_fast" or ("." not in name and name not in rules.OUTSIDE))
    modules = sorted(name for name in own if not name.endswith("__main__") and not name.startswith(DECORATED))
    assert {"gr00t_fast.robots.lerobot_glue", "so100_inference_optimized"} <= set(modules)
    assert _run(f"{_BLOCKER}\nimport torch\nblock(*{OPTIONAL})\nmodules = {modules}\n{_SIDE_EFFECTS}") == ["[]"]


def test_openvino_posts_nothing_and_writes_no_client_id(tmp_path: Path) -> None:
    pytest.importorskip("openvino_telemetry")
    assert _run(_WATCHED, HOME=str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lerobot", "python", "pins"),
    [
        ("0.4.4", (3, 12), "requirements/constraints.txt"),
        ("0.6.1", (3, 12), "requirements/constraints-py312.txt"),
        (None, (3, 11), "requirements/constraints.txt"),
    ],
)
def test_the_advice_fits_this_environment(lerobot: str | None, python: tuple[int, int], pins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With requirements/constraints.txt lerobot 0.6.1's own packages are taken back to versions that it does not start with."""
    missing = importlib.metadata.PackageNotFoundError()
    monkeypatch.setattr(importlib.metadata, "version", MagicMock(return_value=lerobot, side_effect=None if lerobot else missing))
    monkeypatch.setattr(sys, "version_info", python)
    assert errors.install_command("sim").startswith(f"pip install -e '.[sim]' -c {pins} ")
    assert "\nlerobot==" in (ROOT / pins).read_text()
    assert ("-c requirements/constraints.txt (" in (advice := errors.install_command("bench"))) is True
    assert ("Python 3.11" in advice) == (lerobot == "0.6.1")
    monkeypatch.setattr(errors, "_ROOT", ROOT / "tests")  # as of a wheel, beside which no pins lie
    assert errors.install_command("sim") == "pip install 'gr00t_fast[sim]'"
