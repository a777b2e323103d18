"""From our configuration to lerobot's objects, its calibration explained, and its cameras before a run: are their devices there, a picture of each.

lerobot takes five seconds to import, so that happens inside the functions.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import field, fields, make_dataclass
from enum import Enum
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np

from gr00t_fast.base.contracts import SO100_JOINTS
from gr00t_fast.base.errors import ConfigError, RobotError, check_ranges, one_line, require
from gr00t_fast.base.files import lerobot_home
from gr00t_fast.robots import CameraConfig, OpenCVCameraConfig, RobotConfig, SO100FollowerConfig, filmed

_LEROBOT_NAME = "so_follower"  # of the driver since lerobot 0.4.3, and of the directory with its calibrations
_OLDER_DIRECTORIES = ("so100_follower", "so101_follower")  # of lerobot before the two drivers became one
TICKS = 4095  # lerobot's scale: 360 degrees are 4095 ticks
# A servo clamps its goal to the calibrated range: one that stands outside is moved to the border at full speed as soon as it is switched on.
# So much, less than a tick of ordinary motion, is tolerated: readings and stops are not exact.
OUTSIDE_DEG = 4.0
GRIPPER = SO100_JOINTS.index("gripper")
RANGES = {  # by field, the least and the most that makes sense
    "reconnect_s": (0.0, 3600.0),
    "watchdog_s": (0.5, 60.0),  # a busy machine holds up a sound program for some tenths of a second
    "num_read_retries": (0, 10),  # a silent servo costs 0.15 s each time
}
CAMERA_S = 6.0  # a camera that has given no picture by then counts as one that gives none; lerobot lets it warm up for a second
_FINDERS = {"opencv": "lerobot-find-cameras opencv", "intelrealsense": "lerobot-find-cameras realsense"}
_LIBRARIES = {  # type of camera -> what it imports, and how to install that
    "intelrealsense": ("pyrealsense2", "lerobot[intelrealsense]"),
    "reachy2_camera": ("reachy2_sdk", "lerobot[reachy2]"),
    "zmq": ("zmq", "pyzmq"),
}
_V4L = 200  # OpenCV's number of the backend that opens device files
_OTHER_BACKENDS = ("OPENCV_VIDEOIO_PLUGIN_PATH", "OPENCV_VIDEOIO_PRIORITY_LIST")  # cameras may then come without a device file


def check_numbers(config: SO100FollowerConfig) -> None:
    """Raise ConfigError for a flag of the arm whose number makes no sense. Imports and touches nothing."""
    check_ranges(config, "robot.", **RANGES)
    max_step(config)


def make_follower(config: SO100FollowerConfig) -> Any:
    """lerobot's unmodified `SO100Follower`. Raises MissingExtraError without lerobot, RobotError when its constructor refuses."""
    require("scservo_sdk", "robot")
    package = require("lerobot.robots.so_follower", "robot")
    known = {each.name for each in fields(package.SO100FollowerConfig)}
    values = {name: value for name, value in vars(config).items() if name in known}
    if "num_read_retries" in known:
        values["num_read_retries"] = 0  # Guard repeats below the driver, with what a damaged line needs in between; not both
    values["max_relative_target"] = None  # SO100FollowerArm limits steps itself
    values["cameras"] = {}
    try:
        follower = package.SO100Follower(package.SO100FollowerConfig(**values))
    except Exception as error:
        raise RobotError(
            f"lerobot refused the arm's configuration or calibration file: {type(error).__name__}: {error}. "
            f"If the calibration file is damaged, make it anew: {calibrate_command(config)}"
        ) from error
    follower.cameras = {name: make_camera(name, camera) for name, camera in filmed(config).items()}
    return follower


def calibrate_command(config: SO100FollowerConfig) -> str:
    """What to type to calibrate this arm."""
    directory = f" --robot.calibration_dir={config.calibration_dir}" if config.calibration_dir else ""
    name = config.id or "my_arm"
    return f"lerobot-calibrate --robot.type={config.type_name} --robot.port={config.port} --robot.id={name}{directory}"


def calibration_file(config: SO100FollowerConfig) -> Path:
    """Where lerobot looks for the arm's calibration, found without importing lerobot (a test compares the two)."""
    if config.calibration_dir is not None:
        return Path(config.calibration_dir) / f"{config.id}.json"
    directory = Path(os.environ.get("HF_LEROBOT_CALIBRATION") or lerobot_home() / "calibration").expanduser()
    return directory / "robots" / _LEROBOT_NAME / f"{config.id}.json"


def check_calibration_exists(config: SO100FollowerConfig) -> None:
    """Raise RobotError when the arm has no calibration file. Takes no time: to be asked before anything slow is done."""
    path = calibration_file(config)
    if path.is_file():
        return
    found = ", ".join(sorted(file.stem for file in path.parent.glob("*.json"))) or "none"
    if config.id is None:
        raise RobotError(
            f"--robot.id is missing: the name that the arm was calibrated under. Ids found in {path.parent}: {found}. "
            f"An arm that has none yet: {calibrate_command(config)}"
        )
    older = [path.parent.with_name(name) / path.name for name in _OLDER_DIRECTORIES]
    moved = next((f" lerobot kept it elsewhere before: --robot.calibration_dir={file.parent} takes {file}." for file in older if file.is_file()), "")
    raise RobotError(
        f"the arm is not calibrated: expected a calibration file at {path}, ids found there: {found}.{moved} "
        f"Give the right --robot.id, or calibrate: {calibrate_command(config)}"
    )


def check_calibration_file(follower: Any, config: SO100FollowerConfig) -> None:
    """Raise RobotError when no calibration was found for the arm's id, or when it lacks joints. Touches no hardware."""
    check_calibration_exists(config)
    if set(follower.calibration) != set(SO100_JOINTS) or any(c.range_min >= c.range_max for c in follower.calibration.values()):
        raise RobotError(
            f"the calibration file {follower.calibration_fpath} must hold range_min < range_max for the joints {', '.join(SO100_JOINTS)}; "
            f"it holds {', '.join(sorted(follower.calibration)) or 'none'}. Calibrate again: {calibrate_command(config)}"
        )


def check_calibration_in_servos(follower: Any, config: SO100FollowerConfig) -> None:
    """Raise RobotError, with the differing values, when the servos hold another calibration than the file. Only reads."""
    if differences := calibration_differences(follower.calibration, follower.bus.read_calibration()):
        raise RobotError(
            f"the servos on {config.port} hold another calibration than {follower.calibration_fpath} ({differences}). "
            f"Is this the arm '{config.id}'? To write the file to the servos, or to calibrate again, run: {calibrate_command(config)}"
        )


def calibration_differences(in_file: Mapping[str, Any], in_servos: Mapping[str, Any]) -> str:
    """Up to four values that differ between two calibrations by joint; empty when none does."""
    found = [
        f"{joint}.{name}: file {getattr(expected, name)}, servo {getattr(in_servos[joint], name)}"
        for joint, expected in in_file.items()
        for name in ("homing_offset", "range_min", "range_max")
        if getattr(expected, name) != getattr(in_servos[joint], name)
    ]
    return "; ".join(found[:4]) + ("; .." if len(found) > 4 else "")


def outside_range(positions: Mapping[str, int], calibration: Mapping[str, Any]) -> str:
    """The joints that stand outside their calibrated range by more than OUTSIDE_DEG; empty when none does. positions: joint -> ticks."""
    ranges = {joint: (calibration[joint].range_min, calibration[joint].range_max) for joint in positions}
    beyond_deg = {joint: max(low - positions[joint], positions[joint] - high) * 360 / TICKS for joint, (low, high) in ranges.items()}
    return ", ".join(f"{joint} by {beyond:.0f} degrees" for joint, beyond in beyond_deg.items() if beyond > OUTSIDE_DEG)


def scale_and_limits(calibration: Mapping[str, Any], use_degrees: bool) -> tuple[np.ndarray, np.ndarray]:
    """(6,) how much each joint's reading changes when its shaft turns by a degree; (6, 2) lowest and highest target: degrees about mid-range or
    -100..100 for the body, 0..100 for the gripper."""
    range_deg = np.array([(calibration[joint].range_max - calibration[joint].range_min) * 360 / TICKS for joint in SO100_JOINTS])  # (J,)
    half = range_deg / 2 if use_degrees else np.full(len(SO100_JOINTS), 100.0)
    limits = np.stack([-half, half], axis=1)  # (J, 2)
    limits[GRIPPER] = 0.0, 100.0
    return (limits[:, 1] - limits[:, 0]) / range_deg, limits


def readings(positions: Mapping[str, int], calibration: Mapping[str, Any], use_degrees: bool) -> np.ndarray:
    """(6,) what lerobot's driver makes of `positions`, joint -> ticks: degrees about mid-range, the rest within its range (a test compares them)."""
    low, high = scale_and_limits(calibration, use_degrees)[1].T  # (J,)
    of_joint = [calibration[joint] for joint in SO100_JOINTS]
    first, last, turned = np.array([(values.range_min, values.range_max, bool(values.drive_mode)) for values in of_joint]).T
    share = (np.array([positions[joint] for joint in SO100_JOINTS]) - first) / (last - first)
    bounded = (np.arange(len(SO100_JOINTS)) == GRIPPER) | (not use_degrees)
    return low + (high - low) * np.where(bounded, np.clip(np.where(turned, 1 - share, share), 0, 1), share)


def max_step(config: SO100FollowerConfig) -> np.ndarray | None:
    """(6,) how far from where a joint stands its goal may be; None: no limit. Raises ConfigError for one that is not positive."""
    limit = config.max_relative_target
    if limit is None:
        return None
    by_joint = limit if isinstance(limit, dict) else dict.fromkeys(SO100_JOINTS, limit)
    if set(by_joint) != set(SO100_JOINTS) or not all(math.isfinite(value) and value > 0 for value in by_joint.values()):
        raise ConfigError(f"--robot.max_relative_target must be a positive number, or one for each of {', '.join(SO100_JOINTS)}; got {limit}.")
    return np.array([float(by_joint[joint]) for joint in SO100_JOINTS])


# Cameras, each of a type that lerobot knows.


def find_camera_types() -> None:
    """Make a CameraConfig, with lerobot's settings and checks, of each type of camera that the installed lerobot or a plugin of it registers. Raises
    MissingExtraError without lerobot."""
    package = require("lerobot.cameras", "robot")
    modules = [f"lerobot.cameras.{each.name}" for each in pkgutil.iter_modules(package.__path__) if each.ispkg]
    modules += [name for each in distributions() if (name := each.metadata["Name"] or "").startswith("lerobot_camera_")]
    for module in modules:
        with contextlib.suppress(ImportError):  # a plugin's; lerobot's own are imported without their libraries
            importlib.import_module(module)
    for name, theirs in package.CameraConfig.get_known_choices().items():
        if name not in CameraConfig.types:
            made = make_dataclass(theirs.__name__, _settings(theirs), bases=(CameraConfig,), kw_only=True, namespace={"__post_init__": _checked})
            CameraConfig.types[name], made.type_name = made, name  # type: ignore[attr-defined]


def _settings(theirs: type) -> list[tuple[str, Any, Any]]:
    """Name, type and default of what a configuration of lerobot has beyond a CameraConfig. Enumerations become their values."""
    hints, found = get_type_hints(theirs), []
    for each in fields(theirs):
        hint, default = hints[each.name], getattr(each.default, "value", each.default)
        hint = Literal[tuple(word.value for word in hint)] if isinstance(hint, type) and issubclass(hint, Enum) else hint
        if each.init and each.name not in CameraConfig.__dataclass_fields__:
            found.append((each.name, hint, field(default=default, default_factory=each.default_factory)))
    return found


def _checked(camera: CameraConfig) -> None:
    """Raises ConfigError for what lerobot refuses."""
    try:
        _lerobots(camera)
    except Exception as error:
        raise ConfigError(one_line(error)) from error


def _lerobots(camera: CameraConfig) -> Any:
    """lerobot's configuration of it."""
    package = require("lerobot.cameras", "robot")
    if isinstance(camera, OpenCVCameraConfig):
        require("lerobot.cameras.opencv", "robot")  # registers it
    return package.CameraConfig.get_choice_class(camera.type_name)(**vars(camera))


def make_camera(name: str, camera: CameraConfig) -> Any:
    """lerobot's, not yet opened. Raises RobotError, MissingExtraError without lerobot."""
    package = require("lerobot.cameras", "robot")
    try:
        return package.make_cameras_from_configs({name: _lerobots(camera)})[name]
    except Exception as error:
        raise RobotError(camera_error_message(name, camera, error)) from error


def open_camera(name: str, camera: CameraConfig, opened: Any, timeout_ms: float) -> np.ndarray:
    """Connect `opened`, lerobot's, and return its first picture, uint8 (height, width, 3). Raises RobotError, also for a picture of another size."""
    try:
        opened.connect(warmup=camera.type_name != "zmq")  # that one fails as `disconnect_camera` says
        frame: np.ndarray = opened.async_read(timeout_ms=timeout_ms)  # with warmup_s=0 connect() returns before there is a picture
        if frame.shape[:2] != (camera.height, camera.width):  # lerobot's zmq camera takes any
            raise ValueError(f"it delivers {frame.shape[1]}x{frame.shape[0]}, not width: {camera.width}, height: {camera.height}")
    except Exception as error:
        raise RobotError(camera_error_message(name, camera, error)) from error
    return frame


def disconnect_camera(opened: Any) -> None:
    """When its thread has ended. lerobot's zmq camera closes its socket under a thread that waits for a picture; libzmq then aborts the program."""
    if getattr(opened, "stop_event", None) is not None and hasattr(opened, "timeout_ms"):
        opened.stop_event.set()
        opened.thread.join(opened.timeout_ms / 1000 + 0.5)
    opened.disconnect()


def newest_frame(opened: Any, oldest_ms: int) -> tuple[np.ndarray, float]:
    """The newest frame of a camera of lerobot, and its age in seconds. One without a thread of its own (Reachy 2's, a plugin's) is read now. Raises
    what it raises."""
    if not (hasattr(opened, "thread") and hasattr(opened, "latest_timestamp")):
        return opened.async_read(timeout_ms=oldest_ms), 0.0
    came_s = opened.latest_timestamp  # before the frame, which is this one or a newer one
    return opened.read_latest(max_age_ms=oldest_ms), max(0.0, time.perf_counter() - came_s)


def source_of(camera: CameraConfig) -> str:
    """What tells this camera from others, in a word or two."""
    return f"index_or_path: {camera.index_or_path}" if isinstance(camera, OpenCVCameraConfig) else f"type: {camera.type_name}"


def camera_error_message(name: str, camera: CameraConfig, error: Exception) -> str:
    """Why a camera could not be opened, and what to change in --robot.cameras. lerobot's message says what the camera gives instead."""
    finder = _FINDERS.get(camera.type_name)
    advice = f"`{finder}` lists the cameras that are there, with the sizes and rates that they deliver." if finder else "Check its settings."
    return f"camera '{name}' of --robot.cameras ({source_of(camera)}) cannot be used: {one_line(error).rstrip('.!')}. {advice}"


# Whether a serial port exists, may be opened and is free.

try:
    import fcntl
    import termios
except ImportError:  # Windows opens a COM port for one program only, so no lock is needed there
    fcntl = None  # type: ignore[assignment]

PTYS = ("/dev/pts/", "/dev/ttys")  # Linux, macOS
_PTY_MASTERS = ("/dev/ptmx", "/dev/pts/ptmx")


def ports_message() -> str:
    """For an error message: the serial ports that look like a servo adapter's."""
    seen = sorted(port.device for port in require("serial.tools.list_ports", "robot").comports() if port.vid is not None)
    return f"Serial ports seen: {', '.join(seen)}" if seen else "No USB serial port is seen: check cable and power"


def check_port(port: str) -> None:
    """Raise RobotError when `port` is absent, not a serial device, not permitted, or open in another program. Opens nothing."""
    if os.name != "posix":
        return  # COM3 is not a path; opening it tells
    path = Path(port)
    if not path.is_char_device():
        wrong = "is not a serial device" if path.exists() else "does not exist"
        raise RobotError(f"the serial port {port} {wrong}. {ports_message()}. Find the right one with `lerobot-find-port`.")
    if not os.access(path, os.R_OK | os.W_OK):
        raise RobotError(
            f"no permission to read and write {port}. On Linux join its group: `sudo usermod -aG dialout $USER`, then log in again "
            f"(or, until the next plug-in: `sudo chmod 666 {port}`)."
        )
    if users := programs_using(port):
        raise RobotError(f"the serial port {port} is in use by {'; '.join(users)}. Stop that program, or choose another --robot.port.")


def lock_port(descriptor: int, port: str) -> None:
    """Mark the open port as ours; the mark goes with the process. Raises RobotError when another program holds one.

    Nobody but root can open a real serial port afterwards. Not so a pseudo-terminal, which would stay exclusive after a crash for as long as the
    virtual bus keeps it open; nor where this is the first process of a container, which the watchdog cannot end: it has to open the port, too.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        users = "; ".join(programs_using(port)) or "another program (or another arm object of this one)"
        raise RobotError(f"the serial port {port} is in use by {users}. Stop it, or choose another --robot.port.") from error
    if not os.path.realpath(port).startswith(PTYS) and os.getpid() != 1:
        with contextlib.suppress(OSError):  # not every driver has it
            fcntl.ioctl(descriptor, termios.TIOCEXCL)


def programs_using(port: str) -> list[str]:
    """Other programs that have `port` open, as `pid 123 (lerobot-teleoperate ..)`. Linux only, and only what /proc lets us see.

    A program that also holds the master side of a pseudo-terminal is the virtual bus behind the port, not a rival.
    """
    target, users = os.path.realpath(port), []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or of another user: not visible is not an error
            opened = {os.readlink(entry) for entry in (directory / "fd").iterdir()}
            if int(directory.name) != os.getpid() and target in opened and not opened.intersection(_PTY_MASTERS):
                words = (directory / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                users.append(f"pid {directory.name} ({words.strip()[:80]})")
    return users


def device_faults(robot: RobotConfig | None) -> dict[str, ConfigError]:
    """Camera -> what keeps it from being opened, as far as its device and its library tell without being opened."""
    faults, first = {}, dict[int | Path, str]()  # device -> the camera that has it
    for name, camera in filmed(robot).items():
        library, package = _LIBRARIES.get(camera.type_name, ("sys", ""))
        if importlib.util.find_spec(library) is None:
            faults[name] = ConfigError(f"camera {name}: type {camera.type_name} needs {library}. Install it with: pip install '{package}'")
        if not isinstance(camera, OpenCVCameraConfig):
            continue
        if (twin := first.setdefault(camera.index_or_path, name)) != name:
            faults[name] = ConfigError(f"cameras {twin} and {name} are the same device, {camera.index_or_path}. Give each its own index_or_path.")
        elif fault := _device_fault(name, camera):
            faults[name] = ConfigError(fault)
    return faults


def device_of(camera: OpenCVCameraConfig) -> Path:
    return Path(f"/dev/video{camera.index_or_path}" if isinstance(camera.index_or_path, int) else camera.index_or_path)


def _device_fault(name: str, camera: OpenCVCameraConfig) -> str | None:
    """On Linux, where cameras are files unless OpenCV was given another source of them."""
    path = device_of(camera)
    if sys.platform != "linux" or camera.backend not in (0, _V4L) or any(os.environ.get(each) for each in _OTHER_BACKENDS):
        return None
    if not path.exists():
        seen = ", ".join(sorted(str(each) for each in Path("/dev").glob("video*"))) or "none"
        return f"camera {name}: there is no {path}. Video devices seen: {seen}. `lerobot-find-cameras opencv` lists them."
    if not os.access(path, os.R_OK | os.W_OK):
        return f"camera {name}: no permission for {path}. Join its group: `sudo usermod -aG video $USER`, then log in again."
    return None


def take_pictures(cameras: Mapping[str, CameraConfig]) -> dict[str, np.ndarray | RobotError]:
    """A picture of each as the policy gets it, uint8 (height, width, 3), or why there is none. All are opened at once, as a run opens them, each in a
    thread that the program does not wait for when the driver hangs: takes CAMERA_S at most. Raises MissingExtraError without lerobot."""
    if cameras:
        require("lerobot.cameras.opencv", "robot")  # before the clock runs: it can take seconds to import
    taken: dict[str, np.ndarray | RobotError] = {}

    def take(name: str) -> None:
        taken[name] = _picture(name, cameras[name])

    threads = [threading.Thread(target=take, args=(name,), name=f"gr00t_fast-camera-{name}", daemon=True) for name in cameras]
    for thread in threads:
        thread.start()
    give_up_s = time.monotonic() + CAMERA_S
    for thread in threads:
        thread.join(max(0.0, give_up_s - time.monotonic()))
    for name, camera in cameras.items():
        shown = taken.setdefault(name, RobotError(f"camera '{name}' ({source_of(camera)}) gives no picture. Plug it in again."))
        if isinstance(shown, RobotError) and isinstance(camera, OpenCVCameraConfig) and (users := programs_using(str(device_of(camera)))):
            taken[name] = RobotError(f"{shown} It is in use by {'; '.join(users)}: stop that program.")
    return {name: taken[name] for name in cameras}


def _picture(name: str, camera: CameraConfig) -> np.ndarray | RobotError:
    opened = None
    try:
        opened = make_camera(name, camera)
        return open_camera(name, camera, opened, 1000 * CAMERA_S)
    except RobotError as error:
        return error
    finally:
        if opened is not None and opened.is_connected:
            disconnect_camera(opened)
