"""The engines that a benchmark compares: opened over one network, each with what it took, or with why it cannot be used here."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.program import checkpoint_of
from benchmarks.random_observations import random_noise, random_observations
from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.data_config import load_data_config
from gr00t_fast.engine import CALIBRATED, EXPORTED, make_engine
from gr00t_fast.engine.calibration import Calibration
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.engine.graph import cuda_graph_engine
from gr00t_fast.engine.select import PRECISIONS
from gr00t_fast.errors import CheckpointError, ConfigError, EngineError, MissingExtraError, closest
from gr00t_fast.measurement import peak_rss_bytes
from gr00t_fast.model import Gr00tN1d5
from gr00t_fast.policy import Gr00tPolicy, load_policy
from gr00t_fast.random_checkpoint import random_network, write_random_checkpoint
from gr00t_fast.transforms import ActionTransform

REFERENCE, TRITON = "reference", "cuda_graph+triton"
ARMS = ("eager", "cuda_graph", TRITON, "compiled", *CALIBRATED, *EXPORTED, REFERENCE)
_UNUSABLE = (ConfigError, EngineError, MissingExtraError, CheckpointError)

Actions = dict[str, np.ndarray]


class Bench:
    """One network, from a checkpoint or random and made on the device, whose weights the engines over the torch model share."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        self.arguments, self.device, self.dtype = arguments, device, dtype
        self._on_device = arguments.model_path is None and device.type == "cuda"
        if self._on_device:
            self.path = arguments.out / f"random-{arguments.size}"
            write_random_checkpoint(self.path, arguments.size, arguments.data_config, weights=False)
        else:
            self.path = checkpoint_of(arguments, arguments.size)
        self._shared: Gr00tN1d5 | None = None
        policy = self.policy(EagerEngine(self.network(torch.bfloat16, meta=True)))
        self.observations = self._observations(policy)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network(torch.bfloat16, meta=True).parameters())

    def network(self, dtype: torch.dtype, meta: bool = False) -> Gr00tN1d5:
        """meta: without memory."""
        checkpoint = open_checkpoint(self.path, with_weights=not self._on_device)
        if meta:
            with torch.device("meta"):
                return Gr00tN1d5(checkpoint.config).to(dtype)
        if self._on_device:
            return random_network(checkpoint.config, self.device, self.dtype, self.arguments.seed).to(dtype)
        return load_model(checkpoint, self.arguments.embodiment_tag, self.device, dtype)

    @property
    def shared(self) -> Gr00tN1d5:
        if self._shared is None:
            self._shared = self.network(self.dtype)
        return self._shared

    def policy(self, engine: Any, **options: Any) -> Gr00tPolicy:
        """engine: a name, or an object."""
        if not isinstance(engine, str) and not hasattr(engine, "device"):
            engine.device, engine.dtype = engine.model.device, engine.model.dtype  # load_policy asks it of one that it did not make
        common = {name: getattr(self.arguments, name) for name in ("embodiment_tag", "data_config", "processor_path", "seed")}
        return load_policy(self.path, engine=engine, **common, **options)

    def open(self, name: str, directory: Path | None) -> tuple[Gr00tPolicy, str]:
        """The policy, and which limit is its. Raises one of `_UNUSABLE`."""
        if name in EXPORTED:
            device = str(self.device) if name == "tensorrt" else "auto"
            policy = self.policy(name, engine_path=directory, device=device)
            manifest = policy.engine.manifest
            return policy, (manifest.quantisation or {}).get("format") or manifest.precision
        if name == REFERENCE:
            from benchmarks.reference_policy import ReferenceEngine

            return self.policy(ReferenceEngine(self.path, self.arguments.embodiment_tag, self.device, self.dtype)), word_of(self.dtype)
        if name in CALIBRATED:
            return self._fp8(directory), name
        pixels = self.policy(EagerEngine(self.shared)).to_pixels
        engine = cuda_graph_engine(self.shared, pixels, "triton") if name == TRITON else make_engine(name, self.shared, pixels)
        return self.policy(engine), word_of(self.dtype)

    def _fp8(self, directory: Path | None) -> Gr00tPolicy:
        """With the calibration in `directory` or where it lies by default, else with one that is made here, on other observations than errors are
        measured on."""
        from gr00t_fast.engine.fp8 import check_gpu, fp8_engine

        check_gpu(self.device)
        if directory is not None or (self.path / "exports" / "fp8").is_dir():
            return self.policy("fp8", engine_path=directory, device=str(self.device), precision=word_of(self.dtype))
        model = self.network(torch.float32)
        calibration = self._calibration(model)
        pixels = self.policy(EagerEngine(model)).to_pixels
        return self.policy(fp8_engine(self.network(self.dtype), pixels, calibration))

    def _calibration(self, model: Gr00tN1d5) -> Calibration:
        from gr00t_fast.engine.fp8 import has_product
        from gr00t_fast.engine.quantized import PARTS
        from gr00t_fast.export.fp8 import SCHEME, TARGET, calibrate
        from gr00t_fast.export.progress import Progress
        from gr00t_fast.export.quantise import Settings
        from gr00t_fast.export.samples import network_inputs, transforms_only
        from gr00t_fast.export.verify import Case

        arguments, head = self.arguments, model.config.head
        common = {name: getattr(arguments, name) for name in ("embodiment_tag", "data_config", "processor_path")}
        transforms = transforms_only(self.path, **common)
        seen = random_observations(transforms, arguments.seed + 1, arguments.calibration_frames)
        cases = [Case(network_inputs(transforms, one), torch.from_numpy(random_noise(transforms, index))) for index, one in enumerate(seen)]
        trials = 0 if self._on_device else 8  # in a network with random weights there is no action for an error to be small against
        settings = Settings(SCHEME, TARGET, head.denoising_steps, trial_samples=trials, seed=arguments.seed)
        metadata = open_checkpoint(self.path, with_weights=False).embodiment(arguments.embodiment_tag)
        transform = ActionTransform(load_data_config(arguments.data_config), metadata, head.action_dim)
        return calibrate(model, cases, settings, not has_product(self.device), tuple(PARTS), transform, Progress())[1]

    def _observations(self, policy: Gr00tPolicy) -> list[dict[str, Any]]:
        """Of --dataset, spread over its episodes, or random pictures and joints. Raises ConfigError for a data set of another robot."""
        arguments = self.arguments
        if arguments.dataset is None:
            return random_observations(policy, arguments.seed, arguments.observations)
        from gr00t_fast.export.observations import draw, open_frames, read

        frames = open_frames(arguments.dataset, load_data_config(arguments.data_config), policy.facts, arguments.camera_map)
        return list(read(frames, draw(frames, arguments.observations, arguments.seed, allow_few=True), policy.facts))

    def answers(self, policy: Gr00tPolicy) -> list[Actions]:
        seed = self.arguments.seed
        return [policy.get_action(seen, noise=random_noise(policy, seed + index)) for index, seen in enumerate(self.observations)]


def open_arms(bench: Bench) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Name -> policy, limit, seconds of its first calls and memory that it took; name -> why an engine cannot be used here. Raises ConfigError for a
    name that is no engine's, and, where an engine that was named cannot be used, its error."""
    named = dict(map(_named, bench.arguments.engines))
    arms, refused = {}, {}
    for name, directory in (named or dict.fromkeys(ARMS)).items():
        before = _memory_bytes(bench.device)
        try:
            policy, limit = bench.open(name, directory)
            arm = {"policy": policy, "limit": limit, "first_calls_s": seconds_of(policy.warm_up)}
        except _UNUSABLE as error:
            if named:
                raise
            refused[name] = " ".join(str(error).split())
            continue
        arms[name] = arm | {"arithmetic": limit, "memory_bytes": max(_memory_bytes(bench.device) - before, 0)}
    return arms, refused


def _named(word: str) -> tuple[str, Path | None]:
    name, _, directory = word.partition("=")
    if name not in ARMS:
        raise ConfigError(f"--engines {word}: unknown engine.{closest(name, ARMS)} Expected some of {', '.join(ARMS)}, as NAME or NAME=DIRECTORY.")
    return name, Path(directory) if directory else None


def _memory_bytes(device: torch.device) -> int:
    """Held now: on the GPU by torch, else by the process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else peak_rss_bytes()


def word_of(dtype: torch.dtype) -> str:
    return next(word for word, kind in PRECISIONS.items() if kind == dtype)


def seconds_of(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return round(time.perf_counter() - began_s, 6)
