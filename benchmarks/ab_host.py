"""A process of `ab_server.py` of its own: a policy behind a socket, one that answers at once, or one that is timed from its start.

    python -m benchmarks.ab_host --answer='{"action.gripper": [16, 1]}' --address=tcp://127.0.0.1:5556     answers at once: transport alone
    python -m benchmarks.ab_host --model_path=DIR --preprocessing=reference --engine=reference --address=…    the reference behind a server
    python -m benchmarks.ab_host --model_path=DIR --engine=auto --calls=5                                    prints each call's time

Our own policy behind a server is not here: that is `python -m gr00t_fast.serving`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import numpy as np

from gr00t_fast.contracts import ModalityConfig
from gr00t_fast.errors import ConfigError, Gr00tFastError

REFERENCE = "reference"  # as a way to pre-process and as an engine


class InstantPolicy:
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
            if engine == REFERENCE:
                self._products[engine] = load_policy(self.model_path, **{**self._options, "engine": self._reference()})
            elif engine != first and first in self._products and engine == self._products[first].engine.name:
                return self._products[first]  # what `auto` took
            elif engine != first and engine in ENGINES and isinstance(self.ours.engine, EagerEngine):
                over = make_engine(engine, self.ours.engine.model, self.ours.to_pixels)
                self._products[engine] = load_policy(self.model_path, **{**self._options, "engine": over})
            else:
                self._products[engine] = load_policy(self.model_path, **{**self._options, "engine": engine})
        return self._products[engine]

    def _reference(self) -> Any:
        from benchmarks.reference_policy import ReferenceEngine
        from gr00t_fast.engine import select_device, select_precision

        if self._reference_engine is None:
            device = select_device(self._options["device"])
            dtype = select_precision(self._options["precision"], device)
            self._reference_engine = ReferenceEngine(self.model_path, self._options["embodiment_tag"], device, dtype)
        return self._reference_engine

    def _with_reference_preprocessing(self, engine: str, denoising_steps: int) -> Any:
        """Where the reference's engine runs behind it, nothing of ours is loaded."""
        from benchmarks.reference_policy import ReferencePreprocessingPolicy
        from gr00t_fast.data_config import load_data_config

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
    return hasattr(engine, "run_raw")


def example_inputs(facts: Any, config: Any, noise_shape: tuple[int, ...], size: tuple[int, int], seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """An observation with random pictures of (width, height) and joints in their range, and its noise. Never zeros: they can run faster.

    `facts.state_statistics` gives the ranges; without facts (an unknown server) joints are within +-1.
    """
    generator = np.random.default_rng(seed)
    observation: dict[str, Any] = {config.language_key: ["Place the block in the bowl"]}
    for key in config.video_keys:
        observation[key] = generator.integers(0, 256, (1, size[1], size[0], 3), dtype=np.uint8)
    for key in config.state_keys:
        low, high = _range(facts, key)
        observation[key] = generator.uniform(low, high)[None]
    return observation, generator.standard_normal(noise_shape, dtype=np.float32)


def _range(facts: Any, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a state part, from what the checkpoint or the arm's form says."""
    if facts is not None:
        statistics = facts.state_statistics[key.partition(".")[2]]
        return statistics.min, statistics.max
    widths = {"state.single_arm": 5, "state.gripper": 1}  # of an SO-100
    if key not in widths:
        raise ConfigError(f"the width of '{key}' is not known without the checkpoint: give --model_path.")
    return -np.ones(widths[key]), np.ones(widths[key])


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
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


def _policy(arguments: argparse.Namespace) -> Any:
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    names = ("embodiment_tag", "data_config", "device", "precision", "processor_path", "seed")
    options = {name: getattr(arguments, name) for name in names} | {"engine": "auto" if arguments.engine == REFERENCE else arguments.engine}
    policies = Policies(arguments.model_path, options)
    return policies.policy(arguments.preprocessing, arguments.engine, arguments.denoising_steps)


def _time_first_calls(arguments: argparse.Namespace) -> None:
    """One line of JSON per call, at once: the reader stamps the first one against the start of this process."""
    policy = _policy(arguments)
    with np.load(arguments.inputs) as file:
        observation = {key: file[key] for key in file if key != "noise"}
        noise = file["noise"]
    for _ in range(arguments.calls):
        began_s = time.perf_counter()
        policy.get_action(observation, noise)
        print(json.dumps({"call_ms": 1e3 * (time.perf_counter() - began_s)}), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--address", default="", help="ZeroMQ address to serve on")
    parser.add_argument("--answer", help="JSON of action shapes: serve zeros of these shapes instead of a checkpoint")
    parser.add_argument("--calls", type=int, default=0, help="time that many calls instead of serving")
    parser.add_argument("--inputs", type=Path, help="npz with the observation and noise of --calls")
    parser.add_argument("--model_path", type=Path)
    parser.add_argument("--preprocessing", choices=("ours", REFERENCE), default="ours")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--denoising_steps", type=int, default=4)
    parser.add_argument("--embodiment_tag", default="new_embodiment")
    parser.add_argument("--data_config", default="so100")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--processor_path", type=Path)
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
