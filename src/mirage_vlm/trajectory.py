"""Trajectories: the one object that data files, collators, decoding and reports all speak of.

A trajectory is a conversation whose messages are lists of segments: text, image, latent span. In training data
a latent span names its helper image; in a decoded trajectory it holds the k latent vectors. Files are read and
written by `mirage_vlm.formats`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import PIL.Image

from mirage_vlm import pictures
from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    import torch


T = TypeVar("T")
Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of a picture's width and height
Region = tuple[float, ...]  # one box, or several one after the other


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True)
class Image:
    """A picture: a path, a file, http(s) or data URL, a PIL image, an array, a file's bytes, or a function that draws.

    Drawing functions keep synthetic data sets small: nothing is rendered before `load` is called.

    Attributes:
        source: where the picture comes from.
        reading: for training a base that is to see: one word for each merged patch in raster order, which the decoder
            learns to say at that patch's position. Each must be a single token.
    """

    source: pictures.Source
    reading: tuple[str, ...] | None = None

    def load(self) -> PIL.Image.Image:
        """The picture as people see it: upright, in RGB, on white where it is transparent; see `mirage_vlm.pictures`.

        Raises:
            MirageError: it cannot be found, fetched or decoded, or is of a kind that is not understood.
        """
        return self._guarded(lambda: pictures.load(self.source))

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the upright picture; of a file only the head is read.

        Raises:
            MirageError: as `load`.
        """
        return self._guarded(lambda: pictures.size(self.source))

    def _guarded(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except (OSError, ValueError, http.client.HTTPException, PIL.Image.DecompressionBombError) as fault:
            raise MirageError(f"cannot read the picture {self}: {fault}") from fault

    def __str__(self) -> str:
        if isinstance(self.source, str | Path):
            name = str(self.source)
            embedded = name.startswith("data:") and len(name) > 80  # a path is never cut: who reads it will look there
            return name[:77] + "..." if embedded else name
        return "(in memory)"


@dataclass(frozen=True, eq=False)
class LatentSpan:
    """A span of k latent tokens in a response.

    Attributes:
        helper: the helper image whose compressed features are the targets of the latents (training data).
        k: number of latent tokens; None leaves it to the model's `latent_size`, or to the number of regions.
        regions: one for each latent, whose target is what that part of the picture shows: a box (left, top, right,
            bottom in fractions of the picture), or several, one after the other in the same tuple, of which the latent
            is to be the mean. None pools the whole picture.
        latents: [k, D] the latent vectors that were consumed (decoded trajectories).
    """

    helper: Image | None = None
    k: int | None = None
    regions: tuple[Region, ...] | None = None
    latents: torch.Tensor | None = None


Segment = Text | Image | LatentSpan


@dataclass(frozen=True)
class Message:
    """One turn: a role (`system`, `user` or `assistant`) and its segments in order."""

    role: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Decoding:
    """What the decoder adds to a trajectory.

    Attributes:
        token_ids: the response's tokens, latent positions as `latent_pad`, without the end-of-turn token.
        finish_reason: `stop` (end of turn), `length` (a limit was reached), `cancelled`, or `error` (of a row of an
            evaluation that could not be decoded).
        logprobs: where asked for, the log-probability of each token under the model's logits / temperature (1 when
            greedy) among the tokens that could be chosen there, None where there was no choice (within a span, and
            where one was forced); with finish reason `stop` one more, of the end-of-turn token.
        stop_id: the end-of-turn token, with finish reason `stop`.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float | None, ...] | None = None
    stop_id: int | None = None


@dataclass(frozen=True)
class Trajectory:
    """A conversation with pictures and latent spans, and what is known of it.

    Attributes:
        messages: the turns; the last is the assistant's where there is a response.
        task: name of the task whose checker scores the answer.
        answer: the reference answer, or several of which each is accepted.
        meta: anything JSON can hold (the map, its level, an id).
        decoding: set on trajectories that a model has decoded.
        where: the place that it was read from, such as `train.jsonl:3`, for messages; it is no part of what it says.
    """

    messages: tuple[Message, ...]
    task: str | None = None
    answer: str | tuple[str, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    decoding: Decoding | None = None
    where: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer", _accepted(self.answer))

    @property
    def answers(self) -> tuple[str, ...]:
        """The accepted answers; none where no answer is known."""
        return () if self.answer is None else (self.answer,) if isinstance(self.answer, str) else self.answer

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the response."""
        return self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages

    @property
    def response(self) -> tuple[Segment, ...]:
        """The segments of the final assistant turn; empty where there is none."""
        return self.messages[-1].segments if self.messages and self.messages[-1].role == "assistant" else ()

    @property
    def text(self) -> str:
        """The text of the response, spans left out."""
        return "".join(segment.text for segment in self.response if isinstance(segment, Text))

    @property
    def spans(self) -> tuple[LatentSpan, ...]:
        """The latent spans of the response."""
        return tuple(segment for segment in self.response if isinstance(segment, LatentSpan))

    def images(self) -> Iterator[Image]:
        """The pictures of the prompt, in order (helper images are not among them)."""
        for message in self.prompt:
            for segment in message.segments:
                if isinstance(segment, Image):
                    yield segment

    def with_response(self, segments: tuple[Segment, ...], decoding: Decoding | None = None) -> Trajectory:
        """The same prompt with another response."""
        messages = (*self.prompt, Message("assistant", segments))
        return replace(self, messages=messages, decoding=decoding)


Part = Segment | pictures.Source
"""What a turn may be made of: segments, strings (text), and pictures that are given as they are."""


def _accepted(answer: Any) -> str | tuple[str, ...] | None:
    """An answer as people give it, as texts: numbers, true and false as JSON writes them; one of a list is that one."""
    if isinstance(answer, list | tuple):
        several = tuple(_said(each) for each in answer)
        return several if len(several) > 1 else several[0] if several else None
    return None if answer is None else _said(answer)


def _said(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool | int | float):
        return json.dumps(answer)
    raise MirageError(f"an answer must be a text, a number, true or false, or a list of these, not {answer!r}")


def user_turn(*parts: Part) -> Message:
    """A user message. Strings become text; PIL pictures, arrays, paths and the bytes of a picture file become pictures.

    Raises:
        MirageError: a part is none of these.
    """
    return Message("user", tuple(_segment(part, "user_turn") for part in parts))


def assistant_turn(*parts: Part) -> Message:
    """An assistant message, as `user_turn`.

    Raises:
        MirageError: a part is none of these.
    """
    return Message("assistant", tuple(_segment(part, "assistant_turn") for part in parts))


def _segment(part: Any, turn: str) -> Segment:
    if isinstance(part, Text | Image | LatentSpan):
        return part
    if isinstance(part, str):
        return Text(part)
    if isinstance(part, PIL.Image.Image | Path | bytes):
        return Image(part)
    if isinstance(part, bytearray | memoryview):
        return Image(bytes(part))
    if pictures.is_array(part):
        try:
            return Image(pictures.from_array(part))
        except ValueError as fault:
            raise MirageError(f"{turn}: {fault}") from fault
    raise MirageError(
        f"{turn} takes text, pictures and latent spans, not {type(part).__name__}: "
        f'{turn}(Image("map.png"), "Which way?")'
    )
