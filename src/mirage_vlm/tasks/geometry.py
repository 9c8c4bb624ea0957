r"""`geometry`: drawn figures with a question, after COMT (arXiv 2412.12932).

The helper image is the figure after the operation that the question needs: with a line added (`creation`), red sticks
taken away (`deletion`), the shape moved (`update`), or one shape chosen (`selection`).
"""

from __future__ import annotations

import random
import re
from functools import partial
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.base import STEP_BY_STEP, Score, Task, boxed, respond, shown
from mirage_vlm.tasks.choices import read_choice
from mirage_vlm.tasks.figures import KINDS, LETTERS, Figure
from mirage_vlm.trajectory import (
    Image,
    Message,
    Trajectory,
    assistant_turn,
    user_turn,
)


class Geometry(Task):
    """Four kinds of question, drawn at random and named in `meta["kind"]`; the figure is in `meta["figure"]`."""

    name = "geometry"
    needs = ("question",)
    styles = ("direct", "cot", "words", "plain", "shown")
    sizes = range(1, 5)
    usual = (1, 2, 3, 4)

    def make(self, rng: random.Random, level: int, style: str = "direct", cell: int = 64) -> Trajectory:
        self.check_style(style)
        kind = KINDS[rng.choice(list(KINDS))]
        return self.example(kind.name, kind.make(rng, level), style, cell, level=level)

    def example(self, kind: str, figure: Figure, style: str, cell: int = 64, **meta: Any) -> Trajectory:
        """The example of one figure."""
        made = KINDS[kind]
        answer = made.solve(figure)
        helper = Image(partial(made.draw, figure, cell, True))
        picture = Image(partial(made.draw, figure, cell))
        before, after = made.think(figure)
        return Trajectory(
            messages=(
                *self.prompt(picture, style, question=made.ask(figure), helper=helper),
                assistant_turn(*respond(style, before, helper, after, answer)),
            ),
            task=self.name,
            answer=answer,
            meta={"kind": kind, "figure": dict(figure), "style": style, **meta},
        )

    def prompt(self, image: Image, style: str = "direct", **details: Any) -> tuple[Message, ...]:
        """The prompt; it needs the detail `question`, and with the style `shown` also `helper`, a picture."""
        self.check_style(style)
        question = str(details.get("question", "")).strip()
        if not question:
            raise MirageError(f"{self.name} needs a question")
        return (
            user_turn(image, *shown(style, details), question + (STEP_BY_STEP if style in ("cot", "words") else "")),
        )

    def key(self, trajectory: Trajectory) -> str:
        kind, figure = self._figure(trajectory)
        return f"{kind}/{sorted(figure.items())}"

    def score(self, trajectory: Trajectory) -> Score:
        """Compared with the answer that is computed from `meta`'s figure, never with `answer`."""
        kind, figure = self._figure(trajectory)
        try:
            truth = KINDS[kind].solve(figure)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:
            raise MirageError(f"cannot score: the figure in meta is not whole: {fault!r}") from fault
        if truth in LETTERS:
            choice = read_choice(trajectory.text, dict.fromkeys(LETTERS, ""))
            said, reason = choice.letter, choice.reason
        else:
            content = boxed(trajectory.text)
            whole = re.fullmatch(r"\s*(\d{1,300})\s*\.?\s*", content or "")
            said = None if whole is None else str(int(whole[1]))
            reason = r"no answer in \boxed{}" if content is None else rf"\boxed{{{content[:40]}}} is not a number"
        if said is None:
            return Score(False, False, None, reason)
        correct = said == truth
        return Score(correct, True, None, f"{said} is right" if correct else f"{said} is wrong: it is {truth}")

    @staticmethod
    def _figure(trajectory: Trajectory) -> tuple[str, Figure]:
        kind, figure = trajectory.meta.get("kind"), trajectory.meta.get("figure")
        if not isinstance(kind, str) or kind not in KINDS or not isinstance(figure, dict):
            raise MirageError('cannot score: the example has no "kind" and "figure" in its meta')
        return kind, figure


GEOMETRY = Geometry()
