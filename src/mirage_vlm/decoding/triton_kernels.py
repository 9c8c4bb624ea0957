"""What one step of decoding needs on a CUDA device that torch has no fast operation for, in Triton.

`attend` is the kernel of `mirage_vlm.decoding.native` for the device: attention over the blocks where they lie, the
positions of a row shared out among several programs (flash-decoding), the new position written on the way. `project`
multiplies one vector by up to three matrices, which for a single row is bound by reading them.

Only imported where Triton is there, which torch's builds for CUDA bring.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 64  # positions that a program looks at together
PROGRAMS = 528  # four for each processor of a large card
MOST_SPLITS = 32
OUTPUTS = 2  # rows of a matrix that a program of `project` reads
LONG = 8192  # inputs from which on a program has more threads


@triton.jit
def _attend(
    found,  # [B, K, G, D], the result if there is one split
    parts,  # [B, K, SPLITS, G, D + 2] else: weighted values, the largest score, the sum of weights
    query,
    key,
    value,
    keys,
    values,
    table,
    own,
    length,
    shared,
    block,
    offset,
    hidden,
    evicted,
    scale,
    across,  # blocks of a row of the table
    K: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,  # G, padded to what a product needs
    D: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    EVICTS: tl.constexpr,
):
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    mine, theirs = tl.load(length + row).to(tl.int32), tl.load(shared + row).to(tl.int32)
    blocks = tl.load(own + row).to(tl.int32)
    group, place = tl.arange(0, GROUPS), tl.arange(0, D)
    real = group < G
    asked = tl.load(query + ((row * K + head) * G + group[:, None]) * D + place, mask=real[:, None], other=0.0)
    most = tl.full([GROUPS], float("-inf"), tl.float32)
    mass = tl.zeros([GROUPS], tl.float32)
    summed = tl.zeros([GROUPS, D], tl.float32)
    blind = False
    if EVICTS:
        blind = tl.load(evicted + row) != 0
    total = mine + theirs  # the prompt's positions, then the response's before the new one
    for tile in range(split, tl.cdiv(total, TILE), SPLITS):
        at = tile * TILE + tl.arange(0, TILE)
        there = at < total
        answer = at >= theirs
        position = tl.where(answer, at - theirs, at)
        slot = tl.where(answer, 0, blocks) + position // SIZE
        which = tl.load(table + row * across + slot, mask=there, other=0)
        if EVICTS:
            picture = tl.load(hidden + which * SIZE + position % SIZE, mask=there, other=0) != 0
            there = there & (answer | ~(picture & blind))
        begin = ((which * K + head) * SIZE + position % SIZE) * D
        read = tl.load(keys + begin[:, None] + place, mask=there[:, None], other=0.0).to(asked.dtype)
        scores = tl.dot(asked, tl.trans(read), input_precision="ieee") * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights, kept = tl.exp2(scores - level[:, None]), tl.exp2(most - level)
        held = tl.load(values + begin[:, None] + place, mask=there[:, None], other=0.0).to(asked.dtype)
        mass = mass * kept + tl.sum(weights, 1)
        summed = summed * kept[:, None] + tl.dot(weights.to(asked.dtype), held, input_precision="ieee")
        most = higher
    if split == 0:  # the new position, which is in no block yet
        fresh = tl.load(key + (row * K + head) * D + place)
        shown = tl.load(value + (row * K + head) * D + place)
        target = ((tl.load(block + row) * K + head) * SIZE + tl.load(offset + row)) * D + place
        tl.store(keys + target, fresh.to(keys.dtype.element_ty))
        tl.store(values + target, shown.to(values.dtype.element_ty))
        fresh = fresh.to(keys.dtype.element_ty).to(tl.float32)
        shown = shown.to(values.dtype.element_ty).to(tl.float32)
        score = tl.sum(asked.to(tl.float32) * fresh[None, :], 1) * scale
        higher = tl.maximum(most, score)
        kept, weight = tl.exp2(most - higher), tl.exp2(score - higher)
        mass = mass * kept + weight
        summed = summed * kept[:, None] + weight[:, None] * shown[None, :]
        most = higher
    if SPLITS == 1:
        out = found + ((row * K + head) * G + group[:, None]) * D + place
        tl.store(out, (summed / mass[:, None]).to(found.dtype.element_ty), mask=real[:, None])
    else:
        part = parts + (((row * K + head) * SPLITS + split) * G + group) * (D + 2)
        tl.store(part[:, None] + place, summed, mask=real[:, None])
        tl.store(part + D, most, mask=real)
        tl.store(part + D + 1, mass, mask=real)


@triton.jit
def _join(found, parts, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    """The parts of one query put together."""
    row, head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    split, place = tl.arange(0, SPLITS), tl.arange(0, D)
    part = parts + (((row * K + head) * SPLITS + split) * G + group) * (D + 2)
    most, mass = tl.load(part + D), tl.load(part + D + 1)
    weight = tl.exp2(most - tl.max(most, 0))
    total = tl.sum(mass * weight, 0)
    summed = tl.sum(tl.load(part[:, None] + place) * weight[:, None], 0)
    out = found + ((row * K + head) * G + group) * D + place
    tl.store(out, (summed / total).to(found.dtype.element_ty))


def attend(
    query: torch.Tensor,  # [B, H, 1, d]; head h reads key head h // (H / K)
    key: torch.Tensor,  # [B, K, 1, d]
    value: torch.Tensor,
    keys: torch.Tensor,  # [blocks, K, size, d]
    values: torch.Tensor,
    table: torch.Tensor,
    own: torch.Tensor,
    length: torch.Tensor,
    shared: torch.Tensor,
    block: torch.Tensor,
    offset: torch.Tensor,
    hidden: torch.Tensor | None,
    evicted: torch.Tensor | None,
    scale: float,  # of scores in base 2
) -> torch.Tensor:
    """`mirage_vlm.decoding.native._attend` on a CUDA device → [B, 1, H, d]."""
    rows, heads, _, width = query.shape
    groups, size, across = key.shape[1], keys.shape[2], table.shape[1]
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    found = query.new_empty(rows, 1, heads, width)
    wanted = PROGRAMS // (rows * groups)
    splits = max(1, min(MOST_SPLITS, triton.next_power_of_2(wanted + 1) // 2, triton.cdiv(across * size, TILE)))
    splits = triton.next_power_of_2(splits)
    each = heads // groups
    parts = found if splits == 1 else query.new_empty(rows, groups, splits, each, width + 2, dtype=torch.float32)
    evicts = evicted is not None
    _attend[(rows, groups, splits)](
        found,
        parts,
        query,
        key,
        value,
        keys,
        values,
        table,
        own,
        length,
        shared,
        block,
        offset,
        hidden if evicts else own,
        evicted if evicts else own,
        scale,
        across,
        K=groups,
        G=each,
        GROUPS=max(16, triton.next_power_of_2(each)),
        D=width,
        SIZE=size,
        TILE=TILE,
        SPLITS=splits,
        EVICTS=evicts,
    )
    if splits > 1:
        _join[(rows, groups, each)](found, parts, K=groups, G=each, D=width, SPLITS=splits, num_warps=2)
    return found


@triton.jit
def _project(
    found,  # [n0 + n1 + n2]
    vector,  # [inputs]
    w0,  # [n0, inputs]
    w1,
    w2,
    b0,
    b1,
    b2,
    n0,
    n1,
    inputs,
    BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    begin = tl.program_id(0) * OUTPUTS  # each n is a multiple of OUTPUTS, so a program has one matrix
    first, matrix, bias = begin, w0, b0
    if begin >= n0 + n1:
        first, matrix, bias = begin - n0 - n1, w2, b2
    elif begin >= n0:
        first, matrix, bias = begin - n0, w1, b1
    output, place = first + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    line = matrix + output.to(tl.int64)[:, None] * inputs
    total = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for left in range(0, inputs, INPUTS):
        there = left + place < inputs
        factor = tl.load(vector + left + place, mask=there, other=0.0).to(tl.float32)
        part = tl.load(line + left + place, mask=there[None, :], other=0.0, eviction_policy="evict_first")
        total += part.to(tl.float32) * factor[None, :]
    product = tl.sum(total, 1)
    if BIAS:
        product += tl.load(bias + output).to(tl.float32)
    tl.store(found + begin + tl.arange(0, OUTPUTS), product.to(found.dtype.element_ty))


def project(vector: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    """One vector times several matrices.

    Args:
        vector: [..., inputs], all dimensions before the last of size 1.
        weights: up to three [n, inputs], each n a multiple of `OUTPUTS`.
        biases: as many [n], or none.

    Returns:
        [..., sum of n], summed in float32.
    """
    vector = vector.contiguous()
    sizes = [len(weight) for weight in weights] + [0] * (3 - len(weights))
    found = vector.new_empty(*vector.shape[:-1], sum(sizes))
    matrices = [*weights, *(3 - len(weights)) * weights[:1]]
    added = [*biases, *(3 - len(biases)) * biases[:1]] if biases else matrices
    told = (*matrices, *added, *sizes[:2], vector.shape[-1])
    # of the sizes that were tried on an H200 the fastest for matrices of 3584 and 18944 inputs
    inputs, warps = (2048, 8) if vector.shape[-1] >= LONG else (1024, 4)
    grid = (sum(sizes) // OUTPUTS,)
    _project[grid](found, vector, *told, BIAS=bool(biases), OUTPUTS=OUTPUTS, INPUTS=inputs, num_warps=warps)
    return found
