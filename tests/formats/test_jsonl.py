import json
from pathlib import Path

import pytest
from samples import chat_record, picture, reference_record, shape_of, varied, write_lines

from mirage_vlm import formats
from mirage_vlm.errors import MirageError
from mirage_vlm.formats import ImageFolder, from_record
from mirage_vlm.trajectory import (
    Image,
    Trajectory,
    user_turn,
)


def test_jsonl_round_trip(folder):
    before = varied(folder)
    assert formats.write_jsonl(folder / "data.jsonl", before) == len(before)
    after = formats.read_jsonl(folder / "data.jsonl")
    assert [shape_of(trajectory) for trajectory in after] == [shape_of(trajectory) for trajectory in before]
    assert "↑ up." in (folder / "data.jsonl").read_text(encoding="utf-8"), "people can read it"
    formats.write_jsonl(folder / "again.jsonl", after)
    assert (folder / "again.jsonl").read_bytes() == (folder / "data.jsonl").read_bytes()


def test_written_paths_hold_from_any_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    trajectory = from_record(chat_record(), base=Path())  # paths as seen from the working directory
    formats.write_jsonl("sub/data.jsonl", [trajectory])
    formats.write_jsonl("data.jsonl", [trajectory])
    monkeypatch.chdir("/")
    below = json.loads((folder / "data.jsonl").read_text())["messages"][0]["content"][0]["image"]
    elsewhere = json.loads((folder / "sub/data.jsonl").read_text())["messages"][0]["content"][0]["image"]
    assert below == "images/map.png" and elsewhere == str(folder / "images/map.png")
    for name in ("data.jsonl", "sub/data.jsonl"):
        assert len(formats.read_jsonl(folder / name)) == 1


def test_an_image_folder_saves_each_picture_once(folder):
    twice = Trajectory((user_turn(Image(picture("map")), Image(lambda: picture("map")), Image(picture("other"))),))
    source = ImageFolder(folder / "saved", folder)
    formats.write_jsonl(folder / "data.jsonl", [twice], image_source=source)
    names = [part["image"] for part in json.loads((folder / "data.jsonl").read_text())["messages"][0]["content"]]
    assert names[0] == names[1] != names[2]
    assert sorted(names[1:]) == sorted(f"saved/{path.name}" for path in (folder / "saved").iterdir())
    assert shape_of(formats.read_jsonl(folder / "data.jsonl")[0]) == shape_of(twice)


def test_reading_names_line_and_field_of_the_first_fault_and_counts_the_rest(folder):
    bad, worse = chat_record(), chat_record()
    del bad["messages"][1]["content"][1]["helper"]
    worse |= {"answer": {}, "meta": 2}
    path = write_lines(folder / "data.jsonl", chat_record(), bad, chat_record(), worse)
    with pytest.raises(MirageError) as error:
        formats.read_jsonl(path)
    message = str(error.value)
    assert message.startswith(f"{path}:2: messages[1].content[1].helper: is missing")
    assert message.endswith(f"(and 2 more faults); run `mirage data check {path}`") and "\n" not in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"messages": [', "is not valid JSON: Expecting value at column 15"),
        (b"\xff\xfe{}", "is not UTF-8 at byte 1"),
        (b'{"meta": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"null", "must be an object, not None"),
        (b"{}", "messages: is missing"),
    ],
)
def test_broken_lines_are_named(folder, line, message):
    path = folder / "data.jsonl"
    path.write_bytes(json.dumps(chat_record()).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(MirageError) as error:
        formats.read_jsonl(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


def test_byte_order_mark_blank_lines_carriage_returns_and_no_last_newline(folder):
    path = folder / "data.jsonl"
    line = json.dumps(chat_record()).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n \r\n" + line)
    assert len(formats.read_jsonl(path)) == 2


def test_files_that_hold_nothing(folder):
    with pytest.raises(MirageError, match=r"none\.jsonl: no such file"):
        formats.read_jsonl(folder / "none.jsonl")
    (folder / "empty.jsonl").write_text("\n \n")
    with pytest.raises(MirageError, match=r"empty\.jsonl: holds no examples"):
        formats.read_jsonl(folder / "empty.jsonl")
    with pytest.raises(MirageError, match="cannot be read: Is a directory"):
        formats.read_jsonl(folder)


def test_a_json_array_is_one_fault(folder):
    path = folder / "data.jsonl"
    path.write_text(json.dumps([chat_record(), chat_record()], indent=1))
    with pytest.raises(
        MirageError, match=r"data\.jsonl:1: the file is a JSON array.*one object a line(?!.*more fault)"
    ):
        formats.read_jsonl(path)


def test_plain_maps_are_left_to_the_given_reader(folder):
    path = write_lines(folder / "data.jsonl", {"level": 2, "id": 0, "map": ["SF", "FG"]}, chat_record())
    with pytest.raises(MirageError, match="plain VSP map"):
        formats.read_jsonl(path)

    def reader(record: dict) -> Trajectory:
        if record["level"] > 2:
            raise MirageError("level: too hard")
        return Trajectory((user_turn("/".join(record["map"])),))

    assert formats.read_jsonl(path, plain=reader)[0].messages == (user_turn("SF/FG"),)
    write_lines(path, {"level": 3, "map": []})
    with pytest.raises(MirageError, match=r"data\.jsonl:1: level: too hard"):
        formats.read_jsonl(path, plain=reader)


def failing(trajectory: Trajectory):
    yield trajectory
    raise RuntimeError("the writer stops here")


@pytest.mark.parametrize("write", [formats.write_jsonl, formats.write_reference])
def test_a_writer_that_stops_leaves_the_old_file(folder, write):
    path, before = folder / "data.jsonl", sorted(folder.rglob("*"))
    example = from_record(reference_record(), base=folder)
    with pytest.raises(RuntimeError):
        write(path, failing(example))
    assert sorted(folder.rglob("*")) == before, "nothing is left behind"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        write(path, failing(example))
    assert path.read_text() == "old" and sorted(folder.rglob("*")) == sorted([*before, path])


def test_the_old_file_is_there_until_the_new_one_is_complete(folder):
    path = folder / "data.jsonl"
    path.write_text("old")
    example = from_record(chat_record(), base=folder)

    def watching():
        for _ in range(3):
            yield example
            assert path.read_text() == "old"

    formats.write_jsonl(path, watching())
    assert len(path.read_text().splitlines()) == 3


def test_who_has_the_old_file_open_reads_it_to_its_end(folder):
    path = folder / "data.jsonl"
    path.write_text("old")
    with path.open() as reader:
        formats.write_jsonl(path, [from_record(chat_record(), base=folder)])
        assert reader.read() == "old"


def test_a_replacement_that_fails_leaves_the_old_file(folder, monkeypatch):
    def refuse(*paths: object):
        raise OSError("disk on fire")

    path = folder / "data.jsonl"
    path.write_text("old")
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(MirageError, match="disk on fire"):
        formats.write_jsonl(path, [from_record(chat_record(), base=folder)])
    assert path.read_text() == "old"
    with pytest.raises(MirageError, match="disk on fire"):
        formats.save_dataset_dir(folder / "set", [from_record(chat_record(), base=folder)])
    assert sorted(entry.name for entry in folder.iterdir()) == ["data.jsonl", "images"]


def test_a_picture_that_cannot_be_drawn_leaves_nothing(folder):
    def broken():
        raise ValueError("no ink")

    with pytest.raises(MirageError, match="no ink"):
        formats.write_jsonl(folder / "data.jsonl", [Trajectory((user_turn(Image(broken)),))])
    assert not (folder / "data.jsonl").exists()


def test_meta_that_is_not_json_is_an_error(folder):
    for meta in ({"x": {1, 2}}, {"x": float("nan")}):
        with pytest.raises(MirageError, match="example 1 is not JSON"):
            formats.write_jsonl(folder / "data.jsonl", [Trajectory((user_turn("?"),), meta=meta)])


def test_a_place_that_cannot_be_written_is_an_error(folder):
    with pytest.raises(MirageError, match=r"cannot write .*data\.jsonl"):
        formats.write_jsonl(folder / "images/notes.txt/data.jsonl", [])
