"""Rooms and their renderer: pictures against a slow march along rays and against what is known of spheres and edges."""

import cmath
import math
import random
from itertools import combinations

import numpy as np
import pytest

from mirage_vlm.tasks.rendering3d import Camera, Hall, Solid, identify, render
from mirage_vlm.tasks.rooms import (
    APART,
    COLOURS,
    HEIGHT,
    IN_VIEW,
    REACH,
    SHAPES,
    Pose,
    are_seen,
    facing,
    furnish,
    look,
    look_down,
    name_of,
    scatter,
    with_moved,
)

HALL = Hall(8, 8, 2.8, "checker", ((0.8, 0.8, 0.8), (0.6, 0.6, 0.6)), (0.9, 0.9, 0.8))
RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.1, 0.9)
EACH = (
    Solid("ball", (2.5, 5, 0.6), (0.6, 0.4, 0.6), RED, 1, 40),
    Solid("box", (4, 4.5, 0.5), (0.5, 0.3, 0.5), RED, 2, 25),
    Solid("tube", (5.6, 5.5, 0.6), (0.5, 0.3, 0.6), BLUE, 3, -50),
    Solid("cone", (3.4, 3.4, 0.6), (0.5, 0.5, 0.6), BLUE, 4, 10),
    Solid("box", (4.4, 6.8, 1), (0.2, 0.9, 1), RED, 5, 70),
)
INSIDE = {  # of a solid of half extents 1
    "ball": lambda x, y, z: x**2 + y**2 + z**2 <= 1,
    "box": lambda x, y, z: np.maximum(np.maximum(abs(x), abs(y)), abs(z)) <= 1,
    "tube": lambda x, y, z: (x**2 + y**2 <= 1) & (abs(z) <= 1),
    "cone": lambda x, y, z: (np.hypot(x, y) <= (1 - z) / 2) & (abs(z) <= 1),
}


def march(solids, camera, side, step=0.004, far=8.0):
    """[S, S] ids, slowly: walk along each ray until a point is inside a solid."""
    turn, tilt = math.radians(camera.heading), math.radians(camera.pitch)
    spread = math.tan(math.radians(camera.fov / 2))
    ids = np.zeros((side, side), int)
    for row in range(side):
        for column in range(side):
            right, up = (2 * (column + 0.5) / side - 1) * spread, -(2 * (row + 0.5) / side - 1) * spread
            level, rise = math.cos(tilt) - up * math.sin(tilt), math.sin(tilt) + up * math.cos(tilt)
            plan = complex(right, level) * cmath.exp(-1j * turn)  # clockwise from north
            ray = np.array([plan.real, plan.imag, rise]) / math.sqrt(right**2 + up**2 + 1)
            points = np.array([camera.x, camera.y, camera.z]) + np.arange(0, far, step)[:, None] * ray
            first = len(points)
            for solid in solids:
                offset = points - solid.centre
                own = (offset[:, 0] + 1j * offset[:, 1]) * cmath.exp(1j * math.radians(solid.turned))
                half = solid.half
                hits = np.flatnonzero(
                    INSIDE[solid.form](own.real / half[0], own.imag / half[1], offset[:, 2] / half[2])
                )
                if len(hits) and hits[0] < first:
                    first, ids[row, column] = hits[0], solid.number
    return ids


def middle(ids, number):
    """(column, row) of a thing's pixels as fractions of the picture's side."""
    rows, columns = np.nonzero(ids == number)
    return (columns.mean() + 0.5) / len(ids), (rows.mean() + 0.5) / len(ids)


@pytest.fixture(scope="module")
def scenes():
    rng, found = random.Random(4), []
    while len(found) < 30:
        scene = scatter(rng, furnish(rng, 6), 3)
        if scene is not None:
            found.append(scene)
    return found


# -- the renderer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "camera", [Camera(4, 0.8, 1.6, 0, -15), Camera(0.8, 3, 1.2, 55, -8), Camera(1, 7.4, 2.2, 130, -25)]
)
def test_every_form_is_where_a_slow_march_finds_it(camera):
    view = render(HALL, EACH, camera, 26)
    slow = march(EACH, camera, 26)
    assert len(np.unique(slow)) > 3
    assert (view.ids != slow).mean() < 0.006, "all but grazing rays"


def test_a_ball_has_the_size_and_place_of_theory():
    camera, far, radius, side = Camera(4, 1, 1.5, 0), 3.0, 0.5, 200
    view = render(HALL, [Solid("ball", (4, 1 + far, 1.5), (radius,) * 3, RED, 1)], camera, side)
    ring = radius / math.sqrt(far**2 - radius**2)  # the tangent cone's, at distance 1
    pixels = ring / math.tan(math.radians(40)) * side / 2
    assert view.seen(1) == view.whole[1] == pytest.approx(math.pi * pixels**2, rel=0.01)
    assert middle(view.ids, 1) == pytest.approx((0.5, 0.5), abs=1e-9)


@pytest.mark.parametrize(
    ("heading", "pitch", "place", "expected"),
    [
        (0, 0, (4, 6, 1), (0.5, 0.5)),
        (0, 0, (5, 6, 1), (0.75, 0.5)),
        (0, 0, (4, 6, 0), (0.5, 0.75)),
        (90, 0, (6, 3, 1), (0.75, 0.5)),
        (-90, 0, (2, 5, 1), (0.75, 0.5)),
        (180, 0, (4, 2, 1), (0.5, 0.5)),
        (0, -45, (4, 5, 0), (0.5, 0.5)),
        (0, -90, (4.5, 4.25, 0), (0.75, 0.375)),
    ],
)
def test_projection(heading, pitch, place, expected):
    camera = Camera(4, 4, 1, heading, pitch, 90)
    assert camera.project(place) == pytest.approx(expected)
    ray = camera.rays(np.array([expected[0]]), np.array([expected[1]]))[:, 0]
    offset = np.array(place) - (4, 4, 1)
    assert ray == pytest.approx(offset / np.linalg.norm(offset))
    assert camera.project((4 - offset[0], 4 - offset[1], 1 - offset[2])) is None


def test_the_nearer_hides_the_farther_in_whatever_order():
    camera = Camera(4, 1, 1, 0)
    near = Solid("box", (4, 3, 0.5), (0.4, 0.1, 0.5), RED, 1)
    far = Solid("ball", (4, 5, 0.7), (0.7, 0.7, 0.7), BLUE, 2)
    one, other = render(HALL, [near, far], camera, 80), render(HALL, [far, near], camera, 80)
    assert (one.ids == other.ids).all() and (one.colours == other.colours).all()
    alone = render(HALL, [far], camera, 80)
    assert one.whole[2] == alone.seen(2) > one.seen(2) > 0 and one.whole[1] == one.seen(1)
    assert one.seen(2) == ((alone.ids == 2) & (one.ids != 1)).sum()


def test_the_wall_meets_the_floor_where_it_must():
    camera, side = Camera(4, 2, 1.6, 0, -10), 300
    _, edge = camera.project((4, 8, 0))
    column = render(HALL, [], camera, side).colours[:, side // 2].astype(int)
    wall, floor = column[round(edge * side) - 3], column[round(edge * side) + 3]
    assert (wall == (np.array(HALL.walls) * 0.6 * 0.94 * 255).round()).all(), "the skirting"
    assert abs(floor - 255 * 0.6).max() <= 1 or abs(floor - 255 * 0.8).max() <= 1


def test_a_lit_surface_has_its_colour():
    view = render(HALL, [Solid("box", (4, 4, 0.5), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1)], Camera(4, 1, 2.5, 0, -30), 60)
    shades = {tuple(colour) for colour in view.colours[view.ids == 1].tolist()}
    (top, front) = (round(255 * 0.5 * (0.58 + 0.42 * light)) for light in (0.64, 0.6))
    assert {(top,) * 3, (front,) * 3} <= shades


def test_edges_are_smooth_and_nothing_else_changes():
    """A smooth pixel is the mean of the four that a picture of twice the side has in its place."""
    camera = Camera(4, 0.8, 1.6, 0, -15)
    smooth, rough = render(HALL, EACH, camera, 60), render(HALL, EACH, camera, 60, smooth=False)
    twice = render(HALL, EACH, camera, 120, smooth=False).colours.astype(float)
    mean = (twice[::2, ::2] + twice[::2, 1::2] + twice[1::2, ::2] + twice[1::2, 1::2]) / 4
    changed = (smooth.colours != rough.colours).any(axis=2)
    assert (smooth.ids == rough.ids).all() and (identify(EACH, camera, 60).ids == rough.ids).all()
    assert identify(EACH, camera, 60).whole == rough.whole == smooth.whole and 0.02 < changed.mean() < 0.5
    assert abs(smooth.colours - mean)[changed].max() <= 1
    edges = np.zeros_like(changed)
    edges[:, 1:] |= smooth.ids[:, 1:] != smooth.ids[:, :-1]
    assert changed[edges].mean() > 0.6, "the others lie wholly on one side"


# -- rooms -----------------------------------------------------------------------------------------------------------


def test_poses_are_those_of_complex_numbers():
    rng = random.Random(0)
    for _ in range(200):
        pose = Pose(rng.uniform(0, 8), rng.uniform(0, 8), rng.uniform(-180, 180))
        north = cmath.exp(-1j * math.radians(pose.heading)) * 1j
        spot = (rng.uniform(0, 8), rng.uniform(0, 8))
        way = complex(*spot) - complex(pose.x, pose.y)
        assert pose.bearing(spot) == pytest.approx(-math.degrees(cmath.phase(way / north)), abs=1e-6)
        assert pose.offset(spot) == pytest.approx(((way / north).real, -(way / north).imag), abs=1e-9)
        there = pose.step(1.5, -0.5)
        moved = complex(pose.x, pose.y) + north * (1.5 + 0.5j)
        assert (there.x, there.y) == pytest.approx((moved.real, moved.imag), abs=0.006)
        assert abs(facing((pose.x, pose.y), spot).bearing(spot)) <= 0.06
        assert -180 <= pose.turn(190).heading < 180


def test_shapes_stand_on_the_floor_below_the_eye_and_no_wider_than_they_may():
    for shape, parts in SHAPES.items():
        lowest = min(middle[2] - half[2] for _, middle, half, _ in parts)
        assert lowest == pytest.approx(0, abs=0.02), shape
        for form, middle, half, _ in parts:
            wide = half[:2] if form == "box" else (max(half[:2]), 0)
            assert math.hypot(*middle[:2]) + math.hypot(*wide) <= REACH + 0.15 and middle[2] + half[2] < 1.6 < HEIGHT


def test_things_keep_apart_and_have_names_of_their_own(scenes):
    for scene in scenes:
        camera, places = Pose(*scene["camera"]), [thing["at"] for thing in scene["things"]]
        assert all(math.dist(one, other) >= APART for one, other in combinations(places, 2))
        assert all(abs(camera.bearing(spot)) <= IN_VIEW + 0.5 for spot in places[:3])
        assert len({thing["colour"] for thing in scene["things"]}) == 6
        assert len({name_of(scene, i) for i in range(6)}) == 6
    assert {thing["shape"] for scene in scenes for thing in scene["things"]} == set(SHAPES)


def test_a_thing_is_seen_in_its_own_colour_where_it_is(scenes):
    for scene in scenes[:6]:
        pose = Pose(*scene["camera"])
        view = look(scene, pose, 112)
        for i in range(3):
            if not are_seen(scene, pose, (i,)):
                continue
            thing = scene["things"][i]
            seen = view.colours[view.ids == i + 1].mean(axis=0) / 255
            off = {colour: np.linalg.norm(seen / seen.max() - np.array(c) / max(c)) for colour, c in COLOURS.items()}
            if thing["shape"] != "person" and thing["colour"] != "black":
                off.pop("black")
                assert min(off, key=off.get) == thing["colour"]
            x, y = thing["at"]
            spot = Camera(pose.x, pose.y, 1.6, pose.heading, -15).project((x, y, 0.6))
            assert middle(view.ids, i + 1) == pytest.approx(spot, abs=0.11)


def test_what_is_hidden_small_or_aside_is_not_seen(scenes):
    shapes = zip(scenes[0]["things"], ("person", "ball"), strict=False)
    scene = {**scenes[0], "things": [{**thing, "shape": shape} for thing, shape in shapes]}
    camera = Pose(*scene["camera"])._replace(heading=0)
    places = {"before": camera.step(3), "behind": camera.step(4.5), "aside": camera.step(3, 3), "back": camera.step(-1)}
    for where in ("behind", "aside", "back"):
        moved = with_moved(with_moved(scene, 0, places["before"][:2]), 1, places[where][:2])
        assert are_seen(moved, camera, (0,)) and not are_seen(moved, camera, (1,))
        assert are_seen(moved, camera, (1,), without=0) == (where == "behind")


def test_from_above_north_is_up(scenes):
    for scene in scenes[:4]:
        view, camera = look_down(scene, 120)
        for i, thing in enumerate(scene["things"]):
            spot = camera.project((*thing["at"], 0.5))
            assert middle(view.ids, i + 1) == pytest.approx(spot, abs=0.04)
        south_to_north = sorted(range(6), key=lambda i: scene["things"][i]["at"][1])
        assert middle(view.ids, south_to_north[-1] + 1)[1] < middle(view.ids, south_to_north[0] + 1)[1]
