"""Decoding a list of prompts, or one of them as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mirage_vlm.decoding.config import EngineConfig, GenerationConfig, LatentHook, checked
from mirage_vlm.decoding.engine import Engine
from mirage_vlm.decoding.response import Event, Finished
from mirage_vlm.errors import MirageError, NoRoom
from mirage_vlm.formats.asked import Asked, as_prompts
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    import torch

    from mirage_vlm.modeling.latent_vlm import LatentVLM


def generate(
    vlm: LatentVLM,
    prompts: Asked | Iterable[Asked],
    config: GenerationConfig | None = None,
    engine: EngineConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Trajectory]:
    """Decode n responses to each prompt; what a trajectory already holds as a response is ignored.

    Args:
        prompts: trajectories, or conversations in any form of `mirage_vlm.formats.asked`; one alone is a list.
        progress: called with the number of responses that were finished.

    Returns:
        For each prompt in order, n times its trajectory with a decoded response (text and latent spans).

    Raises:
        MirageError: a picture cannot be read, or a prompt with its response would not fit the model's context or
            the engine's memory.
    """
    done: dict[int, Trajectory] = {}
    for finished in responses(vlm, prompts, config, engine):
        done |= finished
        if progress is not None:
            progress(len(finished))
    return [done[number] for number in sorted(done)]


def responses(
    vlm: LatentVLM,
    prompts: Asked | Iterable[Asked],
    config: GenerationConfig | None = None,
    engine: EngineConfig | None = None,
    refused: Callable[[int, MirageError], None] | None = None,
) -> Iterator[dict[int, Trajectory]]:
    """What `generate` returns, as it comes: after each step of the engine in which any finished, those by their place.

    Args:
        refused: called with the number of a prompt that cannot be decoded, and why; the others go on, with the seeds
            that they have in any case. None raises.

    Raises:
        MirageError: as `generate`.
    """
    config, prompts = checked(config, GenerationConfig, "config"), as_prompts(prompts)
    n = config.n
    seeds = list(config.seeds) if config.seeds is not None else [config.seed + i for i in range(n * len(prompts))]
    if len(seeds) != n * len(prompts):
        raise MirageError(f"got {len(seeds)} seeds for {n * len(prompts)} responses")
    was_training = vlm.training
    running = Engine(vlm, engine)
    if config.spans == "forced":
        running.marks.start(config.span_after)  # a wrong text is of the call, not of its first prompt
    submitted = 0
    taken: list[int] = []  # the prompt of each of the engine's requests
    if config.latent_hook is not None:
        config = replace(config, latent_hook=_of_prompts(config.latent_hook, taken, n))
    try:
        while submitted < len(prompts) or running.busy:
            # pictures are processed as they are needed: those of a long list would not fit in memory
            while submitted < len(prompts) and len(running.queue) < running.config.max_rows:
                own = replace(config, seeds=seeds[submitted * n : (submitted + 1) * n])
                try:
                    running.submit(prompts[submitted], own, quiet=True)
                    taken.append(submitted)
                except MirageError as fault:
                    if refused is None or isinstance(fault, NoRoom):
                        raise
                    refused(submitted, fault)
                submitted += 1
            ends = [event for event in running.step() if isinstance(event, Finished)]
            if ends:
                yield {taken[event.request] * n + event.sample: event.trajectory for event in ends}
    finally:
        vlm.train(was_training)


def _of_prompts(hook: LatentHook, taken: Sequence[int], n: int) -> LatentHook:
    """A hook that is told the places of responses among those of all prompts, though some prompts were not taken."""

    def placed(latents: torch.Tensor, responses: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        return hook(latents, [taken[i // n] * n + i % n for i in responses], steps)

    return placed


def stream(
    vlm: LatentVLM,
    prompt: Asked,
    config: GenerationConfig | None = None,
    engine: EngineConfig | None = None,
) -> Iterator[Event]:
    """Decode one prompt and yield what happens as it happens: text pieces, spans, latents, the end.

    Raises:
        MirageError: as `generate`.
    """
    was_training = vlm.training
    running = Engine(vlm, engine)
    try:
        running.submit(prompt, config)
        yield from running.run()
    finally:
        vlm.train(was_training)
