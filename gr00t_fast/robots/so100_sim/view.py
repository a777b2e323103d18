"""Pictures of the scene: the table as a plane worked out per pixel, soft shadows on it, and everything else through the rasteriser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gr00t_fast.errors import ConfigError
from gr00t_fast.robots.so100_sim.appearance import gather, scene_parts, shade_table, wood
from gr00t_fast.robots.so100_sim.rasteriser import Pinhole, fill_mask, render_faces

_LEVELS = 192  # of brightness per material
_FULL_LIGHT = 1.2  # brightness of the last level; above 1 is gloss
_LIGHT = np.array([-0.42, -0.38, 0.82]) / np.linalg.norm([-0.42, -0.38, 0.82])  # towards the lamp: front left, above
_AMBIENT, _SKY_LIGHT, _DIFFUSE, _GLOSS = 0.40, 0.10, 0.58, 0.22

_TABLE_MIN_M, _TABLE_SIZE_M, _TEXELS = np.array([-0.6, -0.75]), 1.2, 1024
_BACKDROP_LEVELS = 64
_SHADOW_MIN_M, _SHADOW_CELL_M, _SHADOW_SHAPE = np.array([-0.48, -0.52]), 0.003, (256, 320)  # rows along y, columns along x
_SHADOW_DARKEST = 0.42  # light left in the middle of a shadow, out of 1


@dataclass(frozen=True)
class Pose:
    """Where every body of the model is: positions (bodies,3), rotations (bodies,3,3), in the model's order."""

    positions: np.ndarray
    rotations: np.ndarray


@dataclass(frozen=True)
class _Ground:
    """Per pixel: packed colour (P,) uint32, cell of the shadow map (P,), and inverse depth (H,W)."""

    colour: np.ndarray
    shadow_cell: np.ndarray
    inverse_depth: np.ndarray


class SceneRenderer:
    """Draws the scene with numpy alone. bodies: the model's body names in its order. Deterministic; not to be shared between threads."""

    def __init__(self, bodies: list[str], with_bowl: bool) -> None:
        parts = scene_parts(with_bowl)
        self._mesh, self._body_of_vertex, self._material_of_face = gather(parts, bodies)
        self._hidden = {part.hidden_from for part in parts if part.hidden_from}
        self._hidden_face = np.concatenate([np.full(len(part.mesh.faces), part.hidden_from or "-") for part in parts])
        self._palette = _pack(shade_table(_LEVELS)).reshape(-1)
        self._ground_colours = np.concatenate([_pack(wood(_TEXELS)).reshape(-1), _pack(_backdrop())])
        self._faces = {"": self._mesh.faces}
        self._fixed_ground: dict[tuple, _Ground] = {}

    def draw(self, pose: Pose, camera: Pinhole, view: str, fixed: bool, samples: int = 1) -> np.ndarray:
        """uint8 RGB (height, width, 3).

        view: the camera's name, for parts hidden from it. fixed: the camera never moves, so its table is worked out once.
        samples: rays per pixel along each axis; 2 smooths edges at four times the cost.
        """
        if samples not in (1, 2, 3, 4):
            raise ConfigError(f"samples must be 1, 2, 3 or 4 per axis, but it is {samples!r}")
        fine = Pinhole(camera.position, camera.axes, camera.fovy_deg, camera.width * samples, camera.height * samples, camera.near_m)
        packed = self._draw_packed(pose, fine, view, fixed)
        image = packed.view(np.uint8).reshape(fine.height, fine.width, 4)[..., :3]
        if samples == 1:
            return np.ascontiguousarray(image)
        blocks = image.reshape(camera.height, samples, camera.width, samples, 3)
        return (blocks.sum((1, 3), dtype=np.uint16) // (samples * samples)).astype(np.uint8)

    def _draw_packed(self, pose: Pose, camera: Pinhole, view: str, fixed: bool) -> np.ndarray:
        rotations = pose.rotations[self._body_of_vertex]  # (V,3,3)
        points = np.einsum("vij,vj->vi", rotations, self._mesh.vertices) + pose.positions[self._body_of_vertex]
        normals = np.einsum("vij,vj->vi", rotations, self._mesh.normals)
        ground = self._ground(camera, view if fixed else "")
        image = _shadowed(ground, self._shadow_map(points))
        seen = np.flatnonzero(self._hidden_face != view) if view in self._hidden else slice(None)
        fragments = render_faces(camera, points, self._mesh.faces[seen], _brightness(points, normals, camera.position), ground.inverse_depth)
        level = np.clip(fragments.value * ((_LEVELS - 1) / _FULL_LIGHT), 0, _LEVELS - 1).astype(np.int64)
        image[fragments.pixel] = self._palette.take(self._material_of_face[seen][fragments.face] * _LEVELS + level)
        return image

    def _ground(self, camera: Pinhole, fixed_view: str) -> _Ground:
        key = (fixed_view, camera.width, camera.height)
        if not fixed_view:
            return _see_ground(camera, self._ground_colours)
        if key not in self._fixed_ground:
            self._fixed_ground[key] = _see_ground(camera, self._ground_colours)
        return self._fixed_ground[key]

    def _shadow_map(self, points: np.ndarray) -> np.ndarray:
        """Light taken away per cell of the table, 0..255 (rows along y, columns along x), soft at the rim; the border cells are 0."""
        on_table = points[:, :2] - points[:, 2:] * (_LIGHT[:2] / _LIGHT[2])
        cells = (on_table - _SHADOW_MIN_M) / _SHADOW_CELL_M
        x, y = cells.T[:, self._mesh.faces.T]  # (3,F) each; those turned away from the lamp are anticlockwise here and left out
        mask = np.zeros(_SHADOW_SHAPE, np.bool_)
        fill_mask(mask, x, y)
        mask[:5], mask[-5:], mask[:, :5], mask[:, -5:] = False, False, False, False  # room for the blur
        soft = _box_sum(_box_sum(mask.astype(np.uint16), 5), 3)  # at most 225
        return soft.astype(np.uint8)


def _brightness(points: np.ndarray, normals: np.ndarray, eye: np.ndarray) -> np.ndarray:
    """Light at each vertex (V,): a lamp, the sky, and a little gloss towards `eye`."""
    to_eye = eye - points
    to_eye /= np.sqrt(np.einsum("vi,vi->v", to_eye, to_eye))[:, None]
    half = to_eye + _LIGHT
    half /= np.sqrt(np.einsum("vi,vi->v", half, half))[:, None]
    facing = np.maximum(normals @ _LIGHT, 0)
    gloss = np.maximum(np.einsum("vi,vi->v", normals, half), 0) ** 3
    gloss = np.square(np.square(np.square(gloss)))  # to the 24th; ** 24 takes twenty times as long
    return _AMBIENT + _SKY_LIGHT * normals[:, 2] + _DIFFUSE * facing + _GLOSS * gloss


def _see_ground(camera: Pinhole, colours: np.ndarray) -> _Ground:
    """Where each pixel's ray meets the table plane z = 0, and the colour there; beyond the table, the backdrop."""
    across = ((np.arange(camera.width) + 0.5 - camera.width / 2) / camera.focal_px).astype(np.float32)[None, :]
    down = ((np.arange(camera.height) + 0.5 - camera.height / 2) / camera.focal_px).astype(np.float32)[:, None]
    axes = camera.axes.astype(np.float32)
    ray_x, ray_y, ray_z = (axes[i, 0] * across + axes[i, 1] * down + axes[i, 2] for i in range(3))  # depth 1 along the camera's axis
    inverse_depth = np.maximum(ray_z * np.float32(-1 / max(camera.position[2], 1e-3)), 0)
    depth = 1 / np.maximum(inverse_depth, np.float32(1e-3))
    x, y = ray_x * depth + np.float32(camera.position[0]), ray_y * depth + np.float32(camera.position[1])
    texel_x, texel_y = _cells(x, _TABLE_MIN_M[0], _TEXELS / _TABLE_SIZE_M), _cells(y, _TABLE_MIN_M[1], _TEXELS / _TABLE_SIZE_M)
    on_table = (texel_x >= 0) & (texel_x < _TEXELS) & (texel_y >= 0) & (texel_y < _TEXELS) & (inverse_depth > 0)
    backdrop = _TEXELS * _TEXELS + ((np.clip(ray_z, -1, 1) + 1) * ((_BACKDROP_LEVELS - 1) / 2)).astype(np.int32)
    colour = colours.take(np.where(on_table, texel_y * _TEXELS + texel_x, backdrop).reshape(-1))
    rows, columns = _SHADOW_SHAPE
    cell_x = _cells(x, _SHADOW_MIN_M[0], 1 / _SHADOW_CELL_M).clip(0, columns - 1)
    cell_y = _cells(y, _SHADOW_MIN_M[1], 1 / _SHADOW_CELL_M).clip(0, rows - 1)
    shadow_cell = np.where(on_table, cell_y * columns + cell_x, 0)  # cell 0 is at the border, never dark
    return _Ground(colour, shadow_cell.reshape(-1), inverse_depth)


def _cells(metres: np.ndarray, origin_m: float, per_metre: float) -> np.ndarray:
    scaled = (metres - np.float32(origin_m)) * np.float32(per_metre)
    return np.floor(np.clip(scaled, -1, 1e6)).astype(np.int32)


def _shadowed(ground: _Ground, taken: np.ndarray) -> np.ndarray:
    """A copy of the ground's packed colours, darker where the shadow map says so."""
    image = ground.colour.copy()
    shade = taken.reshape(-1).take(ground.shadow_cell)
    dark = np.flatnonzero(shade)
    left = (256 * (1 - (1 - _SHADOW_DARKEST) * np.arange(226) / 225)).astype(np.uint16).take(shade[dark])
    channels = image[dark].view(np.uint8).reshape(-1, 4)
    image[dark] = ((channels * left[:, None]) >> 8).astype(np.uint8).view(np.uint32).reshape(-1)
    return image


def _box_sum(cells: np.ndarray, size: int) -> np.ndarray:
    """Sum over a size x size window around each cell; what lies outside counts as 0."""
    reach = size // 2
    for axis in (0, 1):
        padded = np.pad(cells, [(reach, reach) if axis == i else (0, 0) for i in (0, 1)])
        length = cells.shape[axis]
        cells = sum(_window(padded, i, length, axis) for i in range(size))
    return cells


def _window(cells: np.ndarray, start: int, length: int, axis: int) -> np.ndarray:
    return cells[start : start + length] if axis == 0 else cells[:, start : start + length]


def _backdrop() -> np.ndarray:
    """Colours (levels,3) from looking straight down past the table (floor) to straight up (wall)."""
    t = np.linspace(-1, 1, _BACKDROP_LEVELS)[:, None]
    wall = np.array([206.0, 212.0, 220.0]) - np.array([46.0, 42.0, 36.0]) * np.clip(t + 0.3, 0, 1)
    floor = np.array([120.0, 124.0, 132.0]) + np.array([60.0, 60.0, 60.0]) * np.clip(t + 1, 0, 1)
    return np.where(t > -0.12, wall, floor).astype(np.uint8)


def _pack(colours: np.ndarray) -> np.ndarray:
    """(...,3) uint8 -> (...) uint32 whose bytes in memory are R, G, B, 255, so that one look-up moves a whole colour."""
    opaque = np.full((*colours.shape[:-1], 1), 255, np.uint8)
    return np.concatenate([colours, opaque], -1).view(np.uint32)[..., 0]
