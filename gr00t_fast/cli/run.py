"""`gr00t-fast run`: drive an SO-100 arm with GR00T N1.5, N1.6 or N1.7, in one process or with a policy server.

    gr00t-fast run \\
        --robot.type=so100_follower --robot.port=/dev/ttyACM0 --robot.id=black \\
        --robot.cameras="{ front: {type: opencv, index_or_path: 1, width: 1280, height: 720, fps: 30}}" \\
        --model_path=./gr00t-n1.5-so100-finetuned --embodiment_tag=new_embodiment --data_config=so100 \\
        --denoising_steps=2 --lang_instruction="Place the block in the bowl" --action_horizon=8

Order matters: whatever can fail - flags, checkpoint, warm-up, pre-flight - comes before the arm gets torque. torch, lerobot and mujoco are imported
in the functions that need them: `--help` and every mistake on the command line answer at once.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gr00t_fast.base import flags
from gr00t_fast.base.clock import MonotonicClock
from gr00t_fast.base.contracts import Clock, LandingReport, Observation, Robot
from gr00t_fast.base.errors import AT_LEAST_1, ConfigError, Gr00tFastError, ServerUnreachableError, check_ranges
from gr00t_fast.base.files import check_kept
from gr00t_fast.base.flags import Flags
from gr00t_fast.base.keyboard import Keys, keys_obstacle
from gr00t_fast.base.signals import StopSignals
from gr00t_fast.cli.main import EXIT_ERROR, EXIT_OK, Command
from gr00t_fast.cli.shared_flags import RunOutputFlags, SafetyFlags
from gr00t_fast.control.binding import RobotBinding, resolve_camera_map
from gr00t_fast.control.limits import Poses
from gr00t_fast.control.loop import ControlLoop, LoopOptions, Observer
from gr00t_fast.control.modes import Mode
from gr00t_fast.control.pacer import FPS_RANGE
from gr00t_fast.control.planner import DEFAULT_MAX_HOLD_S, Planner, PlannerOptions
from gr00t_fast.control.preflight import Preflight
from gr00t_fast.evaluation.scene import build_card, card_of, card_path, told
from gr00t_fast.inputs.data_config import DEFAULT_DATA_CONFIG
from gr00t_fast.options import PolicyOptions
from gr00t_fast.record.page import PageFacts, PageView, page_address
from gr00t_fast.record.pictures import write_pictures
from gr00t_fast.record.progress import Progress, dry_run_table, summary
from gr00t_fast.record.recorder import DatasetRecorder, dataset_directory, modality_of
from gr00t_fast.record.report import HIDDEN, Outputs
from gr00t_fast.record.session import KEYS_HELP, Session
from gr00t_fast.record.views import View, display_target, display_view, video_view
from gr00t_fast.robots import ArmOptions, SO100FollowerConfig, check_ready
from gr00t_fast.robots.lerobot_glue import device_faults
from gr00t_fast.scene.card import Card
from gr00t_fast.scene.look import look
from gr00t_fast.virtual import make_robot

_RECORDED_FACTS = ("model_path", "revision", "embodiment_tag", "server", "denoising_steps", "controller")
_SIMULATED_MAX_HOLD_S = 30.0
_RESET_TIME_S = 10.0  # for a hand to put a block back; lerobot's --dataset.reset_time_s has 60, for a whole scene
_SERVER = re.compile(r"tcp://([\w.-]+|\[[\da-fA-F:.%\w]+\]):(?P<port>\d{1,5})|ipc://.+")
EXITS = """Ctrl-C, Ctrl-\\, Ctrl-Z, SIGTERM, a closed terminal put the arm down; after a second, Ctrl-C or SIGTERM again takes its torque off at once.
exit codes: 0 done, 1 error, 2 a flag that cannot be understood; 128 + signal when stopped:
129 closed terminal (SIGHUP), 130 Ctrl-C, 131 Ctrl-\\, 143 SIGTERM, 148 Ctrl-Z (146 on macOS). A run under `nohup` outlives its terminal."""


@dataclass(kw_only=True)
class ServerFlags(Flags):
    """A policy server, instead of a network in this process."""

    GROUP = "checkpoint"

    server: str = ""  # in place of --model_path: a policy server, tcp://HOST:PORT or ipc://PATH, ours or NVIDIA's
    api_token: str | None = None  # secret that the policy server asks for
    server_timeout_s: float = 5.0  # how long an answer of the policy server may take
    server_reconnect_s: float = 30.0  # how long the arm holds its pose for a policy server that is away before the run ends


@dataclass(kw_only=True)
class TaskFlags(Flags):
    """What is to be done."""

    GROUP = "task"

    lang_instruction: str = ""  # what the robot shall do, taken literally; required
    camera_map: dict[str, str] = field(default_factory=dict)  # "{robot camera: policy camera}", when the names differ
    timeout: float | None = None  # seconds per episode; default: until Ctrl-C
    episodes: int = 1  # how many times to play
    reset_time_s: float | None = None  # how long the arm holds its pose between episodes, for you to put things back; default: 10, simulated 0
    dry_run: bool = False  # connect, check, infer once, send nothing


@dataclass(kw_only=True)
class MotionFlags(Flags):
    """When the network is asked, and where the arm goes by itself."""

    GROUP = "motion"

    fps: float | None = None  # control rate; default: the rate at which the training data was recorded
    controller: Literal["auto", "sync", "threaded"] = "auto"  # sync: wait for inferences; threaded: move meanwhile; auto: what suits
    smoothing: Literal["none", "prefix"] = "none"  # threaded: how a chunk joins the one before
    max_hold_s: float | Literal["auto"] | None = "auto"  # how long the arm holds for want of actions; auto: see docs/safety.md; null: no limit
    recordings: Path | None = None  # LeRobotDataset behind the checkpoint, or its scene card: its speeds, where episodes begin, what cameras saw
    poses: Poses = field(default_factory=Poses)


@dataclass(kw_only=True)
class RunConfig(RunOutputFlags, SafetyFlags, MotionFlags, TaskFlags, ArmOptions, ServerFlags, PolicyOptions):
    """Drive an arm with GR00T. Whatever can fail comes before the arm gets torque."""

    COMMON = (
        *("model_path", "embodiment_tag", "data_config", "denoising_steps", "action_horizon", "device", "engine", "server"),
        *("robot.type", "robot.port", "robot.id", "robot.cameras", "lang_instruction", "camera_map", "timeout", "episodes", "dry_run"),
        *("controller", "home", "rest", "max_speed_deg_s", "out", "record", "video", "page", "config_path"),
    )
    blind: str = flags.setting("", flag=False)  # a trial's name: nothing that is shown tells of settings or what follows from them

    or_else = " Or infer on a policy server: --server=tcp://HOST:PORT."

    def needs_checkpoint(self) -> bool:
        """A policy server has its own."""
        return not self.server

    def missing(self) -> Iterator[tuple[str, str]]:
        yield from super().missing()
        if not self.lang_instruction.strip():
            yield "lang_instruction", 'say what to do, in the words of the training data, as in --lang_instruction="Pick up the cube"'

    def check(self) -> None:
        super().check()
        self._check_task()
        self._check_server()
        self._check_motion()
        if self.record and self.dry_run:
            raise ConfigError("--record and --dry_run exclude each other: a dry run sends nothing, so there is nothing to record.")

    def notes(self) -> list[str]:
        moves = [f"--{name}" for name in ("home", "rest") if getattr(self.poses, name) != getattr(Poses, name)]
        said = f"{' and '.join(moves)}: a dry run sends nothing, the arm does not move there."
        return [*super().notes(), *([said] if self.dry_run and moves else [])]

    def given(self, *names: str) -> list[str]:
        """Those that are not at their default."""
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]

    def _check_task(self) -> None:
        try:
            self.lang_instruction.encode()
        except UnicodeEncodeError:
            said = f"--lang_instruction={self.lang_instruction!a} holds bytes that are no UTF-8 text."
            raise ConfigError(f"{said} Type it in a UTF-8 terminal.") from None
        check_ranges(self, episodes=AT_LEAST_1, reset_time_s=(0.0, 3600.0), fps=FPS_RANGE)
        if self.timeout is not None and not (math.isfinite(self.timeout) and self.timeout >= 1 / (self.fps or FPS_RANGE[1])):
            raise ConfigError(f"--timeout={self.timeout:g} must be a number of seconds, at least one tick: the arm would not move.")
        if self.episodes > 1 and self.timeout is None and page_address(self.page) is None and (why := keys_obstacle()):
            said = f"--episodes={self.episodes} needs --timeout=SECONDS or --page, or the first episode would never end"
            raise ConfigError(f"{said}: there are no keys, {why}.")

    def _check_server(self) -> None:
        """Either a network in this process or a policy server."""
        if not self.server:
            if given := self.given("api_token", "server_timeout_s", "server_reconnect_s"):
                raise ConfigError(f"--{given[0]} needs --server=tcp://HOST:PORT: it is about a policy server.")
            return
        found = _SERVER.fullmatch(self.server)
        if found is None or (found["port"] and not 1 <= int(found["port"]) <= 65535):
            what = "is no address of a policy server. Expected tcp://HOST:PORT or ipc://PATH, e.g. tcp://127.0.0.1:5555."
            raise ConfigError(f"--server={self.server} {what}")
        if self.api_token == HIDDEN:
            raise ConfigError("--api_token was left out of the report that --config_path reads: give it again.")
        if self.api_token is not None and not self.api_token:
            raise ConfigError("--api_token is empty; leave the flag out for a server that asks for none.")
        check_ranges(self, server_timeout_s=(0.05, 600.0), server_reconnect_s=(0.05, 3600.0))
        if self.given("max_hold_s"):
            raise ConfigError("--max_hold_s is for a network in this process; for a policy server it is --server_reconnect_s.")
        of_the_server = ["denoising_steps", "device", "precision", "engine", "engine_path", "processor_path", "letterbox"]
        if not self.model_path.strip():  # of one they say how its metadata are read, for a server that does not tell them
            of_the_server += ["embodiment_tag"] if self.data_config == DEFAULT_DATA_CONFIG else ["embodiment_tag", "data_config"]
        if given := self.given(*of_the_server):
            raise ConfigError(f"--{given[0]} belongs on the command line of the policy server.")

    def _check_motion(self) -> None:
        planner_options(self)
        if self.recordings is None:
            self.poses.resolved(None)
        if self.poses.home_speed_deg_s != Poses.home_speed_deg_s and self.poses.home is None and self.poses.rest is None:
            raise ConfigError("--home_speed_deg_s needs --home or --rest: it says how fast the arm moves there.")


def settings_of(config: RunConfig) -> dict[str, object]:
    """The configuration as JSON-ready values that --config_path reads again, but for secrets."""
    return flags.settings_of(config) | ({} if config.api_token is None else {"api_token": HIDDEN})


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


@dataclass(frozen=True)
class RecordedFacts:
    """What --record notes besides the rows. of_episode: JSON-ready, where the actions come from. cameras: robot camera -> its name in
    meta/modality.json; None: as the policy calls it."""

    of_episode: Mapping[str, Any]
    cameras: Mapping[str, str] | None = None


def run(config: RunConfig) -> int:
    """One run; returns the exit code. Raises Gr00tFastError with the arm untouched or landed."""

    def load_policy(robot: Robot, stop: Callable[[str], None]) -> Any:
        voice(config)(f"loading {config.model_path} ..." if not config.server else f"asking the policy server at {config.server} ...")
        return load(config)

    return drive(config, load_policy, RecordedFacts({name: getattr(config, name) for name in _RECORDED_FACTS}))


def drive(
    config: RunConfig,
    load_policy: Callable[[Robot, Callable[[str], None]], Any],
    facts: RecordedFacts,
    session_of: Callable[..., Session] = Session,
) -> int:
    """A run with the policy that `load_policy` makes, from the arm and a way to end the run (with the reason as a text); as `run`. session_of: makes
    the session, with the arguments of `Session`."""
    stop, say = StopSignals(), voice(config)
    with contextlib.ExitStack() as beside:  # left last: what was recorded is saved whatever happens, and the page shows the report
        with stop, stop.raise_at_once():
            check_kept([config.out / "report.json"] if config.out is not None else [], "--out", config.overwrite)
            check_kept([config.video] if config.video is not None else [], "--video", config.overwrite)
            robot = build_robot(config)
            if (page := build_page(config, robot, stop)) is not None:
                say = beside.enter_context(page).tee(say)
            recorder = beside.enter_context(build_recorder(config, robot, say)) if config.record else None
            card = None if config.recordings is None else card_of(config.recordings, robot.joint_names, say)
            policy = load_policy(robot, stop.request)
            source = "checkpoint" if policy.computes else "recording"
            led = config.poses.home is not None or not policy.computes  # a replay begins where the episode did
            preflight = Preflight(robot, policy.metadata, config.preflight == "refuse", say, source, led)
            fps = preflight.before_connecting(config.fps, config.camera_map, config.action_horizon)
            outputs = Outputs(config.out, views(config, robot, fps, say), config.quiet, config.json, bool(config.blind))
            keys = keys_of_session(config, say)
            session = session_of(stop, keys, recorder, echo=say, page=page)
            begin: list[Callable[[Observation], object]] = [preflight.connected]
            if page is not None:
                begin.append(lambda observation: page.connected(robot, observation))
            if card is not None:
                begin.append(scene_check(config, card, policy, robot, preflight, outputs, led, page))
            begin.append(outputs.prepare)
            if recorder is not None:
                recorder.set_rate(fps)
                begin.append(opening(recorder, config, policy, robot, facts))
            watching = [*outputs.observers, *([page] if page is not None else [])]
            loop = control_loop(config, policy, robot, fps, stop, begin, watching, session, say, card)
            if page is not None:
                page.playing = lambda: (loop.planner.instruction, session.doing)
            if policy.computes:
                say("warming up ...")
            loop.planner.warm_up()
            if recorder is not None:
                recorder.wait_until_ready()
            if page is not None:
                page.wait_until_ready()
            if not config.blind:
                say(summary(policy, robot.name, fps, config.action_horizon, config.lang_instruction))
            say("connecting to the arm ...")
        try:
            with outputs:
                try:
                    # only until the arm has landed: whatever hangs afterwards can be ended with Ctrl-C as any program
                    with stop, keys or contextlib.nullcontext():
                        loop.run()
                finally:
                    announce_landing(loop.trace.landing, say)  # before anything that can fail or take time
                    failing = sys.exc_info()[0] is not None
                    if recorder is not None:  # it prints: a closed terminal must not take the place of the error that ended the run
                        with contextlib.suppress(*[OSError] * failing):
                            recorder.close()
                        if recorder.episodes and not failing:
                            keep_card(recorder.out, robot.joint_names, say)
        finally:
            if loop.trace.landing is not None:
                failing = sys.exc_info()[0] is not None
                warnings = [*preflight.warnings, *(recorder.warnings if recorder is not None else []), *(page.warnings if page is not None else [])]
                try:
                    outputs.write(loop, settings_of(config), warnings, failing, preflight.notes)
                finally:
                    if page is not None:
                        page.report = outputs.shown
                if loop.trace.dry_run is not None:
                    seen, target, limited = loop.trace.dry_run
                    table, frames = dry_run_table(robot.joint_names, seen.joints, target, limited), seen.frames
                    say(table)
                if config.out is not None and loop.trace.dry_run is not None:
                    sizes = {name: f"{frame.shape[1]}x{frame.shape[0]}" for name, frame in frames.items()}
                    say(write_pictures(frames, sizes, config.out, "dry_run.txt", table + "\n"))
        powered = not loop.trace.landing.safe  # it may be: worse than whatever else happened
        return EXIT_ERROR if powered or (recorder is not None and recorder.failure) else stop.exit_code or EXIT_OK


def load(config: RunConfig) -> Any:
    """The network in this process, or with --server a client of one elsewhere. Both import torch."""
    if not config.server:
        from gr00t_fast.policy import load_policy

        policy = load_policy(config.model_path, **config.policy_options())
        if config.action_horizon is None and policy.metadata.n_action_steps is not None:
            policy.action_horizon = policy.metadata.n_action_steps
        return policy
    from gr00t_fast.serving.remote import RemotePolicy

    names = ("model_path", "revision", "embodiment_tag", "data_config", "action_horizon", "prompt_style")
    options = {name: getattr(config, name) for name in names}
    return RemotePolicy(config.server, config.api_token, config.server_timeout_s, config.server_reconnect_s, echo=voice(config), **options)


def views(config: RunConfig, robot: Robot, fps: float, say: Callable[[str], None]) -> list[View]:
    """Raises MissingExtraError without imageio-ffmpeg or rerun, ConfigError for a file that cannot be written."""
    target = display_target(config.display, config.out)
    found = [
        None if config.video is None else video_view(config.video, fps, say),
        None if target is None else display_view(target, config.lang_instruction, robot.joint_unit, robot.joint_names, robot.cameras, say),
    ]
    return [view for view in found if view is not None]


def build_robot(config: RunConfig) -> Robot:
    """The arm, not yet connected: a wrong port, a missing calibration or camera is found out here, before weights are read."""
    check_ready(config.robot)
    for fault in device_faults(config.robot).values():
        raise fault
    return make_robot(config.robot)


def build_page(config: RunConfig, robot: Robot, stop: StopSignals) -> PageView | None:
    """Raises MissingExtraError without NiceGUI, ConfigError for an address that cannot be had."""
    if (address := page_address(config.page)) is None:
        return None
    limits_s = {Mode.HOLD: max_hold_s(config), Mode.AWAY: getattr(config.robot, "reconnect_s", None), Mode.BETWEEN: reset_time_s(config) or None}

    def facts(hosts: tuple[str, ...], token: str) -> PageFacts:
        limits = {mode: limit_s for mode, limit_s in limits_s.items() if limit_s is not None}
        arm, episodes = (robot.joint_names, robot.joint_unit, tuple(robot.cameras)), (config.episodes, config.timeout)
        return PageFacts(*arm, *episodes, limits, hosts, token, config.blind, config.recordings is not None)

    def show_address(line: str) -> None:  # also with --quiet: nothing else holds the token
        print(line, file=sys.stderr if config.json or config.quiet else sys.stdout, flush=True)

    return PageView(address, facts, stop, voice(config), show_address)


def build_recorder(config: RunConfig, robot: Robot, say: Callable[[str], None]) -> DatasetRecorder:
    """Raises ConfigError for a place where no data set can be written."""
    out = dataset_directory(config.record)
    here = "" if out == Path(config.record).expanduser() else f" (lerobot's place for data sets; for a directory here: --record=./{config.record})"
    recorder = DatasetRecorder(out, config.record_append, robot.joint_names, echo=say)
    say(f"recording into {out.absolute()}{here}")
    return recorder


def keys_of_session(config: RunConfig, say: Callable[[str], None]) -> Keys | None:
    """Keys where there is a terminal to press them in."""
    if (why := keys_obstacle()) is None:
        if not config.blind:  # trials have keys of their own
            say(KEYS_HELP)
        return Keys()
    if (config.record or config.episodes > 1) and page_address(config.page) is None:
        say(f"no keys: {why}. Episodes end by --timeout, the run by Ctrl-C or SIGTERM.")
    return None


def scene_check(
    config: RunConfig, card: Card, policy: Any, robot: Robot, preflight: Preflight, outputs: Outputs, led: bool, page: PageView | None
) -> Callable[[Observation], None]:
    """What compares the first observation with the recordings. Raises PreflightError where they contradict each other."""
    camera_map = resolve_camera_map(robot.cameras, policy.metadata.resolutions, config.camera_map)

    def check(observation: Observation) -> None:
        seen = look(card, observation.frames, camera_map, observation.joints, led)
        outputs.compared({"recordings": card.name, "findings": seen.findings, "measures": told(seen.measures)}, seen.pictures)
        if page is not None:
            page.compared(observation, seen.pictures)
        preflight.judge([*seen.findings])

    return check


def keep_card(directory: Path, joint_names: tuple[str, ...], say: Callable[[str], None]) -> None:
    """The scene card of what was recorded, in the data set. Without one it is as good a data set: what goes wrong is only said."""
    try:
        build_card(directory, joint_names=joint_names).save(card_path(directory))
    except Gr00tFastError as error:
        say(f"WARNING: no scene card was written: {error}")


def opening(recorder: DatasetRecorder, config: RunConfig, policy: Any, robot: Robot, facts: RecordedFacts) -> Callable[[Observation], None]:
    """What opens the data set with the columns that the first observation shows."""
    metadata = policy.metadata
    names = facts.cameras if facts.cameras is not None else resolve_camera_map(robot.cameras, metadata.resolutions, config.camera_map)
    names = {camera: names[camera] for camera in robot.cameras if camera in names}
    names |= {camera: camera for camera in robot.cameras if camera not in names and camera not in names.values()}
    modality = modality_of(metadata.state_widths, metadata.action_widths, robot.joint_names, names)

    return lambda observation: recorder.open(observation, robot.name, robot.joint_unit, modality, facts.of_episode)


def control_loop(
    config: RunConfig,
    policy: Any,
    robot: Robot,
    fps: float,
    stop: StopSignals,
    begin: Sequence[Callable[[Observation], object]],
    watching: Sequence[Observer],
    session: Session,
    say: Callable[[str], None],
    card: Card | None = None,
) -> ControlLoop:
    """begin: what is done with the first observation, before the arm may move."""
    clock, metadata = MonotonicClock(), policy.metadata
    camera_map = resolve_camera_map(robot.cameras, metadata.resolutions, config.camera_map)
    policy.expect_cameras({camera_map[name]: (camera.width, camera.height) for name, camera in robot.cameras.items() if name in camera_map})
    binding = RobotBinding(policy.get_modality_config(), metadata.state_widths, metadata.action_widths, robot.joint_names, camera_map, fps)
    planner = build_planner(config, policy, binding, clock, fps, say)
    safety = replace(config.safety, recorded_units_s=card and tuple(card.fastest_units_s.tolist()))
    poses = config.poses.resolved(card and tuple(card.begin.tolist()))
    options = LoopOptions(
        fps,
        config.episodes,
        config.timeout,
        config.seed,
        config.dry_run,
        safety,
        reset_time_s(config),
        config.camera_fault,
        poses,
    )
    observers = [*watching, *([] if config.blind else [Progress(say, tell_inferences=policy.computes)])]

    def connected(observation: Observation) -> None:
        for step in begin:
            step(observation)

    return ControlLoop(robot, planner, options, clock, stop, session, connected, observers, say)


def build_planner(config: RunConfig, policy: Any, binding: RobotBinding, clock: Clock, fps: float, say: Callable[[str], None]) -> Planner:
    """`policy` is anything that yields actions: the network in this process, or a client of a server elsewhere, which may be away for a while."""
    recoverable = (ServerUnreachableError,) if config.server else ()
    said, options = config.lang_instruction, planner_options(config)
    echo = say if not config.blind else lambda line: say(line) if line.startswith("WARNING") else None  # not what the controller chooses, and why
    return Planner(policy, binding, said, clock, fps, options, recoverable=recoverable, echo=echo)


def planner_options(config: RunConfig) -> PlannerOptions:
    return PlannerOptions(config.controller, config.smoothing, max_hold_s(config), config.action_horizon)


def voice(config: RunConfig) -> Callable[[str], None]:
    """How this run talks: `--json` leaves standard output to the result, `--quiet` leaves warnings. A line is seen at once, also through a pipe or in
    a log."""

    def say(text: str) -> None:
        if not config.quiet or text.startswith("WARNING"):
            print(text, file=sys.stderr if config.json or config.quiet else sys.stdout, flush=True)

    return say


def announce_landing(landing: LandingReport | None, say: Callable[[str], None]) -> None:
    """Say whether the arm is still powered, also when another error is on its way. Raises nothing: the terminal may be gone."""
    if landing is None:
        return
    with contextlib.suppress(OSError):
        if not landing.safe:
            problems = "; ".join(landing.problems) or "not every joint, port and camera could be released"
            print(f"error: THE ARM MAY STILL BE POWERED: {problems}. Hold it and switch its power supply off.", file=sys.stderr, flush=True)
        elif "held" in landing.torque.values():
            say("WARNING: the arm is still powered and holds its pose: it was found so, or --robot.disable_torque_on_disconnect=false asks for it.")


main = Command(
    RunConfig,
    run,
    "usage: gr00t-fast run --robot.type=... --model_path=... --lang_instruction=... [--flag=value ...]",
    EXITS,
    drives_arm=True,
)
parse = main.parse
