import json
import pickle

import pytest
from samples import COLOURS, chat_record, picture, reference_record, shape_of, varied

from mirage_vlm import formats
from mirage_vlm.errors import MirageError
from mirage_vlm.formats import from_record
from mirage_vlm.trajectory import (
    Image,
    Trajectory,
    user_turn,
)


def test_dataset_round_trip_in_memory(folder):
    before = varied(folder)
    after = formats.from_dataset(formats.to_dataset(before))
    assert [shape_of(trajectory) for trajectory in after] == [shape_of(trajectory) for trajectory in before]


def test_dataset_folder_round_trip_holds_its_pictures(folder):
    before = varied(folder)
    expected = [shape_of(trajectory) for trajectory in before]
    assert formats.save_dataset_dir(folder / "set", before) == len(before)
    for path in (folder / "images").iterdir():
        path.unlink()
    after = formats.load_dataset_dir(folder / "set", check_files=True)
    assert [shape_of(trajectory) for trajectory in after] == expected
    assert [shape_of(trajectory) for trajectory in pickle.loads(pickle.dumps(after))] == expected
    again = formats.from_dataset(formats.to_dataset(after))
    assert [shape_of(trajectory) for trajectory in again] == expected


def test_reading_a_dataset_folder_writes_nothing_into_it(folder):
    formats.save_dataset_dir(folder / "set", varied(folder))
    before = sorted((folder / "set").iterdir())
    for trajectory in formats.load_dataset_dir(folder / "set", check_files=True):
        shape_of(trajectory)
    assert sorted((folder / "set").iterdir()) == before
    assert sorted(path.name for path in folder.iterdir()) == ["images", "set"]


def test_a_dataset_has_the_columns_of_trl(folder):
    row = formats.to_dataset([from_record(chat_record(), base=folder)])[0]
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
    assert [image.convert("RGB").getpixel((0, 0)) for image in row["images"]] == [COLOURS["map"]]
    assert [image.convert("RGB").getpixel((0, 0)) for image in row["helpers"]] == [COLOURS["helper"]]
    assert json.loads(row["meta"]) == chat_record()["meta"]


def test_selected_rows_keep_their_own_pictures(folder):
    """Rows of a selection are numbered anew."""
    dataset = formats.to_dataset([Trajectory((user_turn(Image(picture(name))),)) for name in COLOURS])
    (trajectory,) = formats.from_dataset(dataset.select([2]))
    assert next(trajectory.images()).load().getpixel((0, 0)) == list(COLOURS.values())[2]


def test_a_dataset_in_the_reference_form(folder):
    import datasets

    content = (folder / "images/helper.png").read_bytes()
    features = datasets.Features(
        {
            "text_input": datasets.Value("string"),
            "text_output": datasets.Value("string"),
            "image_input": [datasets.Image()],
            "image_output": datasets.Image(),
        }
    )
    row = reference_record(image_input=[str(folder / "images/map.png")], image_output={"bytes": content, "path": None})
    (trajectory,) = formats.from_dataset(datasets.Dataset.from_list([row], features=features))
    assert shape_of(trajectory) == shape_of(from_record(reference_record(), base=folder))


def test_dataset_faults_name_the_row(folder):
    import datasets

    rows = [
        {"messages": [{"role": "user", "content": "?"}], "meta": '{"id": 1}'},
        {"messages": [{"role": "robot", "content": "?"}], "meta": "no json"},
    ]
    with pytest.raises(MirageError, match=r"the dataset\[1\]: messages\[0\]\.role: .*'robot' \(and 1 more fault\)$"):
        formats.from_dataset(datasets.Dataset.from_list(rows))
    (trajectory,) = formats.from_dataset(datasets.Dataset.from_list(rows[:1]))
    assert trajectory.meta == {"id": 1}


def test_folders_that_are_no_dataset(folder):
    import datasets

    with pytest.raises(MirageError, match="holds no dataset"):
        formats.load_dataset_dir(folder)
    datasets.DatasetDict(train=formats.to_dataset(varied(folder))).save_to_disk(str(folder / "splits"))
    with pytest.raises(MirageError, match=r"several splits.*splits/train"):
        formats.load_dataset_dir(folder / "splits")
    assert len(formats.load_dataset_dir(folder / "splits/train")) == 5
    next((folder / "splits/train").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(MirageError, match="cannot be read as a dataset"):
        formats.load_dataset_dir(folder / "splits/train")


def test_a_dataset_folder_is_whole_or_absent(folder):
    before = sorted(folder.iterdir())
    missing = Trajectory((user_turn(Image(folder / "images/no.png")),))
    with pytest.raises(MirageError, match="cannot write"):
        formats.save_dataset_dir(folder / "set", [missing])
    assert sorted(folder.iterdir()) == before
    formats.save_dataset_dir(folder / "set", varied(folder))
    with pytest.raises(MirageError, match="exists already"):
        formats.save_dataset_dir(folder / "set", varied(folder))


def test_read_data_takes_files_and_folders(folder):
    formats.write_jsonl(folder / "data.jsonl", varied(folder))
    formats.save_dataset_dir(folder / "set", varied(folder))
    one, other = (formats.read_data(folder / name) for name in ("data.jsonl", "set"))
    assert [shape_of(trajectory) for trajectory in one] == [shape_of(trajectory) for trajectory in other]
