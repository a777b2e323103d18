"""The real SO-100 (and SO-101) arm: lerobot's unmodified driver with retries, reconnection, health checks and a landing that always completes.

`SO100FollowerArm` owns one lerobot `SO100Follower`. It calls the parts of its `connect`, `get_observation` and `disconnect` one by one,
because a failure in the middle of those leaves ports open, motors holding, or a person asked to press ENTER. `bus` guards the line.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

import numpy as np

from gr00t_fast.base.contracts import SO100_JOINTS, CameraSpec, JointUnit, LandingReport, Observation
from gr00t_fast.base.errors import ArmAwayError, BusFault, CameraError, ConfigError, Gr00tFastError, MissedReadingError, RobotError, one_line
from gr00t_fast.robots import SimCameraConfig, SO100FollowerConfig, rendered
from gr00t_fast.robots import lerobot_glue as glue
from gr00t_fast.robots.bus import (
    EXCHANGE_FAILED,
    LATE_ANSWER_S,
    LINK_LOST,
    attempt,
    broadcast_torque_off,
    error_names,
    guarded,
    release_torque,
)
from gr00t_fast.robots.motor_state import JumpGuard, PerMinute, ServoHealth
from gr00t_fast.robots.watchdog import Watchdog

log = logging.getLogger(__name__)

READ_PATIENCE_S = 0.5  # of connecting and switching on: so long a reading is tried for
CONNECT_ATTEMPTS = 3  # a slow bus may miss an answer now and then
FIRST_FRAME_MS = 3000
OLDEST_FRAME_MS = 500  # an older newest frame means that the camera froze, unless one comes within FRAME_AGAIN_S:
FRAME_AGAIN_S = 0.2  # what holds up the program holds up the thread that reads its camera
RETRY_PAUSE_S = 0.05
RECONNECTS = 5  # within a minute; a cable that comes and goes more often holds an arm that nobody controls
LAND_REOPEN_S = 1.0  # a port that vanished just before landing gets so long to come back
LONGEST_BLIND_S = 0.1  # before a goal that comes later after the last reading than this, the motors are asked whether they still hold


class Stage(Enum):
    """How far a run has got with the arm; that is what landing has to undo."""

    APART = "nothing is open"
    OPENED = "the port is ours; not all servos have answered"
    SEEN = "all servos have answered, and it is known whether they were powered"
    ENGAGED = "this run has switched them on, or has tried to"
    LANDED = "landed"


class RenderedCameras(Protocol):
    """Cameras of `type: sim`: pictures of a scene with the arm in the pose that its servos report."""

    def frames(self, joints: np.ndarray, while_drawing: Callable[[], None]) -> dict[str, np.ndarray]:
        """Camera name -> uint8 RGB (height, width, 3), of the arm with these joints (6,) in its unit. `while_drawing` is called several times
        meanwhile."""


class SO100FollowerArm:
    """`contracts.Robot` for the real arm. One thread at a time; nothing but Gr00tFastError (and Ctrl-C) leaves its methods."""

    joint_names = SO100_JOINTS
    episodes_solved = success = None

    def __init__(
        self, config: SO100FollowerConfig, render: Callable[[Mapping[str, SimCameraConfig], JointUnit], RenderedCameras] | None = None
    ) -> None:
        """`render` opens the cameras of `type: sim`, if there are any. Touches no hardware. Raises ConfigError when the port is missing or a number
        makes no sense."""
        if not config.port:
            raise ConfigError(f"--robot.port is required for the real arm, e.g. /dev/ttyACM0. {glue.ports_message()}.")
        glue.check_numbers(config)
        self.config = config
        self.name = config.type_name
        self.joint_unit: JointUnit = "degrees" if config.use_degrees else "range_m100_100"
        cameras = config.cameras.items()  # lerobot's sizes are those after `rotation`
        self.cameras: Mapping[str, CameraSpec] = {name: CameraSpec(camera.width, camera.height, camera.fps) for name, camera in cameras}
        self.events: Counter[str] = Counter()
        self._busy = threading.Lock()
        self._stage = Stage.APART
        self.follower: Any = None  # lerobot's SO100Follower
        self.bus: Any = None  # its bus, guarded
        self._render = render
        self._rendered: RenderedCameras | None = None  # where cameras are of `type: sim`
        self._landing: LandingReport | None = None
        self.check_stop: Callable[[], object] = lambda: None
        self.rest_pose: np.ndarray | None = None
        self.max_step = glue.max_step(config)
        self.stays_powered = not config.disable_torque_on_disconnect
        self._watchdog = Watchdog(config.port, config.watchdog_s, holds=self.stays_powered)
        # from the calibration, which `connect` reads
        self.units_per_deg = np.full(len(SO100_JOINTS), np.nan)  # how much each joint's reading changes when its shaft turns by a degree
        self.joint_limits = np.full((len(SO100_JOINTS), 2), np.nan)  # lowest and highest target, in `joint_unit`

    def keep_alive(self) -> None:
        """A control loop's heartbeat. Once there was one and the motors are on, the watchdog ends this process and takes the torque off when no
        other, and no exchange with the servos, follows within `watchdog_s`. Raises RobotError, once, when the watchdog has ended or is frozen."""
        if not self._watchdog.beat() and not self._unwatched:
            self._unwatched = True
            raise RobotError(
                "the watchdog process, which takes the torque off when this program is stuck, has ended or is frozen. Start the run again."
            )

    def connect(self) -> None:
        """Open and check everything; the motors stay as they are until `reset` or `send`. Raises RobotError with everything closed again."""
        if self._stage not in (Stage.APART, Stage.LANDED):
            raise RobotError("the arm is already connected. Call land() before connecting again.")
        self._stage, self.follower, self._landing, self.rest_pose = Stage.APART, None, None, None
        self._goal: np.ndarray | None = None  # the last one that was sent
        self._found_on: dict[str, bool] = {}  # by joint: whether it was powered before this run
        self._unwatched = False  # whether the watchdog was found to have ended
        self._unanswered = False  # whether servos were asked in vain while connecting
        self._looking = False  # whether the servos are being looked for
        self._held: np.ndarray | None = None  # the newest reading; also over an outage
        self._dark = False  # whether the last goal could not be sent
        self._known_trouble = 0  # after which the servos were asked whether they hold
        try:
            with self._explained("connecting to the arm"):
                self._connect()
        except BaseException:
            report = self.land()
            for problem in report.problems:
                log.warning("after the failed connection: %s", problem)
            raise

    def reset(self, seed: int | None = None) -> None:
        """Hold the arm where it is, if it is not held yet; a real arm has nothing to rearrange. Raises RobotError."""
        with self._using("switching the motors on"):
            self._engage()

    def lower_if_killed(self, pose: Sequence[float] | None) -> None:
        """Tell the watchdog where (6,) to put the arm down when this program is gone. None: an arm that was found powered holds where it stands, the
        torque of any other goes off at once."""
        if pose is None and self._found_powered:
            self._watchdog.lower_to([])
        elif pose is not None and not self.stays_powered:
            ids = (self.bus.motors[joint].id for joint in SO100_JOINTS)
            steps = self.bus._unnormalize(dict(zip(ids, np.clip(pose, *self.joint_limits.T).tolist(), strict=True)))
            self._watchdog.lower_to([*steps.values()])

    def observe(self, with_frames: bool = True) -> Observation:
        """Joints (6,) in `joint_unit` and the newest frames, RGB unless the camera's `color_mode` says otherwise. One attempt, which also looks for a
        port that is lost. Raises MissedReadingError and ArmAwayError where the next one may succeed, else another RobotError, a CameraError where
        only a camera is to blame."""
        with self._using("observing"):
            joints, time_s = self._read_joints()
            taken = {name: self._read_frame(name, camera) for name, camera in self.follower.cameras.items() if with_frames}
            frames, ages_s = {name: frame for name, (frame, _) in taken.items()}, {name: age_s for name, (_, age_s) in taken.items()}
            if with_frames and self._rendered is not None:
                frames |= self._draw(joints)
            self._health.check(time_s, self._stage is Stage.ENGAGED, joints, self._goal)
            return Observation(joints, frames, time_s, self._health.loads, ages_s)

    def send(self, targets: np.ndarray) -> None:
        """Send goal positions (6,) in `joint_unit`; the calibrated range is enforced once more. The first one switches the motors on. One attempt.

        Raises as `observe`; the goal was dropped then.
        """
        with self._using("sending a goal"):
            values = np.asarray(targets, dtype=np.float64)
            if values.shape != (len(SO100_JOINTS),) or not np.isfinite(values).all():
                raise RobotError(f"expected {len(SO100_JOINTS)} finite joint targets, got {targets!r}. They were not sent.")
            goal = np.clip(values, *self.joint_limits.T)
            if not np.array_equal(goal, values):
                self.events["target_clipped"] += 1
            self._engage()
            self._send(goal)
            self._goal = goal

    def land(self, as_found: bool = False) -> LandingReport:
        """Torque off (or held, as configured), port closed, cameras closed. An arm that was found powered stays so with `as_found`, or when this run
        has not switched it on. Never raises; a second call returns the first report, unless the first was broken off."""
        if self._landing is not None:
            return self._landing
        report = LandingReport()
        waited = self._busy.acquire(timeout=0.5)  # never wait for a thread that hangs inside observe()
        try:
            landed = attempt("landing", lambda: self._land(report, as_found), report.problems)
        finally:
            if waited:
                self._busy.release()
        if landed:  # else the next call tries again
            self._landing, self._stage = report, Stage.LANDED
        return report

    # Connecting

    def _connect(self) -> None:
        glue.check_port(self.config.port)
        if self._rendered is None and (drawn := rendered(self.config.cameras)):
            self._rendered = self._render(drawn, self.joint_unit)
        follower = glue.make_follower(self.config)
        glue.check_calibration_file(follower, self.config)
        tries, how_to_calibrate = 1 + self.config.num_read_retries, glue.calibrate_command(self.config)
        bus = follower.bus = self.bus = guarded(follower.bus, self.events, self._exchanging, tries, how_to_calibrate)
        self.units_per_deg, self.joint_limits = glue.scale_and_limits(follower.calibration, self.config.use_degrees)
        self._guard = JumpGuard(self.units_per_deg)
        self._health = ServoHealth(bus, self.units_per_deg, self.events)
        self._reconnects = PerMinute(RECONNECTS)
        self.follower = follower  # last: what lands an arm that has one needs the others
        self._repeat("finding the servos", self._open_bus)
        self._repeat("asking the servos whether they are powered", self._see_power)
        self._repeat("reading the servos' calibration", lambda: glue.check_calibration_in_servos(follower, self.config))
        for name, camera in follower.cameras.items():
            threading.excepthook = _no_traceback_of_cameras
            glue.open_camera(name, self.config.cameras[name], camera, FIRST_FRAME_MS)
        self._first_reading()
        bus.late_answer_s = LATE_ANSWER_S

    def _see_power(self) -> None:
        """An arm that is powered already was left so by a program that ended without landing it, or that was to hold."""
        self._found_on = {joint: bool(on) for joint, on in self.bus.sync_read("Torque_Enable").items()}
        self._stage = Stage.SEEN
        if any(self._found_on.values()):
            self.events["found_powered"] += 1
            which = "" if self._found_powered else f" ({', '.join(joint for joint, on in self._found_on.items() if on)})"
            log.warning("the arm on %s was powered already%s: an earlier program has left it so", self.config.port, which)

    @property
    def _found_powered(self) -> bool:
        """Whether the whole arm was. One that hangs on a few powered servos lies on its table, and is put down there again."""
        return bool(self._found_on) and all(self._found_on.values())

    def _engage(self) -> None:
        if self._stage is Stage.ENGAGED:
            return
        self._watchdog.start(self.check_stop)
        if not self._found_powered and not self.stays_powered:
            self.rest_pose = self._first_reading()
        self._stage = Stage.ENGAGED  # before the first write: whatever goes wrong in it, landing has motors to switch off
        self._repeat("configuring the servos", self.follower.configure)
        self._first_reading()

    def _exchanging(self) -> None:
        self._watchdog.exchanging()
        if self._looking:  # silent servos hold that up for seconds
            self.check_stop()

    def _waiting(self) -> None:
        self._exchanging()
        self.check_stop()

    def _repeat(self, what: str, step: Any) -> None:
        """Do a step of connecting up to CONNECT_ATTEMPTS times."""
        for number in range(1, CONNECT_ATTEMPTS + 1):
            try:
                step()
                return
            except Gr00tFastError:
                raise
            except (*EXCHANGE_FAILED, *LINK_LOST) as error:
                if number == CONNECT_ATTEMPTS:
                    self._unanswered = True
                    raise BusFault(self._connect_failure(what, error)) from error
                self.events["connect_retry"] += 1
                self.check_stop()
                time.sleep(RETRY_PAUSE_S)

    def _open_bus(self, check: Callable[[], object] = lambda: None) -> None:
        """Open the port and look for the servos, then `check`. A stop is seen before each request. The port is closed again when that fails."""
        self.bus.open()
        if self._stage is Stage.APART:
            self._stage = Stage.OPENED
        self._looking = True
        try:
            self.bus._handshake()  # are all servos there, of the right model and one firmware?
            check()
        except BaseException:
            self.bus.close()
            raise
        finally:
            self._looking = False

    def _connect_failure(self, what: str, error: Exception) -> str:
        message = f"{what} on {self.config.port} failed {CONNECT_ATTEMPTS} times: {_one_line(error)}. "
        complaints = {servo: error_names(bits) for servo, bits in self.bus.error_bits.items() if bits}
        if complaints:
            named = "; ".join(f"servo {servo} reports {', '.join(names)}" for servo, names in complaints.items())
            return message + f"{named}. Relieve the joint, then switch the arm's power off and on."
        return message + self._slowness() + "Check the power supply and the cables between the servos; `lerobot-setup-motors` repairs ids."

    def _slowness(self) -> str:
        late = self.events["late_answer"]
        return f"{late} answers came too late: the USB adapter or its hub is slow (try another port). " if late else ""

    # Observing

    def _first_reading(self) -> np.ndarray:
        """While connecting and switching on: tried again for READ_PATIENCE_S."""
        give_up_s = time.perf_counter() + READ_PATIENCE_S
        while True:
            try:
                return self._read_joints()[0]
            except MissedReadingError as error:
                if time.perf_counter() > give_up_s:
                    raise BusFault(f"{error} Check cables and power of the servos.") from error
            self.check_stop()

    def _read_joints(self) -> tuple[np.ndarray, float]:
        before = self._guard.last
        try:
            if not self.bus.is_connected:
                self._reconnect()
            self.bus.check_open()
            joints, time_s, plausible = self._one_reading()
            if not plausible:  # to a program that was held up it comes late, and needs the second one all the same
                joints, time_s, plausible = self._one_reading()
            if not plausible:
                newest = np.round(joints, 1).tolist()
                raise MissedReadingError(f"no plausible joint reading: readings jump without two in a row agreeing (newest: {newest}).")
            if self._guard.jumped:
                self._say_jump(before, joints)
            if self._trouble() != self._known_trouble:  # an exchange has failed: perhaps for want of power
                restored, self._known_trouble = self._restored(self._held), self._trouble()
                if restored:
                    raise ArmAwayError("the servos lost their power for a moment.", READ_PATIENCE_S)
        except Gr00tFastError:
            raise
        except EXCHANGE_FAILED as error:
            self.events["read_failed"] += 1
            raise MissedReadingError(
                f"no plausible joint reading from {self.config.port}: {_one_line(error)}. {self._slowness()}".rstrip()
            ) from error
        except LINK_LOST as error:
            raise self._lost(error) from error
        self._read_s, self._held = time_s, joints
        return joints, time_s

    def _one_reading(self) -> tuple[np.ndarray, float, bool]:
        """Joints (6,), when, and whether they can have got there since the reading before."""
        asked_s, first = time.perf_counter(), self._guard.last is None
        reading = self.bus.sync_read("Present_Position")
        joints, time_s = np.array([reading[joint] for joint in SO100_JOINTS], dtype=np.float64), time.perf_counter()
        plausible = self._guard.accepts(joints, asked_s, time_s)
        if not plausible and not first:
            self.events["implausible_reading"] += 1
        return joints, time_s, plausible

    def _restored(self, before: np.ndarray | None) -> bool:
        """Whether motors that this run has switched on had lost their torque, and hold again."""
        return self._stage is Stage.ENGAGED and self._health.restore_if_lost(before)

    def _say_jump(self, before: np.ndarray, joints: np.ndarray) -> None:
        self.events["reading_jumped"] += 1
        index = int(np.abs((joints - before) / self.units_per_deg).argmax())
        log.warning(
            "joint %s was at %.0f and is at %.0f, further than it can turn in that time, and stays there: its horn or encoder has slipped, or "
            "somebody moved the arm",
            *(SO100_JOINTS[index], before[index], joints[index]),
        )

    def _trouble(self) -> int:
        """Grows with whatever may have been a dip in the servos' supply: missed answers, and a pose that jumped."""
        return sum(self.events[name] for name in ("read_retry", "read_failed", "implausible_reading"))

    def _read_frame(self, name: str, camera: Any) -> tuple[np.ndarray, float]:
        """The newest frame, and its age in seconds. Raises CameraError."""
        give_up_s = time.perf_counter() + FRAME_AGAIN_S
        while True:
            self._exchanging()
            try:
                return glue.newest_frame(camera, OLDEST_FRAME_MS)
            except Exception as error:
                if not isinstance(error, TimeoutError) or time.perf_counter() > give_up_s:
                    raise CameraError(
                        f"camera '{name}' stopped delivering: {_one_line(error)}. Check its cable; the arm stops without it."
                    ) from error
            self.check_stop()
            time.sleep(0.005)

    def _draw(self, joints: np.ndarray) -> dict[str, np.ndarray]:
        """Pictures of the cameras that are drawn. Raises CameraError: whatever goes wrong there, the bus is sound."""
        try:
            return self._rendered.frames(joints, while_drawing=self._waiting)
        except Gr00tFastError:
            raise
        except Exception as error:
            raise CameraError(f"the cameras of `type: sim` cannot be drawn: {_one_line(error)}. The arm stops without them.") from error

    # Sending

    def _send(self, goal: np.ndarray) -> None:
        try:
            self.bus.check_open()
            if (self._dark or time.perf_counter() - self._read_s > LONGEST_BLIND_S) and not self._may_send():
                self.events["goal_dropped"] += 1
                raise MissedReadingError("the servos do not say whether they hold.")
            self.bus.sync_write("Goal_Position", dict(zip(SO100_JOINTS, self._within_step(goal).tolist(), strict=True)))
            self._dark = False
        except Gr00tFastError:
            raise
        except EXCHANGE_FAILED as error:
            self.events["send_failed"] += 1
            self._dark = True
            raise MissedReadingError(f"the goal could not be sent on {self.config.port}: {_one_line(error)}. {self._slowness()}".rstrip()) from error
        except LINK_LOST as error:
            self.events["goal_dropped"] += 1  # it was meant for the moment before the outage; the next tick sends a newer one
            raise self._lost(error) from error

    def _may_send(self) -> bool:
        """Whether the servos answer that they hold. A goal would switch one on that does not, and make an arm leap that fell meanwhile."""
        try:
            restored = self._restored(self._held)
        except Gr00tFastError:
            raise
        except EXCHANGE_FAILED:
            return False
        if restored:
            raise ArmAwayError("the servos lost their power for a moment.", READ_PATIENCE_S)
        return True

    def _within_step(self, goal: np.ndarray) -> np.ndarray:
        """lerobot's step limit, as its `send_action` applies it. That refuses when a camera is closed; the arm must still be put down then."""
        if self.max_step is None:
            return goal
        present = self.bus.sync_read("Present_Position")
        here = np.array([present[joint] for joint in SO100_JOINTS])
        return np.clip(goal, here - self.max_step, here + self.max_step)

    # Losing and finding the port

    def _lost(self, cause: Exception) -> RobotError:
        """The port has gone: what to raise about it."""
        if not self.bus.is_connected:  # known already
            return self._away(cause)
        self.bus.close()  # the next reading finds and checks the arm anew
        if self._reconnects.exceeded(time.perf_counter()):
            return BusFault(f"the port {self.config.port} was lost more than {RECONNECTS} times within a minute. Check the USB cable and its plugs.")
        log.warning("lost %s (%s); waiting up to %.1f s for it", self.config.port, _one_line(cause), self.config.reconnect_s)
        return self._away(cause)

    def _away(self, cause: Exception) -> ArmAwayError:
        said = f"the port {self.config.port} was lost ({_one_line(cause)}). Plug it in again. {glue.ports_message()}."
        return ArmAwayError(said, self.config.reconnect_s)

    def _reconnect(self) -> None:
        """Look for the port, and check that the same arm is behind it. Raises ArmAwayError while it is not there, and BusFault."""
        try:
            self._open_bus(lambda: glue.check_calibration_in_servos(self.follower, self.config))
            self._restored(self._held)
        except Gr00tFastError as error:  # another arm is behind the port, it fell, or another program has taken it
            raise BusFault(str(error)) from error
        except (*EXCHANGE_FAILED, *LINK_LOST) as error:
            self.bus.close()
            raise self._away(error) from error
        self._guard.forget()
        self.events["reconnect"] += 1
        log.warning("%s is back", self.config.port)

    # Landing

    def _land(self, report: LandingReport, as_found: bool) -> None:
        follower, bus = self.follower, self.bus
        if follower is None:
            report.port_closed = report.cameras_closed = True
            return
        engaged = self._stage is Stage.ENGAGED
        holds = self.stays_powered or (self._found_powered and as_found) or (any(self._found_on.values()) and not engaged)
        if self._stage is Stage.OPENED and self._unanswered and not holds:
            broadcast_torque_off(bus)  # they have not all answered, perhaps for want of power: nothing is claimed about them
        elif self._stage in (Stage.SEEN, Stage.ENGAGED) and not holds:
            report.torque = release_torque(bus, LAND_REOPEN_S, report.problems)
        elif holds:
            if engaged:
                attempt("holding the arm where it stands", bus.stop_pushing, report.problems)
            report.torque = {joint: "held" if engaged or self._found_on.get(joint, False) else "off" for joint in SO100_JOINTS}
        attempt("closing the port", bus.close, report.problems)
        report.port_closed = not bus.is_connected
        self._watchdog.end("unknown" in report.torque.values())  # not before: it is fed by the exchanges above
        closed = [close_camera(name, camera, report.problems) for name, camera in follower.cameras.items()]
        report.cameras_closed = all(closed)

    # Helpers

    @contextlib.contextmanager
    def _using(self, doing: str) -> Iterator[None]:
        """The bus is for one thread at a time, and only between connect and land. What is raised says what was done."""
        if self._stage in (Stage.APART, Stage.LANDED):
            raise RobotError(f"{doing}: the arm is not connected. Call connect() first.")
        if not self._busy.acquire(blocking=False):
            raise RobotError(f"{doing}: another thread is using the arm. Its bus takes one thread at a time.")
        try:
            with self._explained(doing):
                yield
        finally:
            self._busy.release()

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Gr00tFastError:
            raise
        except Exception as error:
            raise RobotError(f"{doing} on {self.config.port} failed: {_one_line(error)}. Check cables and power, then start again.") from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error).rstrip('.!')}"


_excepthook = threading.excepthook


def _no_traceback_of_cameras(arguments: threading.ExceptHookArgs) -> None:
    """lerobot reads each camera in a thread that an exception ends when the camera dies; the missing frame is reported where it is asked for."""
    if arguments.thread is None or not arguments.thread.name.endswith("_read_loop"):
        _excepthook(arguments)


def close_camera(name: str, camera: Any, problems: list[str]) -> bool:
    """Stop a lerobot camera and its thread. A thread alive at exit can abort the interpreter, so it is looked at."""
    thread = getattr(camera, "thread", None)
    if thread is None and not camera.is_connected:
        return True
    closed = attempt(f"closing camera '{name}'", lambda: glue.disconnect_camera(camera), problems)
    if thread is not None and thread.is_alive():
        problems.append(f"camera '{name}': its reading thread is stuck in the capture driver; unplug the camera")
        return False
    return closed
