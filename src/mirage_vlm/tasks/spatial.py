"""Questions about rooms that want a change of view in mind, of the kinds of SAT (arXiv 2412.07755).

Each question's words, choices and answer are drawn first, and a room is sought in which that answer is right: the words
say nothing of it.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import PIL.Image

from mirage_vlm.tasks.rooms import (
    FOV,
    IN_VIEW,
    Pose,
    Scene,
    after,
    ahead_of,
    are_seen,
    can_stand,
    draw_moved,
    draw_poses,
    facing,
    furnish,
    is_free,
    later,
    look,
    name_of,
    outline,
    places,
    scatter,
    wrap,
)

SIDES = ("left", "right")
SIGNS = {"left": -1, "right": 1}
DEGREES = (0, 12, 9, 6, 4)  # by level, how far from the decision an angle is at least
RATIO = (0, 1.5, 1.35, 1.25, 1.18)  # and how many times nearer the nearer of two things is


class Kind(ABC):
    """A kind of question. A scene has, beside the room and what is in it, `ask` (what is asked) and two `choices`."""

    name: str
    asked: int  # how many things the camera must have before it; they come first
    without: int | None = None  # the thing from whose place one would like to see, which is not seen from there

    @abstractmethod
    def draw(self, rng: random.Random, level: int) -> dict[str, Any]:
        """A room without places, `ask` and the `choices`, in whatever order."""

    @abstractmethod
    def stage(self, rng: random.Random, scene: dict[str, Any], level: int) -> dict[str, Any] | None:
        """The scene with all that happens in it; None where it cannot or the answer would be doubtful."""

    @abstractmethod
    def ask(self, scene: Scene) -> str:
        """The question, without its choices."""

    @abstractmethod
    def truth(self, scene: Scene) -> str:
        """The right choice, computed from places and poses."""

    @abstractmethod
    def think(self, scene: Scene) -> tuple[str, str]:
        """What is said before the helper image, and what is read off it."""

    def goal(self, scene: Scene) -> Pose:
        """From where one would like to see."""
        return later(scene)

    def helper(self, scene: Scene, side: int) -> PIL.Image.Image:
        """The helper image: the view from there."""
        return PIL.Image.fromarray(look(scene, self.goal(scene), side, self.without).colours)

    def make(self, rng: random.Random, level: int) -> dict[str, Any]:
        """A fresh scene; higher levels have more things and are closer to the decision."""
        frame = self.draw(rng, level)
        frame["choices"] = rng.sample(frame["choices"], 2)
        wanted = rng.choice(frame["choices"])
        while True:
            scattered = scatter(rng, frame, self.asked)
            scene = None if scattered is None else self.stage(rng, {**scattered, "wanted": wanted}, level)
            if scene is not None and self.truth(scene) == scene.pop("wanted") and self.is_shown(scene):
                return scene

    def is_shown(self, scene: Scene) -> bool:
        """Whether what is asked about can be seen in the pictures."""
        asked = range(self.asked)
        return are_seen(scene, Pose(*scene["camera"]), asked) and are_seen(after(scene), self.goal(scene), asked)


class CameraMoved(Kind):
    """How did the camera move between two views?"""

    name = "egocentric movement"
    asked = 2
    MOVES: ClassVar = {  # signs of the steps ahead and to the right, and of the turn to the right
        "turned left": (0, 0, -1),
        "turned right": (0, 0, 1),
        "moved forward": (1, 0, 0),
        "moved back": (-1, 0, 0),
        "moved left": (0, -1, 0),
        "moved right": (0, 1, 0),
        "moved forward and turned left": (1, 0, -1),
        "moved forward and turned right": (1, 0, 1),
        "moved back and turned left": (-1, 0, -1),
        "moved back and turned right": (-1, 0, 1),
    }
    PAIRS = (  # of the first three at low levels
        ("turned left", "turned right"),
        ("moved forward", "moved back"),
        ("moved left", "moved right"),
        ("turned left", "moved left"),
        ("turned right", "moved right"),
        ("moved forward and turned left", "moved forward and turned right"),
        ("moved back and turned left", "moved back and turned right"),
    )
    TURNS = ((0, 0), (22, 30), (17, 24), (12, 18), (9, 14))  # by level, from and to
    STEPS = ((0, 0), (1.3, 1.7), (1.1, 1.4), (0.9, 1.2), (0.7, 1.0))

    def draw(self, rng: random.Random, level: int) -> dict[str, Any]:
        pair = rng.choice(self.PAIRS[: 3 if level < 3 else None])
        return {**furnish(rng, level + 2), "ask": {}, "choices": list(pair)}

    def stage(self, rng: random.Random, scene: dict[str, Any], level: int) -> dict[str, Any] | None:
        ahead, right, turn = self.MOVES[scene["wanted"]]
        step, degrees = rng.uniform(*self.STEPS[level]), rng.uniform(*self.TURNS[level])
        moved = Pose(*scene["camera"]).step(ahead * step, right * step).turn(turn * degrees)
        return {**scene, "then": {"camera": list(moved)}} if can_stand(scene, moved) else None

    def ask(self, scene: Scene) -> str:
        return "The second picture was taken after the camera moved. Nothing else did. How did the camera move?"

    def truth(self, scene: Scene) -> str:
        before, now = Pose(*scene["camera"]), later(scene)
        ahead, right = before.offset((now.x, now.y))
        signs = (_sign(ahead, 0.2), _sign(right, 0.2), _sign(wrap(now.heading - before.heading), 3))
        return {found: words for words, found in self.MOVES.items()}[signs]

    def think(self, scene: Scene) -> tuple[str, str]:
        return "From above, the first view in blue and the second in red:", f"The camera {self.truth(scene)}."

    def helper(self, scene: Scene, side: int) -> PIL.Image.Image:
        return draw_poses(scene, [(Pose(*scene["camera"]), "#1f5fd0"), (later(scene), "#d1242f")], side)


class ThingMoved(Kind):
    """Which thing moved between two views, or where to?"""

    name = "object movement"
    asked = 2
    WAYS = (0, 1.5, 1.2, 0.9, 0.7)  # metres by level, at least

    def draw(self, rng: random.Random, level: int) -> dict[str, Any]:
        frame = furnish(rng, level + 2)
        about = rng.choice(("which", "side", "depth"))
        choices = {
            "which": [name_of(frame, 0), name_of(frame, 1)],
            "side": list(SIDES),
            "depth": ["nearer to the camera", "away from the camera"],
        }
        return {**frame, "ask": {"about": about}, "choices": choices[about]}

    def stage(self, rng: random.Random, scene: dict[str, Any], level: int) -> dict[str, Any] | None:
        about, camera = scene["ask"]["about"], Pose(*scene["camera"])
        i = int(about == "which" and scene["wanted"] == name_of(scene, 1))
        here, there = places(scene)[i], ahead_of(rng, camera)
        others = [spot for j, spot in enumerate(places(scene)) if j != i]
        aside = abs(camera.bearing(there) - camera.bearing(here))
        far = sorted((camera.distance(here), camera.distance(there)))
        way = facing(here, there).distance(there)
        clear = {
            "which": 0 <= way - self.WAYS[level] <= 1.2 and (aside > 5 or far[1] > RATIO[level] * far[0]),
            "side": aside >= DEGREES[level] and far[1] < 1.2 * far[0],
            "depth": far[1] >= RATIO[level] * far[0] and aside < 5,
        }
        if not clear[about] or not is_free(scene, there, others, camera):
            return None
        turned = camera
        if about == "which" and level > 2:  # so that the pictures cannot be told apart point by point
            turned = camera.turn(rng.choice((-1, 1)) * rng.uniform(4, 10))
        return {**scene, "then": {"thing": i, "at": list(there), "camera": list(turned)}}

    def ask(self, scene: Scene) -> str:
        about = scene["ask"]["about"]
        if about == "which":
            camera = "" if scene["then"]["camera"] == scene["camera"] else ", and the camera turned a little"
            return f"One thing was moved between the two pictures{camera}. Which?"
        where = "To which side" if about == "side" else "Which way"
        return f"The {name_of(scene, 0)} was moved between the two pictures. {where}, as the camera sees it?"

    def truth(self, scene: Scene) -> str:
        about, camera, i = scene["ask"]["about"], Pose(*scene["camera"]), scene["then"]["thing"]
        here, there = places(scene)[i], scene["then"]["at"]
        if about == "which":
            return name_of(scene, i)
        if about == "side":
            return SIDES[camera.bearing(there) > camera.bearing(here)]
        return "nearer to the camera" if camera.distance(there) < camera.distance(here) else "away from the camera"

    def think(self, scene: Scene) -> tuple[str, str]:
        words = self.truth(scene)
        said = f"the {words} moved" if scene["ask"]["about"] == "which" else f"the {name_of(scene, 0)} moved {words}"
        return "What moved, and faintly where it was:", f"So {said}."

    def helper(self, scene: Scene, side: int) -> PIL.Image.Image:
        return draw_moved(scene, side)


class Goal(Kind):
    """To face a thing, turn which way, or how much?"""

    name = "goal aiming"
    asked = 1
    AMOUNTS = ((), ((10, 30),), ((8, 28), (10, 30)), ((10, 24), (16, 30)), ((8, 18), (14, 24), (20, 30)))

    def draw(self, rng: random.Random, level: int) -> dict[str, Any]:
        about = rng.choice(("side", "amount"))
        way, amounts = rng.choice(SIDES), rng.choice(self.AMOUNTS[level])
        choices = list(SIDES) if about == "side" else [f"{way} by {degrees} degrees" for degrees in amounts]
        ask = {"about": about} if about == "side" else {"about": about, "way": way, "amounts": list(amounts)}
        return {**furnish(rng, level + 2), "ask": ask, "choices": choices}

    def stage(self, rng: random.Random, scene: dict[str, Any], level: int) -> dict[str, Any] | None:
        camera, ask = Pose(*scene["camera"]), scene["ask"]
        bearing = camera.bearing(places(scene)[0])
        if ask["about"] == "side":
            clear = abs(bearing) >= DEGREES[level]
        else:
            clear = min(abs(bearing - SIGNS[ask["way"]] * amount) for amount in ask["amounts"]) <= 3
        return scene if clear else None

    def ask(self, scene: Scene) -> str:
        much = " and how much" if scene["ask"]["about"] == "amount" else ""
        return f"You want to look straight at the {name_of(scene, 0)}. Which way{much} do you turn?"

    def truth(self, scene: Scene) -> str:
        bearing, ask = Pose(*scene["camera"]).bearing(places(scene)[0]), scene["ask"]
        if ask["about"] == "side":
            return SIDES[bearing > 0]
        amount = min(ask["amounts"], key=lambda degrees: abs(bearing - SIGNS[ask["way"]] * degrees))
        return f"{ask['way']} by {amount} degrees"

    def think(self, scene: Scene) -> tuple[str, str]:
        thing = name_of(scene, 0)
        return f"Looking straight at the {thing}, the view is:", f"That is a turn to the {self.truth(scene)}."

    def goal(self, scene: Scene) -> Pose:
        camera = Pose(*scene["camera"])
        return camera.turn(camera.bearing(places(scene)[0]))


class Action(Kind):
    """After a turn or some steps, what does one see where?"""

    name = "action consequence"
    asked = 2

    def draw(self, rng: random.Random, level: int) -> dict[str, Any]:
        frame = furnish(rng, level + 2)
        about, sign = rng.choice(("side", "order", "seen")), rng.choice((-1, 1))
        ask: dict[str, Any] = {"about": about}
        if about == "seen":
            ask["steps"] = [["turn", sign * rng.choice((40, 45, 50))]]
        elif about == "order":
            ask["steps"] = [["aside", sign * rng.choice((1.5, 2.0))]]
            ask["swaps"] = rng.random() < 0.5  # lest the order now be that then
        elif level > 2 and rng.random() < 0.5:
            ask["steps"] = [["turn", sign * 10], ["ahead", 1.0]]
        elif rng.random() < 0.5:
            ask["steps"] = [["aside", sign * rng.choice((1.0, 1.5))]]
        else:
            ask["steps"] = [["turn", sign * rng.choice((10, 15, 20) if level < 3 else (10, 15, 20, 25))]]
        return {**frame, "ask": ask, "choices": ["yes", "no"] if about == "seen" else list(SIDES)}

    def stage(self, rng: random.Random, scene: dict[str, Any], level: int) -> dict[str, Any] | None:
        ask, goal = scene["ask"], self.goal(scene)
        one, other = places(scene)[:2]
        bearing, then = abs(goal.bearing(one)), goal.bearing(one) - goal.bearing(other)
        now = Pose(*scene["camera"]).bearing(one) - Pose(*scene["camera"]).bearing(other)
        seen = bearing <= IN_VIEW
        clear = {
            "side": seen and bearing >= DEGREES[level],
            "order": min(abs(then) / DEGREES[level], abs(now) / 4) >= 1 and (now * then < 0) == ask.get("swaps"),
            "seen": seen or bearing > FOV / 2 + DEGREES[level],
        }
        return scene if clear[ask["about"]] and can_stand(scene, goal) else None

    def is_shown(self, scene: Scene) -> bool:
        asked, goal = (0, 1) if scene["ask"]["about"] == "order" else (0,), self.goal(scene)
        if not are_seen(scene, Pose(*scene["camera"]), asked):
            return False
        return not outline(scene, goal, 56).whole[1] if self.truth(scene) == "no" else are_seen(scene, goal, asked)

    def goal(self, scene: Scene) -> Pose:
        pose = Pose(*scene["camera"])
        for verb, amount in scene["ask"]["steps"]:
            if verb == "turn":
                pose = pose.turn(amount)
            else:
                pose = pose.step(ahead=amount) if verb == "ahead" else pose.step(right=amount)
        return pose

    def steps(self, scene: Scene) -> str:
        """What is done, in words."""
        words = {
            "turn": "turn {way} by {size} degrees",
            "ahead": "walk {size} straight ahead",
            "aside": "step {size} to the {way} without turning",
        }
        told = []
        for verb, amount in scene["ask"]["steps"]:
            size = f"{abs(amount):g}"
            if verb != "turn":
                size += " metre" if size == "1" else " metres"
            told.append(words[verb].format(way=SIDES[amount > 0], size=size))
        return ", then ".join(told)

    def ask(self, scene: Scene) -> str:
        one, other = name_of(scene, 0), name_of(scene, 1)
        questions = {
            "side": f"Is the {one} then in the left or the right half of your view?",
            "order": f"Is the {one} then to the left or to the right of the {other}, as you see it?",
            "seen": f"Is the {one} then still in your view?",
        }
        return f"You {self.steps(scene)}. {questions[scene['ask']['about']]}"

    def truth(self, scene: Scene) -> str:
        about, goal = scene["ask"]["about"], self.goal(scene)
        one, other = (goal.bearing(spot) for spot in places(scene)[:2])
        if about == "seen":
            return "yes" if abs(one) < FOV / 2 else "no"
        return SIDES[one > (other if about == "order" else 0)]

    def think(self, scene: Scene) -> tuple[str, str]:
        words, one = self.truth(scene), name_of(scene, 0)
        said = {
            "side": f"The {one} is on the {words}.",
            "order": f"The {one} is to the {words} of the {name_of(scene, 1)}.",
            "seen": f"The {one} is {'' if words == 'yes' else 'not '}in view.",
        }
        return "The view is then:", said[scene["ask"]["about"]]


class Perspective(Kind):
    """From another's place, on which side is a thing?"""

    name = "perspective"
    asked = 3
    without = 0

    def draw(self, rng: random.Random, level: int) -> dict[str, Any]:
        shapes = ("person",) if rng.random() < 0.5 else ()
        # Who looks towards the camera sees its left on the right: as often as not, lest the picture's sides do.
        ask = {"towards": rng.random() < 0.5}
        return {**furnish(rng, level + 2, *shapes), "ask": ask, "choices": list(SIDES)}

    def stage(self, rng: random.Random, scene: dict[str, Any], level: int) -> dict[str, Any] | None:
        camera, pose = Pose(*scene["camera"]), self.goal(scene)
        bearing = abs(pose.bearing(places(scene)[2]))
        towards = abs(wrap(pose.heading - camera.heading)) > 90
        if not DEGREES[level] <= bearing <= IN_VIEW or towards != scene["ask"]["towards"]:
            return None
        scene["things"][0]["turned"] = pose.heading
        return scene

    def is_shown(self, scene: Scene) -> bool:
        there = are_seen(scene, self.goal(scene), (1, 2), self.without)
        return there and are_seen(scene, Pose(*scene["camera"]), range(3))

    def goal(self, scene: Scene) -> Pose:
        return facing(*places(scene)[:2])

    def ask(self, scene: Scene) -> str:
        one, other, third = (name_of(scene, i) for i in range(3))
        person = scene["things"][0]["shape"] == "person"
        where = f"you are the {one}, looking" if person else f"you stand at the {one} and look"
        return f"Imagine that {where} straight at the {other}. On which side of you is the {third}?"

    def truth(self, scene: Scene) -> str:
        return SIDES[self.goal(scene).bearing(places(scene)[2]) > 0]

    def think(self, scene: Scene) -> tuple[str, str]:
        before = f"From the {name_of(scene, 0)}, looking at the {name_of(scene, 1)}:"
        return before, f"The {name_of(scene, 2)} is on the {self.truth(scene)}."


def _sign(number: float, least: float) -> int:
    """-1, 0 or 1; what is smaller than `least` is 0."""
    return (number > least) - (number < -least)


KINDS: dict[str, Kind] = {kind.name: kind for kind in (CameraMoved(), ThingMoved(), Goal(), Action(), Perspective())}
