"""Meshes and point sets of simple solids: what the things on the table are made of.

Lengths are m; a profile is a sequence of (radius, z) points about the z axis.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Profile = tuple[tuple[float, float], ...]

_SEGMENTS = 32
_HULL_SIDES = 24


class Mesh(NamedTuple):
    """Triangles with normals and texture coordinates: (V, 3), (T, 3), (V, 3), (V, 2)."""

    vertices: NDArray[np.float32]
    triangles: NDArray[np.uint32]
    normals: NDArray[np.float32]
    uvs: NDArray[np.float32]


@lru_cache(maxsize=64)  # every scene has the same table and wall
def box(half_size: tuple[float, float, float], centre: tuple[float, float, float] = (0, 0, 0)) -> Mesh:
    """Return a box; each face carries the texture once."""
    vertices: list[Any] = []
    normals: list[Any] = []
    uvs: list[Any] = []
    triangles: list[Any] = []
    for axis in range(3):
        for sign in (-1.0, 1.0):
            normal = np.zeros(3)
            normal[axis] = sign
            u, v = np.roll(np.eye(3), axis + 1, axis=1)[:2] * np.array([[sign], [1.0]])
            start = len(vertices)
            for du, dv in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
                vertices.append((normal + du * u + dv * v) * half_size + centre)
                normals.append(normal)
                uvs.append(((du + 1) / 2, (dv + 1) / 2))
            order = ((0, 1, 2), (0, 2, 3)) if np.cross(u, v) @ normal > 0 else ((0, 2, 1), (0, 3, 2))
            triangles += [[start + i for i in triangle] for triangle in order]
    return _mesh(vertices, triangles, normals, uvs)


def column(corners: Array, height: float) -> Mesh:
    """Return an upright column over the corners (N, 2) of a convex outline, in counter-clockwise order."""
    vertices: list[Any] = []
    normals: list[Any] = []
    uvs: list[Any] = []
    triangles: list[Any] = []
    for i, (first, second) in enumerate(zip(corners, np.roll(corners, -1, axis=0), strict=True)):
        along = (second - first) / np.linalg.norm(second - first)
        start = len(vertices)
        vertices += [(*first, 0.0), (*second, 0.0), (*second, height), (*first, height)]
        normals += [(along[1], -along[0], 0.0)] * 4
        u0, u1 = i / len(corners), (i + 1) / len(corners)
        uvs += [(u0, 0.0), (u1, 0.0), (u1, 1.0), (u0, 1.0)]
        triangles += [(start, start + 1, start + 2), (start, start + 2, start + 3)]
    size = float(np.abs(corners).max())
    for z, up in ((0.0, -1.0), (height, 1.0)):
        start = len(vertices)
        vertices += [(x, y, z) for x, y in corners]
        normals += [(0.0, 0.0, up)] * len(corners)
        uvs += [((x / size + 1) / 2, (y / size + 1) / 2) for x, y in corners]
        for i in range(1, len(corners) - 1):
            fan = (start, start + i, start + i + 1) if up > 0 else (start, start + i + 1, start + i)
            triangles.append(fan)
    return _mesh(vertices, triangles, normals, uvs)


def polygon(sides: int, radius: float) -> Array:
    """Return (sides, 2) the corners of a regular polygon, counter-clockwise, its first side facing -y."""
    angles = 2 * np.pi * (np.arange(sides) - 0.5) / sides - np.pi / 2
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def lathe(profile: Profile) -> Mesh:
    """Return the surface of revolution of (radius, z) points, creased at each point of the profile."""
    angles = np.linspace(0, 2 * np.pi, _SEGMENTS + 1)
    cos, sin = np.cos(angles), np.sin(angles)
    vertices: list[Any] = []
    normals: list[Any] = []
    uvs: list[Any] = []
    triangles: list[Any] = []
    for (r0, z0), (r1, z1) in pairwise(profile):
        slope = np.array([z1 - z0, r0 - r1])
        slope /= np.linalg.norm(slope)
        start = len(vertices)
        for radius, z, v in ((r0, z0, 0.0), (r1, z1, 1.0)):
            for i, (c, s) in enumerate(zip(cos, sin, strict=True)):
                vertices.append((radius * c, radius * s, z))
                normals.append((slope[0] * c, slope[0] * s, slope[1]))
                uvs.append((i / _SEGMENTS, v))
        upper = start + _SEGMENTS + 1
        for i in range(_SEGMENTS):
            triangles.append((start + i, start + i + 1, upper + i + 1))
            triangles.append((start + i, upper + i + 1, upper + i))
    return _mesh(vertices, triangles, normals, uvs)


def tube(path: Array, radius: float, sides: int = 8) -> Mesh:
    """Return a round bar along the points ``path`` (N, 3)."""
    vertices: list[Any] = []
    normals: list[Any] = []
    uvs: list[Any] = []
    triangles: list[Any] = []
    tangents = np.gradient(path, axis=0)
    for i, (point, tangent) in enumerate(zip(path, tangents, strict=True)):
        side = np.cross(tangent, (0.0, 0.0, 1.0))
        side /= np.linalg.norm(side)
        up = np.cross(side, tangent)
        up /= np.linalg.norm(up)
        for k, angle in enumerate(np.linspace(0, 2 * np.pi, sides, endpoint=False)):
            normal = np.cos(angle) * side + np.sin(angle) * up
            vertices.append(point + radius * normal)
            normals.append(normal)
            uvs.append((k / sides, i / (len(path) - 1)))
    for i in range(len(path) - 1):
        for k in range(sides):
            a, b = i * sides + k, i * sides + (k + 1) % sides
            triangles += [(a, b + sides, b), (a, a + sides, b + sides)]
    return _mesh(vertices, triangles, normals, uvs)


def arc(radius: float, centre_z: float, start_deg: float, end_deg: float) -> Profile:
    """Return nine points on a circle about (0, ``centre_z``), from one elevation to another."""
    angles = np.deg2rad(np.linspace(start_deg, end_deg, 9))
    return tuple((float(radius * np.cos(a)), float(centre_z + radius * np.sin(a))) for a in angles)


def prism(radius: float, low: float, high: float) -> Array:
    """Return (48, 3) the rims of an upright cylinder."""
    return np.concatenate([ring(radius, low), ring(radius, high)])


def ring(radius: float, z: float) -> Array:
    """Return (24, 3) points on a level circle about the z axis."""
    angles = np.linspace(0, 2 * np.pi, _HULL_SIDES, endpoint=False)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles), np.full_like(angles, z)], axis=1)


def _mesh(vertices: list[Any], triangles: list[Any], normals: list[Any], uvs: list[Any]) -> Mesh:
    return Mesh(
        np.asarray(vertices, dtype=np.float32),
        np.asarray(triangles, dtype=np.uint32),
        np.asarray(normals, dtype=np.float32),
        np.asarray(uvs, dtype=np.float32),
    )
