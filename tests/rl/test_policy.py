"""The policy: what the trainer finds likely is what the engine recorded, with latents in place."""

import copy
import math
from collections import Counter

import pytest
import torch
from support import dialogue, picture, ragged
from torch.distributions import Independent, Normal

from mirage_vlm.decoding import GenerationConfig
from mirage_vlm.decoding.sampling import normals, uniforms
from mirage_vlm.modeling.encoding import IGNORED
from mirage_vlm.modeling.feedback import build_feedback
from mirage_vlm.rl.policy import Policy, WithoutAdapters, gaussian_log_density, token_scores
from mirage_vlm.rl.rollouts import Rollout, roll_out
from mirage_vlm.rl.trainer import batch_of
from mirage_vlm.training.recipe import LoraRecipe
from mirage_vlm.training.run import add_adapters

SIGMA = 0.3


def prompts(copies: int = 4):
    asked = [*ragged(), dialogue(["Which way?", picture(2, 1, 9)], ["x"])]
    return [prompt for prompt in asked for _ in range(copies)]


def rolled(vlm, seed: int = 0, **changes) -> list[Rollout]:
    config = GenerationConfig(max_new_tokens=60, temperature=0.9, **changes)
    asked = prompts()
    return roll_out(vlm, asked, config, range(seed, seed + len(asked)))


@pytest.fixture(scope="module")
def rollouts(tiny) -> list[Rollout]:
    return rolled(tiny)


def apart(vlm, rollouts, **options) -> float:
    """The largest difference between recorded and recomputed log-probabilities of chosen tokens, in one batch."""
    policy = Policy(vlm, temperature=0.9, **options)
    with torch.no_grad():
        likely, _ = policy(**batch_of(rollouts, vlm))
    found = 0.0
    for row, each in zip(likely, rollouts, strict=True):
        begin = len(each.prompt)
        for place, chance in enumerate(each.chances):
            if chance is not None:
                found = max(found, abs(float(row[begin + place]) - chance))
    return found


def test_without_spans_the_policy_is_what_was_sampled_from(tiny):
    """Chances are among the tokens that may be chosen: they add up to 1, and are how often each comes."""
    config = GenerationConfig(max_new_tokens=1, temperature=1.0, max_spans=0)
    prompt = prompts()[0]
    rollouts = roll_out(tiny, [prompt] * 600, config, range(600))
    chances = {each.completion[0]: each.chances[0] for each in rollouts}
    share = sum(math.exp(chance) for chance in chances.values())
    assert 0.8 < share < 1 + 1e-5
    seen = Counter(each.completion[0] for each in rollouts)
    for token, times in seen.most_common(5):
        expected = 600 * math.exp(chances[token])
        assert abs(times - expected) < 4 * expected**0.5
    some = rolled(tiny, max_spans=0)
    assert not any(each.trajectory.spans for each in some)
    assert apart(tiny, some, thinks=False) < 1e-4 < 1e-3 < apart(tiny, some)


@pytest.mark.parametrize("latents", ["replay", "reroll", "gaussian"])
@pytest.mark.parametrize("changes", [{}, {"span_after": "a"}, {"stop_rule": "learned"}])
def test_a_forced_span_is_no_action(tiny, latents, changes):
    noise = {"latent_noise": SIGMA} if latents == "gaussian" else {}
    some = rolled(tiny, spans="forced", **changes, **noise)
    start = tiny.config.start_id
    if "span_after" in changes:
        forced = [each for each in some if (None, start) in zip(each.chances, each.completion, strict=True)]
        assert forced and len(forced) < len(some)
    else:
        assert all(each.completion[0] == start and each.chances[0] is None for each in some)
    for each in some:  # which the trainer masks
        chosen = [chance for chance, token in zip(each.chances, each.completion, strict=True) if token == start]
        assert chosen.count(None) <= 1
    if latents == "gaussian":
        for each in some:  # a latent's density is added to what was chosen there
            pads = [token == tiny.config.pad_id for token in each.completion]
            each.chances[:] = [None if pad else chance for pad, chance in zip(pads, each.chances, strict=True)]
        assert apart(tiny, some, latents="gaussian", noise=SIGMA) < 1e-4
    else:
        assert apart(tiny, some, latents=latents) < 1e-4


def test_whether_to_go_on_is_drawn_as_likely_as_it_is(tiny):
    """Under the learned rule, at a temperature."""
    rollouts = rolled(tiny, stop_rule="learned") + rolled(tiny, 100, stop_rule="learned")
    expected, variance, went_on = 0.0, 0.0, 0
    for each in rollouts:
        for before, token, chance in zip([0, *each.completion], each.completion, each.chances, strict=False):
            if before == tiny.config.pad_id and chance is not None:
                share = math.exp(chance) if token == tiny.config.pad_id else 1 - math.exp(chance)
                expected, variance = expected + share, variance + share * (1 - share)
                went_on += token == tiny.config.pad_id
    assert variance > 5, "there were choices"
    assert abs(went_on - expected) < 4 * variance**0.5


@pytest.mark.parametrize("latents", ["replay", "reroll"])
@pytest.mark.parametrize("rule", ["fixed", "learned"])
def test_the_trainer_finds_what_the_engine_recorded(tiny, latents, rule):
    """Rows with no span, one, and more, with and without an end, in one padded batch."""
    rollouts = rolled(tiny, stop_rule=rule)
    assert {0, 1, 2} <= {len(each.trajectory.spans) for each in rollouts}
    assert {"stop", "length"} == {each.trajectory.decoding.finish_reason for each in rollouts}
    assert len({len(each.prompt) + len(each.completion) for each in rollouts}) > 5
    assert apart(tiny, rollouts, latents=latents) < 1e-4


def test_shifted_latents_are_found_out(tiny, rollouts):
    """Latents one position late, or another response's, are not taken for the right ones."""
    thinking = [i for i, each in enumerate(rollouts) if len(each.latents)]
    late = list(rollouts)
    for i in thinking:
        late[i] = copy.copy(late[i])
        object.__setattr__(late[i], "latents", late[i].latents.roll(1, dims=0))
    assert apart(tiny, late, latents="replay") > 1e-2
    assert apart(tiny, late, latents="reroll") < 1e-4, "which does not look at them"


def test_evicted_pictures_are_out_of_the_policys_sight(tiny):
    rollouts = rolled(tiny, evict_images=True)
    for latents in ("replay", "reroll"):
        assert apart(tiny, rollouts, latents=latents, visibility="evict") < 1e-4
    assert apart(tiny, rollouts, latents="replay") > 1e-2


def test_a_rollout_is_a_response_of_generate(tiny, rollouts):
    asked = prompts()[::4]
    config = GenerationConfig(max_new_tokens=60, temperature=0.9)
    alone = tiny.generate(asked, config, seeds=list(range(0, 4 * len(asked), 4)))
    assert [each.trajectory.text for each in rollouts[::4]] == [each.text for each in alone]


def test_a_density_is_added_to_the_choice_to_go_on(tiny):
    rollouts = rolled(tiny, latent_noise=SIGMA, stop_rule="learned")
    batch = batch_of(rollouts, tiny)
    with torch.no_grad():
        likely, chosen = (Policy(tiny, latents, 0.9, SIGMA)(**batch)[0] for latents in ("gaussian", "replay"))
    pads = batch["input_ids"] == tiny.config.pad_id
    assert torch.equal(likely[~pads], chosen[~pads]) and (chosen[pads] < 0).sum() > 5, "decisions"
    fixed = batch | {"labels": batch["labels"].masked_fill(pads, IGNORED)}
    with torch.no_grad():
        density = Policy(tiny, "gaussian", 0.9, SIGMA)(**fixed)[0]
    assert likely[pads] == pytest.approx(density[pads] + chosen[pads], abs=1e-4)


@pytest.mark.parametrize("feedback", ["identity", "linear"])
def test_drawn_latents_and_their_density(fresh, feedback):
    """Latents drawn around what would be fed back; text as recorded; densities as torch.distributions has them."""
    if feedback != "identity":
        fresh.feedback = build_feedback(feedback, fresh.width, None)
        with torch.no_grad():
            for parameter in fresh.feedback.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    rollouts = rolled(fresh, latent_noise=SIGMA)
    assert apart(fresh, rollouts, latents="gaussian", noise=SIGMA) < 1e-4
    policy = Policy(fresh, "gaussian", 0.9, SIGMA)
    batch = batch_of(rollouts, fresh)
    with torch.no_grad():
        likely, _ = policy(**batch)
    pads = batch["input_ids"] == fresh.config.pad_id
    hidden = Policy(fresh, "replay", 0.9)
    with torch.no_grad():
        means = []
        for each in rollouts:  # one row at a time, from the states of a pass without padding
            row = batch_of([each], fresh)
            states = _states(hidden, row)
            here = row["input_ids"][0] == fresh.config.pad_id
            means.append(fresh.feedback(states[0, :-1][here[1:]], None))
    means, vectors = torch.cat(means), torch.cat([each.latents for each in rollouts])
    expected = Independent(Normal(means.double(), SIGMA), 1).log_prob(vectors.double())
    assert likely[pads].double() == pytest.approx(expected, abs=2e-3)
    z = ((vectors - means) / SIGMA).flatten()
    assert abs(float(z.mean())) < 0.05 and float(z.std()) == pytest.approx(1, abs=0.05)


def _states(policy: Policy, batch: dict) -> torch.Tensor:
    from mirage_vlm.training.rollout import Batch, forward_given

    vectors, _, _ = batch.pop("vectors"), batch.pop("shown", ()), batch.pop("shown_thw", None)
    return forward_given(policy.vlm, Batch(**batch), vectors if len(vectors) else None)


def test_the_density_and_its_gradient():
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    means = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    density = gaussian_log_density(vectors, means, SIGMA)
    expected = Independent(Normal(means, SIGMA), 1).log_prob(vectors)
    assert torch.allclose(density, expected, atol=1e-9)
    (found,) = torch.autograd.grad(density.sum(), means, retain_graph=True)
    (analytic,) = torch.autograd.grad(expected.sum(), means)
    assert torch.allclose(found, analytic) and torch.allclose(found, (vectors - means) / SIGMA**2)
    assert torch.autograd.gradcheck(lambda m: gaussian_log_density(vectors, m, SIGMA), (means,))


@pytest.mark.parametrize("latents", ["replay", "reroll", "gaussian"])
def test_the_gradient_is_that_of_finite_differences(fresh, latents):
    """Along a random direction of the first decoder layer, in float64."""
    noise = SIGMA if latents == "gaussian" else 0.0
    rollouts = rolled(fresh, latent_noise=noise)[:6]
    assert any(len(each.latents) for each in rollouts)
    double = fresh.double()
    policy = Policy(double, latents, 0.9, noise)
    batch = batch_of(rollouts, double)
    batch["pixel_values"] = batch["pixel_values"].double()
    weights = list(double.language_model.layers[0].parameters())
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    total = policy(**batch)[0].double().sum()
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(total, weights), directions, strict=True))
    values = []
    for step in (1e-4, -2e-4):  # there and back over
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(step * direction)
            values.append(float(policy(**batch)[0].double().sum()))
    assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-4, rel=2e-2)


def test_only_rerolled_latents_bear_the_gradient_of_later_text(fresh):
    """The gradient at the state before a span, with the text before it left out of the loss."""
    rollouts = [each for each in rolled(fresh) if len(each.trajectory.spans) == 1 and len(each.latents)][:2]
    norms = {}
    for latents in ("replay", "reroll"):
        batch = batch_of(rollouts, fresh)
        after = (batch["input_ids"] == fresh.config.end_id).cumsum(dim=1) > 0
        batch["labels"] = batch["labels"].masked_fill(~after, -100)
        start = fresh.model.get_input_embeddings().weight
        (gradient,) = torch.autograd.grad(Policy(fresh, latents, 0.9)(**batch)[0].sum(), start)
        norms[latents] = gradient[fresh.config.start_id].norm()
    assert norms["reroll"] != pytest.approx(float(norms["replay"]), rel=1e-3)


def test_many_positions_are_scored_in_pieces(tiny, rollouts, monkeypatch):
    batch = batch_of(rollouts, tiny)
    whole = Policy(tiny)(**batch)
    monkeypatch.setattr("mirage_vlm.rl.policy.CHUNK", 7)
    pieces = Policy(tiny)(**batch)
    for one, other in zip(whole, pieces, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    gradients = [torch.autograd.grad(found[0].sum(), tiny.model.lm_head.weight)[0] for found in (whole, pieces)]
    assert torch.allclose(*gradients, atol=1e-4)


def test_entropy(tiny):
    hidden = torch.randn(2, 4, tiny.width, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, -100, 5], [-100, -100, 2, -100]])
    with torch.no_grad():
        likely, entropy = token_scores(tiny, hidden, labels, 1.7)
    for row, place in ((0, 1), (0, 3), (1, 2)):
        logits = tiny.logits(hidden[row, place - 1]).detach() / 1.7
        logits[[tiny.config.pad_id, tiny.config.end_id, tiny.family.image_token_id]] = -torch.inf
        chances = logits.softmax(-1)
        assert float(likely[row, place]) == pytest.approx(float(chances[labels[row, place]].log()), abs=1e-5)
        assert float(entropy[row, place]) == pytest.approx(float(-(chances * chances.log()).nansum()), abs=1e-4)
    assert int((likely != 0).sum()) == 3 and int((entropy != 0).sum()) == 3


def test_without_adapters_is_the_model_before_them(fresh):
    rollouts = rolled(fresh)
    batch = batch_of(rollouts, fresh)
    with torch.no_grad():
        before, _ = Policy(fresh)(**batch)
        add_adapters(fresh, LoraRecipe(rank=4))
        policy = Policy(fresh)
        reference = WithoutAdapters(policy)
        for name, parameter in fresh.named_parameters():
            if parameter.requires_grad and "lora" in name:
                parameter.add_(0.5)
        changed, _ = policy(**batch)
        again, _ = reference(**batch)
    assert torch.allclose(before, again, atol=1e-5) and not torch.allclose(before, changed, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(policy(**batch)[0], changed), "they are on again"


def test_normal_numbers():
    """As many standard deviations as a normal distribution has; a function of seed and count; none of the uniforms."""
    from scipy import stats

    seeds, counts = torch.arange(200).repeat_interleave(5), torch.arange(5).repeat(200)
    found = normals(seeds, counts, 33)
    assert found.shape == (1000, 33) and len(found.unique()) > 32_500  # of 24 bits some are the same
    assert stats.kstest(found.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(float(torch.corrcoef(found.T).fill_diagonal_(0).abs().max())) < 0.15
    assert torch.equal(found[7], normals(seeds[7:8], counts[7:8], 33)[0])
    beside = torch.stack([uniforms(seeds, counts), found[:, 0]])  # what a token is drawn by
    assert abs(float(torch.corrcoef(beside)[0, 1])) < 0.1
