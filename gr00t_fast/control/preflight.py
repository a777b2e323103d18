"""Checks that arm and checkpoint fit together, made before the arm may move; all findings are reported at once.

An arm that does nothing, or shudders, often shows a mismatch for which nothing raises: swapped cameras, degrees against the normalised
range, another calibration. What contradicts itself is refused; what is only unusual is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from gr00t_fast.contracts import CameraSpec, JointUnit, Observation, PartStatistics, PolicyMetadata, Robot
from gr00t_fast.control.binding import joints_of_parts, resolve_camera_map
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


@dataclass
class Findings:
    """`problems` forbid the run, `impossible` ones whatever the user wishes, `warnings` are for the user to judge, `notes` say what was decided."""

    problems: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def collect(self, check: Callable[[], None]) -> None:
        """Run a check without whose success nothing can run: the message of its PreflightError is kept in `impossible`."""
        try:
            check()
        except PreflightError as error:
            self.impossible.append(str(error))

    def refuse(self, source: str = "checkpoint") -> None:
        """Raise one PreflightError with all problems, if there are any. `source`: what does not fit the robot, in a word."""
        problems = [*self.impossible, *self.problems]
        if problems:
            plural = "s" if len(problems) > 1 else ""
            listing = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
            raise PreflightError(f"robot and {source} do not fit together ({len(problems)} problem{plural}):\n{listing}")


class Preflight:
    """The checks of one run, in two rounds. Tells the user what it found; `warnings` and `notes` collect it for the report.

    `strict=False` turns contradictions into warnings, for those who know better.
    """

    def __init__(
        self,
        robot: Robot,
        metadata: PolicyMetadata,
        strict: bool = True,
        echo: Callable[[str], None] = print,
        source: str = "checkpoint",
        led: bool = False,
    ) -> None:
        """`source`: whose metadata it is, in a word. `led`: the arm is moved slowly to where it begins, so that where it stands now matters less."""
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self._source, self._led = source, led
        self._robot, self._metadata, self._strict, self._echo = robot, metadata, strict, echo

    def before_connecting(self, loop_fps: float | None, camera_map: Mapping[str, str] | None, action_horizon: int | None) -> float:
        """Check what is known while the arm is untouched; returns the control rate in Hz. Raises PreflightError."""
        findings = check_before_connecting(self._robot, self._metadata, loop_fps, camera_map, action_horizon)
        self._judge(findings)
        return float(_rate(self._metadata, loop_fps))  # type: ignore[arg-type]  # None was refused

    def connected(self, observation: Observation) -> None:
        """Check the arm's limits and its pose. Raises PreflightError."""
        self._judge(check_connected(self._robot, self._metadata, observation.joints, self._led))

    def _judge(self, findings: Findings) -> None:
        if self._strict or findings.impossible:
            findings.refuse(self._source)
        warnings = [*(f"ignored at your wish: {problem}" for problem in findings.problems), *findings.warnings]
        self.warnings += warnings
        self.notes += findings.notes
        for note in findings.notes:
            self._echo(f"note: {note}")
        for warning in warnings:
            self._echo(f"WARNING: {warning}")


def check_before_connecting(
    robot: Robot, metadata: PolicyMetadata, loop_fps: float | None, camera_map: Mapping[str, str] | None, action_horizon: int | None = None
) -> Findings:
    """Everything that can be known while the arm is still untouched. Raises nothing; see `Findings.refuse`."""
    findings = Findings()
    _check_known(findings, metadata)
    _check_embodiment(findings, metadata)
    findings.collect(lambda: _check_cameras(findings, robot.cameras, metadata, camera_map))
    _check_fps(findings, robot, metadata, loop_fps)
    _check_horizon(findings, metadata, action_horizon)
    findings.collect(lambda: _check_joints(metadata, robot.joint_names))
    if metadata.state_statistics and not (findings.problems or findings.impossible):  # needs joints that fit
        _check_units(findings, robot.joint_unit, _training_range(metadata, robot.joint_names), robot.joint_names)
    return findings


def check_connected(robot: Robot, metadata: PolicyMetadata, joints: np.ndarray, led: bool = False) -> Findings:
    """What needs the arm: its calibrated limits and its present pose (J,) against the training data. Raises nothing.

    `led`: the arm is moved to where it begins; a pose somewhat outside the data is then no finding, one far from it a warning.
    """
    findings = Findings()
    if not metadata.state_statistics:  # said before connecting, and waved through
        return findings
    training = _training_range(metadata, robot.joint_names)
    unit = "deg" if robot.joint_unit == "degrees" else "units"
    for name, (low, high), (arm_low, arm_high), pose in zip(robot.joint_names, training, robot.joint_limits, joints, strict=True):
        if high < arm_low or low > arm_high:
            findings.problems.append(
                f"{name}: the data lies in [{low:.0f}, {high:.0f}] {unit}, the calibrated arm "
                f"can only reach [{arm_low:.0f}, {arm_high:.0f}]. "
                f"{_UNIT_ADVICE}"
            )
            continue
        if low < arm_low - RANGE_SLACK_DEG or high > arm_high + RANGE_SLACK_DEG:
            findings.warnings.append(
                f"{name}: the data lies in [{low:.0f}, {high:.0f}] {unit}, more than the arm's [{arm_low:.0f}, {arm_high:.0f}]; "
                "targets beyond are clamped. Was the data recorded with another calibration?"
            )
        _check_pose(findings, name, pose, low, high, unit, led)
    return findings


_UNIT_ADVICE = (
    "The arm and the data use different units or zero points: try the other --robot.use_degrees, "
    "or use the calibration file of the arm that recorded the data (--robot.id, --robot.calibration_dir)."
)


def _check_pose(findings: Findings, name: str, pose: float, low: float, high: float, unit: str, led: bool) -> None:
    outside = max(low - pose, pose - high)
    if outside > max(POSE_CONTRADICTION_DEG, high - low):
        way = "It is led there slowly" if led else "Move the arm to where the recordings began, or let it be led there (--home)"
        (findings.warnings if led else findings.problems).append(
            f"{name}: the arm stands at {pose:.0f} {unit}, {outside:.0f} away from the data's [{low:.0f}, {high:.0f}]. {way}. "
            f"If it is there already: {_UNIT_ADVICE}"
        )
    elif outside > RANGE_SLACK_DEG and not led:
        findings.warnings.append(
            f"{name}: the arm stands at {pose:.0f} {unit}, outside the data's [{low:.0f}, {high:.0f}]. "
            "Better begin where the recordings began (--home)."
        )


def _check_known(findings: Findings, metadata: PolicyMetadata) -> None:
    """What a policy server does not say cannot be checked, and each of these makes an arm misbehave without an error."""
    known = {
        "joint units and ranges": bool(metadata.state_statistics),
        "camera resolution": None not in metadata.resolutions.values() or _tells_no_recordings(metadata),
        "embodiment": metadata.embodiment_tag is not None,
    }
    unknown = [what for what, is_known in known.items() if not is_known]
    if unknown:
        findings.problems.append(
            f"the policy server does not say what its checkpoint was trained on, so these cannot be checked: {', '.join(unknown)}. Give the "
            "checkpoint's directory or hub name too, --model_path=... (only its small files are read), or go on unchecked with --preflight=warn."
        )


def _check_embodiment(findings: Findings, metadata: PolicyMetadata) -> None:
    if metadata.embodiment_tag in OTHER_ROBOTS:
        findings.problems.append(
            f"embodiment '{metadata.embodiment_tag}' is {OTHER_ROBOTS[metadata.embodiment_tag]}, not an SO-100. "
            "Use the tag that the fine-tuning used, normally --embodiment_tag=new_embodiment."
        )


def _check_cameras(findings: Findings, cameras: Mapping[str, CameraSpec], metadata: PolicyMetadata, requested: Mapping[str, str] | None) -> None:
    mapping = resolve_camera_map(cameras, metadata.resolutions, requested)
    for robot_name, policy_name in mapping.items():
        camera, trained = cameras[robot_name], metadata.resolutions[policy_name]
        if robot_name != policy_name:
            implied = "" if requested and robot_name in requested else " (the only camera on both sides)"
            findings.notes.append(f"camera '{robot_name}' is the policy's '{policy_name}'{implied}.")
        if metadata.letterbox is not None and not metadata.letterbox.known and camera.width != camera.height:
            findings.warnings.append(
                f"camera '{robot_name}' is {camera.width}x{camera.height}, and nothing tells whether its pictures are to be padded to "
                f"a square: they are not padded, because {metadata.letterbox.why}. Fine-tunes made with NVIDIA's code of April to mid-June 2026 were "
                "padded and say the same: for one of these give --letterbox=always, for a later one --letterbox=never (which ends this warning)."
            )
        if trained is None or (camera.width, camera.height) == trained:
            continue
        width, height = trained
        sizes = f"camera '{robot_name}' delivers {camera.width}x{camera.height}, the policy was trained with {width}x{height}"
        if abs(camera.width * height / (camera.height * width) - 1) > ASPECT_TOLERANCE:
            findings.warnings.append(
                f"{sizes}: frames are resized to ANOTHER ASPECT RATIO, the picture is distorted and the policy will misjudge positions. "
                f"Set width: {width}, height: {height} in --robot.cameras, or another mode of the same shape."
            )
        else:
            findings.notes.append(f"{sizes}; frames are resized.")
    for unused in [name for name in cameras if name not in mapping and metadata.resolutions]:  # a replay looks at none
        findings.notes.append(f"camera '{unused}' is not used by the policy.")


def _check_fps(findings: Findings, robot: Robot, metadata: PolicyMetadata, loop_fps: float | None) -> None:
    if loop_fps is None and metadata.fps is not None and not FPS_RANGE[0] <= metadata.fps <= FPS_RANGE[1]:
        findings.impossible.append(
            f"the data is said to be recorded at {metadata.fps:g} Hz, which is outside {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} Hz: what "
            "cameras and the servo bus can do. Give the rate of the recordings: --fps=30 (lerobot's default)."
        )
        return
    fps = _rate(metadata, loop_fps)
    if fps is None:
        findings.impossible.append("the policy does not say at which rate its training data was recorded. Give it: --fps=30 (lerobot's default).")
        return
    if metadata.fps is None and loop_fps is None:
        findings.warnings.append(
            f"the checkpoint does not say at which rate its training data was recorded (those of N1.7 never do): {fps:g} Hz is taken, lerobot's "
            "default. If it was another one, motion is too fast or too slow: give it with --fps."
        )
    if metadata.fps and abs(fps / metadata.fps - 1) > FPS_TOLERANCE:
        findings.warnings.append(
            f"the loop runs at {fps:g} Hz but the data was recorded at {metadata.fps:g} Hz: motion will be {fps / metadata.fps:.2f} times as fast."
        )
    for name, camera in robot.cameras.items():
        if camera.fps < fps * (1 - FPS_TOLERANCE):
            findings.warnings.append(
                f"camera '{name}' delivers {camera.fps:g} frames/s, less than the loop's {fps:g} Hz: some observations repeat a frame."
            )


def _rate(metadata: PolicyMetadata, loop_fps: float | None) -> float | None:
    """Hz; None where it is not known and must not be guessed."""
    return loop_fps or metadata.fps or (LEROBOT_FPS if _tells_no_recordings(metadata) else None)


def _tells_no_recordings(metadata: PolicyMetadata) -> bool:
    """Whether it is of a checkpoint whose files tell joint ranges and neither rate nor resolution of the recordings: N1.7's never do."""
    return bool(metadata.state_statistics) and metadata.fps is None and set(metadata.resolutions.values()) == {None}


def _check_horizon(findings: Findings, metadata: PolicyMetadata, action_horizon: int | None) -> None:
    if action_horizon is not None and action_horizon > metadata.trained_horizon:
        findings.problems.append(
            f"--action_horizon={action_horizon} is more than the {metadata.trained_horizon} actions this checkpoint was trained to predict. "
            f"Use 1 to {metadata.trained_horizon}."
        )


def _check_joints(metadata: PolicyMetadata, joint_names: tuple[str, ...]) -> None:
    joints_of_parts(metadata.state_widths, joint_names, "state")
    joints_of_parts(metadata.action_widths, joint_names, "action")


def _training_range(metadata: PolicyMetadata, joint_names: tuple[str, ...]) -> np.ndarray:
    """(J, 2): lowest and highest value of states and actions together, in robot joint order."""
    state = _along_joints(metadata.state_statistics, joints_of_parts(metadata.state_widths, joint_names, "state"), len(joint_names))
    action = _along_joints(metadata.action_statistics, joints_of_parts(metadata.action_widths, joint_names, "action"), len(joint_names))
    return np.stack([np.minimum(state[:, 0], action[:, 0]), np.maximum(state[:, 1], action[:, 1])], axis=1)


def _along_joints(statistics: Mapping[str, PartStatistics], joints: Mapping[str, list[int]], count: int) -> np.ndarray:
    ranges = np.empty((count, 2))
    for part, indices in joints.items():
        ranges[indices, 0], ranges[indices, 1] = statistics[part].min, statistics[part].max
    return ranges


def _check_units(findings: Findings, unit: JointUnit, training: np.ndarray, joint_names: tuple[str, ...]) -> None:
    body = np.array([name != "gripper" for name in joint_names])
    extremes = np.abs(training[body])
    saturated = int((np.abs(extremes - 100) <= SATURATION_TOLERANCE).sum())
    if extremes.max() <= RADIANS_LIMIT:
        findings.problems.append(
            f"the data never exceeds {extremes.max():.2f} on any body joint: it looks like radians, the arm uses {unit}. "
            "Use data recorded with lerobot's SO-100 driver, or a checkpoint trained on such data."
        )
    elif unit == "range_m100_100" and extremes.max() > NORMALISED_LIMIT:
        name = [name for name, is_body in zip(joint_names, body, strict=True) if is_body][int(extremes.max(axis=1).argmax())]
        findings.problems.append(
            f"the arm is set to the normalised range -100..100, but the data reaches {extremes.max():.0f} on {name}: "
            "it is in degrees. Use --robot.use_degrees=true."
        )
    elif unit == "degrees" and saturated >= SATURATED_EXTREMES and extremes.max() <= NORMALISED_LIMIT:
        findings.problems.append(
            f"the arm is set to degrees, but {saturated} of the data's joint ranges end at exactly 100 and none goes beyond: "
            "it is in the normalised range -100..100. Use --robot.use_degrees=false."
        )
    low, high = training[~body].min(initial=0.0), training[~body].max(initial=0.0)
    if low < -RANGE_SLACK_DEG or high > 100 + RANGE_SLACK_DEG:
        findings.warnings.append(f"the gripper's statistics are [{low:.0f}, {high:.0f}]; lerobot counts it in per cent, 0 to 100.")
    if 0 < high <= 1.5 and (~body).any():
        findings.warnings.append(
            f"the gripper's statistics never exceed {high:.2f}; lerobot counts it in per cent, 0 to 100. Was it recorded as a fraction?"
        )
