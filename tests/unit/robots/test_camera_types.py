"""Cameras of lerobot's other types than opencv: their settings, and pictures over the network with lerobot's own zmq camera."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm_bench import connected

from gr00t_fast.base.errors import CameraError, ConfigError, RobotError
from gr00t_fast.base.flags import parse_flags, settings_of
from gr00t_fast.cli.main import main
from gr00t_fast.cli.run import RunConfig
from gr00t_fast.robots import RobotConfig
from gr00t_fast.robots.calibration import save_calibration
from gr00t_fast.robots.lerobot_glue import newest_frame
from gr00t_fast.robots.so100 import SO100FollowerArm
from gr00t_fast.virtual.bus import VirtualBus

pytest.importorskip("lerobot", reason="needs `pip install 'gr00t_fast[robot]'`")
zmq = pytest.importorskip("zmq", reason="needs `pip install 'gr00t_fast[serving]'`")

NEEDED = ["--robot.type=so100_follower", "--robot.port=/dev/null", "--model_path=none", "--lang_instruction=go"]


class Publisher:
    """Sends a picture 30 times a second, as lerobot's image server does; `stop` and nothing comes any more."""

    def __init__(self, width: int = 64, height: int = 48) -> None:
        from lerobot.cameras.zmq.image_server import encode_image

        picture = np.zeros((height, width, 3), np.uint8)
        picture[:, : width // 2] = 250, 30, 10
        self._message = json.dumps({"timestamps": {"head": 0.0}, "images": {"head": encode_image(picture)}})
        self._socket = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        while not self._over.wait(1 / 30):
            with contextlib.suppress(zmq.Again):
                self._socket.send_string(self._message, zmq.NOBLOCK)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()


def observe_for(arm: SO100FollowerArm, seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        arm.observe()
        time.sleep(0.03)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    sends = Publisher()
    yield sends
    sends.stop()


def camera(publisher: Publisher, **settings: object) -> str:
    return json.dumps(
        {"type": "zmq", "server_address": "127.0.0.1", "port": publisher.port, "camera_name": "head", "width": 64, "height": 48, **settings}
    )


def robot(cameras: str) -> RobotConfig:
    return parse_flags(RunConfig, [*NEEDED, f"--robot.cameras={cameras}"])[0].robot


def test_every_type_of_the_installed_lerobot_is_taken_with_its_own_settings() -> None:
    from lerobot.cameras.configs import CameraConfig

    taken = robot("{a: {type: intelrealsense, serial_number_or_name: '0123', rotation: -90, use_depth: true}, b: {type: zmq, server_address: here}}")
    assert {"opencv", "intelrealsense", "zmq", "reachy2_camera"} <= set(CameraConfig.get_known_choices())
    depth, net = taken.cameras["a"], taken.cameras["b"]
    assert (depth.serial_number_or_name, depth.rotation, depth.use_depth, depth.color_mode) == ("0123", -90, True, "rgb")
    assert (net.server_address, net.port, net.timeout_ms) == ("here", 5555, 5000)
    kept = settings_of(taken)["cameras"]
    assert robot(json.dumps(kept)).cameras == taken.cameras, "a report is read again"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("type: zmqq", "type=zmqq is not one of .*zmq.*Did you mean 'zmq'"),
        ("type: zmq, server_address: here, prot: 1", "cameras.b .*'prot'.*Did you mean 'port'"),
        ("type: zmq", "cameras.b needs .*server_address"),
        ("type: zmq, server_address: here, port: 70000", "cameras.b.*port.*65535"),
        ("type: zmq, server_address: here, port: many", "cameras.b.port.*many"),
        ("type: intelrealsense, serial_number_or_name: '1', color_mode: grey", "color_mode=grey.*rgb"),
    ],
)
def test_a_setting_that_lerobot_does_not_take_is_named(settings: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        robot(f"{{b: {{{settings}}}}}")


def test_lerobot_is_imported_for_other_types_only() -> None:
    """It takes five seconds."""
    script = (
        "import sys; from gr00t_fast.cli.run import parse;"
        f"parse({NEEDED!r} + ['--robot.cameras={{a: {{type: opencv, index_or_path: 0}}, b: {{type: sim}}}}']); assert 'lerobot' not in sys.modules;"
        f"parse({NEEDED!r} + ['--robot.cameras={{a: {{type: zmq, server_address: here}}}}']); assert 'lerobot' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True, cwd=Path(__file__).resolve().parents[3])


@pytest.mark.slow
def test_pictures_come_over_the_network_and_a_dead_publisher_is_a_camera_fault(publisher: Publisher, tmp_path: Path) -> None:
    cameras = robot(f"{{head: {camera(publisher)}}}").cameras
    with connected(tmp_path, cameras=cameras) as (_, arm):
        seen = arm.observe()
        assert seen.frames["head"].shape == (48, 64, 3)
        assert seen.frames["head"][:, :20, 0].mean() > 200 > 100 > seen.frames["head"][:, :20, 2].mean(), "red left, as it was sent"
        assert seen.frame_ages_s["head"] < 1.0
        publisher.stop()
        began_s = time.monotonic()
        with pytest.raises(CameraError, match="head"):
            observe_for(arm, 10.0)
        assert time.monotonic() < began_s + 2.0


def test_another_size_than_was_asked_for_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    cameras = robot(f"{{head: {camera(publisher, width=640, height=480)}}}").cameras
    with pytest.raises(RobotError, match="head.*64x48.*640.*480"), connected(tmp_path, cameras=cameras):
        pass


@pytest.mark.slow
def test_nobody_publishes(publisher: Publisher, tmp_path: Path) -> None:
    publisher.stop()
    cameras = robot(f"{{head: {camera(publisher)}}}").cameras
    with pytest.raises(RobotError, match="head.*type: zmq"), connected(tmp_path, cameras=cameras):
        pass


def test_doctor_takes_a_picture(publisher: Publisher, bus: VirtualBus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_calibration(bus.calibration, tmp_path / "a.json")
    arm = ["--robot.type=so100_follower", f"--robot.port={bus.port}", "--robot.id=a", f"--robot.calibration_dir={tmp_path}"]
    two = f"{{head: {camera(publisher)}, deep: {{type: intelrealsense, serial_number_or_name: '1'}}}}"
    main(["doctor", *arm, f"--robot.cameras={two}", f"--out={tmp_path / 'seen'}"])
    said = capsys.readouterr().out
    assert "camera head: 64x48 from type: zmq" in said
    assert (tmp_path / "seen" / "camera_head.png").is_file()
    with contextlib.suppress(ImportError):
        import pyrealsense2  # noqa: F401

        return
    assert "pip install 'lerobot[intelrealsense]'" in said


def test_a_camera_without_a_thread_of_its_own_is_read_when_it_is_asked() -> None:
    class OnDemand:
        latest_timestamp = None

        def async_read(self, timeout_ms: float) -> Any:
            return np.full((2, 2, 3), timeout_ms)

    frame, age_s = newest_frame(OnDemand(), 500)
    assert age_s == 0.0
    assert frame[0, 0, 0] == 500
