"""Latent reasoning the way it was published: one request, one example at a time.

These are the plain loops that the engine and the trainer are measured against, and must agree with. They use the same
model, the same `recast` and the same encoding; what they lack is batching, packing and a graph-keeping cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from mirage_vlm.modeling.decoder import run_decoder
from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.training.rollout import Batch
from mirage_vlm.trajectory import Trajectory


@torch.no_grad()
def decode_one(vlm: LatentVLM, prompt: Trajectory, new_tokens: int, max_spans: int | None = None) -> list[int]:
    """Greedy decoding of one request under the stop rule `fixed`: a pass over the prompt, then one for each position.

    Args:
        new_tokens: most positions, latents included.
        max_spans: most spans.

    Returns:
        The tokens, latent positions as `latent_pad`, without the end of turn.
    """
    latent, device = vlm.config, vlm.device
    prompt_ids, pictures = vlm.encoder.prompt(prompt.prompt)
    ids = torch.tensor([prompt_ids], device=device)
    grid = None if pictures is None else pictures.grid_thw.to(device)
    embeds = vlm.embed_prompt(ids, None if pictures is None else pictures.pixel_values.to(device), grid)
    positions = vlm.positions(ids, torch.ones_like(ids), grid)  # [3, 1, T]
    following = int(positions.max()) + 1
    patches = vlm.patches_of(ids, embeds, grid)
    cache = DynamicCache(config=vlm.language_model.config)
    never = [latent.pad_id, latent.end_id, vlm.family.image_token_id]  # cannot be said as words
    stops = vlm.stop_ids()
    tokens: list[int] = []
    thought, spans = -1, 0  # latents of the open span, −1 in text; spans so far
    while True:
        hidden = run_decoder(vlm.language_model, embeds, positions, past=cache).last_hidden_state[:, -1]
        if thought < 0:
            scores = vlm.logits(hidden)[0].float()
            scores[[*never, latent.start_id] if spans == max_spans else never] = -torch.inf
            token = int(scores.argmax())
        else:
            token = latent.pad_id if thought < latent.latent_size else latent.end_id
        last = len(tokens) + 1 == new_tokens
        if token in stops or (last and token == latent.pad_id):  # that latent would never be consumed
            return tokens
        tokens.append(token)
        if last:
            return tokens
        if token == latent.start_id:
            thought, spans = 0, spans + 1
        elif token == latent.pad_id:
            thought += 1
        elif token == latent.end_id:
            thought = -1
        embeds = vlm.recast(torch.tensor([token], device=device), hidden, patches).unsqueeze(1)
        positions = torch.full((3, 1, 1), following, device=device)
        following += 1


def stage2_one(vlm: LatentVLM, row: Batch) -> torch.Tensor:
    """Stage 2's loss on one example: for each latent a fresh pass over everything before it, and one over all.

    Args:
        row: one row without padding.

    Returns:
        Cross-entropy summed over labelled tokens, with its graph.
    """
    ids = row.input_ids
    positions = vlm.positions(ids, row.attention_mask, row.grid_thw)
    embeds = vlm.embed_prompt(ids, row.pixel_values, row.grid_thw)

    def read(end: int) -> torch.Tensor:
        return run_decoder(vlm.language_model, embeds[:, :end], positions[:, :, :end]).last_hidden_state

    patches = vlm.patches_of(ids, embeds, row.grid_thw)
    for t in (ids[0] == vlm.config.pad_id).nonzero().flatten().tolist():
        latent = vlm.recast(ids[:, t], read(t)[:, -1], patches)
        embeds = torch.cat([embeds[:, :t], latent.unsqueeze(1), embeds[:, t + 1 :]], dim=1)
    hidden = read(ids.shape[1])
    labels = row.labels[:, 1:]
    labelled = labels != IGNORED
    logits = vlm.logits(hidden[:, :-1][labelled]).float()
    return F.cross_entropy(logits, labels[labelled], reduction="sum")
