"""Training data in which a checkpoint's own answers choose how each response is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mirage_vlm.decoding import EngineConfig, GenerationConfig
from mirage_vlm.decoding.generate import generate
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.make import DRAWN_AS, GeneratedDataset
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling import LatentVLM


@dataclass(frozen=True)
class Mixed(Sequence[Trajectory]):
    """Examples in one of two styles each; both have the same prompt, so that the model itself must know which.

    Attributes:
        sure, unsure: the same examples in both styles.
        right: of each, whether it is taken from `sure`.
    """

    sure: GeneratedDataset
    unsure: GeneratedDataset
    right: Sequence[bool]

    def __len__(self) -> int:
        return len(self.right)

    def __getitem__(self, i: int) -> Trajectory:  # type: ignore[override]  # no slices
        return (self.sure if self.right[i] else self.unsure)[i]


def mix_by_answers(
    vlm: LatentVLM,
    task: str,
    levels: Sequence[int],
    n: int,
    *,
    sure: str,
    unsure: str,
    seed: int = 0,
    max_new_tokens: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Mixed:
    """Training examples whose response is in the style `sure` where the checkpoint answers rightly, else in `unsure`.

    Trained on them, a model opens a span where it would fail without. The checkpoint is asked in the style `sure`,
    greedily.

    Args:
        progress: called with the number of answers that were finished.

    Raises:
        MirageError: there is no such task or style.
    """
    easy, hard = (
        GeneratedDataset(task, levels, n, seed, style, "train", drawn_as=DRAWN_AS) for style in (sure, unsure)
    )
    examples = [easy[i] for i in range(n)]
    answers = generate(vlm, examples, GenerationConfig(max_new_tokens=max_new_tokens), EngineConfig(), progress)
    score = get_task(task).score
    return Mixed(easy, hard, [score(answer).correct for answer in answers])
