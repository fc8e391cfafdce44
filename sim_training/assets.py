"""The things on the table, built in code: no mesh file, no texture file, no download.

An asset stands on the plane z = 0 of its own frame, its axis along +z, its origin in the middle of
its foot. Meshes are for looking at; hulls are what physics touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Colour = tuple[float, float, float]
Profile = tuple[tuple[float, float], ...]

_SEGMENTS = 32
_HULL_SIDES = 24


class Mesh(NamedTuple):
    """Triangles with normals and texture coordinates: (V, 3), (T, 3), (V, 3), (V, 2)."""

    vertices: NDArray[np.float32]
    triangles: NDArray[np.uint32]
    normals: NDArray[np.float32]
    uvs: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Visual:
    """A mesh with its paint: sRGB colour in [0, 1], roughness and metallic in [0, 1]."""

    mesh: Mesh
    colour: Colour
    roughness: float = 0.5
    metallic: float = 0.0


@dataclass(frozen=True, eq=False)
class Asset:
    """Something that stands on the table.

    Attributes:
        visuals: what cameras see.
        hulls: (N, 3) points each; physics takes their convex hulls.
        mass_kg: its mass, spread as in a solid cylinder of ``radius_m`` and ``height_m``.
        friction: of its surface, static and dynamic.
    """

    name: str
    visuals: tuple[Visual, ...]
    hulls: tuple[Array, ...]
    mass_kg: float
    radius_m: float
    height_m: float
    friction: float = 0.5

    def inertia(self) -> Array:
        """Return (3,) the principal moments about the centre of mass, kg m2."""
        across = self.mass_kg * (3 * self.radius_m**2 + self.height_m**2) / 12
        return np.array([across, across, self.mass_kg * self.radius_m**2 / 2])


@lru_cache(maxsize=1)
def sauce_cans() -> tuple[Asset, ...]:
    """Return the five cans of ``move_can_pot``: 44 to 52 mm wide, so that a 70 mm gripper takes them."""
    return (
        _can("can_tomato", 0.0240, 0.105, 0.10, paint=(0.82, 0.09, 0.08), band=(0.97, 0.93, 0.84)),
        _can("can_pesto", 0.0225, 0.095, 0.07, paint=(0.07, 0.45, 0.20), band=(0.95, 0.90, 0.62)),
        _can("can_mustard", 0.0250, 0.112, 0.12, paint=(0.93, 0.66, 0.05), band=(0.45, 0.12, 0.08)),
        _can("can_blue", 0.0235, 0.100, 0.09, paint=(0.08, 0.26, 0.62), band=(0.94, 0.94, 0.96)),
        _can("can_plum", 0.0258, 0.118, 0.14, paint=(0.42, 0.10, 0.38), band=(0.96, 0.78, 0.48)),
    )


@lru_cache(maxsize=1)
def pots() -> tuple[Asset, ...]:
    """Return the seven pots of ``move_can_pot``: 14 to 17 cm wide, their handles along y."""
    steel, iron = (0.72, 0.73, 0.75), (0.13, 0.13, 0.15)
    return (
        _pot("pot_steel", 0.080, 0.085, paint=steel, handle=iron, metallic=0.5),
        _pot("pot_steel_tall", 0.074, 0.105, paint=(0.62, 0.64, 0.67), handle=iron, metallic=0.5),
        _pot("pot_black", 0.084, 0.080, paint=(0.17, 0.17, 0.19), handle=(0.55, 0.38, 0.22)),
        _pot("pot_copper", 0.077, 0.090, paint=(0.72, 0.42, 0.26), handle=(0.36, 0.29, 0.22), metallic=0.4),
        _pot("pot_cream", 0.082, 0.095, paint=(0.88, 0.82, 0.68), handle=(0.50, 0.33, 0.20)),
        _pot("pot_teal", 0.072, 0.088, paint=(0.13, 0.45, 0.47), handle=iron),
        _pot("pot_grey", 0.085, 0.100, paint=(0.42, 0.43, 0.46), handle=(0.80, 0.80, 0.80)),
    )


@lru_cache(maxsize=1)
def clutter() -> tuple[Asset, ...]:
    """Return small things that belong to no task."""
    return (
        _block("block_wood", (0.03, 0.02, 0.05), (0.72, 0.55, 0.36)),
        _block("block_grey", (0.025, 0.025, 0.03), (0.45, 0.47, 0.50)),
        _block("box_white", (0.04, 0.03, 0.02), (0.90, 0.90, 0.86)),
        _turned("cup", ((0.024, 0.0), (0.030, 0.07)), (0.25, 0.35, 0.55)),
        _turned("ball", _arc(0.026, 0.026, -80, 80), (0.80, 0.45, 0.15)),
        _turned("cone", ((0.028, 0.0), (0.008, 0.06)), (0.55, 0.62, 0.30)),
    )


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


def _can(name: str, radius: float, height: float, mass: float, *, paint: Colour, band: Colour) -> Asset:
    lip, tin = 0.0012, (0.78, 0.79, 0.80)
    body = _lathe(((radius, 0.004), (radius, height - 0.004)))
    label = _lathe(((radius + 0.0004, 0.30 * height), (radius + 0.0004, 0.66 * height)))
    foot = _lathe(((0.0, 0.0), (radius - lip, 0.0), (radius, lip), (radius, 0.004)))
    lid = _lathe(
        (
            (radius, height - 0.004),
            (radius, height - lip),
            (radius - lip, height),
            (radius - 2 * lip, height),
            (radius - 2 * lip, height - 0.002),
            (0.0, height - 0.002),
        )
    )
    return Asset(
        name,
        (
            Visual(body, paint, roughness=0.45),
            Visual(label, band, roughness=0.6),
            Visual(foot, tin, roughness=0.35, metallic=0.4),
            Visual(lid, tin, roughness=0.35, metallic=0.4),
        ),
        (_prism(radius, 0.0, height),),
        mass,
        radius,
        height,
    )


def _pot(
    name: str, radius: float, height: float, *, paint: Colour, handle: Colour, metallic: float = 0.0
) -> Asset:
    wall, edge = 0.004, 0.012
    outside = ((0.0, 0.0), (radius - edge, 0.0), (radius - 0.3 * edge, 0.3 * edge), (radius, edge))
    body = _lathe((*outside, (radius, height)))
    rim = _lathe(
        (
            (radius, height - 0.004),
            (radius + 0.003, height - 0.002),
            (radius + 0.003, height),
            (radius - wall, height + 0.001),
            (radius - wall, height - 0.012),
        )
    )
    lid_z = height - 0.010
    dome = tuple((r, lid_z + 0.016 * (1 - (r / radius) ** 2)) for r in np.linspace(radius - wall, 0.0, 6))
    knob = ((0.006, lid_z + 0.014), (0.006, lid_z + 0.022), *_arc(0.012, lid_z + 0.029, -45, 90))
    visuals = [
        Visual(body, paint, roughness=0.4, metallic=metallic),
        Visual(rim, paint, roughness=0.3, metallic=metallic),
        Visual(_lathe(dome), _darker(paint), roughness=0.35, metallic=metallic),
        Visual(_lathe(knob), handle, roughness=0.5),
    ]
    hulls = [_prism(radius, 0.0, height + 0.002)]
    for sign in (-1.0, 1.0):
        path = _handle_path(radius, 0.78 * height, sign)
        visuals.append(Visual(_tube(path, 0.0055), handle, roughness=0.5))
        low, high = path.min(axis=0) - 0.005, path.max(axis=0) + 0.005
        hulls.append(np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, -1).T)
    return Asset(name, tuple(visuals), tuple(hulls), 2.0, radius, height, friction=0.8)


def _block(name: str, half_size: tuple[float, float, float], paint: Colour) -> Asset:
    corners = np.array(np.meshgrid(*((-h, h) for h in half_size))).reshape(3, -1).T
    shift = np.array([0.0, 0.0, half_size[2]])
    return Asset(
        name,
        (Visual(box(half_size, (0, 0, half_size[2])), paint, roughness=0.7),),
        (corners + shift,),
        0.1,
        float(np.hypot(*half_size[:2])),
        2 * half_size[2],
    )


def _turned(name: str, profile: Profile, paint: Colour) -> Asset:
    radii, heights = np.array(profile).T
    closed = ((0.0, profile[0][1]), *profile, (0.0, profile[-1][1]))
    hull = np.concatenate([_ring(r, z) for r, z in profile])
    foot = np.array([0.0, 0.0, heights.min()])
    mesh = _lathe(closed)
    standing = mesh._replace(vertices=(mesh.vertices - foot).astype(np.float32))
    return Asset(
        name, (Visual(standing, paint),), (hull - foot,), 0.1, float(radii.max()), float(np.ptp(heights))
    )


def _lathe(profile: Profile) -> Mesh:
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


def _tube(path: Array, radius: float, sides: int = 8) -> Mesh:
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


def _handle_path(radius: float, z: float, sign: float) -> Array:
    """Return (N, 3) a flat bow that stands 3 cm off the pot at its +y (or -y) side."""
    t = np.linspace(0, np.pi, 11)
    x = -0.032 * np.cos(t)
    return np.stack([x, sign * (radius - 0.007 + 0.034 * np.sin(t) ** 0.6), np.full_like(t, z)], axis=1)


def _arc(radius: float, centre_z: float, start_deg: float, end_deg: float) -> Profile:
    angles = np.deg2rad(np.linspace(start_deg, end_deg, 9))
    return tuple((float(radius * np.cos(a)), float(centre_z + radius * np.sin(a))) for a in angles)


def _prism(radius: float, low: float, high: float) -> Array:
    return np.concatenate([_ring(radius, low), _ring(radius, high)])


def _darker(colour: Colour) -> Colour:
    red, green, blue = colour
    return 0.9 * red, 0.9 * green, 0.9 * blue


def _ring(radius: float, z: float) -> Array:
    angles = np.linspace(0, 2 * np.pi, _HULL_SIDES, endpoint=False)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles), np.full_like(angles, z)], axis=1)


def _mesh(vertices: list[Any], triangles: list[Any], normals: list[Any], uvs: list[Any]) -> Mesh:
    return Mesh(
        np.asarray(vertices, dtype=np.float32),
        np.asarray(triangles, dtype=np.uint32),
        np.asarray(normals, dtype=np.float32),
        np.asarray(uvs, dtype=np.float32),
    )
