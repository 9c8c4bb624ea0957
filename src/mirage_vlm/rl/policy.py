"""The policy: how likely a model finds responses that hold latents.

Three treatments of the latents of a rollout:

- `replay`: they are inputs like any other, as they were; gradients reach the model through the text alone.
- `reroll`: the policy thinks again, with gradient through every latent, as in stage 2.
- `gaussian`: they were drawn from a diagonal Gaussian around what the policy would feed back, and so are actions with a
  density of their own: at position p around the feedback of the state at p − 1 (as in Monet's VLPO, arXiv 2511.21395).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.checkpoint import checkpoint

from mirage_vlm.decoding.sampling import more_or_end, never_said
from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.training.own import forward_own
from mirage_vlm.training.rollout import Batch, forward_given

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM

CHUNK = 1024  # positions that are scored over the vocabulary at a time


class Policy(nn.Module):
    """A model as a policy over responses; a module, so that accelerate can wrap it.

    Args:
        vlm: the model.
        latents: `replay`, `reroll` or `gaussian`.
        temperature: of sampling.
        noise: standard deviation of `gaussian`.
        visibility: who looks at the prompt's pictures; see `mirage_vlm.training.visibility`.
        thinks: whether it may open a span; it chooses among the tokens that the engine lets it choose from.
    """

    def __init__(
        self,
        vlm: LatentVLM,
        latents: str = "replay",
        temperature: float = 1.0,
        noise: float = 0.0,
        visibility: str = "full",
        thinks: bool = True,
    ):
        super().__init__()
        self.vlm, self.thinks = vlm, thinks
        self.latents, self.temperature, self.noise, self.visibility = latents, temperature, noise, visibility

    def forward(
        self, vectors: torch.Tensor, shown: Sequence[int] = (), shown_thw: torch.Tensor | None = None, **batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How likely the tokens of a batch are, and its latents where they are actions.

        Args:
            vectors: [latent positions of the batch, D] the latents that were consumed, in row order.
            shown: which of the pictures of `pixel_values` each row's are, in row order: the rows of a group see the
                same, and it goes through the vision tower once.
            shown_thw: [different pictures, 3] of `pixel_values`; `grid_thw` is that of all rows.
            batch: as for `Batch`; a label wherever a token was chosen.

        Returns:
            [B, T] log-probabilities at the positions of tokens that were chosen, and of latents under `gaussian`, where
            they are log-densities (added to that of the decision to go on, where the model decides it); and [B, T]
            entropies of the choices in nats, without gradient. Zero elsewhere.
        """
        vlm, given = self.vlm, Batch(**batch)
        embeds = vlm.embed(given.input_ids)
        if shown_thw is not None and given.pixel_values is not None:
            features = vlm.prompt_features(given.pixel_values, shown_thw, given.picture_keys)
            embeds = vlm.place_pictures(embeds, given.input_ids, [features[i] for i in shown])
        pads = given.input_ids == vlm.config.pad_id
        if self.latents == "reroll" and len(vectors):
            hidden, _ = forward_own(vlm, given, visibility=self.visibility, embeds=embeds)
        else:
            hidden = forward_given(vlm, given, vectors if len(vectors) else None, self.visibility, embeds)
        likely, entropy = token_scores(vlm, hidden, given.labels, self.temperature, self.thinks)
        if self.latents == "gaussian" and len(vectors):
            patches = vlm.patches_of(given.input_ids, embeds, given.grid_thw)
            if patches is not None:
                patches = patches.pick(pads.nonzero()[:, 0])
            means = vlm.feedback(hidden[:, :-1][pads[:, 1:]], patches)
            density = gaussian_log_density(vectors, means, self.noise)
            likely = likely + torch.zeros_like(likely).masked_scatter(pads, density.to(likely.dtype))
        return likely, entropy

    # -- what TRL asks of a model ------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.vlm.model.config

    @property
    def generation_config(self) -> Any:
        return self.vlm.model.generation_config

    @property
    def dtype(self) -> torch.dtype:
        return self.vlm.model.dtype

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether TRL is to switch it off around passes without gradient, where it does nothing anyway."""
        return False

    def add_model_tags(self, tags: Any) -> None:
        """Tags are for model cards on a hub, which this does not write."""


class WithoutAdapters(nn.Module):
    """A policy with its adapters switched off: the model that a run with LoRA started from, at hardly any memory."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = (policy,)  # not a child: its weights are not this module's
        self.feedback = copy.deepcopy(policy.vlm.feedback)  # which is trained beside the adapters

    def forward(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (policy,) = self.policy
        trained = policy.vlm.feedback
        policy.vlm.feedback = self.feedback
        try:
            with adapters_off(policy):
                return policy(**inputs)
        finally:
            policy.vlm.feedback = trained


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Within, the adapters of a module change nothing."""
    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def token_scores(
    vlm: LatentVLM, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, thinks: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T, D] states and [B, T] labels → [B, T] log-probabilities and entropies at the labels, zero elsewhere.

    The head runs where there is a label, over `CHUNK` positions at a time; their logits are not kept for the gradient.
    """
    places = labels != IGNORED
    places[:, 0] = False
    states, wanted = hidden[:, :-1][places[:, 1:]], labels[places]

    def score(some: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logs = among(vlm, vlm.logits(some).float() / temperature, tokens, thinks).log_softmax(dim=-1)
        with torch.no_grad():
            entropy = -(logs.exp() * logs).nan_to_num().sum(dim=-1)
        return logs.gather(1, tokens.unsqueeze(1)).squeeze(1), entropy

    parts = []
    for start in range(0, len(wanted), CHUNK):
        some = states[start : start + CHUNK], wanted[start : start + CHUNK]
        several = len(wanted) > CHUNK and torch.is_grad_enabled()
        parts.append(checkpoint(score, *some, use_reentrant=False) if several else score(*some))
    zeros = hidden.new_zeros(labels.shape, dtype=torch.float32)
    if not parts:
        return zeros, zeros
    likely, entropy = (torch.cat(each) for each in zip(*parts, strict=True))
    return zeros.masked_scatter(places, likely), zeros.masked_scatter(places, entropy)


def among(vlm: LatentVLM, logits: torch.Tensor, tokens: torch.Tensor, thinks: bool) -> torch.Tensor:
    """[n, V] logits, with minus infinity for what could not be chosen where [n] tokens were.

    In text that is a latent, the end of a span and a picture's patch, and without `thinks` its start; where the model
    decides whether a span goes on, all but a latent and the end.
    """
    pad, start, end = vlm.config.pad_id, vlm.config.start_id, vlm.config.end_id
    shut = [*never_said(vlm), *([] if thinks else [start])]
    text = logits.index_fill(1, torch.tensor(shut, device=logits.device), -torch.inf)
    decides = (tokens == pad) | (tokens == end)
    return torch.where(decides.unsqueeze(1), more_or_end(logits, pad, end), text)


def gaussian_log_density(vectors: torch.Tensor, means: torch.Tensor, sigma: float) -> torch.Tensor:
    """[n, D] vectors and means → [n] log-densities of a Gaussian with so much standard deviation in each component."""
    distance = ((vectors.double() - means.double()) / sigma).square().sum(dim=-1)
    return -distance / 2 - vectors.shape[-1] * (math.log(sigma) + math.log(2 * math.pi) / 2)
