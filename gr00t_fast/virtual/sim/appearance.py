"""What the scene looks like: a few printed plates and dark servos per link, a wooden table, a red block and a blue bowl.

Closed triangle meshes from a few numbers (metres; faces run anticlockwise seen from outside), and the parts made of them. Only looks: contacts are in
`scene.py`. Parts are placed by hand in the frames of the links. At the home pose these are, for shoulder, upper arm and forearm: x to the side,
y up, z forward (away from the base); for gripper and jaw: -y towards the finger tips, z forward.

Axis alphabet: V vertices, F faces, N corners of an outline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gr00t_fast.virtual.sim.scene import BLOCK_HALF_M, BOWL_HEIGHT_M, BOWL_RADIUS_M

# --- meshes -------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh:
    """vertices (V,3), one unit normal per vertex (V,3), faces (F,3) of vertex numbers."""

    vertices: np.ndarray
    normals: np.ndarray
    faces: np.ndarray

    def moved(self, rotation: np.ndarray, position: np.ndarray) -> Mesh:
        """The same mesh turned by `rotation` (3,3), then shifted by `position` (3,)."""
        return Mesh(self.vertices @ rotation.T + position, self.normals @ rotation.T, self.faces)


def join(meshes: list[Mesh]) -> Mesh:
    """One mesh of several."""
    starts = np.cumsum([0, *[len(mesh.vertices) for mesh in meshes[:-1]]])
    faces = np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=True)])
    return Mesh(np.concatenate([m.vertices for m in meshes]), np.concatenate([m.normals for m in meshes]), faces)


def plate(outline: np.ndarray, half_thickness: float, bevel: float = 0.0012) -> Mesh:
    """An outline (N,2) in x, y, anticlockwise and star-shaped about its middle, given thickness along z and bevelled edges."""
    outline = np.asarray(outline, dtype=np.float64)
    inner = _inset(outline, bevel)
    top, edge = half_thickness, half_thickness - bevel
    rings = [_at(inner, -top), _at(outline, -edge), _at(outline, edge), _at(inner, top)]
    parts = [_flat_band(low, high) for low, high in zip(rings[:-1], rings[1:], strict=True)]
    return join([*parts, _cap(rings[-1], up=True), _cap(rings[0], up=False)])


def box(half_x: float, half_y: float, half_z: float, bevel: float = 0.0012) -> Mesh:
    """A box about the origin; all edges are bevelled."""
    x, y, b = half_x, half_y, bevel
    corners = [(x, b - y), (x, y - b), (x - b, y), (b - x, y), (-x, y - b), (-x, b - y), (b - x, -y), (x - b, -y)]
    return plate(np.array(corners), half_z, bevel)


def disc(radius: float, half_thickness: float, sides: int = 16) -> Mesh:
    """A cylinder about z. No bevel: there are many of them and they are small."""
    angle = 2 * np.pi * np.arange(sides) / sides
    circle = radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    low, high = _at(circle, -half_thickness), _at(circle, half_thickness)
    return join([_smooth_band(low, high), _cap(high, up=True), _cap(low, up=False)])


def lathe(profile: list[tuple[float, float]], sides: int = 28) -> Mesh:
    """A surface of revolution about z from (radius, height) points, listed from the bottom's middle outside-up, then inside-down."""
    angle = 2 * np.pi * np.arange(sides) / sides
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    rings = [_at(circle * max(radius, 1e-5), height) for radius, height in profile]
    return join([_smooth_band(low, high) for low, high in zip(rings[:-1], rings[1:], strict=True)])


def capsule_outline(a: tuple[float, float], radius_a: float, b: tuple[float, float], radius_b: float, arc: int = 6) -> np.ndarray:
    """The outline (2*arc, 2) of two circles with their tangents: the side view of a printed link between two joints."""
    start, end = np.array(a), np.array(b)
    heading = np.arctan2(*(end - start)[::-1])
    tilt = np.arcsin(np.clip((radius_a - radius_b) / np.linalg.norm(end - start), -0.99, 0.99))
    around_b = heading + np.linspace(-np.pi / 2 + tilt, np.pi / 2 - tilt, arc)
    around_a = heading + np.linspace(np.pi / 2 - tilt, 3 * np.pi / 2 + tilt, arc)
    circle = [np.stack([np.cos(t), np.sin(t)], 1) for t in (around_b, around_a)]
    return np.concatenate([end + radius_b * circle[0], start + radius_a * circle[1]])


def _at(outline: np.ndarray, height: float) -> np.ndarray:
    return np.column_stack([outline, np.full(len(outline), height)])


def _inset(outline: np.ndarray, distance: float) -> np.ndarray:
    """The outline moved inwards; a little more than exact at sharp corners, which is where a bevel should be larger."""
    edge = np.roll(outline, -1, 0) - outline
    normal = np.column_stack([edge[:, 1], -edge[:, 0]]) / np.linalg.norm(edge, axis=1, keepdims=True)
    corner = normal + np.roll(normal, 1, 0)
    return outline - distance * corner / np.linalg.norm(corner, axis=1, keepdims=True)


def _flat_band(low: np.ndarray, high: np.ndarray) -> Mesh:
    """Quads between two rings, each with its own normal."""
    quads = np.stack([low, np.roll(low, -1, 0), np.roll(high, -1, 0), high], 1)  # (N,4,3)
    normal = _unit(np.cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1]))
    first = 4 * np.arange(len(low))[:, None]  # type: ignore[var-annotated]
    faces = np.concatenate([first + [0, 1, 2], first + [0, 2, 3]])
    return Mesh(quads.reshape(-1, 3), np.repeat(normal, 4, 0), faces)


def _smooth_band(low: np.ndarray, high: np.ndarray) -> Mesh:
    """Quads between two rings whose normals turn with the rings."""
    count = len(low)
    around = np.roll(low + high, -1, 0) - np.roll(low + high, 1, 0)
    normal = _unit(np.cross(around, high - low))
    here, after = np.arange(count)[:, None], np.roll(np.arange(count), -1)[:, None]
    faces = np.concatenate([np.hstack([here, after, after + count]), np.hstack([here, after + count, here + count])])
    return Mesh(np.concatenate([low, high]), np.concatenate([normal, normal]), faces)


def _cap(ring: np.ndarray, up: bool) -> Mesh:
    """A fan that closes a ring."""
    count = len(ring)
    here, after = np.arange(count)[:, None], np.roll(np.arange(count), -1)[:, None]
    middle = np.full((count, 1), count)
    faces = np.hstack([middle, here, after]) if up else np.hstack([middle, after, here])
    vertices = np.concatenate([ring, ring.mean(0, keepdims=True)])
    return Mesh(vertices, np.tile([0.0, 0.0, 1.0 if up else -1.0], (count + 1, 1)), faces)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# --- parts --------------------------------------------------------------------------------------------------------------------------------------

# sRGB. The print is a warm white, so that the lit side does not saturate.
MATERIALS: dict[str, tuple[int, int, int]] = {
    "print": (226, 224, 216),
    "servo": (46, 48, 54),
    "metal": (150, 152, 158),
    "board": (40, 92, 66),
    "rubber": (70, 72, 78),
    "block": (206, 44, 34),
    "bowl": (46, 104, 176),
}

ALONG_X = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])  # outline x, y, thickness z -> link y, z, x
ALONG_Y = np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])  # -> link z, x, y
ALONG_Z = np.eye(3)

_SERVO_LONG, _SERVO_SHORT, _SERVO_DEPTH = 0.0226, 0.0124, 0.0175  # half sizes of an STS3215, depth along its shaft


@dataclass(frozen=True)
class Part:
    """One mesh in the frame of a body of the model."""

    body: str
    material: str
    mesh: Mesh
    hidden_from: str = ""  # a camera that does not see it, because it sits inside


def _part(body: str, material: str, mesh: Mesh, at: tuple[float, float, float], turn: np.ndarray = ALONG_Z, **options: str) -> Part:
    return Part(body, material, mesh.moved(turn, np.array(at)), **options)


def _outline_mm(corners: str) -> np.ndarray:
    """`x y, x y, ...` in millimetres -> (N, 2) in metres."""
    return np.array([[float(f"{number}e-3") for number in corner.split()] for corner in corners.split(",")])


def _side_plates(body: str, outline: np.ndarray, x_m: float, thickness_m: float = 0.004) -> list[Part]:
    """The same plate on both sides of a link; the outline is in the link's (y, z)."""
    plates = plate(outline, thickness_m / 2)
    return [_part(body, "print", plates, (side * x_m, 0, 0), ALONG_X) for side in (-1, 1)]


def _horns(body: str, y: float, z: float, x_m: float) -> list[Part]:
    """The round metal ends of a joint's shaft."""
    return [_part(body, "metal", disc(0.0095, 0.0015), (side * x_m, y, z), ALONG_X) for side in (-1, 1)]


def _base() -> list[Part]:
    foot = _outline_mm("-50 -60, -36 -88, 36 -88, 50 -60, 50 30, 38 45, -38 45, -50 30")
    tower = _outline_mm("-30 -66, -20 -76, 20 -76, 30 -66, 30 -18, 24 -10, -24 -10, -30 -18")
    screws = [_part("base", "metal", disc(0.004, 0.001, 8), (x, y, 0.0135)) for x in (-0.038, 0.038) for y in (-0.062, 0.03)]
    return [
        _part("base", "print", plate(foot, 0.0065, 0.002), (0, 0, 0.0065)),
        _part("base", "print", plate(tower, 0.0185, 0.002), (0, 0, 0.0295)),
        _part("base", "servo", box(0.0124, 0.006, 0.014), (0, -0.0745, 0.03)),
        _part("base", "board", box(0.021, 0.014, 0.002), (0, 0.018, 0.016)),
        _part("base", "servo", box(0.012, 0.006, 0.004), (0, 0.014, 0.0215)),
        *screws,
    ]


def _shoulder() -> list[Part]:
    cheek = _outline_mm("43.5 -18, 43.5 36, 60 46, 100 47, 116 38, 117 22, 100 12, 70 -10")
    return [
        _part("shoulder", "metal", disc(0.024, 0.003, 24), (0, 0.0345, 0), ALONG_Y),
        _part("shoulder", "print", box(0.0265, 0.003, 0.028, 0.0015), (0, 0.041, 0.010)),
        *[_part("shoulder", "print", plate(cheek, 0.002), (side * 0.0205, 0, 0), ALONG_X) for side in (-1, 1)],
        _part("shoulder", "servo", box(_SERVO_DEPTH, _SERVO_LONG, _SERVO_SHORT), (0, 0.0905, 0.0306)),
    ]


def _upper_arm() -> list[Part]:
    link = capsule_outline((0.0, 0.0), 0.0165, (0.11257, 0.028), 0.0155)
    return [
        *_side_plates("upper_arm", link, 0.0255),
        *_horns("upper_arm", 0.0, 0.0, 0.0285),
        *_horns("upper_arm", 0.11257, 0.028, 0.0285),
        _part("upper_arm", "print", box(0.0255, 0.017, 0.002), (0, 0.055, 0.0005)),
        _part("upper_arm", "servo", box(_SERVO_DEPTH, _SERVO_LONG, _SERVO_SHORT), (0, 0.0995, 0.0268)),
    ]


def _lower_arm() -> list[Part]:
    link = capsule_outline((0.0, 0.0), 0.0145, (0.0052, 0.1349), 0.0135)
    return [
        *_side_plates("lower_arm", link, 0.0205),
        *_horns("lower_arm", 0.0052, 0.1349, 0.0275),
        _part("lower_arm", "print", box(0.0205, 0.002, 0.028), (0, 0.0145, 0.062)),
        _part("lower_arm", "servo", box(_SERVO_DEPTH, _SERVO_SHORT, _SERVO_LONG), (0, 0.0048, 0.1222)),
        _part("lower_arm", "servo", box(0.009, 0.0026, 0.016), (0, 0.0185, 0.062)),
    ]


def _wrist() -> list[Part]:
    cheek = capsule_outline((0.0, 0.0), 0.0125, (-0.030, 0.0), 0.0125)
    return [
        *_side_plates("wrist", cheek, 0.0245),
        _part("wrist", "print", box(0.0265, 0.0025, 0.0165), (0, -0.0215, 0)),
        _part("wrist", "servo", box(_SERVO_LONG, _SERVO_DEPTH - 0.001, _SERVO_SHORT), (-0.004, -0.0395, 0)),
        _part("wrist", "metal", disc(0.0105, 0.0025), (0, -0.0575, 0), ALONG_Y),
    ]


def _gripper() -> list[Part]:
    finger = _outline_mm("7.9 -107.5, 12.5 -108.5, 18.5 -98, 27.5 -70, 31.5 -42, 31 -12, 16 -12, 15.3 -46, 13.3 -66, 9.8 -94")
    camera_arm = _outline_mm("0 12, 0 52, 6 66, 0 66, -6 56, -6 12")
    return [
        _part("gripper_body", "print", box(0.029, 0.0055, 0.0205, 0.002), (0.0015, -0.0055, 0)),
        _part("gripper_body", "print", plate(finger, 0.0105, 0.0018), (0, 0, 0)),
        _part("gripper_body", "servo", box(_SERVO_LONG, _SERVO_SHORT, _SERVO_DEPTH), (-0.0085, -0.0236, 0)),
        _part("gripper_body", "rubber", box(0.0011, 0.0265, 0.0062, 0.0005), (0.0119, -0.0775, 0), _tilt_z(-0.115)),
        _part("gripper_body", "print", plate(camera_arm, 0.009), (0, 0, 0), ALONG_X, hidden_from="wrist"),
        _part("gripper_body", "servo", box(0.013, 0.006, 0.009), (0, 0.004, 0.073), hidden_from="wrist"),
        _part("gripper_body", "metal", disc(0.0055, 0.003), (0, -0.004, 0.073), ALONG_Y, hidden_from="wrist"),
    ]


def _jaw() -> list[Part]:
    finger = _outline_mm("-12.3 -83, -6 -83, 4 -62, 9.5 -36, 11.5 -4, 7 9.5, -7 9.5, -10.5 -4, -8.3 -28, -8.3 -56")
    return [
        _part("moving_jaw", "print", plate(finger, 0.0095, 0.0018), (0, 0, 0)),
        *[
            _part("moving_jaw", "print", plate(capsule_outline((0, 0), 0.0105, (0, -0.020), 0.0085), 0.002), (0, 0, side * 0.0205))
            for side in (-1, 1)
        ],
        *[_part("moving_jaw", "metal", disc(0.007, 0.001), (0, 0, side * 0.0232)) for side in (-1, 1)],
        _part("moving_jaw", "rubber", box(0.0011, 0.0255, 0.0062, 0.0005), (-0.0095, -0.0555, 0), _tilt_z(-0.07)),
    ]


def _tilt_z(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def _bowl() -> list[Part]:
    rim, height = BOWL_RADIUS_M + 0.003, BOWL_HEIGHT_M + 0.001
    outside = [(0.0, 0.0), (rim - 0.012, 0.0), (rim - 0.006, 0.008), (rim - 0.002, 0.022), (rim, height - 0.001)]
    inside = [(rim - 0.001, height), (rim - 0.003, height), (rim - 0.005, 0.022), (rim - 0.010, 0.008), (rim - 0.016, 0.005), (0.0, 0.0045)]
    return [_part("bowl", "bowl", lathe(outside + inside), (0, 0, 0))]


def scene_parts(with_bowl: bool) -> list[Part]:
    """Every visible part except the table."""
    arm = [*_base(), *_shoulder(), *_upper_arm(), *_lower_arm(), *_wrist(), *_gripper(), *_jaw()]
    block = _part("block", "block", box(BLOCK_HALF_M, BLOCK_HALF_M, BLOCK_HALF_M), (0, 0, 0))
    return [*arm, block, *(_bowl() if with_bowl else [])]


def gather(parts: list[Part], bodies: list[str]) -> tuple[Mesh, np.ndarray, np.ndarray]:
    """All parts as one mesh, with the body index of each vertex (V,) and the material index of each face (F,)."""
    materials = list(MATERIALS)
    body_of_vertex = np.concatenate([np.full(len(part.mesh.vertices), bodies.index(part.body)) for part in parts])
    material_of_face = np.concatenate([np.full(len(part.mesh.faces), materials.index(part.material)) for part in parts])
    return join([part.mesh for part in parts]), body_of_vertex, material_of_face


def shade_table(levels: int) -> np.ndarray:
    """Colours (materials, levels, 3) uint8 from unlit to highlight: shadows turn cool, the last sixth goes to white as gloss does."""
    light = np.linspace(0, 1.2, levels)[None, :, None]
    colour = np.array(list(MATERIALS.values()), dtype=np.float64)[:, None, :]
    cool = np.array([0.90, 0.96, 1.10])
    tint = cool + (1 - cool) * np.clip(light, 0, 1)
    lit = colour * np.clip(light, 0, 1) * tint
    gloss = np.clip(light - 1.0, 0, 1) * 2.2
    return np.clip(lit + (255 - lit) * gloss, 0, 255).astype(np.uint8)


def wood(size: int = 1024) -> np.ndarray:
    """A table top of planks, (size, size, 3) uint8; the same grain each time. Rows run along y, columns along x."""
    rng = np.random.default_rng(7)
    planks = 7
    x = np.linspace(0, planks, size, endpoint=False)
    plank = x.astype(int)
    grain = _noise(rng, size, 48, 6) * 0.6 + _noise(rng, size, 200, 10) * 0.4  # stretched along y
    shift = rng.uniform(0, 6, planks)
    rings = np.sin(2 * np.pi * (3.0 * (x - plank) + shift[plank])[None, :] + 7.0 * grain)
    tone = 0.035 * rings + 0.05 * grain + rng.uniform(-0.045, 0.045, planks)[plank][None, :]
    gap = np.minimum(x - plank, 1 - (x - plank)) < 0.006
    tone = tone - 0.16 * gap[None, :]
    base = np.array([176.0, 137.0, 98.0])
    colour = base * (1 + tone[..., None] * np.array([1.0, 1.1, 1.25]))
    return np.clip(colour, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, size: int, across: int, along: int) -> np.ndarray:
    """Smooth noise (size, size) in about -1..1: `across` cells in x, `along` cells in y, linearly interpolated."""
    cells = rng.uniform(-1, 1, (along + 1, across + 1))
    y, x = np.linspace(0, along, size, endpoint=False), np.linspace(0, across, size, endpoint=False)
    j, i = y.astype(int), x.astype(int)
    v, u = (y - j)[:, None], (x - i)[None, :]
    v, u = v * v * (3 - 2 * v), u * u * (3 - 2 * u)
    top = cells[np.ix_(j, i)] * (1 - u) + cells[np.ix_(j, i + 1)] * u
    bottom = cells[np.ix_(j + 1, i)] * (1 - u) + cells[np.ix_(j + 1, i + 1)] * u
    return top * (1 - v) + bottom * v
