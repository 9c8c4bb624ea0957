"""What the tests of modeling, training and decoding share: examples, batches, and the slow reference of stage 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import PIL.Image
import torch

from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.encoding import Encoded
from mirage_vlm.modeling.pooling import Targets, place_code
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training.data import collate
from mirage_vlm.training.losses import stage2
from mirage_vlm.training.rollout import Batch
from mirage_vlm.trajectory import Image, LatentSpan, Trajectory, assistant_turn, user_turn

CORPUS = [
    "The elf walks over the ice to the gift. Which way?",
    "Go up, then right, then down. The hole is on the left.",
    r"Answer with moves L, R, U, D in \boxed{}. \boxed{R,R,D}",
    "<think>The elf is at r1c2 and the gift is at r3c3.</think>",
]

# sizes of a model that a test trains, as a recipe's `model.scratch`
SCRATCH = """{width: 32, layers: 2, heads: 2, kv_heads: 1, mlp: 64, vision_width: 32, vision_layers: 1,
            vision_heads: 2, vision_mlp: 32, context: 512}"""


def picture(columns: int, rows: int, seed: int) -> Image:
    """A random picture of so many merged patches, at `tiny`'s image scale of 28 / 64."""
    colours = np.random.default_rng(seed).integers(0, 256, (2 * rows, 2 * columns, 3), dtype=np.uint8)
    return Image(PIL.Image.fromarray(colours).resize((64 * columns, 64 * rows), PIL.Image.Resampling.NEAREST))


def span(seed: int, k: int | None = None, columns: int = 3, rows: int = 2) -> LatentSpan:
    return LatentSpan(helper=picture(columns, rows, 100 + seed), k=k)


def dialogue(question: Sequence, answer: Sequence) -> Trajectory:
    return Trajectory((user_turn(*question), assistant_turn(*answer)))


def ragged() -> list[Trajectory]:
    """Rows with 0, 1 and 2 spans of different k at different places, with 0, 1 and 2 pictures in the prompt."""
    return [
        dialogue(["Which way? ", picture(2, 2, 1)], ["Go up, ", span(1, 2), r" then \boxed{R,R,D}"]),
        dialogue(["The hole is on the left."], ["Go right."]),
        dialogue(
            [picture(3, 1, 2), " The elf walks over the ice ", picture(1, 2, 3), "to the gift. Which way?"],
            [span(2), "The gift is at r3c3. ", span(3, 1, 1, 1), " down"],
        ),
        dialogue(["Go"], ["then ", span(4, 4), span(5, 1)]),
        dialogue([picture(2, 3, 4), "Which way is the gift?"], [span(6, 5), r"\boxed{D}"]),
    ]


def batch_of(vlm: LatentVLM, trajectories: Sequence[Trajectory], targets: bool = True) -> Batch:
    return Batch(**collate([vlm.encoder.example(t, targets=targets) for t in trajectories], vlm.encoder))


def replayed(vlm: LatentVLM, trajectories: Sequence[Trajectory]) -> Batch:
    """The decoded tokens, as a training batch."""
    examples = []
    for trajectory in trajectories:
        prompt, images = vlm.encoder.prompt(trajectory.prompt)
        ids = torch.tensor([*prompt, *trajectory.decoding.token_ids])
        examples.append(Encoded(ids, ids, images, None))
    return Batch(**collate(examples, vlm.encoder))


def check_replay(vlm: LatentVLM, trajectories: Sequence[Trajectory]) -> None:
    """Stage 2 over the decoded tokens finds the same latents, and would choose the same tokens."""
    config, batch = vlm.config, replayed(vlm, trajectories)
    with torch.no_grad():
        loss = stage2(vlm, batch)
        slow = [slow_rollout(vlm, row) for row in split(vlm, batch)]
    counts = (batch.input_ids == config.pad_id).sum(dim=1).tolist()
    for i, (trajectory, latents) in enumerate(zip(trajectories, loss.consumed.split(counts), strict=True)):
        spans = [span.latents for span in trajectory.spans if span.latents is not None]
        own = torch.cat(spans) if spans else latents[:0]
        assert len(latents) - 1 <= len(own) <= len(latents), "at most the very last pad was not consumed any more"
        assert distance(own, latents[: len(own)]) < 1e-4, f"row {i}: decoding and stage 2"
        assert distance(own, slow[i][1][: len(own)]) < 1e-4, f"row {i}: decoding and the slow rollout"
        start = len(vlm.encoder.prompt(trajectory.prompt)[0])
        logits = vlm.logits(slow[i][0])
        logits[:, [config.pad_id, config.end_id]] = -torch.inf
        for t, token in enumerate(trajectory.decoding.token_ids, start):
            if token not in (config.pad_id, config.end_id):
                assert logits[t - 1].argmax() == token, f"row {i}, position {t}"


def split(vlm: LatentVLM, batch: Batch) -> list[Batch]:
    """The rows of a batch, each alone and without padding, with its own pictures and helper images."""
    image, pad = vlm.family.image_token_id, vlm.config.pad_id
    rows, used = [], {"": 0, "helper_": 0}
    patches = {"": 0, "helper_": 0}
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        length = int(mask.sum())
        ids = ids[:length]
        row = Batch(ids[None], mask[None, :length], labels[None, :length])
        starts = {"": (ids == image), "helper_": (ids == pad)}
        for kind, places in starts.items():
            count = int((places & ~places.roll(1)).sum())  # runs; no row begins with one
            grid = getattr(batch, kind + "grid_thw")
            if count == 0 or grid is None:
                continue
            own = grid[used[kind] : used[kind] + count]
            size = int(own.prod(dim=1).sum())
            pixels = getattr(batch, kind + "pixel_values")[patches[kind] : patches[kind] + size]
            row = replace(row, **{kind + "grid_thw": own, kind + "pixel_values": pixels})
            used[kind] += count
            patches[kind] += size
        rows.append(row)
    return rows


def slow_positions(vlm: LatentVLM, row: Batch) -> torch.Tensor:
    """[3, 1, T] rotary positions of one row, written out: text counts on, a picture spans a plane."""
    ids = row.input_ids[0].tolist()
    grids = iter([] if row.grid_thw is None else row.grid_thw.tolist())
    found: list[tuple[int, int, int]] = []
    position = 0
    while len(found) < len(ids):
        if ids[len(found)] != vlm.family.image_token_id:
            found.append((position,) * 3)
            position += 1
            continue
        _, height, width = next(grids)
        plane = [(position, position + y, position + x) for y in range(height // 2) for x in range(width // 2)]
        found += plane
        position += max(height // 2, width // 2)
    return torch.tensor(found).T.unsqueeze(1)


def slow_embeddings(vlm: LatentVLM, row: Batch) -> list[torch.Tensor]:
    """T input embeddings [D] of one row, the pictures' features in place of the image tokens, in order."""
    table = vlm.model.get_input_embeddings().weight
    features: list[torch.Tensor] = []
    if row.pixel_values is not None:
        found = vlm.model.model.get_image_features(row.pixel_values, row.grid_thw, return_dict=True)
        features = [feature for image in found.pooler_output for feature in image]
    remaining = iter(features)
    image = vlm.family.image_token_id
    embeddings = [next(remaining) if i == image else table[i] for i in row.input_ids[0].tolist()]
    assert next(remaining, None) is None
    return embeddings


def slow_forward(vlm: LatentVLM, row: Batch, embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
    """[t, D] hidden states of the first t positions of one row: one pass, no cache, no mask, no padding."""
    return vlm.model.model.language_model(
        inputs_embeds=torch.stack(list(embeddings))[None],
        position_ids=slow_positions(vlm, row)[:, :, : len(embeddings)],
        use_cache=False,
    ).last_hidden_state[0]


def slow_rollout(vlm: LatentVLM, row: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Stage 2 as the method says it: for each latent, everything before it is computed anew.

    Returns:
        [T, D] hidden states and [latent positions, D] the latents.
    """
    embeddings = slow_embeddings(vlm, row)
    latents = []
    for position, token in enumerate(row.input_ids[0].tolist()):
        if token == vlm.config.pad_id:
            state = slow_forward(vlm, row, embeddings[:position])[-1]
            if vlm.config.feedback == "linear":
                state = vlm.feedback.proj.weight @ state + vlm.feedback.proj.bias
            if vlm.config.feedback == "pointer":
                _, state, _ = slow_pointer(vlm, row, state)
            embeddings[position] = state
            latents.append(state)
    hidden = slow_forward(vlm, row, embeddings)
    return hidden, torch.stack(latents) if latents else hidden.new_zeros(0, hidden.shape[-1])


def shifted(targets: Targets) -> Targets:
    """Targets of one part each, each in the place of the next."""
    return Targets(targets.parts.roll(1, dims=0), targets.owner)


def slow_pointer(
    vlm: LatentVLM, row: Batch, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """[N] log-probabilities of the row's patches, the mixture of them, and the patches."""
    if row.pixel_values is None:
        return hidden[:0], torch.zeros_like(hidden), []
    seen = []
    for image, grid in zip(vlm.image_features(row.pixel_values, row.grid_thw), row.grid_thw, strict=True):
        height, width = vlm.family.merged_grid(grid)
        for n, f in enumerate(image):
            down, across = divmod(n, width)
            box = [across / width, down / height, (across + 1) / width, (down + 1) / height]
            code = place_code(torch.tensor([box]), (height, width), vlm.width)[0] if vlm.config.places else 0
            seen.append(f + code * f.norm())
    query = vlm.feedback.query.weight @ hidden
    scores = (
        torch.stack([query @ (vlm.feedback.key.weight @ (f / f.square().mean().sqrt())) for f in seen]) / vlm.width**0.5
    )
    return scores.log_softmax(-1), sum(w * f for w, f in zip(scores.softmax(-1), seen, strict=True)), seen


def slow_cross_entropy(vlm: LatentVLM, row: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of one row, summed over labelled tokens: position t − 1 predicts the label at t."""
    total = hidden.new_zeros(())
    for t, label in enumerate(row.labels[0].tolist()):
        if label != -100:
            total = total - torch.log_softmax(vlm.model.lm_head.weight @ hidden[t - 1], dim=0)[label]
    return total


def gradients(vlm: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of each parameter that takes one; zeros where the loss does not depend on it."""
    wanted = {name: parameter for name, parameter in vlm.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(wanted.items(), found, strict=True)
    }


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp(min=1e-12)
    return float(((found - expected).abs().max() / scale).detach())


def to_device(batch: Batch, device: torch.device) -> Batch:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: None if t is None else t.to(device) for name, t in tensors.items()})


def held_out() -> list[Trajectory]:
    """16 held-out prompts of both maze tasks, both styles and all levels."""
    return [
        GeneratedDataset(task, (level,), 1, 7, style, "test")[0]
        for task in ("vsp-planning", "vsp-reasoning")
        for style in ("direct", "cot")
        for level in (3, 4, 5, 6)
    ]
