"""Who is let in: as soon as there is room, never lost to a failure, and never by what cannot be decoded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import dialogue, picture, ragged
from test_engine import finished
from test_generate import assert_same

from mirage_vlm.decoding import Engine, EngineConfig, memory
from mirage_vlm.decoding import engine as engine_module
from mirage_vlm.errors import MirageError
from mirage_vlm.trajectory import LatentSpan, Trajectory


def short(i: int) -> Trajectory:
    return dialogue(["Go up, then right. " * (1 + i % 2), f"Which way, {i}?"], ["x"])


@pytest.mark.parametrize("room", [3, 6])
def test_where_memory_is_the_limit_a_place_is_taken_as_soon_as_it_is_free(tiny, room):
    """With room for a few rows of 64 that might be, nobody waits until all of them have left."""
    config = EngineConfig(max_batch_tokens=room * 16 * 9, block_size=16)
    engine = Engine(tiny, config)
    for i in range(20):
        engine.submit(short(i), max_new_tokens=4 + 5 * (i % 5))
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, len(engine.active))
        if engine.queue:
            needed = engine.queue[0].reserved + engine.pool.blocks_for(len(engine.queue[0].prompt.ids))
            fits, waiting = engine.pool.reserved + needed <= engine.pool.limit, len(engine.queue)
            engine._admit()
            assert (len(engine.queue) < waiting) == fits
    assert most >= room and engine.pool.reserved == 0


@pytest.mark.parametrize("when", ["pictures", "second pass"])
def test_a_failure_while_prompts_are_read_loses_nothing(tiny, monkeypatch, when):
    prompts = [*ragged(), *(dialogue([picture(2, 2, 30 + i), "Go up. " * (1 + 9 * i)], ["x"]) for i in range(4))]
    options = {"max_new_tokens": 12, "latent_size": 2}
    wanted = tiny.generate(prompts, **options)
    engine = Engine(tiny, EngineConfig(max_batch_tokens=4_000, prefill_tokens=60))
    for prompt in prompts:
        engine.submit(prompt, **options)
    name = "_features" if when == "pictures" else "_pass"
    usual, calls = getattr(engine.reader, name), []

    def fails(*given):
        calls.append(given)
        if len(calls) == (1 if when == "pictures" else 2):
            raise torch.OutOfMemoryError("no memory")
        return usual(*given)

    monkeypatch.setattr(engine.reader, name, fails)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    assert len(engine.queue) == len(prompts) and not engine.active
    assert engine.pool.used == engine.pool.reserved == sum(len(r.prompt.blocks) for r in engine.queue)
    assert (engine.pool.used > 0) == (when == "second pass"), "what has been read stays"
    assert_same(finished(engine), wanted)
    assert engine.pool.reserved == 0 and engine.pool.used == 0


def test_seeds_that_cannot_be_are_refused_before_anything_is_queued(tiny):
    engine = Engine(tiny)
    for more, message in (
        ({"n": 4, "seeds": [1, 2]}, "got 2 seeds for 4 responses"),
        ({"n": 1, "seeds": [1, 2]}, "got 2 seeds for 1 responses"),
        ({"seed": 2**63}, "seeds must fit into 64 bits"),
    ):
        with pytest.raises(MirageError, match=message):
            engine.submit(short(0), **more)
    assert not engine.busy and list(engine.run()) == []


def spoken(tiny) -> Trajectory:
    """A response with two spans or more."""
    rows = tiny.generate(ragged(), max_new_tokens=60, latent_size=2, n=8, temperature=1.0)
    return next(row for row in rows if len(row.spans) > 1 and all(span.k == 2 for span in row.spans[:2]))


def test_a_replay_that_holds_some_latents_gives_each_span_its_own(tiny):
    row = spoken(tiny)
    marked = torch.full((2, tiny.width), 0.25)
    segments = list(row.response)
    seen = [i for i, segment in enumerate(segments) if isinstance(segment, LatentSpan)]
    for place, latents in zip(seen[:2], (None, marked), strict=True):
        segments[place] = replace(segments[place], latents=latents)
    engine = Engine(tiny)
    engine.submit(row, replay=row.with_response(segments, row.decoding))
    (again,) = finished(engine)
    assert again.decoding.token_ids == row.decoding.token_ids
    assert torch.allclose(again.spans[0].latents, row.spans[0].latents, atol=1e-5), "the model's own"
    assert torch.equal(again.spans[1].latents, marked)


def test_an_empty_response_cannot_be_replayed(tiny):
    row = spoken(tiny)
    nothing = replace(row.decoding, token_ids=(), finish_reason="cancelled")
    with pytest.raises(MirageError, match="an empty response cannot be replayed"):
        Engine(tiny).submit(row, replay=row.with_response([], nothing))


def test_when_a_replay_has_left_nothing_of_it_stays(tiny):
    row = spoken(tiny)
    engine = Engine(tiny)
    engine.submit(row, replay=row)
    for prompt in ragged():
        engine.submit(prompt, max_new_tokens=len(row.decoding.token_ids) + 40, max_spans=0)
    while any(response.replay is not None for response in (*engine.queue, *engine.active)):
        engine.step()
    assert engine.active and engine.rows.forced.shape[1] == engine.rows.given.shape[1] == engine.rows.held.shape[1] == 0


def test_many_pictures_go_through_the_tower_in_parts(tiny, monkeypatch):
    prompts = [dialogue([picture(2, 2, 50 + i), picture(3, 2, 60 + i), "Go"], ["x"]) for i in range(5)]
    wanted = tiny.generate(prompts, max_new_tokens=8)
    sizes, usual = [], tiny.image_features

    def counted(pixels, grids, keys=None):
        found = usual(pixels, grids, keys)
        sizes.append(sum(map(len, found)))
        return found

    monkeypatch.setattr(tiny, "image_features", counted)
    assert_same(tiny.generate(prompts, max_new_tokens=8, engine=EngineConfig(prefill_tokens=24)), wanted)
    assert len(sizes) > 1 and max(sizes) <= 24
    most = max(sizes)
    sizes.clear()
    tiny.generate(prompts, max_new_tokens=8, engine=EngineConfig(prefill_tokens=1))
    assert len(sizes) == 10 and max(sizes) < most, "each at least goes through alone"


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_is_kept(tmp_path, monkeypatch, version):
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    (folder / limit).write_text("1000\n")
    (folder / used).write_text("700\n")
    (folder / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == 350
    (folder / limit).write_text("max\n")
    assert memory.free_memory(torch.device("cpu")) > 1_000_000
    assert engine_module.free_memory is memory.free_memory
