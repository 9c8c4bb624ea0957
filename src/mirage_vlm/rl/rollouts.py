"""Rollouts: responses of the engine with everything that is needed to score them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from mirage_vlm.decoding import Engine, EngineConfig, Finished, GenerationConfig
from mirage_vlm.modeling.encoding import IGNORED, Encoded, Pictures
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM


@dataclass(frozen=True)
class Rollout:
    """A decoded response.

    Attributes:
        trajectory: the prompt with the response.
        prompt: [P] token ids.
        pictures: the prompt's, processed.
        completion: [C] token ids, latent positions as `latent_pad`, the end of turn among them.
        chances: [C] log-probabilities of chosen tokens, None where there was no choice.
        latents: [L, D] the vectors that were consumed, in order.
    """

    trajectory: Trajectory
    prompt: list[int]
    pictures: Pictures | None
    completion: list[int]
    chances: list[float | None]
    latents: torch.Tensor

    @property
    def encoded(self) -> Encoded:
        """As an example, with a label wherever a token was chosen."""
        ids = torch.tensor(self.prompt + self.completion)
        chosen = [IGNORED if c is None else t for t, c in zip(self.completion, self.chances, strict=True)]
        return Encoded(ids, torch.tensor([IGNORED] * len(self.prompt) + chosen), self.pictures, None)


def roll_out(
    vlm: LatentVLM,
    prompts: Sequence[Trajectory],
    config: GenerationConfig,
    seeds: Sequence[int],
    engine: EngineConfig | None = None,
) -> list[Rollout]:
    """A response to each prompt. Neighbours that are the same object are read once.

    Args:
        config: how to decode; log-probabilities and latents are kept whatever it says.
        seeds: of each response.

    Raises:
        MirageError: a picture cannot be read, or a prompt with its response does not fit.
    """
    training = vlm.training
    running = Engine(vlm, engine)
    found: dict[tuple[int, int], Trajectory] = {}
    places: list[tuple[int, int]] = []
    encoded: list[tuple[list[int], Pictures | None]] = []
    for _, same in groupby(range(len(prompts)), key=lambda i: id(prompts[i])):
        group = list(same)
        own = [seeds[i] for i in group]
        asked = replace(config, n=len(group), seeds=own, logprobs=True, return_latents=True)
        read = vlm.encoder.prompt(prompts[group[0]].prompt)
        request = running.submit(prompts[group[0]], asked, quiet=True, encoded=read)
        places += [(request, sample) for sample in range(len(group))]
        encoded += [read] * len(group)
    for event in running.run():
        if isinstance(event, Finished):
            found[event.request, event.sample] = event.trajectory
    vlm.train(training)
    return [_rollout(vlm, found[place], *pair) for place, pair in zip(places, encoded, strict=True)]


def _rollout(vlm: LatentVLM, trajectory: Trajectory, prompt: list[int], pictures: Pictures | None) -> Rollout:
    decoding = trajectory.decoding
    assert decoding is not None and decoding.logprobs is not None
    completion = [*decoding.token_ids, *([] if decoding.stop_id is None else [decoding.stop_id])]
    latents = [span.latents for span in trajectory.spans if span.latents is not None]
    thought = torch.cat(latents) if latents else torch.zeros(0, vlm.width)
    return Rollout(trajectory, prompt, pictures, completion, list(decoding.logprobs), thought)
