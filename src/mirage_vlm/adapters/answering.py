"""Answering the requests of a harness by one engine, and what its answers' latent spans did."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirage_vlm import __version__
from mirage_vlm.adapters.messages import ModelArgs, first_stop, shown
from mirage_vlm.decoding import Engine, Finished, GenerationConfig, TextPiece
from mirage_vlm.errors import MirageError
from mirage_vlm.formats import atomic_writer
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.trajectory import Message, Trajectory

SAVE_EVERY = 100  # answers


@dataclass(frozen=True)
class Request:
    """A question of a harness.

    Attributes:
        name: what it is of (task, document …), as JSON can hold it; errors and statistics name it so.
        messages: the conversation up to the answer.
        config: how to decode.
        stops: the answer ends before the first of these in its text.
        ignored: settings that the harness asked for and that mean nothing here.
    """

    name: Mapping[str, Any]
    messages: tuple[Message, ...]
    config: GenerationConfig
    stops: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A finished response.

    Attributes:
        text: up to the first stop string.
        trajectory: all that was decoded.
        prompt_tokens: length of the prompt, pictures included.
        finish_reason: `stop`, `length`, or `stop_string`.
    """

    text: str
    trajectory: Trajectory
    prompt_tokens: int
    finish_reason: str

    @property
    def latents(self) -> int:
        """Latent tokens that were consumed."""
        return sum(span.k or 0 for span in self.trajectory.spans)

    @property
    def tokens(self) -> int:
        """Tokens that were decoded, latents included."""
        assert self.trajectory.decoding is not None
        return len(self.trajectory.decoding.token_ids)


class Answering:
    """An engine whose responses end at their stop strings.

    Args:
        vlm: the model.
        args: the user's arguments.
        statistics: told of every answer.
    """

    def __init__(self, vlm: LatentVLM, args: ModelArgs, statistics: Statistics):
        self.engine = Engine(vlm, args.engine())
        self.mark, self.statistics = args.mark, statistics
        self._asked: dict[int, tuple[Request, int]] = {}  # with the length of the prompt
        self._said: dict[int, str] = {}  # text so far, of those with stop strings

    @property
    def full(self) -> bool:
        """Whether a further request would only wait, with its pictures in memory."""
        return len(self.engine.queue) >= self.engine.config.max_rows

    def submit(self, request: Request) -> int:
        """Put a request into the engine's queue; returns its number.

        Raises:
            MirageError: it cannot be answered; the message names it.
        """
        try:
            number = self.engine.submit(request.messages, request.config, quiet=not request.stops)
        except MirageError as fault:
            raise MirageError(f"{', '.join(f'{k} {v}' for k, v in request.name.items())}: {fault}") from fault
        self._asked[number] = request, len(self.engine.queue[-1].prompt.ids)
        if request.stops:
            self._said[number] = ""
        return number

    def step(self) -> dict[int, Answer]:
        """Move all on by a step; those that are finished, by number."""
        done: dict[int, Answer] = {}
        for event in self.engine.step():
            if isinstance(event, TextPiece):
                self._said[event.request] += event.text
                if first_stop(self._said[event.request], self._asked[event.request][0].stops) is not None:
                    self.engine.cancel(event.request)
            elif isinstance(event, Finished):
                request, length = self._asked.pop(event.request)
                self._said.pop(event.request, None)
                text, stopped = shown(event.trajectory, request.stops, self.mark)
                assert event.trajectory.decoding is not None
                reason = "stop_string" if stopped else event.trajectory.decoding.finish_reason
                done[event.request] = answer = Answer(text, event.trajectory, length, reason)
                self.statistics.add(request, answer)
        return done


def answer_all(
    vlm: LatentVLM,
    requests: Iterable[Request],
    args: ModelArgs,
    statistics: Statistics,
    progress: Callable[[int], object] | None = None,
) -> list[Answer]:
    """Answer requests by one engine, each decoded by its own settings; they are made as there is room for them.

    Args:
        progress: called with the number of answers that were finished.

    Returns:
        The answers, in the order of the requests.

    Raises:
        MirageError: a request cannot be answered.
    """
    running = Answering(vlm, args, statistics)
    coming = iter(requests)
    done: dict[int, Answer] = {}
    more = True
    while more or running.engine.busy:
        while more and not running.full:
            request = next(coming, None)
            if request is None:
                more = False
            else:
                running.submit(request)
        finished = running.step()
        done |= finished
        if finished and progress is not None:
            progress(len(finished))
    return [done[number] for number in sorted(done)]


def of_rank(path: str | Path, rank: int | str) -> Path:
    """The statistics of one of several processes: `spans.json` → `spans.rank0.json`."""
    path = Path(path)
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


class Statistics:
    """What became of each request: spans, latents, tokens, and how it ended.

    Args:
        args: the user's arguments, which are written down too.
        path: a JSON file, written now and then and by `save`; None keeps all in memory.
    """

    def __init__(self, args: ModelArgs, path: str | Path | None = None):
        self.args, self.path = args, None if path is None else Path(path)
        self.requests: list[dict[str, Any]] = []
        self.ignored: set[str] = set()
        self._lock = threading.Lock()

    def add(self, request: Request, answer: Answer) -> None:
        """Note an answer.

        Raises:
            MirageError: the file cannot be written.
        """
        found = {
            **request.name,
            "spans": len(answer.trajectory.spans),
            "latents": answer.latents,
            "tokens": answer.tokens - answer.latents,
            "prompt_tokens": answer.prompt_tokens,
            "finish_reason": answer.finish_reason,
        }
        with self._lock:
            self.requests.append(found)
            self.ignored |= set(request.ignored)
        if len(self.requests) % SAVE_EVERY == 0:
            self.save()

    def summary(self) -> dict[str, Any]:
        """All requests together, and each task's where there are several."""
        with self._lock:
            found = list(self.requests)
        tasks = sorted({str(item.get("task")) for item in found})
        whole = _measures(found)
        if len(tasks) > 1:
            whole["by_task"] = {task: _measures([r for r in found if str(r.get("task")) == task]) for task in tasks}
        return whole

    def save(self) -> None:
        """Write the file, where there is one.

        Raises:
            MirageError: it cannot be written.
        """
        if self.path is None:
            return
        value = {
            "mirage_vlm": __version__,
            "model_args": asdict(self.args),
            "summary": self.summary(),
            "ignored_settings": sorted(self.ignored),
            "requests": self.requests,
        }
        with atomic_writer(self.path) as file:
            file.write(json.dumps(value, indent=2).encode() + b"\n")


def _measures(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares and means, by the names that `mirage eval` gives them."""
    n = len(found)
    if n == 0:
        return {"n": 0}
    return {
        "n": n,
        "latent_rate": sum(item["latents"] > 0 for item in found) / n,
        "cut_rate": sum(item["finish_reason"] == "length" for item in found) / n,
        **{f"{name}_per_response": sum(item[name] for item in found) / n for name in ("spans", "latents", "tokens")},
    }
