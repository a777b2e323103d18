"""The work of `gr00t-fast tune`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from gr00t_fast.checkpoint import Checkpoint, open_checkpoint
from gr00t_fast.cli import calibrate, export_onnx, export_tensorrt, quantise
from gr00t_fast.cli.comparison import Actions, Bench, BenchConfig, camera_sizes_in, compare, table_rows, word_of
from gr00t_fast.cli.config_file import write_settings
from gr00t_fast.cli.policy_flags import camera_size
from gr00t_fast.cli.program import EXIT_ERROR, EXIT_OK, end_on_sigterm, show
from gr00t_fast.cli.run_flags import RunConfig
from gr00t_fast.cli.tune import TuneConfig
from gr00t_fast.dataset import open_frames
from gr00t_fast.engine import EXPORTED, select_device, select_precision
from gr00t_fast.engine.fp8 import has_product
from gr00t_fast.engine.manifest import check_manifest, read_manifest, target_of
from gr00t_fast.errors import EngineError, Gr00tFastError, install_command
from gr00t_fast.export.samples import transforms_only
from gr00t_fast.flags import CONFIG_FLAG, parse_flags
from gr00t_fast.measurement import git_commit, machine, versions
from gr00t_fast.policy import Gr00tPolicy
from gr00t_fast.tensorrt_library import installed

_MAKING = 0.6  # of the minutes, at most; what is left is for errors and times
_LEAST_FRAMES = 8  # that are compared, however short the time


@dataclass(frozen=True)
class Candidate:
    """An engine with its files. `needs` lists directories with their maker, each before what is made from it."""

    name: str
    engine: str
    directory: Path | None = None
    needs: tuple[tuple[Path, Callable[[Path], object]], ...] = ()


class _TimeIsUp(BaseException):
    """Raised by the alarm in whatever is being made; no `except Exception` on the way may keep it."""


def work(config: TuneConfig, path: Path | None) -> int:
    """Make, compare, print, write. Raises Gr00tFastError."""
    end_on_sigterm()
    began_s = time.perf_counter()
    settings = parse_flags(RunConfig, [f"--{CONFIG_FLAG}={path}"])[0] if path is not None and path.exists() else RunConfig()
    checkpoint = open_checkpoint(config.model_path, revision=config.revision, letterbox=config.letterbox)
    if not checkpoint.network.fixed_images and config.camera_size is None:
        config = replace(config, camera_size=_camera_size(config, checkpoint))
    device = select_device(config.device)
    dtype = select_precision(config.precision, device)
    config.out.mkdir(parents=True, exist_ok=True)  # a directory that cannot be made is found out before the minutes
    tried, refused = candidates(config, checkpoint, device)
    say = _Voice(config, began_s)
    ready = make_all(config, checkpoint, tried, refused, began_s + 60 * _MAKING * config.max_minutes, say)
    say(f"comparing {', '.join(each.name for each in ready)} on {config.frames} observations ...")
    result = compare(TuneBench(config, ready, device, dtype, began_s + 60 * config.max_minutes))
    best = winner(result["engines"], "" if settings.smoothing not in ("rtc", "prefix") else settings.smoothing, refused)
    result["engines"] = {name: {key: value for key, value in arm.items() if key != "policy"} for name, arm in result["engines"].items()}
    result = {"program": "tune", "device": str(device), "precision": word_of(dtype), **result, "refused": {**refused, **result["refused"]}}
    result |= {"winner": best, "seconds": round(time.perf_counter() - began_s, 1), "machine": machine(), "versions": versions()}
    result |= {"git_commit": git_commit(), "command_line": shlex.join(sys.argv), "seed": config.seed}
    chosen = next((each for each in ready if each.name == best), None)
    judged = "no engine keeps its limit on the error here: nothing was written"
    if chosen is not None:
        result["settings"] = _settings(config, chosen, device, dtype)
        judged = _write(path, config, settings, result)
    table = "\n".join(table_rows(result))
    (config.out / "tune.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (config.out / "tune.md").write_text(f"{table}\n{judged}\n", encoding="utf-8")
    show(result, table, judged, config)
    return EXIT_ERROR if chosen is None else EXIT_OK


class _Voice:
    """Progress lines on standard error, with the seconds since the beginning."""

    def __init__(self, config: TuneConfig, began_s: float) -> None:
        self._quiet, self._began_s = config.quiet, began_s

    def __call__(self, text: str) -> None:
        if not self._quiet:
            print(f"[{time.perf_counter() - self._began_s:5.0f} s] {text}", file=sys.stderr, flush=True)


def candidates(config: TuneConfig, checkpoint: Checkpoint, device: torch.device) -> tuple[list[Candidate], dict[str, str]]:
    """What this machine may run, the files to make for it, and why others are left out."""
    at = config.exports or checkpoint.path / "exports"
    found, refused = [Candidate("eager", "eager"), Candidate("compiled", "compiled")], {}
    if device.type == "cuda":
        found.append(Candidate("cuda_graph", "cuda_graph"))
    if device.type == "cuda":
        found += _on_a_gpu(config, at, device, refused)
    elif device.type == "cpu":
        found += _on_a_cpu(config, at, refused)
    if config.engines:
        wanted = {"eager" if name == "auto" else name for name in config.engines}
        found = [each for each in found if each.engine in wanted]
        refused |= {name: f"not for {device}, or not installed" for name in sorted(wanted - {each.engine for each in found} - set(refused))}
    return found, refused


def _on_a_cpu(config: TuneConfig, at: Path, refused: dict[str, str]) -> list[Candidate]:
    onnx = (at / "onnx-fp32", partial(_export, config, "fp32"))
    found = []
    # OpenVINO runs fp32 files in the arithmetic that it chooses, which the table names
    for name, extra, with_floats in (("onnxruntime", "export", "onnxruntime fp32"), ("openvino", "openvino", "openvino")):
        if importlib.util.find_spec(name) is None:
            refused[name] = f"not installed: {install_command(extra)}"
            continue
        int8 = at / f"{name}-int8"
        found.append(Candidate(with_floats, name, onnx[0], (onnx,)))
        found.append(Candidate(f"{name} int8", name, int8, (onnx, (int8, partial(_quantise, config, onnx[0], name)))))
    return found


def _on_a_gpu(config: TuneConfig, at: Path, device: torch.device, refused: dict[str, str]) -> list[Candidate]:
    found = []
    if has_product(device):
        found.append(Candidate("fp8", "fp8", at / "fp8", ((at / "fp8", partial(_calibrate, config)),)))
    else:
        refused["fp8"] = "this GPU has no 8-bit floating point products (Ada, Hopper and newer do)"
    if installed():
        onnx = (at / "onnx-fp16", partial(_export, config, "fp16"))
        engines = (at / "tensorrt-fp16", partial(_build, config, onnx[0]))
        found.append(Candidate("tensorrt fp16", "tensorrt", engines[0], (onnx, engines)))
    else:
        refused["tensorrt"] = f"not installed: {install_command('tensorrt_rtx')}"
    return found


def _common(config: TuneConfig, *more: str) -> dict[str, Any]:
    names = ("model_path", "revision", "embodiment_tag", "data_config", "processor_path", "prompt_style", "letterbox", *more)
    return {name: getattr(config, name) for name in names}


def _camera_size(config: TuneConfig, checkpoint: Checkpoint) -> str:
    """Of the first frame in --observations: what exports are made for."""
    names = ("embodiment_tag", "data_config", "processor_path", "letterbox")
    policy = transforms_only(checkpoint.path, **{name: getattr(config, name) for name in names})
    observation = open_frames(str(config.observations), policy.processor.data_config, policy.metadata, config.camera_map)[0]
    return "{}x{}".format(*next(iter(camera_sizes_in(observation).values())))


def _of_data(config: TuneConfig) -> dict[str, Any]:
    more = _common(config, "observations", "camera_map", "allow_few", "denoising_steps", "trial_frames", "seed")
    return {**more, "frames": config.calibration_frames}


def _export(config: TuneConfig, precision: Literal["fp32", "fp16"], out: Path) -> object:
    steps = [] if config.denoising_steps is None else [config.denoising_steps]
    common = _common(config, "camera_size")
    return export_onnx.run(export_onnx.ExportOnnxConfig(**common, out=out, overwrite=True, precision=precision, denoising_steps=steps))


def _quantise(config: TuneConfig, onnx: Path, target: Literal["openvino", "onnxruntime"], out: Path) -> object:
    return quantise.run(quantise.QuantiseConfig(**_of_data(config), onnx=onnx, out=out, target=target, overwrite=True))


def _calibrate(config: TuneConfig, out: Path) -> object:
    return calibrate.run(calibrate.CalibrateConfig(**_of_data(config), out=out, device=config.device, overwrite=True))


def _build(config: TuneConfig, onnx: Path, out: Path) -> object:
    return export_tensorrt.run(export_tensorrt.ExportTensorRTConfig(**_common(config), out=out, onnx=onnx, overwrite=True))


def make_all(
    config: TuneConfig, checkpoint: Checkpoint, tried: Sequence[Candidate], refused: dict[str, str], end_s: float, say: Callable[[str], None]
) -> list[Candidate]:
    """Those whose files are there, made now where they were not; why others are not is added to `refused`."""
    ready, failed = [], {}
    for candidate in tried:
        for directory, make in candidate.needs:
            if directory in failed:
                refused[candidate.name] = failed[directory]
                break
            try:
                _make(config, checkpoint, directory, make, end_s, say)
            except _TimeIsUp:
                failed[directory] = f"{directory} was not finished within {_MAKING:.0%} of --max_minutes={config.max_minutes:g}"
            except Gr00tFastError as error:
                failed[directory] = " ".join(str(error).split())
            if directory in failed:
                say(f"{candidate.name}: {failed[directory]}")
                refused[candidate.name] = failed[directory]
                break
        else:
            ready.append(candidate)
    return ready


def _make(
    config: TuneConfig, checkpoint: Checkpoint, directory: Path, make: Callable[[Path], object], end_s: float, say: Callable[[str], None]
) -> None:
    if _fits(config, checkpoint, directory):
        say(f"{directory}: is there and fits, kept")
        return
    with _alarm(end_s):
        began_s = time.perf_counter()
        say(f"{directory}: making it ...")
        make(directory)
        say(f"{directory}: made in {time.perf_counter() - began_s:.1f} s")


def _fits(config: TuneConfig, checkpoint: Checkpoint, directory: Path) -> bool:
    try:
        manifest = read_manifest(directory, "")
        check_manifest(directory, manifest.kind, target_of(checkpoint, config.embodiment_tag, config.data_config), "")
    except EngineError:
        return False
    size = list(camera_size(config) or ())
    if manifest.shapes.get("camera_size", size) != size:
        return False
    return not manifest.denoising_steps or config.denoising_steps in (None, *manifest.denoising_steps)


@contextlib.contextmanager
def _alarm(end_s: float) -> Iterator[None]:
    """Raises _TimeIsUp in the block at `end_s`, and before it when that is past. Native code is not interrupted, only waited for."""
    left_s = end_s - time.perf_counter()
    if left_s <= 0:
        raise _TimeIsUp
    if not hasattr(signal, "setitimer"):  # Windows: what has begun is waited for
        yield
        return

    def ring(_number: int, _frame: object) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, left_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


class TuneBench(Bench):
    """A Bench over candidates, several of which may be of one engine."""

    compared_with = ("eager",)

    def __init__(self, config: TuneConfig, ready: Sequence[Candidate], device: torch.device, dtype: torch.dtype, end_s: float) -> None:
        self._ready, self.names, self.end_s = {each.name: each for each in ready}, tuple(each.name for each in ready), end_s
        steps = [] if config.denoising_steps is None else [config.denoising_steps]
        shared = _common(config, "observations", "camera_map", "frames", "rounds", "device", "precision", "seed", "camera_size")
        super().__init__(BenchConfig(**shared, denoising_steps=steps), device, dtype)
        self._budget_s = 60 * config.max_minutes
        self._whole = False  # whether the number of observations is settled

    def open(self, name: str, directory: Path | None) -> tuple[Gr00tPolicy, str]:
        """Its first calls included, which compile. Raises EngineError when the time for opening is over."""
        candidate = self._ready[name]
        if candidate.engine == "eager":  # what the others are compared with
            return super().open(candidate.engine, None)
        try:
            with _alarm(self.end_s - (1 - _MAKING) / 2 * self._budget_s):
                policy, limit = super().open(candidate.engine, candidate.directory)
                policy.warm_up()
        except _TimeIsUp:
            raise EngineError("it was not ready within its part of --max_minutes: give more") from None
        return policy, limit

    def answers(self, policy: Gr00tPolicy) -> list[Actions]:
        """The first ones, which are the plain model's, settle how many observations there is time for."""
        if self._whole:
            return super().answers(policy)
        began_s = time.perf_counter()
        share_s = max(0.0, self.end_s - began_s) * 0.25 / (len(self.names) + 1)
        found = []
        for index in range(len(self.observations)):
            if index >= _LEAST_FRAMES and time.perf_counter() - began_s > share_s:
                break
            found.append(self.answer(policy, index))
        self.observations, self._whole = self.observations[: len(found)], True
        return found


def winner(arms: Mapping[str, dict[str, Any]], smoothing: str, refused: dict[str, str]) -> str | None:
    """The fastest engine within its limit that can do the runs' --smoothing; None: none. Why a faster one cannot is added to `refused`."""
    for name, arm in arms.items():
        arm["within_limit"] = bool(arm["within_limit"])
        if smoothing and smoothing not in arm["policy"].continues:
            refused[f"{name} for your runs"] = f"it cannot do --smoothing={smoothing} of the configuration file"
    able = [name for name, arm in arms.items() if arm["within_limit"] and f"{name} for your runs" not in refused]
    return min(able, key=lambda name: next(iter(arms[name]["times_ms"].values()))["p50"], default=None)


def _settings(config: TuneConfig, chosen: Candidate, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a run with the winner takes."""
    exported = chosen.engine in EXPORTED
    found = {"engine": chosen.engine, "engine_path": None if chosen.directory is None else str(chosen.directory)}
    found["precision"] = "auto" if exported else word_of(dtype)
    found["device"] = config.device if not exported or chosen.engine == "tensorrt" else "auto"
    return found | ({} if config.denoising_steps is None else {"denoising_steps": config.denoising_steps})


def _write(path: Path | None, config: TuneConfig, before: RunConfig, result: Mapping[str, Any]) -> str:
    """Into the configuration file; returns the verdict. The engine goes with a checkpoint, so what says which is written where it differs."""
    best = result["winner"]
    steps, times = next(iter(result["engines"][best]["times_ms"].items()))
    judged = f"fastest within its limit: {best}, {times['p50']:.3f} ms at {steps} steps"
    settings = dict(result["settings"])
    if path is None:
        return f"{judged}. To run it: {' '.join(f'--{name}={value}' for name, value in settings.items() if value is not None)}"
    for name in ("model_path", "revision", "embodiment_tag", "data_config", "prompt_style", "letterbox"):
        if (value := getattr(config, name)) != getattr(before, name):
            settings[name] = value
    backup = write_settings(path, settings)
    return f"{judged}; written into {path}" + (f" (as it was: {backup})" if backup else "")
