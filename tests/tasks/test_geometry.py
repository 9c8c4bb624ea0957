"""Geometry: answers against slow counts on pictures and cells, wording that gives nothing away, and the checker."""

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import read_data
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.choices import read_choice
from mirage_vlm.tasks.figures import BLUE, GREEN, KINDS, RED
from mirage_vlm.tasks.make import GeneratedDataset, write_dataset
from mirage_vlm.trajectory import Text

LEVELS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def examples():
    return list(GeneratedDataset("geometry", LEVELS, 600, 3, "cot"))


def of(examples, kind):
    return [example for example in examples if example.meta["kind"] == kind]


def colour(picture, cell, row, column, size=64):
    """The colour at a place of the picture, in cells."""
    return "#{:02x}{:02x}{:02x}".format(*np.asarray(picture)[int(row * size), int(column * size)])


def test_creation_covers_what_the_helper_image_paints(examples):
    for example in of(examples, "creation"):
        picture = example.spans[0].helper.load()
        side = example.meta["figure"]["side"]
        painted = Counter(colour(picture, 64, r + 0.3, c + 0.5) for r, c in product(range(side), repeat=2))
        assert painted[BLUE] > 0 and painted[GREEN] > 0
        assert painted[BLUE] + painted[GREEN] == int(example.answer)
        numbers = [int(n) for n in re.findall(r"\d+", example.text.partition("They are")[2].partition("</think>")[0])]
        a, b, c, d, one, two, both = numbers
        assert (a * b, c * d, one + two) == (one, two, both) and both == int(example.answer)
        assert {painted[BLUE], painted[GREEN]} == {one, two} or painted[BLUE] == painted[GREEN]


def test_deletion_counts_the_squares_that_the_picture_closes(examples):
    """A square is whole where no way leads out of it: each of its four sides is looked up in the pixels."""
    for example in of(examples, "deletion"):
        asked, helper = next(example.images()).load(), example.spans[0].helper.load()
        squares = example.meta["figure"]["squares"]
        for picture, ink in ((asked, "#1f2328"), (helper, "#1f2328")):
            whole = sum(
                all(
                    colour(picture, 64, r + 0.5 + dr, c + 0.5 + dc) == ink
                    for dr, dc in ((0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1))
                )
                for r, c in product(range(squares), repeat=2)
            )
            assert whole == int(example.answer)
        reds = np.all(np.asarray(asked) == [0xD1, 0x24, 0x2F], axis=-1).any()
        assert reds and not np.all(np.asarray(helper) == [0xD1, 0x24, 0x2F], axis=-1).any()


def test_update_moves_the_picture_itself(examples):
    """The dot of the helper image lies where numpy's own flips and turns of the cells put it, on the letter."""
    moves = {
        "left-right": np.fliplr,
        "up-down": np.flipud,
        "quarter": lambda grid: np.rot90(grid, -1),
        "half": lambda grid: np.rot90(grid, 2),
        "back": np.rot90,
    }
    seen = set()
    for example in of(examples, "update"):
        figure = example.meta["figure"]
        grid = np.zeros((figure["side"], figure["side"]), int)
        for row, column in figure["cells"]:
            grid[row, column] = 1
        grid[tuple(figure["dot"])] = 2
        moved = moves[figure["change"]](grid)
        (there,) = np.argwhere(moved == 2).tolist()
        assert figure["places"]["ABCD".index(example.answer)] == there
        assert len({tuple(place) for place in figure["places"]}) == 4
        helper = example.spans[0].helper.load()
        assert colour(helper, 64, there[0] + 0.5, there[1] + 0.5) == RED
        for row, column in np.argwhere(moved == 1).tolist():
            assert colour(helper, 64, row + 0.15, column + 0.15) == BLUE
        seen.add(figure["change"])
    assert seen == set(moves)


def test_selection_has_one_largest(examples):
    for example in of(examples, "selection"):
        figure = example.meta["figure"]
        sizes = []
        for shape in figure["shapes"]:
            grid = np.pad(np.zeros((figure["room"], figure["room"]), int), 1)
            for row, column in shape:
                grid[row + 1, column + 1] = 1
            border = np.abs(np.diff(grid, axis=0)).sum() + np.abs(np.diff(grid, axis=1)).sum()
            sizes.append(grid.sum() if figure["wanted"] == "area" else border)
        assert sizes.count(max(sizes)) == 1 and "ABCD"[int(np.argmax(sizes))] == example.answer


def test_every_kind_and_shapes_hang_together(examples):
    assert {example.meta["kind"] for example in examples} == set(KINDS)
    for example in of(examples, "update"):
        cells = {tuple(cell) for cell in example.meta["figure"]["cells"]}
        reached, edge = set(), {min(cells)}
        while edge:
            reached |= edge
            edge = {(r + i, c + j) for r, c in edge for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))} & cells - reached
        assert reached == cells


def test_the_words_alone_do_not_tell_the_answer():
    """The best fixed answer to each question stays near chance for letters, and below a half for numbers."""
    asked: dict[str, Counter] = {}
    for example in GeneratedDataset("geometry", LEVELS, 3000, 5, "plain"):
        asked.setdefault(example.prompt[0].segments[-1].text, Counter())[example.answer] += 1
    for question, answers in asked.items():
        best = answers.most_common(1)[0][1] / answers.total()
        assert best < (0.35 if "A, B, C or D" in question else 0.3), (question, answers)


def test_a_step_by_step_response_and_its_own_score(examples):
    for example in examples[:80]:
        assert get_task("geometry").score(example).correct
        assert len(example.spans) == 1 and example.text.startswith("<think>")
        assert example.prompt[0].segments[-1].text.endswith("Think step by step.")


@pytest.mark.parametrize(
    ("style", "spans", "pictures"), [("direct", 1, 1), ("cot", 1, 1), ("words", 0, 1), ("plain", 0, 1), ("shown", 0, 2)]
)
def test_styles(style, spans, pictures):
    example = GeneratedDataset("geometry", LEVELS, 4, 0, style)[1]
    assert (len(example.spans), len(list(example.images()))) == (spans, pictures)


def test_styles_share_their_figures():
    for i in range(8):
        made = [GeneratedDataset("geometry", LEVELS, 8, 0, style)[i] for style in ("plain", "shown", "words")]
        assert len({json.dumps(example.meta["figure"]) for example in made}) == 1


def test_train_and_test_share_no_figure():
    key = get_task("geometry").key
    train = {key(example) for example in GeneratedDataset("geometry", (1, 2), 1500, 0, "plain", "train")}
    test = {key(example) for example in GeneratedDataset("geometry", (1, 2), 300, 9, "plain", "test")}
    assert not train & test


def test_files_are_the_same_bytes_and_score_alike(tmp_path):
    for name in ("one", "two"):
        write_dataset("geometry", LEVELS, 12, tmp_path / name, n_test=4, seed=2, style="cot")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert files and all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    for example in read_data(tmp_path / "one" / "train.jsonl"):
        assert get_task("geometry").score(example).correct, "the figure comes back from the file whole"


@pytest.mark.parametrize(
    ("answer", "correct", "valid"),
    [
        (r"\boxed{7}", True, True),
        (r"\boxed{ 07 }", True, True),
        (r"\boxed{\text{7}}", True, True),
        (r"\boxed{8}", False, True),
        (r"\boxed{7} \boxed{8}", False, True),
        (r"\boxed{7 or 8}", False, False),
        (r"\boxed{7.5}", False, False),
        (r"\boxed{-7}", False, False),
        (r"\boxed{seven}", False, False),
        ("7", False, False),
        ("", False, False),
    ],
)
def test_numbers(answer, correct, valid):
    figure = {"side": 5, "at": [0, 0], "size": [3, 3], "notch": [1, 2], "corner": 0}
    example = get_task("geometry").example("creation", figure, "plain").with_response((Text(answer),))
    score = get_task("geometry").score(example)
    assert (score.correct, score.valid) == (correct, valid)


CHOICES = {"A": "at the gift", "B": "in a hole", "C": "safe", "D": "safe"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{ (b). }", "B"),
        (r"\boxed{**B**}", "B"),
        (r"\boxed{in a hole}", "B"),
        (r"\boxed{B: In a hole.}", "B"),
        (r"I first thought \boxed{A}, but \boxed{B}", "B"),
        ("B", "B"),
        ("(B) in a hole", "B"),
        ("The answer is B", None),
        (r"\boxed{A or B}", None),
        (r"\boxed{A, B}", None),
        (r"\boxed{B: at the gift}", None),
        (r"\boxed{safe}", None),
        (r"\boxed{C safe}", "C"),
        (r"\boxed{E}", None),
        (r"\boxed{}", None),
        (r"\boxed{B", None),
        ("", None),
    ],
)
def test_choices(text, letter):
    found = read_choice(text, CHOICES)
    assert found.letter == letter and bool(found.reason) == (letter is None)


def test_ambiguity_is_named():
    assert read_choice(r"\boxed{safe}", CHOICES).reason == "'safe' is C and D"


def test_what_cannot_be_scored_or_made():
    task = get_task("geometry")
    example = GeneratedDataset("geometry", (1,), 1, 0, "plain")[0]
    example.meta.pop("figure")
    with pytest.raises(MirageError, match='no "kind" and "figure" in its meta'):
        task.score(example)
    example.meta["figure"] = {}
    with pytest.raises(MirageError, match="the figure in meta is not whole"):
        task.score(example)
    with pytest.raises(MirageError, match="levels of geometry are from 1 to 4, not \\[5\\]"):
        GeneratedDataset("geometry", (5,), 1)
    with pytest.raises(MirageError, match="has no style 'cells'"):
        GeneratedDataset("geometry", (1,), 1, style="cells")


# -- the worked example of docs/tasks.md -----------------------------------------------------------------------------


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """The file that docs/tasks.md tells to write, where Python finds it."""
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    (code,) = re.findall(r"```python\n# colours\.py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "colours.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_task_of_ones_own_is_one_file(documented):
    examples = list(GeneratedDataset("colours:MIXING", (1,), 30))
    assert {example.answer for example in examples} == {"red", "green", "blue"}
    assert all(get_task("colours:MIXING").score(example).correct for example in examples)
    write_dataset("colours:MIXING", (1,), 5, documented / "data", n_test=2)
    assert len(read_data(documented / "data" / "train.jsonl")) == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [("colours:NOTHING", "cannot be had"), ("colours:COLOURS", "must be a task"), ("no.such:TASK", "cannot be had")],
)
def test_what_is_not_a_task(documented, name, message):
    with pytest.raises(MirageError, match=message):
        get_task(name)
