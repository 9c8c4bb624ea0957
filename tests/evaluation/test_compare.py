"""`mirage compare`: the same examples are found again, differences have the right sign, bad files are named."""

import json

import pytest

from mirage_vlm.cli.main import run
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.compare import compare, items, load_results
from mirage_vlm.evaluation.evaluate import Scored
from mirage_vlm.tasks.base import Score, map_of
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.trajectory import Trajectory, user_turn


def results(model, outcomes, levels=(4, 5)):
    return {
        "model": model,
        "items": [
            {"name": str(i), "correct": right, "valid": True, "level": levels[i % 2]}
            for i, right in enumerate(outcomes)
        ],
    }


def test_the_difference_is_second_minus_first_and_paired():
    a = results("a", [i % 2 == 0 for i in range(200)])  # right on level 4 only
    b = results("b", [True] * 200)
    found = compare(a, b)
    assert found["models"] == ["a", "b"]
    assert found["all"]["accuracy"] == [0.5, 1.0]
    assert found["all"]["difference"] == 0.5
    low, high = found["all"]["ci95"]
    assert 0.42 < low < 0.45 and 0.55 < high < 0.58  # 0.5 ± 1.96 · sqrt(0.25 / 200)
    assert found["by_level"]["4"]["difference"] == 0.0 and found["by_level"]["4"]["ci95"] == [0.0, 0.0]
    assert found["by_level"]["5"]["difference"] == 1.0
    assert compare(b, a)["all"]["difference"] == -0.5
    assert found["all"]["p"] == compare(b, a)["all"]["p"] == pytest.approx(2.0**-99)
    assert found["by_level"]["4"]["p"] == 1


def test_levels_may_be_numbers_and_names():
    mixed = results("a", [True] * 8, levels=("hard", 4))
    assert list(compare(mixed, mixed)["by_level"]) == ["4", "hard"]


def test_questions_with_one_answer_are_told_apart_by_their_words():
    meta = {"choices": {"A": "yes", "B": "no"}, "letter": "A"}
    asked = [
        Trajectory((user_turn(text),), task="choice", answer="A", meta=meta) for text in ("Is it red?", "Is it far?")
    ]
    first, second = (item["name"] for item in items(Scored(t, Score(True, True, None, "")) for t in asked))
    assert first != second


def test_only_examples_of_both_count():
    a, b = results("a", [True] * 10), results("b", [False] * 6)
    found = compare(a, b)
    assert found["all"]["n"] == 6 and found["apart"] == [4, 0]
    with pytest.raises(MirageError, match="no example in common"):
        compare(a, {"model": "c", "items": [{"name": "other", "correct": True}]})


def test_names_do_not_depend_on_the_style_and_tell_examples_apart():
    def names(style, seed=0):
        made = GeneratedDataset("vsp-planning", [3, 4], 12, seed, "direct", "test")
        chosen = [made.task.example(map_of(made[i].meta), style) for i in range(12)]
        return [item["name"] for item in items(Scored(t, Score(True, True, True, "")) for t in chosen)]

    assert names("direct") == names("cot")
    assert len(set(names("direct"))) == 12
    assert names("direct") != names("direct", seed=1)


def test_repeated_examples_are_numbered():
    example = GeneratedDataset("vsp-planning", [3], 1, 0, "direct", "test")[0]
    found = items([Scored(example, Score(right, True, None, "")) for right in (True, False)])
    assert [item["name"][-2:] for item in found] == ["-1", "-2"]
    assert [item["correct"] for item in found] == [True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("{}", "items: missing"),
        ('{"items": [{"correct": true}]}', r"items\[0\]\.name"),
        ('{"items": [{"name": "x", "correct": 1}]}', r"items\[0\]\.correct"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MirageError, match=message) as fault:
        load_results(path)
    assert str(path) in str(fault.value)


def test_a_good_file_is_read(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results("a", [True, False])))
    assert load_results(path)["model"] == "a"


def write(folder, **evaluations):
    for name, content in evaluations.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return [str(folder / f"{name}.json") for name in evaluations]


def command(*arguments):
    with pytest.raises(SystemExit) as left:
        run(["compare", *arguments])
    return left.value.code


def test_the_command(tmp_path, capsys):
    files = write(tmp_path, a=results("a", [False] * 8), b=results("b", [True] * 8))
    assert command(*files, "--out", str(tmp_path / "out.json")) == 0
    assert "+100.0" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["all"]["difference"] == 1.0 and found["replacement"] == "self"


def test_several_are_compared_with_the_first(tmp_path, capsys):
    outcomes = {"a": [True] * 4 + [False] * 4, "b": [True] * 8, "c": [False] * 8}
    files = write(tmp_path, **{name: results(name, right) for name, right in outcomes.items()})
    assert command(*files, "--out", str(tmp_path / "out.json")) == 0
    shown = capsys.readouterr().out
    assert "A a, B b" in shown and "A a, B c" in shown
    found = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert [(one["models"], one["all"]["difference"]) for one in found] == [(["a", "b"], 0.5), (["a", "c"], -0.5)]


def with_zero(model, own, zero):
    return {**results(model, own), "replacements": {"self": {"correct": "?"}, "zero": {"correct": zero}}}


def test_the_outcomes_of_a_replacement(tmp_path, capsys):
    files = write(tmp_path, a=with_zero("m", [True] * 4, "0011"), b=with_zero("m", [True] * 4, "0111"))
    assert [item["correct"] for item in load_results(files[0], "zero")["items"]] == [False, False, True, True]
    assert all(item["correct"] for item in load_results(files[0], "self")["items"])
    assert command(*files, "--replacement", "zero", "--out", str(tmp_path / "out.json")) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert "+25.0" in shown and "with zero for latents" in shown and "a.json" in shown and "b.json" in shown
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["all"]["accuracy"] == [0.5, 0.75] and found["replacement"] == "zero"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (results("m", [True] * 4), "replacements.zero: missing; it has none"),
        ({**results("m", [True] * 4), "replacements": {"mean": {}}}, "replacements.zero: missing; it has mean"),
        (with_zero("m", [True] * 4, "011"), "replacements.zero.correct: must be a string of 4 digits"),
        (with_zero("m", [True] * 4, "0112"), "replacements.zero.correct: must be a string of 4 digits"),
        (with_zero("m", [True] * 4, None), "replacements.zero.correct: must be a string of 4 digits"),
    ],
)
def test_a_replacement_that_is_not_there(tmp_path, capsys, content, message):
    files = write(tmp_path, a=with_zero("m", [True] * 4, "0011"), b=content)
    assert command(*files, "--replacement", "zero", "--out", str(tmp_path / "out.json")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {files[1]}: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert command(str(tmp_path / "a.json"), str(tmp_path / "b.json")) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'a.json'}: cannot be read")
    (one,) = write(tmp_path, a=results("a", [True]))
    assert command(one) == 2
    assert "name at least one more" in capsys.readouterr().err
    other = write(tmp_path, c={"model": "c", "items": [{"name": "other", "correct": True}]})[0]
    assert command(one, other) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {one} and {other}: the two evaluations have no example in common"
    )
