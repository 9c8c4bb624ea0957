"""The planned memory against what a real, small model takes."""

import pytest
import torch
from support import CORPUS
from torch.profiler import profile
from typer.testing import CliRunner

from mirage_vlm.cli.main import app
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.decoder import checkpoint_activations
from mirage_vlm.modeling.scratch import ScratchConfig, build
from mirage_vlm.training.losses import stage1, stage2
from mirage_vlm.training.memory import estimate, model_shape, sizes
from mirage_vlm.training.recipe import LoraRecipe, ModelRecipe, Recipe, TrainRecipe
from mirage_vlm.training.rollout import Batch
from mirage_vlm.training.run import add_adapters

SEVEN, THREE = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"
LORA = LoraRecipe(rank=4, modules=("q_proj", "down_proj"))


def recipe(stage: str = "stage1", model: ModelRecipe | None = None, **train) -> Recipe:
    return Recipe(stage, "x", model or ModelRecipe(path="x"), (), train=TrainRecipe(**train))


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("freeze_vision", [True, False])
def test_weights_gradients_and_optimizer_to_the_byte(fresh, lora, dtype, freeze_vision):
    wanted = recipe(model=ModelRecipe(path="x", dtype=dtype, lora=lora, freeze_vision=freeze_vision))
    planned = estimate(fresh.model, wanted)
    fresh.model.to(getattr(torch, dtype))
    fresh.vision_tower.requires_grad_(not freeze_vision)
    if lora is not None:
        add_adapters(fresh, lora)
    trained = [parameter for parameter in fresh.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    assert planned["weights"] == size(fresh.model.parameters())
    assert planned["gradients"] == size(parameter.grad for parameter in trained)
    assert planned["AdamW's state"] == size(states)


def test_tied_embeddings_count_once():
    assert sizes(model_shape(THREE), recipe()).total == 3_754_622_976, "as the hub counts them"
    assert sizes(model_shape(SEVEN), recipe()).total == 8_292_166_656


def test_shares():
    """Float32 copies of what is trained are shared out; in a pass two layers are whole, and the rest is."""
    model = model_shape(SEVEN)
    found = sizes(model, recipe())
    assert found.layer * 28 + found.rest == found.total
    mixed = recipe(model=ModelRecipe(path="x", dtype="bfloat16"), bf16=True)
    planned = estimate(model, mixed, cards=8)
    frozen = found.total - found.trained
    assert planned["weights"] == (4 * found.trained + 2 * frozen) // 8
    assert planned["AdamW's state"] == 8 * found.trained // 8
    assert planned["gathered weights"] == 2 * (found.rest + 2 * found.layer)
    kept = estimate(model, mixed, cards=8, resharded=False)
    assert kept["gathered weights"] == 2 * found.total
    for more in (
        recipe(model=mixed.model, bf16=True, accumulate=2),
        recipe("stage2", model=mixed.model, bf16=True),
    ):
        difference = estimate(model, more, cards=8)["whole gradients"] - planned["whole gradients"]
        assert difference == 2 * 28 * found.layer, "all gradients of the layers, in bfloat16"


def kept_by_forward(vlm: LatentVLM, stage, batch: Batch) -> int:
    """Bytes that are allocated by a forward pass and still held after it."""
    stage(vlm, batch)
    with profile(profile_memory=True) as record:
        loss = stage(vlm, batch)
    assert loss.ce_sum.requires_grad
    return sum(event.self_cpu_memory_usage for event in record.key_averages())


@pytest.mark.parametrize(
    ("stage", "attn", "dtype"),
    [(stage1, "sdpa", "bfloat16"), (stage1, "eager", "float32"), (stage2, "sdpa", "float32")],
)
def test_activations(stage, attn, dtype):
    """Two rows, one of them padded; without spans in stage 1, with a span of 4 in the middle in stage 2."""
    shape = ScratchConfig(width=128, layers=4, heads=4, kv_heads=2, mlp=384, context=512)
    vlm = build(shape, CORPUS, 0, attn, latent_size=4)
    vlm.model.to(getattr(torch, dtype))
    vlm.train()
    ids = torch.full((2, 256), vlm.tokenizer.convert_tokens_to_ids("a"))
    if stage is stage2:
        ids[:, 128:134] = torch.tensor([vlm.config.start_id, *[vlm.config.pad_id] * 4, vlm.config.end_id])
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    mask[0, -3:] = 0
    labels[:, 200] = 5
    batch = Batch(ids, mask, labels)
    model = ModelRecipe(path="x", dtype=dtype, attn=attn)

    def planned(checkpointing: bool) -> int:
        wanted = recipe(stage.__name__, model, batch_size=2, gradient_checkpointing=checkpointing)
        return estimate(vlm.model, wanted, tokens=256)["activations"]

    plain = kept_by_forward(vlm, stage, batch)
    assert planned(False) == pytest.approx(plain, rel=0.2)
    checkpoint_activations(vlm.model)
    checkpointed = kept_by_forward(vlm, stage, batch)
    assert checkpointed < plain / 4
    layer = (plain - checkpointed) / 4  # is run again in the backward pass
    assert planned(True) == pytest.approx(checkpointed + layer, rel=0.25)


def test_the_command(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"stage: stage2\noutput_dir: x\nmodel: {{path: {SEVEN}, dtype: bfloat16, lora: {{}}}}\n"
        "data: [{task: vsp-planning}]\ntrain: {bf16: true, gradient_checkpointing: true, batch_size: 4}\n"
    )
    shown = CliRunner().invoke(app, ["train", str(path), "--memory", "--tokens", "512"])
    assert shown.exit_code == 0
    first, *lines = shown.stdout.splitlines()
    assert first.startswith("8.45 B parameters, 0.162 B of them trained; 4 x 512 tokens")
    parts = {line[:28].strip(): float(line[28:].split()[0]) for line in lines}
    assert parts["weights"] == pytest.approx(2 * 8.454e9 / 2**30, abs=0.1)
    assert parts.pop("together") == pytest.approx(sum(parts.values()), abs=0.3)
    assert not (tmp_path / "x").exists()


def test_no_checkpoint_to_plan_for(tmp_path):
    with pytest.raises(MirageError, match=r"model.path: .*nowhere: no such folder.* the shapes of Qwen"):
        model_shape(str(tmp_path / "nowhere"))
