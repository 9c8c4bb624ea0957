"""Attention over a pool of blocks, of which each row reads its own and its prompt's.

Attention works on the blocks where they lie, in whatever order, and copies none of them: each block is
scored against the queries of its readers, and the partial results of a row's blocks are put together by the rule of
flash-decoding (each partial softmax is rescaled to the row's own maximum). So rows of any length stand side by side
without padding, and a row that leaves gives its blocks back at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from mirage_vlm.decoding.pool import BlockPool
from mirage_vlm.modeling.decoder import run_decoder

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM

PAGED = "mirage_paged"
MASKED = -1e30  # finite, so that a block with nothing to read has no NaN, and weighs nothing
FEW_BLOCKS = 64  # up to so many, copying them side by side is cheaper than putting partial results together
LOG2_E = math.log2(math.e)


class Paged(Protocol):
    """A pass over positions whose keys and values are kept in the pool."""

    def attend(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """What a layer's attention module finds: [B, H, T, d] queries, [B, K, T, d] new keys, values → [B, T, H, d]."""


@dataclass
class Prefill:
    """A pass over whole prompts, right-padded: plain causal attention, and everything is written to the pool.

    Attributes:
        blocks: [P · blocks of the widest] where each stretch of `size` positions goes; `NOBODY` for padding.
    """

    pool: BlockPool
    blocks: torch.Tensor

    def attend(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """[P, H, T, d] queries, [P, K, T, d] keys and values → [P, T, H, d]."""
        for store, new in zip(self.pool.layers[layer.layer_idx], (key, value), strict=True):
            rows, heads, length, width = new.shape
            padded = F.pad(new, (0, 0, 0, -length % self.pool.size))
            pieces = padded.view(rows, heads, -1, self.pool.size, width).transpose(1, 2)
            store[self.blocks] = pieces.reshape(-1, heads, self.pool.size, width).to(store.dtype)
        # padding stands to the right, so causal order alone keeps it from being read
        found = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return found.transpose(1, 2)


@dataclass
class Region:
    """A stretch of the pool whose blocks are all scored in one product.

    Attributes:
        low, high: first block and one past the last.
        readers: [blocks, R] the row that each query slot of a block belongs to; 0 where there is none.
        fill: [blocks] positions that hold something; of a response's own blocks, those before its last known step.
        start: [blocks] for a response's own block, its first position in the response; −1 for a prompt's.
    """

    low: int
    high: int
    readers: torch.Tensor
    fill: torch.Tensor
    start: torch.Tensor


@dataclass
class Step:
    """One position of every row.

    Attributes:
        regions: the blocks that are read; the first region begins with block `NOBODY`.
        table: [B, blocks of the longest row] index of each partial result of a row among those of all regions
            (block after block, slot after slot); 0 is a partial result of nothing. With one region of one slot it
            is the number of the block.
        block, offset: [B] where the new position is written.
        bias: for each region [blocks, 1, R or 1, 1, size], 0 or `MASKED`; for few blocks [1, B, 1, all positions].
    """

    pool: BlockPool
    regions: Sequence[Region]
    table: torch.Tensor
    block: torch.Tensor
    offset: torch.Tensor
    bias: Sequence[torch.Tensor] = field(default_factory=list)

    @property
    def few(self) -> bool:
        return len(self.regions) == 1 and self.table.numel() <= FEW_BLOCKS

    def mask(self, length: torch.Tensor, evicted: torch.Tensor | None) -> None:
        """Work out once a step what every layer may read.

        Args:
            length: [B] index of this position in each response.
            evicted: [B] rows that no longer see the prompt's pictures; None where there is none.
        """
        places = torch.arange(self.pool.size, device=length.device)
        self.bias = []
        for region in self.regions:
            own = length[region.readers[:, 0]] + 1 - region.start
            fill = torch.where(region.start >= 0, own, region.fill)
            hidden = (places >= fill.unsqueeze(1))[:, None]  # [n, 1, size]
            if evicted is not None:
                pictures = self.pool.images[region.low : region.high] & (region.start < 0).unsqueeze(1)
                hidden = hidden | (pictures[:, None] & evicted[region.readers].unsqueeze(-1))  # [n, R, size]
            bias = hidden * MASKED
            self.bias.append(bias[:, 0][self.table].flatten(1)[None, :, None] if self.few else bias[:, None, :, None])

    def attend(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """[B, H, 1, d] queries, [B, K, 1, d] new keys and values → [B, 1, H, d]."""
        keys, values = self.pool.layers[layer.layer_idx]
        keys[self.block, :, self.offset] = key[:, :, 0].to(keys.dtype)
        values[self.block, :, self.offset] = value[:, :, 0].to(values.dtype)
        rows, heads, _, width = query.shape
        query = query.reshape(rows, key.shape[1], heads // key.shape[1], width)  # [B, K, G, d]
        if self.few:
            found = self._side_by_side(query * scaling, keys, values)
        else:
            found = self._piece_by_piece(query * (scaling * LOG2_E), keys, values)
        return found.reshape(rows, 1, heads, width)

    def _side_by_side(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Ordinary attention over a copy of each row's blocks; [B, K, G, d] scaled queries → the same shape."""
        both = (t.transpose(0, 1)[:, self.table].flatten(2, 3) for t in (keys, values))
        own_keys, own_values = (t.to(query.dtype) for t in both)  # [K, B, T, d]
        scores = torch.matmul(query.transpose(0, 1), own_keys.transpose(2, 3)) + self.bias[0]  # [K, B, G, T]
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, own_values).transpose(0, 1)

    def _piece_by_piece(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attention by partial results; [B, K, G, d] queries, scaled for base 2 → the same shape.

        Base 2, because `exp` of what is masked is ten times slower than `exp2` on some processors.
        """
        parts = [
            _score(query, keys, values, region, bias) for region, bias in zip(self.regions, self.bias, strict=True)
        ]
        most, mass, summed = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        most = most[self.table]  # [B, M, K, G]
        weight = (most - most.amax(dim=1, keepdim=True)).exp2()
        total = (mass[self.table] * weight).sum(dim=1)
        found = (summed[self.table] * weight.unsqueeze(-1)).sum(dim=1) / total.unsqueeze(-1)  # [B, K, G, d]
        return found.to(query.dtype)


def _score(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, region: Region, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partial softmax of each block and slot.

    Args:
        query: [B, K, G, d], scaled for base 2.
        keys, values: [blocks of the pool, K, size, d].

    Returns:
        The largest score and the sum of weights [n · R, K, G], and the weighted sum of values [n · R, K, G, d].
    """
    keys, values = (t[region.low : region.high].to(query.dtype) for t in (keys, values))
    blocks, slots = region.readers.shape
    _, groups, each, width = query.shape
    if slots == 1:
        asked = query[region.readers[:, 0]]  # [n, K, G, d]
    else:
        asked = query[region.readers].transpose(1, 2).reshape(blocks, groups, slots * each, width)
    scores = torch.matmul(asked, keys.transpose(2, 3)).float().view(blocks, groups, slots, each, -1) + bias
    most = scores.amax(dim=-1, keepdim=True)  # [n, K, R, G, 1]
    weights = (scores - most).exp2_()
    mass = weights.sum(dim=-1)
    summed = torch.matmul(weights.view(blocks, groups, slots * each, -1).to(values.dtype), values).float()
    parts = most.squeeze(-1), mass, summed.view(blocks, groups, slots, each, width)
    return tuple(part.transpose(1, 2).flatten(0, 1) for part in parts)  # type: ignore[return-value]


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    paged: Paged,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An attention implementation of transformers, chosen by name; `paged` comes through the model's keywords."""
    return paged.attend(module, query, key, value, scaling), None


AttentionInterface.register(PAGED, _attend)


def run_paged(vlm: LatentVLM, embeds: torch.Tensor, positions: torch.Tensor, paged: Paged) -> torch.Tensor:
    """The decoder over [B, T, D] inputs at [3, B, T] positions, with its keys and values in the pool → [B, T, D]."""
    config = vlm.language_model.config
    usual, config._attn_implementation = config._attn_implementation, PAGED
    try:
        nothing = dict.fromkeys(config.layer_types)  # `paged` knows what may be read
        return run_decoder(vlm.language_model, embeds, positions, nothing, paged=paged).last_hidden_state
    finally:
        config._attn_implementation = usual
