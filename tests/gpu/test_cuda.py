"""What runs on the CPU gives the same on a CUDA device: `make gpu`, or `pytest -m gpu tests/gpu`."""

import copy
import json
from pathlib import Path

import pytest
import torch
from support import batch_of, distance, held_out, ragged

from mirage_vlm.decoding import Engine, EngineConfig, Finished
from mirage_vlm.decoding.sampling import draw
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.bundled import BUNDLED, resolve
from mirage_vlm.rl.run import run_recipe
from mirage_vlm.training.losses import stage1, stage2
from mirage_vlm.training.recipe import load_recipe

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module", autouse=True)
def float32():
    """No TF32, which would hide what the tests look for."""
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def cpu():
    return LatentVLM.from_pretrained(resolve(BUNDLED))


@pytest.fixture(scope="module")
def cuda():
    return LatentVLM.from_pretrained(resolve(BUNDLED), device="cuda")


@pytest.fixture(scope="module")
def prompts():
    return held_out()


def responses(vlm, prompts, **engine):
    """Tokens of mixed requests by request and sample: greedy and sampled, groups, limits, eviction."""
    queue = Engine(vlm, EngineConfig(**engine))
    kinds = [
        {},
        {"temperature": 1.0, "seed": 5, "n": 3},
        {"evict_images": True},
        {"max_new_tokens": 9},
        {"temperature": 0.7, "top_p": 0.9, "seed": 8, "logprobs": True},
        {"latent_size": 2, "max_spans": 1},
    ]
    for i, prompt in enumerate(prompts):
        queue.submit(prompt, **{"max_new_tokens": 200, **kinds[i % len(kinds)]})
    done = {(e.request, e.sample): e.trajectory for e in queue.run() if isinstance(e, Finished)}
    assert queue.pool.used == 0 and queue.pool.reserved == 0
    return done


@pytest.fixture(scope="module")
def expected(cpu, prompts):
    return responses(cpu, prompts)


@pytest.mark.parametrize(
    "engine", [{}, {"max_rows": 3}, {"look_every": 1}, {"compile": True, "max_batch_tokens": 16384}]
)
def test_decoding_is_that_of_the_cpu(cuda, prompts, expected, engine):
    found = responses(cuda, prompts, **engine)
    assert found.keys() == expected.keys()
    for key, trajectory in expected.items():
        assert found[key].decoding.token_ids == trajectory.decoding.token_ids, key
        for ours, theirs in zip(found[key].spans, trajectory.spans, strict=True):
            assert distance(ours.latents, theirs.latents) < 1e-3


@pytest.mark.parametrize("stage", [stage1, stage2])
def test_losses_and_gradients_are_those_of_the_cpu(fresh, stage):
    there = copy.deepcopy(fresh).to("cuda")
    found = {}
    for vlm in (fresh, there):
        batch = batch_of(vlm, ragged())
        moved = {name: value.to(vlm.device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        loss = stage(vlm, type(batch)(**moved))
        (loss.ce_sum + loss.align_sum).backward()
        found[vlm.device.type] = loss.ce_sum.item(), loss.align_sum.item()
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-4)
    for (name, ours), (_, theirs) in zip(fresh.named_parameters(), there.named_parameters(), strict=True):
        if ours.grad is not None:
            assert distance(ours.grad, theirs.grad.cpu()) < 1e-3, name


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("recipe", ["cells", "paper-1", "paper-2", "plain"])
def test_recipes_train(tmp_path, prompts, recipe):
    changes = ["model.path=bundled", "train.max_steps=2", "train.log_every=1", f"output_dir={tmp_path}"]
    folder = run_recipe(load_recipe(ROOT / f"recipes/research/{recipe}.yaml", changes))
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics(tmp_path) if "loss" in line)
    vlm = LatentVLM.from_pretrained(folder, device="cuda")
    assert vlm.generate(prompts[:1], max_new_tokens=8)[0].decoding is not None


@pytest.mark.parametrize("latents", ["replay", "reroll", "gaussian"])
def test_rollout_and_training_agree(tmp_path, latents):
    noise = ["rl.latent_noise=0.1"] if latents == "gaussian" else []
    changes = ["train.max_steps=1", f"rl.latents={latents}", f"output_dir={tmp_path}", *noise]
    run_recipe(load_recipe(ROOT / "recipes/grpo-small.yaml", changes))
    (first,) = [line for line in metrics(tmp_path) if "rollout_logprob_max_abs_diff" in line]
    assert first["rollout_logprob_max_abs_diff"] < 1e-4


def test_a_token_without_chance_is_never_drawn():
    """A parallel sum may fall by an ulp where nothing is added; what is drawn must not lie there."""
    torch.manual_seed(0)
    logits = 4 * torch.randn(64, 152_064, device="cuda")
    logits[torch.rand_like(logits) < 0.999] = -torch.inf
    for _ in range(50):
        drawn = draw(logits, torch.rand(len(logits), device="cuda"))
        assert logits.gather(1, drawn.unsqueeze(1)).isfinite().all()
