"""The things on the table, built in code: no mesh file, no texture file, no download.

An asset stands on the plane z = 0 of its own frame, its axis along +z, its origin in the middle of
its foot. Meshes are for looking at; hulls are what physics touches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.spatial import ConvexHull

from sim_training.shapes import Array, Mesh, Profile, arc, box, column, lathe, polygon, prism, ring, tube

Colour = tuple[float, float, float]

_BLACK: Colour = (0.10, 0.10, 0.11)


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


@lru_cache(maxsize=256)
def section(asset: Asset, height_m: float) -> Array:
    """Return (N, 2) points around the level section of an asset's hulls at ``height_m``.

    They are where the edges of the hulls' triangles cross that height.

    Raises:
        ValueError: nothing is at that height.
    """
    found: list[Array] = []
    for points in asset.hulls:
        triangles = points[ConvexHull(points).simplices]
        edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
        below, above = edges[:, 0, 2] - height_m, edges[:, 1, 2] - height_m
        crossing = (below * above <= 0) & (below != above)
        share = (below[crossing] / (below - above)[crossing])[:, None]
        low, high = edges[crossing, 0], edges[crossing, 1]
        found.append((low + share * (high - low))[:, :2])
    outline = np.concatenate(found)
    if not len(outline):
        raise ValueError(f"{asset.name} has nothing at {height_m} m")
    return outline


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
def small_things() -> tuple[Asset, ...]:
    """Return the twelve kinds of ``place_a2b``: upright solids of 50 g, 38 to 56 mm wide.

    Each has a shape and a colour of its own; all fit a 70 mm gripper at any yaw.
    """
    return (
        _column("cube", polygon(4, 0.0265), 0.052, (0.80, 0.10, 0.10)),
        _column("brick", polygon(4, 0.0275) * [1.18, 0.78], 0.056, (0.93, 0.45, 0.06)),
        _column("wedge", polygon(3, 0.0275), 0.060, (0.05, 0.55, 0.55)),
        _column("house", polygon(5, 0.0265), 0.054, (0.15, 0.28, 0.78)),
        _column("nut", polygon(6, 0.0260), 0.058, (0.95, 0.80, 0.08)),
        _column("gem", polygon(8, 0.0260), 0.050, (0.12, 0.62, 0.22)),
        _turned("tin", ((0.0265, 0.0), (0.0265, 0.050)), (0.48, 0.16, 0.62), mass=0.05),
        _turned("candle", ((0.0190, 0.0), (0.0190, 0.072)), (0.95, 0.45, 0.62), mass=0.05),
        _turned("cone", ((0.0265, 0.0), (0.0180, 0.060)), (0.50, 0.28, 0.12), mass=0.05),
        _turned("tumbler", ((0.0200, 0.0), (0.0265, 0.065)), (0.25, 0.75, 0.90), mass=0.05),
        _turned("barrel", ((0.0205, 0.0), (0.0265, 0.030), (0.0205, 0.060)), (0.40, 0.45, 0.12), mass=0.05),
        _turned(
            "dome",
            ((0.0260, 0.0), (0.0260, 0.025), *arc(0.0260, 0.030, 10, 80)),
            (0.65, 0.05, 0.32),
            mass=0.05,
        ),
    )


@lru_cache(maxsize=1)
def small_black_things() -> tuple[Asset, ...]:
    """Return :func:`small_things` painted black, so that a picture tells them from the coloured ones."""
    return tuple(
        replace(
            asset,
            name=f"{asset.name}_black",
            visuals=tuple(replace(visual, colour=_BLACK) for visual in asset.visuals),
        )
        for asset in small_things()
    )


@lru_cache(maxsize=1)
def bells() -> tuple[Asset, ...]:
    """Return the two bells of ``click_bell``: their button is the highest point, above the middle."""
    return (
        _bell("bell_brass", 0.040, 0.048, dome=(0.83, 0.64, 0.20), base=(0.16, 0.15, 0.15)),
        _bell("bell_steel", 0.034, 0.060, dome=(0.70, 0.72, 0.76), base=(0.45, 0.10, 0.10)),
    )


@lru_cache(maxsize=1)
def empty_cup() -> Asset:
    """Return the cup of ``place_empty_cup``: 60 mm wide at its rim and hollow to look at.

    Physics takes it for solid: nothing is ever put into it.
    """
    low, high, height, wall = 0.024, 0.029, 0.078, 0.0025
    paint = (0.16, 0.42, 0.70)
    outside = lathe(((0.0, 0.0), (low, 0.0), (high, height), (high - wall, height)))
    inside = lathe(((high - wall, height), (low - wall, 0.006), (0.0, 0.006)))
    return Asset(
        "cup_blue",
        (Visual(outside, paint, roughness=0.35), Visual(inside, (0.92, 0.92, 0.88), roughness=0.4)),
        (np.concatenate([ring(low, 0.0), ring(high, height)]),),
        0.08,
        high,
        height,
    )


@lru_cache(maxsize=1)
def coaster() -> Asset:
    """Return the coaster of ``place_empty_cup``: 100 mm wide, 4 mm high, with a bevelled rim."""
    profile = ((0.050, 0.0), (0.044, 0.004))
    return _turned("coaster_cork", profile, (0.66, 0.46, 0.26), mass=0.05)


@lru_cache(maxsize=1)
def card_packs() -> tuple[Asset, ...]:
    """Return the three packs of ``move_playingcard_away``: boxes on their long side.

    54 to 60 mm across a corner, so that all fit a 70 mm gripper at any yaw.
    """
    return (
        _pack("cards_red", (0.0260, 0.0145, 0.0215), (0.78, 0.10, 0.12)),
        _pack("cards_blue", (0.0240, 0.0160, 0.0205), (0.10, 0.22, 0.66)),
        _pack("cards_green", (0.0235, 0.0140, 0.0225), (0.08, 0.45, 0.22)),
    )


@lru_cache(maxsize=1)
def clutter() -> tuple[Asset, ...]:
    """Return small things that belong to no task."""
    return (
        _block("block_wood", (0.03, 0.02, 0.05), (0.72, 0.55, 0.36)),
        _block("block_grey", (0.025, 0.025, 0.03), (0.45, 0.47, 0.50)),
        _block("box_white", (0.04, 0.03, 0.02), (0.90, 0.90, 0.86)),
        _turned("cup", ((0.024, 0.0), (0.030, 0.07)), (0.25, 0.35, 0.55)),
        _turned("ball", arc(0.026, 0.026, -80, 80), (0.80, 0.45, 0.15)),
        _turned("cone", ((0.028, 0.0), (0.008, 0.06)), (0.55, 0.62, 0.30)),
    )


def _can(name: str, radius: float, height: float, mass: float, *, paint: Colour, band: Colour) -> Asset:
    lip, tin = 0.0012, (0.78, 0.79, 0.80)
    body = lathe(((radius, 0.004), (radius, height - 0.004)))
    label = lathe(((radius + 0.0004, 0.30 * height), (radius + 0.0004, 0.66 * height)))
    foot = lathe(((0.0, 0.0), (radius - lip, 0.0), (radius, lip), (radius, 0.004)))
    lid = lathe(
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
        (prism(radius, 0.0, height),),
        mass,
        radius,
        height,
    )


def _pot(
    name: str, radius: float, height: float, *, paint: Colour, handle: Colour, metallic: float = 0.0
) -> Asset:
    wall, edge = 0.004, 0.012
    outside = ((0.0, 0.0), (radius - edge, 0.0), (radius - 0.3 * edge, 0.3 * edge), (radius, edge))
    body = lathe((*outside, (radius, height)))
    rim = lathe(
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
    knob = ((0.006, lid_z + 0.014), (0.006, lid_z + 0.022), *arc(0.012, lid_z + 0.029, -45, 90))
    visuals = [
        Visual(body, paint, roughness=0.4, metallic=metallic),
        Visual(rim, paint, roughness=0.3, metallic=metallic),
        Visual(lathe(dome), _darker(paint), roughness=0.35, metallic=metallic),
        Visual(lathe(knob), handle, roughness=0.5),
    ]
    hulls = [prism(radius, 0.0, height + 0.002)]
    for sign in (-1.0, 1.0):
        path = _handle_path(radius, 0.78 * height, sign)
        visuals.append(Visual(tube(path, 0.0055), handle, roughness=0.5))
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


def _column(name: str, corners: Array, height: float, paint: Colour) -> Asset:
    hull = np.concatenate([np.pad(corners, ((0, 0), (0, 1)), constant_values=z) for z in (0.0, height)])
    radius = float(np.hypot(*corners.T).max())
    return Asset(name, (Visual(column(corners, height), paint),), (hull,), 0.05, radius, height)


def _pack(name: str, half_size: tuple[float, float, float], paint: Colour) -> Asset:
    """Return a box of cards with a white label across its top and its long sides."""
    plain = _block(name, half_size, paint)
    x, y, z = half_size
    label = box((0.45 * x, y + 0.0004, z + 0.0002), (0.0, 0.0, z + 0.0002))
    visuals = (*plain.visuals, Visual(label, (0.95, 0.94, 0.90), roughness=0.6))
    return replace(plain, visuals=visuals, mass_kg=0.06)


def _bell(name: str, radius: float, height: float, *, dome: Colour, base: Colour) -> Asset:
    """Return a desk bell: a foot, a dome and a button 10 mm wide on a stalk."""
    rim, top = 0.010, height - 0.012
    bow = tuple(
        (float(radius * np.cos(a)), float(rim + (top - rim) * np.sin(a)))
        for a in np.linspace(0, np.pi / 2, 9)
    )
    button = ((0.005, top - 0.001), (0.005, height - 0.002), (0.004, height), (0.0, height))
    foot = ((0.0, 0.0), (1.05 * radius, 0.0), (1.05 * radius, rim), (radius, rim))
    return Asset(
        name,
        (
            Visual(lathe(foot), base, roughness=0.6),
            Visual(lathe(bow), dome, roughness=0.3, metallic=0.4),
            Visual(lathe(button), base, roughness=0.5),
        ),
        (
            np.concatenate([ring(1.05 * radius, 0.0), *(ring(r, z) for r, z in bow)]),
            prism(0.005, top - 0.001, height),
        ),
        0.3,
        1.05 * radius,
        height,
    )


def _turned(name: str, profile: Profile, paint: Colour, mass: float = 0.1) -> Asset:
    radii, heights = np.array(profile).T
    closed = ((0.0, profile[0][1]), *profile, (0.0, profile[-1][1]))
    hull = np.concatenate([ring(r, z) for r, z in profile])
    foot = np.array([0.0, 0.0, heights.min()])
    mesh = lathe(closed)
    standing = mesh._replace(vertices=(mesh.vertices - foot).astype(np.float32))
    return Asset(
        name, (Visual(standing, paint),), (hull - foot,), mass, float(radii.max()), float(np.ptp(heights))
    )


def _handle_path(radius: float, z: float, sign: float) -> Array:
    """Return (N, 3) a flat bow that stands 3 cm off the pot at its +y (or -y) side."""
    t = np.linspace(0, np.pi, 11)
    x = -0.032 * np.cos(t)
    return np.stack([x, sign * (radius - 0.007 + 0.034 * np.sin(t) ** 0.6), np.full_like(t, z)], axis=1)


def _darker(colour: Colour) -> Colour:
    red, green, blue = colour
    return 0.9 * red, 0.9 * green, 0.9 * blue
