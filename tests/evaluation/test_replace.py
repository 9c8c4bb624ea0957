"""The token replacement test: what stands in the place of latents is what its name says, and nothing else changes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support import dialogue, distance, picture, ragged
from typer.testing import CliRunner

from mirage_vlm.cli.main import app
from mirage_vlm.decoding import EngineConfig, GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.evaluate import Scored, evaluate, measures
from mirage_vlm.evaluation.oracle import oracle_targets
from mirage_vlm.evaluation.replace import (
    REPLACEMENTS,
    Material,
    Place,
    chosen,
    donors,
    replacement_test,
    summarise_replacements,
    verdict,
)
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.bundled import BUNDLED, resolve
from mirage_vlm.tasks.base import Score
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.trajectory import Decoding, LatentSpan, Trajectory, assistant_turn, user_turn

GENERATION = GenerationConfig(max_new_tokens=40)
K = 3  # of the tiny model


def reference(question, seed):
    """Two spans in the reference; k is left to the model."""
    helpers = [LatentSpan(helper=picture(3, 2, seed)), LatentSpan(helper=picture(2, 2, seed + 1))]
    turn = assistant_turn("Go up", helpers[0], "then", helpers[1], r"\boxed{D}")
    return Trajectory((*question.prompt, turn), answer="D")


@pytest.fixture(scope="module")
def examples():
    """Eight prompts on which the tiny model opens 0, 1 and several spans."""
    questions = [
        *ragged(),
        dialogue(["The elf walks over the ice."], ["x"]),
        dialogue(["Which way?", picture(2, 1, 9)], ["x"]),
        dialogue([picture(1, 1, 10), picture(2, 1, 11), "Go"], ["x"]),
    ]
    return [reference(question, 50 + 2 * i) for i, question in enumerate(questions)]


@pytest.fixture(scope="module")
def results(tiny, examples):
    return replacement_test(tiny, examples, ["all"], GENERATION, seed=3)


def consumed(scored):
    """[[(span, step, vector), ...], ...] of every response."""
    return [
        [(s, t, v) for s, span in enumerate(each.trajectory.spans) if span.k for t, v in enumerate(span.latents)]
        for each in scored
    ]


def spans_of(scored):
    return [[span.latents for span in each.trajectory.spans if span.k] for each in scored]


def test_all_are_run_self_first_and_equal_to_an_evaluation(tiny, examples, results):
    assert list(results) == list(REPLACEMENTS) and next(iter(results)) == "self"
    plain = evaluate(tiny, examples, GENERATION)
    assert [s.trajectory.decoding for s in plain] == [s.trajectory.decoding for s in results["self"]]
    counts = [len(spans) for spans in spans_of(plain)]
    assert min(counts) == 0 and max(counts) > 2, "some open none, some more than the reference has"


@pytest.mark.parametrize("name", [name for name, kind in REPLACEMENTS.items() if kind.vector])
def test_nothing_before_the_first_latent_changes(tiny, results, name):
    changed = 0
    for own, other in zip(results["self"], results[name], strict=True):
        assert own.trajectory.prompt == other.trajectory.prompt
        mine, theirs = own.trajectory.decoding.token_ids, other.trajectory.decoding.token_ids
        until = mine.index(tiny.config.start_id) + 1 if tiny.config.start_id in mine else len(mine)
        assert mine[:until] == theirs[:until] and len(theirs) <= GENERATION.max_new_tokens
        changed += mine != theirs
    assert changed, "the replacement is consumed"


def test_zero(results):
    vectors = [vector for each in consumed(results["zero"]) for _, _, vector in each]
    assert len(vectors) > 10 and not any(vector.any() for vector in vectors)


def test_mean(results):
    wanted = torch.cat([latents for spans in spans_of(results["self"]) for latents in spans]).mean(dim=0)
    assert all(distance(vector, wanted) < 1e-5 for each in consumed(results["mean"]) for _, _, vector in each)


def test_first_repeat(results):
    own = spans_of(results["self"])
    for mine, each in zip(own, consumed(results["first-repeat"]), strict=True):
        assert bool(mine) == bool(each)
        assert all(torch.equal(vector, mine[0][0]) for _, _, vector in each)


def test_shuffle(results):
    """Every latent is the same step of the same span of one other example, counted on where that has fewer."""
    own, shuffled = spans_of(results["self"]), consumed(results["shuffle"])
    found = donors([bool(spans) for spans in own], seed=3)
    wrapped = 0
    for i, each in enumerate(shuffled):
        assert found[i] != i and own[found[i]]
        for span, step, vector in each:
            theirs = own[found[i]]
            wrapped += span >= len(theirs)
            lent = theirs[span % len(theirs)]
            assert torch.equal(vector, lent[step % len(lent)])
    assert wrapped, "some donor had fewer spans"


def test_donors_are_a_derangement_by_seed():
    found = donors([True] * 30, seed=1)
    assert sorted(found) == list(range(30)) and all(i != j for i, j in enumerate(found))
    assert found == donors([True] * 30, seed=1) != donors([True] * 30, seed=2)
    thinks = [i % 3 == 0 for i in range(30)]
    assert all(thinks[donor] and donor != i for i, donor in enumerate(donors(thinks, seed=1)))


def test_oracle(tiny, examples, results):
    """Against targets of all helper images of an example at once, as training computes them."""
    reused = 0
    for example, each in zip(examples, consumed(results["oracle"]), strict=True):
        helpers = tiny.encoder.example(example).helpers
        with torch.no_grad():
            targets = tiny.targets(helpers.pixel_values, helpers.grid_thw, [K, K]).pooled.view(2, K, -1)
        reused += any(span > 1 for span, _, _ in each)
        assert all(distance(vector, targets[span % 2, step]) < 1e-4 for span, step, vector in each)
    assert reused, "some response opens more spans than the reference has"


def test_oracle_at_another_k(tiny, examples):
    other = replacement_test(tiny, examples[:3], ["oracle"], replace(GENERATION, latent_size=2))
    targets = oracle_targets(tiny, examples[:3], 2)
    for spans, each in zip(targets, consumed(other["oracle"]), strict=True):
        assert [len(span) for span in spans] == [2, 2]
        assert all(torch.equal(vector, spans[span % 2][step]) for span, step, vector in each)


def pooled(tiny, helper, k):
    """[k, D] the slow way: the vision tower's features [n, D] of one picture, cut into k runs of n // k, averaged."""
    found = tiny.encoder.pictures([helper])
    with torch.no_grad():
        (features,) = tiny.image_features(found.pixel_values, found.grid_thw)
    size = len(features) // k
    return torch.stack([sum(features[j * size + i] for i in range(size)) / size for j in range(k)])


@pytest.mark.parametrize("rule", ["fixed", "learned"])
def test_count_matched(tiny, examples, rule):
    """Spans of 2 and 4 latents in the reference, of 3 (1 where cut) or of 1 to 3 in the model's decoding."""
    stated = [
        replace(
            example,
            messages=(
                *example.prompt,
                assistant_turn(*(replace(span, k=k) for span, k in zip(example.spans, (2, 4), strict=True))),
            ),
        )
        for example in examples
    ]
    generation = GENERATION if rule == "fixed" else replace(GENERATION, stop_rule=rule, temperature=1.0, seed=4)
    found = replacement_test(tiny, stated, ["oracle", "count-matched"], generation)
    own = spans_of(found["self"])
    sizes = {len(span) for spans in own for span in spans}  # the last span of a response may be cut short
    assert K in sizes if rule == "fixed" else len(sizes) > 1 and sizes <= {1, 2, 3}
    reused = whole = 0
    for example, mine, matched, oracle in zip(
        stated, own, consumed(found["count-matched"]), consumed(found["oracle"]), strict=True
    ):
        helpers = [span.helper for span in example.spans]
        by_count = [pooled(tiny, helpers[i % 2], len(span)) for i, span in enumerate(mine)]
        assert bool(mine) == bool(matched)
        for i, step, vector in matched:
            wanted = by_count[i % len(by_count)]
            assert distance(vector, wanted[step % len(wanted)]) < 1e-4
            reused += i > 1
            whole += i < len(mine) and step == len(mine[i]) - 1
        by_reference = [pooled(tiny, helper, k) for helper, k in zip(helpers, (2, 4), strict=True)]
        for i, step, vector in oracle:
            assert distance(vector, by_reference[i % 2][step % (2, 4)[i % 2]]) < 1e-4
    assert reused or rule == "learned", "some response opens more spans than the reference has"
    assert whole, "some span was put in place to its last latent"


def test_count_matched_where_nothing_is_pooled_or_too_much(tiny, fresh, examples):
    """`full` does not compress, so the picture is averaged; more latents than patches cannot be made."""
    fresh.config = replace(fresh.config, pooling="full")
    lengths = [[2, 1, 3], []]
    found = oracle_targets(fresh, examples[:2], lengths=lengths)
    assert [[len(t) for t in targets] for targets in found] == lengths
    helpers = [span.helper for span in examples[0].spans]
    for i, targets in enumerate(found[0]):
        assert distance(targets, pooled(tiny, helpers[i % 2], lengths[0][i])) < 1e-4
    for vlm in (tiny, fresh):
        with pytest.raises(MirageError, match="k = 7 latents cannot be pooled from the 6 patches"):
            oracle_targets(vlm, examples[:1], lengths=[[7]])


def test_random_pooling_is_drawn_the_same_each_time(fresh, examples):
    fresh.config = replace(fresh.config, pooling="random")
    state = torch.get_rng_state()
    one, other = (oracle_targets(fresh, examples[:3]) for _ in range(2))
    assert all(a.equal(b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("rule", ["fixed", "learned"])
def test_markers_and_remove(tiny, examples, results, rule):
    found = results
    if rule == "learned":
        config = replace(GENERATION, stop_rule="learned")
        found = replacement_test(tiny, examples, ["markers", "remove"], config)
    start, end = tiny.config.start_id, tiny.config.end_id
    spans = [span for each in found["markers"] for span in each.trajectory.spans]
    assert len(spans) > 3 and all(span.k == 0 for span in spans)
    for each in found["markers"]:
        ids = each.trajectory.decoding.token_ids
        assert all(b == end for a, b in pairwise(ids) if a == start) and tiny.config.pad_id not in ids
    for each in found["remove"]:
        assert not each.trajectory.spans
        assert not {start, end, tiny.config.pad_id} & set(each.trajectory.decoding.token_ids)


@pytest.mark.parametrize("name", ["random", "random-matched", "random-model"])
def test_noise_does_not_depend_on_the_batch(tiny, examples, results, name):
    alone = replacement_test(tiny, examples, [name], GENERATION, EngineConfig(max_rows=2), seed=3)
    vectors = []
    for one, other in zip(consumed(results[name]), consumed(alone[name]), strict=True):
        assert [place[:2] for place in one] == [place[:2] for place in other]
        for (_, _, mine), (_, _, theirs) in zip(one, other, strict=True):
            assert distance(mine, theirs) < 1e-4
            vectors.append(mine)
    assert len(torch.stack(vectors).round(decimals=4).unique(dim=0)) == len(vectors), "every draw is another"
    reseeded = consumed(replacement_test(tiny, examples, [name], GENERATION, seed=4)[name])
    first = next(i for i, each in enumerate(reseeded) if each)
    assert distance(reseeded[first][0][2], consumed(results[name])[first][0][2]) > 0.1


def test_noise_has_the_mean_and_covariance_that_it_is_said_to_have():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 4, generator=generator)
    own = 2 + torch.randn(50, 4, generator=generator) @ mixing
    targets = -1 + torch.randn(3, 4, generator=generator)  # fewer than dimensions
    material = Material([[own]], [[targets]], seed=0)
    likes = {"random-model": own, "random-matched": targets}
    for name in ("random", *likes):
        vector = REPLACEMENTS[name].vector(material)
        drawn = torch.stack([vector(Place(i, 0, j, j)) for i in range(200) for j in range(100)]).double()
        mean, covariance = torch.zeros(4).double(), torch.eye(4).double()
        if name in likes:
            mean, covariance = likes[name].double().mean(dim=0), torch.cov(likes[name].double().T, correction=0)
        scale = covariance.diagonal().max()
        assert (drawn.mean(dim=0) - mean).abs().max() < 0.04 * scale.sqrt()
        assert (torch.cov(drawn.T) - covariance).abs().max() < 0.05 * scale


def test_progress_counts_every_response(tiny, examples):
    done = []
    replacement_test(tiny, examples[:3], ["zero", "remove"], GENERATION, progress=done.append)
    assert sum(done) == 9


def test_a_model_that_does_not_think_has_nothing_to_replace(tiny, examples):
    done = []
    found = replacement_test(tiny, examples, ["all"], replace(GENERATION, max_spans=0), progress=done.append)
    assert all(scored is found["self"] for scored in found.values()) and sum(done) == 8 * len(REPLACEMENTS)
    assert verdict(summarise_replacements(found)).endswith("not shown to be used: no response has any")


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["zeros"], {}, "unknown replacement 'zeros'; did you mean 'zero'"),
        (["?"], {}, "unknown replacement '.'; choose from self, zero, .*, or all"),
        (["zero"], {"n": 2}, "needs n = 1"),
        (["zero"], {"latent_size": 0}, "latent_size > 0"),
        (["zero"], {"latent_hook": lambda latents, *_: latents}, "no latent_hook"),
    ],
)
def test_what_cannot_be_asked(tiny, examples, names, changes, message):
    with pytest.raises(MirageError, match=message):
        replacement_test(tiny, examples, names, replace(GENERATION, **changes))


def test_examples_that_cannot_be_tested(tiny, examples):
    bare = Trajectory((user_turn("Go"), assistant_turn("D")), answer="D", meta={"id": "map-7"})
    for name in ("oracle", "count-matched", "random-matched"):
        with pytest.raises(MirageError, match=r"example 2 of 2 \(map-7\) has no helper image"):
            replacement_test(tiny, [examples[0], bare], [name], GENERATION)
    with pytest.raises(MirageError, match="shuffle needs at least two examples"):
        replacement_test(tiny, examples[:1], ["shuffle"], GENERATION)
    with pytest.raises(MirageError, match="nothing to evaluate"):
        replacement_test(tiny, [], ["zero"], GENERATION)
    with pytest.raises(MirageError, match="in which the model opens a latent span"):
        donors([False, True, False], seed=0)


def test_chosen_names():
    assert chosen(["zero"]) == ("self", "zero")
    assert chosen(["zero", "self", "zero"]) == ("self", "zero")
    assert chosen(["zero", "all"]) == tuple(REPLACEMENTS)


# -- what is made of it ----------------------------------------------------------------------------------------------


def outcomes(hits, n=100, k=4):
    turns = (user_turn("Go"), assistant_turn(*([LatentSpan(k=k)] if k else [])))
    response = Trajectory(turns, decoding=Decoding((7,) * (k + 5), "stop"))
    return [Scored(response, Score(i < hits, True, None, "")) for i in range(n)]


def test_summary():
    summary = summarise_replacements({"self": outcomes(80), "zero": outcomes(50), "remove": outcomes(78, k=0)})
    assert summary["self"]["difference"] == 0 and summary["self"]["difference_ci95"] == [0, 0]
    zero = summary["zero"]
    assert (zero["n"], zero["accuracy"], zero["latent_rate"]) == (100, 0.5, 1.0)
    assert zero["difference"] == pytest.approx(-0.3)
    assert zero["difference_ci95"] == pytest.approx([-0.39, -0.21], abs=0.011)
    assert zero["difference_p"] == pytest.approx(2**-30) and summary["self"]["difference_p"] == 1
    assert zero["ci95"] == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert summary["remove"]["latent_rate"] == 0 and zero["tokens_per_response"] == 5
    assert zero["correct"] == "1" * 50 + "0" * 50
    assert all(measures(outcomes(50))[key] == zero[key] for key in measures(outcomes(50)))
    json.dumps(summary)


def test_verdict():
    used = {"self": outcomes(80), "zero": outcomes(50), "shuffle": outcomes(40)}
    line = verdict(summarise_replacements(used))
    assert line.startswith("the latents are used: ") and "zero -30.0 (" in line and "shuffle -40.0 (" in line
    line = verdict(summarise_replacements({**used, "markers": outcomes(80), "oracle": outcomes(90)}))
    assert line == "the latents are not shown to be used: not clearly worse without them: markers +0.0 (+0.0 to +0.0)"
    line = verdict(summarise_replacements({"self": outcomes(80), "oracle": outcomes(60)}))
    assert "not shown to be used: no empty replacement was run" in line
    line = verdict(summarise_replacements({"self": outcomes(24, n=24), "zero": outcomes(20, n=24)}))
    assert "not clearly worse without them: zero -16.7 (" in line and line.endswith(", p = 0.06)"), "four of four"


# -- the bundled model -----------------------------------------------------------------------------------------------


def test_the_bundled_model_does_worse_without_its_latents():
    vlm = LatentVLM.from_pretrained(resolve(BUNDLED))
    made = GeneratedDataset("vsp-planning", (3, 4), 16, 1, "cot", "test")
    found = replacement_test(vlm, [made[i] for i in range(len(made))], ["zero", "oracle"], GenerationConfig())
    summary = summarise_replacements(found)
    assert summary["self"]["latent_rate"] == 1.0 and summary["self"]["accuracy"] > 0.8
    assert summary["zero"]["difference"] < 0
    assert all(not vector.any() for each in consumed(found["zero"]) for _, _, vector in each)


def test_the_command(tmp_path):
    out = tmp_path / "results.json"
    arguments = ["eval", "--task", "vsp-planning", "--levels", "3", "--n", "6", "--replace", "zero, remove"]
    figure = tmp_path / "figure.png"
    shown = CliRunner().invoke(app, [*arguments, "--out", str(out), "--figure", str(figure)])
    assert shown.exit_code == 0, shown.output
    results = json.loads(out.read_text())
    assert list(results["replacements"]) == ["self", "zero", "remove"]
    assert results["replacements"]["self"]["accuracy"] == results["accuracy"]
    assert results["verdict"].split(":")[0] in shown.output and "█" in shown.output
    assert figure.read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob("*.partial"))


BOXES = ((0.0, 0.0, 1 / 3, 0.5), (1 / 3, 0.5, 2 / 3, 1.0), (2 / 3, 0.0, 1.0, 0.5))


def test_the_oracle_of_regions_is_what_they_show(tiny):
    example = dialogue([picture(2, 2, 1), "Which way?"], [LatentSpan(picture(3, 2, 7), regions=BOXES), "right."])
    helper = tiny.encoder.pictures([example.spans[0].helper])
    patches = tiny.image_features(helper.pixel_values, helper.grid_thw)[0]
    ((found,),) = oracle_targets(tiny, [example])
    assert torch.equal(found, patches[[0, 4, 2]])
    ((two,),) = oracle_targets(tiny, [example], lengths=[[2]])
    assert torch.equal(two, patches[[0, 2]]), "the first and the last"
    ((five,),) = oracle_targets(tiny, [example], lengths=[[5]])
    assert torch.equal(five, patches[[0, 0, 4, 2, 2]])


def test_the_oracle_of_a_table_is_its_nearest_entry(tiny):
    parts = copy.deepcopy(tiny)
    vlm = LatentVLM(
        parts.model, parts.tokenizer, parts.image_processor, replace(tiny.config, feedback="codebook", codes=6)
    )
    vlm.feedback.table.normal_()
    example = dialogue(["Which way?"], [LatentSpan(picture(3, 2, 7), regions=BOXES), "right."])
    ((plain,),), ((coded,),) = oracle_targets(tiny, [example]), oracle_targets(vlm, [example])
    for target, code in zip(plain, coded, strict=True):
        near = min(range(6), key=lambda c: float((vlm.feedback.table[c] - target).norm()))
        assert torch.equal(code, vlm.feedback.table[near])
