"""Alignment: how far the states that predict latents are from their targets.

To add a loss, write the class and name it in `ALIGNMENTS`; a recipe chooses it by `loss.alignment`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.feedback import Feedback

if TYPE_CHECKING:
    from mirage_vlm.modeling.feedback import Patches
    from mirage_vlm.modeling.pooling import Targets

TEMPERATURE = 0.07  # of the contrastive loss
SAME = 0.999  # targets of at least this cosine are one


class Alignment(nn.Module):
    """A loss between n predicting hidden states and n targets. It has no weights of its own that are trained."""

    def fit(self, targets: torch.Tensor) -> None:
        """Take what is to be known of the data from a sample of targets [n, D], before training begins."""

    @property
    def fitted(self) -> bool:
        """Whether it needs no `fit`, or has had it."""
        return True

    def check(self, feedback: Feedback) -> None:
        """Whether it can be used with a feedback.

        Raises:
            MirageError: it cannot.
        """

    def forward(
        self, feedback: Feedback, predicting: torch.Tensor, targets: Targets, patches: Patches | None = None
    ) -> torch.Tensor:
        """[n, D] states, their targets, and for a feedback that reads them the patches of n rows → [n] in float32."""
        raise NotImplementedError


class Cosine(Alignment):
    """1 − cosine between a target and what is fed back for it, as in Mirage (arXiv 2506.17218)."""

    def forward(
        self, feedback: Feedback, predicting: torch.Tensor, targets: Targets, patches: Patches | None = None
    ) -> torch.Tensor:
        return 1 - F.cosine_similarity(feedback(predicting, patches).float(), targets.pooled.float(), dim=-1)


class WhitenedError(Alignment):
    """Mean squared error, both sides whitened by the targets' mean and covariance.

    Cosine is ruled by the few directions in which all targets are alike; here each direction counts by how much
    targets differ along it. Directions with less than a thousandth of the largest variance are left out.
    """

    mean: torch.Tensor
    whiten: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(0), persistent=False)
        self.register_buffer("whiten", torch.zeros(0, 0), persistent=False)

    def fit(self, targets: torch.Tensor) -> None:
        wide = targets.double()
        self.mean = wide.mean(dim=0)
        centred = wide - self.mean
        values, axes = torch.linalg.eigh(centred.T @ centred / len(wide))
        scale = torch.where(values > values.max() / 1000, values, torch.inf).rsqrt()
        self.mean, self.whiten = self.mean.float(), (axes * scale).float()  # [D, D]

    @property
    def fitted(self) -> bool:
        return len(self.mean) > 0

    def forward(
        self, feedback: Feedback, predicting: torch.Tensor, targets: Targets, patches: Patches | None = None
    ) -> torch.Tensor:
        if not self.fitted:
            raise RuntimeError("fit it to targets first")
        found, wanted = feedback(predicting, patches).float(), targets.pooled.float()
        with torch.autocast(found.device.type, enabled=False):
            found, wanted = ((x - self.mean) @ self.whiten for x in (found, wanted))
        return (found - wanted).square().mean(dim=-1)


class Contrastive(Alignment):
    """Each state must know its own target among those of the batch (InfoNCE, arXiv 1807.03748); against collapse.

    Targets that are the same as its own do not count as others.
    """

    def forward(
        self, feedback: Feedback, predicting: torch.Tensor, targets: Targets, patches: Patches | None = None
    ) -> torch.Tensor:
        found, wanted = (F.normalize(x.float(), dim=-1) for x in (feedback(predicting, patches), targets.pooled))
        own = torch.eye(len(wanted), dtype=torch.bool, device=wanted.device)
        with torch.autocast(wanted.device.type, enabled=False):  # its half precision would not tell twins
            twins, logits = (wanted @ wanted.T > SAME) & ~own, found @ wanted.T / TEMPERATURE
        logits = logits.masked_fill(twins, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(wanted), device=wanted.device), reduction="none")


class Code(Alignment):
    """Cross-entropy on that of a table's entries, or of the prompt's patches, which is nearest to the target.

    Where a target has several parts, each has an equal share in the distribution that is asked for.
    """

    def check(self, feedback: Feedback) -> None:
        if type(feedback).scores is Feedback.scores:
            raise MirageError("loss.alignment: code needs a feedback that chooses, such as codebook or pointer")

    def forward(
        self, feedback: Feedback, predicting: torch.Tensor, targets: Targets, patches: Patches | None = None
    ) -> torch.Tensor:
        chances = feedback.scores(predicting, patches).float().log_softmax(dim=-1)  # [n, C]
        owner = targets.owner
        wanted = feedback.labels(targets.parts, None if patches is None else patches.pick(owner))
        return -targets.mean(chances[owner].gather(1, wanted.unsqueeze(1)).squeeze(1))


ALIGNMENTS: dict[str, type[Alignment]] = {
    "cosine": Cosine,
    "whitened": WhitenedError,
    "contrastive": Contrastive,
    "code": Code,
}
