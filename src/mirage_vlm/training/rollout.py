"""Batches, where their latent spans are, and the forward pass with given latents; `own.py` has that with own ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mirage_vlm.modeling.decoder import run_decoder
from mirage_vlm.training.packing import packed_attention
from mirage_vlm.training.visibility import blind_positions, mask_of

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM


@dataclass(frozen=True)
class Batch:
    """Right-padded rows of one forward pass, all on the model's device.

    Attributes:
        input_ids: [B, T], latent positions hold `latent_pad`.
        attention_mask: [B, T], 1 where there is a token.
        labels: [B, T], −100 = no loss.
        pixel_values, grid_thw: the prompt's pictures of all rows, in row order; None where there are none.
        helper_pixel_values, helper_grid_thw: the helper images of all spans, in row order.
        helper_regions: [latents, 4 · m] the boxes of each latent, as for `LatentVLM.targets`, or None.
        segments: [B, T], 1, 2, … in a packed row's first, second, … example, 0 in padding; None where each row is one
            example.
        picture_keys, helper_keys: names of the pictures and helper images by content, for a feature store; None where
            the collator did not make them.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None = None
    grid_thw: torch.Tensor | None = None
    helper_pixel_values: torch.Tensor | None = None
    helper_grid_thw: torch.Tensor | None = None
    helper_regions: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    picture_keys: tuple[str, ...] | None = None
    helper_keys: tuple[str, ...] | None = None


Run = tuple[int, int]  # first position, one past the last


def span_runs(input_ids: torch.Tensor, pad_id: int) -> list[list[Run]]:
    """Where the latent spans of each row are: runs of `latent_pad`, [B] lists in order."""
    is_pad = torch.nn.functional.pad((input_ids == pad_id).int(), (1, 1))
    edges = is_pad.diff(dim=1).cpu()
    runs: list[list[Run]] = []
    for row in edges:
        starts, ends = (row == 1).nonzero().flatten().tolist(), (row == -1).nonzero().flatten().tolist()
        runs.append(list(zip(starts, ends, strict=True)))
    return runs


def embeddings(vlm: LatentVLM, batch: Batch) -> torch.Tensor:
    """[B, T, D] input embeddings of a batch with its pictures in place; latent positions hold that of `latent_pad`."""
    return vlm.embed_prompt(batch.input_ids, batch.pixel_values, batch.grid_thw, batch.picture_keys)


def forward_given(
    vlm: LatentVLM,
    batch: Batch,
    latents: torch.Tensor | None,
    visibility: str = "full",
    embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """One pass with given latents (teacher forcing).

    Args:
        latents: [latent positions of the batch, D] input embeddings for them, in row order.
        visibility: who may look at pictures; see `mirage_vlm.training.visibility`. Packed rows know `full` alone.
        embeds: `embeddings` of the batch, where they are known already.

    Returns:
        [B, T, D] hidden states after the final norm.
    """
    embeds = embeddings(vlm, batch) if embeds is None else embeds
    if latents is not None:
        places = (batch.input_ids == vlm.config.pad_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(places, latents.to(embeds.dtype))
    if batch.segments is not None:
        told = packed_attention(vlm, batch.input_ids, batch.segments, batch.grid_thw)
    else:
        positions = vlm.positions(batch.input_ids, batch.attention_mask, batch.grid_thw)
        mask = batch.attention_mask
        if (blind := blind_positions(vlm, batch.input_ids, visibility)) is not None:
            places = torch.where(mask > 0, torch.arange(mask.shape[1], device=mask.device), -1)
            mask = mask_of(places, places, blind, batch.input_ids == vlm.family.image_token_id, embeds.dtype)
        told = {"attention_mask": mask, "position_ids": positions}
    return run_decoder(vlm.language_model, embeds, **told).last_hidden_state
