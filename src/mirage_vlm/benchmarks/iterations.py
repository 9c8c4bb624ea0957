"""What fewer passes than latents cost in accuracy: stage 2 with `latent_iterations` = n beside latents one by one.

    python -m mirage_vlm.benchmarks.iterations bundled --iterations 0 1 2 3 4
    python -m mirage_vlm.benchmarks.iterations bundled --iterations 0 1 2 3 4 --steps 100

Everything is under teacher forcing: the text before and after the span is the example's, the latents are the model's.
With `--steps`, a copy of the model is first trained for that many steps with each n.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.bundled import resolve
from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training.data import Collator, Examples
from mirage_vlm.training.losses import stage2
from mirage_vlm.training.rollout import Batch
from mirage_vlm.trajectory import Trajectory

LEVELS = (3, 4, 5, 6)
BATCH = 16


@dataclass(frozen=True)
class Found:
    """How well the text after the spans is predicted.

    Attributes:
        all_right: share of responses in which greedy decoding would get every token after the last span right.
        standard_error: of that share.
        ce: cross-entropy of a token after the last span, in nats.
    """

    all_right: float
    standard_error: float
    ce: float


@torch.no_grad()
def after_spans(vlm: LatentVLM, examples: Sequence[Trajectory], iterations: int) -> Found:
    """Predict the text after the last span of each example, `latent_end` not counted.

    Args:
        iterations: as in `forward_own`; 0 = the latents one by one.
    """
    right, ce, tokens = 0, 0.0, 0
    for start in range(0, len(examples), BATCH):
        chunk = [examples[i] for i in range(start, min(start + BATCH, len(examples)))]
        batch = _batch(vlm, chunk)
        hidden = stage2(vlm, batch, latent_iterations=iterations).hidden
        latent = (batch.input_ids == vlm.config.pad_id) | (batch.input_ids == vlm.config.end_id)
        behind = latent.flip(1).cumsum(dim=1).flip(1) == 0  # no latent here or later
        wanted = torch.where(behind, batch.labels, IGNORED)[:, 1:]
        logits = vlm.logits(hidden[:, :-1]).float()
        ce += F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="sum").item()
        tokens += int((wanted != IGNORED).sum())
        right += int(((logits.argmax(dim=-1) == wanted) | (wanted == IGNORED)).all(dim=1).sum())
    share = right / len(examples)
    return Found(share, (share * (1 - share) / len(examples)) ** 0.5, ce / tokens)


def tuned(vlm: LatentVLM, examples: Sequence[Trajectory], iterations: int, steps: int, rate: float) -> LatentVLM:
    """A copy trained for some steps of stage 2 with that many iterations; the tower stays as it is."""
    vlm = copy.deepcopy(vlm).train()
    vlm.vision_tower.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
    for step in range(steps):
        batch = _batch(vlm, [examples[(step * BATCH + i) % len(examples)] for i in range(BATCH)])
        stage2(vlm, batch, latent_iterations=iterations).ce.backward()
        torch.nn.utils.clip_grad_norm_(vlm.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return vlm.eval()


def _batch(vlm: LatentVLM, examples: Sequence[Trajectory]) -> Batch:
    tensors = Collator(vlm.encoder, targets=False)(examples)
    return Batch(**{name: value.to(vlm.device) for name, value in tensors.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--examples", type=int, default=200, help="held-out examples of each task")
    parser.add_argument("--steps", type=int, default=0, help="of stage 2 with each n before it is measured")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of these steps")
    given = parser.parse_args()
    vlm = LatentVLM.from_pretrained(resolve(given.model), device=given.device)
    tasks = ("vsp-planning", "vsp-reasoning")
    held_out = {task: GeneratedDataset(task, LEVELS, given.examples, 0, "cot", "test") for task in tasks}
    n = given.steps * BATCH // 2
    training = Examples([GeneratedDataset(task, LEVELS, n, 77, "cot", "train") for task in tasks]) if n else None
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(0)).tolist()
    for iterations in given.iterations:
        begun, model = time.process_time(), vlm
        if training is not None:
            model = tuned(vlm, [training[i] for i in order], iterations, given.steps, given.rate)
        seconds = time.process_time() - begun
        for task, examples in held_out.items():
            # the way it was trained, and one by one as in decoding
            for measured in dict.fromkeys([iterations, 0] if given.steps else [iterations]):
                found = after_spans(model, examples, measured)
                line = {"task": task, "trained": iterations if given.steps else None, "iterations": measured}
                print(json.dumps({**line, **asdict(found), "seconds": round(seconds)}), flush=True)


if __name__ == "__main__":
    main()
