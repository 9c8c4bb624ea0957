"""Visibility: who may look at the prompt's pictures, so that what is needed of them has to pass through the latents.

- `full`: everybody.
- `bottleneck`: only the pictures themselves, `latent_start` and the latents ("Latent Implicit Visual Reasoning",
  arXiv 2512.21218). Meant to be let go again: a recipe with it is followed by one without.
- `evict`: everybody up to the first `latent_end`, nobody from there on. Decoding has the same as `evict_images`, where
  the pictures leave the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM


def blind_positions(vlm: LatentVLM, input_ids: torch.Tensor, visibility: str) -> torch.Tensor | None:
    """[B, T] ids → [B, T] positions that do not see the pictures; None where all see everything."""
    latent, picture = vlm.config, input_ids == vlm.family.image_token_id
    if visibility == "full":
        return None
    if visibility == "evict":
        return (input_ids == latent.end_id).cumsum(dim=1) > 0
    return ~picture & (input_ids != latent.start_id) & (input_ids != latent.pad_id)


def mask_of(
    queries: torch.Tensor, keys: torch.Tensor, blind: torch.Tensor, pictures: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What is added to attention scores, 0 or the least number of the dtype.

    Args:
        queries: [B, Q] the place of each query in its row; −1 = padding.
        keys: [B, K] the same of the keys.
        blind: [B, Q] queries that see no pictures.
        pictures: [B, K] keys that are patches of pictures.

    Returns:
        [B, 1, Q, K].
    """
    seen = (keys >= 0).unsqueeze(1) & (keys.unsqueeze(1) <= queries.unsqueeze(2))
    seen &= ~(blind.unsqueeze(2) & pictures.unsqueeze(1))
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
