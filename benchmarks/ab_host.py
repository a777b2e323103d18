"""A process of `ab_server.py` of its own: a policy behind a socket, one that answers at once, or one that is timed from its start.

    python -m benchmarks.ab_host --answer='{"action.gripper": [16, 1]}' --address=tcp://127.0.0.1:5556     answers at once: transport alone
    python -m benchmarks.ab_host --model_path=DIR --preprocessing=reference --engine=reference --address=…    the reference behind a server
    python -m benchmarks.ab_host --model_path=DIR --engine=auto --calls=5                                    prints each call's time

Our own policy behind a server is not here: that is `python -m gr00t_fast.serving`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from benchmarks.lib.program import Flags, read_flags
from gr00t_fast.contracts import ModalityConfig, Policy
from gr00t_fast.errors import ConfigError, Gr00tFastError, ServerError, ServerUnreachableError
from gr00t_fast.serving import PolicyClient

ROOT = Path(__file__).resolve().parent.parent
_PING_TIMEOUT_S = 1.0
_PROGRESS_EVERY_S = 5.0
_END_TIMEOUT_S = 10.0
_LOG_TAIL_CHARS = 2000


def thread_variables(threads: int) -> dict[str, str]:
    """What sets the thread count of every library that computes, when a process starts with it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
    return dict.fromkeys(names, str(threads))


def environment(threads: int) -> dict[str, str]:
    """This process's environment for a child with that many threads, which finds this checkout and writes its output as it comes."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **thread_variables(threads), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class Addresses:
    """Free addresses per transport; use as a context manager, which removes the socket files."""

    def __enter__(self) -> Addresses:
        self._directory = Path(tempfile.mkdtemp(prefix="ab-"))  # short: an ipc path may have some hundred bytes only
        self._count = 0
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def new(self, transport: str) -> str:
        """`tcp` or `ipc`. The TCP port was free a moment ago."""
        self._count += 1
        if transport == "ipc":
            return f"ipc://{self._directory}/{self._count}"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@dataclass
class ServerProcess:
    """One server and our client to it. `ready_s`: from the start of the process to its first answer to a ping."""

    command: list[str]
    address: str
    threads: int
    log: Path
    timeout_s: float
    process: subprocess.Popen[bytes] | None = None
    client: PolicyClient | None = None
    began_s: float = 0.0
    ready_s: float = 0.0

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self.began_s = time.monotonic()
            self.process = subprocess.Popen(self.command, env=environment(self.threads), stdout=output, stderr=subprocess.STDOUT)
        self.client = PolicyClient(address=self.address, timeout_s=self.timeout_s)

    def wait_ready(self, deadline_s: float) -> None:
        """Ping until it answers. Raises ServerError with the end of its output when it ends first, ServerUnreachableError at the deadline."""
        next_word_s = self.began_s + _PROGRESS_EVERY_S
        while not self.client.ping(_PING_TIMEOUT_S):
            now_s = time.monotonic()
            if self.process.poll() is not None:
                raise ServerError(f"the server '{' '.join(self.command[1:4])} …' ended with exit code {self.process.returncode}:\n{self.tail()}")
            if now_s > deadline_s:
                raise ServerUnreachableError(f"the server at {self.address} was not ready in {now_s - self.began_s:.0f} s. Its output: {self.log}")
            if now_s > next_word_s:
                print(f"waiting for the server at {self.address}: {now_s - self.began_s:.0f} s", file=sys.stderr)
                next_word_s = now_s + _PROGRESS_EVERY_S
        self.ready_s = time.monotonic() - self.began_s

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-_LOG_TAIL_CHARS:]

    def stop(self) -> None:
        """Ends the process whatever state it is in."""
        if self.client is not None:
            self.client.close()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextmanager
def running(servers: list[ServerProcess], patience_s: float) -> Iterator[None]:
    """All of them started at once and ready; ended afterwards."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(time.monotonic() + patience_s)
        yield
    finally:
        for server in servers:
            server.stop()


@dataclass
class ColdStart:
    """Start of a process to its first action, repeated. `calls_ms[k]`: the first calls of start k, the very first among them."""

    first_action_s: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)  # servers only
    calls_ms: list[list[float]] = field(default_factory=list)


def cold_start_of_server(server: ServerProcess, inputs: tuple[dict[str, Any], np.ndarray], calls: int, patience_s: float, into: ColdStart) -> None:
    """The client's process is running already; what it costs to start that one is not in the figure."""
    with running([server], patience_s):
        times_ms = []
        for number in range(calls):
            began_s = time.monotonic()
            server.client.get_action(*inputs)
            times_ms.append(1e3 * (time.monotonic() - began_s))
            if number == 0:
                into.first_action_s.append(time.monotonic() - server.began_s)
    into.ready_s.append(server.ready_s)
    into.calls_ms.append(times_ms)


def cold_start_in_process(command: list[str], threads: int, log: Path, into: ColdStart) -> None:
    """`command` prints a line of JSON after each call. Raises ServerError with the end of its output when it fails."""
    times_ms: list[float] = []
    with log.open("wb") as errors:
        began_s = time.monotonic()
        with subprocess.Popen(command, env=environment(threads), stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout:
                if not times_ms:
                    first_action_s = time.monotonic() - began_s
                times_ms.append(json.loads(line)["call_ms"])
    if process.returncode or not times_ms:
        raise ServerError(
            f"'{' '.join(command[1:4])} …' ended with exit code {process.returncode}:\n{log.read_text(errors='replace')[-_LOG_TAIL_CHARS:]}"
        )
    into.first_action_s.append(first_action_s)
    into.calls_ms.append(times_ms)


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say (only Linux does)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    return next((1024 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)


REFERENCE = "reference"  # as a way to pre-process and as an engine
POLICY_FLAGS = ("embodiment_tag", "data_config", "device", "precision", "processor_path", "seed")  # of `load_policy`, alike in every process


class InstantPolicy(Policy):
    """Answers zeros without looking: what is left of a call is transport."""

    def __init__(self, shapes: dict[str, list[int]]) -> None:
        self._actions = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}

    def get_action(self, observation: dict[str, Any], noise: Any = None) -> dict[str, np.ndarray]:
        return self._actions

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        return {}

    def reset(self) -> None:
        """Nothing is kept."""


class Policies:
    """Policies for one checkpoint that share networks: each is loaded when the first policy needs it.

    `options` are those of `load_policy`; `denoising_steps` is set per policy.
    """

    def __init__(self, model_path: Path, options: dict[str, Any]) -> None:
        self.model_path, self._options = model_path, options
        self._products: dict[str, Any] = {}
        self._reference_engine: Any = None

    @property
    def ours(self) -> Any:
        """The product's policy with the engine of the options."""
        return self._product(self._options["engine"])

    def policy(self, preprocessing: str, engine: str, denoising_steps: int) -> Any:
        """preprocessing `ours` or `reference`; engine `reference` or a name that `load_policy` knows. Raises Gr00tFastError."""
        if preprocessing == REFERENCE:
            return self._with_reference_preprocessing(engine, denoising_steps)
        policy = copy.copy(self._product(engine))  # the same transforms and network; only the number of steps is this one's own
        policy.denoising_steps = denoising_steps
        return policy

    def _product(self, engine: str) -> Any:
        """Our policy around that engine. Engines over the torch model share that of `eager`, where this is the one of the options."""
        from gr00t_fast.engine import ENGINES, make_engine
        from gr00t_fast.engine.eager import EagerEngine
        from gr00t_fast.policy import load_policy

        first = self._options["engine"]
        if engine not in self._products:
            if engine != first and first in self._products and engine == self._products[first].engine.name:
                return self._products[first]  # what `auto` took
            if engine == REFERENCE:
                over = self._reference()
            else:
                shares = engine != first and engine in ENGINES and isinstance(self.ours.engine, EagerEngine)
                over = make_engine(engine, self.ours.engine.model) if shares else engine
            self._products[engine] = load_policy(self.model_path, **{**self._options, "engine": over})
        return self._products[engine]

    def _reference(self) -> Any:
        from benchmarks.lib.reference import ReferenceEngine
        from gr00t_fast.engine import select_device, select_precision

        if self._reference_engine is None:
            device = select_device(self._options["device"])
            dtype = select_precision(self._options["precision"], device)
            self._reference_engine = ReferenceEngine(self.model_path, self._options["embodiment_tag"], device, dtype)
        return self._reference_engine

    def _with_reference_preprocessing(self, engine: str, denoising_steps: int) -> Any:
        """Where the reference's engine runs behind it, nothing of ours is loaded."""
        from benchmarks.lib.reference import ReferencePreprocessingPolicy
        from gr00t_fast.inputs.data_config import load_data_config

        if engine == REFERENCE:
            network = self._reference()
            place = (network.device, network.dtype)
        else:
            product = self._product(engine)
            if makes_pixels(product.engine):
                raise ConfigError(f"the engine '{product.engine.name}' makes the pixels itself: no other pre-processing can go before it. Use eager.")
            network, place = product.engine, (product.device, product.dtype)
        config, tag = load_data_config(self._options["data_config"]), self._options["embodiment_tag"]
        return ReferencePreprocessingPolicy(self.model_path, tag, config, self._options["processor_path"], network, place, denoising_steps)


def makes_pixels(engine: Any) -> bool:
    """Whether it takes frames as they are, so that pre-processing is part of it."""
    from gr00t_fast.engine.graph import GraphEngine

    return isinstance(engine, GraphEngine)


def example_inputs(metadata: Any, config: Any, noise_shape: tuple[int, ...], size: tuple[int, int], seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """An observation with random pictures of (width, height) and joints in their range, and its noise. Never zeros: they can run faster.

    `metadata.state_statistics` gives the ranges; without metadata (an unknown server) joints are within +-1.
    """
    generator = np.random.default_rng(seed)
    observation: dict[str, Any] = {config.language_key: ["Place the block in the bowl"]}
    for key in config.video_keys:
        observation[key] = generator.integers(0, 256, (1, size[1], size[0], 3), dtype=np.uint8)
    for key in config.state_keys:
        low, high = _range(metadata, key)
        observation[key] = generator.uniform(low, high)[None]
    return observation, generator.standard_normal(noise_shape, dtype=np.float32)


def _range(metadata: Any, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a state part, from what the checkpoint or the arm's form says."""
    if metadata is not None:
        statistics = metadata.state_statistics[key.partition(".")[2]]
        return statistics.min, statistics.max
    widths = {"state.single_arm": 5, "state.gripper": 1}  # of an SO-100
    if key not in widths:
        raise ConfigError(f"the width of '{key}' is not known without the checkpoint: give --model_path.")
    return -np.ones(widths[key]), np.ones(widths[key])


@dataclass
class Config(Flags):
    address: str = ""  # ZeroMQ address to serve on
    answer: str | None = None  # JSON of action shapes: serve zeros of these shapes instead of a checkpoint
    calls: int = 0  # time that many calls instead of serving
    inputs: Path | None = None  # npz with the observation and noise of --calls
    model_path: Path | None = None  # checkpoint directory
    preprocessing: Literal["ours", "reference"] = "ours"  # who makes tensors of frames
    engine: str = "auto"  # reference, or one of gr00t_fast
    denoising_steps: int = 4  # from noise to action
    embodiment_tag: str = "new_embodiment"  # which category weights and statistics of the checkpoint
    data_config: str = "so100"  # so100, so100_dualcam, or module:ClassName of your own
    precision: str = "auto"  # fp32, bf16, fp16
    processor_path: Path | None = None  # tokenizer files


def main(argv: list[str] | None = None) -> int:
    arguments = read_flags(Config, argv, __doc__)
    try:
        if arguments.calls:
            _time_first_calls(arguments)
        else:
            _serve(InstantPolicy(json.loads(arguments.answer)) if arguments.answer else _policy(arguments), arguments.address)
    except Gr00tFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(policy: Any, address: str) -> None:
    from gr00t_fast.serving import PolicyServer

    with PolicyServer(policy, address=address) as server:
        print(f"listening on {server.address}", flush=True)
        server.run()


def _policy(arguments: Config) -> Any:
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    options = {name: getattr(arguments, name) for name in POLICY_FLAGS} | {"engine": "auto" if arguments.engine == REFERENCE else arguments.engine}
    policies = Policies(arguments.model_path, options)
    return policies.policy(arguments.preprocessing, arguments.engine, arguments.denoising_steps)


def _time_first_calls(arguments: Config) -> None:
    """One line of JSON per call, at once: the reader stamps the first one against the start of this process."""
    policy = _policy(arguments)
    with np.load(arguments.inputs) as file:
        observation = {key: file[key] for key in file if key != "noise"}
        noise = file["noise"]
    for _ in range(arguments.calls):
        began_s = time.perf_counter()
        policy.get_action(observation, noise)
        print(json.dumps({"call_ms": 1e3 * (time.perf_counter() - began_s)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
