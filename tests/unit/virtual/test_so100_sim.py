"""The simulated arm: scene, pictures, physics, expert, and the Robot made of them. No GPU, no OpenGL."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from control_fakes import FakeClock

from gr00t_fast.base.contracts import SO100_JOINTS, Robot
from gr00t_fast.base.errors import ConfigError, RobotError
from gr00t_fast.cli import sim as program
from gr00t_fast.robots import OpenCVCameraConfig, SimCameraConfig, SO100SimConfig
from gr00t_fast.virtual.sim.rendering import Pinhole, fill_mask, render_faces, spans
from gr00t_fast.virtual.sim.scene import (
    FRONT_CAMERA,
    LIMITS_DEG,
    PAN_AXIS_XY_M,
    degrees_to_radians,
    from_degrees,
    radians_to_degrees,
    sample_layout,
    to_degrees,
)

pytest.importorskip("mujoco")
from gr00t_fast.virtual.sim.expert import expert
from gr00t_fast.virtual.sim.simulation import HOME_DEG, TICK_S, SimArm, Simulation

EYE = Pinhole(np.zeros(3), np.eye(3), fovy_deg=60, width=48, height=36)  # looks along +z, y down


# --- units and layout ------------------------------------------------------------------------------------------------------------------------


def test_units_round_trip_and_match_the_driver():
    joints = np.random.default_rng(0).uniform(*LIMITS_DEG.T, (50, 6))
    np.testing.assert_allclose(radians_to_degrees(degrees_to_radians(joints)), joints, atol=1e-9)
    for unit in ("degrees", "range_m100_100"):
        np.testing.assert_allclose(to_degrees(from_degrees(joints, unit), unit), joints, atol=1e-9)
    rest_rad = np.array([0, -3.32, 3.11, 1.18, 0, -0.174])  # the folded arm
    np.testing.assert_allclose(radians_to_degrees(rest_rad), [0, -100, 88, 68, 0, 0], atol=0.5)
    np.testing.assert_array_equal(from_degrees(LIMITS_DEG.T, "range_m100_100"), [[-100] * 5 + [0], [100] * 6])


# --- rasteriser ------------------------------------------------------------------------------------------------------------------------------


def picture(camera: Pinhole, points: np.ndarray, faces: np.ndarray, values: np.ndarray, **options: np.ndarray) -> np.ndarray:
    """Values per pixel, -1 where nothing is seen."""
    image = np.full(camera.height * camera.width, -1.0)
    fragments = render_faces(camera, points, faces, values, **options)
    image[fragments.pixel] = fragments.value
    return image.reshape(camera.height, camera.width)


def cast_rays(camera: Pinhole, points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """The slow twin: nearest face (H,W) hit by each pixel's ray beyond the near plane, or -1; both sides of faces count."""
    v, u = np.mgrid[: camera.height, : camera.width] + 0.5
    rays = np.stack([(u - camera.width / 2) / camera.focal_px, (v - camera.height / 2) / camera.focal_px, np.ones_like(u)], -1)
    nearest, hit = np.full(u.shape, np.inf), np.full(u.shape, -1)
    for number, face in enumerate(faces):
        corners = camera.to_camera(points[face])
        solution = rays @ np.linalg.pinv(corners) if np.linalg.matrix_rank(corners) == 3 else np.full(rays.shape, -1.0)
        depth = 1 / solution.sum(-1)
        closer = (solution >= 0).all(-1) & (depth > camera.near_m) & (depth < nearest)
        nearest[closer], hit[closer] = depth[closer], number
    return hit


def test_the_table_hides_what_is_below_it():
    points, faces, values = 0.3 * np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]), np.array([[0, 1, 2], [0, 2, 3]]), np.zeros(4)
    points = np.column_stack([points, np.ones(4)])
    assert (picture(EYE, points, faces, values, behind=np.full((36, 1), 1 / 0.9)) == -1).all()
    assert picture(EYE, points, faces, values, behind=np.full((36, 1), 1 / 1.1))[18, 24] == 0


def test_shared_edges_leave_no_gap_and_no_overlap():
    rng = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(np.linspace(-5, 55, 9), np.linspace(-5, 45, 8)), -1)
    grid[1:-1, 1:-1] += rng.uniform(-3, 3, grid[1:-1, 1:-1].shape)
    a, b, c, d = grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]
    triangles = np.concatenate([np.stack(corners, 2).reshape(-1, 3, 2) for corners in ((a, b, c), (a, c, d))])  # (F,3,2)
    row, first, last, _ = spans(triangles[..., 0].T, triangles[..., 1].T, 48, 36)
    count = np.zeros((36, 48), int)
    for y, start, stop in zip(row, first, last, strict=True):
        count[y, start:stop] += 1
    assert (count == 1).all()
    mask = np.zeros((36, 48), bool)
    fill_mask(mask, triangles[..., 0].T, triangles[..., 1].T)
    assert mask.all()


def test_near_plane_clipping_agrees_with_ray_casting():
    """Long triangles that pass beside and behind the camera, as the fingers do in the wrist camera."""
    rng = np.random.default_rng(5)
    camera = Pinhole(np.zeros(3), np.eye(3), 75, 64, 48, near_m=0.05)
    compared = 0
    for _ in range(60):
        points = rng.uniform([-0.5, -0.5, -0.6], [0.5, 0.5, 1.0], (3, 3))
        face = np.array([[0, 1, 2]])
        if np.cross(points[1] - points[0], points[2] - points[0]) @ points[0] > 0:
            face = face[:, ::-1]
        drawn, cast = picture(camera, points, face, np.zeros(3)) == 0, cast_rays(camera, points, face) == 0
        assert (drawn != cast).sum() <= 2  # pixels whose centre lies on an edge to within rounding
        compared += int(cast.any() and (points[:, 2] < 0.05).any())
    assert compared > 15


# --- pictures of the scene -------------------------------------------------------------------------------------------------------------------


def is_red(image: np.ndarray) -> np.ndarray:
    image = image.astype(int)
    return (image[..., 0] > 90) & (image[..., 0] > 2 * image[..., 1]) & (image[..., 0] > 2 * image[..., 2])


def test_pictures_and_motion_repeat_exactly():
    def play(simulation: Simulation) -> Simulation:
        simulation.set_targets(HOME_DEG + [10, 10, -10, 5, 20, 30])
        for _ in range(5):
            simulation.advance(1 / 30)
            simulation.render("wrist", 32, 24)  # looking changes nothing
        return simulation

    first, second, other = (play(Simulation("place", seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.joints_deg, second.joints_deg)
    for view in ("front", "wrist"):
        np.testing.assert_array_equal(first.render(view, 160, 120), second.render(view, 160, 120))
        assert (first.render(view, 160, 120) != other.render(view, 160, 120)).any()
    first.reset(4)
    np.testing.assert_array_equal(play(first).render("front", 160, 120), other.render("front", 160, 120))  # nothing is left of the last episode


def test_the_front_camera_sees_the_block_where_it_lies():
    simulation = Simulation("reach", 1)
    image = simulation.render("front", 640, 480)
    assert image.shape == (480, 640, 3)
    assert image.dtype == np.uint8
    camera = simulation.camera("front", 640, 480)
    np.testing.assert_allclose(camera.position, FRONT_CAMERA[0])
    x, y, z = camera.to_camera(simulation.block_m)
    v, u = np.nonzero(is_red(image))
    np.testing.assert_allclose([u.mean(), v.mean()], [x / z * camera.focal_px + 320, y / z * camera.focal_px + 240], atol=4)


def test_pictures_that_cannot_be_drawn_are_refused_and_smoothed_ones_keep_size_and_mean():
    simulation = Simulation("place", 0)
    for arguments in ({"view": "top"}, {"width": 0}, {"height": 100_000}, {"samples": 0}):
        with pytest.raises(ConfigError):
            simulation.render(**arguments)
    plain, smooth = simulation.render("front", 160, 120), simulation.render("front", 160, 120, samples=2)
    assert smooth.shape == plain.shape
    assert abs(smooth.mean() - plain.mean()) < 1


def test_needs_neither_opencv_nor_opengl_and_imports_lazily():
    code = """
import sys
sys.modules.update(dict.fromkeys(("cv2", "OpenGL", "glfw")))
import gr00t_fast.virtual.sim.simulation as package
assert "mujoco" not in sys.modules
assert package.Simulation("place", 0).render("front", 64, 48).std() > 5
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- physics ---------------------------------------------------------------------------------------------------------------------------------


def test_targets_are_reached_and_clamped_to_the_limits():
    simulation = Simulation("reach", 0)
    simulation.set_targets(np.array([500, -20, 20, 75, 500, 500]))
    np.testing.assert_allclose(simulation.targets_deg, [110, -20, 20, 75, 160, 100], atol=1e-9)
    simulation.advance(3)
    np.testing.assert_allclose(simulation.joints_deg, [110, -20, 20, 75, 160, 100], atol=1.5)
    for bad in ([0] * 5, [0, 0, 0, 0, 0, np.nan]):
        with pytest.raises(ConfigError, match="six finite numbers"):
            simulation.set_targets(np.array(bad))


@pytest.mark.parametrize("task", ["reach", "place"])
def test_expert_solves_the_scene(task):
    simulation = Simulation(task, 0)
    for seed in range(8):
        simulation.reset(seed)
        for targets in expert(simulation):
            simulation.set_targets(targets)
            simulation.advance(TICK_S)
            if simulation.success:
                break
        assert simulation.success, f"seed {seed}"
        assert simulation.time_s < 6.01


def test_joints_trail_their_targets_by_the_lag_that_was_asked_for():
    """The delay at which measured and commanded joints agree best, as it is measured on recordings; but to a step of the physics."""
    lag_ms, step_s = 200.0, 0.004
    simulation = Simulation("reach", 0, servo_lag_ms=lag_ms)
    middle, times_s = np.array([0, -30, 20, 50, -60, 50.0]), np.arange(0, 8, step_s)
    targets, measured = middle + 25 * np.sin(2 * np.pi * 0.25 * times_s)[:, None], []
    simulation.place_arm(middle)
    for row in targets:
        simulation.set_targets(row)
        simulation.advance(step_s)
        measured.append(simulation.joints_deg)
    began = 500  # a period without the start from rest
    centred = np.array(measured[began:]) - np.mean(measured[began:], 0)  # gravity pulls each joint a little off
    correlation = []
    for shift in range(100):
        commanded = targets[began - shift : len(targets) - shift]
        commanded = commanded - commanded.mean(0)
        correlation.append((centred * commanded).sum(0) / np.linalg.norm(commanded, axis=0))
    np.testing.assert_allclose(np.argmax(correlation, 0) * step_s * 1e3, lag_ms, atol=4.5)


def test_a_lagging_servo_that_comes_on_holds_where_it_is():
    simulation = Simulation("reach", 0, servo_lag_ms=200.0)
    simulation.set_targets(HOME_DEG + [30, 0, 0, 0, 0, 0])
    simulation.advance(0.1)
    simulation.set_torque(False)
    simulation.place_arm(HOME_DEG)
    simulation.set_torque(True)
    simulation.advance(0.5)
    np.testing.assert_allclose(simulation.joints_deg, HOME_DEG, atol=1)
    simulation.reset(0)
    simulation.advance(0.5)
    np.testing.assert_allclose(simulation.joints_deg, HOME_DEG, atol=1)
    for wrong in (50.0, 5000.0):
        with pytest.raises(ConfigError, match="lag"):
            SimArm(SO100SimConfig(cameras={}, servo_lag_ms=wrong)).connect()


def test_success_needs_the_task_done():
    reach, place = Simulation("reach", 0), Simulation("place", 0)
    for simulation in (reach, place):
        simulation.advance(1)
        assert not simulation.success
    for targets in expert(place):
        place.set_targets(targets)
        place.advance(1 / 30)
        assert not (place.success and not place.block_in_bowl)
        if place.block_in_bowl and not place.block_released:
            assert not place.success  # still between the fingers
    assert place.success


# --- robot -----------------------------------------------------------------------------------------------------------------------------------

SMALL = {"front": SimCameraConfig(width=64, height=48), "hand": SimCameraConfig(width=48, height=48, view="wrist")}


def test_sim_arm_is_a_robot_on_a_virtual_clock():
    clock = FakeClock()
    arm = SimArm(SO100SimConfig(cameras=SMALL), clock)
    for early in (arm.observe, arm.reset):
        with pytest.raises(RobotError, match="connect"):
            early()
    arm.connect()
    assert isinstance(arm, Robot)
    np.testing.assert_array_equal(arm.joint_limits, LIMITS_DEG)
    arm.reset(seed=2)
    seen = arm.observe()
    assert {name: frame.shape for name, frame in seen.frames.items()} == {"front": (48, 64, 3), "hand": (48, 48, 3)}
    assert (arm.cameras["hand"].width, arm.cameras["hand"].fps) == (48, 30.0)
    np.testing.assert_allclose(seen.joints, HOME_DEG, atol=1e-6)
    arm.send(HOME_DEG + [20, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(arm.observe().joints, seen.joints)  # no time, no motion
    clock.advance(1.0)
    moved = arm.observe(with_frames=False)
    assert moved.frames == {}
    assert moved.time_s == clock.now_s()
    assert abs(moved.joints[0] - 20) < 1
    with pytest.raises(RobotError, match="six finite"):
        arm.send(np.full(6, np.nan))
    report = arm.land()
    assert report.safe
    assert report.torque == dict.fromkeys(SO100_JOINTS, "off")
    assert arm.land() is report
    for call in (arm.observe, arm.reset, lambda: arm.send(HOME_DEG)):
        with pytest.raises(RobotError, match="connect"):
            call()
    arm.connect()  # and once more
    assert arm.observe().joints.shape == (6,)
    arm.land()


def test_sim_arm_in_driver_units_holds_when_told_to():
    clock = FakeClock()
    arm = SimArm(SO100SimConfig(cameras={}, use_degrees=False, disable_torque_on_disconnect=False), clock)
    arm.connect()
    np.testing.assert_array_equal(arm.joint_limits, [[-100, 100]] * 5 + [[0, 100]])
    arm.send(np.array([50, -20, 20, 79, -56, 100.0]))
    clock.advance(2.0)
    np.testing.assert_allclose(arm.observe().joints, [50, -20, 20, 79, -56, 100], atol=1.5)
    assert abs(arm.simulation.joints_deg[0] - 55) < 1
    assert set(arm.land().torque.values()) == {"held"}


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="'place'"):
        sample_layout("plaec", 0)
    for camera, named in ((OpenCVCameraConfig(), "type: sim"), (SimCameraConfig(view="top"), "front, wrist")):
        with pytest.raises(ConfigError, match=named):
            SimArm(SO100SimConfig(cameras={"front": camera}))


# --- program ---------------------------------------------------------------------------------------------------------------------------------


def test_program_writes_files_keeps_earlier_ones_and_explains_an_unwritable_directory(tmp_path, capsys):
    pytest.importorskip("imageio")
    words = [f"--out={tmp_path / 'new'}", "--task=reach", "--height=48", "--video_format=gif", "--xml"]
    assert program.main(words) == 0
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"reach_0.gif", "reach_0.png", "reach_0.xml"}
    assert "solved after" in capsys.readouterr().out
    for flags, code, said in (
        (words, 2, "--overwrite"),
        ([*words, "--overwrite"], 0, ""),
        ([*words, f"--out={tmp_path / 'new/reach_0.png/x'}"], 2, "cannot be"),
    ):
        assert program.main(flags) == code
        assert said in capsys.readouterr().err


def test_a_carried_block_stays_where_objects_may_lie_and_keeps_its_speed():
    simulation, places = Simulation("reach", 4, 0.2), []
    simulation.watch = lambda: places.append(simulation.block_m)
    simulation.advance(8.0)
    offset = np.array(places)[:, :2] - PAN_AXIS_XY_M
    assert np.ptp(np.linalg.norm(offset, axis=1)) < 1e-6
    angles = np.arctan2(offset[:, 0], -offset[:, 1])
    assert np.abs(angles).max() <= np.deg2rad(55) + 1e-6
    assert np.ptp(angles) > np.deg2rad(100)  # it turned round at both edges
    moved = np.linalg.norm(np.diff(offset, axis=0), axis=1)
    assert np.median(moved) == pytest.approx(0.2 * TICK_S, rel=0.13)  # ticks fall on whole steps of 4 ms
    still = Simulation("reach", 4)
    assert still.block_m[:2] == pytest.approx(Simulation("reach", 4, 0.2).block_m[:2])
    with pytest.raises(ConfigError, match="speed"):
        Simulation("place", 4, 0.2)
