"""The MentisOculi repository's folders, made here as its files are."""

import json

import PIL.Image
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.sources import load_preset
from mirage_vlm.tasks import score
from mirage_vlm.trajectory import Text

FOLD = {"choices": ["A", "B", "C", "D", "E"], "correct_choice": "D", "combined_image": "combined.png"}
BOARD = {"solution_pieces": ["A", "C", "E"], "combined_image": "combined.png"}


def puzzle(folder, task, known, level=2, number=1, steps=2, prefix=""):
    place = folder / "datasets" / task / f"output/level_{level:02}/puzzle_{number:04}"
    place.mkdir(parents=True)
    names = [f"cot_{i:02}.png" for i in range(steps)]
    for name in ("combined.png", *names):
        PIL.Image.new("RGB", (4, 4)).save(place / name)
    (place / "metadata.json").write_text(json.dumps(known | {"cot_images": [prefix + name for name in names]}))
    return place


def correct(example, text):
    return score(example.with_response((Text(rf"\boxed{{{text}}}"),))).correct


def test_paper_fold(tmp_path):
    place = puzzle(tmp_path, "paper-fold", FOLD, prefix="1_")  # as some of the true files name them
    (example,) = load_preset("mentisoculi-paper-fold", tmp_path)
    assert example.meta["id"] == "paper-fold/level_02/puzzle_0001"
    assert example.meta["level"] == 2
    assert [span.helper.source for span in example.spans] == [place / "cot_00.png", place / "cot_01.png"]
    assert score(example).correct
    assert correct(example, "d")
    assert not correct(example, "A")
    assert not correct(example, "A D")


def test_form_board(tmp_path):
    puzzle(tmp_path, "form-board", BOARD, steps=3)
    puzzle(tmp_path, "form-board", BOARD | {"solution_pieces": ["B"]}, level=1, steps=1)
    first, second = load_preset("mentisoculi-form-board", tmp_path)
    assert (first.meta["level"], second.meta["level"]) == (1, 2)
    assert score(second).correct
    for right in ("A C E", "E, C and A", "a, c, e"):
        assert correct(second, right)
    for wrong in ("A C", "A B C D E", "ACE", "A C D"):
        assert not correct(second, wrong)
    assert len(second.spans) == 3


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"choices": ["A"], "combined_image": "combined.png"}, "metadata.json: has no 'correct_choice'; there are: "),
        (FOLD | {"correct_choice": "F"}, "metadata.json: correct_choice: 'F' is none of "),
        (FOLD | {"choices": "ABC"}, "metadata.json: choices: must be a list of strings, not 'ABC'"),
        (FOLD | {"combined_image": "other.png"}, "other.png: no such file"),
    ],
)
def test_faults_name_the_file(tmp_path, known, message):
    place = puzzle(tmp_path, "paper-fold", known)
    with pytest.raises(MirageError) as caught:
        list(load_preset("mentisoculi-paper-fold", tmp_path))
    assert str(caught.value).startswith(f"{place}/{message}")


def test_a_level_without_a_number(tmp_path):
    place = puzzle(tmp_path, "paper-fold", FOLD)
    place.parent.rename(place.parent.with_name("level_x"))
    with pytest.raises(MirageError) as caught:
        list(load_preset("mentisoculi-paper-fold", tmp_path))
    assert str(caught.value) == f"{place.parent.parent}/level_x: must end in the number of the level, not 'x'"


def test_an_answer_that_could_not_be_right(tmp_path):
    place = puzzle(tmp_path, "form-board", BOARD | {"solution_pieces": ["piece A", "piece C"]})
    with pytest.raises(MirageError) as caught:
        list(load_preset("mentisoculi-form-board", tmp_path))
    assert str(caught.value).startswith(f"{place}/metadata.json: the right answer would not count as right: ")


def test_the_folder_of_the_task_itself_but_of_no_other(tmp_path, monkeypatch):
    folder = puzzle(tmp_path, "paper-fold", FOLD).parents[2]
    assert len(list(load_preset("mentisoculi-paper-fold", folder))) == 1
    with pytest.raises(MirageError, match="has no form-board/output"):
        load_preset("mentisoculi-form-board", folder)
    monkeypatch.chdir(folder)
    assert len(list(load_preset("mentisoculi-paper-fold", "."))) == 1


def test_no_such_folder(tmp_path):
    with pytest.raises(MirageError, match="has no paper-fold/output; name a copy of Jana-Z/mentis-oculi"):
        load_preset("mentisoculi-paper-fold", tmp_path)
