"""The file of control tokens, through the commands: checked, trained in every stage, evaluated."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mirage_vlm.cli.main import app

CASE = Path(__file__).parent.parent / "data" / "cases" / "control-tokens.jsonl"
RECIPE = """
stage: {stage}
output_dir: {out}
model: {{path: bundled, attn: eager}}
data: [{{path: {data}}}]
train: {{max_steps: 1, batch_size: 2, save_every: 5, workers: 0}}
"""
RL = "rl: {n: 2, max_new_tokens: 4, rewards: [{name: accuracy}]}\n"


def mirage(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_it_has_no_fault():
    done = mirage("data", "check", CASE)
    assert done.exit_code == 0
    assert done.output.endswith("\n2 examples, 2 latent spans, 2 pictures: no faults\n")
    assert "holds" not in done.output, "no token is noted that would be read as text"


def test_a_span_that_was_written_out_is_a_note(tmp_path):
    data = tmp_path / "data.jsonl"
    turns = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "<|latent_start|><|latent_pad|><|latent_end|> up"},
    ]
    data.write_text(f"{json.dumps({'messages': turns})}\n" * 3)
    done = mirage("data", "check", data)
    assert done.exit_code == 0
    note, count = done.output.splitlines()
    assert note == (
        "note: messages[1].content: 3 texts hold <|latent_start|>, which is read as text; "
        "write a latent span as a part of its own"
    )
    assert count == "3 examples, 0 latent spans, 0 pictures: no faults"


@pytest.mark.parametrize("stage", ["stage1", "stage2", "grpo"])
def test_it_trains(tmp_path, stage):
    text = RECIPE.format(stage=stage, out=tmp_path / "run", data=CASE) + (RL if stage == "grpo" else "")
    (tmp_path / "recipe.yaml").write_text(text)
    done = mirage("train", tmp_path / "recipe.yaml")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_it_is_evaluated(tmp_path):
    done = mirage("eval", "--data", CASE, "--out", tmp_path / "result.json", "--max-new-tokens", 8)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "result.json").read_text())["n"] == 2
