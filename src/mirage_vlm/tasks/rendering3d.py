"""A small renderer in numpy: rays from a perspective camera, the nearest solid for each, flat light.

Lengths are metres, x to the right and y to the north of a room's plan, z up. Headings are degrees, clockwise from
north. Only sums, products, quotients and roots of float64 are taken of arrays, element by element, which are the same
to the last bit on every machine; so are the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Hits = tuple[Floats, Floats]  # [N] how far along each ray, inf = not met; [3, N] the surface's direction there

Colour = tuple[float, float, float]  # red, green, blue from 0 to 1
Place = tuple[float, float, float]  # x, y, z

LIGHT = (-0.48, -0.6, 0.64)  # where the light comes from; of length 1
DIM = 0.58  # how bright a surface is that the light does not reach
SHADOW = 0.45  # how dark the floor is under a thing
SKIRTING = 0.14
ROUGH = 0.06  # neighbours that differ more than this are drawn anew from four rays each


@dataclass(frozen=True)
class Solid:
    """An upright body.

    Attributes:
        form: `ball`, `box`, `tube` or `cone` (its tip up).
        centre: the middle of its bounding box.
        half: half its extents in x, y and z.
        number: what it is called in `View.ids`, from 1; solids that share one are parts of one thing.
        turned: its heading.
    """

    form: str
    centre: Place
    half: Place
    colour: Colour
    number: int
    turned: float = 0.0


@dataclass(frozen=True)
class Hall:
    """A room from (0, 0) to (width, depth), seen from within or, without its ceiling, from above.

    Attributes:
        floor: `checker`, `planks`, `tiles` or `carpet`.
        tones: the floor's two colours.
    """

    width: float
    depth: float
    height: float
    floor: str
    tones: tuple[Colour, Colour]
    walls: Colour


@dataclass(frozen=True)
class Camera:
    """An eye at (x, y, z) that looks `heading` and `pitch` degrees up; pictures are square and `fov` degrees wide."""

    x: float
    y: float
    z: float
    heading: float
    pitch: float = 0.0
    fov: float = 80.0

    def axes(self) -> tuple[Place, Place, Place]:
        """What is right, down and ahead in the picture, each of length 1."""
        turn, tilt = math.radians(self.heading), math.radians(self.pitch)
        # The C libraries' sines may differ in their last bit.
        s, c, u, a = (
            round(f(v), 12) for v, f in ((turn, math.sin), (turn, math.cos), (tilt, math.sin), (tilt, math.cos))
        )
        return (c, -s, 0.0), (s * u, c * u, -a), (s * a, c * a, u)

    def scale(self) -> float:
        """Half the picture's width at one metre's distance."""
        return round(math.tan(math.radians(self.fov / 2)), 12)

    def project(self, place: Place) -> tuple[float, float] | None:
        """(column, row) as fractions of the picture's side, from its upper left corner; None behind the camera."""
        offset = (place[0] - self.x, place[1] - self.y, place[2] - self.z)
        right, down, ahead = (sum(a * b for a, b in zip(axis, offset, strict=True)) for axis in self.axes())
        if ahead <= 0:
            return None
        return 0.5 + right / ahead / self.scale() / 2, 0.5 + down / ahead / self.scale() / 2

    def rays(self, columns: Floats, rows: Floats) -> Floats:
        """[3, N] directions of length 1 through points of the picture, given as fractions of its side."""
        right, down, ahead = self.axes()
        across, along = (columns * 2 - 1) * self.scale(), (rows * 2 - 1) * self.scale()
        rays = np.stack([r * across + d * along + a for r, d, a in zip(right, down, ahead, strict=True)])
        return _unit(rays)


@dataclass(frozen=True)
class View:
    """What the camera sees.

    Attributes:
        colours: [S, S, 3] uint8.
        ids: [S, S] the number of the thing in each pixel's middle, 0 = the room.
        whole: of each number, how many pixels it would have if nothing stood before it.
    """

    colours: NDArray[np.uint8]
    ids: NDArray[np.int16]
    whole: dict[int, int]

    def seen(self, number: int) -> int:
        """How many pixels show a thing."""
        return int((self.ids == number).sum())


def render(hall: Hall, solids: Sequence[Solid], camera: Camera, side: int, smooth: bool = True) -> View:
    """The view of a room with solids in it, `side` pixels wide and high; edges are jagged unless `smooth`."""
    rows, columns = (axis.ravel() for axis in np.mgrid[0:side, 0:side])
    rays = camera.rays((columns + 0.5) / side, (rows + 0.5) / side)
    ids, whole, colours = _paint(hall, solids, camera, rays)
    if smooth:
        rough = np.flatnonzero(_rough(colours.reshape(3, side, side)))
        quarters = np.array([[0.25, 0.75, 0.25, 0.75], [0.25, 0.25, 0.75, 0.75]])[:, :, None]  # [2, 4, 1]
        rays = camera.rays(
            ((columns[rough] + quarters[0]) / side).ravel(), ((rows[rough] + quarters[1]) / side).ravel()
        )
        finer = _paint(hall, solids, camera, rays)[2].reshape(3, 4, -1)
        colours[:, rough] = (finer[:, 0] + finer[:, 1] + finer[:, 2] + finer[:, 3]) / 4
    pixels = np.floor(np.clip(colours.T, 0, 1) * 255 + 0.5).astype(np.uint8)
    return View(pixels.reshape(side, side, 3), ids.reshape(side, side), whole)


def identify(solids: Sequence[Solid], camera: Camera, side: int) -> View:
    """`render` without its colours, which are black; for solids of which none is behind a wall."""
    rows, columns = (axis.ravel() for axis in np.mgrid[0:side, 0:side])
    rays = camera.rays((columns + 0.5) / side, (rows + 0.5) / side)
    ids, whole = _trace(solids, camera, rays, np.full(side * side, np.inf))
    return View(np.zeros((side, side, 3), np.uint8), ids.reshape(side, side), whole)


def _paint(
    hall: Hall, solids: Sequence[Solid], camera: Camera, rays: Floats
) -> tuple[NDArray[np.int16], dict[int, int], Floats]:
    """[N] numbers, how many rays would meet each number, and [3, N] colours."""
    colours, depth = _hall(hall, solids, (camera.x, camera.y, camera.z), rays)
    return *_trace(solids, camera, rays, depth, colours), colours


def _trace(
    solids: Sequence[Solid], camera: Camera, rays: Floats, depth: Floats, colours: Floats | None = None
) -> tuple[NDArray[np.int16], dict[int, int]]:
    """[N] numbers and how many rays would meet each number; what is in front is painted into `depth` and `colours`."""
    eye = (camera.x, camera.y, camera.z)
    ids = np.zeros(rays.shape[1], np.int16)
    whole = {}
    for number in dict.fromkeys(solid.number for solid in solids):
        parts = [solid for solid in solids if solid.number == number]
        near = _near(parts, eye, rays)
        met = np.zeros(len(near), bool)
        for solid in parts:
            candidates = _near([solid], eye, rays[:, near])
            if not len(candidates):
                continue
            chosen = near[candidates]
            far, surface = _meet(solid, eye, rays[:, chosen])
            met[candidates[far < np.inf]] = True
            front = np.flatnonzero(far < depth[chosen])
            shown = chosen[front]
            depth[shown], ids[shown] = far[front], number
            if colours is not None:
                lit = np.maximum(_dot(_unit(surface[:, front]), LIGHT), 0) * (1 - DIM) + DIM
                colours[:, shown] = np.array(solid.colour)[:, None] * lit
        whole[number] = int(met.sum())
    return ids, whole


def _meet(solid: Solid, eye: Place, rays: Floats) -> Hits:
    """Where rays meet a solid, and its surface's direction there, of whatever length."""
    turn = math.radians(solid.turned)
    s, c = round(math.sin(turn), 12), round(math.cos(turn), 12)
    x, y, z = (a - b for a, b in zip(eye, solid.centre, strict=True))
    (i, j, k), (dx, dy, dz) = solid.half, rays
    # In the solid's own frame it is a ball, box, tube or cone of half extents 1, and distances along rays stay.
    start = ((c * x - s * y) / i, (s * x + c * y) / j, z / k)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        far, (nx, ny, nz) = _FORMS[solid.form](start, np.stack([(c * dx - s * dy) / i, (s * dx + c * dy) / j, dz / k]))
        nx, ny, nz = nx / i, ny / j, nz / k
        return far, np.stack([c * nx + s * ny, c * ny - s * nx, nz])


def _near(solids: Sequence[Solid], eye: Place, rays: Floats) -> NDArray[np.intp]:
    """The rays that pass through a ball about these solids."""
    middle = tuple(sum(solid.centre[axis] for solid in solids) / len(solids) for axis in range(3))
    reach = max(math.dist(solid.centre, middle) + math.hypot(*solid.half) for solid in solids) + 1e-6
    offset = tuple(a - b for a, b in zip(middle, eye, strict=True))
    beyond = offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2 - reach**2
    along = _dot(rays, offset)
    return np.flatnonzero((along * along >= beyond) & ((along > 0) | (beyond <= 0)))


def _rough(colours: Floats) -> NDArray[np.bool_]:
    """[S, S] which pixels of [3, S, S] differ from a neighbour: edges, that look jagged with one ray each."""
    rough = np.zeros(colours.shape[1:], bool)
    across = np.abs(np.diff(colours, axis=2)).max(axis=0) > ROUGH
    along = np.abs(np.diff(colours, axis=1)).max(axis=0) > ROUGH
    rough[:, 1:] |= across
    rough[:, :-1] |= across
    rough[1:] |= along
    rough[:-1] |= along
    return rough


def _dot(a: Floats, b: Floats | Sequence[float]) -> Floats:
    """[N] of [3, N] and [3, N] or three numbers; not by BLAS, whose sums are in an order of its own."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(rays: Floats) -> Floats:
    """[3, N] the same directions with length 1."""
    return rays / np.sqrt(_dot(rays, rays))


# -- the room --------------------------------------------------------------------------------------------------------


def _hall(hall: Hall, solids: Sequence[Solid], eye: Place, rays: Floats) -> tuple[Floats, Floats]:
    """[3, N] colours of the bare room and [N] how far away it is."""
    x, y, z = eye
    dx, dy, dz = rays
    with np.errstate(divide="ignore"):
        beside = np.where(dx > 0, hall.width - x, x) / np.abs(dx)
        ahead = np.where(dy > 0, hall.depth - y, y) / np.abs(dy)
        upright = np.where(dz > 0, hall.height - z if z < hall.height else np.inf, z) / np.abs(dz)
    depth = np.minimum(upright, np.minimum(beside, ahead))
    colours = np.ones((3, len(depth)))
    walls = np.array(hall.walls)[:, None]
    colours[:, (depth == upright) & (dz > 0)] = 0.96
    for faces, bright in (
        ((depth == beside) & (dx > 0), 0.88),
        ((depth == beside) & (dx < 0), 1.0),
        ((depth == ahead) & (dy > 0), 0.94),
        ((depth == ahead) & (dy < 0), 0.8),
    ):
        rows = np.flatnonzero(faces)
        up = z + depth[rows] * dz[rows]
        shade = np.where(up < SKIRTING, 0.6, np.where(up > hall.height, 0.0, 1.0)) * bright
        colours[:, rows] = walls * shade + (up > hall.height)  # above the walls is white
    ground = np.flatnonzero((depth == upright) & (dz <= 0))
    places = x + depth[ground] * dx[ground], y + depth[ground] * dy[ground]
    colours[:, ground] = _floor(hall, *places) * _shadows(solids, *places)
    return colours, depth


def _floor(hall: Hall, x: Floats, y: Floats) -> Floats:
    """[3, N] the floor's colour at places."""
    if hall.floor == "checker":
        second = (np.floor(x) + np.floor(y)) % 2 == 1
    elif hall.floor == "planks":
        row = np.floor(x / 0.4)
        second = (x / 0.4 - row < 0.06) | ((y + row * 0.9) % 2.4 < 0.03)
    elif hall.floor == "tiles":
        second = (x % 0.8 < 0.04) | (y % 0.8 < 0.04)
    else:
        inside = np.minimum(np.minimum(x, hall.width - x), np.minimum(y, hall.depth - y))
        second = (inside > 0.6) & (inside < 0.75)
    one, two = (np.array(tone)[:, None] for tone in hall.tones)
    return np.where(second, two, one)


def _shadows(solids: Sequence[Solid], x: Floats, y: Floats) -> Floats:
    """[N] how much light is left on the floor under and about each thing, of which the widest part counts."""
    widest: dict[int, Solid] = {}
    for solid in solids:
        if solid.number not in widest or solid.half[0] * solid.half[1] > math.prod(widest[solid.number].half[:2]):
            widest[solid.number] = solid
    light = np.ones_like(x)
    for solid in widest.values():
        (cx, cy, _), (i, j, _) = solid.centre, solid.half
        dx, dy, reach = x - cx, y - cy, 1.45 * max(i, j)
        light *= 1 - SHADOW * np.maximum(1 - (dx * dx + dy * dy) / (reach * reach), 0)
    return light


# -- forms, each of half extents 1 about the origin -------------------------------------------------------------------


def _ball(start: Place, rays: Floats) -> Hits:
    o = start
    far = _nearest(*_roots(_dot(rays, rays), _dot(rays, o), o[0] * o[0] + o[1] * o[1] + o[2] * o[2] - 1))
    return far, _along(o, rays, far)


def _box(start: Place, rays: Floats) -> Hits:
    o = np.array(start)[:, None]
    one, two = (-1 - o) / rays, (1 - o) / rays
    enter = np.fmin(one, two)
    first, last = enter.max(axis=0), np.fmax(one, two).min(axis=0)
    far = np.where((first <= last) & (first > 0), first, np.inf)
    return far, np.where(enter == first, -np.sign(rays), 0.0)


def _tube(start: Place, rays: Floats) -> Hits:
    (x, y, z), (dx, dy, dz) = start, rays
    side = _nearest(*(_if_between(z, dz, t) for t in _roots(dx * dx + dy * dy, x * dx + y * dy, x * x + y * y - 1)))
    normal = _along(start, rays, side)
    normal[2] = 0
    return _with_caps(start, rays, side, normal, (1.0, -1.0))


def _cone(start: Place, rays: Floats) -> Hits:
    (x, y, z), (dx, dy, dz) = start, rays
    width, slope = (1 - z) / 2, -dz / 2  # the radius at height z is (1 - z) / 2
    roots = _roots(dx * dx + dy * dy - slope * slope, x * dx + y * dy - width * slope, x * x + y * y - width * width)
    side = _nearest(*(_if_between(z, dz, t) for t in roots))
    normal = _along(start, rays, side)
    normal[2] = (1 - normal[2]) / 4
    return _with_caps(start, rays, side, normal, (-1.0,))


def _with_caps(start: Place, rays: Floats, far: Floats, normal: Floats, heights: Sequence[float]) -> Hits:
    """Flat round ends of radius 1 added."""
    (x, y, z), (dx, dy, dz) = start, rays
    for height in heights:
        flat = (height - z) / dz
        px, py = x + flat * dx, y + flat * dy
        flat = np.where((flat > 0) & (px * px + py * py <= 1), flat, np.inf)
        closer = flat < far
        far = np.where(closer, flat, far)
        normal = np.where(closer, np.array([0.0, 0.0, height])[:, None], normal)
    return far, normal


def _roots(a: Floats, b: Floats, c: float) -> tuple[Floats, Floats]:
    """Where a t² + 2 b t + c = 0; nan where nowhere."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def _nearest(one: Floats, two: Floats) -> Floats:
    """[N] the smaller positive of two distances; inf where neither is one."""
    one, two = np.where(one > 0, one, np.inf), np.where(two > 0, two, np.inf)
    return np.minimum(one, two)


def _if_between(z: float, dz: Floats, far: Floats) -> Floats:
    """The distances where the height is from -1 to 1; inf elsewhere."""
    up = z + far * dz
    return np.where((up >= -1) & (up <= 1), far, np.inf)


def _along(start: Place, rays: Floats, far: Floats) -> Floats:
    """[3, N] the points that far along the rays."""
    return np.stack([o + far * d for o, d in zip(start, rays, strict=True)])


_FORMS: dict[str, Callable[[Place, Floats], Hits]] = {"ball": _ball, "box": _box, "tube": _tube, "cone": _cone}
