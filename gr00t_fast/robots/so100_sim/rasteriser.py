"""A z-buffer rasteriser in numpy: triangles in, the nearest one at every pixel out. No OpenGL, the same picture on every platform.

There is no loop over triangles. Each triangle becomes spans (one per pixel row), all spans become one long list of fragments, and a single
`maximum.at` on the key (inverse depth, face number) leaves the nearest face per pixel: a visibility buffer. Colours are worked out only for what
is seen. Camera frame: x right, y down, z forward, pixel centres at half-integers.

Axis alphabet: V vertices, F faces, S spans, P fragments, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gr00t_fast.errors import ConfigError

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
