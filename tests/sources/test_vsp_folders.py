"""The VSP repository's folders, made here as its files are; answers against the boards by hand."""

import PIL.Image
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.sources import load_preset
from mirage_vlm.sources.blocks import BLOCKS, stacks_of
from mirage_vlm.tasks import score
from mirage_vlm.trajectory import Text

# the elf at row 1, column 3; the gift at row 3, column 1
TABLE = """| | Col 1 | Col 2 | Col 3 |
| Row 1 | # | _ | @ |
| Row 2 | _ | _ | # |
| Row 3 | * | _ | _ |
"""
OTHER = TABLE.replace("| Row 2 | _ |", "| Row 2 | # |")


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (8, 8), "white").save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def maze(folder, task, texts, level="level3", number=0):
    place = folder / "VSP-main/maze" / task / "maps" / level
    picture(place / f"img/{number}.png")
    for name, text in texts.items():
        write(place / name / f"{number}.txt", text)
    return place


def question(example):
    return "".join(s.text for s in example.messages[0].segments if isinstance(s, Text))


def pictures(example):
    return [s for s in example.messages[0].segments if not isinstance(s, Text)]


def correct(example, text):
    return score(example.with_response((Text(rf"\boxed{{{text}}}"),))).correct


def test_a_plan(tmp_path):
    maze(tmp_path, "task-main", {"table": TABLE})
    maze(tmp_path, "task-main", {"table": TABLE}, "level10", 2)
    (tmp_path / "VSP-main/maze/task-main/maps/notes").mkdir()
    first, second = load_preset("vsp-maze-main", tmp_path)
    assert first.task == "vsp-planning"
    assert first.meta["map"] == ["HFS", "FFH", "GFF"]
    assert (first.meta["id"], first.meta["level"]) == ("level3/0", 3)
    assert (second.meta["id"], second.meta["level"]) == ("level10/2", 10)
    (shown,) = pictures(first)
    assert shown.source == tmp_path / "VSP-main/maze/task-main/maps/level3/img/0.png"
    assert score(first).correct
    assert len(first.spans) == 1
    assert correct(first, "L,D,D,L")
    assert not correct(first, "D,D,L,L")  # into the hole


def test_where_a_hole_is(tmp_path):
    for number, answer in ((0, "Y\n"), (1, "N")):
        maze(tmp_path, "task1", {"question": "Is there a hole in row 1, column 1?", "answer": answer}, number=number)
    yes, no = load_preset("vsp-maze-1", tmp_path)
    assert question(yes).splitlines()[:3] == ["Is there a hole in row 1, column 1?", "(A) Yes", "(B) No"]
    for example, right, wrong in ((yes, "A", "B"), (no, "B", "A"), (yes, "yes", "no"), (no, "No", "Yes")):
        assert score(example).correct
        assert correct(example, right)
        assert not correct(example, wrong)
    assert not correct(yes, "Yes or no")


@pytest.mark.parametrize(
    ("table", "sides"),
    [
        (TABLE, ["above", "right"]),
        ("| | Col 1 | Col 2 |\n| Row 1 | @ | * |\n| Row 2 | _ | _ |\n", ["left"]),
        ("| | Col 1 | Col 2 |\n| Row 1 | * | # |\n| Row 2 | @ | _ |\n", ["below"]),
    ],
)
def test_where_the_elf_is(tmp_path, table, sides):
    maze(tmp_path, "task2", {"table": table})
    (example,) = load_preset("vsp-maze-2", tmp_path)
    assert example.meta["answer"] == sides
    assert score(example).correct
    assert correct(example, " and ".join(reversed(sides)))
    assert not correct(example, "above, below, left, right")
    assert len(sides) == 1 or not correct(example, sides[0])


def test_which_maze_it_is(tmp_path):
    text = f"(A)\n{OTHER}\n(B)\n{TABLE}\n"
    maze(tmp_path, "task3", {"question": text, "answer": "B\n1"})
    (example,) = load_preset("vsp-maze-3", tmp_path)
    assert example.meta["choices"] == {"A": OTHER.strip(), "B": TABLE.strip()}
    assert question(example).count("| Row 2 |") == 2
    assert score(example).correct
    assert correct(example, "B")
    assert not correct(example, "A")


def test_whether_a_plan_is_safe(tmp_path):
    maze(tmp_path, "task4", {"question": "LDR", "answer": "N"}, "level_step3")
    maze(tmp_path, "task4", {"question": "L", "answer": "Y"}, "level_step1")
    first, second = load_preset("vsp-maze-4", tmp_path)
    assert [example.meta["level"] for example in (first, second)] == [1, 3]
    assert "The elf moves L,D,R." in question(second)
    assert correct(second, "B")
    assert not correct(second, "A")
    assert correct(first, "Yes")


@pytest.mark.parametrize(
    ("task", "texts", "message"),
    [
        ("task-main", {"table": TABLE.replace("#", "X")}, "table (0): 'X' is no tile; there are @, *, #, _"),
        ("task-main", {"table": TABLE.replace("@", "_")}, "table (0): "),
        ("task-main", {"table": TABLE.replace("| _ | _ | # |", "| # | # | # |")}, "table (0): map: no safe path leads"),
        ("task-main", {}, "table/0.txt: cannot be read: "),
        ("task1", {"question": "?", "answer": "yes"}, "answer (0): must be Y or N, not 'yes'"),
        ("task3", {"question": "(A)\nx\n(B)\ny\n", "answer": "2"}, "question (0): the answer is '2', but it has 2"),
        ("task4", {"question": "L,Q", "answer": "Y"}, "question (0): is not a plan of the moves L, R, U, D"),
    ],
)
def test_faults_name_the_file(tmp_path, task, texts, message):
    place = maze(tmp_path, task, texts)
    with pytest.raises(MirageError) as caught:
        list(load_preset(f"vsp-maze-{task[-1] if task[-1].isdigit() else 'main'}", tmp_path))
    assert str(caught.value).startswith(f"{place}/{message}")


def test_the_folder_may_be_the_repository_or_the_task_itself(tmp_path):
    place = maze(tmp_path, "task2", {"table": TABLE})
    for folder in (tmp_path, tmp_path / "VSP-main", place.parent.parent):
        assert len(list(load_preset("vsp-maze-2", folder))) == 1
    for folder in (tmp_path, place.parent.parent):  # the folder of another task is not read as this one's
        with pytest.raises(MirageError, match=r"has no maze/task1/maps; name a copy of UCSB"):
            load_preset("vsp-maze-1", folder)
    with pytest.raises(MirageError, match="name the folder where its repository lies"):
        load_preset("vsp-maze-1")
    with pytest.raises(MirageError, match="has no splits"):
        load_preset("vsp-maze-2", tmp_path, split="test")


def blocks(folder, task, files, numbers=(0,), pictures=("image_input",), suffix=".png"):
    place = folder / "blocks" / task / "maps/level3"
    for number in numbers:
        for name in pictures:
            picture(place / name / f"{number}{suffix}")
    for name, text in files.items():
        write(place / name, text)
    return place


INFO = (
    "B00000-OR0000\t2\tBR0000-O00000\t2\t1\tmove(R,B,0)\t1\nPG0000\t1\tGP0000\t1\t2\tmove(G,table,0) move(P,G,1)\t1\n"
)


def test_blocks(tmp_path):
    blocks(tmp_path, "task-main", {"info.txt": INFO}, (0, 1), ("input_img", "output_img"), ".jpg")
    first, second = load_preset("vsp-blocks-main", tmp_path)
    assert (first.answer, second.answer) == ("move(red,blue)", "move(green,table), move(purple,green)")
    assert [image.source.parent.name for image in pictures(second)] == ["input_img", "output_img"]
    assert stacks_of(first.meta, "start") == {("B",), ("O", "R")}
    for example in (first, second):
        assert example.task == BLOCKS.name
        assert score(example).correct
        assert score(example).optimal
    assert not correct(first, "move(red,orange)")
    assert not correct(second, "move(purple,table), move(green,purple)")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("B\t1\n", "info.txt (0): must have 6 columns, with tabs between, not 2"),
        (INFO.replace("OR", "OX"), "info.txt (0): 'X' in 'B00000-OX0000' is no block"),
        (INFO.replace("move(R", "put(R"), "info.txt (0): 'put(R,B,0)' is not a plan"),
        ("", "info.txt: has 0 lines, none for number 0"),
    ],
)
def test_faults_of_blocks(tmp_path, info, message):
    place = blocks(tmp_path, "task-main", {"info.txt": info}, (0,), ("input_img", "output_img"), ".jpg")
    with pytest.raises(MirageError) as caught:
        list(load_preset("vsp-blocks-main", tmp_path))
    assert str(caught.value).startswith(f"{place}/{message}")


def test_colour_of_a_block(tmp_path):
    files = {"text_input/0.txt": "What is on top?", "text_input/1.txt": "And below?", "annotation.txt": "red\nblue\n"}
    blocks(tmp_path, "task1", files, (0, 1))
    first, second = load_preset("vsp-blocks-1", tmp_path)
    assert correct(first, "Red")
    assert not correct(first, "red or blue")
    assert correct(second, "blue")
    assert not correct(second, "red")


@pytest.mark.parametrize("task", ["2", "3"])
def test_which_is_true_of_the_blocks(tmp_path, task):
    files = {"text_input/0.txt": "(A) One is red.\n(B) One is blue.\n(C) None.\n(D) All.\n", "annotation.txt": "3\n"}
    blocks(tmp_path, f"task{task}", files)
    (example,) = load_preset(f"vsp-blocks-{task}", tmp_path)
    assert example.meta["choices"]["D"] == "All."
    assert question(example).count("(D) All.") == 1
    assert score(example).correct
    assert correct(example, "D")
    assert not correct(example, "C")


def test_whether_moves_can_be_made(tmp_path):
    files = {f"text_input/{i}.txt": f"move(red,table) {i}" for i in (0, 1, 11)} | {"annotation.txt": "0\n11\n"}
    blocks(tmp_path, "task4", files, (0, 1, 11))
    examples = list(load_preset("vsp-blocks-4", tmp_path))
    assert [example.meta["letter"] for example in examples] == ["A", "B", "A"]
    assert "move(red,table) 11\n" in question(examples[2])
