"""Pictures of the scene in numpy: a z-buffer rasteriser, the renderer that draws table, shadows and arm with it, and video files. No OpenGL.

The table is a plane worked out per pixel, with soft shadows on it; everything else goes through the rasteriser, without a loop over triangles: each
triangle becomes spans (one per pixel row), all spans become one long list of fragments, and a single `maximum.at` on the key (inverse depth, face
number) leaves the nearest face per pixel: a visibility buffer. Colours are worked out only for what is seen. The same picture on every platform.
Camera frame: x right, y down, z forward, pixel centres at half-integers.

Axis alphabet: V vertices, F faces, S spans, P fragments, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gr00t_fast.base.errors import ConfigError, require
from gr00t_fast.virtual.sim.appearance import gather, scene_parts, shade_table, wood

# --- rasteriser ---------------------------------------------------------------------------------------------------------------------------------

_FACE_BITS = 16  # low bits of a key hold face number + 1; 0 is the background
_FACE_MASK = (1 << _FACE_BITS) - 1
_DEPTH_SCALE = float(1 << 50)  # inverse depths up to 1 / _NEAREST_M stay below 2**63; the low bits given up are far below rounding
_NEAREST_M = 1e-3
MAX_FACES = _FACE_MASK // 2  # near-plane clipping may double them
_LEAST_AREA_PX = 1e-9  # thinner triangles cover no pixel centre and have no plane


@dataclass(frozen=True)
class Pinhole:
    """An ideal camera. position (3,); axes (3,3) with columns right, down, forward, in world coordinates."""

    position: np.ndarray
    axes: np.ndarray
    fovy_deg: float
    width: int
    height: int
    near_m: float = 0.01

    @property
    def focal_px(self) -> float:
        """Focal length in pixels; pixels are square."""
        return self.height / 2 / np.tan(np.deg2rad(self.fovy_deg) / 2)

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        """World points (V,3) -> camera frame (V,3)."""
        return (points - self.position) @ self.axes


@dataclass(frozen=True)
class Fragments:
    """What is visible: pixel numbers (P,) in row-major order, the face seen there (P,), and the vertex value interpolated there (P,)."""

    pixel: np.ndarray
    face: np.ndarray
    value: np.ndarray


def render_faces(camera: Pinhole, points: np.ndarray, faces: np.ndarray, values: np.ndarray, behind: np.ndarray | None = None) -> Fragments:
    """The visible parts of a mesh of closed surfaces.

    points (V,3) world; faces (F,3), anticlockwise from outside, at most MAX_FACES; values (V,) float, interpolated linearly over each face.
    behind: inverse depth (H,W) or (H,1) of a background that also hides faces, e.g. the table; None: nothing.
    """
    if len(faces) > MAX_FACES:
        raise ConfigError(f"a mesh may have at most {MAX_FACES} faces, but this one has {len(faces)}. Draw it in parts or coarser.")
    corners, face_of = _clip_near(np.vstack([camera.to_camera(points).T, values]), faces, camera.near_m)
    inverse_z = 1.0 / corners[2]
    x = corners[0] * inverse_z * camera.focal_px + camera.width / 2
    y = corners[1] * inverse_z * camera.focal_px + camera.height / 2
    keep = np.flatnonzero(_on_screen(x, y, camera.width, camera.height) & (_area(x, y) > _LEAST_AREA_PX))  # else turned away
    x, y, inverse_z, shown = x[:, keep], y[:, keep], inverse_z[:, keep], corners[3][:, keep]
    row, first, last, triangle = spans(x, y, camera.width, camera.height)
    keys = _start_keys(behind, camera.height, camera.width)
    _draw(keys, row, first, last, triangle, _planes(x, y, inverse_z), camera.width)
    return _resolve(keys, _planes(x, y, shown), face_of[keep], camera.width)


def fill_mask(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Set True in mask (H,W) wherever a triangle with corners x, y (3,F), in pixels and clockwise (y down), covers a pixel centre."""
    height, width = mask.shape
    keep = np.flatnonzero(_on_screen(x, y, width, height) & (_area(x, y) > _LEAST_AREA_PX))
    row, first, last, _ = spans(x[:, keep], y[:, keep], width, height)
    mask.reshape(-1)[_expand(row * width + first, last - first)[0]] = True


def spans(x: np.ndarray, y: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Triangles with corners x, y (3,F), clockwise (y down) -> row, first and last (exclusive) column, triangle: (S,) int64 each.

    A pixel belongs to a triangle when its centre does. Two triangles that share an edge compute the very same crossing for it, because every
    term of the edge equation changes sign exactly when the edge is walked the other way: no gaps, no pixel twice.
    """
    top = np.ceil(np.clip(y.min(0), 0, height) - 0.5).astype(np.int64).clip(0)
    bottom = np.ceil(np.clip(y.max(0), 0, height) - 0.5).astype(np.int64).clip(0)
    row, triangle = _expand(top, bottom - top)
    x_next, y_next = x[[1, 2, 0]], y[[1, 2, 0]]
    a, b, c = y - y_next, x_next - x, x * y_next - x_next * y  # (3,F); inside where a * px + b * py + c >= 0
    left, right = np.full(len(row), -1.0), np.full(len(row), float(width))
    centre = row + 0.5
    with np.errstate(divide="ignore", invalid="ignore"):  # level edges bound nothing
        slope, offset = -b / a, -c / a
        for edge in range(3):
            crossing = slope[edge].take(triangle) * centre + offset[edge].take(triangle)
            side = a[edge].take(triangle)
            left = np.where(side > 0, np.maximum(left, crossing), left)
            right = np.where(side < 0, np.minimum(right, crossing), right)
    first = np.ceil(np.minimum(left, width) - 0.5).astype(np.int64).clip(0)
    last = np.ceil(np.maximum(right, -1) - 0.5).astype(np.int64).clip(0)
    seen = np.flatnonzero(last > first)
    return row[seen], first[seen], last[seen], triangle[seen]


def _expand(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the ranges start..start+length; also says which range each element came from."""
    length = np.maximum(length, 0)
    source = np.repeat(np.arange(len(start)), length)
    begun = np.cumsum(length) - length
    return np.arange(len(source)) + (start - begun)[source], source


def _clip_near(vertices: np.ndarray, faces: np.ndarray, near: float) -> tuple[np.ndarray, np.ndarray]:
    """What lies in front of the near plane. vertices (4,V): x, y, z, value -> corners (4,3,F'), clockwise, and the face each came from (F',)."""
    corner = faces.T[::-1]  # (3,F), reversed: clockwise is what `spans` expects
    in_front = (vertices[2] > near).take(corner).sum(0)
    whole, cut = np.flatnonzero(in_front == 3), np.flatnonzero((in_front == 1) | (in_front == 2))
    corners = vertices[:, corner[:, whole]]
    if not len(cut):
        return corners, whole
    pieces, source = _cut(vertices[:, corner[:, cut]], near)
    return np.concatenate([corners, pieces], 2), np.concatenate([whole, cut[source]])


def _cut(corners: np.ndarray, near: float) -> tuple[np.ndarray, np.ndarray]:
    """Triangles (4,3,F) that cross the near plane -> their parts in front (4,3,F') and which triangle each came from (F',)."""
    in_front = corners[2] > near  # (3,F)
    alone = np.argmax(in_front == (in_front.sum(0) == 1), 0)  # the corner that has its side of the plane for itself
    a, b, c = (np.take_along_axis(corners, np.broadcast_to((alone + i) % 3, (4, 1, len(alone))), 1)[:, 0] for i in range(3))
    to_b, to_c = a + (b - a) * ((near - a[2]) / (b[2] - a[2])), a + (c - a) * ((near - a[2]) / (c[2] - a[2]))
    tip = np.flatnonzero(a[2] > near)
    stump = np.flatnonzero(a[2] <= near)
    pieces = [(a, to_b, to_c, tip), (to_b, b, c, stump), (to_b, c, to_c, stump)]
    corners = np.concatenate([np.stack([p[:, chosen], q[:, chosen], r[:, chosen]], 1) for p, q, r, chosen in pieces], 2)
    return corners, np.concatenate([tip, stump, stump])


def _area(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Twice the area (F,) of triangles (3,F), positive when clockwise with y down."""
    return (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])


def _on_screen(x: np.ndarray, y: np.ndarray, width: int, height: int) -> np.ndarray:
    """Triangles whose bounding box touches the picture."""
    return (x.max(0) > 0) & (x.min(0) < width) & (y.max(0) > 0) & (y.min(0) < height)


def _planes(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """(3,F) coefficients p, q, r of the plane p * x + q * y + r through the corners (3,F)."""
    dx1, dx2, dy1, dy2 = x[1] - x[0], x[2] - x[0], y[1] - y[0], y[2] - y[0]
    dz1, dz2 = z[1] - z[0], z[2] - z[0]
    area = dx1 * dy2 - dx2 * dy1
    p, q = (dz1 * dy2 - dz2 * dy1) / area, (dx1 * dz2 - dx2 * dz1) / area
    return np.stack([p, q, z[0] - p * x[0] - q * y[0]])


def _start_keys(behind: np.ndarray | None, height: int, width: int) -> np.ndarray:
    if behind is None:
        return np.zeros(height * width, np.int64)
    keys = (np.clip(behind, 0, 1 / _NEAREST_M) * _DEPTH_SCALE).astype(np.int64) & ~_FACE_MASK
    return np.ascontiguousarray(np.broadcast_to(keys, (height, width))).reshape(-1).copy()


def _draw(keys: np.ndarray, row: np.ndarray, first: np.ndarray, last: np.ndarray, triangle: np.ndarray, plane: np.ndarray, width: int) -> None:
    """Enter every fragment into the visibility buffer `keys` (H*W,)."""
    length = last - first
    begun = np.cumsum(length) - length
    p, q, r = plane[:, triangle]  # (S,) each
    at_start = p * (first + 0.5) + q * (row + 0.5) + r
    index = np.arange(int(length.sum()))
    pixel = index + np.repeat(row * width + first - begun, length)
    inverse_z = np.repeat(p, length) * index + np.repeat(at_start - p * begun, length)
    np.clip(inverse_z, 0, 1 / _NEAREST_M, out=inverse_z)  # the plane may overshoot by rounding at grazing faces
    key = (inverse_z * _DEPTH_SCALE).astype(np.int64)
    key &= ~_FACE_MASK
    key |= np.repeat(triangle + 1, length)
    np.maximum.at(keys, pixel, key)


def _resolve(keys: np.ndarray, plane: np.ndarray, face_of: np.ndarray, width: int) -> Fragments:
    """Read the visibility buffer: which face each covered pixel shows, and the value there."""
    winner = keys & _FACE_MASK
    pixel = np.flatnonzero(winner)
    triangle = winner[pixel] - 1
    row = pixel // width
    column = pixel - row * width
    p, q, r = plane
    value = p.take(triangle) * column + q.take(triangle) * row + (r + 0.5 * (p + q)).take(triangle)  # at the centres of pixels
    return Fragments(pixel, face_of[triangle], value)


# --- scene --------------------------------------------------------------------------------------------------------------------------------------

_LEVELS = 192  # of brightness per material
_FULL_LIGHT = 1.2  # brightness of the last level; above 1 is gloss
_LIGHT = np.array([-0.42, -0.38, 0.82]) / np.linalg.norm([-0.42, -0.38, 0.82])  # towards the lamp: front left, above
_AMBIENT, _SKY_LIGHT, _DIFFUSE, _GLOSS = 0.40, 0.10, 0.58, 0.22

_TABLE_MIN_M, _TABLE_SIZE_M, _TEXELS = np.array([-0.6, -0.75]), 1.2, 1024
_BACKDROP_LEVELS = 64
_SHADOW_MIN_M, _SHADOW_CELL_M, _SHADOW_SHAPE = np.array([-0.48, -0.52]), 0.003, (256, 320)  # rows along y, columns along x
_SHADOW_DARKEST = 0.42  # light left in the middle of a shadow, out of 1


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
        self._front_ground: dict[tuple[bytes, int, int], _Ground] = {}  # the last one

    def draw(self, positions: np.ndarray, rotations: np.ndarray, camera: Pinhole, view: str, samples: int = 1) -> np.ndarray:
        """uint8 RGB (height, width, 3) of bodies at positions (bodies,3), rotations (bodies,3,3), in the model's order.

        view: the camera's name, for parts hidden from it; the table of `front` is worked out when that camera was moved.
        samples: rays per pixel along each axis; 2 smooths edges at four times the cost. Raises ConfigError.
        """
        if samples not in (1, 2, 3, 4):
            raise ConfigError(f"samples must be 1, 2, 3 or 4 per axis, but it is {samples!r}")
        fine = Pinhole(camera.position, camera.axes, camera.fovy_deg, camera.width * samples, camera.height * samples, camera.near_m)
        packed = self._draw_packed(positions[self._body_of_vertex], rotations[self._body_of_vertex], fine, view)
        image = packed.view(np.uint8).reshape(fine.height, fine.width, 4)[..., :3]
        if samples == 1:
            return np.ascontiguousarray(image)
        blocks = image.reshape(camera.height, samples, camera.width, samples, 3)
        return (blocks.sum((1, 3), dtype=np.uint16) // (samples * samples)).astype(np.uint8)

    def _draw_packed(self, positions: np.ndarray, rotations: np.ndarray, camera: Pinhole, view: str) -> np.ndarray:
        """positions (V,3), rotations (V,3,3): of each vertex' body."""
        points = np.einsum("vij,vj->vi", rotations, self._mesh.vertices) + positions
        normals = np.einsum("vij,vj->vi", rotations, self._mesh.normals)
        ground = self._ground(camera, view)
        image = _shadowed(ground, self._shadow_map(points))
        seen = np.flatnonzero(self._hidden_face != view) if view in self._hidden else slice(None)
        fragments = render_faces(camera, points, self._mesh.faces[seen], _brightness(points, normals, camera.position), ground.inverse_depth)
        level = np.clip(fragments.value * ((_LEVELS - 1) / _FULL_LIGHT), 0, _LEVELS - 1).astype(np.int64)
        image[fragments.pixel] = self._palette.take(self._material_of_face[seen][fragments.face] * _LEVELS + level)
        return image

    def _ground(self, camera: Pinhole, view: str) -> _Ground:
        place = (np.r_[camera.position, camera.axes.reshape(-1), camera.fovy_deg].tobytes(), camera.width, camera.height)
        ground = self._front_ground.get(place) if view == "front" else None
        if ground is None:
            ground = _see_ground(camera, self._ground_colours)
            if view == "front":
                self._front_ground = {place: ground}
        return ground

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
    (rows, columns), padded = cells.shape, np.pad(cells, size // 2)
    padded = sum(padded[i : i + rows] for i in range(size))
    return sum(padded[:, i : i + columns] for i in range(size))


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


# --- video --------------------------------------------------------------------------------------------------------------------------------------

FPS = 30
GIF_EVERY = 2  # a GIF of every second frame is half the size and still fluent


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """An mp4 (H.264) or GIF (half the pixels each way: it compresses badly), by the name's ending. Raises MissingExtraError."""
    imageio = require("imageio.v3", "sim")
    if path.suffix == ".gif":
        smaller = [frame.reshape(len(frame) // 2, 2, -1, 2, 3).mean((1, 3)).astype(np.uint8) for frame in frames[::GIF_EVERY]]
        imageio.imwrite(path, smaller, duration=1000 * GIF_EVERY / FPS, loop=0)
    else:
        require("imageio_ffmpeg", "sim")
        imageio.imwrite(path, frames, fps=FPS, codec="libx264", quality=8, macro_block_size=2)
