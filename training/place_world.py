"""`place` without pixels: what is known of the scene, one tick of an episode, and how far an episode came.

Targets pass the control loop's safety filter, so no joint may change by more than 6 degrees (the jaw: 6 per cent) per tick, for the expert that makes
the data and for the policy alike.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from gr00t_fast.contracts import SO100_JOINTS
from gr00t_fast.control.safety import SafetyFilter, SafetyOptions
from gr00t_fast.robots.so100_sim.scene import BLOCK_HALF_M, BOWL_RADIUS_M
from gr00t_fast.robots.so100_sim.simulation import TICK_S, Simulation
from gr00t_fast.robots.so100_sim.units import GRIPPER, LIMITS_DEG

SUCCESS_TICKS = 5  # in a row: a block that bounces through the bowl does not count
SHUT_PERCENT = 12.0  # a jaw target below this means to hold: the script's 2, and the ticks before
# Of the scene vector: block x y z (m), cos and sin of four times its turn (it has four equal sides), bowl x y (m), held (0 or 1).
SCENE_PARTS = {"block": slice(0, 5), "bowl": slice(5, 7), "grip": slice(7, 8)}
SCENE_WIDTH = 8
_LIFTED_M, _DOWN_M = 0.02, 0.01  # off the table, and on it again
_LOST_M = 0.04  # from the fingers' middle: farther than any grasp

Stage = Literal["grasp", "transport", "release"]


class PlaceWorld:
    """One episode at a time. `reset` first; then look (`joints`, `scene`) and `send`, a tick each.

    solved: tick at which SUCCESS_TICKS in a row were complete, or None. lifts: how often the block was taken off the table; more than once, it fell
    in between. over_bowl: whether it was ever held there.
    """

    def __init__(self) -> None:
        self.simulation = Simulation("place", 0)
        model = self.simulation.model
        pads = {name: [i for i in range(model.ngeom) if model.geom(i).name.startswith(f"{name}_pad")] for name in ("fixed", "moving")}
        self._fixed, self._moving, self._block = set(pads["fixed"]), set(pads["moving"]), model.geom("block").id
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.simulation.reset(seed)
        self.seed, self.tick, self.solved = seed, 0, None
        self.lifts, self.over_bowl, self._up = 0, False, False
        self._good_ticks = 0
        self._safety = SafetyFilter(LIMITS_DEG, SO100_JOINTS, SafetyOptions(max_following_error_deg=None), fps=1 / TICK_S, units_per_deg=np.ones(6))
        self._safety.start(self.simulation.joints_deg)

    def begin_at(self, joints_deg: np.ndarray) -> None:
        """Put the arm elsewhere (6,) before the first tick, and let it hold there."""
        self.simulation.place_arm(joints_deg)
        self.simulation.set_targets(joints_deg)
        self._safety.start(joints_deg)

    def send(self, targets_deg: np.ndarray) -> None:
        """Targets (6,) in degrees for one tick."""
        self.simulation.set_targets(self._safety(targets_deg))
        self.simulation.advance(TICK_S)
        self.tick += 1
        self._good_ticks = self._good_ticks + 1 if self.simulation.success else 0
        if self.solved is None and self._good_ticks >= SUCCESS_TICKS:
            self.solved = self.tick
        self._note_height()

    def _note_height(self) -> None:
        block, bowl = self.simulation.block_m, self.simulation.bowl_m
        height_m = block[2] - BLOCK_HALF_M
        if not self._up and height_m > _LIFTED_M and self.held:
            self.lifts, self._up = self.lifts + 1, True
        elif height_m < _DOWN_M:
            self._up = False
        self.over_bowl |= bool(self._up and self.held and np.hypot(*(block - bowl)[:2]) < BOWL_RADIUS_M)

    # --- what is known -----------------------------------------------------------------------------------------------------------------

    @property
    def joints(self) -> np.ndarray:
        """Measured (6,), degrees and per cent."""
        return self.simulation.joints_deg

    @property
    def scene(self) -> np.ndarray:
        """(SCENE_WIDTH,): see SCENE_PARTS."""
        yaw = 4 * self.simulation.block_yaw_rad
        return np.array([*self.simulation.block_m, np.cos(yaw), np.sin(yaw), *self.simulation.bowl_m[:2], float(self.held)])

    @property
    def held(self) -> bool:
        """Whether both jaws touch the block."""
        pairs = self.simulation.data.contact.geom[: self.simulation.data.ncon]
        touching = {int(other) for pair in pairs if self._block in pair for other in pair}
        return bool(touching & self._fixed and touching & self._moving)

    @property
    def lost(self) -> bool:
        """The jaw is told to hold, and the block is elsewhere and not in the bowl: the grasp has failed, or the block fell on the way."""
        simulation = self.simulation
        away_m = np.linalg.norm(simulation.tcp_m - simulation.block_m)
        return bool(simulation.targets_deg[GRIPPER] < SHUT_PERCENT and away_m > _LOST_M and not simulation.block_in_bowl)

    @property
    def failed_at(self) -> Stage | None:
        """Of an episode that is over: what never happened first. None when solved."""
        if self.solved is not None:
            return None
        return "grasp" if not self.lifts else "transport" if not self.over_bowl else "release"
