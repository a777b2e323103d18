"""Flags, exit codes and error messages of `so100_inference_optimized.py`.

Imports of torch, lerobot and mujoco happen in the functions that need them: `--help` and every mistake on the command line answer at once.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

from gr00t_fast import console
from gr00t_fast.console import CLOSED_TERMINAL, Console
from gr00t_fast.contracts import LandingReport
from gr00t_fast.control.camera_watch import CameraFault
from gr00t_fast.control.controller import DEFAULT_MAX_HOLD_S
from gr00t_fast.control.pacer import FPS_RANGE
from gr00t_fast.control.safety import DEFAULT_MAX_FOLLOWING_ERROR_DEG, DEFAULT_MAX_HELD_TICKS, DEFAULT_MAX_SPEED_DEG_S
from gr00t_fast.control.signals import SIGNAL_EXIT_BASE, StopRequested, StopSignals
from gr00t_fast.control.worker import thread_left_running
from gr00t_fast.data_config import check_trained_cameras, load_data_config
from gr00t_fast.errors import ConfigError, Gr00tFastError, closest, exit_code_of, is_output_lost, tell_lost_output
from gr00t_fast.flags import Flag, UsageError, flags_of, parse_flags
from gr00t_fast.robots.config import RobotConfig, SimCameraConfig, SO100FollowerConfig
from gr00t_fast.robots.lerobot_glue import check_numbers
from gr00t_fast.strict_json import read_json

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_CTRL_C = 0, 1, 2, 130
_FORMER_FPS = 30  # at which a limit per tick became one per second
_SIMULATED_MAX_HOLD_S = 30.0
_RESET_TIME_S = 10.0  # for a hand to put a block back; lerobot's --dataset.reset_time_s has 60, for a whole scene
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_SERVER = re.compile(r"tcp://([\w.-]+|\[[\da-fA-F:.%\w]+\]):(?P<port>\d{1,5})|ipc://.+")


@dataclass
class RunConfig:
    """Everything the command line says."""

    robot: RobotConfig | None = None
    model_path: str = ""  # directory of the checkpoint, or its name on the Hugging Face hub; required without --server
    revision: str | None = None  # commit, tag or branch of a --model_path on the hub; without a commit the weights may be others tomorrow
    server: str = ""  # infer on this policy server, tcp://HOST:PORT or ipc://PATH, ours or NVIDIA's; --model_path gives facts it does not tell
    api_token: str | None = None  # secret that the policy server asks for
    server_timeout_s: float = 5.0  # how long an answer of the policy server may take
    server_reconnect_s: float = 30.0  # how long the arm holds its pose for a policy server that is away before the run ends
    embodiment_tag: str = "new_embodiment"  # which category weights and statistics of the checkpoint
    data_config: str = "so100"  # a name of NVIDIA's (so100, so100_dualcam, fourier_gr1_arms_only, ...), or module:ClassName of your own
    lang_instruction: str = ""  # what the robot shall do, taken literally; required
    denoising_steps: int | None = None  # steps from noise to action; default: the checkpoint's own
    action_horizon: int | None = None  # actions executed per inference; default: all that the checkpoint predicts
    device: str = "auto"  # auto, cuda, cuda:N, cpu, mps
    precision: str = "auto"  # number format of the network: auto, fp32, bf16, fp16
    engine: str = "auto"  # auto is eager; cuda_graph, compiled; fp8, onnxruntime, openvino and tensorrt need files (README)
    engine_path: Path | None = None  # directory of the export; default: exports/<engine> in the checkpoint's directory
    seed: int | None = None  # makes the noise, and a simulated scene, repeatable
    processor_path: Path | None = None  # directory with the Eagle tokenizer files; default: looked up
    prompt_style: Literal["plain", "nvidia"] = "plain"  # nvidia: with the brackets that NVIDIA's clients send
    controller: Literal["sync", "threaded", "server"] = "sync"  # sync: wait for each inference; threaded: overlap it; server: so, with --server
    chunk_threshold: float | None = None  # threaded: infer again when this part of a chunk is left, 0 to 1; default: as soon as idle
    smoothing: Literal["none", "rtc", "prefix", "ensemble"] = "none"  # threaded: how a chunk joins the one before
    when_late: Literal["hold", "resume"] = "hold"  # threaded: after holding for want of actions, catch up (hold) or go on where the arm stopped
    max_hold_s: float | Literal["auto"] | None = "auto"  # how long the arm holds for want of actions; auto: see docs/safety.md; null: no limit
    camera_map: dict[str, str] = field(default_factory=dict)  # "{robot camera: policy camera}", when the names differ
    fps: float | None = None  # control rate; default: the rate at which the training data was recorded
    timeout: float | None = None  # seconds per episode; default: until Ctrl-C
    episodes: int = 1  # how many times to play
    reset_time_s: float | None = None  # how long the arm holds its pose between episodes, for you to put things back; default: 10, simulated 0
    clamp_to_limits: bool = True  # keep targets within the calibrated range of each joint
    max_speed_deg_s: float | None = DEFAULT_MAX_SPEED_DEG_S  # how fast targets may change; null: no limit
    max_following_error_deg: float | None = DEFAULT_MAX_FOLLOWING_ERROR_DEG  # how far a goal may be ahead of a joint at rest; null: no limit
    camera_fault: CameraFault = "warn"  # a camera that is blank, shows noise, or always the same picture: warn says it, land ends the run
    max_held_ticks: int = DEFAULT_MAX_HELD_TICKS  # NaN or infinite targets in a row that are held before the run ends
    preflight: Literal["refuse", "warn"] = "refuse"  # warn: go on although robot and checkpoint contradict each other
    dry_run: bool = False  # connect, check, infer once, send nothing
    show_images: bool = False  # live window of the cameras (q stops)
    out: Path | None = None  # directory for report.json, report.txt, joints.png, run.npz, run.csv
    video: Path | None = None  # record the cameras to this .mp4 or .gif
    verbose: bool = False  # full tracebacks


def parse(argv: Sequence[str]) -> RunConfig:
    """Return the checked configuration. Raises UsageError; prints notes to stderr."""
    argv, old = _former_flags(argv)
    config, notes = parse_flags(RunConfig, argv)
    notes = [*old, *notes]
    _validate(config)
    for note in [*notes, *_notes_on_cameras(config.robot)]:
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
    if config.robot is None:
        raise UsageError(f"--robot.type is missing; choose from {', '.join(sorted(RobotConfig.get_known_choices()))}.")
    _validate_cameras(config.robot)
    if isinstance(config.robot, SO100FollowerConfig):
        _validate_follower(config.robot)
    _validate_policy(config)
    if not config.lang_instruction.strip():
        raise UsageError(
            '--lang_instruction is missing or empty. Say what to do, in the words of the training data: --lang_instruction="Pick up the cube".'
        )
    try:
        config.lang_instruction.encode()
    except UnicodeEncodeError:
        raise UsageError(f"--lang_instruction={config.lang_instruction!a} holds bytes that are no UTF-8 text. Type it in a UTF-8 terminal.") from None
    if not _DEVICE.fullmatch(config.device):
        raise UsageError(
            f"--device={config.device} is not one of auto, cuda, cuda:N, cpu, mps.{closest(config.device, ('auto', 'cuda', 'cpu', 'mps'))}"
        )
    for name in ("denoising_steps", "action_horizon", "episodes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value} must be at least 1.")
    for name in ("fps", "timeout", "max_speed_deg_s", "max_following_error_deg", "max_hold_s"):
        value = getattr(config, name)
        if value not in (None, "auto") and not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name}={value} must be a positive number.")
    if config.fps is not None and not FPS_RANGE[0] <= config.fps <= FPS_RANGE[1]:
        raise UsageError(f"--fps={config.fps:g} must be from {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} Hz: what cameras and the servo bus can do.")
    if config.timeout is not None and config.timeout < 1 / (config.fps or FPS_RANGE[1]):
        raise UsageError(f"--timeout={config.timeout:g} is shorter than one tick: the arm would not move. It counts in seconds.")
    for name in ("seed", "max_held_ticks", "reset_time_s"):
        value = getattr(config, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UsageError(f"--{name}={value} must not be negative, and finite.")
    _validate_controller(config)
    if config.episodes > 1 and config.timeout is None:
        raise UsageError(f"--episodes={config.episodes} needs --timeout=SECONDS, or the first episode would never end.")
    if config.video is not None and config.video.suffix.lower() not in (".mp4", ".gif"):
        raise UsageError(f"--video={config.video} must end in .mp4 or .gif.")


def _validate_policy(config: RunConfig) -> None:
    """Either a network in this process or a policy server."""
    if config.server:
        _validate_server(config)
        return
    if config.controller == "server":
        raise UsageError("--controller=server needs the policy server's address: --server=tcp://127.0.0.1:5555.")
    if given := _given(config, "api_token", "server_timeout_s", "server_reconnect_s"):
        raise UsageError(f"--{given[0]} needs --server=tcp://HOST:PORT: it is about a policy server.")
    if not config.model_path.strip():
        raise UsageError(
            "--model_path is missing: the directory of a GR00T N1.5 checkpoint, or its name on the Hugging Face hub. "
            "Or infer on a policy server: --server=tcp://HOST:PORT."
        )


def _validate_server(config: RunConfig) -> None:
    found = _SERVER.fullmatch(config.server)
    if found is None or (found["port"] and not 1 <= int(found["port"]) <= 65535):
        raise UsageError(
            f"--server={config.server} is no address of a policy server. Expected tcp://HOST:PORT or ipc://PATH, e.g. tcp://127.0.0.1:5555."
        )
    if config.api_token is not None and not config.api_token:
        raise UsageError("--api_token is empty; leave the flag out for a server that asks for none.")
    for name in ("server_timeout_s", "server_reconnect_s"):
        if not (math.isfinite(value := getattr(config, name)) and value > 0):
            raise UsageError(f"--{name}={value} must be a positive number of seconds.")
    if _given(config, "max_hold_s"):
        raise UsageError("--max_hold_s is for a network in this process; for a policy server it is --server_reconnect_s.")
    if given := _given(config, "denoising_steps", "device", "precision", "engine", "engine_path", "processor_path"):
        raise UsageError(f"--{given[0]} is for a network in this process; with --server it belongs on the command line of the policy server.")
    if not config.model_path.strip() and (given := _given(config, "embodiment_tag", "data_config")):
        raise UsageError(
            f"--{given[0]} belongs on the command line of the policy server. Here it only says how to read the metadata of --model_path, "
            "for a server that does not tell what its checkpoint was trained on (NVIDIA's)."
        )


def _given(config: RunConfig, *names: str) -> list[str]:
    """Those that are not at their default."""
    return [name for name in names if getattr(config, name) != getattr(RunConfig, name)]


def _validate_controller(config: RunConfig) -> None:
    given = {"chunk_threshold": config.chunk_threshold is not None, "smoothing": config.smoothing != "none", "when_late": config.when_late != "hold"}
    if config.controller == "sync" and any(given.values()):
        name = next(name for name, is_given in given.items() if is_given)
        raise UsageError(f"--{name}={getattr(config, name)} needs --controller=threaded (or server): only there inference overlaps the motion.")
    if config.chunk_threshold is not None and not 0 <= config.chunk_threshold <= 1:
        raise UsageError(f"--chunk_threshold={config.chunk_threshold} must be from 0 to 1: the part of a chunk that is left.")
    if config.when_late == "resume" and config.smoothing != "none":
        raise UsageError(f"--when_late=resume and --smoothing={config.smoothing} exclude each other: smoothing joins actions due at the same tick.")


def _validate_cameras(robot: RobotConfig) -> None:
    for name, camera in getattr(robot, "cameras", {}).items():
        for setting in ("width", "height", "fps"):
            if (value := getattr(camera, setting)) <= 0:
                raise UsageError(f"--robot.cameras.{name}.{setting}={value} must be at least 1.")


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


def check_checkpoint(config: RunConfig) -> None:
    """Raises ConfigError where the small files of a local checkpoint contradict the flags: before torch is imported and weights are read.

    Whatever else is wrong with those files is left for loading to explain.
    """
    directory = Path(config.model_path).expanduser()
    try:
        horizon = int(read_json(directory / "config.json")["action_head_cfg"]["action_horizon"])
        metadata = read_json(directory / "experiment_cfg" / "metadata.json")
        cameras = {tag: [f"video.{name}" for name in entry["modalities"]["video"]] for tag, entry in metadata.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if config.embodiment_tag not in cameras:
        has = ", ".join(f"--embodiment_tag={tag}" for tag in cameras) or "none"
        raise ConfigError(f"--embodiment_tag={config.embodiment_tag}: the checkpoint has no statistics for it. It has: {has}.")
    check_trained_cameras(load_data_config(config.data_config), cameras[config.embodiment_tag])
    if config.action_horizon is not None and config.action_horizon > horizon:
        raise ConfigError(
            f"--action_horizon={config.action_horizon} is more than the {horizon} actions this checkpoint was trained to predict. Use 1 to {horizon}."
        )


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


def say(text: str) -> None:
    """A line for the user that is seen at once, also through a pipe or in a log."""
    print(text, flush=True)


def settings_of(config: RunConfig) -> dict[str, object]:
    """The configuration as JSON-ready values, for the report."""
    hidden = {} if config.api_token is None else {"api_token": "(hidden)"}
    return _plain(asdict(config) | hidden | {"robot": {"type": type(config.robot).__name__, **asdict(config.robot)}})


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def main(run: Callable[[RunConfig], int], argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn every expected failure into one message on stderr and an exit code. Bugs keep their traceback. Output goes through a
    queue: a terminal that takes none holds up nothing."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        return exit_code_of(print_help)
    console = Console()
    try:
        with console:
            code = _main(run, argv)
    except OSError as error:
        if error is not console.failure:
            raise
        code = EXIT_ERROR
    if console.failure is None:
        return code
    lost = tell_lost_output(console.failure)  # the arm has landed by now
    return SIGNAL_EXIT_BASE + getattr(signal, "SIGHUP", 1) if console.failure.errno in CLOSED_TERMINAL else code or lost


def print_help() -> int:
    """A reader that has seen enough, as with `| head`, is no error."""
    try:
        print(help_text(), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK


def _main(run: Callable[[RunConfig], int], argv: Sequence[str]) -> int:
    try:
        config = parse(argv)
    except UsageError as error:
        return _explain(error, EXIT_USAGE, verbose="--verbose" in argv)
    try:
        return run(config)
    except Gr00tFastError as error:
        return _explain(error, EXIT_ERROR, config.verbose)
    except StopRequested as request:  # before the arm was connected, or the loop would have handled it
        print(f"stopped by {request.reason}", file=sys.stderr)
        return request.exit_code
    except KeyboardInterrupt:
        return EXIT_CTRL_C
    except Exception as error:
        if isinstance(error, OSError) and is_output_lost(error):
            raise
        traceback.print_exception(error)
        return EXIT_ERROR


def _explain(error: Gr00tFastError, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    return code


def announce_landing(landing: LandingReport | None) -> None:
    """Say whether the arm is still powered, also when another error is on its way. Raises nothing: the terminal may be gone."""
    if landing is None:
        return
    with contextlib.suppress(OSError):
        if not landing.safe:
            problems = "; ".join(landing.problems) or "not every joint, port and camera could be released"
            print(f"error: THE ARM MAY STILL BE POWERED: {problems}. Hold it and switch its power supply off.", file=sys.stderr, flush=True)
        elif "held" in landing.torque.values():
            print("The arm holds its last pose (--robot.disable_torque_on_disconnect=false): it is still powered.", flush=True)


def exit_code(stop: StopSignals, landing: LandingReport) -> int:
    """0 when the run ended by itself, 128 + signal when it was stopped; 1 when the arm may still be powered, whatever else happened."""
    return stop.exit_code or EXIT_OK if landing.safe else EXIT_ERROR


def leave(code: int) -> NoReturn:
    """End the program. An inference that hangs, or a terminal that takes no output, must not hold it up: the
    interpreter cannot end while native code of another thread runs
    (it may abort instead), so what is left to do at exit is then done here."""
    if console.stuck():
        os._exit(code)
    if not thread_left_running():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def help_text() -> str:
    """All flags with their values, defaults and meaning."""
    flags = list(flags_of(RunConfig))
    robot_flags = [flag for flag in flags if flag.name.startswith("robot.")]
    lines = ["usage: python so100_inference_optimized.py --robot.type=... --model_path=... --lang_instruction=... [--flag=value ...]", ""]
    lines += [line for flag in flags if flag not in robot_flags for line in _help_lines(flag)]
    lines += ["", "robot:"] + [line for flag in robot_flags for line in _help_lines(flag)]
    lines += ["", "Ctrl-C, Ctrl-\\, Ctrl-Z, SIGTERM and a closed terminal land the arm and end the run."]
    lines += ["exit codes: 0 done, 1 error (the arm has landed), 2 a flag that cannot be understood; 128 + signal when stopped:"]
    lines += [
        "129 closed terminal (SIGHUP), 130 Ctrl-C, 131 Ctrl-\\, 143 SIGTERM, 148 Ctrl-Z (146 on macOS). A run under `nohup` outlives its terminal."
    ]
    return "\n".join(lines)


def _help_lines(flag: Flag) -> list[str]:
    values = {"text": "TEXT", "path": "PATH", "bool": "true|false", "yaml": "VALUE"}.get(flag.kind) or "|".join(map(str, flag.choices))
    default = "" if flag.default in (None, "", {}) or not isinstance(flag.default, str | int | float) else f" [{str(flag.default).lower()}]"
    only = f" ({', '.join(flag.owners)} only)" if flag.owners and len(flag.owners) < len(RobotConfig.get_known_choices()) else ""
    head = f"  --{flag.name}={values}"
    body = textwrap.wrap(f"{flag.help}{default}{only}", 92)
    if len(head) < 34 and body:
        body[0] = f"{head:<34}{body[0]}"
        return [body[0], *(" " * 34 + line for line in body[1:])]
    return [head, *(" " * 34 + line for line in body)]
