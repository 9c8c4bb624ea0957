"""Furnished rooms as plain numbers: what stands where, poses of a camera, and pictures of them.

A scene is what JSON can hold: `room` (its size and look), `things` (each with `shape`, `colour`, the place `at` and the
heading `turned`) and `camera` (x, y, heading), and for a second picture `then` (a `camera`, or which `thing` is moved
and where `at`, or both). Metres and degrees; headings clockwise from north, and so a bearing is
positive to the right.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw

from mirage_vlm.tasks.rendering3d import Camera, Colour, Hall, Place, Solid, View, identify, render

Scene = Mapping[str, Any]
Spot = tuple[float, float]

EYE, PITCH, FOV = 1.6, -15.0, 80.0
HEIGHT = 2.8  # of the walls
IN_VIEW = 34.0  # a thing whose bearing is below this is not cut off by the picture's edge
APART = 1.2  # between the middles of things, and of a thing and a camera 1.5 times that
REACH = 0.55  # no thing is wider than this to a side

COLOURS: dict[str, Colour] = {
    "red": (0.85, 0.12, 0.12),
    "orange": (1.0, 0.55, 0.05),
    "yellow": (1.0, 0.9, 0.15),
    "green": (0.1, 0.6, 0.2),
    "blue": (0.12, 0.3, 0.9),
    "purple": (0.5, 0.15, 0.7),
    "pink": (1.0, 0.5, 0.75),
    "black": (0.13, 0.13, 0.15),
}
SKIN: Colour = (0.87, 0.68, 0.53)
FLOORS: dict[str, tuple[Colour, Colour]] = {
    "checker": ((0.78, 0.77, 0.74), (0.66, 0.65, 0.63)),
    "planks": ((0.74, 0.63, 0.5), (0.6, 0.5, 0.39)),
    "tiles": ((0.8, 0.82, 0.82), (0.62, 0.65, 0.66)),
    "carpet": ((0.6, 0.62, 0.66), (0.74, 0.75, 0.77)),
}
WALLS: dict[str, Colour] = {
    "cream": (0.96, 0.93, 0.85),
    "mint": (0.84, 0.92, 0.87),
    "sky": (0.84, 0.9, 0.96),
    "grey": (0.88, 0.88, 0.88),
}

# Parts of each shape that faces north: form, middle, half extents, and a colour where it is not the thing's own.
Part = tuple[str, Place, Place, Colour | None]
SHAPES: dict[str, tuple[Part, ...]] = {
    "ball": (("ball", (0, 0, 0.42), (0.42, 0.42, 0.42), None),),
    "box": (("box", (0, 0, 0.38), (0.38, 0.38, 0.38), None),),
    "cone": (("cone", (0, 0, 0.5), (0.42, 0.42, 0.5), None),),
    "barrel": (
        ("tube", (0, 0, 0.45), (0.36, 0.36, 0.45), None),
        ("tube", (0, 0, 0.45), (0.38, 0.38, 0.06), (0.45, 0.45, 0.47)),
    ),
    "lamp": (
        ("tube", (0, 0, 0.04), (0.26, 0.26, 0.04), None),
        ("tube", (0, 0, 0.55), (0.05, 0.05, 0.55), (0.45, 0.45, 0.47)),
        ("cone", (0, 0, 1.2), (0.42, 0.42, 0.32), None),
    ),
    "table": (
        ("box", (0, 0, 0.66), (0.5, 0.4, 0.06), None),
        *(("box", (x, y, 0.3), (0.05, 0.05, 0.3), None) for x in (-0.42, 0.42) for y in (-0.32, 0.32)),
    ),
    "chair": (
        ("box", (0, 0, 0.45), (0.3, 0.3, 0.05), None),
        ("box", (0, -0.26, 0.75), (0.3, 0.04, 0.3), None),
        *(("box", (x, y, 0.2), (0.04, 0.04, 0.2), None) for x in (-0.25, 0.25) for y in (-0.25, 0.25)),
    ),
    "person": (
        ("cone", (0, 0, 0.66), (0.36, 0.36, 0.66), None),
        ("ball", (0, 0, 0.8), (0.3, 0.2, 0.3), None),
        ("ball", (0, 0, 1.28), (0.2, 0.2, 0.22), SKIN),
        ("ball", (0, -0.04, 1.36), (0.21, 0.2, 0.18), (0.28, 0.18, 0.1)),
        ("ball", (0, 0.21, 1.26), (0.05, 0.06, 0.05), (0.8, 0.5, 0.4)),
    ),
}


class Pose(NamedTuple):
    """Where somebody stands and looks."""

    x: float
    y: float
    heading: float

    def bearing(self, spot: Sequence[float]) -> float:
        """How many degrees to the right of straight ahead a spot is, from -180 to 180."""
        x, y = spot
        return wrap(math.degrees(math.atan2(x - self.x, y - self.y)) - self.heading)

    def distance(self, spot: Sequence[float]) -> float:
        x, y = spot
        return math.hypot(x - self.x, y - self.y)

    def turn(self, degrees: float) -> Pose:
        """Turned to the right, or to the left if negative."""
        return self._replace(heading=round(wrap(self.heading + degrees), 1))

    def step(self, ahead: float = 0.0, right: float = 0.0) -> Pose:
        """Moved without turning."""
        turn = math.radians(self.heading)
        x, y = self.x + ahead * math.sin(turn) + right * math.cos(turn), self.y + ahead * math.cos(turn)
        return Pose(round(x, 2), round(y - right * math.sin(turn), 2), self.heading)

    def offset(self, spot: Sequence[float]) -> tuple[float, float]:
        """How far a spot is (ahead, to the right)."""
        angle, far = math.radians(self.bearing(spot)), self.distance(spot)
        return far * math.cos(angle), far * math.sin(angle)


def wrap(degrees: float) -> float:
    """The same direction from -180 to 180."""
    return (degrees + 180) % 360 - 180


def facing(spot: Sequence[float], other: Sequence[float]) -> Pose:
    """Standing at a spot and looking at another."""
    return Pose(spot[0], spot[1], round(Pose(spot[0], spot[1], 0).bearing(other), 1))


def name_of(scene: Scene, i: int) -> str:
    """`red ball`, `person in red`."""
    shape, colour = scene["things"][i]["shape"], scene["things"][i]["colour"]
    return f"person in {colour}" if shape == "person" else f"{colour} {shape}"


# -- making ----------------------------------------------------------------------------------------------------------


def furnish(rng: random.Random, count: int, *shapes: str) -> dict[str, Any]:
    """A room with so many things, each of a colour of its own, not yet in their places; the first of these shapes."""
    colours = rng.sample(list(COLOURS), count)
    chosen = [*shapes, *rng.choices(list(SHAPES), k=count - len(shapes))]
    return {
        "room": {
            "size": [round(rng.uniform(6.6, 8.6), 1), round(rng.uniform(7.0, 8.4), 1)],
            "floor": rng.choice(list(FLOORS)),
            "walls": rng.choice(list(WALLS)),
        },
        "things": [{"shape": shape, "colour": colour} for shape, colour in zip(chosen, colours, strict=True)],
    }


def scatter(rng: random.Random, scene: Scene, shown: int) -> dict[str, Any] | None:
    """The scene with a camera and every thing in its place, the first `shown` before the camera; None by bad luck."""
    width, depth = scene["room"]["size"]
    camera = Pose(
        round(width / 2 + rng.uniform(-1, 1), 2), round(rng.uniform(0.5, 2.6), 2), round(rng.uniform(-20, 20), 1)
    )
    spots: list[Spot] = []
    for i in range(len(scene["things"])):
        for _ in range(8):
            if i < shown:
                spot = ahead_of(rng, camera)
            else:
                spot = (round(rng.uniform(0, width), 2), round(rng.uniform(0, depth), 2))
            if is_free(scene, spot, spots, camera):
                spots.append(spot)
                break
        else:
            return None
    turned = [round(rng.uniform(-180, 180), 1) for _ in spots]
    things = [
        {**thing, "at": list(spot), "turned": turn}
        for thing, spot, turn in zip(scene["things"], spots, turned, strict=True)
    ]
    return {**scene, "things": things, "camera": list(camera)}


def ahead_of(rng: random.Random, camera: Pose) -> Spot:
    """A spot that the camera may well see."""
    there = camera.turn(rng.uniform(-IN_VIEW, IN_VIEW)).step(rng.uniform(1.9, 6.5))
    return there.x, there.y


def is_free(scene: Scene, spot: Spot, others: Sequence[Sequence[float]], camera: Pose | None = None) -> bool:
    """Whether a thing can stand there."""
    return (
        is_inside(scene, spot, 0.65)
        and all(math.dist(spot, other) >= APART for other in others)
        and (camera is None or camera.distance(spot) >= 1.5 * APART)
    )


def is_inside(scene: Scene, spot: Sequence[float], margin: float) -> bool:
    """Whether a spot is in the room, so far from its walls."""
    width, depth = scene["room"]["size"]
    return margin <= spot[0] <= width - margin and margin <= spot[1] <= depth - margin


def can_stand(scene: Scene, pose: Pose) -> bool:
    """Whether the camera can be there."""
    return is_inside(scene, pose[:2], 0.4) and all(pose.distance(spot) >= 1 for spot in places(scene))


def places(scene: Scene) -> list[list[float]]:
    """Where the things are."""
    return [thing["at"] for thing in scene["things"]]


def with_moved(scene: Scene, i: int, spot: Sequence[float]) -> dict[str, Any]:
    """The scene with a thing somewhere else."""
    things = [{**thing, "at": list(spot)} if j == i else thing for j, thing in enumerate(scene["things"])]
    return {**scene, "things": things}


def after(scene: Scene) -> Scene:
    """The scene in the second picture: a thing moved, where `then` says so."""
    then = scene.get("then", {})
    return with_moved(scene, then["thing"], then["at"]) if "thing" in then else scene


def later(scene: Scene) -> Pose:
    """Where the second picture is taken from."""
    return Pose(*scene.get("then", {}).get("camera", scene["camera"]))


# -- seeing ----------------------------------------------------------------------------------------------------------


def look(scene: Scene, pose: Pose, side: int, without: int | None = None) -> View:
    """The view from a pose; in `ids` thing i is i + 1. `without` a thing, if it is its place that is looked from."""
    return render(_hall(scene), _solids(scene, without), _camera(pose), side)


def outline(scene: Scene, pose: Pose, side: int, without: int | None = None) -> View:
    """`look` for its `ids` alone, in a fraction of the time."""
    return identify(_solids(scene, without), _camera(pose), side)


def look_down(scene: Scene, side: int) -> tuple[View, Camera]:
    """The room from above without its ceiling, north up, and the camera that sees it."""
    width, depth = scene["room"]["size"]
    far = max(width, depth) / 2 * 1.25 / math.tan(math.radians(25))
    camera = Camera(width / 2, depth / 2, round(far, 3), 0.0, -90.0, 50.0)
    return render(_hall(scene), _solids(scene), camera, side), camera


def draw_view(scene: Scene, i: int, side: int) -> PIL.Image.Image:
    """The first picture of a scene, i = 0, or the second."""
    pose = later(scene) if i else Pose(*scene["camera"])
    return PIL.Image.fromarray(look(after(scene) if i else scene, pose, side).colours)


def draw_poses(scene: Scene, poses: Sequence[tuple[Pose, str]], side: int) -> PIL.Image.Image:
    """The room from above, with what lies before the camera in each pose outlined in its colour."""
    view, above = look_down(scene, side)
    image = PIL.Image.fromarray(view.colours)
    pen = PIL.ImageDraw.Draw(image)
    for pose, colour in poses:
        corners = [pose, *(pose.turn(turn).step(1.6) for turn in (-FOV / 2, FOV / 2))]
        seen = [spot for corner in corners if (spot := above.project((corner.x, corner.y, 0))) is not None]
        edge = [(x * side, y * side) for x, y in seen]
        pen.line([*edge, edge[0]], fill=colour, width=max(1, round(side / 75)), joint="curve")
    return image


def draw_moved(scene: Scene, side: int) -> PIL.Image.Image:
    """The second picture, all but the moved thing faded; where it was before, it is faint."""
    pose, number = later(scene), scene["then"]["thing"] + 1
    now, before = look(after(scene), pose, side), look(scene, pose, side)
    colours = 200 + 0.2 * now.colours
    was = before.ids == number
    colours[was] = 120 + 0.45 * before.colours[was]
    colours[now.ids == number] = now.colours[now.ids == number]
    return PIL.Image.fromarray(np.floor(colours + 0.5).clip(0, 255).astype(np.uint8))


def are_seen(scene: Scene, pose: Pose, things: Sequence[int], without: int | None = None) -> bool:
    """Whether each of these things is before the camera, large enough and for its greater part not hidden."""
    if any(abs(pose.bearing(scene["things"][i]["at"])) > IN_VIEW for i in things):
        return False
    view = outline(scene, pose, 56, without)
    return all(view.seen(i + 1) >= max(8, 0.6 * view.whole[i + 1]) for i in things)


def _camera(pose: Pose) -> Camera:
    return Camera(pose.x, pose.y, EYE, pose.heading, PITCH, FOV)


def _hall(scene: Scene) -> Hall:
    room = scene["room"]
    width, depth = room["size"]
    return Hall(width, depth, HEIGHT, room["floor"], FLOORS[room["floor"]], WALLS[room["walls"]])


def _solids(scene: Scene, without: int | None = None) -> list[Solid]:
    solids = []
    for i, thing in enumerate(scene["things"]):
        if i == without:
            continue
        here = Pose(thing["at"][0], thing["at"][1], thing["turned"])
        for form, (right, ahead, up), half, colour in SHAPES[thing["shape"]]:
            turn = math.radians(here.heading)
            x = here.x + right * math.cos(turn) + ahead * math.sin(turn)
            y = here.y - right * math.sin(turn) + ahead * math.cos(turn)
            own = COLOURS[thing["colour"]] if colour is None else colour
            solids.append(Solid(form, (round(x, 9), round(y, 9), up), half, own, i + 1, here.heading))
    return solids
