"""`mirage list` and `mirage info`: all that there is, and what a checkpoint is, without waiting for torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirage_vlm import LatentVLM
from mirage_vlm.cli.main import run
from mirage_vlm.evaluation.replace import REPLACEMENTS
from mirage_vlm.modeling.bundled import ABOUT, FOLDERS, resolve
from mirage_vlm.modeling.feedback import FEEDBACKS
from mirage_vlm.modeling.pooling import POOLING_NAMES
from mirage_vlm.rl.rewards import REWARDS
from mirage_vlm.sources import preset_names
from mirage_vlm.tasks import get_task, task_names
from mirage_vlm.training.align import ALIGNMENTS


@pytest.fixture
def mirage(capsys):
    def call(*arguments, code=0):
        with pytest.raises(SystemExit) as end:
            run([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert (end.value.code or 0) == code, shown.err
        return shown.out if code == 0 else shown.err

    return call


def test_the_lists_are_what_there_is(mirage):
    """They are read out of the sources, so they are compared with what is imported."""
    found = json.loads(mirage("list", "--json"))
    names = {kind: [row["name"] for row in rows] for kind, rows in found.items()}
    assert names["tasks"] == list(task_names())
    assert names["models"] == list(FOLDERS) == list(ABOUT)
    assert names["benchmarks"] == list(preset_names())
    assert names["feedbacks"] == list(FEEDBACKS)
    assert names["poolings"] == list(POOLING_NAMES)
    assert names["alignments"] == list(ALIGNMENTS)
    assert names["rewards"] == list(REWARDS)
    assert names["replacements"] == list(REPLACEMENTS)
    assert "recipes/small/stage1.yaml" in [name[name.index("recipes/") :] for name in names["recipes"]]
    assert all(row["about"] for kind in ("feedbacks", "poolings", "rewards", "recipes") for row in found[kind])
    for row in found["tasks"]:
        assert row["styles"] == list(get_task(row["name"]).styles)


def test_a_list_alone_and_one_that_is_not_there(mirage):
    shown = mirage("list", "feedbacks", "rewards")
    assert "pointer-one" in shown and "brevity" in shown and "vsp-planning" not in shown
    (line,) = mirage("list", "flavours", code=2).splitlines()
    assert "flavours" in line and "feedbacks" in line


@pytest.mark.parametrize("line", [["list"], ["info", "bundled"], ["--help"]])
def test_torch_is_not_waited_for(line):
    code = f"""
import sys
from mirage_vlm.cli.main import run
try:
    run({line!r})
except SystemExit as end:
    assert not end.code
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", list(FOLDERS))
def test_a_bundled_model_is_described_as_it_is(mirage, name):
    card = json.loads(mirage("info", name, "--json"))
    vlm = LatentVLM.from_pretrained(resolve(name))
    assert card["parameters"] == sum(p.numel() for p in vlm.model.parameters())
    assert card["latent"]["latent_size"] == vlm.config.latent_size and card["latent"]["feedback"] == vlm.config.feedback
    assert card["context"] == vlm.family.max_positions
    assert card["dtype"] == str(vlm.model.dtype).removeprefix("torch.") and card["family"] == "qwen2_5_vl"
    assert card["pictures"]["max_pixels"] == vlm.image_processor.size["longest_edge"]
    assert "model.safetensors" in card["files"]
    shown = mirage("info", name)
    assert f"{card['parameters']:,}" in shown and "stop rule fixed" in shown


def test_shards_a_flat_config_and_a_base(mirage, tmp_path):
    """Weights in two files of another dtype, sizes at the top of config.json as the hub has them, no latent tokens."""
    folder = tmp_path / "base"
    shutil.copytree(resolve("bundled"), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({n: weights[n].to(torch.bfloat16) for n in part}, folder / f"model-0000{i}-of-00002.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config = {**config.pop("text_config"), **{k: v for k, v in config.items() if "latent" not in k}}
    (folder / "config.json").write_text(json.dumps(config))
    card = json.loads(mirage("info", folder, "--json"))
    assert card["parameters"] == 3_086_656 and card["stored"] == "bfloat16"
    assert card["latent"] is None and card["text"]["layers"] == 6 and card["context"] == 2048
    assert "none: a base" in mirage("info", folder)


def test_what_is_no_checkpoint_is_one_line(mirage, tmp_path):
    def refusal(path):
        (line,) = mirage("info", path, code=2).splitlines()
        return line

    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no config.json" in refusal(tmp_path)
    folder = tmp_path / "broken"
    shutil.copytree(resolve("bundled"), folder)
    whole = (folder / "config.json").read_text()
    for text in ("{", "[]", '{"model_type": 3}', '"x"'):
        (folder / "config.json").write_text(text)
        assert "config.json" in refusal(folder)
    (folder / "config.json").write_text(whole)
    for content in (b"", b"short", b"\xff" * 40, (50).to_bytes(8, "little") + b'{"a": 1}'):
        (folder / "model.safetensors").write_bytes(content)
        assert "model.safetensors" in refusal(folder)
    assert "it is a file" in refusal(Path(__file__))
