"""The C kernel of paged attention, against attention written out."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from support import ragged
from test_generate import assert_same

from mirage_vlm.decoding import Engine, EngineConfig, native
from mirage_vlm.trajectory import Trajectory

TOKENS = 40


@pytest.fixture(scope="module")
def prompts() -> list[Trajectory]:
    return ragged()


@pytest.fixture(scope="module")
def alone(tiny, prompts) -> list[Trajectory]:
    """Each decoded on its own."""
    return [tiny.generate([prompt], max_new_tokens=TOKENS, latent_size=4)[0] for prompt in prompts]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size, width, each", [(32, 32, 1), (8, 64, 2), (7, 8, 3), (13, 24, 1), (1, 16, 1)])
def test_the_kernel_reads_what_the_cache_holds(dtype, size, width, each):
    """Against a softmax written out for each row, on caches of both dtypes, with rows of any length."""
    kernel = native.load()
    if kernel is None or (dtype == "float16" and not kernel.mirage_half()):
        pytest.skip("no C compiler, or a processor that does not convert half precision")
    torch.manual_seed(0)
    heads, rows, mine, theirs = 2, 5, 4, 3
    keys, values = (torch.randn(rows * (mine + theirs) + 1, heads, size, width) for _ in range(2))
    keys, values = (store.to(getattr(torch, dtype)) for store in (keys, values))
    keys[0], values[0] = torch.nan, torch.nan  # nobody's: must not be read
    table = torch.randperm(rows * (mine + theirs)).view(rows, -1) + 1
    length, shared = torch.randint(mine * size, (rows,)), torch.randint(1, theirs * size + 1, (rows,))
    query = torch.randn(rows, heads * each, 1, width)
    key, value = torch.randn(2, rows, heads, 1, width)
    block, offset = table.gather(1, (length // size)[:, None])[:, 0], length % size
    hidden = torch.rand(len(keys), size) < 0.3
    evicted = torch.arange(rows) % 2 == 1
    told = (table, torch.full((rows,), mine), length, shared, block, offset, hidden, evicted)
    found = native._attend(query, key, value, keys, values, *told, 0.3 * math.log2(math.e))
    for row in range(rows):
        own, prompt = table[row, :mine], table[row, mine:]
        seen = [(b, t) for i, b in enumerate(own) for t in range(size) if i * size + t <= length[row]]
        for i, b in enumerate(prompt):
            there = [t for t in range(size) if i * size + t < shared[row]]
            seen += [(b, t) for t in there if not (evicted[row] and hidden[b, t])]
        at = tuple(torch.tensor(index) for index in zip(*seen, strict=True))
        for head in range(heads * each):
            read = [store[at[0], head // each, at[1]].float() for store in (keys, values)]
            weights = (0.3 * read[0] @ query[row, head, 0]).softmax(0)
            assert found[row, 0, head] == pytest.approx((weights @ read[1]).numpy(), abs=1e-5)
    here = (block, slice(None), offset)
    assert torch.equal(keys[here], key[:, :, 0].to(keys.dtype)) and torch.equal(
        values[here], value[:, :, 0].to(values.dtype)
    )


def test_the_kernel_is_used_where_it_can_be(tiny, fresh, monkeypatch):
    if shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        assert Engine(tiny)._native
        assert Engine(tiny, EngineConfig(cache_dtype="float16"))._native == bool(native.load().mirage_half())
        assert Engine(tiny, EngineConfig(cache_dtype="bfloat16"))._native
        assert Engine(fresh.to(torch.bfloat16))._native
    assert not Engine(tiny, EngineConfig(native=False))._native


def test_a_kernel_that_cannot_be_built_is_told_and_done_without(tiny, prompts, alone, monkeypatch, tmp_path, caplog):
    broken = tmp_path / "attend.c"
    broken.write_text("this is not C")
    monkeypatch.setattr(native, "SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load.cache_clear()
    try:
        assert_same(tiny.generate(prompts[:3], max_new_tokens=TOKENS, latent_size=4), alone[:3])
        if native.compiler() is not None:
            assert "the attention kernel could not be built" in caplog.text
        assert not list((tmp_path / "mirage-vlm").glob("*.so"))
    finally:
        native.load.cache_clear()
