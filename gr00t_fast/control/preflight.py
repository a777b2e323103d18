"""Checks that arm and checkpoint fit together, made before the arm may move; all findings are reported at once.

An arm that does nothing, or shudders, often shows a mismatch for which nothing raises: swapped cameras, degrees against the normalised
range, another calibration. What contradicts itself is refused; what is only unusual is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from gr00t_fast.contracts import Observation, PartStatistics, PolicyMetadata, Robot
from gr00t_fast.control.binding import joints_of_parts, resolve_camera_map
from gr00t_fast.control.limits import GRIPPER
from gr00t_fast.control.pacer import FPS_RANGE
from gr00t_fast.errors import PreflightError

ASPECT_TOLERANCE = 0.02  # relative; 1280x720 against 1920x1080 is 0, 4:3 against 16:9 is 0.25
FPS_TOLERANCE = 0.1  # relative
LEROBOT_FPS = 30.0  # of recordings, unless another rate was asked for
# lerobot's normalised range is clamped to +-100 by its driver, so anything beyond cannot be it; half a unit for rounding.
NORMALISED_LIMIT = 100.5
# Clamping leaves extremes at exactly +-100; degrees meet that by accident once, hardly twice.
SATURATION_TOLERANCE, SATURATED_EXTREMES = 0.01, 2
RADIANS_LIMIT = 3.5  # just above pi: body joints that never leave it are radians, no task in degrees is that still
RANGE_SLACK_DEG = 10.0  # two calibrations of the same arm differ by a few degrees
# A pose this far outside the training range, and further than the range is wide, is not a careless start but another zero point.
POSE_CONTRADICTION_DEG = 60.0
# The published embodiments with category weights of their own; none is an SO-100 (fine-tunes are `new_embodiment`).
OTHER_ROBOTS = {"gr1": "the GR-1 humanoid", "oxe_droid": "a Franka arm (DROID)", "agibot_genie1": "the AgiBot Genie-1"}


_UNIT_ADVICE = (
    "The arm and the data use different units or zero points: try the other --robot.use_degrees, "
    "or use the calibration file of the arm that recorded the data (--robot.id, --robot.calibration_dir)."
)


@dataclass
class Findings:
    """`problems` forbid the run, `impossible` ones whatever the user wishes, `warnings` are for the user to judge, `notes` say what was decided."""

    problems: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Preflight:
    """The checks of one run, in two rounds. Tells the user what it found; `warnings` and `notes` collect it for the report."""

    def __init__(
        self,
        robot: Robot,
        metadata: PolicyMetadata,
        strict: bool = True,
        echo: Callable[[str], None] = print,
        source: str = "checkpoint",
        led: bool = False,
    ) -> None:
        """`strict` False: contradictions are warnings, for those who know better. `source`: whose metadata it is, in a word. `led`: the arm is moved
        slowly to where it begins; a pose somewhat outside the data is then no finding, one far from it a warning."""
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self._source, self._led = source, led
        self._robot, self._metadata, self._strict, self._echo = robot, metadata, strict, echo
        self._found = Findings()  # in this round

    def before_connecting(self, loop_fps: float | None, camera_map: Mapping[str, str] | None, action_horizon: int | None = None) -> float:
        """Check what is known while the arm is untouched; returns the control rate in Hz. Raises PreflightError."""
        self._judge(self.look(loop_fps, camera_map, action_horizon))
        return float(self._rate(loop_fps))  # type: ignore[arg-type]  # None was refused

    def look(self, loop_fps: float | None, camera_map: Mapping[str, str] | None, action_horizon: int | None = None) -> Findings:
        """As `before_connecting`; raises and says nothing."""
        found = self._found = Findings()
        self._check_metadata()
        for check in (lambda: self._check_cameras(camera_map), lambda: list(self._parts())):
            try:
                check()
            except PreflightError as error:
                found.impossible.append(str(error))
        self._check_fps(loop_fps)
        if action_horizon is not None and action_horizon > (trained := self._metadata.trained_horizon):
            found.problems.append(
                f"--action_horizon={action_horizon} is more than the {trained} actions this checkpoint was trained to predict. Use 1 to {trained}."
            )
        if self._metadata.state_statistics and not (found.problems or found.impossible):  # needs joints that fit
            self._check_units()
        return found

    def connected(self, observation: Observation) -> None:
        """Check the arm's calibrated limits and its present pose against the training data. Raises PreflightError."""
        self._found = Findings()
        if self._metadata.state_statistics:  # else that was said before connecting, and waved through
            limits = self._robot.joint_limits
            for name, data, arm, pose in zip(self._robot.joint_names, self._training_range(), limits, observation.joints, strict=True):
                self._check_joint(name, data, arm, pose)
        self._judge(self._found)

    def _judge(self, found: Findings) -> None:
        refused = [*found.impossible, *found.problems] if self._strict or found.impossible else []
        if refused:
            plural = "s" if len(refused) > 1 else ""
            listing = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(refused, 1))
            raise PreflightError(f"robot and {self._source} do not fit together ({len(refused)} problem{plural}):\n{listing}")
        warnings = [*(f"ignored at your wish: {problem}" for problem in found.problems), *found.warnings]
        self.warnings += warnings
        self.notes += found.notes
        for note in found.notes:
            self._echo(f"note: {note}")
        for warning in warnings:
            self._echo(f"WARNING: {warning}")

    def _check_joint(self, name: str, data: np.ndarray, arm: np.ndarray, pose: float) -> None:
        """`data` and `arm` (2,): the joint's lowest and highest value in the training data and by its calibration."""
        (low, high), (arm_low, arm_high) = data, arm
        if high < arm_low or low > arm_high:
            self._found.problems.append(
                f"{name}: the data lies in {self._span(data)}, the calibrated arm can only reach [{arm_low:.0f}, {arm_high:.0f}]. {_UNIT_ADVICE}"
            )
            return
        if low < arm_low - RANGE_SLACK_DEG or high > arm_high + RANGE_SLACK_DEG:
            self._found.warnings.append(
                f"{name}: the data lies in {self._span(data)}, more than the arm's [{arm_low:.0f}, {arm_high:.0f}]; "
                "targets beyond are clamped. Was the data recorded with another calibration?"
            )
        self._check_pose(name, data, pose)

    def _span(self, data: np.ndarray) -> str:
        return f"[{data[0]:.0f}, {data[1]:.0f}] {'deg' if self._robot.joint_unit == 'degrees' else 'units'}"

    def _check_pose(self, name: str, data: np.ndarray, pose: float) -> None:
        low, high = data
        outside, stands = max(low - pose, pose - high), f"{name}: the arm stands at {pose:.0f}"
        if outside > max(POSE_CONTRADICTION_DEG, high - low):
            way = "It is led there slowly" if self._led else "Move the arm to where the recordings began, or let it be led there (--home)"
            (self._found.warnings if self._led else self._found.problems).append(
                f"{stands}, {outside:.0f} away from the data's {self._span(data)}. {way}. If it is there already: {_UNIT_ADVICE}"
            )
        elif outside > RANGE_SLACK_DEG and not self._led:
            self._found.warnings.append(f"{stands}, outside the data's {self._span(data)}. Better begin where the recordings began (--home).")

    def _check_metadata(self) -> None:
        """What a policy server does not say cannot be checked, and each of these makes an arm misbehave without an error."""
        known = {
            "joint units and ranges": bool(self._metadata.state_statistics),
            "camera resolution": None not in self._metadata.resolutions.values() or bool(self._metadata.state_statistics),
            "embodiment": self._metadata.embodiment_tag is not None,
        }
        unknown = [what for what, is_known in known.items() if not is_known]
        if unknown:
            self._found.problems.append(
                f"the policy server does not say what its checkpoint was trained on, so these cannot be checked: {', '.join(unknown)}. Give the "
                "checkpoint's directory or hub name too, --model_path=... (only its small files are read), or go on unchecked with --preflight=warn."
            )
        if self._metadata.embodiment_tag in OTHER_ROBOTS:
            self._found.problems.append(
                f"embodiment '{self._metadata.embodiment_tag}' is {OTHER_ROBOTS[self._metadata.embodiment_tag]}, not an SO-100. "
                "Use the tag that the fine-tuning used, normally --embodiment_tag=new_embodiment."
            )

    def _check_cameras(self, requested: Mapping[str, str] | None) -> None:
        cameras, letterbox, resolutions = self._robot.cameras, self._metadata.letterbox, self._metadata.resolutions
        mapping = resolve_camera_map(cameras, resolutions, requested)
        for robot_name, policy_name in mapping.items():
            camera, trained = cameras[robot_name], resolutions[policy_name]
            if robot_name != policy_name:
                implied = "" if requested and robot_name in requested else " (the only camera on both sides)"
                self._found.notes.append(f"camera '{robot_name}' is the policy's '{policy_name}'{implied}.")
            if letterbox is not None and not letterbox.known and camera.width != camera.height:
                self._found.warnings.append(
                    f"camera '{robot_name}' is {camera.width}x{camera.height}, and nothing tells whether its pictures are to be padded to "
                    f"a square: they are not padded, because {letterbox.why}. Fine-tunes made with NVIDIA's code of April to mid-June 2026 were "
                    "padded and say the same: for one of these give --letterbox=always, for a later one --letterbox=never (which ends this warning)."
                )
            if trained is None or (camera.width, camera.height) == trained:
                continue
            width, height = trained
            sizes = f"camera '{robot_name}' delivers {camera.width}x{camera.height}, the policy was trained with {width}x{height}"
            if abs(camera.width * height / (camera.height * width) - 1) > ASPECT_TOLERANCE:
                self._found.warnings.append(
                    f"{sizes}: frames are resized to ANOTHER ASPECT RATIO, the picture is distorted and the policy will misjudge positions. "
                    f"Set width: {width}, height: {height} in --robot.cameras, or another mode of the same shape."
                )
            else:
                self._found.notes.append(f"{sizes}; frames are resized.")
        for unused in [name for name in cameras if name not in mapping and resolutions]:  # a replay looks at none
            self._found.notes.append(f"camera '{unused}' is not used by the policy.")

    def _check_fps(self, loop_fps: float | None) -> None:
        recorded_fps, fps = self._metadata.fps, self._rate(loop_fps)
        if fps is None or (loop_fps is None and not FPS_RANGE[0] <= fps <= FPS_RANGE[1]):
            said = "nothing" if fps is None else f"{fps:g} Hz"
            self._found.impossible.append(
                f"of the rate at which its training data was recorded the policy says {said}; the loop needs {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} "
                "Hz. Give the rate of the recordings: --fps=30 (lerobot's default)."
            )
            return
        if recorded_fps is None and loop_fps is None:
            self._found.warnings.append(
                f"the checkpoint does not say at which rate its training data was recorded (N1.7's and lerobot's never do): {fps:g} Hz is taken, "
                "lerobot's default. If it was another one, motion is too fast or too slow: give it with --fps."
            )
        if recorded_fps and abs(fps / recorded_fps - 1) > FPS_TOLERANCE:
            self._found.warnings.append(
                f"the loop runs at {fps:g} Hz but the data was recorded at {recorded_fps:g} Hz: motion will be {fps / recorded_fps:.2f} times as "
                "fast."
            )
        for name, camera in self._robot.cameras.items():
            if camera.fps < fps * (1 - FPS_TOLERANCE):
                self._found.warnings.append(
                    f"camera '{name}' delivers {camera.fps:g} frames/s, less than the loop's {fps:g} Hz: some observations repeat a frame."
                )

    def _rate(self, loop_fps: float | None) -> float | None:
        """Hz; None where it is not known and must not be guessed."""
        return loop_fps or self._metadata.fps or (LEROBOT_FPS if self._metadata.state_statistics else None)

    def _parts(self) -> Iterator[tuple[Mapping[str, PartStatistics], dict[str, list[int]]]]:
        """Of states and of actions: statistics, and which joints each part has. Raises PreflightError where they are another robot's."""
        metadata, names = self._metadata, self._robot.joint_names
        yield metadata.state_statistics, joints_of_parts(metadata.state_widths, names, "state")
        yield metadata.action_statistics, joints_of_parts(metadata.action_widths, names, "action")

    def _training_range(self) -> np.ndarray:
        """(J, 2): lowest and highest value of states and actions together, in robot joint order."""
        ranges = np.tile([np.inf, -np.inf], (len(self._robot.joint_names), 1))
        for statistics, joints_of in self._parts():
            for part, joints in joints_of.items():
                ranges[joints, 0] = np.minimum(ranges[joints, 0], statistics[part].min)
                ranges[joints, 1] = np.maximum(ranges[joints, 1], statistics[part].max)
        return ranges

    def _check_units(self) -> None:
        training, unit, names = self._training_range(), self._robot.joint_unit, np.array(self._robot.joint_names)
        body = names != GRIPPER
        extremes = np.abs(training[body])
        saturated = int((np.abs(extremes - 100) <= SATURATION_TOLERANCE).sum())
        if extremes.max() <= RADIANS_LIMIT:
            self._found.problems.append(
                f"the data never exceeds {extremes.max():.2f} on any body joint: it looks like radians, the arm uses {unit}. "
                "Use data recorded with lerobot's SO-100 driver, or a checkpoint trained on such data."
            )
        elif unit == "range_m100_100" and extremes.max() > NORMALISED_LIMIT:
            name = names[body][int(extremes.max(axis=1).argmax())]
            self._found.problems.append(
                f"the arm is set to the normalised range -100..100, but the data reaches {extremes.max():.0f} on {name}: "
                "it is in degrees. Use --robot.use_degrees=true."
            )
        elif unit == "degrees" and saturated >= SATURATED_EXTREMES and extremes.max() <= NORMALISED_LIMIT:
            self._found.problems.append(
                f"the arm is set to degrees, but {saturated} of the data's joint ranges end at exactly 100 and none goes beyond: "
                "it is in the normalised range -100..100. Use --robot.use_degrees=false."
            )
        low, high = training[~body].min(initial=0.0), training[~body].max(initial=0.0)
        if low < -RANGE_SLACK_DEG or high > 100 + RANGE_SLACK_DEG or 0 < high <= 1.5:
            self._found.warnings.append(
                f"the gripper's statistics are [{low:.1f}, {high:.1f}]; lerobot counts it in per cent, 0 to 100. Was it recorded in degrees, or as a "
                "fraction?"
            )
