"""Who may look at pictures, and whose latents are consumed: against slow passes with masks written out."""

from dataclasses import replace

import pytest
import torch
from support import batch_of, distance, gradients, ragged, slow_cross_entropy, slow_embeddings, slow_positions, split

from mirage_vlm.decoding import EngineConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.training.losses import stage1, stage2, targets_of
from mirage_vlm.training.own import forward_own
from mirage_vlm.training.recipe import DataRecipe, ModelRecipe, Recipe, TrainRecipe, load_recipe
from mirage_vlm.training.rollout import Batch
from mirage_vlm.training.run import train

KINDS = ["bottleneck", "evict"]


def sees(vlm: LatentVLM, ids: list[int], at: int, kind: str) -> bool:
    """Whether the position looks at pictures, as the method's page words it."""
    latent = vlm.config
    if kind == "evict":
        return latent.end_id not in ids[: at + 1]
    return ids[at] in (vlm.family.image_token_id, latent.start_id, latent.pad_id)


def slow_hidden(vlm: LatentVLM, row: Batch, embeddings: list[torch.Tensor], kind: str) -> torch.Tensor:
    """[t, D] one pass over the first t positions of one row with its mask written out pair by pair."""
    ids, length = row.input_ids[0].tolist(), len(embeddings)
    mask = torch.zeros(1, 1, length, length)
    for query in range(length):
        for key in range(length):
            hidden = ids[key] == vlm.family.image_token_id and not sees(vlm, ids, query, kind)
            if key > query or (kind != "full" and hidden):
                mask[0, 0, query, key] = -1e30
    return vlm.model.model.language_model(
        inputs_embeds=torch.stack(embeddings)[None],
        attention_mask=mask,
        position_ids=slow_positions(vlm, row)[:, :, :length],
        use_cache=False,
    ).last_hidden_state[0]


def slow(vlm: LatentVLM, row: Batch, kind: str, given: list[torch.Tensor | None]):
    """[T, D] hidden states and the consumed latents; `given` latents in the place of own ones, where not None."""
    embeddings, latents, given = slow_embeddings(vlm, row), [], list(given)
    for place, token in enumerate(row.input_ids[0].tolist()):
        if token == vlm.config.pad_id:
            own = slow_hidden(vlm, row, embeddings[:place], kind)[-1]
            fixed = given.pop(0)
            embeddings[place] = own if fixed is None else fixed
            latents.append(embeddings[place])
    return slow_hidden(vlm, row, embeddings, kind), latents


@pytest.mark.parametrize("kind", KINDS)
def test_stage_1(tiny, kind):
    batch = batch_of(tiny, ragged())
    found = stage1(tiny, batch, visibility=kind)
    targets, ce = list(targets_of(tiny, batch).pooled), 0.0
    for i, row in enumerate(split(tiny, batch)):
        count = int((row.input_ids == tiny.config.pad_id).sum())
        own, targets = targets[:count], targets[count:]
        hidden, _ = slow(tiny, row, kind, own)
        assert distance(found.hidden[i, : len(hidden)], hidden) < 1e-5
        ce = ce + slow_cross_entropy(tiny, row, hidden)
    assert found.ce_sum.item() == pytest.approx(float(ce.detach()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stage_2(tiny, kind):
    batch = batch_of(tiny, ragged(), targets=False)
    hidden, latents = forward_own(tiny, batch, visibility=kind)
    expected, ce = [], 0.0
    for i, row in enumerate(split(tiny, batch)):
        slow_states, own = slow(tiny, row, kind, [None] * 99)
        assert distance(hidden[i, : len(slow_states)], slow_states) < 1e-5
        expected += own
        ce = ce + slow_cross_entropy(tiny, row, slow_states)
    assert distance(latents, torch.stack(expected)) < 1e-5
    found = gradients(tiny, stage2(tiny, batch, visibility=kind).ce_sum)
    for name, gradient in gradients(tiny, ce).items():
        assert distance(found[name], gradient) < 1e-4, name
    assert distance(hidden, forward_own(tiny, batch)[0]) > 1e-3, "something is hidden"


def test_eviction_in_training_is_that_of_decoding(tiny):
    """What the engine decodes with its pictures evicted is what stage 2 computes with them hidden."""
    rows = tiny.generate(ragged(), max_new_tokens=24, evict_images=True, engine=EngineConfig(block_size=8))
    assert any(row.spans for row in rows)
    for row in rows:
        latents = [span.latents for span in row.spans if span.latents is not None]
        if not latents:
            continue
        prompt, images = tiny.encoder.prompt(row.prompt)
        ids = torch.tensor([[*prompt, *row.decoding.token_ids]])
        pixels = None if images is None else images.pixel_values
        batch = Batch(ids, torch.ones_like(ids), ids, pixels, None if images is None else images.grid_thw)
        _, found = forward_own(tiny, batch, visibility="evict")
        assert distance(found[: sum(map(len, latents))], torch.cat(latents)) < 1e-4


def test_a_checkpoint_says_that_its_pictures_leave(tiny, tmp_path):
    """Trained with eviction, it is decoded so unless a request says otherwise."""
    blind = LatentVLM(tiny.model, tiny.tokenizer, tiny.image_processor, replace(tiny.config, evict_images=True))
    blind.save_pretrained(tmp_path / "blind")
    kept = LatentVLM.from_pretrained(tmp_path / "blind")
    options = {"max_new_tokens": 24, "engine": EngineConfig(block_size=8)}

    def said(vlm, **more):
        return [row.decoding.token_ids for row in vlm.generate(ragged(), **options, **more)]

    assert kept.config.evict_images and not tiny.config.evict_images
    assert said(kept) == said(tiny, evict_images=True) != said(tiny)
    assert said(kept, evict_images=False) == said(tiny)


@pytest.mark.parametrize("visibility", ["evict", "full"])
def test_training_says_so_in_the_checkpoint(tiny, tmp_path, visibility):
    tiny.save_pretrained(tmp_path / "base")
    recipe = Recipe(
        stage="stage1",
        output_dir=str(tmp_path / "run"),
        model=ModelRecipe(path=str(tmp_path / "base")),
        data=(DataRecipe(task="vsp-planning", levels=(3,), n=4, style="direct"),),
        train=TrainRecipe(max_steps=1, visibility=visibility),
    )
    assert LatentVLM.from_pretrained(train(recipe)).config.evict_images == (visibility == "evict")


@pytest.mark.parametrize("iterations", [0, 9])
def test_some_latents_can_be_given(tiny, iterations):
    batch = batch_of(tiny, ragged())
    targets = targets_of(tiny, batch).pooled
    taken = torch.rand(len(targets), generator=torch.Generator().manual_seed(0)) < 0.5
    assert taken.any() and not taken.all()
    hidden, latents = forward_own(tiny, batch, iterations, given=(targets, taken))
    waiting = [t if fixed else None for t, fixed in zip(targets, taken.tolist(), strict=True)]
    expected = []
    for i, row in enumerate(split(tiny, batch)):
        count = int((row.input_ids == tiny.config.pad_id).sum())
        states, consumed = slow(tiny, row, "full", waiting[:count])
        waiting = waiting[count:]
        assert distance(hidden[i, : len(states)], states) < 1e-5
        expected += consumed
    assert distance(latents, torch.stack(expected)) < 1e-5


@pytest.mark.parametrize("iterations", [1, 2])
def test_given_latents_stand_in_every_pass(tiny, iterations):
    batch = batch_of(tiny, ragged())
    targets = targets_of(tiny, batch).pooled
    _, latents = forward_own(tiny, batch, iterations, given=(targets, torch.ones(len(targets), dtype=torch.bool)))
    assert torch.equal(latents, targets)


def test_all_given_is_stage_1_and_none_is_stage_2(tiny):
    batch = batch_of(tiny, ragged())
    one, two = stage1(tiny, batch), stage2(tiny, batch_of(tiny, ragged(), targets=False))
    assert stage2(tiny, batch, own_share=0.0).ce_sum.item() == pytest.approx(one.ce_sum.item(), rel=1e-5)
    assert stage2(tiny, batch, own_share=1.0).ce_sum.item() == pytest.approx(two.ce_sum.item(), rel=1e-5)


def test_the_share_of_own_latents_follows_its_schedule(tmp_path):
    from types import SimpleNamespace

    from mirage_vlm.training.trainer import LatentTrainer

    recipe = SimpleNamespace(train=SimpleNamespace(own_share=(0.2, 1.0)))
    shares = []
    for step in range(5):
        state = SimpleNamespace(global_step=step, max_steps=5)
        shares.append(LatentTrainer._own_share(SimpleNamespace(recipe=recipe, state=state)))
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


RECIPE = """\
stage: {stage}
output_dir: runs/x
model: {{path: runs/base}}
data: [{{task: vsp-planning, n: 8}}]
"""


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("stage1", "train.visibility=none", "'none' is not one of full, bottleneck, evict"),
        ("sft", "train.visibility=evict", "hides pictures in stage1 and stage2 alone"),
        ("stage1", "train.own_share=[0, 1]", "stage1 has no latents of its own"),
        ("stage2", "train.own_share=[0.5]", "must be two shares from 0 to 1"),
        ("stage2", "train.own_share=[0, 1.5]", "must be two shares from 0 to 1"),
    ],
)
def test_what_cannot_be(tmp_path, stage, override, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(stage=stage))
    with pytest.raises(MirageError) as caught:
        load_recipe(path, [override])
    assert str(caught.value).startswith(f"override {override!r}: {override.split('=')[0]}: {message}")
