"""Jigsaw: pictures against their own pixels, wrong candidates that are wrong, splits by photo, and the checker."""

import hashlib
import json
import pickle
import random
from collections import Counter
from importlib.util import find_spec
from itertools import islice

import numpy as np
import PIL.Image
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import read_data
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks import jigsaw as module
from mirage_vlm.tasks.base import split_of
from mirage_vlm.tasks.jigsaw import COLOURS, DISTRACTORS, JIGSAW, TURNS, Jigsaw, Piece, Puzzle, differ
from mirage_vlm.tasks.make import GeneratedDataset, write_dataset
from mirage_vlm.tasks.photos import BUILTIN, BuiltIn, Folder, Photos, Scenes
from mirage_vlm.tasks.scenes import HEIGHT, SCENES, WIDTH, Canvas, draw_scene, noise
from mirage_vlm.trajectory import Image, Text

LEVELS = (1, 2, 3, 4, 5)


def array(picture):
    return np.asarray(picture, dtype=int)


def paint(path, seed, size=(90, 70)):
    """A photo of chance blots, no two alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blots = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    PIL.Image.fromarray(blots).resize(size, PIL.Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Thirty made photos, named by the environment."""
    for i in range(30):
        paint(tmp_path / "photos" / ("deep" if i % 2 else ".") / f"{i}.png", i)
    monkeypatch.setenv("MIRAGE_PHOTOS", str(tmp_path / "photos"))
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def examples():
    return [JIGSAW.make(random.Random(f"{i}"), 1 + i % 5, "cot", 16) for i in range(25)]


def test_the_pictures_are_those_of_one_puzzle(examples):
    """Outside the hole the helper image is the prompt's photo, in it the candidate that fits."""
    for example in examples:
        asked, a, b = (array(image.load()) for image in example.images())
        helper = array(example.spans[0].helper.load())
        fits, wrong = (a, b) if example.answer == "A" else (b, a)
        assert asked.shape == helper.shape == (64, 64, 3) and a.shape == b.shape == (32, 32, 3)
        hole = np.zeros((64, 64), bool)
        hole[32:, 32:] = True
        assert (asked[hole] == 0).all() and (helper[~hole] == asked[~hole]).all()
        assert (helper[32:, 32:] == fits).all()
        assert abs(fits - wrong).mean() > 5


def test_the_piece_that_fits_goes_on_where_the_photo_stops(examples):
    """An observer that compares the edges alone is nearly always right, so the question can be answered."""
    right = 0
    for example in examples:
        asked, *candidates = (array(image.load()) for image in example.images())
        steps = [
            abs(piece[0] - asked[31, 32:]).mean() + abs(piece[:, 0] - asked[32:, 31]).mean() for piece in candidates
        ]
        right += "AB"[int(np.argmin(steps))] == example.answer
    assert right >= 0.95 * len(examples)


def test_each_level_has_its_own_wrong_candidate():
    """What each level does to a piece, done again with numpy."""
    photo = array(draw_scene("7"))

    def cut(piece):  # at the photo's own size nothing is resampled
        return photo[piece.y : piece.y + piece.side, piece.x : piece.x + piece.side]

    turned = {
        "mirrored left to right": lambda pixels: pixels[:, ::-1],
        "mirrored top to bottom": lambda pixels: pixels[::-1],
        "turned by a quarter to the right": lambda pixels: np.rot90(pixels, -1),
        "turned by a half": lambda pixels: np.rot90(pixels, 2),
        "turned by a quarter to the left": lambda pixels: np.rot90(pixels),
    }
    assert set(turned) == set(TURNS)
    hole = Piece("7", 100, 90, 60)
    assert (array(hole.draw(Scenes(), 60)) == cut(hole)).all()
    for change, turn in turned.items():
        assert (array(Piece("7", 100, 90, 60, change).draw(Scenes(), 60)) == turn(cut(hole))).all()
    for change, gains in COLOURS.items():
        expected = np.minimum(255, cut(hole) * np.array(gains) // 100)
        assert (array(Piece("7", 100, 90, 60, change).draw(Scenes(), 60)) == expected).all()


def test_levels(examples):
    for example in examples:
        puzzle, level = JIGSAW.puzzle(example), example.meta["level"]
        hole = puzzle.candidates[example.answer]
        wrong = puzzle.candidates["B" if example.answer == "A" else "A"]
        whole = puzzle.whole
        half = whole.side // 2
        assert hole == Piece(whole.photo, whole.x + half, whole.y + half, half)
        assert example.meta["distractor"] == DISTRACTORS[level - 1]
        moved = max(abs(wrong.x - hole.x), abs(wrong.y - hole.y))
        if level == 1:
            assert wrong.photo != hole.photo and not wrong.change
        elif level == 2:
            assert wrong.photo == hole.photo and not wrong.change and moved >= half
        elif level == 4:
            assert wrong.photo == hole.photo and not wrong.change and half // 8 <= moved <= half // 4
        else:
            assert (wrong.photo, wrong.x, wrong.y, wrong.side) == (hole.photo, hole.x, hole.y, hole.side)
            assert wrong.change in (TURNS if level == 3 else COLOURS)
        for piece in (whole, wrong):
            assert 0 <= piece.x <= 480 - piece.side and 0 <= piece.y <= 320 - piece.side


class Made(Photos):
    """One picture under every name: bars from left to right, or nothing but grey."""

    label = "made"

    def __init__(self, even):
        row = np.full(200, 128, np.uint8) if even else (np.arange(200) // 10 % 2 * 200).astype(np.uint8)
        self.picture = PIL.Image.fromarray(np.repeat(row[None], 120, 0)).convert("RGB")

    def pick(self, rng):
        return str(rng.randrange(1000))

    def open(self, name):
        return self.picture


def test_a_candidate_that_looks_the_same_is_never_offered():
    """Along bars a shift changes nothing, nor do some turns: what is kept differs in pixels all the same."""
    bars = Made(even=False)
    assert not differ(bars, Piece("1", 40, 30, 40), Piece("1", 40, 40, 40))  # down the bars
    assert not differ(bars, Piece("1", 40, 30, 40), Piece("1", 60, 30, 40))  # by a whole period
    assert differ(bars, Piece("1", 40, 30, 40), Piece("1", 50, 30, 40))
    task = Jigsaw("bars", bars)
    for level in (3, 4):
        for seed in range(15):
            pictures = [array(image.load()) for image in task.make(random.Random(seed), level, "plain", 8).images()]
            assert abs(pictures[1] - pictures[2]).mean() > 5
    for level in (1, 2, 3, 4):
        with pytest.raises(MirageError, match="no piece differed from a wrong one; the photos are too even"):
            Jigsaw("grey", Made(even=True)).make(random.Random(0), level)


def test_answers_are_balanced_at_every_level(folder):
    """And the letter tells nothing of what is wrong with the other one."""
    task = Jigsaw("folder", Folder(folder))
    for level in LEVELS:
        answers = Counter(task.make(random.Random(f"{level}/{i}"), level, "plain").answer for i in range(200))
        assert abs(answers["A"] - 100) < 35, (level, answers)  # five standard deviations


def test_the_words_name_what_is_wrong():
    hole = Piece("7", 100, 90, 60)

    def said(wrong):
        example = JIGSAW.example(Puzzle(Piece("7", 40, 30, 120), {"A": wrong, "B": hole}), "words")
        before, _, fault = example.text.partition("; the second image ")
        assert before.endswith("goes on in the third image") and fault.endswith(r".</think>\boxed{B}")
        return fault.partition(".<")[0]

    assert said(Piece("8", 100, 90, 60)) == "shows something else"
    assert said(Piece("7", 10, 10, 60)) == "is from another place"
    assert said(Piece("7", 110, 90, 60)) == "shows it too far left"
    assert said(Piece("7", 90, 80, 60)) == "shows it too low and too far right"
    assert said(Piece("7", 100, 90, 60, "too red")) == "is too red"


@pytest.mark.parametrize(
    ("style", "spans", "pictures"), [("direct", 1, 3), ("cot", 1, 3), ("words", 0, 3), ("plain", 0, 3), ("shown", 0, 4)]
)
def test_styles(style, spans, pictures):
    example = JIGSAW.make(random.Random(3), 3, style, 8)
    assert (len(example.spans), len(list(example.images()))) == (spans, pictures)
    assert JIGSAW.score(example).correct
    assert example.prompt[0].segments[-1].text.endswith("Think step by step.") == (style in ("cot", "words"))
    assert example.meta["candidates"] == JIGSAW.make(random.Random(3), 3, "plain", 64).meta["candidates"]


def test_every_kind_of_scene_fills_its_canvas_and_no_two_are_alike():
    pictures = []
    for kind in SCENES:
        for seed in range(2):
            canvas = Canvas(random.Random(seed))
            kind(canvas)
            assert canvas.pixels.std() > 15 and (canvas.pixels.reshape(-1, 3).max(0) > 40).all(), kind.__name__
            pictures.append(canvas.pixels)
    assert all(abs(one - two).mean() > 15 for i, one in enumerate(pictures) for two in pictures[:i])
    assert draw_scene("3").size == (WIDTH, HEIGHT) == (480, 320)
    assert Counter(random.Random(f"scene/{i}").choice(SCENES) for i in range(120)).keys() == set(SCENES)


def test_noise_is_that_of_a_slow_loop():
    """Chance values on a grid, and 3 t² − 2 t³ between them, in whole numbers."""
    found, period = noise(random.Random(4), 50), 50
    rows, columns = 320 // 50 + 2, 480 // 50 + 2
    grid = list(random.Random(4).randbytes(rows * columns))
    for y, x in ((0, 0), (50, 100), (7, 33), (319, 479), (149, 251)):
        (row, v), (column, u) = divmod(y, period), divmod(x, period)
        v, u = (3 * (part / period) ** 2 - 2 * (part / period) ** 3 for part in (v, u))
        upper, lower = ([grid[(row + i) * columns + column + j] for j in (0, 1)] for i in (0, 1))
        left, right = ((1 - v) * upper[j] + v * lower[j] for j in (0, 1))
        assert abs(found[y, x] - ((1 - u) * left + u * right)) < 2


def test_train_and_test_share_no_photo(folder, register):
    """Neither the photo that is cut up nor the other one of level 1."""
    seen = {}
    for split, seed in (("train", 0), ("test", 9)):
        made = GeneratedDataset(register(Folder()), LEVELS, 60, seed, "plain", split, 8)
        seen[split] = {
            piece["photo"]
            for example in made
            for piece in (example.meta["whole"], *example.meta["candidates"].values())
        }
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]
    for split, names in seen.items():
        assert {split_of(f"folder/{name}") for name in names} == {split}


def test_scenes_keep_to_their_split():
    for i in range(4):
        example = JIGSAW.make(random.Random(i), 1, "plain", 8)
        pieces = [example.meta["whole"], *example.meta["candidates"].values()]
        names = {piece["photo"] for piece in pieces}
        assert len(names) == 2 and len({split_of(f"scenes/{name}") for name in names}) == 1
        assert JIGSAW.key(example) == f"scenes/{example.meta['whole']['photo']}"


@pytest.fixture
def register(monkeypatch):
    """Makes a task of a source and gives the name that it is found by."""

    def add(photos):
        monkeypatch.setattr(module, "MINE", Jigsaw("mirage_vlm.tasks.jigsaw:MINE", photos), raising=False)
        return module.MINE.name

    return add


def test_files_are_the_same_bytes_and_are_drawn_again_from_meta(tmp_path, register):
    name = register(Scenes())
    for part in ("one", "two"):
        write_dataset(name, LEVELS, 5, tmp_path / part, n_test=0, seed=2, style="cot", cell=8)
        draw_scene.cache_clear()
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 21  # four pictures each
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    for example in read_data(tmp_path / "one" / "train.jsonl"):
        assert JIGSAW.score(example).correct
        puzzle = JIGSAW.puzzle(example)
        for part, image in zip(("asked", "A", "B"), example.images(), strict=True):
            assert (array(puzzle.draw(Scenes(), 8, part)) == array(image.load())).all()


def test_golden_bytes():
    """Scenes are whole numbers through and through: what was drawn once must be drawn on every machine."""
    digests = [hashlib.sha256(draw_scene(str(i)).tobytes()).hexdigest()[:16] for i in range(3)]
    assert digests == ["40075c9e7c046630", "49324bceb68cd4ce", "f6e0ade4ce64e26f"]


def test_a_drawing_can_be_sent_to_another_process(folder):
    """Loaders' workers draw pictures that the main process made."""
    for task in (JIGSAW, Jigsaw("folder", Folder())):
        example = task.make(random.Random(1), 4, "direct", 8)
        for image in (*example.images(), example.spans[0].helper):
            assert (array(pickle.loads(pickle.dumps(image)).load()) == array(image.load())).all()


# -- sources ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_photos(folder, tmp_path):
    """Large, rotated and grey files are read; names do not depend on where the folder lies."""
    task = Jigsaw("folder", Folder())
    made = task.make(random.Random(5), 2, "plain", 8)
    assert (folder / made.meta["whole"]["photo"]).is_file() and made.meta["source"] == "folder"
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert Jigsaw("folder", Folder(moved)).make(random.Random(5), 2, "plain", 8).meta == made.meta
    photo = PIL.Image.new("L", (3000, 1100))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    photo.save(moved / "large.jpg", exif=exif)
    assert Folder(moved).open("large.jpg").size == (550, 1500)
    assert Folder(moved).open("large.jpg").mode == "RGB"


def test_faults_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MIRAGE_PHOTOS", raising=False)
    task = Jigsaw("jigsaw-folder", Folder())
    with pytest.raises(MirageError, match="no folder of photos is named; set MIRAGE_PHOTOS to one"):
        task.make(random.Random(0), 1)
    monkeypatch.setenv("MIRAGE_PHOTOS", str(tmp_path / "nowhere"))
    with pytest.raises(MirageError, match=r"nowhere is not a folder of photos \(MIRAGE_PHOTOS names it\)"):
        task.make(random.Random(0), 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MirageError, match=r"empty holds no photos \(.bmp, "):
        Jigsaw("mine", Folder(tmp_path / "empty")).make(random.Random(0), 1)
    paint(tmp_path / "small" / "small.png", 0, (63, 200))
    with pytest.raises(MirageError, match=r"small.png: a photo must have at least 64 pixels a side, not 63"):
        Folder(tmp_path / "small").open("small.png")
    (tmp_path / "small" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(MirageError, match=r"cannot read the picture .*broken.png"):
        Folder(tmp_path / "small").open("broken.png")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_whose_photos_are_all_of_one_split(tmp_path, split):
    """It is refused at once; looking for the other split would never end."""
    names = (f"{i}.png" for i in range(1000))
    for name in islice((name for name in names if split_of(f"folder/{name}") == split), 4):
        paint(tmp_path / name, 1)
    other = "train" if split == "test" else "test"
    with pytest.raises(MirageError, match=f"0 of its 4 photos would be for {other}, by their names"):
        Jigsaw("mine", Folder(tmp_path)).make(random.Random(0), 1)


def test_built_in_photos_of_both_splits():
    """The list is written down, so what is installed decides nothing; its split is what the manual says."""
    assert len(set(BUILTIN)) == 20
    test = {name for name in BUILTIN if split_of(BuiltIn().key(name)) == "test"}
    assert test == {"skimage/chelsea.png", "skimage/moon.png", "skimage/rocket.jpg", "sklearn/china.jpg"}


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr("mirage_vlm.tasks.photos.find_spec", lambda name: None)
    with pytest.raises(MirageError, match=r"coins\.png lies in scikit-image, which is not installed: pip install"):
        BuiltIn().open("skimage/coins.png")
    with pytest.raises(MirageError, match=r"china\.jpg lies in scikit-learn, which is not installed"):
        BuiltIn().open("sklearn/china.jpg")
    with pytest.raises(MirageError, match=r"no built-in photo 'skimage/../setup.py'; they are skimage/astronaut.png"):
        BuiltIn().open("skimage/../setup.py")


@pytest.mark.skipif(not (find_spec("skimage") and find_spec("sklearn")), reason="needs scikit-image and scikit-learn")
def test_built_in_photos_are_there():
    assert all(min(BuiltIn().open(name).size) >= 172 for name in BUILTIN)
    for level in LEVELS:
        assert Jigsaw("builtin", BuiltIn()).make(random.Random(level), level, "plain", 8).meta["source"] == "builtin"


# -- the checker -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "correct", "valid"),
    [
        (r"\boxed{B}", True, True),
        (r"\boxed{(b)}", True, True),
        (r"\boxed{The third image}", True, True),
        (r"\boxed{(B) the third image}", True, True),
        (r"I took \boxed{A} at first, but \boxed{B}", True, True),
        ("B", True, True),
        (r"\boxed{A}", False, True),
        (r"\boxed{the second image}", False, True),
        (r"\boxed{B} or rather \boxed{A}", False, True),
        (r"\boxed{A} \boxed{B or A}", False, False),
        (r"\boxed{B: the second image}", False, False),
        (r"\boxed{the second image, the third image}", False, False),
        (r"\boxed{the first image}", False, False),
        (r"\boxed{C}", False, False),
        (r"\boxed{not A}", False, False),
        (r"\boxed{}", False, False),
        (r"\boxed{B", False, False),
        ("It is not A, so B", False, False),
        ("", False, False),
    ],
)
def test_answers(text, correct, valid):
    hole, wrong = Piece("7", 100, 90, 60), Piece("7", 110, 90, 60)
    example = JIGSAW.example(Puzzle(Piece("7", 40, 30, 120), {"A": wrong, "B": hole}), "plain")
    score = JIGSAW.score(example.with_response((Text(text),)))
    assert (score.correct, score.valid) == (correct, valid)


def test_the_answer_on_file_is_not_what_counts(examples):
    for example in examples[:6]:
        object.__setattr__(example, "answer", "A" if example.answer == "B" else "B")
        read_back = json.loads(json.dumps(example.meta))
        example.meta.clear()
        example.meta.update(read_back)
        score = JIGSAW.score(example)
        assert score.correct and score.verdict.endswith("image, is right")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda meta: meta.pop("whole"),
        lambda meta: meta.pop("candidates"),
        lambda meta: meta.update(candidates=["A", "B"]),
        lambda meta: meta["candidates"].pop("A"),
        lambda meta: meta["candidates"]["A"].pop("side"),
        lambda meta: meta["candidates"].update(A=meta["candidates"]["B"]),
        lambda meta: meta["whole"].update(x=meta["whole"]["x"] + 1),
        lambda meta: meta["whole"].update(side="wide"),
    ],
)
def test_what_cannot_be_scored(spoil):
    example = JIGSAW.make(random.Random(0), 2, "plain", 8)
    spoil(example.meta)
    with pytest.raises(MirageError, match="of the example's meta are no jigsaw"):
        JIGSAW.score(example)


def test_what_cannot_be_asked():
    picture = Image(PIL.Image.new("RGB", (8, 8)))
    for details in ({}, {"candidates": (picture,)}, {"candidates": (picture, "B")}):
        with pytest.raises(MirageError, match="jigsaw needs two candidates, which are pictures"):
            JIGSAW.prompt(picture, **details)
    with pytest.raises(MirageError, match="the style 'shown' has the helper image in its prompt"):
        JIGSAW.prompt(picture, "shown", candidates=(picture, picture))
    with pytest.raises(MirageError, match="has no style 'cells'"):
        JIGSAW.make(random.Random(0), 1, "cells")


def test_a_source_of_ones_own_is_found_by_name(folder, register):
    name = register(Folder(folder))
    assert get_task(name).name == name
    with pytest.raises(MirageError, match=r"levels of .* are from 1 to 5, not \[6\]"):
        GeneratedDataset(name, (6,), 1)
