"""Training data whose responses are chosen by a checkpoint's answers."""

import pytest

from mirage_vlm.cli.main import run as command
from mirage_vlm.cli.options import load_model
from mirage_vlm.formats import read_data
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.make import GeneratedDataset


def test_a_span_where_the_answer_is_wrong(tmp_path, capsys):
    out = tmp_path / "mixed"
    arguments = ["data", "mix", "vsp-planning", "--model", "bundled", "--out", str(out), "--levels", "3,6", "--n", "24"]
    with pytest.raises(SystemExit) as end:
        command([*arguments, "--seed", "4"])
    assert not end.value.code
    made = read_data(out / "train.jsonl")
    plain = GeneratedDataset("vsp-planning", (3, 6), 24, 4, "plain")
    vlm, task = load_model("bundled"), get_task("vsp-planning")
    right = [task.score(vlm.generate([example], max_new_tokens=64)[0]).correct for example in plain]
    assert {True, False} == set(right)
    for example, mixed, is_right in zip(plain, made, right, strict=True):
        assert (
            mixed.meta["map"] == example.meta["map"] and mixed.prompt[0].segments[-1] == example.prompt[0].segments[-1]
        )
        assert len(mixed.spans) == (not is_right) and mixed.meta["style"] == ("plain" if is_right else "cells")
        assert task.score(mixed).correct
    said = capsys.readouterr().out
    assert f"24 training examples, {sum(right)} plain and {24 - sum(right)} cells" in said
    with pytest.raises(SystemExit) as end:
        command(arguments)
    assert end.value.code == 2 and "is not an empty folder" in capsys.readouterr().err
