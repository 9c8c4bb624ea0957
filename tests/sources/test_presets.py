"""The mapped benchmarks, each against a small file of its true schema; pictures are of one colour, to tell them by."""

import base64
import csv
import io
import json
from collections import Counter

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.sources import load_preset, preset_names
from mirage_vlm.sources.known import FOLDER
from mirage_vlm.tasks import score
from mirage_vlm.trajectory import Text

RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)
IN_BOX = "Answer with the letter of the right choice in \\boxed{}."


def png(colour):
    content = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), colour).save(content, "PNG")
    return content.getvalue()


def stored(colour, name=None):
    return {"bytes": png(colour), "path": name}


def write_hub(path, columns, features=None):
    """A parquet file as `push_to_hub` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features and datasets.Features(features)).to_parquet(str(path))


def question(example):
    return "".join(s.text for s in example.messages[0].segments if isinstance(s, Text))


def colours(images):
    return [image.load().convert("RGB").getpixel((1, 1)) for image in images]


def shown(example):
    return colours(s for s in example.messages[0].segments if not isinstance(s, Text))


def helpers(example):
    return colours(span.helper for span in example.spans)


def answered(example, text):
    return score(example.with_response((Text(rf"\boxed{{{text}}}"),))).correct


def assert_gold(examples, wrong):
    """Every gold response is right, and `wrong` is not, nor are all letters at once."""
    for example, other in zip(examples, wrong, strict=True):
        assert score(example).correct
        assert answered(example, example.answer)
        assert not answered(example, other)
        assert not answered(example, "A, B, C, D")


def write_blink(folder):
    string, image = datasets.Value("string"), datasets.Image()
    write_hub(
        folder / "Jigsaw/val-00000-of-00001.parquet",
        {
            "idx": ["val_Jigsaw_1", "val_Jigsaw_2"],
            "question": ["Which fits?"] * 2,
            "sub_task": ["Jigsaw"] * 2,
            "image_1": [stored(RED)] * 2,
            "image_2": [stored(GREEN), stored(BLUE)],
            "image_3": [stored(BLUE), None],
            "image_4": [None, None],
            "choices": [["the second image", "the third image"]] * 2,
            "answer": ["(B)", "(A)"],
            "prompt": ["Which fits?\nSelect from the following choices.\n(A) the second image\n(B) the third image"]
            * 2,
            "explanation": [""] * 2,
        },
        {
            **dict.fromkeys(("idx", "question", "sub_task"), string),
            **{f"image_{i}": image for i in (1, 2, 3, 4)},
            "choices": datasets.List(string),
            **dict.fromkeys(("answer", "prompt", "explanation"), string),
        },
    )
    write_hub(folder / "Counting/val-00000-of-00001.parquet", {"other": [1]})


def test_blink(tmp_path):
    write_blink(tmp_path)
    first, second = load_preset("blink", tmp_path, config="Jigsaw")
    assert first.meta == {
        "id": "val_Jigsaw_1",
        "level": "Jigsaw",
        "choices": {"A": "the second image", "B": "the third image"},
        "letter": "B",
    }
    assert (shown(first), shown(second)) == ([RED, GREEN, BLUE], [RED, BLUE])
    assert question(first).count("(B) the third image") == 1
    assert question(first).endswith(IN_BOX)
    assert_gold([first, second], ["A", "B"])
    assert answered(first, "the third image")


def test_blink_needs_a_subset(tmp_path):
    write_blink(tmp_path)
    with pytest.raises(MirageError, match=r"name one of its subsets with --config: Art_Style, Counting, "):
        load_preset("blink", tmp_path)
    with pytest.raises(MirageError, match=r"there is no 'Puzzle'; choose from Art_Style"):
        load_preset("blink", tmp_path, config="Puzzle")
    with pytest.raises(MirageError, match=r"has no data file Jigsaw/test-\*\.parquet; there are: Counting/val-"):
        load_preset("blink", tmp_path, split="test", config="Jigsaw")


def write_sat(folder, n=40):
    """The true files keep a list of pictures as bytes, and the right answer first."""
    pictures = [[{"bytes": png(RED), "path": None}] + [{"bytes": png(GREEN), "path": None}] * (i % 2) for i in range(n)]
    write_hub(
        folder / "SAT_test.parquet",
        {
            "image_bytes": pictures,
            "question": [f"How did the camera move in {i}?" for i in range(n)],
            "answers": [[f"left {i}", f"right {i}"] for i in range(n)],
            "question_type": ["ego_movement"] * n,
            "correct_answer": [f"left {i}" for i in range(n)],
        },
        {
            "image_bytes": datasets.List(datasets.Image()),
            "question": datasets.Value("string"),
            "answers": datasets.List(datasets.Value("string")),
            "question_type": datasets.Value("string"),
            "correct_answer": datasets.Value("string"),
        },
    )


def test_sat(tmp_path):
    write_sat(tmp_path)
    examples = list(load_preset("sat", tmp_path))
    for i, example in enumerate(examples):
        assert example.meta["choices"][example.meta["letter"]] == f"left {i}"
        assert sorted(example.meta["choices"].values()) == [f"left {i}", f"right {i}"]
        assert f"({example.answer}) left {i}\n" in question(example)
        assert shown(example) == [RED, GREEN][: 1 + i % 2]
    assert_gold(examples, ["AB".replace(example.answer, "") for example in examples])
    letters = Counter(example.answer for example in examples)
    assert min(letters["A"], letters["B"]) > 10  # not always the first, as in the files
    assert [e.answer for e in load_preset("sat", tmp_path)] == [e.answer for e in examples]


def test_sat_with_bare_bytes(tmp_path):
    table = pa.table(
        {
            "image_bytes": [[png(BLUE)]],
            "question": ["Which?"],
            "answers": [["a", "b"]],
            "question_type": ["x"],
            "correct_answer": ["a"],
        }
    )
    pq.write_table(table, tmp_path / "SAT_test.parquet")
    (example,) = load_preset("sat", tmp_path)
    assert shown(example) == [BLUE]


def test_comt(tmp_path):
    (tmp_path / "images_comt/creation").mkdir(parents=True)
    for name, colour in (("0.png", RED), ("1.png", GREEN), ("2.png", BLUE)):
        (tmp_path / "images_comt/creation" / name).write_bytes(png(colour))
    record = {
        "text_input": "Which is the angle?\n(A) 30 (B) 60",
        "image_input": "images_comt/creation/0.png",
        "sequence_plan": [
            {"type": "text", "content": "Draw a line."},
            {"type": "latent", "helper_image": "images_comt/creation/1.png"},
            {"type": "text", "content": "And another."},
            {"type": "latent", "helper_image": "images_comt/creation/2.png"},
        ],
        "original_final_answer": "B",
    }
    (tmp_path / "TEST.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "TRAIN.jsonl").write_text(json.dumps(record | {"original_final_answer": "A"}) + "\n")
    (example,) = load_preset("comt", tmp_path)
    assert (shown(example), helpers(example), example.answer) == ([RED], [GREEN, BLUE], "B")
    assert_gold([example], ["A"])
    assert [e.answer for e in load_preset("comt", tmp_path, split="TRAIN")] == ["A"]


def test_vstar(tmp_path):
    (tmp_path / "direct_attributes").mkdir()
    (tmp_path / "direct_attributes/sa_4690.jpg").write_bytes(png(RED))
    text = (
        "What is the color of the glove?\n(A) rubber\n(B) cotton (old)\n(C) kevlar\n(D) leather\n"
        "Answer with the option's letter from the given choices directly."
    )
    record = {
        "image": "direct_attributes/sa_4690.jpg",
        "text": text,
        "category": "direct_attributes",
        "label": "B",
        "question_id": "0",
    }
    (tmp_path / "test_questions.jsonl").write_text(json.dumps(record) + "\n")
    (example,) = load_preset("vstar", tmp_path)
    assert example.meta["choices"] == {"A": "rubber", "B": "cotton (old)", "C": "kevlar", "D": "leather"}
    assert example.meta["level"] == "direct_attributes"
    assert "directly" not in question(example)
    assert question(example).count("kevlar") == 1
    assert shown(example) == [RED]
    assert_gold([example], ["C"])


def write_mmvp(folder, rows, name="lndex"):
    (folder / "MMVP Images").mkdir()
    with (folder / "Questions.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([[name, "Question", "Options", "Correct Answer"], *rows])
    for i, colour in zip(range(1, len(rows) + 1), (RED, GREEN), strict=False):
        (folder / f"MMVP Images/{i}.jpg").write_bytes(png(colour))


def test_mmvp(tmp_path):
    butterfly = "Are the butterfly's wings closer to being open or closed?"
    write_mmvp(
        tmp_path, [["1", butterfly, "(a) Open (b) Closed", "(a)"], ["2", butterfly, "(a) Open (b) Closed", "(b)"]]
    )
    examples = list(load_preset("mmvp", tmp_path))
    assert [shown(example) for example in examples] == [[RED], [GREEN]]
    assert [example.meta["letter"] for example in examples] == ["A", "B"]
    assert examples[0].meta["choices"] == {"A": "Open", "B": "Closed"}
    assert question(examples[0]) == f"{butterfly} (a) Open (b) Closed\n{IN_BOX}"
    assert_gold(examples, ["B", "A"])
    assert answered(examples[1], "(b) closed")


@pytest.mark.parametrize("size", ["4k", "8k"])
def test_hrbench(tmp_path, size):
    write_hub(
        tmp_path / f"hr_bench_{size}.parquet",
        {
            "index": [0, 1],
            "question": ["What is the colour?"] * 2,
            "answer": ["A", "D"],
            "category": ["single", "cross"],
            "A": ["red", "1"],
            "B": ["blue", "2"],
            "C": ["green", "3"],
            "D": ["black", "4"],
            "cycle_category": ["cycle_0", "cycle_3"],
            "image": [base64.b64encode(png(RED)).decode(), base64.b64encode(png(BLUE)).decode()],
        },
    )
    first, second = load_preset(f"hrbench-{size}", tmp_path)
    assert (shown(first), shown(second)) == ([RED], [BLUE])
    assert second.meta["cycle_category"] == "cycle_3"
    assert second.meta["choices"] == {"A": "1", "B": "2", "C": "3", "D": "4"}
    assert "\n(A) red\n(B) blue\n(C) green\n(D) black\n" in question(first)
    assert_gold([first, second], ["B", "1"])


def test_visualpuzzles(tmp_path):
    string = datasets.Value("string")
    write_hub(
        tmp_path / "data/train-00000-of-00001.parquet",
        {
            "id": [7, 8],
            "category": ["Algorithmic", "Spatial"],
            "image": [stored(RED), stored(GREEN)],
            "question": ["How many?", "Which comes next?"],
            "options": [["1", "2", "3", "4"], None],
            "answer": ["C", "D"],
        },
        {
            "id": datasets.Value("int64"),
            "category": string,
            "image": datasets.Image(),
            "question": string,
            "options": datasets.List(string),
            "answer": string,
        },
    )
    first, second = load_preset("visualpuzzles", tmp_path)
    assert first.meta["choices"] == {"A": "1", "B": "2", "C": "3", "D": "4"}
    assert second.meta["choices"] == dict.fromkeys("ABCD", "")
    assert "The choices A, B, C, D are in the picture." in question(second)
    assert_gold([first, second], ["4", "A"])
    assert answered(first, "3")  # the text of C


def test_hyperphantasia(tmp_path):
    string, image = datasets.Value("string"), datasets.Image()
    write_hub(
        tmp_path / "data/easy-00000-of-00001.parquet",
        {
            "ID": ["seven_0", "connect_0"],
            "Question": ["Which digits?", "Which letter?"],
            "Image_file": [stored(RED), stored(GREEN)],
            "Pseudo_solution_file": [stored(BLUE), stored(RED)],
            "Answer": ["012", "B"],
            "Category": ["seven_segments", "connect_the_dots"],
            "Difficulty": ["easy"] * 2,
        },
        {
            "ID": string,
            "Question": string,
            "Image_file": image,
            "Pseudo_solution_file": image,
            "Answer": string,
            "Category": string,
            "Difficulty": string,
        },
    )
    first, second = load_preset("hyperphantasia", tmp_path)
    assert (shown(first), helpers(first)) == ([RED], [BLUE])
    assert second.meta == {"id": "connect_0", "level": "connect_the_dots", "Difficulty": "easy", "answer": "B"}
    assert_gold([first, second], ["12", "C"])


def test_every_mapping_that_is_shipped_can_be_read_and_is_tested():
    here = {path.stem for path in FOLDER.glob("*.yaml")}
    assert here <= set(preset_names())
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {name.partition("-")[0] for name in here} <= tested


@pytest.mark.parametrize("name", ["comt", "vstar", "mmvp"])
def test_what_is_not_a_dataset_by_itself_is_to_be_downloaded(name):
    with pytest.raises(MirageError, match=r"download them \(`hf download \S+/\S+ --repo-type dataset --local-dir \w+`"):
        load_preset(name)


def test_there_is_no_such_preset():
    with pytest.raises(MirageError, match="there is no preset 'blonk'; choose from blink, comt"):
        load_preset("blonk", "x")


def test_a_wrong_schema_names_the_column_and_those_that_there_are(tmp_path):
    write_hub(tmp_path / "hr_bench_4k.parquet", {"index": [0], "query": ["What?"], "A": ["x"], "image": ["y"]})
    with pytest.raises(MirageError) as caught:
        load_preset("hrbench-4k", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/hr_bench_4k.parquet: has no column 'question' (question); there are: index, query, A, image"
    )


def test_a_bad_row_is_named(tmp_path):
    write_mmvp(tmp_path, [["1", "Open?", "(a) Open (b) Closed", "(a)"], ["2", "Open?", "(a) Open (b) Closed", "(c)"]])
    examples = load_preset("mmvp", tmp_path)
    next(examples)
    with pytest.raises(MirageError) as caught:
        next(examples)
    assert str(caught.value) == (f"{tmp_path}/Questions.csv:3: Correct Answer: '(c)' is none of the letters (A, B)")
