"""The losses of the stages.

Both stages read the same off-by-one: the state at position t − 1 predicts what stands at t, be it a token or a
latent. `docs/method.md` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.training.align import Alignment, Cosine
from mirage_vlm.training.own import forward_own
from mirage_vlm.training.rollout import Batch, embeddings, forward_given, span_runs

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM
    from mirage_vlm.modeling.pooling import Targets


@dataclass(frozen=True)
class StageLoss:
    """Sums over a batch, so that batches can be added up exactly under gradient accumulation.

    Attributes:
        ce_sum: scalar, cross-entropy summed over labelled tokens.
        tokens: number of labelled tokens.
        align_sum: scalar, the alignment (1 − cosine, or what the recipe chose) summed over latent tokens; zero where
            there are no targets.
        latents: number of latent tokens that were consumed.
        correct: number of labelled tokens that greedy decoding would get right.
        hidden: [B, T, D] hidden states after the final norm.
        consumed: [latent positions, D] the latents that were fed in, None where there are none.
    """

    ce_sum: torch.Tensor
    tokens: int
    align_sum: torch.Tensor
    latents: int
    correct: int
    hidden: torch.Tensor
    consumed: torch.Tensor | None

    @property
    def ce(self) -> torch.Tensor:
        """Mean cross-entropy of a labelled token, in nats."""
        return self.ce_sum / max(self.tokens, 1)

    @property
    def align(self) -> torch.Tensor:
        """Mean alignment loss of a latent token."""
        return self.align_sum / max(self.latents, 1)


def stage1(
    vlm: LatentVLM,
    batch: Batch,
    *,
    alignment: Alignment | None = None,
    detach_targets: bool = True,
    visibility: str = "full",
) -> StageLoss:
    """Targets in place of latents, aligned by cosine (arXiv 2506.17218, section 3.2).

    The k pooled targets ê stand at the latent positions p … p + k − 1; the states at p − 1 … p + k − 2 are drawn
    towards them. Without spans in the batch this is ordinary supervised fine-tuning.

    Args:
        alignment: in place of the cosine.
        detach_targets: no gradient into the vision tower through the targets, and none through what a latent is to be
            like; a learnt pooling learns from the text alone.
        visibility: who may look at pictures; see `mirage_vlm.training.visibility`.
    """
    if not bool((batch.input_ids == vlm.config.pad_id).any()):
        return _token_loss(vlm, batch, forward_given(vlm, batch, None, visibility))
    targets = targets_of(vlm, batch, detach_targets)
    if targets is None:
        raise ValueError("stage 1 needs the helper images of its spans; collate with targets=True")
    consumed, embeds = vlm.feedback.consumed(targets), embeddings(vlm, batch)
    hidden = forward_given(vlm, batch, consumed, visibility, embeds)
    align = _align(vlm, batch, embeds, hidden, targets.detach() if detach_targets else targets, alignment)
    return _token_loss(vlm, batch, hidden, align, consumed)


def targets_of(vlm: LatentVLM, batch: Batch, detach: bool = True) -> Targets | None:
    """The targets of a batch's latents, in row order; None where it was collated without."""
    if batch.helper_pixel_values is None or batch.helper_grid_thw is None:
        return None
    lengths = [end - start for row in span_runs(batch.input_ids, vlm.config.pad_id) for start, end in row]
    pictures = (batch.helper_pixel_values, batch.helper_grid_thw, lengths)
    return vlm.targets(*pictures, detach=detach, keys=batch.helper_keys, regions=batch.helper_regions)


def _align(
    vlm: LatentVLM,
    batch: Batch,
    embeds: torch.Tensor,
    hidden: torch.Tensor,
    targets: Targets,
    alignment: Alignment | None,
) -> torch.Tensor:
    """Scalar, the alignment summed over the latents: the state at t − 1 predicts the latent at t."""
    latent = batch.input_ids[:, 1:] == vlm.config.pad_id
    patches = vlm.patches_of(batch.input_ids, embeds, batch.grid_thw)
    if patches is not None:
        patches = patches.pick(latent.nonzero()[:, 0])
    chosen = Cosine() if alignment is None else alignment
    return chosen(vlm.feedback, hidden[:, :-1][latent], targets, patches).sum()


def stage2(
    vlm: LatentVLM,
    batch: Batch,
    *,
    alignment: Alignment | None = None,
    detach_targets: bool = True,
    latent_iterations: int = 0,
    visibility: str = "full",
    own_share: float = 1.0,
) -> StageLoss:
    """Cross-entropy on the text alone; the latents are the model's own, with gradient (section 3.3).

    Rows hold one example each: a rollout aligns rows by their spans, and cannot be packed.

    Args:
        alignment: where the batch has helper images, also drawn towards their targets by it; None = cosine.
        detach_targets, visibility: as in `stage1`.
        latent_iterations: as `iterations` of `forward_own`.
        own_share: chance of each latent to be the model's own; in the place of the others stand their targets
            (scheduled sampling, arXiv 1506.03099).
    """
    if batch.segments is not None:
        raise ValueError("stage 2 takes one example a row; collate without pack")
    targets, given = targets_of(vlm, batch, detach_targets), None
    if own_share < 1 and bool((batch.input_ids == vlm.config.pad_id).any()):
        if targets is None:
            raise ValueError("targets can stand in the place of latents only with helper images; collate with targets")
        stand_in = vlm.feedback.consumed(targets)
        given = stand_in, torch.rand(len(stand_in), device=stand_in.device) >= own_share
    embeds = embeddings(vlm, batch)
    hidden, latents = forward_own(vlm, batch, latent_iterations, visibility=visibility, given=given, embeds=embeds)
    align = None
    if targets is not None:
        align = _align(vlm, batch, embeds, hidden, targets.detach() if detach_targets else targets, alignment)
    return _token_loss(vlm, batch, hidden, align, latents if len(latents) else None)


def _token_loss(
    vlm: LatentVLM,
    batch: Batch,
    hidden: torch.Tensor,
    align_sum: torch.Tensor | None = None,
    consumed: torch.Tensor | None = None,
) -> StageLoss:
    """Next-token cross-entropy; the LM head runs only where there is a label."""
    labels = batch.labels[:, 1:]
    labelled = labels != IGNORED
    logits = vlm.logits(hidden[:, :-1][labelled]).float()  # [labelled, V]
    wanted = labels[labelled]
    return StageLoss(
        ce_sum=F.cross_entropy(logits, wanted, reduction="sum"),
        tokens=wanted.numel(),
        align_sum=hidden.new_zeros((), dtype=torch.float32) if align_sum is None else align_sum,
        latents=0 if consumed is None else len(consumed),
        correct=int((logits.detach().argmax(dim=-1) == wanted).sum()),
        hidden=hidden,
        consumed=consumed,
    )
