"""Decoding: rows are independent, spans keep their shape, and a latent means what it means in stage 2."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support import check_replay, dialogue, distance, picture, ragged, replayed, slow_rollout, split

from mirage_vlm.decoding import EngineConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.decoder import checkpoint_activations
from mirage_vlm.training.losses import stage2
from mirage_vlm.trajectory import Image, Text, Trajectory, user_turn

TOKENS = 40


@pytest.fixture(scope="module")
def prompts() -> list[Trajectory]:
    """Eight prompts of different lengths with 0, 1 and 2 pictures."""
    return [
        *ragged(),
        dialogue(["The elf walks over the ice."], ["x"]),
        dialogue(["Which way?", picture(2, 1, 9)], ["x"]),
        dialogue([picture(1, 1, 10), picture(2, 1, 11), "Go"], ["x"]),
    ]


@pytest.fixture(scope="module")
def decoded(tiny, prompts) -> dict[str, list[Trajectory]]:
    """Greedy responses under both stop rules, all rows in one batch."""
    return {
        rule: tiny.generate(prompts, max_new_tokens=TOKENS, stop_rule=rule, latent_size=4)
        for rule in ("fixed", "learned")
    }


def runs(vlm: LatentVLM, trajectory: Trajectory) -> list[list[int]]:
    """The spans of a response, each as its tokens from start to end; checks that nothing stands outside of one."""
    config, found, inside = vlm.config, [], False
    for token in trajectory.decoding.token_ids:
        if token == config.start_id:
            assert not inside, "a span opens inside a span"
            found.append([token])
            inside = True
        elif inside:
            assert token in (config.pad_id, config.end_id), "text inside a span"
            found[-1].append(token)
            inside = token != config.end_id
        else:
            assert token not in (config.pad_id, config.end_id), "a pad or an end outside of a span"
    return found


def complete(vlm: LatentVLM, trajectory: Trajectory) -> list[list[int]]:
    return [run for run in runs(vlm, trajectory) if run[-1] == vlm.config.end_id]


def assert_same(found: Sequence[Trajectory], expected: Sequence[Trajectory]) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.decoding == other.decoding, f"tokens of row {i}"
        assert one.text == other.text and [s.k for s in one.spans] == [s.k for s in other.spans]
        for mine, theirs in zip(one.spans, other.spans, strict=True):
            assert (mine.latents is None) == (theirs.latents is None)
            if mine.latents is not None:
                assert distance(mine.latents, theirs.latents) < 1e-4, f"latents of row {i}"


# -- what is decoded is worth testing --------------------------------------------------------------------------------


def test_the_rows_differ(tiny, decoded):
    for rule, rows in decoded.items():
        assert len({row.decoding.token_ids for row in rows}) == len(rows)
        assert {row.decoding.finish_reason for row in rows} == {"stop", "length"}
        assert len({len(row.spans) for row in rows}) >= 3, "some open no span, some several"
        lengths = {run.count(tiny.config.pad_id) for row in rows for run in complete(tiny, row)}
        assert lengths == {4} if rule == "fixed" else len(lengths) >= 3, "learned spans end where the model ends them"
    opened = [row.decoding.token_ids.index(tiny.config.start_id) for row in decoded["fixed"] if row.spans]
    assert len(set(opened)) > 2, "spans open at different steps"


# -- a batch is its rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixed", "learned"])
def test_a_batch_decodes_as_one_at_a_time(tiny, prompts, decoded, rule):
    alone = [tiny.generate([prompt], max_new_tokens=TOKENS, stop_rule=rule, latent_size=4)[0] for prompt in prompts]
    assert_same(decoded[rule], alone)


def test_neither_order_nor_batch_size_matters(tiny, prompts, decoded):
    backward = tiny.generate(prompts[::-1], max_new_tokens=TOKENS, latent_size=4, engine=EngineConfig(max_rows=3))
    assert_same(backward[::-1], decoded["fixed"])


def test_a_response_that_is_there_is_ignored(tiny, prompts, decoded):
    bare = tiny.generate([p.prompt for p in prompts], max_new_tokens=TOKENS, latent_size=4)
    assert_same(bare, decoded["fixed"])
    for prompt, row in zip(prompts, decoded["fixed"], strict=True):
        assert row.prompt == prompt.prompt


def test_greedy_decoding_is_that_of_transformers_where_there_is_no_span(tiny, prompts):
    """Against transformers' own generate; max_spans = 0 keeps spans closed in ours, banned words in theirs."""
    config = tiny.config
    ours = tiny.generate(prompts, max_new_tokens=20, max_spans=0)
    for prompt, row in zip(prompts, ours, strict=True):
        ids, pictures = tiny.encoder.prompt(prompt.prompt)
        ids = torch.tensor([ids])
        images = {}
        if pictures is not None:
            kinds = (ids == tiny.family.image_token_id).int()
            images = {"pixel_values": pictures.pixel_values, "image_grid_thw": pictures.grid_thw}
            images["mm_token_type_ids"] = kinds
        theirs = tiny.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            suppress_tokens=[config.start_id, config.pad_id, config.end_id],
            **images,
        )[0, ids.shape[1] :].tolist()
        if theirs[-1] == tiny.tokenizer.eos_token_id:
            theirs.pop()
            assert row.decoding.finish_reason == "stop"
        assert list(row.decoding.token_ids) == theirs


# -- one meaning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixed", "learned"])
def test_decoded_latents_are_those_of_stage2(tiny, decoded, rule):
    check_replay(tiny, decoded[rule])


def test_with_a_learnt_feedback_too(fresh, prompts):
    linear = replace(fresh.config, feedback="linear")
    vlm = LatentVLM(fresh.model, fresh.tokenizer, fresh.image_processor, linear).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        vlm.feedback.proj.weight.normal_(0, 0.2)
        vlm.feedback.proj.bias.normal_()
    rows = vlm.generate(prompts, max_new_tokens=TOKENS)
    assert sum(len(row.spans) for row in rows) > 3
    check_replay(vlm, rows)


def test_a_replay_of_other_latents_is_found_out(tiny, prompts):
    rows = tiny.generate(prompts, max_new_tokens=TOKENS, latent_hook=lambda latents, *_: latents * 1.01)
    with pytest.raises(AssertionError, match="decoding and stage 2"):
        check_replay(tiny, rows)


# -- latents are consumed --------------------------------------------------------------------------------------------


def test_zeros_in_their_place_change_what_is_said(tiny, prompts, decoded):
    zeros = tiny.generate(
        prompts, max_new_tokens=TOKENS, latent_size=4, latent_hook=lambda latents, *_: torch.zeros_like(latents)
    )
    changed = [a.decoding.token_ids != b.decoding.token_ids for a, b in zip(zeros, decoded["fixed"], strict=True)]
    assert any(changed), "latents are consumed"
    for row, is_changed, before in zip(zeros, changed, decoded["fixed"], strict=True):
        assert all(not span.latents.any() for span in row.spans if span.latents is not None)
        if is_changed:
            opened = before.decoding.token_ids.index(tiny.config.start_id)
            both = zip(row.decoding.token_ids, before.decoding.token_ids, strict=False)
            first = next(i for i, (a, b) in enumerate(both) if a != b)
            assert first > opened, "and nothing before the first span is touched"


def test_what_the_hook_is_told(tiny, prompts, decoded):
    calls: list[tuple[torch.Tensor, int, int]] = []

    def hook(latents: torch.Tensor, rows: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        assert latents.shape == (len(rows), tiny.width) and len(steps) == len(rows)
        calls.extend(zip(latents.clone(), rows, steps, strict=True))
        return latents

    again = tiny.generate(
        prompts, max_new_tokens=TOKENS, latent_size=4, engine=EngineConfig(max_rows=3), latent_hook=hook
    )
    assert_same(again, decoded["fixed"])
    for i, row in enumerate(decoded["fixed"]):
        mine = [(latent, step) for latent, prompt, step in calls if prompt == i]
        assert [step for _, step in mine] == [step for span in row.spans for step in range(span.k)]
        vectors = [vector for span in row.spans if span.latents is not None for vector in span.latents]
        for (latent, _), vector in zip(mine, vectors, strict=True):
            assert distance(latent, vector) < 1e-4


def test_a_hook_may_bend_one_row_alone(tiny, prompts, decoded):
    """Row 1's latents are replaced in the middle of the batch; the others do not notice."""

    def hook(latents: torch.Tensor, rows: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        return torch.where(torch.tensor([row == 1 for row in rows]).unsqueeze(1), -3.0, latents)

    bent = tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=4, latent_hook=hook)
    others = [i for i in range(len(prompts)) if i != 1]
    assert_same([bent[i] for i in others], [decoded["fixed"][i] for i in others])
    assert (bent[1].spans[0].latents == -3.0).all()


# -- the shape of a span ---------------------------------------------------------------------------------------------


def test_the_fixed_rule_takes_k_latents(tiny, prompts):
    pad, end = tiny.config.pad_id, tiny.config.end_id
    for k in (1, 2, 5):
        rows = tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=k)
        spans = [run for row in rows for run in complete(tiny, row)]
        assert len(spans) > 3 and all(run == [tiny.config.start_id, *[pad] * k, end] for run in spans)
    default = tiny.generate(prompts, max_new_tokens=TOKENS)
    assert {len(run) for row in default for run in complete(tiny, row)} == {3 + 2}, "the checkpoint's own k is 3"


def test_the_learned_rule_ends_by_the_models_choice(tiny, decoded):
    """Each step is compared with the slow rollout: one more pad where its logit is at least that of the end."""
    config, batch = tiny.config, replayed(tiny, decoded["learned"])
    ended, capped = 0, 0
    for row, one in zip(decoded["learned"], split(tiny, batch), strict=True):
        with torch.no_grad():
            hidden, _ = slow_rollout(tiny, one)
            logits = tiny.logits(hidden)
        start = one.input_ids.shape[1] - len(row.decoding.token_ids)
        length = 0
        for t, token in enumerate(row.decoding.token_ids, start):
            if token == config.start_id:
                length = 0
            elif token == config.pad_id:
                assert length == 0 or logits[t - 1, config.pad_id] >= logits[t - 1, config.end_id]
                length += 1
            elif token == config.end_id:
                by_choice = bool(logits[t - 1, config.pad_id] < logits[t - 1, config.end_id])
                assert by_choice or length == 4
                ended, capped = ended + by_choice, capped + (not by_choice)
        assert length <= 4
    assert ended > 2 and capped > 0, "both ways of ending are seen"


def test_the_stop_rule_of_the_checkpoint_is_the_default(fresh, prompts, decoded):
    config = replace(fresh.config, stop_rule="learned", latent_size=4)
    vlm = LatentVLM(fresh.model, fresh.tokenizer, fresh.image_processor, config).eval()
    assert_same(vlm.generate(prompts, max_new_tokens=TOKENS), decoded["learned"])
    assert_same(vlm.generate(prompts, max_new_tokens=TOKENS, stop_rule="fixed"), decoded["fixed"])


def say(vlm: LatentVLM, scores: dict[int, float]) -> None:
    """Make a model want the same at every step."""
    table = torch.zeros(vlm.model.lm_head.out_features)
    for token, score in scores.items():
        table[token] = score
    vlm.logits = lambda hidden: table.expand(*hidden.shape[:-1], -1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["fixed", "learned"])
def test_a_response_cannot_end_inside_a_span(fresh, rule, temperature):
    """The model first opens a span and then wants nothing but to end."""
    eos, config = fresh.tokenizer.eos_token_id, fresh.config
    say(fresh, {config.start_id: 90.0, eos: 60.0, config.pad_id: 30.0})
    rows = fresh.generate(ragged(), max_spans=1, latent_size=4, stop_rule=rule, temperature=temperature)
    for row in rows:
        assert row.decoding.token_ids == (config.start_id, *[config.pad_id] * 4, config.end_id)
        assert row.decoding.finish_reason == "stop"
        assert row.response[0].k == 4 and len(row.response) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_pad_and_no_end_outside_of_a_span(fresh, temperature):
    config = fresh.config
    say(fresh, {config.pad_id: 90.0, config.end_id: 60.0, 40: 30.0})
    for row in fresh.generate(ragged()[:2], max_new_tokens=6, temperature=temperature):
        assert row.decoding.token_ids == (40,) * 6 and row.spans == ()


def test_a_learned_span_has_at_least_one_latent(fresh):
    config = fresh.config
    say(fresh, {config.start_id: 90.0, config.end_id: 80.0, fresh.tokenizer.eos_token_id: 70.0})
    (row,) = fresh.generate(ragged()[:1], max_spans=2, latent_size=4, stop_rule="learned")
    assert row.decoding.token_ids == (config.start_id, config.pad_id, config.end_id) * 2


@pytest.mark.parametrize("rule", ["fixed", "learned"])
@pytest.mark.parametrize("limits", [{}, {"max_latents": 0}])
def test_a_span_of_no_latents_closes_at_once(tiny, prompts, decoded, rule, limits):
    start, end = tiny.config.start_id, tiny.config.end_id
    rows = tiny.generate(prompts, max_new_tokens=TOKENS, stop_rule=rule, latent_size=0, **limits)
    spans = [run for row in rows for run in complete(tiny, row)]
    assert len(spans) > 3 and all(run == [start, end] for run in spans)
    assert all(span.k == 0 and span.latents is None for row in rows for span in row.spans)
    for row, before in zip(rows, decoded[rule], strict=True):
        if before.spans:
            opened = before.decoding.token_ids.index(start) + 1
            assert row.decoding.token_ids[:opened] == before.decoding.token_ids[:opened], "nothing before it is touched"
    whole = replayed(tiny, rows)
    for row, one in zip(rows, split(tiny, whole), strict=True):
        with torch.no_grad():
            hidden, _ = slow_rollout(tiny, one)
        at = one.input_ids.shape[1] - len(row.decoding.token_ids)
        for t, token in enumerate(row.decoding.token_ids, at):
            logits = tiny.logits(hidden)[t - 1].clone()
            logits[[tiny.config.pad_id, end, tiny.family.image_token_id]] = -torch.inf
            assert token == end or logits[token] >= logits.max() - 1e-4


def test_max_spans(tiny, prompts):
    free = tiny.generate(prompts, max_new_tokens=TOKENS)
    assert max(len(row.spans) for row in free) >= 3
    for most in (0, 1, 2):
        rows = tiny.generate(prompts, max_new_tokens=TOKENS, max_spans=most)
        for row, before in zip(rows, free, strict=True):
            assert len(row.spans) <= most
            if len(before.spans) <= most:
                assert row.decoding == before.decoding
        assert max(len(row.spans) for row in rows) == most


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixed", "learned"])
def test_a_shorter_limit_gives_a_prefix(tiny, prompts, decoded, rule):
    """Wherever it falls: in text, behind the start of a span, in its middle, before its end."""
    cut = set()
    for limit in (1, 9, 10, 11, 12, 13, 14, 15):
        rows = tiny.generate(prompts, max_new_tokens=limit, stop_rule=rule, latent_size=4)
        for row, whole in zip(rows, decoded[rule], strict=True):
            tokens = row.decoding.token_ids
            wanted = whole.decoding.token_ids[:limit]
            assert row.decoding.finish_reason == ("length" if len(wanted) == limit else "stop")
            if len(wanted) == limit and wanted[-1] == tiny.config.pad_id:
                wanted = wanted[:-1]  # a latent at the limit is not consumed
            assert tokens == wanted
            if runs(tiny, row) and runs(tiny, row)[-1][-1] != tiny.config.end_id:
                cut.add(len(runs(tiny, row)[-1]))
            for mine, theirs in zip(row.spans, whole.spans, strict=False):
                assert mine.k == (0 if mine.latents is None else len(mine.latents))
                if mine.latents is not None:
                    assert distance(mine.latents, theirs.latents[: mine.k]) < 1e-4
    assert len(cut) >= 3, "spans were cut at different places"


def test_a_span_that_is_cut_has_as_many_latents_as_pads(tiny, prompts, decoded):
    row = next(i for i, whole in enumerate(decoded["fixed"]) if whole.spans)
    opened = decoded["fixed"][row].decoding.token_ids.index(tiny.config.start_id)
    (found,) = tiny.generate([prompts[row]], max_new_tokens=opened + 3, latent_size=4)
    assert found.decoding.token_ids.count(tiny.config.pad_id) == 1, "the latent at the limit is not consumed"
    assert [span.k for span in found.spans] == [1]


def test_a_row_that_ends_exactly_at_the_limit(tiny, prompts, decoded):
    """With one token more it stops by itself: the limit counts what is written down, the end of turn is not."""
    i = next(i for i, row in enumerate(decoded["fixed"]) if row.decoding.finish_reason == "stop")
    length = len(decoded["fixed"][i].decoding.token_ids)
    reasons = [
        tiny.generate([prompts[i]], max_new_tokens=n, latent_size=4)[0].decoding.finish_reason
        for n in (length, length + 1)
    ]
    assert reasons == ["length", "stop"]


def test_a_prompt_that_leaves_no_room(tiny):
    prompt = dialogue(["up, " * 30], ["x"])
    length = len(tiny.encoder.prompt(prompt.prompt)[0])
    with pytest.raises(
        MirageError, match=rf"a prompt of {length} tokens and {513 - length} new ones do not fit .* 512"
    ):
        tiny.generate([dialogue(["Go"], ["x"]), prompt], max_new_tokens=513 - length)
    assert len(tiny.generate([prompt], max_new_tokens=3)) == 1


def test_pictures_that_cannot_be_read(tiny, tmp_path):
    with pytest.raises(MirageError, match=f"cannot read the picture {tmp_path}/none.png"):
        tiny.generate([[user_turn(Image(tmp_path / "none.png"), "Go")]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_rule": "never"}, "unknown stop rule 'never'; choose one of fixed, learned"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive: 0"),
        ({"n": 0}, "n must be positive: 0"),
        ({"latent_size": -1}, "latent_size must not be negative: -1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p in"),
        ({"top_k": -1}, "top_k at least 0"),
        ({"seeds": [1, 2]}, "got 2 seeds for 1 responses"),
        ({"seeds": [1, 2], "n": 3}, "got 2 seeds for 3 responses"),
        ({"max_spans": -1}, "max_spans must not be negative: -1"),
        ({"max_latents": -1}, "max_latents must not be negative: -1"),
        ({"latent_dtype": "float16"}, "latent_dtype must be float32 or model, not 'float16'"),
        ({"engine": EngineConfig(max_batch_tokens=64)}, "take 9 blocks of 32 tokens, but the cache holds 2"),
    ],
)
def test_options_that_cannot_be(tiny, changes, message):
    with pytest.raises(MirageError, match=message):
        tiny.generate([dialogue(["Go"], ["x"])], **changes)


# -- what comes back -------------------------------------------------------------------------------------------------


def test_segments_are_the_tokens_in_order(tiny, decoded):
    config = tiny.config
    for row in decoded["fixed"]:
        pieces: list[str | int] = []
        for is_span, group in itertools.groupby(
            row.decoding.token_ids, lambda t: t in (config.start_id, config.pad_id, config.end_id)
        ):
            tokens = list(group)
            if is_span:
                pieces += [None] * tokens.count(config.start_id)
            else:
                pieces.append(tiny.tokenizer.decode(tokens, skip_special_tokens=True))
        found = [segment.text if isinstance(segment, Text) else None for segment in row.response]
        assert found == [piece for piece in pieces if piece != ""]
        assert all(span.helper is None for span in row.spans)


def test_what_is_known_of_a_prompt_stays(tiny):
    prompt = replace(dialogue(["Go"], ["x"]), task="vsp-planning", answer="R", meta={"level": 3})
    (row,) = tiny.generate([prompt], max_new_tokens=3)
    assert (row.task, row.answer, row.meta) == ("vsp-planning", "R", {"level": 3})


def test_latents_are_left_out_on_request(tiny, prompts, decoded):
    rows = tiny.generate(prompts, max_new_tokens=TOKENS, latent_size=4, return_latents=False)
    for row, whole in zip(rows, decoded["fixed"], strict=True):
        assert row.decoding == whole.decoding
        assert [span.k for span in row.spans] == [span.k for span in whole.spans]
        assert all(span.latents is None for span in row.spans)


def test_nothing_in_nothing_out(tiny):
    assert tiny.generate([]) == []


def test_a_model_in_training_is_left_in_training(fresh):
    fresh.train()
    before = fresh.generate(ragged()[:1], max_new_tokens=5)
    assert fresh.training and fresh.language_model.training
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    checkpoint_activations(fresh.model)
    assert_same(fresh.generate(ragged()[:1], max_new_tokens=5), before)


# -- sampling --------------------------------------------------------------------------------------------------------


def test_a_rows_seed_is_its_own(tiny, prompts):
    """Neither the batch nor the order changes what a row draws."""
    options = {"max_new_tokens": 25, "temperature": 1.3, "top_p": 0.95, "top_k": 50}
    together = tiny.generate(prompts, seed=7, **options)
    assert_same(tiny.generate(prompts, seed=7, engine=EngineConfig(max_rows=3), **options), together)
    alone = [tiny.generate([prompt], seed=7 + i, **options)[0] for i, prompt in enumerate(prompts)]
    assert_same(alone, together)
    seeds = [7 + i for i in range(len(prompts))]
    assert_same(tiny.generate(prompts[::-1], seeds=seeds[::-1], **options)[::-1], together)
    other = tiny.generate(prompts, seed=8, **options)
    assert sum(a.decoding != b.decoding for a, b in zip(other, together, strict=True)) >= len(prompts) - 1


def test_the_same_prompt_with_other_seeds_says_other_things(tiny):
    torch.manual_seed(0)
    prompt = dialogue(["Which way?"], ["x"])
    rows = tiny.generate([prompt] * 8, max_new_tokens=12, temperature=1.0)
    assert len({row.decoding.token_ids for row in rows}) == 8
    torch.manual_seed(1)
    assert_same(tiny.generate([prompt] * 8, max_new_tokens=12, temperature=1.0), rows)
    same = tiny.generate([prompt] * 8, max_new_tokens=12, temperature=1.0, seeds=[3] * 8)
    assert len({row.decoding.token_ids for row in same}) == 1


def test_sampled_spans_keep_their_shape(tiny, prompts):
    rows = tiny.generate(prompts * 3, max_new_tokens=30, temperature=0.5, latent_size=2)
    spans = [run for row in rows for run in complete(tiny, row)]
    assert len(spans) > 5 and all(run.count(tiny.config.pad_id) == 2 for run in spans)
    check_replayed_latents(tiny, rows)


def check_replayed_latents(vlm: LatentVLM, trajectories: Sequence[Trajectory]) -> None:
    batch = replayed(vlm, trajectories)
    with torch.no_grad():
        latents = stage2(vlm, batch).consumed.split((batch.input_ids == vlm.config.pad_id).sum(dim=1).tolist())
    for trajectory, expected in zip(trajectories, latents, strict=True):
        spans = [span.latents for span in trajectory.spans if span.latents is not None]
        if spans:
            own = torch.cat(spans)
            assert distance(own, expected[: len(own)]) < 1e-4
