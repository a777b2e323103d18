"""`--robot.*` means what lerobot's own reader, draccus, makes of it, in the version that is installed; and where it deliberately does not."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lerobot", reason="needs `pip install 'gr00t_fast[robot]'`")

import draccus
import lerobot.cameras.opencv  # noqa: F401 - it registers its cameras
from lerobot.robots.config import RobotConfig as TheirRobotConfig

from gr00t_fast.base.errors import ConfigError
from gr00t_fast.base.flags import parse_flags
from gr00t_fast.robots import ArmOptions

with contextlib.suppress(ImportError):  # each registers the arm: one in lerobot 0.6, one in 0.4
    importlib.import_module("lerobot.robots.so_follower")
with contextlib.suppress(ImportError):
    importlib.import_module("lerobot.robots.so100_follower")

OURS_ALONE = {"reconnect_s", "watchdog_s", "num_read_retries"}
THEIRS_ALONE = {"position_p_coefficient", "position_i_coefficient", "position_d_coefficient", "num_read_retries"}


@pytest.fixture(scope="module", autouse=True)
def _sources_are_read_once() -> Iterator[None]:
    """draccus 0.10 reads the source of each class for each of its fields, for a help that nobody asks for: two seconds a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield


@dataclasses.dataclass
class Theirs:
    robot: TheirRobotConfig


def plain(value: Any) -> Any:
    """Without the classes and enumerations, which are each package's own."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value.value if isinstance(value, enum.Enum) else value


def both(words: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    ours = plain(parse_flags(ArmOptions, words)[0].robot)
    theirs = plain(draccus.parse(Theirs, args=words).robot)
    return {name: ours[name] for name in ours if name not in OURS_ALONE}, {name: theirs[name] for name in theirs if name not in THEIRS_ALONE}


names = st.from_regex(r"[a-z][a-z_]{2,11}", fullmatch=True).filter(lambda word: word not in ("null", "true", "false", "yes", "off"))
sizes = st.integers(1, 4000)
cameras = st.fixed_dictionaries(
    {
        **{"type": st.just("opencv"), "index_or_path": st.one_of(st.integers(0, 9), st.builds("/dev/video{}".format, sizes))},
        **{"width": sizes, "height": sizes, "fps": st.sampled_from([15, 30, 60])},  # lerobot wants all three of a robot's camera
    },
    optional={
        **{"color_mode": st.sampled_from(["rgb", "bgr"]), "rotation": st.sampled_from([0, 90, 180, -90]), "warmup_s": st.integers(0, 9)},
        "fourcc": st.sampled_from(["MJPG", "YUYV"]),
    },
)
numbers = st.one_of(st.integers(1, 90), st.floats(0.5, 90.0).map(lambda value: round(value, 3)))
switches = st.sampled_from(["true", "false"])
robots = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["so100_follower", "so101_follower"]),
        "port": st.sampled_from(["/dev/ttyACM0", "/dev/tty.usbmodem58760431541", "COM3"]),
    },
    optional={
        **{"id": names, "calibration_dir": st.builds("{}/{}".format, names, names)},
        **{"use_degrees": switches, "disable_torque_on_disconnect": switches, "max_relative_target": numbers},
        "cameras": st.dictionaries(names, cameras, min_size=1, max_size=3),
    },
)


def as_yaml(value: Any) -> str:
    """On one line, as it stands on a command line."""
    return "{" + ", ".join(f"{key}: {as_yaml(each)}" for key, each in value.items()) + "}" if isinstance(value, dict) else str(value)


@settings(max_examples=60, deadline=None)
@given(robots)
def test_every_flag_of_lerobots_means_the_same(robot: dict[str, Any]) -> None:
    ours, theirs = both([f"--robot.{name}={as_yaml(value)}" for name, value in robot.items()])
    assert ours == theirs


@pytest.mark.parametrize("text", ["Pick up #3", "007", "yes", "include the block"])
def test_a_text_arrives_as_it_was_typed_which_draccus_does_not_do(text: str) -> None:
    words = ["--robot.type=so100_follower", "--robot.port=/dev/ttyACM0", f"--robot.id={text}"]
    assert parse_flags(ArmOptions, words)[0].robot.id == text
    with pytest.raises(Exception):  # noqa: B017 - it refuses, or reads something else
        assert draccus.parse(Theirs, args=words).robot.id == text


@pytest.mark.parametrize("word", ["--robot.port_=x", "--robot.cameras={front: {type: opencv, hight: 3}}", "--robot.use_degrees=perhaps"])
def test_what_lerobot_refuses_is_refused(word: str) -> None:
    words = ["--robot.type=so100_follower", "--robot.port=/dev/ttyACM0", word]
    with pytest.raises(ConfigError):
        parse_flags(ArmOptions, words)
    with pytest.raises((Exception, SystemExit)):
        draccus.parse(Theirs, args=words)
