"""Two ways must say the same, but where two tokens are equally likely."""

from __future__ import annotations

import pytest
import torch
from support import ragged

from mirage_vlm.benchmarks import agreement
from mirage_vlm.benchmarks.agreement import agree
from mirage_vlm.benchmarks.harness import Disagreement


@pytest.fixture(scope="module")
def rows(tiny) -> list[list[int]]:
    return [list(row.decoding.token_ids) for row in tiny.generate(ragged(), max_new_tokens=20)]


def changed(tiny, rows: list[list[int]], row: int, at: int, token: int | None = None) -> list[list[int]]:
    """Another token at one place; by default one that is not likely."""
    new = [list(tokens) for tokens in rows]
    new[row][at] = 40 + new[row][at] % 40 if token is None else token
    return new


def test_the_same_agrees(tiny, rows):
    assert agree(tiny, "a and b", ragged(), rows, rows) == {"what": "a and b", "rows": 5, "parted_at_ties": 0}


def test_another_token_is_refused(tiny, rows):
    with pytest.raises(Disagreement, match=r"a and b: row 1 differs at token 2: \d+ or \d+, of log-probability"):
        agree(tiny, "a and b", ragged(), rows, changed(tiny, rows, 1, 2))


def test_what_follows_a_tie_is_not_compared(tiny, rows, monkeypatch):
    other = changed(tiny, changed(tiny, rows, 1, 2), 1, 5)
    monkeypatch.setitem(agreement.TIES, torch.float32, 100.0)
    assert agree(tiny, "a and b", ragged(), rows, other)["parted_at_ties"] == 1


def test_a_row_that_ends_sooner_is_refused(tiny, rows):
    with pytest.raises(Disagreement, match=f"row 0 has {len(rows[0])} tokens one way and {len(rows[0]) - 1}"):
        agree(tiny, "a and b", ragged(), rows, [rows[0][:-1], *rows[1:]])


def test_a_word_in_place_of_a_latent_is_no_tie(tiny, rows, monkeypatch):
    monkeypatch.setitem(agreement.TIES, torch.float32, 100.0)
    row, at = next(
        (i, tokens.index(tiny.config.pad_id)) for i, tokens in enumerate(rows) if tiny.config.pad_id in tokens
    )
    with pytest.raises(Disagreement, match="None"):
        agree(tiny, "a and b", ragged(), rows, changed(tiny, rows, row, at, 50))
