"""Two ways to the simulated motors: straight into the physics, or through lerobot's driver and a virtual servo bus."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS, Clock, JointUnit, LandingReport
from gr00t_fast.errors import ConfigError, RobotError
from gr00t_fast.robots.config import SO100FollowerConfig, SO100SimConfig
from gr00t_fast.robots.so100_sim.plant import ScenePlant
from gr00t_fast.robots.so100_sim.simulation import Simulation
from gr00t_fast.robots.so100_sim.units import LIMITS_DEG, from_degrees, to_degrees

if TYPE_CHECKING:
    from gr00t_fast.robots.feetech_bus import VirtualBus
    from gr00t_fast.robots.feetech_bus.servo import Calibration
    from gr00t_fast.robots.so100_follower import SO100FollowerArm

MAX_CATCH_UP_S = 10.0  # after a longer pause (a debugger, a suspended machine) the arm continues from here; it came to rest long before


class Drive(Protocol):
    """Motors of one episode after another. `begin` first; `end` last."""

    simulation: Simulation

    def begin(self, seed: int) -> None:
        """A fresh scene from `seed`, torque on."""

    def limits(self) -> np.ndarray:
        """(6, 2) in the configured unit."""

    def read(self) -> tuple[np.ndarray, float]:
        """Joints (6,) in the configured unit, and the time of the reading (s)."""

    def send(self, targets: np.ndarray) -> None:
        """Goal positions (6,) in the configured unit."""

    def end(self) -> LandingReport:
        """Release or hold, as configured. Does not raise."""


class WallClock:
    """Real time; `contracts.Clock`."""

    def now_s(self) -> float:
        """Monotonic seconds."""
        return time.perf_counter()

    def sleep_until_s(self, deadline_s: float) -> None:
        """Wait coarsely."""
        time.sleep(max(0.0, deadline_s - time.perf_counter()))


class DirectDrive:
    """Targets go straight to the simulated motors. Physics is advanced to the clock's present whenever the arm is read or told something,
    so that whatever takes time between two calls, such as inference, lets the old targets act on."""

    def __init__(self, config: SO100SimConfig, unit: JointUnit, clock: Clock | None) -> None:
        self._hold, self._unit, self._clock = not config.disable_torque_on_disconnect, unit, clock or WallClock()
        self.simulation = Simulation(config.task, 0, config.block_speed_m_s)

    def begin(self, seed: int) -> None:
        """See Drive."""
        self.simulation.reset(seed)
        self._last_s = self._clock.now_s()

    def limits(self) -> np.ndarray:
        """See Drive."""
        return from_degrees(LIMITS_DEG.T, self._unit).T

    def read(self) -> tuple[np.ndarray, float]:
        """See Drive."""
        self._catch_up()
        return from_degrees(self.simulation.joints_deg, self._unit), self._last_s

    def send(self, targets: np.ndarray) -> None:
        """See Drive."""
        self._catch_up()
        self.simulation.set_targets(to_degrees(targets, self._unit))

    def end(self) -> LandingReport:
        """See Drive."""
        if not self._hold:
            self.simulation.set_torque(False)
        return LandingReport(dict.fromkeys(SO100_JOINTS, "held" if self._hold else "off"), port_closed=True, cameras_closed=True)

    def _catch_up(self) -> None:
        now_s = self._clock.now_s()
        self.simulation.advance(min(max(0.0, now_s - self._last_s), MAX_CATCH_UP_S))
        self._last_s = now_s


class BusDrive:
    """lerobot's unmodified driver on one end of a pseudo-terminal, six virtual servos that move the simulated arm on the other.

    The bus runs in its own thread and in real time. Each episode begins with a power cycle: the arm is put back by hand, so to speak, which a
    driver that is connected would rightly take for a fault.
    """

    def __init__(self, config: SO100SimConfig, events: Counter[str]) -> None:
        self._config, self._events = config, events
        self._arm: SO100FollowerArm | None = None
        self._bus: VirtualBus | None = None
        self._directory: tempfile.TemporaryDirectory | None = None
        self.simulation = Simulation(config.task, 0)  # replaced by that of each episode's plant

    def begin(self, seed: int) -> None:
        """See Drive."""
        from gr00t_fast.robots.feetech_bus import VirtualBus, save_calibration
        from gr00t_fast.robots.so100_follower import SO100FollowerArm

        self._close()
        plant = ScenePlant(self._config.task, seed)
        calibration = self._calibration()
        self._directory = tempfile.TemporaryDirectory(prefix="so100_sim_")
        save_calibration(calibration, Path(self._directory.name) / "so100_sim.json")
        self.simulation = plant.simulation
        self._bus = VirtualBus(calibration, plant)
        self._bus.start()
        self._arm = SO100FollowerArm(
            SO100FollowerConfig(
                id="so100_sim",
                calibration_dir=Path(self._directory.name),
                port=self._bus.port,
                use_degrees=self._config.use_degrees,
                disable_torque_on_disconnect=self._config.disable_torque_on_disconnect,
                watchdog_s=None,  # nothing of this bus outlives the program
            )
        )
        self._arm.events = self._events  # one count over all episodes
        self._arm.connect()

    def limits(self) -> np.ndarray:
        """See Drive."""
        return self._connected().joint_limits

    def read(self) -> tuple[np.ndarray, float]:
        """See Drive."""
        observation = self._connected().observe()
        return observation.joints, observation.time_s

    def send(self, targets: np.ndarray) -> None:
        """See Drive."""
        self._connected().send(targets)

    def end(self) -> LandingReport:
        """See Drive."""
        return self._close()

    def _connected(self) -> SO100FollowerArm:
        if self._bus is not None and self._bus.failure is not None:
            raise RobotError(f"the virtual servo bus stopped: {self._bus.failure}. This is a bug in the simulation.") from self._bus.failure
        if self._arm is None:
            raise RobotError("the simulated arm is not connected. Call connect() first.")
        return self._arm

    def _calibration(self) -> Calibration:
        from gr00t_fast.robots.feetech_bus import default_calibration, load_calibration

        if (self._config.id is None) != (self._config.calibration_dir is None):
            raise ConfigError("a calibration for the simulated servos needs both --robot.id and --robot.calibration_dir; give both or neither.")
        if self._config.id is None or self._config.calibration_dir is None:
            return default_calibration()
        return load_calibration(self._config.calibration_dir / f"{self._config.id}.json")

    def _close(self) -> LandingReport:
        arm, bus, directory = self._arm, self._bus, self._directory
        self._arm = self._bus = self._directory = None
        report = arm.land() if arm is not None else LandingReport(port_closed=True, cameras_closed=True)
        try:
            if bus is not None:
                bus.close()
                # The bus's thread may have stopped before the physics took a step with the last registers written.
                self.simulation.set_torque([bool(register) for register in bus.torque().values()])
            if directory is not None:
                directory.cleanup()
        except OSError as error:
            report.problems.append(f"closing the virtual servo bus: {error}")
        return report
