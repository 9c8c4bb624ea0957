"""Feedback: from the last hidden state to the next input embedding, inside a latent span.

A feedback is a module of its own, named in the checkpoint and saved with it. To add one, write the class and
name it in `FEEDBACKS`; training, decoding and everything built on them call it through `LatentVLM.recast`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.pooling import Targets

ROUNDS = 25  # of k-means
MASKED = -1e30  # finite, so that a row without pictures has no NaN


@dataclass(frozen=True)
class Patches:
    """Features of each row's pictures: [B, N, D], zeros after a row's last, and [B, N] which are there."""

    features: torch.Tensor
    there: torch.Tensor

    def pick(self, rows: torch.Tensor) -> Patches:
        """Those of the rows at [n] indices, in their order."""
        return Patches(self.features[rows], self.there[rows])


class Feedback(nn.Module):
    """What every feedback can be asked for.

    Args:
        width: D, of hidden states and input embeddings.
        codes: C, entries of the table, where it has one.

    Attributes:
        reads_patches: it has to be given the patches of the prompts' pictures.
    """

    reads_patches = False

    def __init__(self, width: int, codes: int):
        super().__init__()

    def forward(self, hidden: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        """[..., D] last hidden states → [..., D] input embeddings; with patches the first dimension is their row."""
        raise NotImplementedError

    def fit(self, targets: torch.Tensor) -> None:
        """Take what is to be known of the data from a sample of targets [n, D], before training begins."""

    @property
    def fitted(self) -> bool:
        """Whether it needs no `fit`, or has had it."""
        return True

    def consumed(self, targets: Targets) -> torch.Tensor:
        """Targets of n latents → [n, D] what stands in the place of latents when targets are given."""
        return targets.pooled

    def scores(self, hidden: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        """[n, D] hidden states → [n, C] logits of what it chooses from, where it does choose."""
        raise NotImplementedError

    def labels(self, parts: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        """[m, D] parts of targets, and the patches of their m rows → [m] the nearest of what it chooses from."""
        raise NotImplementedError

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """[..., C] logits → [..., C] how much of each is taken; a feedback that chooses calls it."""
        return scores.softmax(dim=-1)


class One(Feedback):
    """To be put before a feedback that chooses: it takes the best alone, with the gradient of the mixture.

    Straight-through estimation (arXiv 1308.3432). Where targets were given in training, a mixture is nothing that the
    model has seen; the one entry is.
    """

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        soft = super().choose(scores)
        hard = F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(soft)
        return hard + soft - soft.detach() if soft.requires_grad else hard


class Identity(Feedback):
    """The hidden state itself, as in Mirage (arXiv 2506.17218) and Coconut (arXiv 2412.06769)."""

    def forward(self, hidden: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        return hidden


class Linear(Feedback):
    """A learnt linear map that starts as the identity."""

    def __init__(self, width: int, codes: int):
        super().__init__(width, codes)
        self.proj = nn.Linear(width, width)
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, hidden: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        return self.proj(hidden)


class Rescaled(Feedback):
    """The hidden state at the length of a typical target.

    Hidden states can be hundreds of times as long as input embeddings (GAP, arXiv 2605.12374).
    """

    size: torch.Tensor

    def __init__(self, width: int, codes: int):
        super().__init__(width, codes)
        self.register_buffer("size", torch.ones(()))

    def forward(self, hidden: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        return F.normalize(hidden, dim=-1) * self.size

    def fit(self, targets: torch.Tensor) -> None:
        self.size.copy_(targets.norm(dim=-1).mean())

    @property
    def fitted(self) -> bool:
        return bool(self.size != 1)


class Codebook(Feedback):
    """A mixture of a table of picture features: softmax over a learnt head, then the table's mean by it.

    The table is made of the targets of the training data by k-means and stays as it is. So whatever the model thinks
    is a mixture of what the vision tower says of pictures, and the right entry can be learnt by cross-entropy.
    """

    table: torch.Tensor

    def __init__(self, width: int, codes: int):
        super().__init__(width, codes)
        self.head = nn.Linear(width, codes)
        self.register_buffer("table", torch.zeros(codes, width))

    def forward(self, hidden: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        return self.choose(self.head(hidden)) @ self.table

    def fit(self, targets: torch.Tensor) -> None:
        """k-means++ (Arthur and Vassilvitskii 2007), the same table for the same targets.

        Entries that lose all their targets start anew at a target far from any entry.

        Raises:
            MirageError: there are fewer targets than entries.
        """
        count = len(self.table)
        if len(targets) < count:
            raise MirageError(f"a table of {count} codes cannot be made of {len(targets)} targets; lower model.codes")
        targets = targets.to(self.table.device).float()
        centres = targets[_far_apart(targets, count)]
        for _ in range(ROUNDS):
            apart = torch.cdist(targets, centres)  # [n, C]
            near, mine = apart.min(dim=1)
            sums = torch.zeros_like(centres).index_add_(0, mine, targets)
            sizes = torch.bincount(mine, minlength=count)
            lost = (sizes == 0).nonzero().flatten()
            centres = sums / sizes.clamp(min=1).unsqueeze(1)
            centres[lost] = targets[near.topk(len(lost)).indices]
        self.table.copy_(centres)

    @property
    def fitted(self) -> bool:
        return bool(self.table.any())

    def consumed(self, targets: Targets) -> torch.Tensor:
        return targets.mean(self.table[self.labels(targets.parts)].to(targets.parts.dtype))

    def scores(self, hidden: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        return self.head(hidden)

    def labels(self, parts: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        return torch.cdist(parts.float(), self.table.float()).argmin(dim=1)


def _far_apart(targets: torch.Tensor, count: int) -> torch.Tensor:
    """[count] indices: each drawn by its squared distance from those before it."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(targets), (1,), generator=generator)
    near = torch.full((len(targets),), torch.inf)
    for _ in range(count - 1):
        near = torch.minimum(near, (targets - targets[chosen[-1]]).square().sum(dim=1).cpu())
        weights = near if near.any() else torch.ones_like(near)  # fewer different targets than entries
        chosen = torch.cat([chosen, torch.multinomial(weights, 1, generator=generator)])
    return chosen.to(targets.device)


class Pointer(Feedback):
    """A mixture of the patches of the prompt's own pictures: softmax over them, then their mean by it.

    A latent is then what the model has seen, in the model's own input space, and the right patch can be learnt by
    cross-entropy.
    """

    reads_patches = True

    def __init__(self, width: int, codes: int):
        super().__init__(width, codes)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        assert patches is not None
        return torch.einsum("b...n,bnd->b...d", self.choose(self.scores(hidden, patches)), patches.features)

    def scores(self, hidden: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        assert patches is not None
        keys = self.key(F.rms_norm(patches.features, patches.features.shape[-1:]))  # lest it begins all too sure
        found = torch.einsum("b...d,bnd->b...n", self.query(hidden), keys)
        there = patches.there.view(len(found), *[1] * (found.ndim - 2), -1)
        return (found / hidden.shape[-1] ** 0.5).masked_fill(~there, MASKED)

    def labels(self, parts: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        assert patches is not None
        apart = (patches.features - parts.unsqueeze(1)).norm(dim=-1)  # [n, N]
        return apart.masked_fill(~patches.there, torch.inf).argmin(dim=1)


class OneCode(One, Codebook):
    """The best entry of a table of picture features: latents that are discrete visual tokens."""


class OnePatch(One, Pointer):
    """The best patch of the prompt's own pictures, as it is."""


class Pause(Feedback):
    """A learnt vector, whatever the hidden state: pause tokens (arXiv 2310.02226), the baseline that thinks nothing."""

    def __init__(self, width: int, codes: int):
        super().__init__(width, codes)
        self.vector = nn.Parameter(0.02 * torch.randn(width, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden: torch.Tensor, patches: Patches | None = None) -> torch.Tensor:
        return self.vector.expand_as(hidden)

    def consumed(self, targets: Targets) -> torch.Tensor:
        return self.vector.expand_as(targets.pooled)


FEEDBACKS: dict[str, type[Feedback]] = {
    "identity": Identity,
    "linear": Linear,
    "rescaled": Rescaled,
    "codebook": Codebook,
    "codebook-one": OneCode,
    "pointer": Pointer,
    "pointer-one": OnePatch,
    "pause": Pause,
}


def build_feedback(name: str, width: int, codes: int = 256) -> Feedback:
    """The feedback module of that name.

    Args:
        width: of hidden states.
        codes: entries of a table.

    Raises:
        MirageError: there is none of that name.
    """
    if name not in FEEDBACKS:
        raise MirageError(f"unknown feedback {name!r}; choose one of {', '.join(FEEDBACKS)}")
    return FEEDBACKS[name](width, codes)


def same_weights(one: str, other: str) -> bool:
    """Whether the weights of one feedback are those of another too, as of `pointer` and `pointer-one`."""
    first, second = FEEDBACKS.get(one), FEEDBACKS.get(other)
    return first is not None and second is not None and (issubclass(first, second) or issubclass(second, first))
