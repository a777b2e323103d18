"""Flags of `gr00t-fast run`: what they are, which go together, and what they mean where they are not given."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gr00t_fast import flags
from gr00t_fast.cli.policy_flags import OutputFlags, PolicyFlags, check_at_least_one, check_data_config, check_device
from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.control.camera_watch import CameraFault
from gr00t_fast.control.controller import DEFAULT_MAX_HOLD_S
from gr00t_fast.control.keys import keys_obstacle
from gr00t_fast.control.limits import SafetyOptions
from gr00t_fast.control.pacer import FPS_RANGE
from gr00t_fast.control.poses import SPEEDS_DEG_S, Poses
from gr00t_fast.control.rerun_view import WINDOW, display_target
from gr00t_fast.errors import ConfigError
from gr00t_fast.flags import UsageError, parse_flags, setting
from gr00t_fast.inputs.data_config import DEFAULT_DATA_CONFIG
from gr00t_fast.robots.config import RobotConfig, SimCameraConfig, SO100FollowerConfig
from gr00t_fast.robots.lerobot_glue import check_numbers

_FORMER_FPS = 30  # at which a limit per tick became one per second
_SIMULATED_MAX_HOLD_S = 30.0
_RESET_TIME_S = 10.0  # for a hand to put a block back; lerobot's --dataset.reset_time_s has 60, for a whole scene
HIDDEN = "(hidden)"  # in a report, in place of a secret
_USAGE = "usage: gr00t-fast run --robot.type=... --model_path=... --lang_instruction=... [--flag=value ...]"
EPILOG = """Ctrl-C, Ctrl-\\, Ctrl-Z, SIGTERM and a closed terminal put the arm down and end the run; a second one takes its torque off at once.
exit codes: 0 done, 1 error (the arm has landed), 2 a flag that cannot be understood; 128 + signal when stopped:
129 closed terminal (SIGHUP), 130 Ctrl-C, 131 Ctrl-\\, 143 SIGTERM, 148 Ctrl-Z (146 on macOS). A run under `nohup` outlives its terminal."""
# What makes sense, generously: beyond, the arm would stand still, push or stay powered for days.
RANGES = {
    **{"home_speed_deg_s": SPEEDS_DEG_S, "approach_deg_s": SPEEDS_DEG_S, "max_speed_deg_s": (1.0, 1e4), "max_following_error_deg": (1.0, 360.0)},
    **{"stall_load_percent": (5.0, 100.0), "stall_current_ma": (50.0, 1e4), "stall_after_s": (0.05, 60.0)},
    **{"max_hold_s": (0.05, 3600.0), "reset_time_s": (0.0, 3600.0), "server_timeout_s": (0.05, 600.0), "server_reconnect_s": (0.05, 3600.0)},
}
_SERVER = re.compile(r"tcp://([\w.-]+|\[[\da-fA-F:.%\w]+\]):(?P<port>\d{1,5})|ipc://.+")


@dataclass(kw_only=True)
class RunConfig(OutputFlags, PolicyFlags):
    """Drive an arm with GR00T. Order matters: whatever can fail comes before the arm gets torque."""

    lang_instruction: str = ""  # what the robot shall do, taken literally; required
    server: str = ""  # infer on this policy server, tcp://HOST:PORT or ipc://PATH, ours or NVIDIA's; --model_path gives metadata it does not tell
    api_token: str | None = None  # secret that the policy server asks for
    server_timeout_s: float = 5.0  # how long an answer of the policy server may take
    server_reconnect_s: float = 30.0  # how long the arm holds its pose for a policy server that is away before the run ends
    controller: Literal["auto", "sync", "threaded"] = "auto"  # sync: the arm waits for inferences; threaded: it moves meanwhile; auto: what suits
    smoothing: Literal["none", "rtc", "prefix"] = "none"  # threaded: how a chunk joins the one before
    when_late: Literal["hold", "resume"] = "hold"  # threaded: after holding for want of actions, catch up (hold) or go on where the arm stopped
    max_hold_s: float | Literal["auto"] | None = "auto"  # how long the arm holds for want of actions; auto: see docs/safety.md; null: no limit
    camera_map: dict[str, str] = field(default_factory=dict)  # "{robot camera: policy camera}", when the names differ
    fps: float | None = None  # control rate; default: the rate at which the training data was recorded
    timeout: float | None = None  # seconds per episode; default: until Ctrl-C
    episodes: int = 1  # how many times to play
    reset_time_s: float | None = None  # how long the arm holds its pose between episodes, for you to put things back; default: 10, simulated 0
    max_speed_deg_s: float | Literal["auto"] | None = "auto"  # how fast targets may change; auto: 350, with --recordings less; null: no limit
    recordings: Path | None = None  # LeRobotDataset behind the checkpoint: how fast its targets change, and where its episodes begin
    home: list[float] | str | None = None  # move slowly to "[0, -90, 90, 60, 0, 10]", or to where the `recordings` begin, before each episode
    rest: list[float] | str | None = "start"  # so before its torque goes off; start: where it lay; or six values, `recordings`, `home`, null
    home_speed_deg_s: float = Poses.home_speed_deg_s  # how fast the arm moves to these poses
    max_following_error_deg: float | None = SafetyOptions.max_following_error_deg  # how far a goal may be ahead of a joint at rest; null: no limit
    stall_load_percent: float | None = SafetyOptions.stall_load_percent  # a joint that stands still before its goal and pushes so hard is blocked
    stall_current_ma: float | None = SafetyOptions.stall_current_ma  # or draws so much; null: not judged by that
    stall_after_s: float | None = SafetyOptions.stall_after_s  # for so long; then it is held where it stands; null: no stall protection
    camera_fault: CameraFault = "warn"  # one that is blank, shows noise, always the same picture, or old ones: warn says it, land ends the run
    max_held_ticks: int = SafetyOptions.max_held_ticks  # NaN or infinite targets in a row that are held before the run ends
    preflight: Literal["refuse", "warn"] = "refuse"  # warn: go on although robot and checkpoint contradict each other
    dry_run: bool = False  # connect, check, infer once, send nothing
    show_images: bool = False  # live window of the cameras (q stops)
    display: str | None = setting(None, bare=WINDOW)  # show the run in rerun: in a window here, at HOST:PORT, or in FILE.rrd; kept with --out
    out: Path | None = None  # directory for report.html, report.json, report.txt, joints.png, run.npz, run.csv
    record: str = ""  # write the run as a LeRobotDataset v3: a directory, or user/name in lerobot's cache; must not be there yet
    record_append: bool = False  # add the episodes to the data set of --record that is there
    overwrite: bool = False  # replace the files of an earlier run in --out, and the file of --video
    video: Path | None = None  # record the cameras to this .mp4 or .gif
    robot: RobotConfig | None = None


def parse(argv: Sequence[str]) -> RunConfig:
    """Return the checked configuration. Raises UsageError; prints notes to stderr."""
    argv, old = _former_flags(argv)
    config, notes = parse_flags(RunConfig, argv)
    notes = [*old, *notes]
    _validate(config)
    for note in [*notes, *_notes_on_cameras(config.robot), *_notes_on_poses(config)]:
        print(f"note: {note}", file=sys.stderr)
    return config


def _former_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--max_step_deg`, which counted per tick, in today's words; and notes for the user."""
    words, notes = list(argv), []
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") != "__max_step_deg":
            continue
        place = index if equals else index + 1
        value = value if equals else words[place] if place < len(words) else ""
        try:
            speed = "null" if value.lower() in ("null", "none", "~") else f"{float(value) * _FORMER_FPS:g}"
        except ValueError:
            raise UsageError(f"--max_step_deg={value} is no number; it is --max_speed_deg_s now, degrees a second, e.g. 180.") from None
        words[index] = f"--max_speed_deg_s={speed}" if equals else "--max_speed_deg_s"
        if not equals:
            words[place] = speed
        notes.append(f"--max_step_deg={value} is read as --max_speed_deg_s={speed}: {value} degrees per tick at {_FORMER_FPS} Hz.")
    return words, notes


def _validate(config: RunConfig) -> None:
    validate_robot(config.robot)
    _validate_policy(config)
    if not config.lang_instruction.strip():
        raise UsageError(
            '--lang_instruction is missing or empty. Say what to do, in the words of the training data: --lang_instruction="Pick up the cube".'
        )
    try:
        config.lang_instruction.encode()
    except UnicodeEncodeError:
        raise UsageError(f"--lang_instruction={config.lang_instruction!a} holds bytes that are no UTF-8 text. Type it in a UTF-8 terminal.") from None
    check_device(config.device)
    if config.model_path.strip():
        check_data_config(config.data_config)
    check_at_least_one(config, "denoising_steps", "action_horizon", "episodes")
    _validate_positive(config, "fps", "timeout")
    validate_range(config, "max_hold_s", "reset_time_s", "home_speed_deg_s")
    if config.fps is not None and not FPS_RANGE[0] <= config.fps <= FPS_RANGE[1]:
        raise UsageError(f"--fps={config.fps:g} must be from {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} Hz: what cameras and the servo bus can do.")
    if config.timeout is not None and config.timeout < 1 / (config.fps or FPS_RANGE[1]):
        raise UsageError(f"--timeout={config.timeout:g} is shorter than one tick: the arm would not move. It counts in seconds.")
    for name in ("seed", "max_held_ticks"):
        value = getattr(config, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UsageError(f"--{name}={value} must not be negative, and finite.")
    _validate_controller(config)
    validate_pose(config, "home", ("recordings",))
    validate_pose(config, "rest", ("start", "recordings", "home"))
    if _given(config, "home_speed_deg_s") and config.home is None and config.rest is None:
        raise UsageError("--home_speed_deg_s needs --home or --rest: it says how fast the arm moves there.")
    validate_limits(config)
    if config.episodes > 1 and config.timeout is None and (why := keys_obstacle()):
        raise UsageError(f"--episodes={config.episodes} needs --timeout=SECONDS, or the first episode would never end: there are no keys, {why}.")
    _validate_recording(config)
    try:
        display_target(config.display, config.out)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def validate_robot(robot: RobotConfig | None) -> None:
    """Raises UsageError."""
    if robot is None:
        raise UsageError(f"--robot.type is missing; choose from {', '.join(sorted(RobotConfig.get_known_choices()))}.")
    _validate_cameras(robot)
    if isinstance(robot, SO100FollowerConfig):
        _validate_follower(robot)


def validate_limits(config: Any) -> None:
    """Limits and outputs, which programs that move the arm have in common. Raises UsageError."""
    validate_range(config, "max_speed_deg_s", "max_following_error_deg", "stall_load_percent", "stall_current_ma", "stall_after_s")
    if config.record_append and not config.record:
        raise UsageError("--record_append needs --record=DIR: the data set to continue.")
    if config.video is not None and config.video.suffix.lower() not in (".mp4", ".gif"):
        raise UsageError(f"--video={config.video} must end in .mp4 or .gif.")


def _validate_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value not in (None, "auto") and not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name}={value} must be a positive number.")


def validate_range(config: Any, *names: str) -> None:
    for name in names:
        value, (low, high) = getattr(config, name), RANGES[name]
        if value not in (None, "auto") and not low <= value <= high:
            raise UsageError(f"--{name}={value:g} must be from {low:g} to {high:g}.")


def _validate_recording(config: RunConfig) -> None:
    if config.record and config.dry_run:
        raise UsageError("--record and --dry_run exclude each other: a dry run sends nothing, so there is nothing to record.")


def _validate_policy(config: RunConfig) -> None:
    """Either a network in this process or a policy server."""
    if config.server:
        _validate_server(config)
        return
    if given := _given(config, "api_token", "server_timeout_s", "server_reconnect_s"):
        raise UsageError(f"--{given[0]} needs --server=tcp://HOST:PORT: it is about a policy server.")
    if not config.model_path.strip():
        raise UsageError(
            "--model_path is missing: the directory of a GR00T checkpoint, or its name on the Hugging Face hub. "
            "Or infer on a policy server: --server=tcp://HOST:PORT."
        )


def _validate_server(config: RunConfig) -> None:
    found = _SERVER.fullmatch(config.server)
    if found is None or (found["port"] and not 1 <= int(found["port"]) <= 65535):
        raise UsageError(
            f"--server={config.server} is no address of a policy server. Expected tcp://HOST:PORT or ipc://PATH, e.g. tcp://127.0.0.1:5555."
        )
    if config.api_token == HIDDEN:
        raise UsageError("--api_token was left out of the report that --config_path reads: give it again.")
    if config.api_token is not None and not config.api_token:
        raise UsageError("--api_token is empty; leave the flag out for a server that asks for none.")
    validate_range(config, "server_timeout_s", "server_reconnect_s")
    if _given(config, "max_hold_s"):
        raise UsageError("--max_hold_s is for a network in this process; for a policy server it is --server_reconnect_s.")
    if given := _given(config, "denoising_steps", "device", "precision", "engine", "engine_path", "processor_path", "letterbox"):
        raise UsageError(f"--{given[0]} is for a network in this process; with --server it belongs on the command line of the policy server.")
    telling = ("embodiment_tag",) if config.data_config == DEFAULT_DATA_CONFIG else ("embodiment_tag", "data_config")
    if not config.model_path.strip() and (given := _given(config, *telling)):
        raise UsageError(
            f"--{given[0]} belongs on the command line of the policy server. Here it only says how to read the metadata of --model_path, "
            "for a server that does not tell what its checkpoint was trained on (NVIDIA's)."
        )


def _given(config: RunConfig, *names: str) -> list[str]:
    """Those that are not at their default."""
    return [name for name in names if getattr(config, name) != getattr(RunConfig, name)]


def validate_pose(config: Any, name: str, words: tuple[str, ...]) -> None:
    pose = getattr(config, name)
    if isinstance(pose, list):
        if len(pose) != len(SO100_JOINTS) or not all(map(math.isfinite, pose)):
            raise UsageError(f"--{name}={pose} needs {len(SO100_JOINTS)} finite numbers: {', '.join(SO100_JOINTS)}.")
    elif pose is not None and pose not in words:
        raise UsageError(f"--{name}={pose} is no known pose. Give six joint values, --{name}='[0, -90, 90, 60, 0, 10]', or {' or '.join(words)}.")
    elif pose == "recordings" and config.recordings is None:
        raise UsageError(f"--{name}=recordings needs --recordings=DIR, the data set behind the checkpoint.")
    elif pose == "home" and config.home is None:
        raise UsageError(f"--{name}=home needs --home=.")


def _validate_controller(config: RunConfig) -> None:
    if config.controller == "sync" and (name := overlap_asked(config)):
        raise UsageError(f"--{name}={getattr(config, name)} needs --controller=auto or threaded: only there inference overlaps the motion.")
    if config.when_late == "resume" and config.smoothing != "none":
        raise UsageError(f"--when_late=resume and --smoothing={config.smoothing} exclude each other: smoothing joins actions due at the same tick.")


def overlap_asked(config: RunConfig) -> str | None:
    """The first flag given that only means something where inference overlaps the motion."""
    return next(iter(_given(config, "smoothing", "when_late")), None)


def _validate_cameras(robot: RobotConfig) -> None:
    for name, camera in getattr(robot, "cameras", {}).items():
        for size in ("width", "height", "fps"):
            if (value := getattr(camera, size)) <= 0:
                raise UsageError(f"--robot.cameras.{name}.{size}={value} must be at least 1.")


def _validate_follower(robot: SO100FollowerConfig) -> None:
    if not robot.port.strip():
        raise UsageError(
            "--robot.port is missing: the arm's serial device, e.g. /dev/ttyACM0 (Linux) or "
            "/dev/tty.usbmodem... (macOS). `lerobot-find-port` finds it."
        )
    try:
        check_numbers(robot)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def _notes_on_cameras(robot: RobotConfig) -> list[str]:
    """A policy that looks at pictures of another world moves the arm blindly: right for a virtual bus, wrong for an arm of metal."""
    drawn = [name for name, camera in getattr(robot, "cameras", {}).items() if isinstance(camera, SimCameraConfig)]
    if not drawn or not isinstance(robot, SO100FollowerConfig):
        return []
    return [
        f"camera {', '.join(drawn)} has type sim: it draws the simulated scene with the arm where its servos say it is, and shows nothing real. "
        "Meant for the virtual servo bus; a real camera is {type: opencv, ...}."
    ]


def _notes_on_poses(config: RunConfig) -> list[str]:
    given = [f"--{name}" for name in _given(config, "home", "rest")]
    return [f"{' and '.join(given)}: a dry run sends nothing, the arm does not move there."] if config.dry_run and given else []


def reset_time_s(config: RunConfig) -> float:
    """The flag, or its default: nobody has to put the simulated scene back."""
    if config.reset_time_s is not None:
        return config.reset_time_s
    return _RESET_TIME_S if isinstance(config.robot, SO100FollowerConfig) else 0.0


def max_hold_s(config: RunConfig) -> float | None:
    """The flag, or its default: a simulated arm harms nobody while a busy machine thinks, and a policy server has a limit of its own."""
    if config.server:
        return None
    if config.max_hold_s == "auto":
        return DEFAULT_MAX_HOLD_S if isinstance(config.robot, SO100FollowerConfig) else _SIMULATED_MAX_HOLD_S
    return config.max_hold_s


def settings_of(config: RunConfig) -> dict[str, object]:
    """The configuration as JSON-ready values that --config_path reads again, but for secrets."""
    return flags.settings_of(config) | ({} if config.api_token is None else {"api_token": HIDDEN})


def help_text() -> str:
    """All flags with their values, defaults and meaning."""
    return flags.help_text(RunConfig, _USAGE, EPILOG)
