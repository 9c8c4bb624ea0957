"""Choosing tokens from logits, all rows at once, each by its own rules and its own seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM

# splitmix64 (Steele, Lea and Flood 2014), in wrapping 64-bit arithmetic
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def uniforms(seeds: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[n] numbers in [0, 1), one for each seed and count: the same on every device and in every batch.

    A pure function takes the place of a generator, so that a row draws the same whatever is decoded beside it.
    """
    bits = _scramble(_scramble(seeds * _STEP) + counts * _STEP)
    return (_shift(bits, 40)).float() / (1 << 24)


def normals(seeds: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """[n, width] standard normal numbers for each seed and count, by the same pure function (Box and Muller 1958).

    They are not those that `uniforms` of the same seed and count are made of.
    """
    pairs = -(-width // 2)
    places = torch.arange(2 * pairs, device=seeds.device)
    own = _scramble(_scramble(seeds * _STEP + 1) + counts * _STEP).unsqueeze(1).expand(-1, 2 * pairs)
    near, turn = uniforms(own, places).chunk(2, dim=1)
    radius, angle = (-2 * torch.log1p(-near)).sqrt(), 2 * torch.pi * turn
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :width]


def _scramble(bits: torch.Tensor) -> torch.Tensor:
    bits = bits + _STEP
    for by, factor in _MIX:
        bits = (bits ^ _shift(bits, by)) * factor
    return bits ^ _shift(bits, 31)


def _shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Shift right without the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def allowed(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[n, V] logits with everything outside of top-k and then top-p at −∞.

    The nucleus is the smallest set of most likely tokens whose mass reaches `top_p`.

    Args:
        top_k: [n] number of candidates, 0 = all.
        top_p: [n] mass of the nucleus.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    outside = (rank >= top_k.unsqueeze(1)) & (top_k > 0).unsqueeze(1)
    chances = ordered.masked_fill(outside, -torch.inf).softmax(dim=-1)
    outside |= (chances.cumsum(dim=-1) - chances >= top_p.unsqueeze(1)) & (top_p < 1).unsqueeze(1)
    return logits.scatter(1, order, ordered.masked_fill(outside, -torch.inf))


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[n, V] logits and [n] numbers in [0, 1) → [n] tokens: that in whose stretch of the heaped-up chances it falls."""
    heaped = logits.softmax(dim=-1).cumsum(dim=-1)
    if heaped.device.type != "cpu":  # a parallel scan falls by an ulp now and then; a token without chance could be met
        heaped = heaped.cummax(dim=-1).values
    total = heaped[:, -1]
    mark = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return (heaped <= mark.unsqueeze(1)).sum(dim=-1)


def never_said(vlm: LatentVLM) -> list[int]:
    """Tokens that cannot be chosen in text: a latent, the end of a span, a picture's patch."""
    return [vlm.config.pad_id, vlm.config.end_id, vlm.family.image_token_id]


def more_or_end(logits: torch.Tensor, pad: int, end: int) -> torch.Tensor:
    """[n, V] logits where the model decides whether a span goes on: minus infinity for all but a latent and the end."""
    two = torch.full_like(logits, -torch.inf)
    two[:, pad], two[:, end] = logits[:, pad], logits[:, end]
    return two
