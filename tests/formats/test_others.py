"""Files as others write them: ShareGPT and LLaVA, TRL, ms-swift, ILVR, and prompts of the reference implementation."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from samples import chat_record, picture, reference_record, shape_of, write_lines

from mirage_vlm import formats
from mirage_vlm.errors import MirageError
from mirage_vlm.formats import faults, from_record
from mirage_vlm.tasks import score
from mirage_vlm.trajectory import Image, LatentSpan, Text, Trajectory, assistant_turn, user_turn

CASES = Path(__file__).parent.parent / "data" / "cases"


def read(record: dict, folder: Path) -> list:
    """The turns of a record as (role, parts), pictures as the name of their file."""
    assert list(faults(record, base=folder)) == []

    def plain(segment):
        if isinstance(segment, Text):
            return segment.text
        source = segment.helper.source if isinstance(segment, LatentSpan) else segment.source
        return (type(segment).__name__, source.name)

    return [(m.role, [plain(s) for s in m.segments]) for m in from_record(record, base=folder).messages]


MAP, OTHER, HELPER = ("Image", "map.png"), ("Image", "other.png"), ("LatentSpan", "helper.png")


def says(*turns: tuple[str, str], **more: object) -> dict:
    return {"conversations": [{"from": by, "value": text} for by, text in turns], **more}


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (
            says(("human", "<image>\nWhich?"), ("gpt", "A"), image="images/map.png", id="0"),
            [("user", [MAP, "Which?"]), ("assistant", ["A"])],
        ),
        (
            says(("human", "Which?\n<image>"), ("gpt", "A"), images=["images/map.png"]),
            [("user", ["Which?", MAP]), ("assistant", ["A"])],
        ),
        (
            says(("human", "a<image>b<image>c"), ("gpt", "A"), image=["images/map.png", "images/other.png"]),
            [("user", ["a", MAP, "b", OTHER, "c"]), ("assistant", ["A"])],
        ),
        (
            says(("human", "<image>1"), ("gpt", "A"), ("human", "<image>2"), ("gpt", "B"))
            | {"images": ["images/map.png", "images/other.png"]},
            [("user", [MAP, "1"]), ("assistant", ["A"]), ("user", [OTHER, "2"]), ("assistant", ["B"])],
        ),
        (
            says(("human", "no mark"), ("gpt", "A"), image="images/map.png"),
            [("user", [MAP, "no mark"]), ("assistant", ["A"])],
        ),
        (says(("human", "text alone"), ("gpt", "A")), [("user", ["text alone"]), ("assistant", ["A"])]),
        (
            says(("human", "q"), ("gpt", "A"), system="Be brief."),
            [("system", ["Be brief."]), ("user", ["q"]), ("assistant", ["A"])],
        ),
        (
            says(("system", "s"), ("user", "q"), ("assistant", "say <image>"), system=""),
            [("system", ["s"]), ("user", ["q"]), ("assistant", ["say <image>"])],
        ),
        (
            {"conversations": [{"role": "user", "content": "q"}, {"from": "gpt", "text": "A"}]},
            [("user", ["q"]), ("assistant", ["A"])],
        ),
        (  # ms-swift, LLaMA-Factory
            {"messages": [{"role": "user", "content": "<image>q"}], "images": ["images/map.png"]},
            [("user", [MAP, "q"])],
        ),
        ({"prompt": "q", "completion": "A"}, [("user", ["q"]), ("assistant", ["A"])]),
        ({"prompt": "q"}, [("user", ["q"])]),
        ({"prompt": "q", "messages": None, "conversations": None}, [("user", ["q"])]),
        (
            {"prompt": "q", "completion": "A", "images": ["images/map.png"]},
            [("user", [MAP, "q"]), ("assistant", ["A"])],
        ),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "A"}],
                "images": ["images/map.png"],
            },
            [("system", ["s"]), ("user", [MAP, "q"]), ("assistant", ["A"])],
        ),
        (
            {
                "prompt": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image"}, {"type": "image"}]}
                ],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": "A"}]}],
                "images": ["images/map.png", "images/other.png"],
            },
            [("user", ["q", MAP, OTHER]), ("assistant", ["A"])],
        ),
        (
            {
                "prompt": "q",
                "completion": [
                    {
                        "role": "assistant",
                        "content": [{"type": "latent", "helper": "images/helper.png"}, {"type": "text", "text": "A"}],
                    }
                ],
            },
            [("user", ["q"]), ("assistant", [HELPER, "A"])],
        ),
        (  # ILVR
            {
                "text_input": "q",
                "image_input": "images/map.png",
                "sequence_plan": [
                    {"type": "text", "content": "first"},
                    {"type": "latent", "helper_image": "images/helper.png"},
                    {"type": "text", "content": "then"},
                    {"type": "latent", "helper_image": "images/helper.png"},
                ],
            },
            [("user", [MAP, "q"]), ("assistant", ["first", HELPER, "then", HELPER])],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "images/map.png"}]}]},
            [("user", [MAP])],
        ),
    ],
)
def test_read(folder, record, turns):
    assert read(record, folder) == turns


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        (says(), "conversations", "at least one turn"),
        ({"conversations": "q"}, "conversations", "must be a list"),
        (says(("human", "<image><image>"), image="images/map.png"), "image", "lists 1 for 2 places"),
        (says(("human", "<image>"), images=["images/map.png"] * 2), "images", "lists 2 for 1 place"),
        (says(("human", "<image>"), images=[]), "image", "is missing, but the user's texts mark 1"),
        (says(("human", "<image>")), "image", "is missing, but the user's texts mark 1"),
        (says(("human", "<image>"), image="images/no.png"), "image", "no such file"),
        (says(("human", "<image>"), image=["images/no.png"]), "image[0]", "no such file"),
        (says(("human", "q"), image="x", images=["y"]), "image", "beside `images`"),
        (says(("tool", "q")), "conversations[0].from", "not 'tool'"),
        (says(("human", 3)), "conversations[0].value", "is 3"),
        (says(("human", None)), "conversations[0].value", "is missing"),
        (says(("human", "q"), ("human", "r")), "conversations[1].from", "another user turn"),
        (says(("gpt", "A")), "conversations[0].from", "must follow a user turn"),
        (says(("human", "q"), system=3), "system", "must be a string"),
        ({"conversations": [["human", "q"]]}, "conversations[0]", "must be an object"),
        ({"prompt": "q", "chosen": "A", "rejected": "B"}, "chosen", "preference pair"),
        ({"prompt": "q", "completion": 4}, "completion", "must be a text"),
        ({"completion": "A"}, "prompt", "must be a text"),
        ({"prompt": []}, "prompt", "at least one message"),
        ({"prompt": [{"role": "user", "content": 4}]}, "prompt[0].content", "is 4"),
        ({"prompt": "q", "completion": [{"role": "user", "content": "A"}]}, "completion[0].role", "another user turn"),
        (reference_record(text_input="<image><image>"), "text_input", "marks 2 pictures"),
        (reference_record(map_desc=[[0, 3]]), "map_desc[0][1]", "must be one of -1 (hole)"),
        (reference_record(map_desc=[[0, True]]), "map_desc[0][1]", "must be one of"),
        (reference_record(map_desc="SF"), "map_desc", "list of rows"),
        (reference_record(map_desc=[3]), "map_desc[0]", "row of letters"),
        (reference_record(sequence_plan=[{"type": "text", "content": "x"}]), "text_output", "beside `sequence_plan`"),
        ({"text_input": "q", "image_input": [], "sequence_plan": []}, "sequence_plan", "at least one step"),
        (
            {"text_input": "q", "image_input": [], "sequence_plan": [{"type": "image"}]},
            "sequence_plan[0].type",
            "text or latent",
        ),
        (
            {"text_input": "q", "image_input": [], "sequence_plan": [{"type": "latent"}]},
            "sequence_plan[0].helper_image",
            "is missing",
        ),
        ({"question": "q"}, "messages", "is missing; an example has `messages`, `conversations`, `prompt`"),
    ],
)
def test_faults_have_the_names_of_the_file(folder, record, field, message):
    found = list(faults(record, base=folder))
    assert found[0].field == field and message in found[0].message, found


def test_a_prompt_of_the_reference_is_scored_by_its_map():
    (example,) = formats.read_jsonl(CASES / "reference-test.jsonl")
    assert example.response == () and example.task == "vsp-planning"
    first, image, last = example.messages[0].segments
    assert (
        isinstance(image, Image) and first.text.endswith("Here is the map: ") and last.text.startswith("Put the plan")
    )
    assert example.meta["map"] == ["HFFH", "FHFH", "FHSF", "FFFG"]

    def scored(text: str):
        return score(example.with_response((Text(text),)))

    assert scored(r"\boxed{R,D}").correct and scored("<answer>D R</answer>").optimal
    assert not scored(r"\boxed{U,L}").correct and not scored("no plan").valid


@pytest.mark.parametrize("outputs", [{}, {"text_output": "", "image_output": []}, {"text_output": None}])
def test_outputs_that_are_absent_or_empty_make_a_prompt(folder, outputs):
    record = {"text_input": "q", "image_input": "images/map.png", "map_desc": [["S", "F"], ["F", "G"]], **outputs}
    assert list(faults(record, base=folder)) == []
    example = from_record(record, base=folder)
    assert (example.response, example.task, example.meta["map"]) == ((), "vsp-planning", ["SF", "FG"])
    assert from_record(record | {"answer": "A"}, base=folder).task is None
    assert from_record(record | {"task": "t"}, base=folder).task == "t"


def test_the_case_of_conversations_is_read():
    (example,) = formats.read_jsonl(CASES / "conversations.jsonl")
    image, question = example.messages[0].segments
    assert isinstance(image, Image) and question == Text("Which letter?")
    assert example.text == r"\boxed{A}" and example.where == f"{CASES / 'conversations.jsonl'}:1"


def test_gzip_is_known_by_its_content(tmp_path):
    packed = CASES / "train.jsonl.gz"
    for name in ("a.jsonl.gz", "a.jsonl"):
        shutil.copy(packed, tmp_path / name)
        shutil.copy(CASES / "map.png", tmp_path / "map.png")
        examples = formats.read_data(tmp_path / name)
        assert len(examples) >= 1 and examples[0].where == f"{tmp_path / name}:1"
    whole = packed.read_bytes()
    for broken in (whole[:-20], whole[:40] + b"\0\0\0\0" + whole[44:]):
        (tmp_path / "broken.jsonl").write_bytes(broken)
        with pytest.raises(MirageError, match="gzip file is damaged or incomplete"):
            formats.read_data(tmp_path / "broken.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"messages": []}\n'.encode("utf-16"), "is UTF-16"),
        (b"PK\x03\x04rest", "is a zip file"),
        (b"\x28\xb5\x2f\xfdrest", "zstd"),
        (b"PAR1rest", "Parquet"),
        (gzip.compress(gzip.compress(b"{}\n", mtime=0), mtime=0), "gzip within gzip"),
        (b"\n\n[\n{}\n]\n", "JSON array"),
        ('{"messages": []}\n'.encode("utf-16-le"), "NUL byte"),
        (b'{"messages": [{"ro', "the file ends within this line"),
        (b'{"answer": 1, "answer": 2}\n', "answer: is there twice"),
        (b'{"messages": [{"role": "user", "role": "user"}]}\n', "role: is there twice"),
        (b'{"meta": {"x": 1e999}}\n', "1e999 is too large"),
        (b'{"meta": {"x": Infinity}}\n', "Infinity is not a JSON number"),
        (b'{"meta": {"x": NaN}}\n', "NaN is not a JSON number"),
        (b'{"meta": {"x": ' + b"9" * 5000 + b"}}\n", "5,000 digits"),
        (b'{"meta": ' + b"[" * 150 + b"]" * 150 + b"}\n", "nested too deeply"),
        (b'{"meta": ' + b"[" * 200000 + b"\n", "nested too deeply"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_what_is_no_jsonl_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(MirageError) as error:
        formats.read_data(path)
    assert message in str(error.value) and str(error.value).startswith(f"{path}:") and "\n" not in str(error.value)


def test_line_ends_and_blank_lines(folder):
    line = json.dumps(chat_record()).encode()
    (folder / "data.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + line + b"\r\n\r\n" + line)
    assert [example.where for example in formats.read_jsonl(folder / "data.jsonl")] == [
        f"{folder / 'data.jsonl'}:{number}" for number in (2, 4)
    ]


def test_a_device_is_no_data_file():
    with pytest.raises(MirageError, match="is a device"):
        formats.read_data("/dev/zero")


@pytest.mark.parametrize(
    ("value", "answer", "written"),
    [
        (5, "5", "5"),
        (0.5, "0.5", "0.5"),
        (True, "true", "true"),
        (["A"], "A", "A"),
        (["A", 7], ("A", "7"), ["A", "7"]),
        (None, None, None),
    ],
)
def test_answers_of_all_kinds_survive(folder, value, answer, written):
    example = from_record(chat_record() | {"answer": value}, base=folder)
    assert example.answer == answer and formats.to_record(example).get("answer") == written
    assert formats.from_dataset(formats.to_dataset([example, example]))[1].answer == answer
    formats.write_jsonl(folder / "copy.jsonl", [example])
    assert formats.read_jsonl(folder / "copy.jsonl")[0].answer == answer
    assert from_record(reference_record(answer=value), base=folder).answer == answer


def test_all_of_them_are_written_in_our_own_form(folder):
    records = [
        says(("human", "<image>\nq"), ("gpt", "A"), image="images/map.png"),
        {"prompt": "q", "completion": "A", "answer": ["A", "B"]},
        {"text_input": "q<image>", "image_input": "images/map.png", "map_desc": [[1, 2], [0, -1]]},
        {"text_input": "q", "image_input": [], "sequence_plan": [{"type": "latent", "helper_image": "images/map.png"}]},
    ]
    first = formats.read_jsonl(write_lines(folder / "data.jsonl", *records))
    formats.write_jsonl(folder / "own.jsonl", first)
    assert [shape_of(a) for a in formats.read_jsonl(folder / "own.jsonl")] == [shape_of(a) for a in first]
    dataset = formats.from_dataset(formats.to_dataset(first))
    assert [shape_of(a)[0] for a in dataset] == [shape_of(a)[0] for a in first]


def test_a_question_that_would_be_read_as_a_picture_is_not_written(folder):
    example = Trajectory((user_turn(Image(picture("map")), "what is <image>?"), assistant_turn("A")))
    with pytest.raises(MirageError, match="reads '<image>' in a question"):
        formats.write_reference(folder / "x.jsonl", [example])


def test_the_place_is_kept_and_is_no_part_of_what_is_said(folder):
    path = write_lines(folder / "data.jsonl", chat_record(), chat_record())
    one, two = formats.read_jsonl(path)
    assert (one.where, two.where) == (f"{path}:1", f"{path}:2")
    assert one.with_response(()).where == one.where
    bare = Trajectory((user_turn("q"),), where="a:1")
    assert bare == Trajectory((user_turn("q"),)) and formats.to_record(bare) == formats.to_record(
        Trajectory((user_turn("q"),))
    )
