"""The doctor's look at an arm: its port and who holds it, its servos (read only), its calibration file, a picture of each camera."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gr00t_fast.control.camera_watch import SMALLEST, fault_of
from gr00t_fast.errors import ConfigError, Gr00tFastError, MissingExtraError
from gr00t_fast.robots.config import OpenCVCameraConfig, RobotConfig, SO100FollowerConfig

CAMERA_S = 4.0  # a camera that has given no picture by then counts as one that gives none
SETTLE_FRAMES = 5  # of which the last is kept: the first ones of a webcam are dark
_V4L = 200  # OpenCV's number of the backend that opens device files
_OTHER_BACKENDS = ("OPENCV_VIDEOIO_PLUGIN_PATH", "OPENCV_VIDEOIO_PRIORITY_LIST")  # cameras may then come without a device file


@dataclass(frozen=True)
class Row:
    """One finding of a `section`. state: ok, warn (a run may suffer) or fail (a run as asked cannot succeed). `what_to_do` is empty where nothing
    needs doing."""

    state: str
    section: str
    what: str
    what_to_do: str = ""


def failed(section: str, what: str, error: Gr00tFastError) -> Row:
    return Row("fail", section, what, " ".join(str(error).split()))


def arm(robot: RobotConfig | None) -> Iterator[Row]:
    """Port, servos and calibration file of a real arm. Nothing is written to the servos."""
    if not isinstance(robot, SO100FollowerConfig):
        return
    from gr00t_fast.robots.lerobot_glue import calibrate_command, calibration_file, check_calibration_exists, check_port
    from gr00t_fast.robots.servo_check import judge, look
    from gr00t_fast.robots.virtual_bus.servo import load_calibration

    calibration, path = None, calibration_file(robot)
    try:
        check_calibration_exists(robot)
        calibration = load_calibration(path)
        yield Row("ok", "arm", f"calibration file {path}")
    except ConfigError as error:
        yield Row("fail", "arm", f"calibration file {path} is no calibration of an SO-100: {error}", calibrate_command(robot))
    except Gr00tFastError as error:
        yield failed("arm", f"no calibration file {path}", error)
    port = robot.port or "(none)"
    try:
        check_port(robot.port)
        yield Row("ok", "arm", f"port {port} is free")
        servos = look(robot.port)
    except MissingExtraError:
        return  # said where packages are listed
    except Gr00tFastError as error:
        yield failed("arm", f"port {port} cannot be used", error)
        return
    yield from (Row(each.state, "arm", each.what, each.what_to_do) for each in judge(servos, calibration, calibrate_command(robot)))


def check_camera_devices(robot: RobotConfig | None) -> None:
    """Raises ConfigError for a camera whose device is not there: to be asked before weights are read."""
    for name, camera in getattr(robot, "cameras", {}).items():
        if isinstance(camera, OpenCVCameraConfig) and (row := camera_device(name, camera)).state == "fail":
            raise ConfigError(f"{row.what}. {row.what_to_do}")


def camera_device(name: str, camera: OpenCVCameraConfig) -> Row:
    """Whether the device is there and may be read; on Linux, where cameras are files unless OpenCV was given another source of them."""
    elsewhere = sys.platform != "linux" or camera.backend not in (0, _V4L) or any(os.environ.get(each) for each in _OTHER_BACKENDS)
    path = Path(f"/dev/video{camera.index_or_path}" if isinstance(camera.index_or_path, int) else camera.index_or_path)
    if elsewhere:
        return Row("ok", "cameras", f"camera {name}: {camera.index_or_path}")
    if not path.exists():
        seen = ", ".join(sorted(str(each) for each in Path("/dev").glob("video*"))) or "none"
        return Row("fail", "cameras", f"camera {name}: there is no {path}", f"Video devices seen: {seen}. `lerobot-find-cameras opencv` lists them.")
    if not os.access(path, os.R_OK | os.W_OK):
        advice = "Join its group: `sudo usermod -aG video $USER`, then log in again."
        return Row("fail", "cameras", f"camera {name}: no permission for {path}", advice)
    return Row("ok", "cameras", f"camera {name}: {path}")


@dataclass
class Pictures:
    """What the cameras showed: name -> uint8 RGB (height, width, 3), and the findings."""

    frames: dict[str, np.ndarray] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def take_pictures(robot: RobotConfig | None) -> Pictures:
    """Open all OpenCV cameras at once, as a run would, and keep a picture of each. Takes CAMERA_S at most."""
    cameras = {name: each for name, each in getattr(robot, "cameras", {}).items() if isinstance(each, OpenCVCameraConfig)}
    found, shots = Pictures(), {}
    for name, camera in cameras.items():
        row = camera_device(name, camera)
        if row.state == "fail":
            found.rows.append(row)
        elif twin := next((other for other in shots if cameras[other].index_or_path == camera.index_or_path), None):
            what = f"cameras {twin} and {name} are the same device, {camera.index_or_path}"
            found.rows.append(Row("fail", "cameras", what, "Give each its own index_or_path; `lerobot-find-cameras opencv` lists them."))
        else:
            shots[name] = _Shot(name, camera)
    give_up_s = time.monotonic() + CAMERA_S
    for name, shot in shots.items():
        shot.join(max(0.0, give_up_s - time.monotonic()))
        frame = shot.frame
        if frame is None:
            found.rows.append(_no_picture(name, shot))
            continue
        found.frames[name] = frame
        found.rows.append(shot.problem or Row("ok", "cameras", f"camera {name}: {frame.shape[1]}x{frame.shape[0]} from {shot.where}"))
        if min(frame.shape[:2]) >= SMALLEST and (fault := fault_of(frame)):
            found.rows.append(Row("warn", "cameras", f"camera {name} {fault[0]}", f"{fault[1]}."))
    return found


def _no_picture(name: str, shot: _Shot) -> Row:
    from gr00t_fast.robots.lerobot_glue import programs_using

    if shot.problem is not None:
        return shot.problem
    users = programs_using(f"/dev/video{shot.where}" if isinstance(shot.where, int) else str(shot.where))
    advice = f"It is in use by {'; '.join(users)}: stop that program." if users else "Plug it in again; `lerobot-find-cameras opencv` lists cameras."
    return Row("fail", "cameras", f"camera {name} ({shot.where}) {'cannot be opened' if shot.closed else 'gives no picture'}", advice)


class _Shot(threading.Thread):
    """A picture of one camera, taken in a thread that the program does not wait for when the driver hangs."""

    def __init__(self, name: str, camera: OpenCVCameraConfig) -> None:
        super().__init__(name=f"gr00t_fast-camera-{name}", daemon=True)
        self.where, self.frame, self.problem, self.closed = camera.index_or_path, None, None, False
        self._label, self._camera = name, camera
        self.start()

    def run(self) -> None:
        import cv2

        capture = cv2.VideoCapture(self.where if isinstance(self.where, int) else str(self.where), self._camera.backend)
        try:
            if not capture.isOpened():
                self.closed = True
                return
            self._set(cv2, capture)
            for _ in range(SETTLE_FRAMES):
                good, picture = capture.read()
                if not good:
                    return
            self.frame = self._as_seen(cv2, picture)
        finally:
            capture.release()

    def _set(self, cv2: Any, capture: Any) -> None:
        """Size and rate, checked as lerobot does."""
        camera, turned = self._camera, self._camera.rotation in (90, -90)
        if camera.fourcc:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter_fourcc(*camera.fourcc))
        width, height = (camera.height, camera.width) if turned else (camera.width, camera.height)
        wanted = {"width": (cv2.CAP_PROP_FRAME_WIDTH, width), "height": (cv2.CAP_PROP_FRAME_HEIGHT, height), "fps": (cv2.CAP_PROP_FPS, camera.fps)}
        for setting, (number, value) in wanted.items():
            accepted, got = capture.set(number, float(value)), capture.get(number)
            if not accepted or abs(got - value) > 0.01 * value:
                setting = {"width": "height", "height": "width"}.get(setting, setting) if turned else setting
                what = f"camera {self._label} ({self.where}) does not deliver {setting}: {getattr(camera, setting)}; it gives {got:g}"
                advice = f"Set {setting}: {got:g} in --robot.cameras, or another mode that `lerobot-find-cameras opencv` lists."
                self.problem = Row("fail", "cameras", what, advice)
                return

    def _as_seen(self, cv2: Any, picture: np.ndarray) -> np.ndarray:
        """As the policy gets it, `color_mode` and `rotation` included."""
        turn = {90: cv2.ROTATE_90_CLOCKWISE, -90: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180}.get(self._camera.rotation)
        picture = picture if turn is None else cv2.rotate(picture, turn)
        return picture if self._camera.color_mode == "bgr" else np.ascontiguousarray(picture[..., ::-1])


def titles(cameras: Mapping[str, Any], mapping: Mapping[str, str], resolutions: Mapping[str, tuple[int, int] | None]) -> dict[str, str]:
    """Camera -> what the contact sheet says under its name: its size, and which camera of the checkpoint it stands for."""
    found = {}
    for name, camera in cameras.items():
        policy_name = mapping.get(name)
        size = resolutions.get(policy_name) if policy_name else None
        trained = f"the checkpoint's '{policy_name}'" + (f" {size[0]}x{size[1]}" if size else "") if policy_name else "not used by the checkpoint"
        found[name] = f"{camera.width}x{camera.height}: {trained}"
    return found
