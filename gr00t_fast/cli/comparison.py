"""Engines over one network side by side: opened, compared with the plain model in fp32, and timed in turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gr00t_fast.checkpoint import load_model, open_checkpoint
from gr00t_fast.cli.bench import BenchConfig
from gr00t_fast.cli.policy_flags import camera_size
from gr00t_fast.dataset import draw, open_frames, read
from gr00t_fast.engine import CALIBRATED, EXPORTED, make_engine, warming_up
from gr00t_fast.engine.base import PRECISIONS
from gr00t_fast.engine.choose import ENGINES
from gr00t_fast.engine.eager import EagerEngine
from gr00t_fast.errors import CheckpointError, ConfigError, EngineError, MissingExtraError, closest
from gr00t_fast.export.verify import ACTION_LIMITS
from gr00t_fast.flags import UsageError
from gr00t_fast.measurement import peak_rss_bytes, percentiles
from gr00t_fast.model import Gr00t
from gr00t_fast.policy import Gr00tPolicy, load_policy

ARMS = (*ENGINES, *CALIBRATED, *EXPORTED)
UNUSABLE = (ConfigError, EngineError, MissingExtraError, CheckpointError)
# Where the plain model in the same precision is itself further from fp32 than the limit (a network with random weights amplifies rounding), an
# engine may be this much further than that.
_OF_EAGER = 1.5
LEAST_ROUNDS = 10

Times = dict[str, list[float]]
Actions = dict[str, np.ndarray]


class Bench:
    """One network, from a checkpoint or random and made on the device, whose weights the engines over the torch model share."""

    names: tuple[str, ...] = ARMS
    compared_with: tuple[str, ...] = ("eager", "cuda_graph")  # whose times are divided by an engine's
    end_s: float | None = None  # by time.perf_counter(): after it no further round is timed, but for the first LEAST_ROUNDS

    def __init__(self, options: BenchConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Raises CheckpointError and ConfigError where the small files or the observations do not fit."""
        self.options, self.device, self.dtype = options, device, dtype
        self.path = self._checkpoint()
        self._shared: Gr00t | None = None
        self.camera_sizes: dict[str, tuple[int, int]] = {}
        self.observations = self._observations(self.policy(EagerEngine(self.network(torch.bfloat16, meta=True))))
        self.camera_sizes = camera_sizes_in(self.observations[0])

    def _checkpoint(self) -> Path:
        return open_checkpoint(self.options.model_path, revision=self.options.revision).path

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network(torch.bfloat16, meta=True).parameters())

    def network(self, dtype: torch.dtype, meta: bool = False) -> Gr00t:
        """meta: without memory."""
        if meta:
            with torch.device("meta"):
                return Gr00t(open_checkpoint(self.path, with_weights=False).config).to(dtype)
        return load_model(open_checkpoint(self.path), self.options.embodiment_tag, self.device, dtype)

    @property
    def shared(self) -> Gr00t:
        if self._shared is None:
            self._shared = self.network(self.dtype)
        return self._shared

    def policy(self, engine: Any, **options: Any) -> Gr00tPolicy:
        """engine: a name, or an object."""
        names = ("embodiment_tag", "data_config", "processor_path", "prompt_style", "letterbox", "seed")
        policy = load_policy(self.path, engine=engine, **{name: getattr(self.options, name) for name in names}, **options)
        policy.expect_cameras(self.camera_sizes)
        return policy

    def open(self, name: str, directory: Path | None) -> tuple[Gr00tPolicy, str]:
        """The policy, and which of ACTION_LIMITS is its. Raises one of `UNUSABLE`."""
        if name in EXPORTED:
            policy = self.policy(name, engine_path=directory, device=str(self.device) if name == "tensorrt" else "auto")
            return policy, policy.precision
        if name in CALIBRATED:
            return self.policy(name, engine_path=directory, device=str(self.device), precision=word_of(self.dtype)), name
        return self.policy(make_engine(name, self.shared)), word_of(self.dtype)

    def _observations(self, policy: Gr00tPolicy) -> list[dict[str, Any]]:
        """Of --observations, spread over its episodes, or random pictures and joints. Raises ConfigError for a data set of another robot."""
        options = self.options
        if options.observations is None:
            if (size := camera_size(options)) is not None:
                policy.expect_cameras(dict.fromkeys(policy.metadata.resolutions, size))
            return random_observations(policy, options.seed, options.frames)
        frames = open_frames(options.observations, policy.processor.data_config, policy.metadata, options.camera_map)
        return list(read(frames, draw(frames, options.frames, options.seed, allow_few=True), policy.metadata))

    def say(self, text: str) -> None:
        """What is being done, on standard error: each part takes seconds to minutes."""
        if not self.options.quiet:
            print(text, file=sys.stderr, flush=True)

    def answer(self, policy: Gr00tPolicy, index: int) -> Actions:
        """To observation `index`, with noise of its own."""
        with warming_up(policy.engine):  # a prompt that it meets for the first time makes no arm wait here
            return policy.get_action(self.observations[index], noise=random_noise(policy, self.options.seed + index))

    def answers(self, policy: Gr00tPolicy) -> list[Actions]:
        return [self.answer(policy, index) for index in range(len(self.observations))]


def open_arms(bench: Bench) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Name -> policy, limit, seconds of its first calls and memory that it took; name -> why an engine cannot be used here. Raises ConfigError for a
    name that is no engine's, and, where an engine that was named cannot be used, its error."""
    named = dict(_named(word, bench.names) for word in bench.options.engines)
    arms, refused = {}, {}
    for name, directory in (named or dict.fromkeys(bench.names)).items():
        before = _memory_bytes(bench.device)
        bench.say(f"{name}: opening and warming up{', which compiles for minutes' if name == 'compiled' else ''} ...")
        try:
            policy, limit = bench.open(name, directory)
            arm = {"policy": policy, "limit": limit, "first_calls_s": seconds_of(policy.warm_up)}
        except UNUSABLE as error:
            if named:
                raise
            refused[name] = " ".join(str(error).split())
            continue
        arms[name] = arm | {"arithmetic": limit, "memory_bytes": max(_memory_bytes(bench.device) - before, 0)}
    return arms, refused


def _named(word: str, names: Sequence[str]) -> tuple[str, Path | None]:
    name, _, directory = word.partition("=")
    if name not in names:
        raise UsageError(f"--engines={word}: unknown engine.{closest(name, names)} Expected some of {', '.join(names)}, as NAME or NAME=DIRECTORY.")
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


def error_of(got: Sequence[Actions], truth: Sequence[Actions]) -> dict[str, float]:
    """|difference| over all observations, times and joints, in joint units: degrees, per cent for the gripper. NaN where an action is NaN."""
    gaps = np.concatenate([np.abs(mine[key] - theirs[key]).ravel() for mine, theirs in zip(got, truth, strict=True) for key in theirs])
    p50, p99 = np.percentile(gaps, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "max": float(gaps.max())}


def within_limit(errors: Mapping[str, dict[str, float]], name: str, format: str, dtype: torch.dtype) -> bool:
    """NaN is no pass."""
    limit = ACTION_LIMITS[format]
    if format == word_of(dtype) and "eager" in errors and errors["eager"]["p99"] > limit:
        limit = _OF_EAGER * errors["eager"]["p99"]
    return bool(errors[name]["p99"] <= limit)


def take_turns(policies: Mapping[str, Gr00tPolicy], steps: int, options: BenchConfig, end_s: float | None = None) -> tuple[Times, Times]:
    """ms of whole calls, by the clock and of processor time. Each round calls every engine once, in an order of its own: a disturbance hits all
    alike. `end_s`: as of Bench."""
    generator, names = np.random.default_rng(options.seed), list(policies)
    for policy in policies.values():
        policy.denoising_steps = steps
        policy.warm_up()
    observations = random_observations(policies[names[0]], options.seed, 8)
    times, busy = ({name: [] for name in names} for _ in range(2))
    for number in range(options.rounds):
        if end_s is not None and number >= LEAST_ROUNDS and time.perf_counter() > end_s:
            break
        observation = observations[number % len(observations)]
        for name in generator.permutation(names):
            busy_s = time.process_time()
            times[name].append(1000 * seconds_of(partial(policies[name].get_action, observation)))
            busy[name].append(1000 * (time.process_time() - busy_s))
        show_progress("round", number + 1, options.rounds)
    return times, busy


def ratio(times: Mapping[str, list[float]], of: str, name: str) -> dict[str, float] | None:
    """How many times as fast as `of` it is, paired by round: median and quartiles. None where `of` did not run."""
    if of not in times or of == name:
        return None
    paired = [theirs / max(mine, 1e-6) for mine, theirs in zip(times[name], times[of], strict=True)]
    low, high = np.percentile(paired, (25, 75))
    return {"median": round(statistics.median(paired), 3), "p25": round(float(low), 3), "p75": round(float(high), 3)}


def compare(bench: Bench) -> dict[str, Any]:
    """Errors, times and memory of all engines, JSON-ready but for `policy` of each. Raises as `open_arms`."""
    options, device, dtype = bench.options, bench.device, bench.dtype
    bench.say(f"eager in fp32 answers {len(bench.observations)} observations, for the errors of the others ...")
    truth = bench.answers(bench.policy(EagerEngine(bench.network(torch.float32))))  # freed before the engines come
    arms, refused = open_arms(bench)
    bench.say(f"{len(arms)} engines answer them ...")
    for index, arm in enumerate(arms.values()):
        arm["error_deg"] = error_of(bench.answers(arm["policy"]), truth)
        show_progress("error", index + 1, len(arms))
    policies = {name: arm["policy"] for name, arm in arms.items()}
    for count in options.denoising_steps or [next(iter(policies.values())).denoising_steps]:
        bench.say(f"timing in turns: {options.rounds} rounds at {count} denoising steps ...")
        times, busy = take_turns(policies, count, options, bench.end_s)
        for name, arm in arms.items():
            arm.setdefault("times_ms", {})[str(count)] = percentiles(times[name])
            ratios = {of: ratio(times, of, name) for of in bench.compared_with}
            # on a shared machine what was computed says more than how long it took; a GPU's work is not in it
            ratios |= {"eager_in_processor_time": ratio(busy, "eager", name)} if device.type == "cpu" else {}
            arm.setdefault("times_as_fast_as", {})[str(count)] = ratios
    errors = {name: arm["error_deg"] for name, arm in arms.items()}
    for name, arm in arms.items():
        arm["within_limit"] = within_limit(errors, name, arm["limit"], dtype)
    return {
        "network": bench.path.name,
        "parameters": bench.parameters,
        "cameras": len(next(iter(policies.values())).metadata.resolutions),
        "observations": len(truth),
        "of": Path(options.observations).name if options.observations else "random pictures and joints",
        "rounds": min(len(each) for each in times.values()),
        "engines": arms,
        "refused": refused,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def table_rows(result: Mapping[str, Any], after: Callable[[Mapping[str, Any]], list[str]] = lambda arm: []) -> list[str]:
    """A row per engine and step count; `after`: more rows below an engine's."""
    rows = [f"{result['network']}, {result['precision']} on {result['device']}; errors in joint units over {result['observations']} observations of"]
    rows += [f"{result['of']}, against eager fp32", ""]
    rows += [f"{'engine':<18} {'steps':>5} {'p50 ms':>9} {'p95':>9} {'p99':>9} {'x eager':>8} {'error p99':>9} {'max':>9} {'MB':>7}  verdict"]
    for name, arm in result["engines"].items():
        for steps, t in arm["times_ms"].items():
            faster = arm["times_as_fast_as"][steps]["eager"]
            judged = "within its limit" if arm["within_limit"] else "ERROR ABOVE ITS LIMIT: do not use it"
            e, of = arm["error_deg"], "-" if faster is None else f"{faster['median']:.2f}"
            cells = f"{t['p50']:>9.3f} {t['p95']:>9.3f} {t['p99']:>9.3f} {of:>8} {e['p99']:>9.4f} {e['max']:>9.4f} {arm['memory_bytes'] / 1e6:>7.0f}"
            rows.append(f"{name:<18} {steps:>5} {cells}  {arm['arithmetic']}, {judged}")
        rows += after(arm)
    return [*rows, "", *(f"{name} cannot be used here: {reason}" for name, reason in result["refused"].items())]


def verdict(result: Mapping[str, Any], apart_from: str = "") -> str:
    """The fastest engine whose error is within its limit."""
    able = {name: arm for name, arm in result["engines"].items() if arm["within_limit"] and name != apart_from}
    if not able:
        return "no engine keeps its limit on the error here"
    steps = next(iter(next(iter(able.values()))["times_ms"]))
    best = min(able, key=lambda name: able[name]["times_ms"][steps]["p50"])
    return f"fastest within its limit: {best}, {able[best]['times_ms'][steps]['p50']:.3f} ms at {steps} steps"


def show_progress(what: str, done: int, total: int) -> None:
    """One line on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


def camera_sizes_in(observation: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Camera -> (width, height)."""
    frames = {key.removeprefix("video."): value.shape for key, value in observation.items() if key.startswith("video.")}
    return {camera: (shape[-2], shape[-3]) for camera, shape in frames.items()}


def random_observations(policy: Gr00tPolicy, seed: int, count: int) -> list[dict[str, Any]]:
    """Unbatched, with the example's instruction: random pictures, joints anywhere in their training range. Never zeros: they can run faster."""
    generator, example, metadata = np.random.default_rng(seed), policy.example_observation(), policy.metadata
    found = []
    for _ in range(count):
        observation = dict(example)
        for key, value in example.items():
            modality, _, name = key.partition(".")
            if modality == "video":
                observation[key] = generator.integers(0, 256, value.shape, dtype=np.uint8)
            elif modality == "state":
                ranges = metadata.state_statistics[name]
                observation[key] = generator.uniform(ranges.min, ranges.max)[None]
        found.append(observation)
    return found


def random_noise(policy: Gr00tPolicy, seed: int) -> np.ndarray:
    """fp32 (1, H, A)."""
    return np.random.default_rng(seed).standard_normal((1, *policy.chunk_shape)).astype(np.float32)
