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
from mirage_vlm.training.own import forward_own
from mirage_vlm.training.rollout import Batch, forward_given, span_runs

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM


@dataclass(frozen=True)
class StageLoss:
    """Sums over a batch, so that batches can be added up exactly under gradient accumulation.

    Attributes:
        ce_sum: scalar, cross-entropy summed over labelled tokens.
        tokens: number of labelled tokens.
        align_sum: scalar, 1 − cosine summed over latent tokens (zero in stage 2).
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
        """Mean of 1 − cosine over the latent tokens."""
        return self.align_sum / max(self.latents, 1)


def stage1(vlm: LatentVLM, batch: Batch, *, detach_targets: bool = True) -> StageLoss:
    """Targets in place of latents, aligned by cosine (arXiv 2506.17218, section 3.2).

    The k pooled targets ê stand at the latent positions p … p + k − 1; the states at p − 1 … p + k − 2 are drawn
    towards them. Without spans in the batch this is ordinary supervised fine-tuning.

    Args:
        detach_targets: no gradient into the vision tower through the targets.
    """
    lengths = [end - start for row in span_runs(batch.input_ids, vlm.config.pad_id) for start, end in row]
    if not lengths:
        return _token_loss(vlm, batch, forward_given(vlm, batch, None))
    if batch.helper_pixel_values is None or batch.helper_grid_thw is None:
        raise ValueError("stage 1 needs the helper images of its spans; collate with targets=True")
    targets = vlm.targets(
        batch.helper_pixel_values, batch.helper_grid_thw, lengths, detach=detach_targets, keys=batch.helper_keys
    )
    hidden = forward_given(vlm, batch, targets)
    predicting = hidden[:, :-1][batch.input_ids[:, 1:] == vlm.config.pad_id]
    align = (1 - F.cosine_similarity(predicting.float(), targets.float(), dim=-1)).sum()
    return _token_loss(vlm, batch, hidden, align, targets)


def stage2(vlm: LatentVLM, batch: Batch, *, latent_iterations: int = 0) -> StageLoss:
    """Cross-entropy on the text alone; the latents are the model's own, with gradient (section 3.3).

    Rows hold one example each: a rollout aligns rows by their spans, and cannot be packed.

    Args:
        latent_iterations: as `iterations` of `forward_own`.
    """
    if batch.segments is not None:
        raise ValueError("stage 2 takes one example a row; collate without pack")
    hidden, latents = forward_own(vlm, batch, latent_iterations)
    return _token_loss(vlm, batch, hidden, consumed=latents if len(latents) else None)


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
