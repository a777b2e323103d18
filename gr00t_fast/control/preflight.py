"""Checks that arm and checkpoint fit together, made before the arm may move; all findings are reported at once.

An arm that does nothing, or shudders, often shows a mismatch for which nothing raises: swapped cameras, degrees against the normalised
range, another calibration. What contradicts itself is refused; what is only unusual is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np

from gr00t_fast.base.contracts import Observation, PartStatistics, PolicyMetadata, Robot
from gr00t_fast.base.errors import PreflightError
from gr00t_fast.control.binding import joints_of_parts, resolve_camera_map
from gr00t_fast.control.limits import GRIPPER
from gr00t_fast.control.pacer import FPS_RANGE

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
# A problem forbids the run, an impossible one whatever the user wishes; a warning is for the user to judge; a note says what was decided.
Finding = tuple[Literal["impossible", "problem", "warning", "note"], str]


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
        """`strict` False: problems are warnings, for those who know better. `source`: whose metadata it is, in a word. `led`: the arm is moved
        slowly to where it begins; a pose somewhat outside the data is then no finding, one far from it a warning."""
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self._source, self._led = source, led
        self._robot, self._metadata, self._strict, self._echo = robot, metadata, strict, echo

    def before_connecting(self, loop_fps: float | None, camera_map: Mapping[str, str] | None, action_horizon: int | None = None) -> float:
        """Check what is known while the arm is untouched; returns the control rate in Hz. Raises PreflightError."""
        self.judge(self.look(loop_fps, camera_map, action_horizon))
        return float(self._rate(loop_fps))  # type: ignore[arg-type]  # None was refused

    def look(self, loop_fps: float | None, camera_map: Mapping[str, str] | None, action_horizon: int | None = None) -> list[Finding]:
        """As `before_connecting`; raises and says nothing."""
        found = [*self._metadata_findings()]
        for check in (lambda: found.extend(self._camera_findings(camera_map)), lambda: list(self._parts())):
            try:
                check()
            except PreflightError as error:
                found.append(("impossible", str(error)))
        found += self._rate_findings(loop_fps)
        if action_horizon is not None and action_horizon > (trained := self._metadata.trained_horizon):
            text = f"--action_horizon={action_horizon} is more than the {trained} actions this checkpoint was trained to predict. Use 1 to {trained}."
            found.append(("problem", text))
        if self._metadata.state_statistics and not any(kind in ("problem", "impossible") for kind, _ in found):  # needs joints that fit
            found += self._unit_findings()
        return found

    def connected(self, observation: Observation) -> None:
        """Check the arm's calibrated limits and its present pose against the training data. Raises PreflightError."""
        self.judge(self.look_at(observation))

    def look_at(self, observation: Observation) -> list[Finding]:
        """As `connected`, for joints that fit; raises and says nothing."""
        if not self._metadata.state_statistics:  # a warning said so before connecting
            return []
        joints = zip(self._robot.joint_names, self._training_range(), self._robot.joint_limits, observation.joints, strict=True)
        return [finding for joint in joints for finding in self._joint_findings(*joint)]

    def judge(self, found: list[Finding]) -> None:
        """Say what was found, and collect it. Raises PreflightError for what is refused."""
        of: dict[str, list[str]] = {kind: [text for each, text in found if each == kind] for kind in ("impossible", "problem", "warning", "note")}
        refused = [*of["impossible"], *of["problem"]] if self._strict or of["impossible"] else []
        if refused:
            plural = "s" if len(refused) > 1 else ""
            listing = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(refused, 1))
            raise PreflightError(f"robot and {self._source} do not fit together ({len(refused)} problem{plural}):\n{listing}")
        warnings = [*(f"ignored at your wish: {problem}" for problem in of["problem"]), *of["warning"]]
        self.warnings += warnings
        self.notes += of["note"]
        for line in [*(f"note: {note}" for note in of["note"]), *(f"WARNING: {warning}" for warning in warnings)]:
            self._echo(line)

    # With the arm connected

    def _joint_findings(self, name: str, data: np.ndarray, arm: np.ndarray, pose: float) -> Iterator[Finding]:
        """`data` and `arm` (2,): the joint's lowest and highest value in the training data and by its calibration."""
        (low, high), (arm_low, arm_high) = data, arm
        span = f"[{low:.0f}, {high:.0f}] {'deg' if self._robot.joint_unit == 'degrees' else 'units'}"
        lies, reach = f"{name}: the data lies in {span}", f"[{arm_low:.0f}, {arm_high:.0f}]"
        if high < arm_low or low > arm_high:
            yield "problem", f"{lies}, the calibrated arm can only reach {reach}. {_UNIT_ADVICE}"
            return
        if low < arm_low - RANGE_SLACK_DEG or high > arm_high + RANGE_SLACK_DEG:
            yield "warning", f"{lies}, more than the arm's {reach}; targets beyond are clamped. Was the data recorded with another calibration?"
        outside, stands = max(low - pose, pose - high), f"{name}: the arm stands at {pose:.0f}"
        if outside > max(POSE_CONTRADICTION_DEG, high - low):
            way = "It is led there slowly" if self._led else "Move the arm to where the recordings began, or let it be led there (--home)"
            text = f"{stands}, {outside:.0f} away from the data's {span}. {way}. If it is there already: {_UNIT_ADVICE}"
            yield "warning" if self._led else "problem", text
        elif outside > RANGE_SLACK_DEG and not self._led:
            yield "warning", f"{stands}, outside the data's {span}. Better begin where the recordings began (--home)."

    # Before that

    def _metadata_findings(self) -> Iterator[Finding]:
        """What a policy server does not say cannot be checked, and each of these makes an arm misbehave without an error."""
        known = {
            "joint units and ranges": bool(self._metadata.state_statistics),
            "camera resolution": None not in self._metadata.resolutions.values() or bool(self._metadata.state_statistics),
            "embodiment": self._metadata.embodiment_tag is not None,
        }
        if not all(known.values()):
            unknown = ", ".join(what for what, is_known in known.items() if not is_known)
            text = (
                f"the policy server does not say what its checkpoint was trained on, so these cannot be checked: {unknown}. Give the checkpoint's "
                "directory or hub name too, --model_path=... (only its small files are read), or go on unchecked with --preflight=warn."
            )
            yield "problem", text
        if (tag := self._metadata.embodiment_tag) in OTHER_ROBOTS:
            advice = "Use the tag that the fine-tuning used, normally --embodiment_tag=new_embodiment."
            yield "problem", f"embodiment '{tag}' is {OTHER_ROBOTS[tag]}, not an SO-100. {advice}"

    def _camera_findings(self, requested: Mapping[str, str] | None) -> Iterator[Finding]:
        cameras, letterbox, resolutions = self._robot.cameras, self._metadata.letterbox, self._metadata.resolutions
        mapping = resolve_camera_map(cameras, resolutions, requested)
        for robot_name, policy_name in mapping.items():
            camera, trained = cameras[robot_name], resolutions[policy_name]
            if robot_name != policy_name:
                implied = "" if requested and robot_name in requested else " (the only camera on both sides)"
                yield "note", f"camera '{robot_name}' is the policy's '{policy_name}'{implied}."
            if letterbox is not None and not letterbox.known and camera.width != camera.height:
                text = (
                    f"camera '{robot_name}' is {camera.width}x{camera.height}, and nothing tells whether its pictures are to be padded to "
                    f"a square: they are not padded, because {letterbox.why}. Fine-tunes made with NVIDIA's code of some months were padded "
                    "and say the same (N1.6: from 24 February 2026 on; N1.7: April to mid-June 2026): for one of these give --letterbox=always, for "
                    "another one --letterbox=never (which ends this warning)."
                )
                yield "warning", text
            if trained is None or (camera.width, camera.height) == trained:
                continue
            width, height = trained
            sizes = f"camera '{robot_name}' delivers {camera.width}x{camera.height}, the policy was trained with {width}x{height}"
            if abs(camera.width * height / (camera.height * width) - 1) > ASPECT_TOLERANCE:
                text = (
                    f"{sizes}: frames are resized to ANOTHER ASPECT RATIO, the picture is distorted and the policy will misjudge positions. "
                    f"Set width: {width}, height: {height} in --robot.cameras, or another mode of the same shape."
                )
                yield "warning", text
            else:
                yield "note", f"{sizes}; frames are resized."
        for unused in [name for name in cameras if name not in mapping and resolutions]:  # a replay looks at none
            yield "note", f"camera '{unused}' is not used by the policy."

    def _rate_findings(self, loop_fps: float | None) -> Iterator[Finding]:
        recorded_fps, fps = self._metadata.fps, self._rate(loop_fps)
        if fps is None or (loop_fps is None and not FPS_RANGE[0] <= fps <= FPS_RANGE[1]):
            said, needed = "no rate" if fps is None else f"{fps:g} Hz", f"{FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} Hz"
            remedy = "It cannot be played" if self._source == "recording" else "Give it: --fps=30 (lerobot's default)"
            yield "impossible", f"the {self._source} says {said} of its data, the loop needs {needed}. {remedy}."
            return
        if recorded_fps is None and loop_fps is None:
            text = (
                f"the checkpoint does not say at which rate its training data was recorded: {fps:g} Hz is taken, lerobot's default. "
                "If it was another one, motion is too fast or too slow: give it with --fps."
            )
            yield "warning", text
        if recorded_fps and abs(fps / recorded_fps - 1) > FPS_TOLERANCE:
            times = f"{fps / recorded_fps:.2f} times"
            yield "warning", f"the loop runs at {fps:g} Hz but the data was recorded at {recorded_fps:g} Hz: motion will be {times} as fast."
        for name, camera in self._robot.cameras.items():
            if camera.fps < fps * (1 - FPS_TOLERANCE):
                yield "warning", f"camera '{name}' delivers {camera.fps:g} frames/s, less than the loop's {fps:g} Hz: some frames are repeated."

    def _rate(self, loop_fps: float | None) -> float | None:
        """Hz; None where it is not known and must not be guessed."""
        return loop_fps or self._metadata.fps or (LEROBOT_FPS if self._metadata.state_statistics else None)

    def _parts(self) -> Iterator[tuple[Mapping[str, PartStatistics], dict[str, list[int]]]]:
        """For states, then for actions: statistics, and which joints each part has. Raises PreflightError where they are another robot's."""
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

    def _unit_findings(self) -> Iterator[Finding]:
        training, unit, names = self._training_range(), self._robot.joint_unit, np.array(self._robot.joint_names)
        body = names != GRIPPER
        extremes = np.abs(training[body])
        furthest, saturated = extremes.max(), int((np.abs(extremes - 100) <= SATURATION_TOLERANCE).sum())
        if furthest <= RADIANS_LIMIT:
            yield "problem", f"the data never exceeds {furthest:.2f} on any body joint: it looks like radians, the arm uses {unit}."
        elif unit == "range_m100_100" and furthest > NORMALISED_LIMIT:
            name = names[body][int(extremes.max(axis=1).argmax())]
            yield "problem", f"the arm is set to the range -100..100, but the data reaches {furthest:.0f} on {name}. Use --robot.use_degrees=true."
        elif unit == "degrees" and saturated >= SATURATED_EXTREMES and furthest <= NORMALISED_LIMIT:
            ends = f"{saturated} of the data's joint ranges end at exactly 100 and none goes beyond"
            yield "problem", f"the arm is set to degrees, but {ends}. Use --robot.use_degrees=false."
        low, high = training[~body].min(initial=0.0), training[~body].max(initial=0.0)
        if low < -RANGE_SLACK_DEG or high > 100 + RANGE_SLACK_DEG or 0 < high <= 1.5:
            yield "warning", f"the gripper's statistics are [{low:.1f}, {high:.1f}], not 0 to 100: was it recorded in degrees, or as a fraction?"
