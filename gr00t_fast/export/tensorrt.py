"""From exported ONNX graphs to TensorRT engines, each stage in a process of its own, and only the stages that are stale.

    graphs + manifest.json (kind "onnx")  ->  *.engine + tables.safetensors + manifest.json (kind "tensorrt")

A stage is stale when its engine is missing or altered, or was built from another graph, by another version of the library, for other GPUs, or
with other settings; names and dates do not count. What is finished is recorded at once in a hidden file, so that an interrupted build goes on
where it stopped. Nothing is left half written: each file is made under another name and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gr00t_fast import tensorrt_library as library
from gr00t_fast.checkpoint import open_checkpoint
from gr00t_fast.engine.exported import TABLES_NAME
from gr00t_fast.engine.manifest import (
    TEXT_TOKENS,
    TOKENS,
    Digests,
    Manifest,
    check_manifest,
    describe_files,
    read_manifest,
    remedy_for,
    sha256_of_json,
    target_of,
    varying_sizes,
)
from gr00t_fast.errors import ConfigError, EngineError
from gr00t_fast.export.tensorrt_capability import check_capabilities, check_precisions, describe, parse_capabilities, precisions_of
from gr00t_fast.export.tensorrt_stage import OnPhase, Range, Request, run_stage
from gr00t_fast.files import atomic_write

KIND = "tensorrt"  # of the manifest, whichever of the two libraries
_RECORD_NAME, _TIMING_CACHE_NAME = ".built.json", ".timing_cache"


@dataclass(frozen=True)
class BuildOptions:
    """onnx: directory of the export; out: directory of the engines; the rest as the flags of gr00t-fast export tensorrt."""

    onnx: Path
    out: Path
    builder: str = "auto"
    compute_capability: str = "auto"
    max_text_tokens: int | None = None  # longest prompt besides the pictures' tokens; None = what was exported
    workspace_mb: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    overwrite: bool = False  # build what is up to date, too
    source_flags: tuple[str, ...] = ()  # how the graphs were named on the command line

    def flags(self) -> tuple[str, ...]:
        """As on the command line: enough to make the same engines again."""
        given = {
            "builder": self.builder,
            "compute_capability": self.compute_capability,
            "max_text_tokens": self.max_text_tokens,
            "workspace_mb": self.workspace_mb,
            "optimization_level": self.optimization_level,
            "timing_cache": self.timing_cache,
        }
        return (*self.source_flags, *(f"--{name}={value}" for name, value in given.items() if value not in (None, "auto")))


@dataclass(frozen=True)
class BuiltStage:
    """One row of the table."""

    name: str
    reason: str  # why it was built, or "up to date"
    facts: Mapping[str, Any]

    @property
    def built(self) -> bool:
        return self.reason != UP_TO_DATE


UP_TO_DATE = "up to date"


@dataclass
class BuildEvents:
    """What a caller may watch; each is called from this thread."""

    stage: Callable[[str, int, int, str], None] = lambda name, index, count, reason: None
    phase: OnPhase = lambda name, done: None
    finished: Callable[[BuiltStage], None] = field(default=lambda row: None)


def check_feasible(builder: str, compute_capability: str, precision: str | None = None) -> None:
    """What can be refused before any graph is there. Raises ConfigError, and MissingExtraError without the library."""
    name = library.choose(builder)
    capabilities = parse_capabilities(compute_capability, name)
    check_capabilities(library.load(name), name, capabilities)
    if precision is not None:
        check_precisions({precision}, capabilities, name, "all stages")


def build_engines(options: BuildOptions, command: str, progress: BuildEvents | None = None) -> tuple[Manifest, list[BuiltStage]]:
    """Build what is stale and write the manifest. Raises EngineError for graphs that are missing, damaged or made for another runtime, ConfigError
    for what the target GPU cannot compute or the library refuses. On KeyboardInterrupt the finished stages stay."""
    progress = progress or BuildEvents()
    source = _read_source(options)
    builder = library.choose(options.builder)
    trt = library.load(builder)
    capabilities = parse_capabilities(options.compute_capability, builder)
    check_capabilities(trt, builder, capabilities)
    for name, stage in source.stages.items():
        check_precisions(precisions_of(options.onnx / stage["file"]), capabilities, builder, name)
    _check_out(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    requests = {name: _request(name, source, options, builder, capabilities) for name in source.stages}
    rows = _build_stale(requests, source, options, library.version_of(trt), progress)
    _take_tables(source, options)
    manifest = _manifest(source, requests, rows, command, library.version_of(trt), Digests(options.out), options)
    manifest.write(options.out)
    return manifest, rows


def _read_source(options: BuildOptions) -> Manifest:
    """The ONNX export, whole and meant for TensorRT."""
    remedy = "gr00t-fast export onnx --model_path=CHECKPOINT --data_config=CONFIG --precision=fp16 " + f"--out={options.onnx}"
    manifest = read_manifest(options.onnx, remedy)
    if manifest.kind != "onnx":
        raise EngineError(f"{options.onnx} holds an export of kind '{manifest.kind}', expected 'onnx'. Run: {remedy}")
    runtime = (manifest.quantisation or {}).get("runtime", KIND)
    if runtime != KIND:
        raise EngineError(
            f"the graphs in {options.onnx} are quantised for {runtime}, whose Q/DQ pattern TensorRT does not take. Run gr00t-fast quantise with "
            "--target=tensorrt."
        )
    digests = Digests(options.onnx)
    for name, entry in manifest.files.items():
        file = options.onnx / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or digests.of([file]) != [entry["sha256"]]:
            raise EngineError(f"{file} is missing, cut short or altered: it is not what the manifest beside it describes. Run: {remedy}")
    return manifest


def _request(name: str, source: Manifest, options: BuildOptions, builder: str, capabilities: tuple[str, ...]) -> Request:
    file = source.stages[name]["file"]
    cache = options.timing_cache or options.out / _TIMING_CACHE_NAME
    return Request(
        onnx=str(options.onnx / file),
        engine=str(options.out / f"{name}.engine"),
        builder=builder,
        capabilities=capabilities,
        profiles=prompt_profiles(source.shapes, options.max_text_tokens, one=builder == library.RTX),
        workspace_mb=options.workspace_mb,
        optimization_level=options.optimization_level,
        timing_cache=str(cache.resolve()),
    )


def prompt_profiles(shapes: Mapping[str, Any], max_text_tokens: int | None, one: bool) -> tuple[dict[str, Range], ...]:
    """Ranges of the sizes that vary with the prompt: (shortest, the one to tune for, longest). The shortest prompt is the pictures' tokens and one
    more, or, where the graphs have the places of the pictures built in, two behind the last one.

    `one`: a single range tuned for the usual length. TensorRT-RTX compiles for each length when it first meets it, and further ranges only make the
    engine larger (demo network: 7.6 MB with one, 16.8 MB with three). `tensorrt` chooses its kernels now: one range per bucket, and they meet.
    Raises ConfigError when `max_text_tokens` is out of range.
    """
    images, exported = shapes["image_tokens"], shapes["max_tokens"]
    most = exported if max_text_tokens is None else images + max_text_tokens
    if not images < most <= exported:
        raise ConfigError(
            f"--max_text_tokens must be from 1 to {exported - images} (what was exported), got {max_text_tokens}. For longer prompts export again "
            "with a larger --max_text_tokens (gr00t-fast export onnx)."
        )
    least = shapes["image_spans"][-1][1] + 2 if shapes.get("image_spans") else images + 1
    usual = [length for length in sorted(set(shapes["prompt_buckets"])) if least <= length < most]
    if one:
        return (_ranges(shapes, (least, usual[0] if usual else most, most)),)
    edges = [*usual, most]
    starts = [least, *(edge + 1 for edge in edges[:-1])]
    return tuple(_ranges(shapes, (start, edge, edge)) for start, edge in zip(starts, edges, strict=True))


def _ranges(shapes: Mapping[str, Any], prompts: Range) -> dict[str, Range]:
    """Of each size that varies, for prompts of these lengths. shapes: as of the manifest."""
    names = (TOKENS, TEXT_TOKENS) if shapes.get("image_spans") else (TOKENS,)
    return {name: tuple(varying_sizes(shapes, length)[name] for length in prompts) for name in names}


def _check_out(out: Path) -> None:
    """Raises ConfigError for the directory of another kind of export, whose manifest would be replaced. A damaged one only costs time."""
    try:
        kind = read_manifest(out, "").kind
    except EngineError:
        return
    if kind != KIND:
        raise ConfigError(f"--out={out} holds an export of kind '{kind}', which the engines would replace. Choose another --out.")


def _build_stale(requests: Mapping[str, Request], source: Manifest, options: BuildOptions, version: str, progress: BuildEvents) -> list[BuiltStage]:
    record, rows = _read_record(options.out), []
    for index, (name, request) in enumerate(requests.items()):
        key = _key(name, request, source, version)
        reason = _stale(record.get(name), key, options.out / f"{name}.engine") or ("--overwrite" if options.overwrite else None)
        if reason is None:
            rows.append(BuiltStage(name, UP_TO_DATE, record[name]["facts"]))
        else:
            progress.stage(name, index, len(requests), reason)
            rows.append(BuiltStage(name, reason, _build(request, progress.phase)))
            record[name] = {"key": key, "facts": dict(rows[-1].facts)}
            _write_record(options.out, record)
        progress.finished(rows[-1])
    return rows


def _build(request: Request, on_phase: OnPhase) -> dict[str, Any]:
    with atomic_write(Path(request.engine)) as partial:
        return run_stage(replace(request, engine=str(partial)), on_phase)


def _key(name: str, request: Request, source: Manifest, version: str) -> dict[str, str]:
    """What the engine depends on, by the words to name it with when it has changed."""
    graph = [file for file in source.files if file.startswith(source.stages[name]["file"])]  # and the weights beside it
    return {
        "graph": sha256_of_json([source.files[file]["sha256"] for file in sorted(graph)]),
        "library": f"{request.builder} {version}",
        "GPUs": describe(request.capabilities),
        "prompt lengths": json.dumps(request.profiles),
        "settings": json.dumps([request.workspace_mb, request.optimization_level]),
    }


def _stale(entry: Mapping[str, Any] | None, key: Mapping[str, str], engine: Path) -> str | None:
    """Why it has to be built, or None."""
    if entry is None or not engine.is_file():
        return "not built yet"
    changed = [what for what, value in key.items() if entry["key"].get(what) != value]
    if changed:
        return f"other {', '.join(changed)}"
    facts = entry["facts"]
    if engine.stat().st_size != facts["bytes"] or Digests(engine.parent).of([engine]) != [facts["sha256"]]:
        return "damaged"
    return None


def _read_record(out: Path) -> dict[str, Any]:
    try:
        record = json.loads((out / _RECORD_NAME).read_text(encoding="utf-8"))
        return {name: entry for name, entry in record.items() if entry.keys() >= {"key", "facts"} and entry["facts"].keys() >= {"bytes", "sha256"}}
    except (OSError, ValueError, AttributeError):
        return {}  # absent or damaged: everything is built again


def _write_record(out: Path, record: Mapping[str, Any]) -> None:
    with atomic_write(out / _RECORD_NAME) as file:
        file.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _take_tables(source: Manifest, options: BuildOptions) -> None:
    """Beside the engines, as a second name of the same file where the system allows: the embedding alone has 600 MB."""
    theirs, ours = options.onnx / TABLES_NAME, options.out / TABLES_NAME
    if ours.is_file() and Digests(options.out).of([ours]) == [source.files[TABLES_NAME]["sha256"]]:
        return
    with atomic_write(ours) as partial:
        try:
            os.link(theirs, partial)
        except OSError:
            shutil.copyfile(theirs, partial)


def _manifest(
    source: Manifest, requests: Mapping[str, Request], rows: Iterable[BuiltStage], command: str, version: str, digests: Digests, options: BuildOptions
) -> Manifest:
    request = next(iter(requests.values()))
    stages = {
        row.name: {**source.stages[row.name], "file": f"{row.name}.engine", "source": source.stages[row.name]["file"], "build": dict(row.facts)}
        for row in rows
    }
    details = {
        "builder": request.builder,
        "builder_version": version,
        "compute_capability": list(request.capabilities),
        "profiles": [dict(profile) for profile in request.profiles],
        "workspace_mb": request.workspace_mb,
        "onnx": {"command": source.command, "versions": dict(source.versions), "details": dict(source.details)},
    }
    keep = {stage["file"] for stage in stages.values()} | {TABLES_NAME}
    files = {name: entry for name, entry in describe_files(options.out, digests).items() if name in keep}
    most = max(profile[TOKENS][2] for profile in request.profiles)
    return replace(
        source,
        kind=KIND,
        shapes={**source.shapes, "max_tokens": most},
        stages=stages,
        files=files,
        versions={**source.versions, request.builder: version},
        command=command,
        details=details,
        program="to_tensorrt.py",
        flags=options.flags(),
    )


def as_table(rows: Iterable[BuiltStage]) -> str:
    """One line per stage: layers of the network, size of the engine, seconds and peak memory of the build, why it was built, and whether the library
    reads it back: "parsed" is as far as it goes without a CUDA driver."""
    lines = [f"{'stage':<14}{'layers':>8}{'MB':>8}{'parse s':>9}{'build s':>9}{'peak MB':>9}  {'read back':<16}why"]
    for row in rows:
        facts, check = row.facts, row.facts["check"]
        peak = f"{facts['peak_memory_bytes'] / 1e6:.0f}"
        read_back = {True: "yes", False: "not on this GPU", None: "parsed"}[check["deserialised"]]
        numbers = f"{facts['layers']:>8}{facts['bytes'] / 1e6:>8.1f}{facts['parse_s']:>9.1f}{facts['build_s']:>9.1f}{peak:>9}"
        lines.append(f"{row.name:<14}{numbers}  {read_back:<16}{row.reason}")
    return "\n".join(lines)


EXPORTER = ("-m", "gr00t_fast", "export", "onnx")
_PRECISION = "fp16"  # every GPU that TensorRT knows computes in it; bf16 needs Ampere


@dataclass(frozen=True)
class SourceOptions:
    """What is to be exported, when it is: as the flags of gr00t-fast export onnx by the same names. `onnx`: None = beside `out`."""

    model_path: str
    embodiment_tag: str
    data_config: str | None
    out: Path
    onnx: Path | None = None
    precision: str | None = None
    denoising_steps: tuple[int, ...] = ()
    max_text_tokens: int | None = None
    letterbox: str = "auto"
    camera_size: tuple[int, int] | None = None  # among `other_flags` too
    other_flags: tuple[str, ...] = ()  # handed on to gr00t-fast export onnx as they are

    @property
    def directory(self) -> Path:
        return self.onnx or self.out.with_name(f"{self.out.name}-onnx")

    @property
    def exported_precision(self) -> str | None:
        """Number format of graphs that are exported here; None when they were named."""
        return None if self.onnx is not None else self.precision or _PRECISION

    def flags(self) -> tuple[str, ...]:
        """Those that say which graphs: as on the command line of gr00t-fast export tensorrt."""
        if self.onnx is not None:
            return (f"--onnx={self.onnx}",)
        steps = ("--denoising_steps", *map(str, self.denoising_steps)) if self.denoising_steps else ()
        return (f"--precision={self.exported_precision}", *steps, *self.other_flags)


def find_source(options: SourceOptions) -> Path:
    """Directory of graphs that belong to the checkpoint; exports them first when `onnx` is None and they are absent, damaged or stale.

    Raises EngineError and StaleEngineError for graphs in `onnx` that do not fit, and EngineError when exporting fails.
    """
    target = target_of(open_checkpoint(options.model_path, letterbox=options.letterbox), options.embodiment_tag, options.data_config)
    directory = options.directory
    remedy = remedy_for(directory, target, "to_onnx.py", f"--precision={options.precision or _PRECISION}")
    try:
        _check_content(check_manifest(directory, "onnx", target, remedy), options, remedy)
    except (EngineError, ConfigError) as error:
        if options.onnx is not None:
            raise
        reason = f": {str(error).splitlines()[0]}" if directory.exists() else ""  # that they are not there yet is no trouble
        print(f"exporting the graphs to {directory}{reason}", file=sys.stderr)
        export_graphs(options)
    return directory


def _check_content(manifest: Manifest, options: SourceOptions, remedy: str) -> None:
    """Raises ConfigError when the graphs hold something else than the flags say."""
    if options.precision not in (None, manifest.precision):
        raise ConfigError(f"the graphs are {manifest.precision}, asked for was --precision={options.precision}. Run: {remedy}")
    absent = [steps for steps in options.denoising_steps if steps not in manifest.denoising_steps]
    if absent:
        there = ", ".join(map(str, manifest.denoising_steps))
        more = " ".join(map(str, absent))
        raise ConfigError(f"the graphs have tables for {there} denoising steps, asked for was {more}. Run: {remedy} --denoising_steps {more}")
    if options.camera_size is not None and list(options.camera_size) != (made := manifest.shapes.get("camera_size")):
        raise ConfigError(f"the graphs are for cameras of {made}, asked for was {list(options.camera_size)}. Run: {remedy}")
    most = manifest.shapes["max_tokens"] - manifest.shapes["image_tokens"]
    if options.max_text_tokens is not None and options.max_text_tokens > most:
        raise ConfigError(f"the graphs take {most} text tokens, asked for were {options.max_text_tokens}. Run: {remedy}")


def export_graphs(options: SourceOptions) -> None:
    """In a process of its own: what it leaves in memory would count against the builder's."""
    given = {
        "model_path": options.model_path,
        "embodiment_tag": options.embodiment_tag,
        "data_config": options.data_config,
        "out": options.directory,
        "max_text_tokens": options.max_text_tokens,
        "letterbox": options.letterbox,
    }
    flags: Sequence[str] = [f"--{name}={value}" for name, value in given.items() if value is not None]
    command = [sys.executable, *EXPORTER, *flags, *options.flags(), "--overwrite"]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code != 0:
        raise EngineError(f"exporting the graphs ended with code {code}; what went wrong is said above. The command was: {' '.join(command)}")


_WIDTH = 100


class Display(BuildEvents):
    """Prints what the builder does on standard error: a moving line on a terminal, a line per stage elsewhere."""

    def __init__(self) -> None:
        super().__init__(self._stage, self._phase, self._finished)
        self._title, self._words, self._start_s = "", "", time.monotonic()
        self._moving = sys.stderr.isatty()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def _stage(self, name: str, index: int, count: int, reason: str) -> None:
        self._title, self._words, self._start_s = f"[{index + 1}/{count}] {name}", "", time.monotonic()
        self._line(f"{self._title}: building, {reason}")

    def _phase(self, name: str | None, done: float | None) -> None:
        if not self._moving:
            return
        if name is not None:
            self._words = name if done is None else f"{name} {done:.0%}"
        elapsed_s = time.monotonic() - self._start_s
        print(f"\r\x1b[K{f'{self._title} {elapsed_s:4.0f} s  {self._words}'[:_WIDTH]}", end="", file=sys.stderr, flush=True)

    def _finished(self, row: BuiltStage) -> None:
        if row.built:
            megabytes = row.facts["bytes"] / 1e6
            self._line(f"{self._title}: done in {time.monotonic() - self._start_s:.0f} s, {row.facts['layers']} layers, {megabytes:.1f} MB")

    def _line(self, text: str) -> None:
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._moving:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
