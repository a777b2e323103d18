"""Which engine is the fastest here, and whether its actions are right.

Engines over one network are opened, compared with the plain model in fp32, and timed in turns. `make_all` makes the files that they need first.
torch is imported in the functions that need it.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from gr00t_fast.base.console import progress_bar
from gr00t_fast.base.errors import (
    AT_LEAST_0,
    AT_LEAST_1,
    CheckpointError,
    ConfigError,
    EngineError,
    Gr00tFastError,
    MissingExtraError,
    check_ranges,
    closest,
    install_command,
    one_line,
)
from gr00t_fast.base.measurement import linux_says, paired_ratio, peak_rss_bytes, percentiles, provenance
from gr00t_fast.export import BuildOptions, OnnxOptions, QuantiseOptions
from gr00t_fast.inputs.dataset import MIN_FRAMES, draw, open_frames, read
from gr00t_fast.options import CameraOptions, CheckpointOptions, EngineName, ExportedName, ObservationOptions, PrecisionName, check_device

if TYPE_CHECKING:
    import torch

    from gr00t_fast.checkpoint import Checkpoint
    from gr00t_fast.model import Gr00t
    from gr00t_fast.policy import Gr00tPolicy

ARMS = tuple(name for name in get_args(EngineName) if name != "auto")
EXPORTED = get_args(ExportedName)
UNUSABLE = (ConfigError, EngineError, MissingExtraError, CheckpointError)
# Where the plain model in the same precision is itself further from fp32 than the limit (a network with random weights amplifies rounding), an
# engine may be this much further than that.
_OF_EAGER = 1.5

Times = dict[str, list[float]]
Actions = dict[str, np.ndarray]
Made = dict[str, tuple[str, Path | None]]  # name in the table -> engine and the directory of its files
Say = Callable[[str], None]  # what is being done, for the user: each part takes seconds to minutes


@dataclass(kw_only=True)
class BenchOptions(ObservationOptions, CameraOptions, CheckpointOptions):
    """Which engines are compared, on what."""

    make: bool = False  # make the files that engines need and that are not there
    exports: Path | None = None  # directory for what is made; default: exports in the checkpoint's
    engines: list[str] = field(default_factory=list)  # NAME or NAME=DIRECTORY of its files; default: all that work here
    denoising_steps: list[int] = field(default_factory=list)  # step counts to time; default: the checkpoint's own
    frames: int = 100  # how many observations, for the error
    rounds: int = 100  # timed calls of each engine; a GPU deserves 1000
    device: str = "auto"  # auto, cuda, cuda:N, cpu, mps
    precision: PrecisionName = "auto"  # of the engines over the torch model
    threads: int | None = None  # CPU threads of torch; default: torch's own choice
    seed: int = 0  # of observations, noise and order

    def check(self) -> None:
        super().check()
        check_device(self.device)
        check_ranges(self, **dict.fromkeys(("frames", "rounds", "denoising_steps", "threads"), AT_LEAST_1), seed=AT_LEAST_0)
        if self.make and any("=" in word for word in self.engines):
            raise ConfigError("--engines=NAME=DIRECTORY is for files that are there, and --make makes them. Leave one out.")

    def needs_observations(self) -> bool:
        """Files are made from them."""
        return self.make


def measure(options: BenchOptions, say: Say) -> dict[str, Any]:
    """All of it, JSON-ready: the comparison, its `winner` and the `settings` of a run with that, where one keeps its limit. Raises Gr00tFastError."""
    import torch

    from gr00t_fast.engine import select_device, select_precision

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = select_device(options.device)
    dtype = select_precision(options.precision, device)
    bench = Bench(options, device, dtype, say)  # observations that do not fit are found out before the minutes of exporting
    made, refused = make_all(options, device, say) if options.make else (None, {})
    result = {"device": str(device), "precision": word_of(dtype), **compare(bench, made)}
    result["engines"] = {name: {key: value for key, value in arm.items() if key != "policy"} for name, arm in result["engines"].items()}
    result |= {"refused": refused | result["refused"], **provenance(), "seed": options.seed}
    if (best := fastest(result)) is not None:
        result |= {"winner": best, "settings": settings_for(options, result["engines"][best], word_of(dtype))}
    return result


def settings_for(options: BenchOptions, arm: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """What a run with this engine takes."""
    exported = arm["engine"] in EXPORTED
    found = {"engine": arm["engine"], "engine_path": arm["directory"], "precision": "auto" if exported else precision}
    found["device"] = options.device if not exported or arm["engine"] == "tensorrt" else "auto"
    return found | ({"denoising_steps": options.denoising_steps[0]} if options.denoising_steps else {})


# --- making what engines need -------------------------------------------------------------------------------------------------------------


# Name in the table, engine, the type of device that it is for (empty: any), and the directories that it needs, each made from the one before.
# OpenVINO runs fp32 files in the arithmetic that it chooses, which the table names.
_CANDIDATES = (
    ("eager", "eager", "", ()),
    ("fused", "fused", "cpu", ()),
    ("compiled", "compiled", "", ()),
    ("cuda_graph", "cuda_graph", "cuda", ()),
    ("tensorrt fp16", "tensorrt", "cuda", ("onnx-fp16", "tensorrt-fp16")),
    ("onnxruntime fp32", "onnxruntime", "cpu", ("onnx-fp32",)),
    ("onnxruntime int8", "onnxruntime", "cpu", ("onnx-fp32", "onnxruntime-int8")),
    ("openvino", "openvino", "cpu", ("onnx-fp32",)),
    ("openvino int8", "openvino", "cpu", ("onnx-fp32", "openvino-int8")),
)


def obstacles() -> dict[str, tuple[str, str]]:
    """Engine -> why it cannot run on this machine, empty where it can, and what to do about that. Files of an export are another question."""
    import torch

    from gr00t_fast.engine.tensorrt_library import installed

    cuda, libraries = torch.cuda.is_available(), installed()
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    found = {
        "eager": ("", ""),
        "fused": ("", ""),
        "compiled": ("" if compiler else "no C++ compiler", "Install g++ or clang++."),
        "cuda_graph": ("" if cuda else "needs a CUDA GPU", ""),
        "tensorrt": ("neither tensorrt_rtx nor tensorrt is installed", install_command("tensorrt_rtx")),
    }
    if libraries:
        found["tensorrt"] = ("" if cuda else f"{libraries[0]} builds here, but there is no GPU to run on", "")
    for name, extra in (("onnxruntime", "export"), ("openvino", "openvino")):
        found[name] = ("not installed" if importlib.util.find_spec(name) is None else "", install_command(extra))
    return found


def make_all(options: BenchOptions, device: torch.device, say: Say) -> tuple[Made, dict[str, str]]:
    """The engines whose files are there, made now where they were not; and why others are not."""
    from gr00t_fast.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(options.model_path, revision=options.revision, letterbox=options.letterbox)
    if not checkpoint.network.fixed_images and options.camera_size is None:
        options = replace(options, camera_size=_camera_size(options, checkpoint))
    at, refused, ready = options.exports or checkpoint.path / "exports", dict[str, str](), Made()
    makers, hindered = _makers(options, at), obstacles()
    for name, engine, kind, folders in _CANDIDATES:
        foreign = kind not in ("", device.type)
        if engine not in options.engines if options.engines else foreign:
            continue
        why, advice = (f"not for {device}", "") if foreign else hindered[engine]
        if why:
            refused[engine] = f"{why}. {advice}".strip()
            continue
        try:
            for folder in folders:
                _make(options, checkpoint, at / folder, makers[folder], say)
        except Gr00tFastError as error:
            refused[name] = one_line(error)
        else:
            ready[name] = engine, at / folders[-1] if folders else None
    return ready, refused


def _makers(options: BenchOptions, at: Path) -> dict[str, Callable[[Path], object]]:
    """What makes each directory of _CANDIDATES."""
    from gr00t_fast.export.onnx import export_checkpoint
    from gr00t_fast.export.quantise import quantise
    from gr00t_fast.export.tensorrt import build_checkpoint

    own = {"model_path": options.model_path, "overwrite": True, **options.checkpoint_options()}
    data = own | options.checkpoint_options("observations", "camera_map", "seed") | {"denoising_steps": next(iter(options.denoising_steps), None)}
    data |= {"frames": min(options.frames, MIN_FRAMES), "trial_frames": min(options.frames, 8), "allow_few": True}
    sizes = own | options.checkpoint_options("camera_size", "denoising_steps")
    return {
        "onnx-fp32": lambda out: export_checkpoint(OnnxOptions(**sizes, out=out, precision="fp32")),
        "onnx-fp16": lambda out: export_checkpoint(OnnxOptions(**sizes, out=out, precision="fp16")),
        "onnxruntime-int8": lambda out: quantise(QuantiseOptions(**data, onnx=at / "onnx-fp32", out=out, target="onnxruntime")),
        "openvino-int8": lambda out: quantise(QuantiseOptions(**data, onnx=at / "onnx-fp32", out=out, target="openvino")),
        "tensorrt-fp16": lambda out: build_checkpoint(BuildOptions(**own, out=out, onnx=at / "onnx-fp16")),
    }


def _camera_size(options: BenchOptions, checkpoint: Checkpoint) -> str:
    """WIDTHxHEIGHT of the first frame in --observations: what exports are made for."""
    from gr00t_fast.export.verify import transforms_only

    names = ("embodiment_tag", "data_config", "processor_path", "letterbox")
    policy = transforms_only(checkpoint.path, **{name: getattr(options, name) for name in names})
    observation = open_frames(str(options.observations), policy.processor.data_config, policy.metadata, options.camera_map)[0]
    return "{}x{}".format(*next(iter(camera_sizes_in(observation).values())))


def _make(options: BenchOptions, checkpoint: Checkpoint, directory: Path, make: Callable[[Path], object], say: Say) -> None:
    if _fits(options, checkpoint, directory):
        say(f"{directory}: is there and fits, kept")
        return
    began_s = time.perf_counter()
    say(f"{directory}: making it ...")
    make(directory)
    say(f"{directory}: made in {time.perf_counter() - began_s:.1f} s")


def _fits(options: BenchOptions, checkpoint: Checkpoint, directory: Path) -> bool:
    from gr00t_fast.engine.manifest import check_manifest, read_manifest, target_of

    try:
        manifest = read_manifest(directory, "")
        check_manifest(directory, manifest.kind, target_of(checkpoint, options.embodiment_tag, options.data_config), "")
    except EngineError:
        return False
    size, steps = list(options.camera_px() or ()), options.denoising_steps
    return manifest.shapes.get("camera_size", size) == size and set(steps) <= set(manifest.denoising_steps or steps)


# --- the comparison -----------------------------------------------------------------------------------------------------------------------


class Bench:
    """One network, from a checkpoint or random and made on the device, whose weights the engines over the torch model share."""

    names: tuple[str, ...] = ARMS
    compared_with: tuple[str, ...] = ("eager", "cuda_graph")  # whose times are divided by an engine's

    def __init__(self, options: BenchOptions, device: torch.device, dtype: torch.dtype, say: Say) -> None:
        """Raises CheckpointError and ConfigError where the small files or the observations do not fit."""
        import torch

        from gr00t_fast.engine.eager import EagerEngine

        self.options, self.device, self.dtype, self.say = options, device, dtype, say
        self.path = self._checkpoint()
        self.camera_sizes: dict[str, tuple[int, int]] = {}
        plain, source = self.policy(EagerEngine(self.network(torch.bfloat16, meta=True))), options.observations or f"random:{options.seed}"
        self.kind = plain.checkpoint.network.protocol
        self.observations = observations_of(plain, source, options.frames, options.seed, options.camera_map, options.camera_px())
        self.camera_sizes = camera_sizes_in(self.observations[0])

    def _checkpoint(self) -> Path:
        from gr00t_fast.checkpoint import open_checkpoint

        return open_checkpoint(self.options.model_path, revision=self.options.revision).path

    @property
    def parameters(self) -> int:
        import torch

        return sum(parameter.numel() for parameter in self.network(torch.bfloat16, meta=True).parameters())

    def weights(self) -> list[str]:
        """SHA-256 of each file, sorted; none of weights that were never in a file."""
        from gr00t_fast.checkpoint import open_checkpoint
        from gr00t_fast.engine.manifest import sha256

        return sorted(map(sha256, open_checkpoint(self.path).weight_files))

    def network(self, dtype: torch.dtype, meta: bool = False) -> Gr00t:
        """meta: without memory."""
        import torch

        from gr00t_fast.checkpoint import load_model, open_checkpoint
        from gr00t_fast.model import Gr00t

        if meta:
            with torch.device("meta"):
                return Gr00t(open_checkpoint(self.path, with_weights=False).config).to(dtype)
        return load_model(open_checkpoint(self.path), self.options.embodiment_tag, self.device, dtype)

    @cached_property
    def shared(self) -> Gr00t:
        return self.network(self.dtype)

    def policy(self, engine: Any, **options: Any) -> Gr00tPolicy:
        """engine: a name, or an object."""
        from gr00t_fast.policy import load_policy

        own = self.options.checkpoint_options("seed") | {"revision": None}  # self.path is a directory
        policy = load_policy(self.path, engine=engine, **own, **options)
        policy.expect_cameras(self.camera_sizes)
        return policy

    def open(self, name: str, directory: Path | None) -> tuple[Gr00tPolicy, str]:
        """The policy, and which of ACTION_LIMITS is its. Raises one of `UNUSABLE`."""
        from gr00t_fast.engine import make_engine

        if name in EXPORTED:
            policy = self.policy(name, engine_path=directory, device=str(self.device) if name == "tensorrt" else "auto")
            return policy, policy.precision
        network = self.shared
        if name == "fused":  # packs layers: modules of its own, over the same weights until then
            network = copy.deepcopy(network, {id(weight): weight for weight in network.parameters()})
        return self.policy(make_engine(name, network)), word_of(self.dtype)

    def answers(self, policy: Gr00tPolicy) -> list[Actions]:
        """To each observation, with noise of its own."""
        from gr00t_fast.engine import warming_up

        with warming_up(policy.engine):  # a prompt that it meets for the first time makes no arm wait here
            cases = enumerate(self.observations, self.options.seed)
            return [policy.get_action(observation, noise=random_noise(policy, seed)) for seed, observation in cases]


def open_arms(bench: Bench, made: Made | None = None) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Name -> engine, policy, limit, seconds of its first calls and memory that it took; name -> why an engine cannot be used here.

    Raises ConfigError for a name that is no engine's, and, where an engine that was named cannot be used, its error. made: opened instead of what
    --engines names.
    """
    named = {} if made is not None else dict(engine_named(word, bench.names) for word in bench.options.engines)
    arms, refused = {}, {}
    for name, (engine, directory) in (made or named or {name: (name, None) for name in bench.names}).items():
        before = _memory_bytes(bench.device)
        bench.say(f"{name}: opening and warming up{', which compiles for minutes' if engine == 'compiled' else ''} ...")
        try:
            policy, limit = bench.open(engine, directory)
            first_calls_s = seconds_of(policy.warm_up)
        except UNUSABLE as error:
            if named:
                raise
            refused[name] = one_line(error)
            continue
        arms[name] = {
            "policy": policy,
            "limit": limit,
            "first_calls_s": first_calls_s,
            "arithmetic": limit,
            "engine": engine,
            "directory": None if directory is None else str(directory),
            "files": sorted(each["sha256"] for each in policy.engine.manifest.files.values()) if engine in EXPORTED else [],  # type: ignore[attr-defined]
            "continues": policy.continues,
            "memory_bytes": max(_memory_bytes(bench.device) - before, 0),
        }
    return arms, refused


def engine_named(word: str, names: Sequence[str] = ARMS) -> tuple[str, tuple[str, Path | None]]:
    name, _, directory = word.partition("=")
    if name not in names:
        raise ConfigError(f"--engines={word}: unknown engine.{closest(name, names)} Expected some of {', '.join(names)}, as NAME or NAME=DIRECTORY.")
    return name, (name, Path(directory) if directory else None)


def _memory_bytes(device: torch.device) -> int:
    """Held now: on the GPU by torch, else by the process."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    held = linux_says("self/status", "VmRSS")
    return int(held.split()[0]) * 1024 if held else peak_rss_bytes()


def word_of(dtype: torch.dtype) -> str:
    """`bf16`, ..."""
    from gr00t_fast.engine import PRECISIONS

    return next(word for word, kind in PRECISIONS.items() if kind == dtype)


def seconds_of(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return round(time.perf_counter() - began_s, 6)


def error_of(got: Sequence[Actions], truth: Sequence[Actions]) -> dict[str, float]:
    """|difference| over all observations, times and joints, in joint units: degrees, per cent for the gripper. NaN where an action is NaN."""
    gaps = np.concatenate([np.abs(mine[key] - theirs[key]).ravel() for mine, theirs in zip(got, truth, strict=True) for key in theirs])
    p50, p99 = (float(np.percentile(gaps, share)) for share in (50, 99))
    return {"p50": p50, "p99": p99, "max": float(gaps.max())}


def limit_of(errors: Mapping[str, dict[str, float]], format: str, dtype: torch.dtype) -> float:
    """On the p99 of an engine's errors, in joint units."""
    from gr00t_fast.export.verify import ACTION_LIMITS

    limit = ACTION_LIMITS[format]
    if format == word_of(dtype) and "eager" in errors and errors["eager"]["p99"] > limit:
        return _OF_EAGER * errors["eager"]["p99"]
    return limit


def take_turns(policies: Mapping[str, Gr00tPolicy], steps: int, bench: Bench) -> tuple[Times, Times, dict[str, Times]]:
    """ms of whole calls, by the clock and of processor time, and of their stages. Each round calls every engine once, in an order of its own: a
    disturbance hits all alike."""
    options, observations = bench.options, bench.observations
    generator, names = np.random.default_rng(options.seed), list(policies)
    for policy in policies.values():
        policy.denoising_steps = steps
        policy.warm_up()
    times: Times = {name: [] for name in names}
    busy: Times = {name: [] for name in names}
    stages: dict[str, Times] = {name: {} for name in names}
    with progress_bar("rounds", options.rounds) as tick:
        for number in range(options.rounds):
            observation = observations[number % len(observations)]
            for name in generator.permutation(names):
                busy_s = time.process_time()
                times[name].append(1000 * seconds_of(partial(policies[name].get_action, observation)))
                busy[name].append(1000 * (time.process_time() - busy_s))
                for stage, ms in policies[name].last_timing.items():
                    stages[name].setdefault(stage, []).append(ms)
            tick()
    return times, busy, stages


def compare(bench: Bench, made: Made | None = None) -> dict[str, Any]:
    """Errors, times and memory of all engines, JSON-ready but for `policy` of each. Arguments and errors as of `open_arms`."""
    import torch

    from gr00t_fast.engine.eager import EagerEngine

    options, device, dtype, say = bench.options, bench.device, bench.dtype, bench.say
    say(f"eager in fp32 answers {len(bench.observations)} observations, for the errors of the others ...")
    truth = bench.answers(bench.policy(EagerEngine(bench.network(torch.float32))))  # freed before the engines come
    arms, refused = open_arms(bench, made)
    say(f"{len(arms)} engines answer them ...")
    for arm in arms.values():
        arm["error_deg"] = error_of(bench.answers(arm["policy"]), truth)
    policies = {name: arm["policy"] for name, arm in arms.items()}
    for count in options.denoising_steps or [next(iter(policies.values())).denoising_steps]:
        say(f"timing in turns: {options.rounds} rounds at {count} denoising steps ...")
        times, busy, stages = take_turns(policies, count, bench)
        for name, arm in arms.items():
            arm.setdefault("times_ms", {})[str(count)] = percentiles(times[name])
            arm.setdefault("stages_ms", {})[str(count)] = {stage: percentiles(each) for stage, each in stages[name].items()}
            # paired by round; None where an engine did not run, or is this one
            ratios = {of: paired_ratio(times[of], times[name]) if of in times and of != name else None for of in bench.compared_with}
            if device.type == "cpu":  # on a shared machine what was computed says more than how long it took; a GPU's work is not in it
                ratios["eager_in_processor_time"] = paired_ratio(busy["eager"], busy[name]) if "eager" in busy and name != "eager" else None
            arm.setdefault("times_as_fast_as", {})[str(count)] = ratios
    errors = {name: arm["error_deg"] for name, arm in arms.items()}
    for name, arm in arms.items():
        arm["error_limit"] = limit_of(errors, arm["limit"], dtype)
        arm["within_limit"] = bool(errors[name]["p99"] <= arm["error_limit"])  # NaN is no pass
    return {
        "network": bench.path.name,
        "kind": bench.kind,
        "weights": bench.weights(),
        "parameters": bench.parameters,
        "cameras": len(next(iter(policies.values())).metadata.resolutions),
        "observations": len(truth),
        "recorded": bool(options.observations) and not str(options.observations).startswith("random:"),
        "of": Path(options.observations or "random pictures and joints").name,
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
            judged += "" if arm["continues"] else ", no --smoothing"
            e, of = arm["error_deg"], "-" if faster is None else f"{faster['median']:.2f}"
            cells = f"{t['p50']:>9.3f} {t['p95']:>9.3f} {t['p99']:>9.3f} {of:>8} {e['p99']:>9.4f} {e['max']:>9.4f} {arm['memory_bytes'] / 1e6:>7.0f}"
            rows.append(f"{name:<18} {steps:>5} {cells}  {arm['arithmetic']}, {judged}")
        rows += after(arm)
    return [*rows, "", *(f"{name} cannot be used here: {reason}" for name, reason in result["refused"].items())]


def fastest(result: Mapping[str, Any], apart_from: str = "") -> str | None:
    """The engine with the smallest median whose error is within its limit."""
    able = {name: next(iter(arm["times_ms"].values()))["p50"] for name, arm in result["engines"].items() if arm["within_limit"]}
    return min((name for name in able if name != apart_from), key=lambda name: able[name], default=None)


def verdict(result: Mapping[str, Any], apart_from: str = "") -> str:
    """The fastest engine whose error is within its limit."""
    if (best := fastest(result, apart_from)) is None:
        return "no engine keeps its limit on the error here"
    steps, times = next(iter(result["engines"][best]["times_ms"].items()))
    return f"fastest within its limit: {best}, {times['p50']:.3f} ms at {steps} steps"


def camera_sizes_in(observation: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Camera -> (width, height)."""
    frames = {key.removeprefix("video."): value.shape for key, value in observation.items() if key.startswith("video.")}
    return {camera: (shape[-2], shape[-3]) for camera, shape in frames.items()}


def observations_of(
    policy: Gr00tPolicy,
    source: str,
    count: int,
    seed: int,
    camera_map: Mapping[str, str] | None = None,
    size: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Unbatched, spread over the episodes of the data set `source`, or of random:SEED. size: of the cameras of the latter, where the checkpoint does
    not say it. Raises ConfigError for a data set of another robot."""
    metadata = policy.metadata if size is None else replace(policy.metadata, resolutions=dict.fromkeys(policy.metadata.resolutions, size))
    frames = open_frames(source, policy.processor.data_config, metadata, camera_map)
    return list(read(frames, draw(frames, count, seed, allow_few=True), metadata))


def random_noise(policy: Gr00tPolicy, seed: int) -> np.ndarray:
    """fp32 (1, H, A)."""
    return np.random.default_rng(seed).standard_normal((1, *policy.chunk_shape)).astype(np.float32)
