"""The bundled model: one meaning of a latent span everywhere, latents that are consumed, maps that are solved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support import held_out

from mirage_vlm.decoding import EngineConfig, GenerationConfig
from mirage_vlm.evaluation.evaluate import evaluate, summarise
from mirage_vlm.formats import read_data
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.bundled import BUNDLED, BUNDLED_BASE, BUNDLED_TASKS, resolve
from mirage_vlm.modeling.encoding import IGNORED, Encoded
from mirage_vlm.tasks import from_record
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training.data import collate
from mirage_vlm.training.own import forward_own
from mirage_vlm.training.rollout import Batch

ROOT = Path(__file__).parent.parent
VSP = Path(__file__).parent / "data" / "vsp"
SHARED_VSP = ROOT.parent / "shared" / "vsp"


@pytest.fixture(scope="module")
def vlm():
    return LatentVLM.from_pretrained(resolve(BUNDLED))


@pytest.fixture(scope="module")
def prompts():
    return held_out()


@pytest.fixture(scope="module")
def batched(vlm, prompts):
    return vlm.generate(prompts, engine=EngineConfig(max_rows=16))


def latents_of(trajectory):
    return torch.cat([span.latents for span in trajectory.spans])


def test_every_response_thinks_and_ends(batched):
    for trajectory in batched:
        assert trajectory.decoding.finish_reason == "stop"
        assert [span.k for span in trajectory.spans] == [4]


def test_a_batch_of_sixteen_decodes_as_one_at_a_time(vlm, prompts, batched):
    for prompt, together in zip(prompts, batched, strict=True):
        (alone,) = vlm.generate([prompt])
        assert alone.decoding.token_ids == together.decoding.token_ids
        torch.testing.assert_close(latents_of(alone), latents_of(together), atol=1e-4, rtol=1e-4)


def test_stage_2_rolls_out_the_latents_and_tokens_of_decoding(vlm, batched):
    examples = []
    for trajectory in batched:
        prompt, pictures = vlm.encoder.prompt(trajectory.prompt)
        response = [*trajectory.decoding.token_ids, vlm.tokenizer.eos_token_id]
        labels = torch.tensor([IGNORED] * len(prompt) + response)
        examples.append(Encoded(torch.tensor(prompt + response), labels, pictures, None))
    batch = Batch(**collate(examples, vlm.encoder))
    with torch.no_grad():
        hidden, latents = forward_own(vlm, batch)
        chosen = vlm.logits(hidden[:, :-1]).argmax(dim=-1)
    torch.testing.assert_close(latents, torch.cat([latents_of(t) for t in batched]), atol=1e-4, rtol=1e-4)
    wanted = batch.labels[:, 1:]
    text = (wanted != IGNORED) & (wanted != vlm.config.pad_id) & (wanted != vlm.config.end_id)
    assert torch.equal(chosen[text], wanted[text])


def test_latents_are_consumed(vlm, prompts, batched):
    """With zeros in their place some rows say something else."""
    silenced = vlm.generate(prompts, latent_hook=lambda latents, rows, steps: torch.zeros_like(latents))
    changed = [a.decoding.token_ids != b.decoding.token_ids for a, b in zip(batched, silenced, strict=True)]
    assert any(changed)


def test_a_sample_of_the_benchmark_is_solved(vlm):
    examples = read_data(VSP / "planning.jsonl", plain=lambda record: from_record(record, style="cot"))
    sample = [example for example in examples if example.meta["level"] <= 6][::6]
    results = summarise(evaluate(vlm, sample, GenerationConfig()))
    assert results["n"] == 20
    assert results["accuracy"] >= 0.85
    assert results["latent_rate"] == 1.0


@pytest.mark.slow
def test_the_whole_benchmark_part_is_solved(vlm):
    """The measures that the model card states, on the benchmark's own maps and on held-out questions."""
    planning = SHARED_VSP / "planning.jsonl"
    if os.environ.get("CI") and not planning.exists():
        pytest.fail("CI needs ../shared/vsp/planning.jsonl beside the repository")
    if not planning.exists():
        planning = VSP / "planning.jsonl"
    examples = read_data(planning, plain=lambda record: from_record(record, style="cot"))
    examples = [example for example in examples if example.meta["level"] <= 6]
    results = summarise(evaluate(vlm, examples, GenerationConfig()))
    by_level = {level: row["accuracy"] for level, row in results["by_level"].items()}
    assert sum(by_level.values()) / len(by_level) >= 0.95, by_level
    assert by_level["6"] >= 0.85 and results["latent_rate"] == 1.0
    made = GeneratedDataset("vsp-reasoning", (3, 4, 5, 6), 400, 0, "cot", "test")
    results = summarise(evaluate(vlm, [made[i] for i in range(len(made))], GenerationConfig()))
    assert results["accuracy"] >= 0.97 and results["latent_rate"] == 1.0


def test_size_and_card():
    for name in (BUNDLED, BUNDLED_BASE, BUNDLED_TASKS):
        folder = Path(resolve(name))
        assert sum(path.stat().st_size for path in folder.rglob("*")) <= 40e6
        assert {"README.md", "recipe.json", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}


def test_the_base_can_read_maps():
    """Paths it hardly reads yet; its model card says so."""
    base = LatentVLM.from_pretrained(resolve(BUNDLED_BASE))
    made = GeneratedDataset("vsp-perception", (3, 4, 5, 6), 60, 5, "direct", "test")
    for kind, least in (("map", 0.9), ("place", 0.6)):
        asked = [example for example in (made[i] for i in range(len(made))) if example.meta["kind"] == kind]
        results = summarise(evaluate(base, asked, GenerationConfig(max_new_tokens=64)))
        assert results["accuracy"] >= least, kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "levels", "least"), [("jigsaw", (1, 2, 3), 0.65), ("geometry", (1, 2), 0.38), ("sat", (1, 2, 3), 0.65)]
)
def test_the_second_model_is_far_above_chance(task, levels, least):
    """Chance is 0.5 for jigsaw and sat, and 0.26 for the commonest answer of each kind of geometry."""
    vlm = LatentVLM.from_pretrained(resolve(BUNDLED_TASKS))
    made = GeneratedDataset(task, levels, 200, 0, "words", "test")
    results = summarise(evaluate(vlm, [made[i] for i in range(len(made))], GenerationConfig(max_new_tokens=200)))
    assert results["accuracy"] >= least, results
