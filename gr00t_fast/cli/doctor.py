"""`gr00t-fast doctor`: what is installed, what can run here, what a checkpoint needs, whether arm and cameras are ready.

A check is a function from the configuration to rows; each row is one line of the table. Checks that wait for the servos, for cameras or for the
import of torch run side by side, so that it takes seconds. No weights are read, and the servos are only read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gr00t_fast.cli.contact_sheet import SHEET_NAME, write_pictures
from gr00t_fast.cli.doctor_arm import Pictures, Row, arm, failed, take_pictures, titles
from gr00t_fast.cli.main import EXIT_ERROR, EXIT_OK, Command, show
from gr00t_fast.cli.run import RunConfig
from gr00t_fast.cli.shared_flags import OutputFlags, PolicyFlags
from gr00t_fast.errors import CheckpointError, ConfigError, Gr00tFastError, ObservationError, PreflightError, install_command
from gr00t_fast.flags import UsageError
from gr00t_fast.robots.config import RobotConfig, SO100FollowerConfig

# What a run with these flags needs -> (module, extra that brings it).
_EXTRAS = {
    "real arm (lerobot)": ("lerobot", "robot"),
    "simulated arm (MuJoCo)": ("mujoco", "sim"),
    "pictures of a run": ("matplotlib", "plots"),
    "policy server": ("msgpack", "serving"),
    "engine onnxruntime, exports": ("onnxruntime", "export"),
    "engine openvino": ("openvino", "openvino"),
}
_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "opencv-python-headless")


@dataclass(kw_only=True)
class DoctorConfig(OutputFlags, PolicyFlags):
    """Say what is installed, which engines can run here and which exports are stale, what a checkpoint needs, and whether the arm, its servos, its
    calibration and its cameras are ready for a run.

        gr00t-fast doctor
        gr00t-fast doctor --config_path=configs/so100.yaml --robot.port=/dev/ttyACM0 --model_path=./gr00t-n1.5-so100-finetuned --out=outputs/doctor

    Takes the flags, and the --config_path, of a run. No weights are read, nothing is written to the servos and no torque changes. `warn` is for
    something that a run may suffer from, `fail` for what keeps a run with these flags from succeeding.
    """

    camera_map: dict[str, str] = field(default_factory=dict)  # "{robot camera: policy camera}", when the names differ
    fps: float | None = None  # control rate; default: the rate at which the training data was recorded
    out: Path | None = None  # directory for a picture of each camera, all of them on one sheet (cameras.png), doctor.json and doctor.txt; replaced
    robot: RobotConfig | None = None

    def needs_checkpoint(self) -> bool:
        """The machine and the arm can be looked at without."""
        return False

    def check(self) -> None:
        """Raises UsageError."""
        super().check()
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out={self.out} is a file; it needs a directory.")


_NOT_OF_A_RUN = ("out", "json", "quiet", "verbose")  # settings of a run's file that are about what the run leaves
_TELL_EVERY_S = 2.0
_GIB = 2**30
_WORKING_BYTES = _GIB  # activations, scratch and the CUDA context: a round figure above what has been measured
_READ_AT_MOST_BYTES = 512 * 2**20  # of weights, to compare an export with them: more takes seconds


def work(config: DoctorConfig) -> int:
    """Run all checks, print them and leave what --out asks for. Raises Gr00tFastError."""
    began_s = time.perf_counter()
    with ThreadPoolExecutor(3) as pool:
        of_arm, of_cameras = pool.submit(lambda: list(arm(config.robot))), pool.submit(take_pictures, config.robot)
        inside = pool.submit(lambda: [*network(config), *fit(config)])
        if not config.quiet:
            _tell_progress({of_arm: "the arm's servos", of_cameras: "the cameras", inside: "torch (its import), engines and checkpoint"})
        rows = [*python_and_packages(), *extras(config), *inside.result(), *of_arm.result()]
        pictures = of_cameras.result()
    rows += pictures.rows
    counts = Counter(row.state for row in rows)
    result = {
        "program": "doctor",
        "ok": not counts["fail"],
        "seconds": round(time.perf_counter() - began_s, 2),
        "rows": [asdict(row) for row in rows],
    }
    table, judged = as_table(rows), _verdict(rows, result["seconds"])
    if config.out is not None:
        table += "\n" + _write(config, config.out, pictures, result, f"{table}\n\n{judged}\n")
    show(result, table + "\n", judged, config)
    return EXIT_ERROR if counts["fail"] else EXIT_OK


def _tell_progress(checks: Mapping[Future[Any], str]) -> None:
    """Until they are done, says from time to time which are not."""
    while left := wait(checks, _TELL_EVERY_S).not_done:
        print(f"looking at {', '.join(name for check, name in checks.items() if check in left)} ...", file=sys.stderr, flush=True)


def as_table(rows: Sequence[Row]) -> str:
    """A line per finding, and one below it where something is to do."""
    return "\n".join(f"{row.state:<5} {row.section:<11} {row.what}" + (f"\n{'':<18}-> {row.what_to_do}" if row.what_to_do else "") for row in rows)


def _verdict(rows: Sequence[Row], seconds: float) -> str:
    wrong = [row.what for row in rows if row.state == "fail"]
    warned = sum(row.state == "warn" for row in rows)
    after = f" ({len(rows)} checks, {warned} warnings, {seconds:.1f} s)"
    return (f"NOT READY: {'; '.join(wrong)}" if wrong else "ready: nothing that these flags need is missing") + after


def _write(config: DoctorConfig, out: Path, pictures: Pictures, result: dict[str, Any], text: str) -> str:
    paths = write_pictures(pictures.frames, camera_titles(config), out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "doctor.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (out / "doctor.txt").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: cannot write to '{out}': {error.strerror}.") from error
    return f"wrote {out / 'doctor.json'}" + (f"; look at {out / SHEET_NAME}: is each camera under its name?" if paths else "")


def python_and_packages() -> Iterator[Row]:
    """The interpreter and the core's requirements."""
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    yield Row("ok" if supported else "fail", "software", f"Python {platform.python_version()}", "" if supported else "Use Python 3.10 to 3.13.")
    for package in _PACKAGES:
        try:
            yield Row("ok", "software", f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            yield Row("fail", "software", f"{package} is not installed", install_command())


def extras(config: DoctorConfig) -> Iterator[Row]:
    """Optional packages: needed where the robot asks for them, else only mentioned."""
    needed = {
        "robot": isinstance(config.robot, SO100FollowerConfig),
        "sim": config.robot is not None and not isinstance(config.robot, SO100FollowerConfig),
    }
    for what, (module, extra) in _EXTRAS.items():
        if importlib.util.find_spec(module) is not None:
            yield Row("ok", "software", f"{what}: installed")
        else:
            yield Row("fail" if needed.get(extra) else "warn", "software", f"{what}: '{module}' is not installed", install_command(extra))


def network(config: DoctorConfig) -> Iterator[Row]:
    """What needs torch: devices, engines, the checkpoint."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it links to is missing
        yield Row("fail", "GPU", f"torch cannot be imported: {' '.join(str(error).split())}", install_command())
        return
    parameters = yield from checkpoint(config)
    yield from gpu(torch, parameters)
    yield from engines(torch)


def gpu(torch: Any, parameters: int | None) -> Iterator[Row]:
    """What torch sees, and whether a network of so many parameters has room: in bf16 on a GPU, on a CPU as --precision=auto is there."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
            capability = f"{properties.major}.{properties.minor}"
            what = f"cuda:{index}: {properties.name}, {total / _GIB:.0f} GiB ({free / _GIB:.1f} free), compute capability {capability}"
            yield Row("ok", "GPU", what)
            yield from _room(parameters, 2, free, f"cuda:{index}", "bf16", "Close what uses the GPU (nvidia-smi lists it).")
    elif torch.backends.mps.is_available():
        yield Row("ok", "GPU", "Apple GPU (mps)")
    else:
        advice = "The network runs on the CPU; gr00t-fast bench says how fast."
        yield Row("warn", "GPU", f"torch {torch.__version__} sees no GPU", advice)
        if (free := _available_bytes()) is not None:
            from gr00t_fast.engine.choose import select_precision

            dtype = select_precision("auto", torch.device("cpu"))
            precision = "bf16" if dtype == torch.bfloat16 else "fp32"
            advice = "Close other programs, or use an 8-bit export (docs/engines.md)."
            yield from _room(parameters, dtype.itemsize, free, "this machine's memory", precision, advice)


def _room(parameters: int | None, each_bytes: int, free_bytes: int, where: str, precision: str, advice: str) -> Iterator[Row]:
    if parameters is None:
        return
    needed = parameters * each_bytes + _WORKING_BYTES
    what = f"the checkpoint needs about {needed / _GIB:.1f} GiB in {precision}, {where} has {free_bytes / _GIB:.1f} GiB free"
    yield Row("ok", "GPU", what) if needed <= free_bytes else Row("fail", "GPU", what, advice)


def _available_bytes() -> int | None:
    """Of memory, on Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def engines(torch: Any) -> Iterator[Row]:
    """Engines that can run on this machine; files of an export are another question."""
    cuda = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    row = partial(Row, section="engines")
    yield row("ok", what="eager: runs here")
    yield (
        row("ok", what="compiled: runs here") if _compiler() else row("warn", what="compiled: no C++ compiler", what_to_do="Install g++ or clang++.")
    )
    yield row("ok", what="cuda_graph: runs here") if cuda else row("warn", what="cuda_graph: needs a CUDA GPU")
    yield row("ok", what="fp8: runs here") if capability >= (8, 9) else row("warn", what="fp8: needs a GPU of Ada, Hopper or newer (8.9)")
    for name in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(name) is None:
            yield row("warn", what=f"{name}: not installed", what_to_do=install_command("export" if name == "onnxruntime" else name))
        else:
            yield row("ok", what=f"{name}: installed")
    from gr00t_fast.tensorrt_library import installed

    if not (found := installed()):
        yield row("warn", what="tensorrt: neither tensorrt_rtx nor tensorrt is installed", what_to_do=install_command("tensorrt_rtx"))
    elif not cuda:
        yield row("warn", what=f"tensorrt: {found[0]} is installed and builds here, but there is no CUDA GPU to run on")
    else:
        yield row("ok", what=f"tensorrt: {found[0]} is installed")


def checkpoint(config: DoctorConfig) -> Generator[Row, None, int | None]:
    """What the small files of --model_path say, and the headers of its weights. Returns the number of parameters, None where it is not known."""
    if not config.model_path.strip():
        return None
    from gr00t_fast.checkpoint import open_checkpoint

    parameters = None
    try:
        found = open_checkpoint(config.model_path, revision=config.revision, with_weights=False, letterbox=config.letterbox)
        whole = _with_weights(config, found)
    except Gr00tFastError as error:
        yield failed("checkpoint", f"{config.model_path} is not usable", error)
        return None
    try:
        found = open_checkpoint(config.model_path, letterbox=config.letterbox) if whole else found
        parameters = _parameters(found)
        size = f", {parameters / 1e6:.0f} million parameters in {len(found.weight_files)} files" if parameters else ", weights not looked at"
        yield Row("ok", "checkpoint", f"{found.path}: {found.network.title}{size}")
    except Gr00tFastError as error:
        yield failed("checkpoint", f"{config.model_path} is incomplete", error)
    try:
        yield from _training(config, found)
    except Gr00tFastError as error:
        yield failed("checkpoint", f"--embodiment_tag={config.embodiment_tag} and --data_config={config.data_config} do not fit", error)
    yield _tokenizer(config, found)
    size = yield from _pictures(config, found)
    yield from _exports(config, found, size)
    return parameters


def _with_weights(config: DoctorConfig, found: Any) -> bool:
    """Of a name on the hub they would be fetched; so would those that a LoRA adapter changes."""
    return Path(config.model_path).expanduser().is_dir() and found.adapter is None


def _parameters(found: Any) -> int | None:
    """From the headers of the weight files, which are checked for being whole. Raises CheckpointError."""
    from gr00t_fast.checkpoint.tensor_file import TensorFile

    count = 0
    for path in found.weight_files:
        with TensorFile(path) as file:
            count += sum(math.prod(entry.shape) for entry in file.entries.values())
    return count or None


def _training(config: DoctorConfig, found: Any) -> Iterator[Row]:
    from gr00t_fast.checkpoint import read_policy_metadata

    metadata = read_policy_metadata(found.path, config.embodiment_tag, config.data_config, letterbox=config.letterbox)
    cameras = ", ".join(f"'{name}'" + (f" {size[0]}x{size[1]}" if size else "") for name, size in metadata.resolutions.items())
    rate = f" at {metadata.fps:g} Hz" if metadata.fps else ""
    rate += "" if (letterbox := metadata.letterbox) is None else f", {'padded' if letterbox.pads else 'not padded'} to a square ({letterbox.why})"
    steps, horizon = found.config.head.denoising_steps, metadata.trained_horizon
    yield Row("ok", "checkpoint", f"{config.embodiment_tag}: cameras {cameras}{rate}; {horizon} actions, {steps} denoising steps")
    if config.action_horizon is not None and config.action_horizon > horizon:
        yield Row("fail", "checkpoint", f"--action_horizon={config.action_horizon} is more than it was trained to predict", f"Use 1 to {horizon}.")


def _tokenizer(config: DoctorConfig, found: Any) -> Row:
    from gr00t_fast.inputs.prompt import find_tokenizer

    try:
        find_tokenizer(found.network.prompt, config.processor_path, found.base, offline=True)
    except CheckpointError as error:
        if config.processor_path is not None or "fetching" not in str(error):
            return failed("checkpoint", "no usable tokenizer files", error)
        where = found.base / found.network.prompt.folders[0]
        advice = "A run fetches them from the hub, which takes the internet; or copy them there, or give --processor_path."
        return Row("warn", "checkpoint", f"no tokenizer files in {where}, nor in the hub's cache", advice)
    return Row("ok", "checkpoint", "tokenizer files")


def _pictures(config: DoctorConfig, found: Any) -> Generator[Row, None, tuple[int, int] | None]:
    """Height and width of the pictures that are made of this robot's cameras, where a network's follow them; None where that is not known."""
    if found.network.fixed_images or not (cameras := _cameras(config)):
        return None
    from gr00t_fast.control.binding import resolve_camera_map

    try:
        embodiment = found.embodiment(config.embodiment_tag, config.data_config)
        images = found.network.images(embodiment, found.config)
        mapping = resolve_camera_map(cameras, embodiment.metadata.resolutions, config.camera_map)
        height, width = images.size({policy: (cameras[name].height, cameras[name].width) for name, policy in mapping.items()})
    except ObservationError as error:
        yield failed("fit", "these cameras do not go together", error)
        return None
    except Gr00tFastError:
        return None  # said elsewhere
    tokens = images.tokens_of((height, width))
    yield Row("ok", "fit", f"pictures of {width}x{height}, {tokens} tokens each")
    return height, width


def _exports(config: DoctorConfig, found: Any, picture: tuple[int, int] | None) -> Iterator[Row]:
    """Exports beside the checkpoint, and the one that --engine asks for: whole, and of this checkpoint?"""
    from gr00t_fast.engine.choose import CALIBRATED, EXPORTED
    from gr00t_fast.files import MANIFEST_NAME

    asked = None
    if config.engine in (*CALIBRATED, *EXPORTED):
        asked = (config.engine_path.expanduser() if config.engine_path else found.path / "exports" / config.engine).resolve()
    elif config.engine_path is not None:
        yield Row("fail", "exports", f"--engine_path={config.engine_path} without an engine that reads files", "Give --engine too.")
    beside = {file.parent.resolve() for file in (found.path / "exports").glob(f"*/{MANIFEST_NAME}")}
    for directory in sorted(beside | ({asked} if asked else set())):
        try:
            yield _export(config, found, directory, picture)
        except Gr00tFastError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            stale = f"{'the engine that --engine asks for, ' if directory == asked else ''}{directory} cannot be used"
            yield Row("fail" if directory == asked else "warn", "exports", stale, " ".join(lines))


def _export(config: DoctorConfig, found: Any, directory: Path, picture: tuple[int, int] | None) -> Row:
    """Raises EngineError, StaleEngineError, and ObservationError for one that is for cameras of another shape."""
    from gr00t_fast.engine.manifest import Digests, check_manifest, check_picture, read_manifest, remedy_for, target_of

    target = target_of(found, config.embodiment_tag, config.data_config)
    remedy = remedy_for(directory, target, "to_onnx.py")
    manifest = read_manifest(directory, remedy)
    if picture is not None:
        camera = next(iter(_cameras(config).values()))
        check_picture(manifest.shapes, picture, (camera.width, camera.height), remedy)
    if not found.weight_files:
        return Row("warn", "exports", f"{directory.name}: not compared with the weights, which are not here")
    own = [directory / name for name in manifest.files if (directory / name).is_file()]
    if sum(file.stat().st_size for file in Digests(directory).unknown([*found.weight_files, *own])) > _READ_AT_MOST_BYTES:
        what = f"{directory.name}: the checkpoint's or its own files are newer than what was last compared; a run compares them whole"
        return Row("warn", "exports", what, f"If the checkpoint was trained on since, make it again: {remedy}")
    kind = (check_manifest(directory, manifest.kind, target, remedy).quantisation or {}).get("format") or manifest.precision
    return Row("ok", "exports", f"{directory.name}: {manifest.kind} in {kind}, made for this checkpoint")


def fit(config: DoctorConfig) -> Iterator[Row]:
    """What is known of robot and checkpoint before connecting, judged as a run judges it."""
    if config.robot is None or (metadata := _metadata(config)) is None:
        return
    from gr00t_fast.contracts import SO100_JOINTS, CameraSpec
    from gr00t_fast.control.preflight import check_before_connecting

    specs = {name: CameraSpec(camera.width, camera.height, camera.fps) for name, camera in _cameras(config).items()}
    unit = "degrees" if config.robot.use_degrees else "range_m100_100"
    robot = SimpleNamespace(cameras=specs, joint_names=SO100_JOINTS, joint_unit=unit)
    found = check_before_connecting(robot, metadata, config.fps, config.camera_map, config.action_horizon)
    yield from (Row("fail", "fit", problem) for problem in (*found.impossible, *found.problems))
    yield from (Row("warn", "fit", warning) for warning in found.warnings)
    yield from (Row("ok", "fit", note) for note in found.notes)
    if not (found.impossible or found.problems):
        yield Row("ok", "fit", "cameras, joints and units of the arm are the checkpoint's")


def camera_titles(config: DoctorConfig) -> dict[str, str]:
    """What the contact sheet says under each camera's name."""
    from gr00t_fast.control.binding import resolve_camera_map

    cameras, metadata = _cameras(config), _metadata(config)
    if metadata is None:
        return {name: f"{camera.width}x{camera.height}" for name, camera in cameras.items()}
    try:
        mapping = resolve_camera_map(cameras, metadata.resolutions, config.camera_map)
    except PreflightError:
        mapping = {}
    return titles(cameras, mapping, metadata.resolutions)


def _cameras(config: DoctorConfig) -> dict[str, Any]:
    return getattr(config.robot, "cameras", {})


def _metadata(config: DoctorConfig) -> Any:
    """None where there is no checkpoint, or one with faults: they were said."""
    if not config.model_path.strip():
        return None
    from gr00t_fast.checkpoint import read_policy_metadata

    try:
        return read_policy_metadata(config.model_path, config.embodiment_tag, config.data_config, config.revision, config.letterbox)
    except Gr00tFastError:
        return None


def _compiler() -> bool:
    from shutil import which

    return any(which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


main = Command(
    DoctorConfig,
    work,
    "usage: gr00t-fast doctor [--model_path=DIR] [--robot.type=... --robot.port=...] [--flag=value ...]",
    "exit codes: 0 nothing that the given flags need is missing or wrong, 1 something is, 2 bad flag",
    file_of=RunConfig,
    not_from_file=_NOT_OF_A_RUN,
)
