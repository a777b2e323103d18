"""Closed triangle meshes from a few numbers: bevelled plates, discs, boxes and bowls. Metres; faces run anticlockwise seen from outside.

Axis alphabet: V vertices, F faces, N corners of an outline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    first = 4 * np.arange(len(low))[:, None]
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
