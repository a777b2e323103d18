"""The simulated arm as the mechanics behind a servo bus."""

from __future__ import annotations

import numpy as np

from gr00t_fast.robots.so100_sim.scene import Task
from gr00t_fast.robots.so100_sim.simulation import Simulation


class ScenePlant:
    """What `feetech_bus.VirtualBus(plant=...)` drives: servos' set-points in, the positions physics makes of them out.

    `simulation` may be drawn from another thread meanwhile. Positions and targets are lerobot degrees, the gripper 0..100.
    """

    def __init__(self, task: Task = "place", seed: int = 0) -> None:
        self.simulation = Simulation(task, seed)
        self.simulation.set_torque(False)  # a servo comes up without torque

    def step(self, targets_deg: list[float | None], dt_s: float) -> list[float]:
        """Let `dt_s` pass while each motor pulls towards its target (None: torque off). Returns the six positions."""
        simulation = self.simulation
        pulls = [target is not None for target in targets_deg]
        with simulation.lock:
            if pulls != simulation.torque_on.tolist():
                simulation.set_torque(pulls)
            held = simulation.targets_deg
            simulation.set_targets(np.array([held[i] if target is None else target for i, target in enumerate(targets_deg)]))
            simulation.advance(dt_s)
            return simulation.joints_deg.tolist()
