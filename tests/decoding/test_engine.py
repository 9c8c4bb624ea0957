"""The engine: rows that come and go, groups, memory, eviction, streaming, replay and cancelling."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from support import dialogue, distance, picture, ragged, replayed, slow_embeddings, slow_positions, slow_rollout, split
from test_generate import assert_same

from mirage_vlm.decoding import (
    Engine,
    EngineConfig,
    Finished,
    LatentConsumed,
    SpanClosed,
    SpanOpened,
    TextPiece,
)
from mirage_vlm.decoding import blocks as blocks_module
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.trajectory import Trajectory

TOKENS = 40


@pytest.fixture(scope="module")
def prompts() -> list[Trajectory]:
    """Sixteen prompts of different lengths with 0, 1 and 2 pictures."""
    words = ["Go up, ", "then right, ", "The hole is on the left. ", "Which way? "]
    more = [dialogue([picture(1 + i % 3, 2, 20 + i), "".join(words[: 1 + i % 4]) * (1 + i)], ["x"]) for i in range(11)]
    return [*ragged(), *more]


@pytest.fixture(scope="module")
def alone(tiny, prompts) -> list[Trajectory]:
    """Each decoded on its own."""
    return [tiny.generate([prompt], max_new_tokens=TOKENS, latent_size=4)[0] for prompt in prompts]


def finished(engine: Engine) -> list[Trajectory]:
    """Run to the end; trajectories in the order of requests and samples."""
    done = {(e.request, e.sample): e.trajectory for e in engine.run() if isinstance(e, Finished)}
    return [done[key] for key in sorted(done)]


# -- continuous batching ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(max_rows=3),
        EngineConfig(max_rows=5, block_size=4),
        EngineConfig(max_rows=64, block_size=7, prefill_tokens=60),
        EngineConfig(max_rows=6, look_every=5),
        EngineConfig(max_batch_tokens=400, block_size=16),
        EngineConfig(image_cache=0),
    ],
    ids=["few-rows", "small-blocks", "small-passes", "rare-looks", "little-memory", "no-image-cache"],
)
def test_rows_that_come_and_go_decode_as_one_at_a_time(tiny, prompts, alone, config):
    assert_same(tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=4, engine=config), alone)


@pytest.mark.parametrize("way", ["kernel", "by-pieces", "side-by-side"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("evict", [False, True])
def test_all_ways_of_attending_agree(tiny, prompts, monkeypatch, way, n, evict):
    """Against transformers' own attention: what was decoded is read again in one pass of stage 2."""
    monkeypatch.setattr(blocks_module, "FEW_BLOCKS", 10_000 if way == "side-by-side" else 0)
    config = EngineConfig(native=way == "kernel", block_size=8)
    options = {"max_new_tokens": TOKENS, "latent_size": 4, "n": n, "temperature": 0.8 * (n > 1), "logprobs": True}
    rows = tiny.generate(prompts, engine=config, evict_images=evict, **options)
    for row in rows:
        slow = naive_log_probabilities(tiny, row, options["temperature"] or 1.0, evict)
        for said, other in zip(row.decoding.logprobs, slow, strict=True):
            assert said is None or said == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("way", ["kernel", "by-pieces", "side-by-side"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cache_in_half_precision_is_near_to_the_models_own(tiny, prompts, monkeypatch, way, dtype):
    monkeypatch.setattr(blocks_module, "FEW_BLOCKS", 10_000 if way == "side-by-side" else 0)
    exact = tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=4, logprobs=True)
    engine = Engine(tiny, EngineConfig(native=way == "kernel", cache_dtype=dtype))
    assert {store.dtype for layer in engine.pool.layers for store in layer} == {getattr(torch, dtype)}
    for prompt, row in zip(prompts, exact, strict=True):
        engine.submit(prompt, replay=row, latent_size=4, logprobs=True)
    apart = [
        abs(said - other)
        for row, near in zip(exact, finished(engine), strict=True)
        for said, other in zip(row.decoding.logprobs, near.decoding.logprobs, strict=True)
        if said is not None
    ]
    assert 0 < max(apart) < (1e-2 if dtype == "float16" else 1e-1)


def test_a_cache_of_an_unknown_dtype_is_refused():
    with pytest.raises(MirageError, match="cache_dtype must be one of float32, float16, bfloat16, not 'int8'"):
        EngineConfig(cache_dtype="int8")


def test_a_quiet_request_tells_of_its_end_alone(tiny, prompts, alone):
    engine = Engine(tiny)
    for i, prompt in enumerate(prompts):
        engine.submit(prompt, max_new_tokens=TOKENS, latent_size=4, quiet=i % 2 == 0)
    events = list(engine.run())
    told = {event.request for event in events if not isinstance(event, Finished)}
    assert told == {i for i, row in enumerate(alone) if i % 2 and row.decoding.token_ids}
    assert_same(
        [event.trajectory for event in sorted(events, key=lambda e: e.request) if isinstance(event, Finished)], alone
    )


def test_sixty_four_mixed_requests_equal_one_at_a_time(tiny, prompts):
    """Stop rules, k, limits, seeds and temperatures are each row's own."""
    kinds = [
        {"latent_size": 4},
        {"stop_rule": "learned", "latent_size": 5},
        {"temperature": 1.2, "top_k": 40, "seed": 5},
        {"temperature": 0.8, "top_p": 0.9, "max_spans": 1, "logprobs": True},
    ]
    wanted = [(prompts[i % 16], {"max_new_tokens": 12 + 7 * (i % 5), **kinds[i // 16]}) for i in range(64)]
    engine = Engine(tiny, EngineConfig(max_rows=64))
    for prompt, options in wanted:
        engine.submit(prompt, **options)
    together = finished(engine)
    for (prompt, options), row in zip(wanted, together, strict=True):
        engine = Engine(tiny)
        engine.submit(prompt, **options)
        (single,) = finished(engine)
        near = replace(row.decoding, logprobs=None) == replace(single.decoding, logprobs=None)
        assert near, (options, row.decoding, single.decoding)
        if options.get("logprobs"):
            for a, b in zip(row.decoding.logprobs, single.decoding.logprobs, strict=True):
                assert (a is None) == (b is None) and (a is None or a == pytest.approx(b, abs=1e-4))


def test_requests_join_while_others_run(tiny, prompts, alone):
    engine = Engine(tiny, EngineConfig(max_rows=4))
    done: dict[int, Trajectory] = {}
    rows: list[int] = []
    for prompt in prompts:
        engine.submit(prompt, max_new_tokens=TOKENS, latent_size=4)
        for _ in range(3):
            done |= {e.request: e.trajectory for e in engine.step() if isinstance(e, Finished)}
            rows.append(len(engine.active))
    done |= {e.request: e.trajectory for e in engine.run() if isinstance(e, Finished)}
    assert_same([done[i] for i in range(len(prompts))], alone)
    assert set(rows) >= {1, 2, 3, 4}


@pytest.mark.parametrize(("slots", "kernel"), [(1, False), (3, False), (3, True)])
def test_the_decode_step_has_no_graph_break(tiny, prompts, slots, kernel):
    """Compiled as one graph (without generating code for it), it decodes the same."""
    options = {"max_new_tokens": 12, "latent_size": 4, "n": slots, "temperature": 1.0}
    torch._dynamo.reset()
    engine = Engine(tiny, EngineConfig(native=kernel))
    engine._decode = torch.compile(blocks_module.run_paged, fullgraph=True, dynamic=True, backend="eager")
    for prompt in prompts[:6]:
        engine.submit(prompt, **options)
    plain = Engine(tiny)
    for prompt in prompts[:6]:
        plain.submit(prompt, **options)
    assert_same(finished(engine), finished(plain))
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_compiled_step_decodes_the_same(tiny, prompts, alone):
    assert_same(tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=4, engine=EngineConfig(compile=True)), alone)


@pytest.mark.slow
def test_a_compiled_step_is_its_own_models(tiny, fresh, prompts):
    """Another model of the same shape, new weights in place, and another dtype: each decodes as it does uncompiled."""

    def check(vlm: LatentVLM) -> list[Trajectory]:
        options = {"max_new_tokens": TOKENS, "latent_size": 4}
        plain = vlm.generate(prompts[:6], **options)
        compiled = vlm.generate(prompts[:6], engine=EngineConfig(compile=True), **options)
        if vlm.model.dtype == torch.float32:
            assert_same(compiled, plain)
        return compiled

    first = check(tiny)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(1.05)
    other = check(fresh)
    assert [row.decoding.token_ids for row in first] != [row.decoding.token_ids for row in other]
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0.9)
    check(fresh)
    check(fresh.to(torch.bfloat16))


def test_compiling_without_a_compiler(tiny, monkeypatch):
    from mirage_vlm.decoding import compiled

    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    with pytest.raises(MirageError, match=r"needs a C\+\+ compiler"):
        Engine(tiny, EngineConfig(compile=True))


# -- what is computed once -------------------------------------------------------------------------------------------


def test_samples_of_a_group_are_those_of_single_requests(tiny, prompts):
    """And the prompt is read once, whether its samples fit beside one another or not."""
    options = {"max_new_tokens": 20, "temperature": 1.1, "top_p": 0.97}
    read = Counter()
    for rows in (64, 3):
        engine = Engine(tiny, EngineConfig(max_rows=rows))
        plain = engine.reader._pass
        engine.reader._pass = lambda some, features, plain=plain, rows=rows: (
            read.update({rows: len(some)}),
            plain(some, features),
        )
        for i, prompt in enumerate(prompts[:6]):
            engine.submit(prompt, n=4, seed=10 * i, **options)
        grouped = finished(engine)
        assert read[rows] == 6
        seeds = [10 * i + j for i in range(6) for j in range(4)]
        assert_same(grouped, tiny.generate([p for p in prompts[:6] for _ in range(4)], seeds=seeds, **options))
    assert_same(tiny.generate(prompts[:2], n=2, seed=3, **options)[1:2], tiny.generate(prompts[:1], seed=4, **options))


def test_a_picture_in_several_prompts_is_encoded_once(tiny, monkeypatch):
    seen = []
    plain = type(tiny.family).image_features

    def counted(self, model, pixels, grid):
        seen.append(len(grid))
        return plain(self, model, pixels, grid)

    monkeypatch.setattr(type(tiny.family), "image_features", counted)
    same = [dialogue([picture(2, 2, 1), "Go " * i], ["x"]) for i in range(1, 7)]
    other = dialogue([picture(2, 2, 2), "Go", picture(2, 2, 1)], ["x"])
    together = tiny.generate([*same, other], max_new_tokens=5)
    assert seen == [2], "one pass over the two pictures that differ"
    seen.clear()
    alone = [tiny.generate([prompt], max_new_tokens=5)[0] for prompt in [*same, other]]
    assert len(seen) == 7
    assert_same(together, alone)
    engine = Engine(tiny, EngineConfig(max_rows=1))
    seen.clear()
    for prompt in same:
        engine.submit(prompt, max_new_tokens=5)
    assert_same(finished(engine), alone[:6])
    assert seen == [1], "later prompts find the features of earlier ones"


def test_a_latent_step_runs_no_head(tiny, prompts, monkeypatch):
    """The head sees as many states as tokens were chosen."""
    asked = []
    plain = tiny.logits
    monkeypatch.setattr(tiny, "logits", lambda hidden: asked.append(len(hidden)) or plain(hidden))
    rows = tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=4)
    marks = (tiny.config.pad_id, tiny.config.end_id)
    chosen = [sum(token not in marks for token in row.decoding.token_ids) for row in rows]
    cut = [row.decoding.finish_reason == "length" for row in rows]
    ended = sum(row.decoding.finish_reason == "stop" for row in rows)
    assert any(cut) and sum(asked) == sum(chosen) + ended


# -- memory ----------------------------------------------------------------------------------------------------------


def test_requests_wait_for_memory(tiny, prompts, alone):
    engine = Engine(tiny, EngineConfig(max_batch_tokens=300, block_size=10))
    for prompt in prompts:
        engine.submit(prompt, max_new_tokens=TOKENS, latent_size=4)
    most, done = 0, {}
    while engine.busy:
        done |= {e.request: e.trajectory for e in engine.step() if isinstance(e, Finished)}
        assert engine.pool.used <= engine.pool.reserved <= engine.pool.limit == 30
        most = max(most, len(engine.active))
    assert 1 < most < len(prompts)
    assert_same([done[i] for i in range(len(prompts))], alone)
    assert engine.pool.used == engine.pool.reserved == 0


def test_what_can_never_fit_is_refused_with_its_numbers(tiny, prompts):
    engine = Engine(tiny, EngineConfig(max_batch_tokens=64, block_size=16))
    length = len(tiny.encoder.prompt(prompts[-1].prompt)[0])
    needed = -(-length // 16) + 3
    with pytest.raises(
        MirageError,
        match=f"a prompt of {length} tokens and 40 new ones take {needed} blocks of 16 tokens, but the cache "
        f"holds 4: raise max_batch_tokens to at least {16 * needed}",
    ):
        engine.submit(prompts[-1], max_new_tokens=TOKENS)
    engine.submit(prompts[3], max_new_tokens=8)
    assert len(finished(engine)) == 1, "those that fit are decoded"


def test_a_fraction_of_free_memory(tiny, monkeypatch):
    from mirage_vlm.decoding import engine

    monkeypatch.setattr(engine, "free_memory", lambda _: 1 << 20)
    made = Engine(tiny, EngineConfig(memory_fraction=0.5, block_size=8))
    # keys and values, 2 layers, 1 head of width 16, float32
    assert made.pool.limit == (1 << 19) // (2 * 2 * 1 * 16 * 8 * 4)


def test_soak(tiny):
    """2,000 requests of random lengths, pictures, spans, groups and cancellations on little memory."""
    chance = random.Random(0)
    engine = Engine(tiny, EngineConfig(max_rows=48, max_batch_tokens=2400, block_size=8, look_every=2))
    before = engine.pool.nbytes
    ended: Counter[str] = Counter()
    expected, seen, latents = 0, Counter(), 0
    running: list[int] = []
    while expected < 2000 or engine.busy:
        while expected < 2000 and len(engine.queue) < 64:
            segments = [picture(chance.randint(1, 3), chance.randint(1, 2), chance.randint(0, 30))] * chance.randint(
                0, 2
            )
            prompt = dialogue([*segments, "Go up, " * chance.randint(1, 12)], ["x"])
            n = min(chance.choice([1, 1, 1, 1, 4]), 2000 - expected)
            number = engine.submit(
                prompt,
                max_new_tokens=chance.randint(1, 24),
                latent_size=chance.randint(1, 4),
                stop_rule=chance.choice(["fixed", "learned"]),
                temperature=chance.choice([0.0, 1.0]),
                evict_images=chance.random() < 0.3,
                return_latents=chance.random() < 0.5,
                seed=expected,
                n=n,
            )
            expected += n
            running.append(number)
        if chance.random() < 0.5:
            engine.cancel(chance.choice(running[-70:]))
        for event in engine.step():
            if isinstance(event, Finished):
                seen[event.request, event.sample] += 1
                ended[event.trajectory.decoding.finish_reason] += 1
                latents += sum(span.k for span in event.trajectory.spans)
        assert engine.pool.used <= engine.pool.reserved <= engine.pool.limit
    assert len(seen) == 2000 and set(seen.values()) == {1}, "every request ends, once"
    assert set(ended) == {"stop", "length", "cancelled"} and min(ended.values()) > 20, ended
    assert latents > 500
    assert engine.pool.used == engine.pool.reserved == 0 and not engine.active and not engine.queue
    assert engine.pool.nbytes == before
    assert sorted(engine.pool.free) == list(range(1, engine.pool.blocks))


# -- eviction --------------------------------------------------------------------------------------------------------


def slow_evicted(vlm: LatentVLM, trajectory: Trajectory) -> torch.Tensor:
    """[T, D] hidden states of a decoded trajectory by full attention in which pictures are masked.

    The rows of positions from the first `latent_end` on may not see the columns of image tokens. Eager attention
    with the mask written out, no cache; latents are those that were decoded.
    """
    (row,) = split(vlm, replayed(vlm, [trajectory]))
    ids = row.input_ids[0]
    embeddings = slow_embeddings(vlm, row)
    latents = iter([vector for span in trajectory.spans if span.latents is not None for vector in span.latents])
    for place, token in enumerate(ids.tolist()):
        if token == vlm.config.pad_id and (vector := next(latents, None)) is not None:
            embeddings[place] = vector
    length = len(ids)
    visible = torch.ones(length, length).tril().bool()
    closed = (ids == vlm.config.end_id).nonzero().flatten().tolist()
    if closed:
        visible[closed[0] :, ids == vlm.family.image_token_id] = False
    mask = torch.zeros(length, length).masked_fill(~visible, -torch.inf)[None, None]
    return vlm.language_model(
        inputs_embeds=torch.stack(embeddings)[None],
        attention_mask={"full_attention": mask},
        position_ids=slow_positions(vlm, row),
        use_cache=False,
    ).last_hidden_state[0]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("size", [4, 32])
def test_eviction_is_masking_the_pictures(tiny, prompts, n, size):
    options = {"max_new_tokens": TOKENS, "latent_size": 3, "n": n, "temperature": 0.9 if n > 1 else 0.0}
    config = EngineConfig(block_size=size)
    rows = tiny.generate(prompts, evict_images=True, logprobs=True, engine=config, **options)
    kept = tiny.generate(prompts, engine=config, **options)
    changed = sum(a.decoding.token_ids != b.decoding.token_ids for a, b in zip(rows, kept, strict=True))
    assert changed > 3, "it makes a difference"
    marks = (tiny.config.pad_id, tiny.config.end_id)
    after = 0
    for row in rows:
        with torch.no_grad():
            logits = tiny.logits(slow_evicted(tiny, row))
        ids = row.decoding.token_ids
        start = len(logits) - len(ids)
        logits[:, [*marks, tiny.family.image_token_id]] = -torch.inf
        chances = (logits / (options["temperature"] or 1.0)).log_softmax(dim=-1)
        for t, (token, said) in enumerate(zip(ids, row.decoding.logprobs, strict=False)):
            if token in marks:
                assert said is None
                continue
            assert said == pytest.approx(float(chances[start + t - 1, token]), abs=1e-3)
            if n == 1:
                assert logits[start + t - 1].argmax() == token
            after += tiny.config.end_id in ids[:t]
    assert after > 50


def test_evicted_pictures_free_their_blocks(tiny, prompts, alone):
    """Once all samples of a prompt have closed a span; what is left lies in as few blocks as it needs."""
    chosen = [i for i, row in enumerate(alone) if tiny.config.end_id in row.decoding.token_ids[:-8]]
    for i in chosen:
        ids = tiny.encoder.prompt(prompts[i].prompt)[0]
        words = len(ids) - ids.count(tiny.family.image_token_id)
        engine = Engine(tiny, EngineConfig(block_size=2))
        engine.submit(prompts[i], n=2, max_new_tokens=TOKENS, latent_size=4, evict_images=True)
        sizes = []
        while engine.busy:
            engine.step()
            sizes += [len(response.prompt.blocks) for response in engine.active]
        assert sizes[0] == -(-len(ids) // 2) and sizes[-1] == -(-words // 2)
        assert engine.pool.used == engine.pool.reserved == 0
    assert any(next(prompts[i].images(), None) is not None for i in chosen)


# -- streaming, cancelling, replay -----------------------------------------------------------------------------------


def test_a_stream_tells_the_whole_story(tiny, prompts, alone):
    for prompt, whole in zip(prompts, alone, strict=True):
        events = list(tiny.stream(prompt, max_new_tokens=TOKENS, latent_size=4))
        assert isinstance(events[-1], Finished)
        assert_same([events[-1].trajectory], [whole])
        story: list[tuple[str, object]] = []
        for event in events[:-1]:
            if isinstance(event, TextPiece):
                if story and story[-1][0] == "text":
                    story[-1] = ("text", story[-1][1] + event.text)
                else:
                    story.append(("text", event.text))
            elif isinstance(event, SpanOpened):
                story.append(("span", []))
            elif isinstance(event, LatentConsumed):
                story[-1][1].append(event.vector)
            elif isinstance(event, SpanClosed):
                assert event.latents == len(story[-1][1])
        told = [("text", s.text) if hasattr(s, "text") else ("span", s) for s in whole.response]
        assert [kind for kind, _ in story] == [kind for kind, _ in told]
        for (kind, mine), (_, theirs) in zip(story, told, strict=True):
            if kind == "text":
                assert mine == theirs
            else:
                assert len(mine) == theirs.k
                assert not mine or distance(torch.stack(mine), theirs.latents) < 1e-4


def test_a_character_of_several_tokens_comes_whole(fresh):
    """The tokenizer is byte-level: a sign outside of its words takes several tokens."""
    wanted = fresh.tokenizer("ü→é", add_special_tokens=False)["input_ids"] + [fresh.tokenizer.eos_token_id]
    assert len(wanted) > 4
    calls = iter(wanted)
    vocabulary = fresh.model.lm_head.out_features
    fresh.logits = lambda hidden: torch.nn.functional.one_hot(torch.tensor([next(calls)]), vocabulary).float()
    pieces = [e.text for e in fresh.stream(dialogue(["Go"], ["x"])) if isinstance(e, TextPiece)]
    assert pieces == ["ü", "→", "é"]


def test_cancelling(tiny, prompts, alone):
    engine = Engine(tiny, EngineConfig(max_rows=2))
    numbers = [engine.submit(p, max_new_tokens=TOKENS, latent_size=4) for p in prompts[:4]]
    for _ in range(6):
        engine.step()
    engine.cancel(numbers[0])  # runs
    engine.cancel(numbers[3])  # waits
    engine.cancel(99)  # never was
    done = finished(engine)
    assert [row.decoding.finish_reason == "cancelled" for row in done] == [True, False, False, True]
    assert_same(done[1:3], alone[1:3])
    cut = done[0].decoding.token_ids
    assert 0 < len(cut) < len(alone[0].decoding.token_ids) and cut == alone[0].decoding.token_ids[: len(cut)]
    assert done[3].decoding.token_ids == () and done[3].response == ()
    assert engine.pool.used == engine.pool.reserved == 0


def test_cancelling_in_the_middle_of_a_span(tiny, prompts, alone):
    """A latent that was chosen and not consumed is not reported."""
    number = next(i for i, row in enumerate(alone) if row.spans and row.spans[0].k == 4)
    engine = Engine(tiny)
    request = engine.submit(prompts[number], max_new_tokens=TOKENS, latent_size=4)
    consumed = 0
    while consumed < 2:
        consumed += sum(isinstance(event, LatentConsumed) for event in engine.step())
    engine.cancel(request)
    (row,) = finished(engine)
    assert row.decoding.token_ids.count(tiny.config.pad_id) == row.spans[0].k == len(row.spans[0].latents) == 2


def test_a_replay_says_how_likely_each_token_was(tiny, prompts):
    options = {"max_new_tokens": TOKENS, "latent_size": 4, "temperature": 1.3, "logprobs": True}
    rows = tiny.generate(prompts, **options)
    engine = Engine(tiny, EngineConfig(max_rows=5))
    for prompt, row in zip(prompts, rows, strict=True):
        engine.submit(prompt, temperature=1.3, logprobs=True, replay=row)
    again = finished(engine)
    marks = (tiny.config.pad_id, tiny.config.end_id)
    for row, other in zip(rows, again, strict=True):
        assert other.decoding.token_ids == row.decoding.token_ids
        assert other.decoding.finish_reason == row.decoding.finish_reason
        assert other.decoding.stop_id == row.decoding.stop_id
        tokens = [*row.decoding.token_ids, *([row.decoding.stop_id] if row.decoding.stop_id is not None else [])]
        assert len(tokens) == len(row.decoding.logprobs) == len(other.decoding.logprobs)
        for token, a, b in zip(tokens, row.decoding.logprobs, other.decoding.logprobs, strict=True):
            assert (a is None) == (b is None) == (token in marks)
            assert a is None or a == pytest.approx(b, abs=1e-4)


def test_a_replay_consumes_the_latents_it_is_given(tiny, prompts):
    rows = tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=4)
    row = next(row for row in rows if len(row.spans) > 1 and row.spans[0].k == 4)
    other = replace(row.spans[0], latents=torch.ones_like(row.spans[0].latents))
    segments = tuple(other if s is row.spans[0] else s for s in row.response)
    engine = Engine(tiny)
    engine.submit(row, replay=row.with_response(segments, row.decoding), logprobs=True)
    engine.submit(row, replay=row, logprobs=True)
    bent, same = finished(engine)
    assert (bent.spans[0].latents == 1).all()
    assert_same([replace(same, decoding=row.decoding)], [row])
    first = row.decoding.token_ids.index(tiny.config.end_id)
    assert bent.decoding.logprobs[:first] == pytest.approx(same.decoding.logprobs[:first], abs=1e-5)
    after = [(a, b) for a, b in zip(bent.decoding.logprobs, same.decoding.logprobs, strict=True)][first:]
    assert any(a is not None and abs(a - b) > 1e-3 for a, b in after)
    with pytest.raises(MirageError, match="only a decoded trajectory can be replayed"):
        engine.submit(row, replay=prompts[0])


def naive_log_probabilities(vlm: LatentVLM, row: Trajectory, temperature: float, evict: bool) -> list[float]:
    """Of each token, by the slow rollout; with eviction by full attention in which the pictures are masked."""
    (one,) = split(vlm, replayed(vlm, [row]))
    with torch.no_grad():
        logits = vlm.logits(slow_evicted(vlm, row) if evict else slow_rollout(vlm, one)[0]) / temperature
    tokens = [*row.decoding.token_ids, *([row.decoding.stop_id] if row.decoding.stop_id is not None else [])]
    start = len(one.input_ids[0]) - len(row.decoding.token_ids)
    logits[:, [vlm.config.pad_id, vlm.config.end_id, vlm.family.image_token_id]] = -torch.inf  # never chosen in text
    return [float(logits[start + t - 1].log_softmax(dim=-1)[token]) for t, token in enumerate(tokens)]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_are_those_of_the_slow_rollout(tiny, prompts, temperature):
    rows = tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=4, temperature=temperature, logprobs=True)
    for row in rows:
        for said, slow in zip(
            row.decoding.logprobs, naive_log_probabilities(tiny, row, temperature or 1.0, False), strict=True
        ):
            assert said is None or said == pytest.approx(slow, abs=1e-4)


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixed", "learned"])
def test_max_latents(tiny, prompts, rule):
    options = {"max_new_tokens": TOKENS, "latent_size": 4, "stop_rule": rule}
    free = tiny.generate(prompts, **options)
    assert max(sum(span.k for span in row.spans) for row in free) > 6
    for most in (0, 3, 6):
        for row, before in zip(tiny.generate(prompts, max_latents=most, **options), free, strict=True):
            count = sum(span.k for span in row.spans)
            assert count <= most
            if rule == "fixed":
                assert all(span.k == 4 for span in row.spans[:-1]), "a span is not opened where it does not fit"
            if sum(span.k for span in before.spans) <= most:
                assert row.decoding == before.decoding


def test_latents_in_the_models_own_dtype(fresh, prompts):
    half = fresh.to(torch.bfloat16)
    (row,) = half.generate(prompts[:1], max_new_tokens=12, latent_dtype="model")
    (full,) = half.generate(prompts[:1], max_new_tokens=12)
    if row.spans and row.spans[0].latents is not None:
        assert row.spans[0].latents.dtype == torch.bfloat16 and full.spans[0].latents.dtype == torch.float32
    assert half.generate(prompts, max_new_tokens=12)[0].decoding == full.decoding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_rows": 0}, "max_rows must be positive: 0"),
        ({"block_size": 0}, "block_size must be positive: 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be positive: 0"),
        ({"look_every": 0}, "look_every must be positive: 0"),
        ({"memory_fraction": 1.5}, r"memory_fraction must be in \(0, 1\]: 1.5"),
        ({"image_cache": -1}, "image_cache must not be negative: -1"),
    ],
)
def test_engines_that_cannot_be(changes, message):
    with pytest.raises(MirageError, match=message):
        EngineConfig(**changes)
