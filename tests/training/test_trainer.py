"""Training runs: accumulation, resuming after a kill, adapters, and what is refused before anything is written."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SCRATCH, batch_of, distance, ragged

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import write_jsonl
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training import run
from mirage_vlm.training.checkpoints import METRICS_FILE, TRAINABLE_FILE, MetricsFile
from mirage_vlm.training.losses import stage2
from mirage_vlm.training.recipe import Recipe, load_recipe
from mirage_vlm.training.trainer import LatentTrainer

RECIPE = """\
stage: stage2
output_dir: {folder}/run
model:
  scratch: {scratch}
  latent_size: 3
  image_scale: 0.4375
  attn: eager
data:
  - {{task: vsp-planning, levels: [3, 4], n: 20, style: mixed}}
  - {{task: vsp-perception, levels: [3], n: 12}}
train: {{learning_rate: 1.0e-3, weight_decay: 0.01, warmup: 2, log_every: 1, seed: 3, bucket: false}}
"""


@pytest.fixture
def recipe(tmp_path):
    """recipe(*overrides): a run of a few seconds in a folder of its own."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, scratch=SCRATCH))
    return lambda *overrides: load_recipe(path, overrides)


def weights(final: Path) -> dict[str, torch.Tensor]:
    return load_file(final / "model.safetensors")


def largest_difference(a: Path, b: Path) -> float:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def metrics(folder: Path) -> list[dict]:
    """The lines of `metrics.jsonl` that are of a step; the last line is of the whole run."""
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [line for line in lines if "loss" in line]


# -- gradient accumulation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_four_batches_of_two_are_a_batch_of_eight(recipe, tmp_path, monkeypatch, stage):
    """Rows differ in length and in their number of latents, so that a mean of means would be another loss."""
    common = (f"stage={stage}", "train.max_steps=4", "train.save_every=99")
    whole = run.train(recipe(*common, "train.batch_size=8"))
    parts = run.train(recipe(*common, "train.batch_size=2", "train.accumulate=4", f"output_dir={tmp_path}/parts"))
    assert largest_difference(whole, parts) < 1e-6
    for one, other in zip(metrics(whole.parent), metrics(parts.parent), strict=True):
        assert (one["tokens"], one["latents"]) == (other["tokens"], other["latents"])
        for key in ("loss", "ce", "grad_norm", *(["align"] if stage == "stage1" else [])):
            assert other[key] == pytest.approx(one[key], rel=1e-4)

    monkeypatch.setattr(LatentTrainer, "_get_num_items_in_batch", lambda *_: None)
    monkeypatch.setattr(LatentTrainer, "model_accepts_loss_kwargs", False, raising=False)
    means = run.train(recipe(*common, "train.batch_size=2", "train.accumulate=4", f"output_dir={tmp_path}/means"))
    assert largest_difference(whole, means) > 1e-5, "the comparison can fail"


def test_own_latents_are_trained_only_where_a_cached_pass_sees_its_prefix(recipe, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(run, "check_cache", looked.append)
    run.train(recipe("stage=stage1", "train.max_steps=1", f"output_dir={tmp_path}/stage1"))
    assert not looked, "targets are given in one pass"
    run.train(recipe("stage=stage2", "train.max_steps=1", f"output_dir={tmp_path}/stage2"))
    assert len(looked) == 1


def test_gradient_checkpointing_trains_the_same_model(recipe, tmp_path):
    common = ("train.max_steps=3", "train.batch_size=4")
    plain = run.train(recipe(*common))
    saved = run.train(recipe(*common, "train.gradient_checkpointing=true", f"output_dir={tmp_path}/checkpointed"))
    assert largest_difference(plain, saved) < 1e-7


def test_mixed_precision_is_near(recipe, tmp_path):
    common = ("train.max_steps=2", "train.batch_size=4")
    full = metrics(run.train(recipe(*common)).parent)
    half = metrics(run.train(recipe(*common, "train.bf16=true", f"output_dir={tmp_path}/half")).parent)
    assert [line["ce"] for line in half] == pytest.approx([line["ce"] for line in full], rel=0.01)
    assert half[0]["ce"] != full[0]["ce"]


# -- killed and resumed ----------------------------------------------------------------------------------------------

LONG = (
    "train.max_steps=24",
    "train.batch_size=4",
    "train.save_every=6",
    "train.keep=2",
    "train.bucket=true",
    "data=[{task: vsp-planning, levels: [3, 4], n: 36, style: mixed}]",  # 9 steps an epoch
)

KILLED = """
import os, signal, sys
from mirage_vlm.cli.main import run
from mirage_vlm.training.trainer import LatentTrainer

where, arguments = sys.argv[1], sys.argv[2:]
name = {"in step 16": "compute_loss", "in checkpoint 18": "_save"}[where]
own = getattr(LatentTrainer, name)

def deadly(self, *args, **kwargs):
    found = own(self, *args, **kwargs)
    if self.state.global_step == (15 if name == "compute_loss" else 18):
        os.kill(os.getpid(), signal.SIGKILL)
    return found

setattr(LatentTrainer, name, deadly)
run(["train", *arguments])
"""


@pytest.mark.parametrize(
    ("where", "stage"),
    [("in step 16", ("stage=stage1", "model.pooling=random")), ("in checkpoint 18", ("stage=stage2",))],
    ids=["in-a-step", "in-a-checkpoint"],
)
def test_a_killed_run_resumes_to_the_same_weights(recipe, tmp_path, where, stage):
    """Pooling by chance draws from the generator that a checkpoint has to keep."""
    wanted = (*LONG, *stage, f"output_dir={tmp_path}/killed")
    child = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(tmp_path / "recipe.yaml"), *wanted],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    killed = tmp_path / "killed"
    assert child.returncode == -signal.SIGKILL, child.stderr
    checkpoints = sorted(path.name for path in killed.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-12", "checkpoint-6"], "12 is in the middle of the second epoch"
    assert not (killed / "final").exists()
    assert (killed / "incomplete").exists() == (where == "in checkpoint 18")
    assert max(line["step"] for line in metrics(killed)) > 12, "it had gone on after the checkpoint"

    with pytest.raises(MirageError, match=f"{killed}: holds checkpoints of an earlier run; add --resume"):
        run.train(recipe(*wanted))
    resumed = run.train(recipe(*wanted), resume=True)
    whole = run.train(recipe(*LONG, *stage))
    assert largest_difference(resumed, whole) <= 1e-7
    assert [line["step"] for line in metrics(killed)] == list(range(1, 25))
    for one, other in zip(metrics(killed), metrics(whole.parent), strict=True):
        for key in one.keys() & {"loss", "ce", "align", "tokens", "latents", "learning_rate", "epoch"}:
            assert one[key] == pytest.approx(other[key], rel=1e-6), f"{key} of step {one['step']}"
    assert not (killed / "incomplete").exists()

    ce = [line["ce"] for line in metrics(killed)]
    assert sum(ce[-5:]) / 5 < sum(ce[:5]) / 5 - 0.2, "and it learns"
    for name in ("checkpoint-18", "checkpoint-24"):
        assert LatentVLM.from_pretrained(killed / name).config.latent_size == 3
        assert load_recipe(killed / name / "recipe.json") == recipe(*wanted)
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-24"]
    assert (killed / "final" / "recipe.json").exists()


@pytest.mark.parametrize("length", ["train.max_steps=3", "train.epochs=1"])
def test_resuming_a_finished_run_changes_nothing(recipe, tmp_path, length):
    """A kill may come between the last checkpoint and the final model."""
    wanted = recipe(length, "train.batch_size=4", "data=[{task: vsp-planning, levels: [3], n: 12}]")
    final = run.train(wanted)
    before = Path(shutil.copytree(final, tmp_path / "before"))
    shutil.rmtree(final)
    assert run.train(wanted, resume=True) == final
    assert largest_difference(final, before) == 0
    assert [line["step"] for line in metrics(final.parent)] == [1, 2, 3]


def test_resume_without_a_checkpoint_starts_afresh(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / METRICS_FILE).write_text('{"step": 1, "loss": 9.0}\n')
    final = run.train(recipe("train.max_steps=2", "train.batch_size=2"), resume=True)
    assert [line["step"] for line in metrics(final.parent)] == [1, 2]
    assert metrics(final.parent)[0]["loss"] != 9.0


def test_a_metrics_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    MetricsFile(path, 5).on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=1), None)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_seconds_go_on_over_a_resume(tmp_path, monkeypatch):
    """60 s to step 2, of which the lines were lost, come from its checkpoint; then 7 s more."""
    clock = iter((1_000.0, 1_000.0, 1_007.0, 1_009.0))
    monkeypatch.setattr("mirage_vlm.training.checkpoints.time.monotonic", lambda: next(clock))
    path = tmp_path / METRICS_FILE
    path.write_text("".join(f'{{"step": {step}, "seconds": {30.0 * step}}}\n' for step in (1, 2, 3)))
    file = MetricsFile(path, 5)
    state = SimpleNamespace(is_world_process_zero=True, global_step=2)
    file.on_train_begin(None, state, None)
    state.global_step = 3
    file.on_log(None, state, None, {"loss": 1.0})
    file.on_log(None, state, None, {"train_runtime": 9.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["seconds"]) for line in lines] == [(1, 30), (2, 60), (3, 67), (3, 69)]
    assert lines[-1]["examples"] == 5


# -- adapters --------------------------------------------------------------------------------------------------------

LORA = ("model.scratch=", "model.lora.rank=2", "model.lora.dropout=0.1", "model.lora.modules=[q_proj, down_proj]")


def lora_run(recipe, base: Path, *overrides: str) -> Recipe:
    length = ("train.max_steps=6", "train.batch_size=4", "train.save_every=3", "train.learning_rate=1e-2")
    data = "data=[{task: vsp-planning, levels: [3, 4], n: 20, style: mixed}]"
    return recipe(*LORA, f"model.path={base}", data, *length, *overrides)


@pytest.fixture(scope="module", params=[False, True], ids=["", "tied"])
def base(request, tiny, tmp_path_factory) -> Path:
    """`tiny` as a checkpoint; once with the embeddings for its head, as the smaller models of the family."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny.save_pretrained(folder)
    if request.param:
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(config))
        tables = load_file(folder / "model.safetensors")
        del tables["lm_head.weight"]
        save_file(tables, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_adapters_train_themselves_and_three_rows(recipe, tmp_path, base, monkeypatch):
    before = {}
    merge = run.merge_adapters
    batch = batch_of(LatentVLM.from_pretrained(base), ragged(), targets=False)

    def watched(vlm: LatentVLM) -> None:
        vlm.eval()
        before["trained"] = {name for name, parameter in vlm.named_parameters() if parameter.requires_grad}
        exact = copy.deepcopy(vlm).double()  # in which the order of a sum does not show
        with torch.no_grad():
            before["hidden"] = stage2(exact, batch).hidden
            before["logits"] = exact.logits(before["hidden"])
        merge(vlm)

    monkeypatch.setattr(run, "merge_adapters", watched)
    final = run.train(lora_run(recipe, base))
    assert all("lora_" in name or "trainable_tokens" in name for name in before["trained"])
    assert sum("lora_" in name for name in before["trained"]) == 2 * 2 * 2, "two matrices, two modules, two layers"
    assert {name.rpartition(".")[0] for name in load_file(tmp_path / "run" / "checkpoint-3" / TRAINABLE_FILE)} == {
        name.rpartition(".")[0] for name in before["trained"]
    }

    start, merged = (LatentVLM.from_pretrained(path, attn="eager", dtype=torch.float64) for path in (base, final))
    with torch.no_grad():
        hidden = stage2(merged, batch).hidden
        assert distance(hidden, before["hidden"]) < 1e-5
        assert distance(merged.logits(hidden), before["logits"]) < 1e-5
        assert distance(start.logits(stage2(start, batch).hidden), before["logits"]) > 0.01, "it has learnt"

    tied = [vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight for vlm in (start, merged)]
    assert tied in ([True, True], [False, False])
    rows = [merged.config.start_id, merged.config.pad_id, merged.config.end_id]
    old, new = start.state_dict(), merged.state_dict()
    assert old.keys() == new.keys(), "a plain checkpoint again"
    for name in old:
        change = new[name] - old[name]
        if name.endswith(("q_proj.weight", "down_proj.weight")) and "visual" not in name:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            others = [i for i in range(len(change)) if i not in rows]
            assert not change[others].any(), "the other rows stay"
            # in stage 2 a pad is never read, and never a label
            assert change[[merged.config.start_id, merged.config.end_id]].any(dim=1).all(), name
        else:
            assert not change.any(), name


def test_adapters_resume(recipe, tmp_path, base):
    """Dropout too goes on from the checkpoint's generator."""
    whole = run.train(lora_run(recipe, base))
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    resumed = run.train(lora_run(recipe, base, f"output_dir={tmp_path}/again"), resume=True)
    assert largest_difference(resumed, whole) <= 1e-7
    assert [line["step"] for line in metrics(tmp_path / "again")] == [4, 5, 6]


def test_adapters_on_layers_that_there_are_not(recipe, base):
    with pytest.raises(MirageError, match=r"model.lora.modules: no layer of the decoder is named c_attn"):
        run.train(lora_run(recipe, base, "model.lora.modules=[c_attn]"))


# -- refused before anything is written ------------------------------------------------------------------------------


def test_sft_with_spans(recipe, tmp_path):
    with pytest.raises(MirageError, match="stage sft trains on text alone, but the data has latent spans"):
        run.train(recipe("stage=sft"))
    assert not (tmp_path / "run").exists()


def test_sft_with_spans_in_a_later_source(recipe, tmp_path):
    sources = "data=[{task: vsp-perception, levels: [3], n: 4}, {task: vsp-planning, levels: [3], n: 4}]"
    with pytest.raises(MirageError, match="stage sft trains on text alone"):
        run.train(recipe("stage=sft", sources, "train.max_steps=4", "train.batch_size=8"))
    assert not (tmp_path / "run").exists()


def test_sft_without_spans(recipe):
    source = "data=[{task: vsp-perception, levels: [3], n: 40}]"
    final = run.train(recipe("stage=sft", source, "train.batch_size=4", "train.max_steps=2"))
    assert [line["latents"] for line in metrics(final.parent)] == [0, 0]


def test_k_larger_than_the_helper_images(recipe, tmp_path):
    with pytest.raises(MirageError, match=r"task vsp-planning: example 1: k = 10 latents .* 9 patches"):
        run.train(recipe("stage=stage1", "model.latent_size=10"))

    path = tmp_path / "train.jsonl"
    write_jsonl(path, [GeneratedDataset("vsp-planning", [level], 1)[0] for level in (4, 3)])
    with pytest.raises(MirageError, match=rf"{path}:2: messages\[1\].content\[0\].helper: k = 10 latents .* 9 patches"):
        run.train(recipe("stage=stage1", "model.latent_size=10", f"data=[{{path: {path}}}]"))
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_not_there(recipe, tmp_path):
    with pytest.raises(MirageError, match=r"nowhere: no such folder"):
        run.train(recipe("model.scratch=", f"model.path={tmp_path}/nowhere"))
    with pytest.raises(MirageError, match=r"none\.jsonl"):
        run.train(recipe(f"data=[{{path: {tmp_path}/none.jsonl}}]"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_example_that_cannot_be_encoded_says_so_in_one_line(recipe, workers):
    """Also from a worker process, which sends its traceback along."""
    scratch = "model.scratch.context=48"
    with pytest.raises(
        MirageError, match=r"^a[n]? \w+ has \d+ tokens, but the model's context holds 48: .*text$"
    ) as caught:
        run.train(recipe(scratch, "train.max_steps=1", "train.batch_size=8", f"train.workers={workers}"))
    assert "\n" not in str(caught.value)
