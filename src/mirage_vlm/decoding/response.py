"""A response in the making, on the host: what the device wrote down becomes events and, at the end, a trajectory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mirage_vlm.decoding.config import GenerationConfig
from mirage_vlm.decoding.marks import DONE
from mirage_vlm.trajectory import Decoding, LatentSpan, Segment, Text, Trajectory

if TYPE_CHECKING:
    from mirage_vlm.decoding.prompts import Prompt
    from mirage_vlm.modeling.latent_vlm import LatentVLM


@dataclass(frozen=True)
class Event:
    """Something that happened to a response.

    Attributes:
        request: what `Engine.submit` returned.
        sample: which of the request's n responses.
    """

    request: int
    sample: int


@dataclass(frozen=True)
class TextPiece(Event):
    """More text; all pieces together are the response's text."""

    text: str


@dataclass(frozen=True)
class SpanOpened(Event):
    """`latent_start` was written; its latents follow."""


@dataclass(frozen=True, eq=False)
class LatentConsumed(Event):
    """A latent was fed back; `vector` [D] where the request returns latents."""

    vector: torch.Tensor | None


@dataclass(frozen=True)
class SpanClosed(Event):
    """`latent_end` was written after so many latents."""

    latents: int


@dataclass(frozen=True)
class Finished(Event):
    """The response is complete; `trajectory.decoding.finish_reason` says why."""

    trajectory: Trajectory


@dataclass(eq=False)
class Response:
    """One response: its request, its place in the cache, and what it has said.

    Attributes:
        index: of the response in its call, for hooks.
        blocks: cache blocks of its own positions, in order.
        reserved: blocks it may come to need.
        tokens, chances, spans: what was written so far, how likely it was, and the latents of each span.
        thinking: the token chosen last is a latent that was not consumed yet.
        evicted: the prompt's pictures are out of its sight.
        mark: state of `Marks` in which it begins.
        held: text tokens whose text was not given out yet.
        quiet: tell nothing but the end: pieces of text cost the host more than anything else it does.
    """

    vlm: LatentVLM
    config: GenerationConfig
    request: int
    sample: int
    index: int
    seed: int
    prompt: Prompt
    replay: Trajectory | None = None
    blocks: list[int] = field(default_factory=list)
    reserved: int = 0
    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    spans: list[list[torch.Tensor | None]] = field(default_factory=list)
    finish_reason: str = ""
    stop_id: int | None = None
    thinking: bool = False
    evicted: bool = False
    mark: int = DONE
    held: list[int] = field(default_factory=list)
    quiet: bool = False

    def consumed(self, vector: torch.Tensor | None) -> list[Event]:
        """A latent was fed back; `vector` [D] where it is kept."""
        self.thinking = False
        if vector is not None and self.config.latent_dtype == "float32":
            vector = vector.float()
        self.spans[-1].append(vector)
        return [] if self.quiet else [LatentConsumed(self.request, self.sample, vector)]

    def wrote(self, entry: int, chance: float) -> list[Event]:
        """Take an entry of the device's log (see `Chooser`)."""
        latent = self.vlm.config
        self.chances.append(chance)
        if entry <= -2:
            self.stop_id = -2 - entry
            return []
        self.tokens.append(entry)
        events: list[Event] = []
        if entry == latent.start_id:
            events = [*self._piece(whole=True), SpanOpened(self.request, self.sample)]
            self.spans.append([])
        elif entry == latent.end_id:
            self.evicted = bool(self.config.evict_images)
            events = [SpanClosed(self.request, self.sample, len(self.spans[-1]))]
        elif entry == latent.pad_id:
            self.thinking = True
        elif not self.quiet:
            self.held.append(entry)
            events = self._piece(whole=False)
        return [] if self.quiet else events

    def finish(self, reason: str) -> list[Event]:
        """The last events."""
        if self.thinking:  # cancelled before it was consumed
            self.tokens.pop()
            self.chances.pop()
        self.finish_reason = reason
        return [*self._piece(whole=True), Finished(self.request, self.sample, self.trajectory())]

    def _piece(self, whole: bool) -> list[Event]:
        """Text of the tokens held back, as soon as it cannot change by what follows."""
        if not self.held:
            return []
        text = self.vlm.tokenizer.decode(self.held, skip_special_tokens=True)
        if not whole and text.endswith("\N{REPLACEMENT CHARACTER}"):  # part of a character
            return []
        self.held.clear()
        return [TextPiece(self.request, self.sample, text)] if text else []

    def trajectory(self) -> Trajectory:
        """The prompt with what was decoded."""
        chances = None
        if self.config.logprobs:
            chances = tuple(None if math.isnan(chance) else chance for chance in self.chances)
        decoding = Decoding(tuple(self.tokens), self.finish_reason, chances, self.stop_id)
        return self.prompt.source.with_response(tuple(self._segments()), decoding)

    def _segments(self) -> Iterator[Segment]:
        latent = self.vlm.config
        spans = iter(self.spans)
        text: list[int] = []
        for token in [*self.tokens, latent.start_id]:  # a last one to flush the text
            if token == latent.start_id:
                if piece := self.vlm.tokenizer.decode(text, skip_special_tokens=True):
                    yield Text(piece)
                text = []
                if (vectors := next(spans, None)) is not None:
                    kept = [vector for vector in vectors if vector is not None]
                    yield LatentSpan(k=len(vectors), latents=torch.stack(kept) if kept else None)
            elif token not in (latent.pad_id, latent.end_id):
                text.append(token)
