"""The cache of stage 2 against plain concatenation."""

import pytest
import torch

from mirage_vlm.modeling.segment_cache import SegmentCache

WIDTHS = [3, 1, 1, 4]


def pieces() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [2, 1, width, 5] of four segments."""
    generator = torch.Generator().manual_seed(0)

    def piece(width: int) -> torch.Tensor:
        return torch.randn(2, 1, width, 5, generator=generator, dtype=torch.float64).requires_grad_()

    return [(piece(width), piece(width)) for width in WIDTHS]


def attended(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Something that is not linear in either, so that autograd keeps both."""
    return ((keys @ keys.transpose(-1, -2)).softmax(dim=-1) @ values.square()).sum()


def test_it_is_concatenation_with_its_gradient():
    given = pieces()
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(1, len(given) + 1):
        expected = expected + attended(*(torch.cat(parts, dim=-2) for parts in zip(*given[:i], strict=True)))
    found = torch.zeros((), dtype=torch.float64)
    cache = SegmentCache.empty(layers=1, room=sum(WIDTHS))
    for i, (keys, values) in enumerate(given):
        assert cache.get_seq_length() == sum(WIDTHS[:i])
        found = found + attended(*cache.update(keys, values, 0))
        cache = cache.next()
    assert torch.equal(found, expected)
    flat = [tensor for pair in given for tensor in pair]
    for a, b in zip(torch.autograd.grad(found, flat), torch.autograd.grad(expected, flat), strict=True):
        torch.testing.assert_close(a, b)


def test_the_past_is_not_copied():
    cache, memories = SegmentCache.empty(layers=2, room=sum(WIDTHS)), set()
    for keys, values in pieces():
        for layer in range(2):
            memories |= {tensor.untyped_storage().data_ptr() for tensor in cache.update(keys, values, layer)}
        cache = cache.next()
    assert len(memories) == 4, "one for the keys and one for the values of each layer"


def test_an_update_again_gives_the_same_and_grows_nothing():
    (first, second, *_) = pieces()
    cache = SegmentCache.empty(layers=1, room=4)
    once = cache.update(*first, 0)
    later = cache.next()
    longer = later.update(*second, 0)
    for a, b in ((cache.update(*first, 0), once), (later.update(*second, 0), longer)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert later.get_seq_length() == 3 and later.next().get_seq_length() == 4


@pytest.mark.parametrize("first", [False, True])
def test_a_draft_leaves_no_trace(first):
    one, other, draft, _ = pieces()
    cache = SegmentCache.empty(layers=1, room=4)
    if not first:
        cache.update(*one, 0)
        cache = cache.next()
    before = [] if first else [one]
    drafted = cache.draft().update(*draft, 0)
    kept = cache.update(*other, 0)
    for found, last in ((drafted, draft), (kept, other)):
        expected = [torch.cat(parts, dim=-2) for parts in zip(*before, last, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
