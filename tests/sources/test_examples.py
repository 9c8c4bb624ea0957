"""Any data set by a mapping: kinds of answers, of choices, of pictures and of files, and faults of all of them."""

import base64
import csv
import io
import json
import pickle
from datetime import datetime
from decimal import Decimal

import datasets
import numpy as np
import PIL.Image
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.sources import Answer, Choices, Mapping, load
from mirage_vlm.tasks import score
from mirage_vlm.trajectory import Text

RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def png(colour):
    content = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), colour).save(content, "PNG")
    return content.getvalue()


def jsonl(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def question(example):
    return "".join(s.text for s in example.messages[0].segments if isinstance(s, Text))


def shown(example):
    images = [s for s in example.messages[0].segments if not isinstance(s, Text)]
    return [image.load().convert("RGB").getpixel((1, 1)) for image in images]


def fault(mapping, source):
    with pytest.raises(MirageError) as caught:
        list(load(mapping, source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def letter_of(tmp_path, kind, said, choices=("red", "green", "blue")):
    path = jsonl(tmp_path, {"q": "Which?", "c": list(choices), "a": said})
    (example,) = load(Mapping("q", Answer("a", kind), choices=Choices(column="c")), path)
    assert score(example).correct
    return example.meta["letter"]


@pytest.mark.parametrize(
    ("kind", "said", "letter"),
    [
        ("letter", "b", "B"),
        ("letter", "(B)", "B"),
        ("letter", "B.", "B"),
        ("index", 0, "A"),
        ("index", "2", "C"),
        ("index", 2.0, "C"),
        ("number", 1, "A"),
        ("number", "3", "C"),
        ("text", "Green", "B"),
    ],
)
def test_answers(tmp_path, kind, said, letter):
    assert letter_of(tmp_path, kind, said) == letter


@pytest.mark.parametrize(
    ("kind", "said", "message"),
    [
        ("letter", "D", "a: 'D' is none of the letters (A, B, C)"),
        ("letter", "AB", "a: 'AB' is none of the letters"),
        ("letter", None, "a: is empty"),
        ("letter", True, "a: must be a text, not 'True'"),
        ("index", 3, "a: '3' is the number of none of the choices"),
        ("index", -1, "a: '-1' is the number of none of the choices"),
        ("index", 1.5, "a: '1.5' is the number of none of the choices"),
        ("index", "nan", "a: 'nan' is not a whole number"),
        ("index", "B", "a: 'B' is not a whole number"),
        ("number", 0, "a: '0' is the number of none of the choices"),
        ("text", "black", "a: 'black' is the text of none of the choices"),
    ],
)
def test_wrong_answers_name_file_and_row(tmp_path, kind, said, message):
    other = {"q": "!", "c": [], "a": ""}  # has faults, but is not taken
    path = jsonl(tmp_path, other, {"q": "?", "c": ["red", "green", "blue"], "a": said})
    mapping = Mapping("q", Answer("a", kind), choices=Choices(column="c"), where={"q": "?"})
    assert fault(mapping, path).startswith(f"{path}:2: {message}")


def test_a_text_that_two_choices_share(tmp_path):
    path = jsonl(tmp_path, {"q": "?", "c": ["red", "Red"], "a": "red"})
    mapping = Mapping("q", Answer("a", "text"), choices=Choices(column="c"))
    assert fault(mapping, path) == f"{path}:1: a: 'red' is the text of A and B (A, B)"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["red"], "has 1 choices"),
        (None, "c: must be a list of texts, not 'None'"),
        ("red, green", "c: must be a list of texts"),
        (["red", None], "c: must be a list of texts"),
        ([str(i) for i in range(27)], "c: has 27 choices, but there are 26 letters"),
    ],
)
def test_wrong_choices(tmp_path, choices, message):
    path = jsonl(tmp_path, {"q": "?", "c": choices, "a": "A"})
    assert fault(Mapping("q", Answer("a"), choices=Choices(column="c")), path).startswith(f"{path}:1: {message}")


def test_several_columns_of_which_some_are_empty(tmp_path):
    path = jsonl(tmp_path, {"q": "?", "1": "red", "2": 7, "3": "", "4": None, "a": "B"})
    mapping = Mapping("q", Answer("a"), choices=Choices(columns=("1", "2", "3", "4")))
    (example,) = load(mapping, path)
    assert example.meta["choices"] == {"A": "red", "B": "7"}
    assert question(example) == "?\n(A) red\n(B) 7\nAnswer with the letter of the right choice in \\boxed{}."


def test_an_index_counts_columns_that_are_empty(tmp_path):
    rows = [{"q": "?", "1": "red", "2": None, "3": "blue", "a": said} for said in (0, 2, 1)]
    path = jsonl(tmp_path, *rows)
    examples = load(Mapping("q", Answer("a", "index"), choices=Choices(columns=("1", "2", "3"))), path)
    assert [next(examples).meta["letter"] for _ in range(2)] == ["A", "C"]
    with pytest.raises(MirageError, match=r":3: a: '1' is the number of none of the choices \(A, C\)"):
        next(examples)


def test_choices_in_the_question(tmp_path):
    text = "Which?\nA. red\nB. green\nC. blue"
    mapping = Mapping("q", Answer("a"), choices=Choices(pattern=r"(?m)^([A-Z])\. (.+)$"))
    (example,) = load(mapping, jsonl(tmp_path, {"q": text, "a": "C"}))
    assert example.meta["choices"] == {"A": "red", "B": "green", "C": "blue"}
    assert question(example).startswith(text + "\nAnswer")
    twice = jsonl(tmp_path, {"q": text + "\nA. black", "a": "C"})
    assert fault(mapping, twice).startswith(f"{twice}:1: choices.pattern: finds 4 choices in 'Which?")
    none = jsonl(tmp_path, {"q": "Which?", "a": "C"})
    assert fault(mapping, none).startswith(f"{none}:1: choices.pattern: finds 0 choices")


def test_constants_and_what_is_removed(tmp_path):
    path = jsonl(tmp_path, {"q": "How many? Think!", "topic": "dots", "a": 12, "n": {"deep": [1, 2]}, "l": 3})
    mapping = Mapping(
        "{topic}: {q}",
        Answer("a"),
        prefix="Look.",
        suffix="A number in \\boxed{}.",
        remove=r"\s*Think!$",
        id="{topic}-{row}",
        level="l",
        keep=("n.deep",),
    )
    (example,) = load(mapping, path)
    assert question(example) == "Look.\ndots: How many?\nA number in \\boxed{}."
    assert example.meta == {"id": "dots-1", "answer": "12", "level": 3, "n.deep": [1, 2]}
    assert score(example).correct


def test_only_rows_that_are_asked_for(tmp_path):
    records = [{"q": str(i), "lang": lang, "a": "x"} for i, lang in enumerate(["en", "de", "en", "fr"])]
    path = jsonl(tmp_path, *records)

    def ids(where):
        return [example.meta["id"] for example in load(Mapping("q", Answer("a"), where=where), path)]

    assert ids({"lang": "en"}) == ["1", "3"]  # the numbers are the rows', whatever is taken
    assert ids({"lang": ["de", "fr"], "q": 1}) == ["2"]
    assert fault(Mapping("q", Answer("a"), where={"lang": "it"}), path) == f"{path}: has no rows where {{'lang': 'it'}}"


PICTURES = {
    "stored": lambda path: {"bytes": png(RED), "path": None},
    "a path": lambda path: "red.png",
    "a path in a dict": lambda path: {"bytes": None, "path": "red.png"},
    "an absolute path": lambda path: str(path / "red.png"),
    "base64": lambda path: base64.b64encode(png(RED)).decode(),
    "base64 with line ends": lambda path: base64.encodebytes(png(RED)).decode(),
    "a data URL": lambda path: "data:image/png;base64," + base64.b64encode(png(RED)).decode(),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(tmp_path, kind):
    (tmp_path / "red.png").write_bytes(png(RED))
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_dict({"q": ["?"], "p": [PICTURES[kind](tmp_path)], "a": ["x"]}).to_parquet(str(path))
    (example,) = load(Mapping("q", Answer("a"), images=("p",)), path)
    assert shown(example) == [RED]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://there/x.png", "p: is a URL (https://there/x.png); download the pictures"),
        ("none.png", "p: no such file: "),
        (7, "p: must be a picture, not '7'"),
        ({"url": "x"}, "p: must be a picture, not "),
        ("", "has no picture in p"),
        (None, "has no picture in p"),
        ([], "has no picture in p"),
    ],
)
def test_wrong_pictures(tmp_path, value, message):
    path = jsonl(tmp_path, {"q": "?", "p": value, "a": "x"})
    assert fault(Mapping("q", Answer("a"), images=("p",)), path).startswith(f"{path}:1: {message}")


def test_a_picture_that_cannot_be_read_is_named_when_it_is_drawn(tmp_path):
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_dict({"q": ["?"], "p": [{"bytes": png(RED)[:40], "path": None}], "a": ["x"]}).to_parquet(
        str(path)
    )
    (example,) = load(Mapping("q", Answer("a"), images=("p",)), path)
    with pytest.raises(MirageError, match=r"data\.parquet\[0\]: p"):
        shown(example)


ROWS = [{"q": f"Which, {i}?", "a": str(i)} for i in range(40)]


def as_jsonl(folder):
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))


def as_json(folder):
    (folder / "test.json").write_text("\ufeff" + json.dumps(ROWS), encoding="utf-8")


def as_csv(folder, name="test.csv", delimiter=","):
    with (folder / name).open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["q", "a"], *(row.values() for row in ROWS)])


def as_tsv(folder):
    as_csv(folder, "test.tsv", "\t")


def as_parquet(folder):
    """Of two files, in order; and one of another split."""
    for i, rows in enumerate((ROWS[:25], ROWS[25:])):
        datasets.Dataset.from_list(rows).to_parquet(str(folder / f"test-0000{i}-of-00002.parquet"))
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(str(folder / "train-00000-of-00001.parquet"))


def as_saved(folder):
    datasets.DatasetDict(
        {"test": datasets.Dataset.from_list(ROWS), "train": datasets.Dataset.from_list(ROWS[:1])}
    ).save_to_disk(str(folder))


def as_saved_split(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))


def as_arrow(folder):
    as_saved_split(folder / "x")
    (found,) = (folder / "x").glob("*.arrow")
    found.rename(folder / "test.arrow")
    for path in (folder / "x").iterdir():
        path.unlink()


@pytest.mark.parametrize("write", [as_jsonl, as_json, as_csv, as_tsv, as_parquet, as_saved, as_saved_split, as_arrow])
def test_files(tmp_path, write):
    write(tmp_path)
    examples = list(load(Mapping("q", Answer("a"), split="test"), tmp_path))
    assert [(question(e).partition("\n")[0], e.answer) for e in examples] == [(row["q"], row["a"]) for row in ROWS]
    message = fault(Mapping("ask", Answer("a"), split="test"), tmp_path)
    assert message.endswith(": has no column 'ask' (question); there are: q, a")


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("test", ["data/test-00000-of-00001.jsonl", "SAT_test.jsonl", "test.jsonl", "test/0.jsonl", "test_2.jsonl"]),
        ("val", ["val-0.jsonl"]),
        ("testmini", ["testmini-00000-of-00001.jsonl"]),
        ("train", []),
    ],
)
def test_a_split_is_a_whole_word_of_a_files_name(tmp_path, split, names):
    there = ["data/test-00000-of-00001", "SAT_test", "test", "test/0", "test_2", "val-0", "testmini-00000-of-00001"]
    for name in (*there, "eval-0", "retest", "test_mini", "pretrain"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"q": "?", "a": f"{name}.jsonl"}) + "\n")
    mapping = Mapping("q", Answer("a"), split=split)
    if names:
        assert sorted(example.answer for example in load(mapping, tmp_path)) == sorted(names)
    else:
        message = fault(mapping, tmp_path)
        assert message.startswith(f"{tmp_path}: has no data file of the split 'train'; there are: ")


def test_a_key_that_a_json_row_lacks_is_an_empty_cell(tmp_path):
    (tmp_path / "red.png").write_bytes(png(RED))
    records = [{"q": "1", "a": "x"}, {"q": "2", "p": "red.png", "a": "y"}, {"q": "3"}]
    mapping = Mapping("q", Answer("a"), helpers=("p",))
    for path in (jsonl(tmp_path, *records), tmp_path / "data.json"):
        path.write_text(path.read_text() if path.suffix == ".jsonl" else json.dumps(records))
        examples = load(mapping, path)
        assert [len(next(examples).spans) for _ in range(2)] == [0, 1]
        with pytest.raises(MirageError, match=r"data\.json(l:3|\[2\]): a: is empty"):
            next(examples)
    none = jsonl(tmp_path, *({"q": "1", "a": "x"},) * 2)
    assert fault(mapping, none) == f"{none}: has no column 'p' (helpers[0]); there are: q, a"


@pytest.mark.parametrize("key", ["keep", "level"])
@pytest.mark.parametrize(
    "value", [datetime(2026, 1, 2), Decimal("0.5"), float("nan"), {"bytes": png(RED), "path": None}]
)
def test_what_meta_cannot_keep_is_named(tmp_path, key, value):
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_dict({"q": ["?"], "a": ["x"], "k": [value]}).to_parquet(str(path))
    mapping = Mapping("q", Answer("a"), **{key: ("k",) if key == "keep" else "k"})
    message = fault(mapping, path)
    assert message.startswith(f"{path}[0]: k: ") and "cannot be kept in meta" in message


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (["Paris, France", "Rome"], "'Paris, France, Rome' is wrong"),
        ("**", "no answer"),
        ("open {", r"\boxed{} is not closed"),
    ],
)
def test_a_row_whose_own_answer_would_be_wrong_is_named(tmp_path, answer, verdict):
    path = jsonl(tmp_path, {"q": "?", "a": "fine"}, {"q": "?", "a": answer})
    assert fault(Mapping("q", Answer("a")), path).startswith(
        f"{path}:2: a: the right answer would not count as right: {verdict}"
    )


def test_a_kept_column_that_takes_the_place_of_the_choices_is_named(tmp_path):
    path = jsonl(tmp_path, {"q": "?", "choices": ["x", "y"], "a": "A"})
    mapping = Mapping("q", Answer("a"), choices=Choices(column="choices"), keep=("choices",))
    assert fault(mapping, path).startswith(f'{path}:1: a: cannot score: "choices" in meta must be')


def test_lists_of_several_words(tmp_path):
    path = jsonl(tmp_path, {"q": "?", "a": ["upper left", "lower right"]})
    (example,) = load(Mapping("q", Answer("a")), path)
    assert example.answer == "upper left, lower right"
    assert score(example).correct


def test_base64_that_is_none_is_named(tmp_path):
    path = jsonl(tmp_path, {"q": "?", "p": "data:image/png;base64,abc", "a": "x"})
    assert fault(Mapping("q", Answer("a"), images=("p",)), path).startswith(f"{path}:1: p: is not base64: ")


def test_pictures_of_rows_can_be_pickled(tmp_path):
    path = jsonl(tmp_path, {"q": "?", "p": base64.b64encode(png(RED)).decode(), "a": "x"})
    (example,) = pickle.loads(pickle.dumps(list(load(Mapping("q", Answer("a"), images=("p",)), path))))
    assert shown(example) == [RED]


def test_rows_are_read_one_after_the_other(tmp_path):
    """A fault at the end is met only there."""
    path = jsonl(tmp_path, *ROWS[:3], {"q": "?", "a": None})
    examples = load(Mapping("q", Answer("a")), path)
    assert [next(examples).answer for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(MirageError, match=r"data\.jsonl:4: a: is empty"):
        next(examples)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": "?", "a": "x"}\n{"q": \n', "{path}:2: is not valid JSON"),
        ("a.jsonl", b'{"q": "?", "a": "x"}\n[1]\n', "{path}:2: must be an object, not '[1]'"),
        ("a.json", b'{"q": "?"}', "{path}: must be a list of objects"),
        ("a.csv", b"q,a\n?,x\n?,x,y\n", "{path}:3: has another number of cells than the 2 columns"),
        ("a.csv", b"q,a\n?\n", "{path}:2: has another number of cells than the 2 columns"),
        ("a.csv", b"", "{path}: has no column 'q' (question); there are: none"),
        ("a.parquet", b"PAR1", "{path}: cannot be read: "),
        ("a.txt", b"?", "{path}: is none of .parquet"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert fault(Mapping("q", Answer("a")), path).startswith(message.format(path=path))


def test_no_such_source(tmp_path):
    mapping = Mapping("q", Answer("a"))
    assert fault(mapping, tmp_path / "no.parquet").startswith(f"{tmp_path}/no.parquet: no such file or folder")
    assert fault(mapping, None) == "name a file, a folder or a dataset of the Hugging Face hub"
    assert fault(mapping, "owner/name") == "owner/name: name a split, with `split` in the mapping or --split"
    as_saved(tmp_path)
    assert fault(Mapping("q", Answer("a"), split="val"), tmp_path).endswith(
        "has no split 'val'; there are: test, train"
    )


def test_pictures_of_a_saved_dataset(tmp_path):
    colours = [RED, GREEN, BLUE]
    pictures = [PIL.Image.fromarray(np.full((4, 4, 3), colour, np.uint8)) for colour in colours]
    features = datasets.Features(
        {"q": datasets.Value("string"), "p": datasets.Image(), "a": datasets.ClassLabel(names=["cat", "dog"])}
    )
    datasets.Dataset.from_dict({"q": ["?"] * 3, "p": pictures, "a": [0, 1, 0]}, features=features).save_to_disk(
        str(tmp_path)
    )
    mapping = Mapping("q", Answer("a"), images=("p",))
    examples = list(load(mapping, tmp_path))
    assert [shown(example) for example in examples] == [[colour] for colour in colours]
    assert [example.answer for example in examples] == ["0", "1", "0"]


def test_the_hub(tmp_path, monkeypatch):
    """`datasets` is asked for the subset and the split; what it says of a fault is one line."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "owner/broken":
            raise RuntimeError("no\n  network")
        return datasets.Dataset.from_list(ROWS[:2])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    mapping = Mapping("q", Answer("a"), dataset="owner/name", split="val", config="x")
    assert len(list(load(mapping))) == 2
    assert len(list(load(mapping, "other/name"))) == 2
    assert asked == [("owner/name", "x", "val"), ("other/name", "x", "val")]
    assert fault(mapping, "owner/broken") == "owner/broken: cannot be loaded: no network"
