"""Spans on demand: forced at the start or after a text, or none, against rules written out token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support import check_replay, dialogue, distance, picture, ragged, replayed, slow_rollout, split
from test_generate import assert_same, say
from test_graphs import again

from mirage_vlm.decoding import Engine, EngineConfig, Finished, GenerationConfig, SpanOpened, TextPiece, native
from mirage_vlm.decoding.graphs import StepGraphs
from mirage_vlm.decoding.marks import automaton, spelling
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.trajectory import Trajectory

TOKENS = 24
FORCED = {"spans": "forced", "max_new_tokens": TOKENS, "latent_size": 3}


@pytest.fixture(scope="module")
def prompts() -> list[Trajectory]:
    return [*ragged(), dialogue(["Which way?", picture(2, 1, 9)], ["x"])]


@pytest.fixture(scope="module")
def texts(tiny, prompts) -> list[str]:
    """For each prompt a text that the model says by itself, mostly without its first and its last letter."""
    found = []
    for row in tiny.generate(prompts, max_new_tokens=TOKENS, spans="none"):
        text = max(row.text.split("\N{REPLACEMENT CHARACTER}"), key=len)
        found.append(text[1:-1] if len(text) > 3 else text)
    assert all(found) and sum(len(text) > 3 for text in found) > 2, found
    return found


def decode(vlm: LatentVLM, prompts: Sequence[Trajectory], each: Sequence[dict], engine: Engine | None = None):
    """A response to each prompt by settings of its own, all in one batch."""
    engine = engine or Engine(vlm)
    for prompt, changes in zip(prompts, each, strict=True):
        engine.submit(prompt, **{"max_new_tokens": TOKENS, "latent_size": 3, **changes})
    ends = [event for event in engine.run() if isinstance(event, Finished)]
    assert not engine.busy and engine.pool.used == 0
    return [event.trajectory for event in sorted(ends, key=lambda event: event.request)]


def check_greedy(vlm: LatentVLM, row: Trajectory, k: int, text: str | None, rule: str = "fixed", spans: int = 9) -> int:
    """Each token is what the slow rollout and the rules say; returns where the forced span opened, −1 = nowhere."""
    latent = vlm.config
    (one,) = split(vlm, replayed(vlm, [row]))
    with torch.no_grad():
        logits = vlm.logits(slow_rollout(vlm, one)[0])
    ids = row.decoding.token_ids
    begin = one.input_ids.shape[1] - len(ids)
    said: list[int] = []
    due, opened, inside, thought = text is None, -1, False, 0
    for place, token in enumerate(ids):
        scores = logits[begin + place - 1].clone()
        if inside:
            free = rule == "learned" and 0 < thought < k
            more = thought < k if not free else bool(scores[latent.pad_id] >= scores[latent.end_id])
            assert token == (latent.pad_id if more else latent.end_id)
            inside, thought = more, thought + 1
            continue
        if due:
            assert token == latent.start_id, "a span was owed"
            due, opened = False, place
        else:
            scores[[latent.pad_id, latent.end_id, vlm.family.image_token_id]] = -torch.inf
            if spans == 1:  # which is kept for the one that is owed, or was it
                scores[latent.start_id] = -torch.inf
            assert token == int(scores.argmax())
        if token == latent.start_id:
            inside, thought = True, 0
        else:
            said.append(token)
            due = due or (opened < 0 and text in vlm.tokenizer.decode(said, skip_special_tokens=True))
    if row.decoding.logprobs is not None:
        chances = row.decoding.logprobs
        assert opened < 0 or chances[opened] is None
    return opened


# -- what is decoded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixed", "learned"])
@pytest.mark.parametrize("k", [0, 3])
def test_a_forced_span_opens_at_the_start(tiny, prompts, rule, k):
    rows = tiny.generate(prompts, **{**FORCED, "latent_size": k}, stop_rule=rule, logprobs=True)
    for row in rows:
        assert row.decoding.token_ids[0] == tiny.config.start_id and row.decoding.logprobs[0] is None
        assert check_greedy(tiny, row, k, None, rule) == 0
    if k:
        spans = [row.spans[0].latents for row in rows]
        assert all(latents is not None for latents in spans)


def test_it_opens_after_a_text_however_it_is_cut_into_tokens(tiny, prompts, texts):
    each = [{"spans": "forced", "span_after": text, "logprobs": True, "max_spans": 1} for text in texts]
    rows = decode(tiny, prompts, each)
    opened = [check_greedy(tiny, row, 3, text, spans=1) for row, text in zip(rows, texts, strict=True)]
    assert min(opened) > 0, "in each response somewhere"
    for row, text, place in zip(rows, texts, opened, strict=True):
        said = row.decoding.token_ids[:place]
        assert text in tiny.tokenizer.decode(said) and text not in tiny.tokenizer.decode(said[:-1])


def test_a_text_that_is_never_said_opens_nothing(tiny, prompts):
    rows = tiny.generate(prompts, **FORCED, span_after="nobody says so")
    assert_same(rows, tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=3))


def test_none_is_a_limit_of_no_spans(tiny, prompts):
    assert_same(
        tiny.generate(prompts, max_new_tokens=TOKENS, spans="none"),
        tiny.generate(prompts, max_new_tokens=TOKENS, max_spans=0),
    )
    assert tiny.generate(prompts[:1], spans="none", max_spans=3, max_new_tokens=9)[0].spans == ()


def mixed(texts: Sequence[str]) -> list[dict]:
    return [
        {"spans": "forced", "span_after": texts[0], "logprobs": True},
        {},
        {"spans": "forced", "stop_rule": "learned", "temperature": 1.1, "seed": 4},
        {"spans": "none"},
        {"spans": "forced", "span_after": texts[4], "evict_images": True, "temperature": 0.7, "top_k": 20},
        {"spans": "forced", "latent_size": 0, "max_spans": 1},
    ]


def test_alone_and_in_a_ragged_batch_it_is_the_same(tiny, prompts, texts):
    each = mixed(texts)
    together = decode(tiny, prompts, each)
    alone = [decode(tiny, [prompt], [changes])[0] for prompt, changes in zip(prompts, each, strict=True)]
    assert_same([replace(t, decoding=replace(t.decoding, logprobs=None)) for t in together],
                [replace(t, decoding=replace(t.decoding, logprobs=None)) for t in alone])  # fmt: skip
    for options in ({"look_every": 8}, {"max_rows": 2}, {"native": False}):
        other = decode(tiny, prompts, each, Engine(tiny, EngineConfig(**options)))
        for a, b in zip(other, together, strict=True):
            assert a.decoding.token_ids == b.decoding.token_ids


def test_the_captured_step_does_the_same(tiny, prompts, texts):
    if native.load() is None:
        pytest.skip("no C compiler, and so no kernel of paged attention")
    expected = decode(tiny, prompts, mixed(texts))
    engine = Engine(tiny, EngineConfig(max_batch_tokens=8192, look_every=8))
    engine._graphs = StepGraphs(again)
    found = decode(tiny, prompts, mixed(texts), engine)
    assert [t.decoding.token_ids for t in found] == [t.decoding.token_ids for t in expected]
    made = len(engine._graphs.graphs)
    decode(tiny, prompts, mixed(texts), engine)
    assert len(engine._graphs.graphs) == made, "texts that are known need no graph of their own"
    rows = decode(tiny, prompts, [{"spans": "forced", "span_after": texts[i - 1]} for i in range(6)], engine)
    for row, text in zip(rows, [texts[i - 1] for i in range(6)], strict=True):
        check_greedy(tiny, row, 3, text)


def test_each_of_a_group_is_forced(tiny, prompts):
    rows = tiny.generate(prompts[:2], **FORCED, n=4, temperature=1.2, seed=3)
    assert len(rows) == 8 and all(row.decoding.token_ids[0] == tiny.config.start_id for row in rows)
    assert len({row.decoding.token_ids for row in rows}) == 8
    check = [replace(row, decoding=row.decoding) for row in rows]
    batch = replayed(tiny, check)
    assert batch.input_ids.shape[0] == 8


def test_the_latents_of_a_forced_span_are_those_of_stage2(tiny, prompts):
    rows = tiny.generate(prompts, **FORCED, max_spans=1)
    for row in rows:
        (one,) = split(tiny, replayed(tiny, [row]))
        with torch.no_grad():
            _, latents = slow_rollout(tiny, one)
        assert distance(row.spans[0].latents, latents) < 1e-4


def test_a_stream_tells_of_it(tiny, prompts, texts):
    said = ""
    for event in tiny.stream(prompts[0], **FORCED, span_after=texts[0], max_spans=1):
        if isinstance(event, TextPiece):
            said += event.text
        if isinstance(event, SpanOpened):
            break
    assert said.find(texts[0]) >= 0


# -- how likely it was -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixed", "learned"])
def test_a_replay_finds_the_same_log_probabilities(tiny, prompts, texts, rule):
    each = [
        {"spans": "forced", "span_after": text, "stop_rule": rule, "temperature": 0.9, "seed": i, "logprobs": True}
        for i, text in enumerate(texts)
    ]
    each += [{k: v for k, v in changes.items() if k != "span_after"} for changes in each]
    rows = decode(tiny, prompts * 2, each)
    engine = Engine(tiny)
    for row, changes in zip(rows, each, strict=True):
        engine.submit(row, replay=row, latent_size=3, **changes)
    ends = sorted((e for e in engine.run() if isinstance(e, Finished)), key=lambda e: e.request)
    for row, event in zip(rows, ends, strict=True):
        found, expected = event.trajectory.decoding, row.decoding
        assert found.token_ids == expected.token_ids
        for a, b in zip(found.logprobs, expected.logprobs, strict=True):
            assert (a is None) == (b is None) and (a is None or abs(a - b) < 1e-5)


def test_a_replay_that_does_not_open_it_was_impossible(tiny, prompts):
    (row,) = tiny.generate(prompts[1:2], max_new_tokens=6, spans="none")
    engine = Engine(tiny)
    engine.submit(row, replay=row, spans="forced", logprobs=True)
    engine.submit(row, replay=row, logprobs=True)
    found, free = (e.trajectory.decoding.logprobs for e in engine.run() if isinstance(e, Finished))
    assert found[0] == -math.inf and found[1:] == pytest.approx(free[1:], abs=1e-5)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_limits_keep_room_for_it(fresh):
    """The model wants nothing but spans, and the text comes only when it may open none."""
    start, word = fresh.config.start_id, fresh.tokenizer.encode("Go")[0]
    text = fresh.tokenizer.decode([word])
    say(fresh, {start: 90.0, word: 60.0})
    for limits in ({"max_spans": 2}, {"max_latents": 5}):
        (row,) = fresh.generate("Which way?", **FORCED, span_after=text * 2, **limits)
        ids = [t for t in row.decoding.token_ids if t not in (fresh.config.pad_id, fresh.config.end_id)]
        first = [start] if limits == {"max_spans": 2} else []
        assert ids[: len(first) + 3] == [*first, word, word, start]
        assert ids.count(start) == len(first) + 1
    (row,) = fresh.generate("Which way?", **FORCED, max_latents=5, stop_rule="learned", span_after=text)
    assert [span.k for span in row.spans] == [3, 2] or sum(span.k for span in row.spans) <= 5
    assert len(row.spans) >= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spans": "always"}, "spans must be one of free, forced, none, not 'always'"),
        ({"spans": ["forced"]}, "spans must be one of"),
        ({"span_after": "x"}, "set spans to 'forced' as well"),
        ({"spans": "none", "span_after": "x"}, "set spans to 'forced' as well"),
        ({"spans": "forced", "span_after": ""}, "span_after must be a text of 1 to 255 bytes"),
        ({"spans": "forced", "span_after": "é" * 128}, "span_after must be a text of 1 to 255 bytes"),
        ({"spans": "forced", "span_after": 3}, "span_after must be a text, not 3"),
        ({"spans": "forced", "max_spans": 0}, "max_spans is 0, but spans is 'forced'"),
        ({"spans": "forced", "max_latents": 2}, "max_latents is 2, but spans is 'forced' and a span takes 3"),
        ({"spans": "forced", "max_latents": 0, "stop_rule": "learned"}, "a span takes 1"),
        ({"spans": "forced", "span_after": "<|im_end|>"}, "is a control token"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(tiny, changes, message):
    with pytest.raises(MirageError, match=message):
        tiny.generate("Go", **changes)
    assert GenerationConfig(spans="forced", max_latents=0, latent_size=0).check_room(tiny.config) is None


# -- the automaton ---------------------------------------------------------------------------------------------------


def test_the_automaton_is_a_search_for_the_text():
    generator = torch.Generator().manual_seed(0)

    def word(most: int) -> bytes:
        length = int(torch.randint(0, most, (), generator=generator))
        return bytes((97 + torch.randint(0, 2, (length,), generator=generator)).tolist())

    tokens = tuple(word(6) for _ in range(60))
    for text in (b"a", b"ab", b"aab", b"abaababa", b"bbbb", b"abab"):
        states = automaton(text, tokens)
        for before in range(len(text)):
            for i, token in enumerate(tokens):
                whole = text[:before] + token
                ends = max(n for n in range(len(text)) if whole.endswith(text[:n]))
                assert states[before, i] == (len(text) if text in whole else ends)


def test_tokens_are_spelt_as_they_are_decoded(tiny):
    size = tiny.model.lm_head.weight.shape[0]
    spelt = spelling(tiny.tokenizer, size)
    assert len(spelt) == size
    for i in range(len(tiny.tokenizer)):
        assert spelt[i].decode(errors="replace") == tiny.tokenizer.decode([i], skip_special_tokens=True)


def test_what_was_decoded_before_is_as_it_was(tiny, prompts):
    """The free rows' own rules are untouched."""
    check_replay(tiny, tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=3))
