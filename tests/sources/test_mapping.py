"""Mappings: what a YAML may say, and the errors that name its file, line and key."""

import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.sources import read_mapping

LEAST = "question: q\nanswer: {column: a}\n"


def mapping(tmp_path, text, **overrides):
    path = tmp_path / "map.yaml"
    path.write_text(text)
    return read_mapping(path, **overrides)


def test_the_least_is_a_question_and_an_answer(tmp_path):
    found = mapping(tmp_path, LEAST)
    assert (found.kind, found.ending) == ("open", "Answer in \\boxed{}.")
    assert found.columns() == {"q": "question", "a": "answer.column"}


def test_columns_of_everything(tmp_path):
    found = mapping(
        tmp_path,
        """
question: "{topic}: {q}"
answer: {column: a, kind: index}
images: ["photos/{number}-{row}.jpg", plan.picture]
helpers: [h]
choices: {columns: [c1, c2]}
id: key
level: l
keep: [k]
where: {lang: en}
""",
    )
    assert found.columns() == {
        "topic": "question",
        "q": "question",
        "number": "images[0]",
        "plan.picture": "images[1]",
        "h": "helpers[0]",
        "a": "answer.column",
        "c1": "choices.columns[0]",
        "c2": "choices.columns[1]",
        "key": "id",
        "l": "level",
        "k": "keep[0]",
        "lang": "where.lang",
    }


def test_split_and_subset_from_outside(tmp_path):
    found = mapping(tmp_path, LEAST + "split: train\nconfigs: [x, y]\n", split="test", config="y")
    assert (found.split, found.config) == ("test", "y")


@pytest.mark.parametrize("name", ["2024", "*", "null", "[a", "a: b", ""])
def test_split_and_subset_from_outside_are_taken_as_they_stand(tmp_path, name):
    found = mapping(tmp_path, LEAST, split=name, config=name)
    assert (found.split, found.config) == (name, name)


def test_a_subset_from_outside_that_is_not_there(tmp_path):
    with pytest.raises(MirageError, match=r"map\.yaml.*: config: there is no '2024'; choose from x, y$"):
        mapping(tmp_path, LEAST + "configs: [x, y]\n", config="2024")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("answer: {column: a}\n", "question"),
        (LEAST + "picture: p\n", "picture"),
        (LEAST + "images: p\n", "images"),
        ("question: q\nanswer: {column: a, kind: letters}\n", "answer.kind: must be one of letter, index"),
        ("question: q\nanswer: {column: a, kind: index}\n", "answer.kind: 'index' needs choices"),
        (
            "question: q\nanswer: {column: a, kind: open}\nchoices: {column: c}\n",
            "answer.kind: 'open' has no choices",
        ),
        (LEAST + "choices: {column: c, columns: [d, e]}\n", "choices: name one list (column), several columns"),
        (LEAST + "choices: {shown: true}\n", "choices: name a column with a list"),
        (LEAST + "choices: {column: c, shuffle: true}\n", "choices.shuffle: the answer must then be"),
        (
            "question: q\nanswer: {column: a, kind: text}\nchoices: {column: c, shuffle: true, shown: true}\n",
            "choices.shuffle: choices that the question shows cannot be dealt anew",
        ),
        (LEAST + "choices: {columns: [c, d, e], letters: [A, B]}\n", "choices.letters: there are 3 columns, but 2"),
        (LEAST + "choices: {pattern: '(A'}\n", "choices.pattern: is not a regular expression"),
        (LEAST + "choices: {pattern: '(A)'}\n", "choices.pattern: must have two groups"),
        (LEAST + "remove: '['\n", "remove: is not a regular expression"),
        (LEAST + "config: z\nconfigs: [x, y]\n", "config: there is no 'z'; choose from x, y"),
        (LEAST + "where: {lang: {a: b}}\n", "where.lang: must be a value or a list of values"),
    ],
)
def test_wrong_mappings(tmp_path, text, message):
    with pytest.raises(MirageError) as caught:
        mapping(tmp_path, text)
    assert message in str(caught.value)
    assert "map.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapping_that_is_not_there(tmp_path):
    with pytest.raises(MirageError, match=r"none\.yaml"):
        read_mapping(tmp_path / "none.yaml")
