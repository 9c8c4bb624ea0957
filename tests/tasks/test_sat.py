"""Sat: answers against what the pictures' ids show, words that give nothing away, and the checker."""

import cmath
import json
import math
import pickle
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import read_data
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.make import GeneratedDataset, write_dataset
from mirage_vlm.tasks.rooms import COLOURS, SHAPES, Pose, look, outline
from mirage_vlm.tasks.spatial import KINDS
from mirage_vlm.trajectory import Image, Text

LEVELS = (1, 2, 3, 4)
SIDE = 72


@pytest.fixture(scope="module")
def examples():
    return list(GeneratedDataset("sat", LEVELS, 280, 3, "cot", cell=SIDE // 4))


def of(examples, kind, about=None, levels=LEVELS, most=14):
    """(example, scene, the right choice) of a kind."""
    found = [
        (example, example.meta["scene"], example.meta["scene"]["choices"]["AB".index(example.answer)])
        for example in examples
        if example.meta["kind"] == kind
        and example.meta["scene"]["ask"].get("about") == about
        and example.meta["level"] in levels
    ]
    assert found
    return found[:most]


def ids_from(scene, pose, without=None):
    """The thing in each pixel, from a pose that need not be any that the task computes."""
    return outline(scene, Pose(*pose), SIDE, without).ids


def moved(scene):
    """The scene with its thing moved, said again in the plainest way."""
    copy = json.loads(json.dumps(scene))
    copy["things"][scene["then"]["thing"]]["at"] = scene["then"]["at"]
    return copy


def middle(ids, i):
    """(column, row) of thing i from the middle of the picture, -1 to 1."""
    rows, columns = np.nonzero(ids == i + 1)
    return (columns.mean() + 0.5) / SIDE * 2 - 1, (rows.mean() + 0.5) / SIDE * 2 - 1


def angle(ids, i):
    """The bearing of thing i in degrees, read off its pixels: the camera is 80 degrees wide and looks 15 down."""
    column, row = middle(ids, i)
    right, up, tilt = column * math.tan(math.radians(40)), -row * math.tan(math.radians(40)), math.radians(-15)
    return math.degrees(math.atan2(right, math.cos(tilt) - up * math.sin(tilt)))


def lowest(ids, i):
    """The row in which thing i stands: the lower, the nearer."""
    return np.nonzero(ids == i + 1)[0].max()


# -- the answers -----------------------------------------------------------------------------------------------------


def test_goal_is_on_the_side_where_it_is_seen(examples):
    for _, scene, answer in of(examples, "goal aiming", "side"):
        assert answer == ("left" if middle(ids_from(scene, scene["camera"]), 0)[0] < 0 else "right")


def test_goal_is_as_far_aside_as_it_is_seen(examples):
    for _, scene, answer in of(examples, "goal aiming", "amount", most=30):
        seen = angle(ids_from(scene, scene["camera"]), 0)
        way, degrees = re.fullmatch(r"(left|right) by (\d+) degrees", answer).groups()
        assert seen == pytest.approx(int(degrees) * {"left": -1, "right": 1}[way], abs=5.5)
        x, y, heading = scene["camera"]
        assert abs(middle(ids_from(scene, (x, y, heading + seen)), 0)[0]) < 0.12


def goal_of(scene):
    """The pose after the steps, in complex numbers."""
    x, y, heading = scene["camera"]
    place = complex(x, y)
    for verb, amount in scene["ask"]["steps"]:
        north = 1j * cmath.exp(-1j * math.radians(heading))
        place += {"turn": 0, "ahead": amount * north, "aside": amount * north * -1j}[verb]
        heading += amount if verb == "turn" else 0
    return place.real, place.imag, heading


def test_action_leaves_the_thing_where_it_is_then_seen(examples):
    for _, scene, answer in of(examples, "action consequence", "side", most=30):
        assert answer == ("left" if middle(ids_from(scene, goal_of(scene)), 0)[0] < 0 else "right")
    for _, scene, answer in of(examples, "action consequence", "seen"):
        assert answer == ("yes" if (ids_from(scene, goal_of(scene)) == 1).any() else "no")


def test_action_reorders_the_things_as_is_then_seen(examples):
    swapped = set()
    for _, scene, answer in of(examples, "action consequence", "order", most=30):
        before, ids = ids_from(scene, scene["camera"]), ids_from(scene, goal_of(scene))
        left = middle(ids, 0)[0] < middle(ids, 1)[0]
        assert answer == ("left" if left else "right")
        swapped.add(left != (middle(before, 0)[0] < middle(before, 1)[0]))
    assert swapped == {True, False}, "the first picture does not tell"


def test_perspective_is_what_is_seen_from_there(examples):
    for _, scene, answer in of(examples, "perspective", most=30):
        (x, y), other = scene["things"][0]["at"], scene["things"][1]["at"]
        heading = 90 - math.degrees(math.atan2(other[1] - y, other[0] - x))
        ids = ids_from(scene, (x, y, heading), without=0)
        assert abs(middle(ids, 1)[0]) < 0.3 and answer == ("left" if middle(ids, 2)[0] < 0 else "right")
        if scene["things"][0]["shape"] == "person":
            assert math.cos(math.radians(scene["things"][0]["turned"] - heading)) > 0.999, "the person looks there"


def test_the_first_picture_alone_does_not_tell_the_side_of_the_perspective():
    """The third thing is to the right of the second in the picture as often as not where the answer is `right`."""
    rng, agree = random.Random(7), []
    for _ in range(60):
        scene = KINDS["perspective"].make(rng, 2)
        camera, (_, second, third) = Pose(*scene["camera"]), [thing["at"] for thing in scene["things"][:3]]
        right = camera.bearing(third) > camera.bearing(second)
        agree.append(right == (KINDS["perspective"].truth(scene) == "right"))
    assert abs(np.mean(agree) - 0.5) < 3 * 0.5 / math.sqrt(len(agree))


def test_the_camera_moved_as_the_things_drift(examples):
    """Turning shifts all alike, steps aside the nearer more, and steps ahead make things spread and grow."""
    seen = set()
    for _, scene, answer in of(examples, "egocentric movement", most=80):
        before, now = ids_from(scene, scene["camera"]), ids_from(scene, scene["then"]["camera"])
        drift = [angle(now, i) - angle(before, i) for i in (0, 1)]
        size = [(now == i + 1).sum() / (before == i + 1).sum() for i in (0, 1)]
        if answer in ("turned left", "moved left"):
            assert min(drift) > 0
        elif answer in ("turned right", "moved right"):
            assert max(drift) < 0
        elif answer in ("moved forward", "moved back"):
            rows = [lowest(now, i) - lowest(before, i) for i in (0, 1)]
            assert (min if answer == "moved forward" else max)(rows) * (1 if answer == "moved forward" else -1) >= 0
            assert (np.mean(size) > 1) == (answer == "moved forward")
        if answer.startswith("turned"):
            assert drift[0] == pytest.approx(drift[1], abs=3), "no parallax"
        seen.add(answer)
    assert len(seen) > 7


def test_what_moved_is_what_the_pictures_show_moved(examples):
    for _, scene, answer in of(examples, "object movement", "which", (1, 2)):
        before, now = ids_from(scene, scene["camera"]), ids_from(moved(scene), scene["then"]["camera"])
        changed = [((before == i + 1) != (now == i + 1)).sum() / (before == i + 1).sum() for i in (0, 1)]
        assert scene["things"][int(np.argmax(changed))]["colour"] in answer
    for _, scene, answer in of(examples, "object movement", "which", (3, 4)):
        before, now = ids_from(scene, scene["camera"]), ids_from(moved(scene), scene["then"]["camera"])
        turn = scene["then"]["camera"][2] - scene["camera"][2]
        stays = [i for i in (0, 1) if scene["things"][i]["colour"] not in answer]
        assert len(stays) == 1 and abs(angle(now, stays[0]) + turn - angle(before, stays[0])) < 3
    for _, scene, answer in of(examples, "object movement", "side"):
        before, now = ids_from(scene, scene["camera"]), ids_from(moved(scene), scene["camera"])
        assert answer == ("left" if middle(now, 0)[0] < middle(before, 0)[0] else "right")
    for _, scene, answer in of(examples, "object movement", "depth"):
        before, now = ids_from(scene, scene["camera"]), ids_from(moved(scene), scene["camera"])
        assert answer == ("nearer to the camera" if lowest(now, 0) > lowest(before, 0) else "away from the camera")


def test_what_is_asked_about_is_seen_and_named(examples):
    asked = {
        "egocentric movement": 2,
        "object movement": 2,
        "goal aiming": 1,
        "action consequence": 1,
        "perspective": 3,
    }
    for example in examples[:120]:
        scene, kind = example.meta["scene"], example.meta["kind"]
        ids = ids_from(scene, scene["camera"])
        assert all((ids == i + 1).sum() >= 0.0015 * SIDE**2 for i in range(asked[kind]))
        named = re.findall(
            rf"({'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})|person in (\w+)", example.prompt[0].segments[-1].text
        )
        names = [one or other for one, other in named]
        assert len(set(names)) == len(names) and set(names) <= {thing["colour"] for thing in scene["things"][:3]}


# -- the pictures ----------------------------------------------------------------------------------------------------


def test_the_pictures_are_of_the_scene_and_the_helper_image_shows_the_answer(examples):
    for kind in KINDS:
        example, scene, _ = next(
            of(examples, kind, about)[0]
            for about in ({"about": None}, {"about": "side"})
            for about in about.values()
            if any(e.meta["kind"] == kind and e.meta["scene"]["ask"].get("about") == about for e in examples)
        )
        pictures, helper = [image.load() for image in example.images()], example.spans[0].helper.load()
        assert len(pictures) == (2 if "movement" in kind else 1)
        assert {picture.size for picture in (*pictures, helper)} == {(SIDE, SIDE)}
        first = look(scene, Pose(*scene["camera"]), SIDE)
        assert (np.asarray(pictures[0]) == first.colours).all()
        if kind == "object movement":
            number = scene["then"]["thing"] + 1
            now = look(moved(scene), Pose(*scene["then"]["camera"]), SIDE)
            assert (np.asarray(pictures[1]) == now.colours).all()
            mask = now.ids == number
            assert (np.asarray(helper)[mask] == now.colours[mask]).all()
            assert np.asarray(helper)[~mask & (first.ids != number)].min() >= 200, "faded"
        elif kind == "egocentric movement":
            assert (np.asarray(pictures[1]) == look(scene, Pose(*scene["then"]["camera"]), SIDE).colours).all()
            assert all((np.asarray(helper) == colour).all(axis=2).any() for colour in ((31, 95, 208), (209, 36, 47)))
        elif kind == "action consequence":
            assert np.mean(np.asarray(helper) != look(scene, Pose(*goal_of(scene)), SIDE).colours) < 0.1
    assert all(pickle.loads(pickle.dumps(image)).load() for image in examples[0].images())


def test_a_larger_cell_draws_the_same_scene():
    small, large = (GeneratedDataset("sat", LEVELS, 6, 2, "plain", cell=cell)[3] for cell in (20, 56))
    assert small.meta["scene"] == large.meta["scene"]
    assert [next(example.images()).load().size for example in (small, large)] == [(80, 80), (224, 224)]


def test_higher_levels_have_more_things(examples):
    assert all(len(example.meta["scene"]["things"]) == example.meta["level"] + 2 for example in examples)


# -- the words -------------------------------------------------------------------------------------------------------


def words_of(example):
    """What a reader of the text alone has: words, each also with the choice it is in, and the whole with no names."""
    text = example.prompt[0].segments[-1].text
    question, a, b = re.fullmatch(r"(.*) A: (.*), B: (.*)\. Answer with .*", text).groups()
    bare = re.sub("|".join((*COLOURS, *SHAPES)), "_", question)
    features = {*question.split(), *(f"A:{word}" for word in a.split()), *(f"B:{word}" for word in b.split())}
    return sorted(features | {f"A:{a}", f"B:{b}", f"{bare}/A:{a}", f"{bare}/A:{a}/B:{b}", bare})


def best_guesses(examples):
    """The accuracy on the second half of: one answer, the best one-word rule, naive Bayes, learnt on the first."""
    data = [(words_of(example), example.answer) for example in examples]
    learnt, held = data[: len(data) // 2], data[len(data) // 2 :]
    counts = defaultdict(Counter)
    for words, answer in learnt:
        for word in words:
            counts[word][answer] += 1
    counts = defaultdict(Counter, {word: count for word, count in counts.items() if count.total() > 4})
    totals = Counter(answer for _, answer in learnt)

    def by_word(words, word):
        return totals.most_common(1)[0][0] if word not in words else counts[word].most_common(1)[0][0]

    def bayes(words):
        odds = math.log(totals["A"] / totals["B"])
        for word in words:
            ratio = (counts[word]["A"] + 1) / (totals["A"] + 2), (counts[word]["B"] + 1) / (totals["B"] + 2)
            odds += math.log(ratio[0] / ratio[1])
        return "A" if odds > 0 else "B"

    rule = max(counts, key=lambda word: sum(by_word(words, word) == answer for words, answer in learnt))
    guesses = (lambda words: totals.most_common(1)[0][0]), (lambda words: by_word(words, rule)), bayes
    return [np.mean([guess(words) == answer for words, answer in held]) for guess in guesses], len(held)


def test_the_words_alone_do_not_tell_the_answer(examples):
    accuracies, n = best_guesses(examples)
    assert max(abs(accuracy - 0.5) for accuracy in accuracies) < 3 * 0.5 / math.sqrt(n), accuracies


def test_the_guesses_find_a_shortcut_where_there_is_one(examples):
    """The test above can fail: leave out those to which `left` is the answer, and it shows."""
    leaky = [e for e in examples if "left" not in e.meta["scene"]["choices"]["AB".index(e.answer)]]
    accuracies, n = best_guesses(leaky)
    assert accuracies[2] > 0.5 + 3 * 0.5 / math.sqrt(n), accuracies


@pytest.mark.slow
def test_the_words_alone_do_not_tell_the_answer_of_thousands():
    accuracies, n = best_guesses(list(GeneratedDataset("sat", LEVELS, 4000, 5, "plain")))
    assert max(abs(accuracy - 0.5) for accuracy in accuracies) < 3 * 0.5 / math.sqrt(n), accuracies


def test_letters_choices_and_kinds_are_balanced(examples):
    bound = 3.5 * 0.5 / math.sqrt(len(examples))
    assert abs(np.mean([example.answer == "A" for example in examples]) - 0.5) < bound
    kinds = Counter(example.meta["kind"] for example in examples)
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 0.7 * len(examples) / 5
    sides = Counter(
        choice
        for example in examples
        if (choice := example.meta["scene"]["choices"]["AB".index(example.answer)]) in ("left", "right")
    )
    assert abs(sides["left"] / sides.total() - 0.5) < 3.5 * 0.5 / math.sqrt(sides.total())


# -- the task --------------------------------------------------------------------------------------------------------


def test_a_step_by_step_response_and_its_own_score(examples):
    for example in examples[:80]:
        score = get_task("sat").score(example)
        assert score.correct and score.verdict.startswith(f"{example.answer} (")
        assert len(example.spans) == 1 and example.text.startswith("<think>")
        assert example.prompt[0].segments[-1].text.endswith("Think step by step.")
        wrong = "AB".replace(example.answer, "")
        score = get_task("sat").score(example.with_response((Text(rf"\boxed{{{wrong}}}"),)))
        assert score.valid and not score.correct


def test_the_answer_in_the_file_is_not_what_scores(examples):
    example = examples[0]
    object.__setattr__(example, "answer", "A" if example.answer == "B" else "B")
    assert get_task("sat").score(example).correct
    object.__setattr__(example, "answer", "A" if example.answer == "B" else "B")


@pytest.mark.parametrize(
    ("style", "spans", "helpers"), [("direct", 1, 0), ("cot", 1, 0), ("words", 0, 0), ("plain", 0, 0), ("shown", 0, 1)]
)
def test_styles(style, spans, helpers):
    for example in GeneratedDataset("sat", LEVELS, 6, 0, style):
        pictures = 2 if "then" in example.meta["scene"] else 1
        assert (len(example.spans), len(list(example.images()))) == (spans, pictures + helpers)


def test_styles_share_their_scenes():
    for i in range(4):
        made = [GeneratedDataset("sat", LEVELS, 4, 0, style)[i] for style in ("plain", "shown", "words")]
        assert len({json.dumps(example.meta["scene"]) for example in made}) == 1


def test_train_and_test_share_no_scene():
    key = get_task("sat").key
    train = {key(example) for example in GeneratedDataset("sat", (1,), 20, 0, "plain", "train")}
    test = {key(example) for example in GeneratedDataset("sat", (1,), 4, 9, "plain", "test")}
    assert len(train) == 20 and len(test) == 4 and not train & test


def test_files_are_the_same_bytes_and_score_alike(tmp_path):
    for name in ("one", "two"):
        write_dataset("sat", LEVELS, 6, tmp_path / name, n_test=1, seed=2, style="cot", cell=16)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert files and all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    made = GeneratedDataset("sat", LEVELS, 6, 2, "cot", cell=16)
    for example, original in zip(read_data(tmp_path / "one" / "train.jsonl"), made, strict=True):
        assert get_task("sat").score(example).correct and example.meta == original.meta
        assert get_task("sat").key(example) == get_task("sat").key(original)


def scene_of(**changes):
    thing = {"turned": 0.0}
    return {
        "room": {"size": [7.0, 7.0], "floor": "tiles", "walls": "mint"},
        "things": [
            {"shape": "ball", "colour": "red", "at": [2.5, 5.0], **thing},
            {"shape": "box", "colour": "blue", "at": [4.5, 5.0], **thing},
        ],
        "camera": [3.5, 1.0, 0.0],
        "ask": {"about": "side"},
        "choices": ["right", "left"],
        **changes,
    }


@pytest.mark.parametrize(
    ("answer", "correct", "valid"),
    [
        (r"\boxed{B}", True, True),
        (r"\boxed{ (b). }", True, True),
        (r"\boxed{left}", True, True),
        (r"\boxed{B: left}", True, True),
        (r"\boxed{\text{Left}}", True, True),
        (r"first \boxed{A}, no, \boxed{B}", True, True),
        ("B", True, True),
        (r"\boxed{A}", False, True),
        (r"\boxed{right}", False, True),
        (r"\boxed{B} \boxed{A}", False, True),
        (r"\boxed{B: right}", False, False),
        (r"\boxed{A or B}", False, False),
        (r"\boxed{left or right}", False, False),
        (r"\boxed{not right}", False, False),
        (r"\boxed{C}", False, False),
        (r"\boxed{}", False, False),
        (r"\boxed{B", False, False),
        ("It is left", False, False),
        ("", False, False),
    ],
)
def test_answers(answer, correct, valid):
    example = get_task("sat").example("goal aiming", scene_of(), "plain").with_response((Text(answer),))
    score = get_task("sat").score(example)
    assert (score.correct, score.valid) == (correct, valid), score.verdict


@pytest.mark.parametrize(
    ("kind", "scene"),
    [
        ("goal aiming", {}),
        ("goal aiming", scene_of(choices=["up", "down"])),
        ("goal aiming", scene_of(choices=["left", "right", "ahead"])),
        ("goal aiming", scene_of(choices=None)),
        ("goal aiming", scene_of(camera=[1.0])),
        ("goal aiming", scene_of(camera="here")),
        ("goal aiming", scene_of(things=[])),
        ("goal aiming", scene_of(things=[{"at": ["x", 1]}])),
        ("goal aiming", scene_of(ask=None)),
        ("goal aiming", scene_of(ask={"about": "amount", "way": "up", "amounts": [1]})),
        ("action consequence", scene_of(ask={"about": "side", "steps": [["fly"]]})),
        ("object movement", scene_of()),
        ("egocentric movement", scene_of()),
        ("egocentric movement", scene_of(then={"camera": None})),
        ("perspective", scene_of()),
    ],
)
def test_a_scene_that_is_not_whole(kind, scene):
    example = get_task("sat").example("goal aiming", scene_of(), "plain")
    example.meta.update(kind=kind, scene=scene)
    with pytest.raises(MirageError, match="cannot score: the scene in meta is not whole"):
        get_task("sat").score(example)


@pytest.mark.parametrize(
    "change", [{"kind": "dance"}, {"kind": None}, {"kind": ["x"]}, {"scene": None}, {"scene": "x"}]
)
def test_meta_without_a_scene(change):
    example = get_task("sat").example("goal aiming", scene_of(), "plain")
    example.meta.update(change)
    for use in (get_task("sat").score, get_task("sat").key):
        with pytest.raises(MirageError, match='no "kind" and "scene" in its meta'):
            use(example)


def test_what_cannot_be_asked_or_made():
    task, image = get_task("sat"), Image("room.png")
    whole = {"question": "Which?", "choices": ["left", "right"]}
    assert task.prompt(image, "plain", **whole)[0].segments[-1].text.startswith("Which? A: left, B: right. Answer")
    for details, message in (
        ({}, "sat needs a question"),
        ({**whole, "choices": ["left"]}, "needs two choices"),
        ({**whole, "choices": "ab"}, "needs two choices"),
        ({**whole, "after": "b.png"}, "takes a picture as 'after'"),
    ):
        with pytest.raises(MirageError, match=message):
            task.prompt(image, "plain", **details)
    with pytest.raises(MirageError, match="has the helper image in its prompt"):
        task.prompt(image, "shown", **whole)
    with pytest.raises(MirageError, match="has no style 'cells'"):
        task.prompt(image, "cells", **whole)
    with pytest.raises(MirageError, match="levels of sat are from 1 to 4, not \\[5\\]"):
        GeneratedDataset("sat", (5,), 1)
