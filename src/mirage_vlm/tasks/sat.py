r"""`sat`: questions about rendered rooms that want a change of view in mind, after SAT (arXiv 2412.07755).

The helper image is what one would like to see: the view after the turn or the steps, the view from another's place,
the moved thing with its old place, the camera's two poses from above.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import partial
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.base import STEP_BY_STEP, Score, Task, respond, shown
from mirage_vlm.tasks.choices import score_letter
from mirage_vlm.tasks.rooms import Scene, draw_view
from mirage_vlm.tasks.spatial import KINDS
from mirage_vlm.trajectory import Image, Message, Trajectory, assistant_turn, user_turn

LETTERS = "AB"
PIXELS = 4  # a picture's side, in cells


class Sat(Task):
    """Five kinds of question, drawn at random and named in `meta["kind"]`; the scene is in `meta["scene"]`.

    There are one or two pictures and two choices. `cell` is a quarter of a picture's side.
    """

    name = "sat"
    needs = ("question", "choices")
    styles = ("direct", "cot", "words", "plain", "shown")
    sizes = range(1, 5)
    usual = (1, 2, 3, 4)

    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        self.check_style(style)
        kind = KINDS[rng.choice(list(KINDS))]
        return self.example(kind.name, kind.make(rng, level), style, cell, level=level)

    def example(self, kind: str, scene: Scene, style: str, cell: int = 64, **meta: Any) -> Trajectory:
        """The example of one scene."""
        asked, side = KINDS[kind], PIXELS * cell
        answer = LETTERS[scene["choices"].index(asked.truth(scene))]
        pictures = [Image(partial(draw_view, scene, i, side)) for i in range(2 if "then" in scene else 1)]
        helper = Image(partial(asked.helper, scene, side))
        details: dict[str, Any] = {"question": asked.ask(scene), "choices": scene["choices"], "helper": helper}
        if len(pictures) > 1:
            details["after"] = pictures[1]
        before, read = asked.think(scene)
        return Trajectory(
            messages=(
                *self.prompt(pictures[0], style, **details),
                assistant_turn(*respond(style, before, helper, f"{read} It is {answer}.", answer)),
            ),
            task=self.name,
            answer=answer,
            meta={"kind": kind, "scene": dict(scene), "style": style, **meta},
        )

    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        """The prompt; its details are `question`, two `choices`, of two pictures the second as `after`, and with the
        style `shown` also `helper`, a picture.
        """
        self.check_style(style)
        question, choices = str(details.get("question", "")).strip(), details.get("choices")
        if not question:
            raise MirageError(f"{self.name} needs a question")
        if not isinstance(choices, list | tuple) or len(choices) != len(LETTERS):
            raise MirageError(f"{self.name} needs two choices, not {choices!r}")
        second = details.get("after")
        if second is not None and not isinstance(second, Image):
            raise MirageError(f"{self.name} takes a picture as 'after', not {second!r}")
        listed = ", ".join(f"{letter}: {words}" for letter, words in zip(LETTERS, choices, strict=True))
        text = f"{question} {listed}. " + r"Answer with A or B in \boxed{}."
        return (
            user_turn(
                image,
                *(() if second is None else (second,)),
                *shown(style, details),
                text + (STEP_BY_STEP if style in ("cot", "words") else ""),
            ),
        )

    def key(self, trajectory: Trajectory) -> str:
        kind, scene = _scene_of(trajectory.meta)
        return f"{kind}/{json.dumps(scene, sort_keys=True)}"

    def score(self, trajectory: Trajectory) -> Score:
        """Compared with what follows from the places and poses in `meta`, never with `answer`."""
        kind, scene = _scene_of(trajectory.meta)
        try:
            truth = LETTERS[scene["choices"].index(KINDS[kind].truth(scene))]
            choices = {letter: str(words) for letter, words in zip(LETTERS, scene["choices"], strict=True)}
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:
            raise MirageError(f"cannot score: the scene in meta is not whole: {fault!r}") from fault

        def named(letter: str) -> str:
            return f"{letter} ({choices[letter]})"

        return score_letter(trajectory.text, choices, truth, named, named)


def _scene_of(meta: Mapping[str, Any]) -> tuple[str, Scene]:
    kind, scene = meta.get("kind"), meta.get("scene")
    if not isinstance(kind, str) or kind not in KINDS or not isinstance(scene, dict):
        raise MirageError('cannot score: the example has no "kind" and "scene" in its meta')
    return kind, scene


SAT = Sat()
