"""What is installed, what can run here, what a checkpoint needs, whether arm and cameras are ready.

Each check adds rows to a table. Those that wait for the servos, for cameras or for the import of torch run side by side, so that it takes seconds. No
weights are read, and the servos are only read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import platform
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gr00t_fast.base.contracts import SO100_JOINTS, CameraSpec, JointUnit, Observation
from gr00t_fast.base.errors import CheckpointError, ConfigError, Gr00tFastError, MissingExtraError, PreflightError, install_command, one_line
from gr00t_fast.base.measurement import linux_says
from gr00t_fast.control.binding import resolve_camera_map
from gr00t_fast.control.camera_watch import SMALLEST, fault_of
from gr00t_fast.control.limits import Poses
from gr00t_fast.control.preflight import Preflight
from gr00t_fast.evaluation.bench import obstacles
from gr00t_fast.options import PolicyOptions
from gr00t_fast.robots import ArmOptions, SO100FollowerConfig, SO100SimConfig, filmed, rendered
from gr00t_fast.robots import lerobot_glue as glue
from gr00t_fast.virtual import make_robot


def _is_real(options: DoctorOptions) -> bool:
    return isinstance(options.robot, SO100FollowerConfig)


# What a run needs besides its engine -> (module, extra that brings it, whether these flags need it).
_EXTRAS: dict[str, tuple[str, str, Callable[[DoctorOptions], bool]]] = {
    "real arm (lerobot)": ("lerobot", "robot", _is_real),
    "its servos (feetech-servo-sdk)": ("scservo_sdk", "robot", _is_real),
    "simulated arm (MuJoCo)": ("mujoco", "sim", lambda options: isinstance(options.robot, SO100SimConfig) or bool(rendered(options.cameras))),
    "pictures of a run": ("matplotlib", "plots", lambda options: False),
    "policy server": ("msgpack", "serving", lambda options: False),
}
_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "opencv-python-headless")
_GIB = 2**30
_WORKING_BYTES = _GIB  # activations, scratch and the CUDA context: a round figure above what has been measured
_READ_AT_MOST_BYTES = 512 * 2**20  # of weights, to compare an export with them: more takes seconds


@dataclass(kw_only=True)
class DoctorOptions(ArmOptions, PolicyOptions):
    """What is looked at. The machine can be without a checkpoint and an arm."""

    camera_map: dict[str, str] = field(default_factory=dict)  # "{robot camera: policy camera}", when the names differ
    fps: float | None = None  # control rate; default: the rate at which the training data was recorded
    poses: Poses = field(default_factory=Poses)
    recordings: Path | None = None  # LeRobotDataset behind the checkpoint, or its scene card: what the cameras should see

    def missing(self) -> Iterator[tuple[str, str]]:
        yield from ()

    @property
    def cameras(self) -> dict[str, Any]:
        """The cameras of the arm, drawn ones included."""
        return getattr(self.robot, "cameras", {})


@dataclass(frozen=True)
class Row:
    """One finding of a `section`. state: ok, warn (a run may suffer) or fail (a run as asked cannot succeed). `what_to_do` is empty where nothing
    needs doing."""

    state: str
    section: str
    what: str
    what_to_do: str = ""


class Rows(list[Row]):
    """What was found."""

    def add(self, section: str, what: str, what_to_do: str = "", state: str = "") -> None:
        """state: by default fail where there is something to do, else ok."""
        self.append(Row(state or ("fail" if what_to_do else "ok"), section, what, what_to_do))

    @contextmanager
    def trying(self, section: str, what: str, state: str = "fail") -> Iterator[None]:
        """An error in the block is a row; a missing package stands where packages are listed."""
        try:
            yield
        except MissingExtraError:
            pass
        except Gr00tFastError as error:
            self.append(Row(state, section, what, one_line(error)))


def look(options: DoctorOptions) -> tuple[list[Row], dict[str, np.ndarray], dict[str, str]]:
    """All checks: what was found, what cameras showed (name -> uint8 RGB (height, width, 3)), and what is to be said under their names."""
    with ThreadPoolExecutor(3) as pool:
        of_arm, of_cameras, inside = pool.submit(arm, options), pool.submit(cameras, options), pool.submit(network, options)
        (arm_rows, robot, seen), (pictures, camera_rows), (titles, metadata, inside_rows) = of_arm.result(), of_cameras.result(), inside.result()
    fits = fit(options, metadata, robot, seen, titles) if metadata is not None and robot is not None else Rows()
    pictures |= {} if seen is None else seen.frames
    if options.recordings is not None:
        fits += scene(options, options.recordings, metadata, pictures, None if seen is None else seen.joints)
    return [*packages(options), *inside_rows, *fits, *arm_rows, *camera_rows], pictures, titles


def packages(options: DoctorOptions) -> Rows:
    """The interpreter, the core's requirements, and optional packages: needed where the robot asks for them, else only mentioned."""
    rows = Rows()
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    rows.add("software", f"Python {platform.python_version()}", "" if supported else "Use Python 3.11 to 3.13.")
    for package in _PACKAGES:
        try:
            rows.add("software", f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            rows.add("software", f"{package} is not installed", install_command())
    for what, (module, extra, needed) in _EXTRAS.items():
        if importlib.util.find_spec(module) is not None:
            rows.add("software", f"{what}: installed")
        else:
            rows.add("software", f"{what}: '{module}' is not installed", install_command(extra), "fail" if needed(options) else "warn")
    return rows


# --- the arm and its cameras ---------------------------------------------------------------------------------------------------------------


def arm(options: DoctorOptions) -> tuple[Rows, Any, Observation | None]:
    """Port, servos and calibration file of a real arm, to which nothing is written. Also what `Preflight` takes of a robot, and what a run would
    observe, with the frames of drawn cameras alone; None where that is not known."""
    rows, robot = Rows(), options.robot
    if isinstance(robot, SO100SimConfig):
        with rows.trying("arm", "the simulated arm cannot be used"):
            simulated = make_robot(robot)
            simulated.connect()
            seen = simulated.observe()
            simulated.land()
            return rows, simulated, seen
    if not isinstance(robot, SO100FollowerConfig):
        return rows, None, None
    from gr00t_fast.robots.calibration import load_calibration
    from gr00t_fast.robots.motor_state import examine

    specs = {name: CameraSpec(camera.width, camera.height, camera.fps) for name, camera in options.cameras.items()}
    unit: JointUnit = "degrees" if robot.use_degrees else "range_m100_100"
    known: Any = SimpleNamespace(cameras=specs, joint_names=SO100_JOINTS, joint_unit=unit)
    calibration, path, port, positions = None, glue.calibration_file(robot), robot.port or "(none)", dict[str, int]()
    with rows.trying("arm", f"no calibration file {path}"):
        glue.check_calibration_exists(robot)
        try:
            calibration = load_calibration(path)
            rows.add("arm", f"calibration file {path}")
        except ConfigError as error:
            rows.add("arm", f"calibration file {path} is no calibration of an SO-100: {error}", glue.calibrate_command(robot))
    with rows.trying("arm", f"port {port} cannot be used"):
        glue.check_port(robot.port)
        rows.add("arm", f"port {port} is free")
        findings, positions = examine(robot.port, calibration, glue.calibrate_command(robot))
        for finding in findings:
            rows.add("arm", *finding)
    if calibration is not None:
        scale, known.joint_limits = glue.scale_and_limits(calibration, robot.use_degrees)
        with rows.trying("arm", "a pose cannot be reached"):
            options.poses.check(known.joint_limits, SO100_JOINTS, scale)
        with rows.trying("arm", "lerobot does not take these flags"):
            glue.make_follower(replace(robot, cameras={}))
    if calibration is None or any(row.state == "fail" for row in rows):
        return rows, known, None
    seen = Observation(glue.readings(positions, calibration, robot.use_degrees), frames := dict[str, np.ndarray](), 0.0)
    with rows.trying("cameras", "the cameras of type sim cannot be drawn"):
        if drawn := rendered(robot.cameras):
            from gr00t_fast.virtual.sim.simulation import RenderedCameras

            frames.update(RenderedCameras(drawn, unit).frames(seen.joints))
    return rows, known, seen


def cameras(options: DoctorOptions) -> tuple[dict[str, np.ndarray], Rows]:
    """What the cameras showed: name -> uint8 RGB (height, width, 3), and the findings."""
    rows, pictures, known = Rows(), {}, filmed(options.robot)
    faults = glue.device_faults(options.robot)
    for name, error in faults.items():
        rows.add("cameras", f"camera {name} cannot be opened", one_line(error))
    with rows.trying("cameras", "the cameras cannot be opened"):
        for name, shown in glue.take_pictures({name: known[name] for name in known if name not in faults}).items():
            if not isinstance(shown, np.ndarray):
                rows.add("cameras", f"camera {name} gives no picture", one_line(shown))
                continue
            pictures[name] = shown
            rows.add("cameras", f"camera {name}: {shown.shape[1]}x{shown.shape[0]} from {glue.source_of(known[name])}")
            if min(shown.shape[:2]) >= SMALLEST and (fault := fault_of(shown)):
                rows.add("cameras", f"camera {name} {fault[0]}", f"{fault[1]}.", "warn")
    return pictures, rows


# --- what needs torch ----------------------------------------------------------------------------------------------------------------------


def network(options: DoctorOptions) -> tuple[dict[str, str], Any, Rows]:
    """Devices, engines and the checkpoint. Also what a sheet of pictures says under each camera's name, and what the checkpoint was trained on; None
    where that is not known."""
    rows, titles = Rows(), {name: f"{camera.width}x{camera.height}" for name, camera in options.cameras.items()}
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it links to is missing
        rows.add("GPU", f"torch cannot be imported: {one_line(error)}", install_command())
        return titles, None, rows
    from gr00t_fast.engine import ENGINES

    found, parameters = _opened(options, rows)
    metadata = None if found is None else _training(options, found, rows)
    if found is not None:
        _tokenizer(options, found, rows)
        if metadata is not None:
            _engine(options, found, rows)
        _exports(options, found, None if metadata is None else _picture_size(options, found, metadata, rows), rows)
    _memory(torch, parameters, rows)
    for name, (why_not, advice) in obstacles().items():
        state = "ok" if not why_not or name != options.engine else "warn" if name in ENGINES else "fail"  # of those, `_engine` has said it
        remedy = advice or ("" if state == "ok" else "Use another --engine.")
        rows.add("engines", f"{name}: {why_not or 'can run here'}", remedy if why_not else "", state)
    return titles, metadata, rows


def _opened(options: DoctorOptions, rows: Rows) -> tuple[Any, int | None]:
    """The checkpoint, with its weights' headers where they are here, and its number of parameters; None where it cannot be used or none was named."""
    from gr00t_fast.checkpoint import open_checkpoint

    found = None
    if options.model_path.strip():
        with rows.trying("checkpoint", f"{options.model_path} is not usable"):
            found = open_checkpoint(options.model_path, with_weights=False, revision=options.revision, letterbox=options.letterbox)
    if found is None or not Path(options.model_path).expanduser().is_dir() or found.adapter is not None:
        if found is not None:  # of a name on the hub the weights would be fetched; so would those that a LoRA adapter changes
            rows.add("checkpoint", f"{found.path}: {found.network.title}, weights not looked at")
        return found, None
    with rows.trying("checkpoint", f"{options.model_path} is incomplete"):
        whole = open_checkpoint(options.model_path, letterbox=options.letterbox)
        parameters = sum(map(_parameters, whole.weight_files))
        files = len(whole.weight_files)
        size = f"{parameters / 1e6:.0f} million parameters in {files} file{'s' if files > 1 else ''}"
        rows.add("checkpoint", f"{found.path}: {found.network.title}, {size}")
        return whole, parameters
    return found, None


def _parameters(path: Path) -> int:
    """From the header of a weight file, which is checked for being whole. Raises CheckpointError."""
    from gr00t_fast.checkpoint.tensor_file import TensorFile

    with TensorFile(path) as file:
        return sum(math.prod(entry.shape) for entry in file.entries.values())


def _training(options: DoctorOptions, found: Any, rows: Rows) -> Any:
    """What the checkpoint says of its training data; None where the flags do not fit."""
    with rows.trying("checkpoint", f"--embodiment_tag={options.embodiment_tag} and --data_config={options.data_config} do not fit"):
        metadata = found.embodiment(options.embodiment_tag, options.data_config).metadata
        trained = ", ".join(f"'{name}'" + (f" {size[0]}x{size[1]}" if size else "") for name, size in metadata.resolutions.items())
        rate = f" at {metadata.fps:g} Hz" if metadata.fps else ""
        rate += "" if (letterbox := metadata.letterbox) is None else f", {'padded' if letterbox.pads else 'not padded'} to a square ({letterbox.why})"
        steps, horizon = found.config.head.denoising_steps, metadata.trained_horizon
        rows.add("checkpoint", f"{options.embodiment_tag}: cameras {trained}{rate}; {horizon} actions, {steps} denoising steps")
        if options.robot is None and options.action_horizon is not None and options.action_horizon > horizon:
            rows.add("checkpoint", f"--action_horizon={options.action_horizon} is more than it was trained to predict", f"Use 1 to {horizon}.")
        return metadata


def _engine(options: DoctorOptions, found: Any, rows: Rows) -> None:
    """Device and engine as a run chooses them, but for files, which `_exports` looks at."""
    from gr00t_fast.engine import EXPORTED, prepare_engine, select_device
    from gr00t_fast.policy import check_denoising_steps

    with rows.trying("engines", f"--engine={options.engine} --device={options.device} cannot run"):
        check_denoising_steps(options.denoising_steps or found.config.head.denoising_steps, found.config)
        if options.engine not in EXPORTED:
            prepare_engine(options.engine, select_device(options.device))


def _tokenizer(options: DoctorOptions, found: Any, rows: Rows) -> None:
    from gr00t_fast.inputs.prompt import find_tokenizer

    try:
        find_tokenizer(found.network.prompt, options.processor_path, found.base, offline=True)
        rows.add("checkpoint", "tokenizer files")
    except CheckpointError as error:
        if options.processor_path is not None or "fetching" not in str(error):
            rows.add("checkpoint", "no usable tokenizer files", one_line(error))
            return
        where = found.base / found.network.prompt.folders[0]
        advice = "A run fetches them from the hub, which takes the internet; or copy them there, or give --processor_path."
        rows.add("checkpoint", f"no tokenizer files in {where}, nor in the hub's cache", advice, "warn")


def _picture_size(options: DoctorOptions, found: Any, metadata: Any, rows: Rows) -> tuple[int, int] | None:
    """Height and width of the pictures that are made of this robot's cameras, where a network's follow them; None where that is not known."""
    if found.network.fixed_images or not options.cameras:
        return None
    try:
        mapping = resolve_camera_map(options.cameras, metadata.resolutions, options.camera_map)
    except PreflightError:
        return None  # said by `fit`
    with rows.trying("fit", "these cameras do not go together"):
        images = found.network.images(found.embodiment(options.embodiment_tag, options.data_config), found.config)
        sizes = {policy: (options.cameras[name].height, options.cameras[name].width) for name, policy in mapping.items()}
        height, width = images.size(sizes)
        rows.add("fit", f"pictures of {width}x{height}, {images.tokens_of((height, width))} tokens each")
        return height, width


def _exports(options: DoctorOptions, found: Any, picture: tuple[int, int] | None, rows: Rows) -> None:
    """Exports beside the checkpoint, and the one that --engine asks for: whole, and of this checkpoint?"""
    from gr00t_fast.base.files import MANIFEST_NAME
    from gr00t_fast.engine import EXPORTED

    asked = None
    if options.engine in EXPORTED:
        asked = (options.engine_path.expanduser() if options.engine_path else found.path / "exports" / options.engine).resolve()
    elif options.engine_path is not None:
        rows.add("exports", f"--engine_path={options.engine_path} without an engine that reads files", "Give --engine too.")
    beside = {file.parent.resolve() for file in (found.path / "exports").glob(f"*/{MANIFEST_NAME}")}
    for directory in sorted(beside | ({asked} if asked else set())):
        stale = f"{'the engine that --engine asks for, ' if directory == asked else ''}{directory} cannot be used"
        with rows.trying("exports", stale, "fail" if directory == asked else "warn"):
            _export(options, found, directory, picture, rows)


def _export(options: DoctorOptions, found: Any, directory: Path, picture: tuple[int, int] | None, rows: Rows) -> None:
    """Raises EngineError, StaleEngineError, and ObservationError for one that is for cameras of another shape."""
    from gr00t_fast.engine.manifest import Digests, check_manifest, check_picture, read_manifest, remedy_for, target_of

    target = target_of(found, options.embodiment_tag, options.data_config)
    remedy = remedy_for(directory, target, "to_onnx.py")
    manifest = read_manifest(directory, remedy)
    if picture is not None:
        camera = next(iter(options.cameras.values()))
        check_picture(manifest.shapes, picture, (camera.width, camera.height), remedy)
    own = [directory / name for name in manifest.files if (directory / name).is_file()]
    if not found.weight_files:
        rows.add("exports", f"{directory.name}: not compared with the weights, which are not here", state="warn")
    elif sum(file.stat().st_size for file in Digests(directory).unknown([*found.weight_files, *own])) > _READ_AT_MOST_BYTES:
        what = f"{directory.name}: the checkpoint's or its own files are newer than what was last compared; a run compares them whole"
        rows.add("exports", what, f"If the checkpoint was trained on since, make it again: {remedy}", "warn")
    else:
        kind = (check_manifest(directory, manifest.kind, target, remedy).quantisation or {}).get("format") or manifest.precision
        rows.add("exports", f"{directory.name}: {manifest.kind} in {kind}, made for this checkpoint")


def _memory(torch: Any, parameters: int | None, rows: Rows) -> None:
    """What torch sees, and whether a network of so many parameters has room: in bf16 on a GPU, on a CPU as --precision=auto is there."""
    from gr00t_fast.engine import select_precision

    def room(free_bytes: int, each_bytes: int, where: str, advice: str) -> None:
        if parameters is not None:
            needed, precision = parameters * each_bytes + _WORKING_BYTES, "bf16" if each_bytes == 2 else "fp32"
            what = f"the checkpoint needs about {needed / _GIB:.1f} GiB in {precision}, {where} has {free_bytes / _GIB:.1f} GiB free"
            rows.add("GPU", what, advice if needed > free_bytes else "")

    for index in range(torch.cuda.device_count()):
        properties, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        rows.add("GPU", f"cuda:{index}: {properties.name}, {total / _GIB:.0f} GiB ({free / _GIB:.1f} free), compute capability {capability}")
        room(free, 2, f"cuda:{index}", "Close what uses the GPU (nvidia-smi lists it).")
    if torch.cuda.is_available():
        return
    if torch.backends.mps.is_available():
        rows.add("GPU", "Apple GPU (mps)")
        return
    rows.add("GPU", f"torch {torch.__version__} sees no GPU", "The network runs on the CPU; gr00t-fast bench says how fast.", "warn")
    if free := linux_says("meminfo", "MemAvailable"):
        each_bytes = select_precision("auto", torch.device("cpu")).itemsize
        room(int(free.split()[0]) * 1024, each_bytes, "this machine's memory", "Close other programs, or use an 8-bit export (docs/engines.md).")


def scene(options: DoctorOptions, source: Path, metadata: Any, pictures: dict[str, np.ndarray], joints: np.ndarray | None) -> Rows:
    """What a run says of cameras and pose against the recordings. Adds pictures: what was recorded, what is seen, and the difference."""
    from gr00t_fast.evaluation.scene import card_of
    from gr00t_fast.scene.look import look

    rows, refuses = Rows(), options.preflight == "refuse"
    with rows.trying("scene", f"--recordings={source} cannot be used"):
        card = card_of(source, SO100_JOINTS, lambda text: None)
        mapping = {name: name for name in pictures} if metadata is None else resolve_camera_map(pictures, metadata.resolutions, options.camera_map)
        found = look(card, pictures, mapping, joints, options.poses.home is not None)
        states = {"problem": "fail" if refuses else "warn", "warning": "warn", "note": "ok"}
        for kind, text in found.findings:
            rows.add("scene", text, state=states[kind])
        if not found.findings:
            rows.add("scene", f"cameras and pose are those of {card.name}")
        pictures |= {f"{name} compared": picture for name, picture in found.pictures.items()}
    return rows


def fit(options: DoctorOptions, metadata: Any, robot: Any, seen: Observation | None, titles: dict[str, str]) -> Rows:
    """What a run says of robot and checkpoint before it connects and, where the arm was `seen`, after. Fills in what stands under cameras' names."""
    rows, refuses = Rows(), options.preflight == "refuse"
    checks = Preflight(robot, metadata, led=options.poses.home is not None)
    found = checks.look(options.fps, options.camera_map, options.action_horizon)
    fits = not any(kind == "impossible" for kind, _ in found)
    if fits and seen is not None:
        found += checks.look_at(seen)
    states = {"impossible": "fail", "problem": "fail" if refuses else "warn", "warning": "warn", "note": "ok"}
    for kind, state in states.items():
        for text in [text for each, text in found if each == kind]:
            rows.add("fit", text, state=state)
    if not any(kind in ("impossible", "problem") for kind, _ in found):
        rows.add("fit", "cameras, joints and units of the arm are the checkpoint's" + ("" if seen is not None else "; its pose was not looked at"))
    if fits:
        mapping = resolve_camera_map(options.cameras, metadata.resolutions, options.camera_map)
        for name in titles:
            size = metadata.resolutions.get(mapping.get(name))
            whose = f"the checkpoint's '{mapping[name]}'" + (f" {size[0]}x{size[1]}" if size else "") if name in mapping else "not the checkpoint's"
            titles[name] += f": {whose}"
    return rows
