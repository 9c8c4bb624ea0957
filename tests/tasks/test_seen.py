"""The tasks that tell a model what there is to see, patch by patch."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.base import split_of
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.tasks.rooms import COLOURS, name_of
from mirage_vlm.tasks.seen import NAMED, PALETTE
from mirage_vlm.tasks.spatial import KINDS
from mirage_vlm.trajectory import Image, LatentSpan

CELL = 16


def told(name, n=60, style="words"):
    """Examples whose patches bear what they show, not their place."""
    task = get_task(name)
    made = [task.make(random.Random(i), 1 + i % 4, style, CELL) for i in range(n)]
    return [example for example in made if next(example.images()).reading[0] != " r1c1"]


def bare(example):
    return replace(
        example,
        messages=tuple(
            replace(m, segments=tuple(replace(s, reading=None) if isinstance(s, Image) else s for s in m.segments))
            for m in example.messages
        ),
    )


@pytest.mark.parametrize("name", ["geometry", "jigsaw", "sat"])
def test_but_for_the_readings_the_examples_are_those_of_the_task(name):
    seen, plain = get_task(f"{name}-seen"), get_task(name)
    for style in seen.styles:
        one, other = (task.make(random.Random(3), 2, style, CELL) for task in (seen, plain))
        assert one.task == name and one.meta == other.meta
        if style in ("words", "cot") and name != "geometry":
            before, thought = other.text.split("<think>")
            assert one.text.startswith(f"{before}<think>") and len(one.text) > len(other.text) + 20
            assert re.sub(r" Which: [^.]+\.", "", one.text).endswith(f". {thought}")
            assert len(list(one.spans)) == len(list(other.spans))
        else:
            assert one.text == other.text
        for a, b in zip(one.images(), other.images(), strict=True):
            assert b.reading is None and (np.asarray(a.load()) == np.asarray(b.load())).all()
            assert len(a.reading) == (a.load().size[0] // CELL) ** 2 and all(word[0] == " " for word in a.reading)
        assert seen.score(one) == plain.score(other) and seen.score(one).correct
        assert seen.key(one) == plain.key(other)
    with pytest.raises(MirageError, match=f"{name}-seen has no style 'shown'"):
        seen.make(random.Random(3), 2, "shown", CELL)


@pytest.mark.parametrize("name", ["geometry-seen", "sat-seen"])
def test_training_and_test_examples_stay_apart(name):
    for split in ("train", "test"):
        made = GeneratedDataset(name, None, 8, 0, "words", split, CELL)
        assert {split_of(made.task.key(example)) for example in made} == {split}


def test_some_examples_name_places():
    made = GeneratedDataset("geometry-seen", [1], 300, style="plain", cell=CELL)
    named = [example for example in made if next(example.images()).reading[:2] == (" r1c1", " r1c2")]
    assert 0.5 * NAMED < len(named) / len(made) < 1.6 * NAMED


def test_figures_are_read_as_they_are_drawn():
    kinds = set()
    for example in told("geometry-seen", 120):
        picture = next(example.images())
        pixels = np.asarray(picture.load()).astype(int)
        side = len(pixels) // CELL
        kinds.add(kind := example.meta["kind"])
        for i, word in enumerate(picture.reading):
            top, left = CELL * (i // side), CELL * (i % side)
            patch = pixels[top : top + CELL, left : left + CELL]
            dark, red = (patch.sum(axis=2) < 250), (patch[..., 0] > 180) & (patch[..., 1] < 80)
            blue = (patch[CELL // 2, CELL // 2] == (140, 185, 242)).all()
            if kind == "creation":
                ink = dark[0, 4:12].all(), dark[4:12, 0].all()
                assert word.strip() == {(1, 1): "corner", (1, 0): "top", (0, 1): "side", (0, 0): "open"}[ink]
            elif kind == "deletion":
                for (row, column), letter in zip(((8, 12), (12, 8)), word.strip(), strict=True):
                    around = slice(row - 1, row + 1), slice(column - 1, column + 1)
                    assert letter == ("r" if red[around].any() else "b" if dark[around].any() else "n")
            elif word == " dot":
                assert red[CELL // 2, CELL // 2]
            elif word in (" blue", " empty"):
                assert blue == (word == " blue") and not red[6:10, 6:10].any()
            else:
                assert word.strip() in "ABCD" and (dark[2:-2, 2:-2].any() or red.any())
    assert kinds == {"creation", "deletion", "update", "selection"}


def test_colours_are_those_of_the_pictures():
    for example in told("jigsaw-seen", 12):
        asked, *pieces = example.images()
        assert [len(image.reading) for image in (asked, *pieces)] == [16, 4, 4]
        assert {asked.reading[i] for i in (10, 11, 14, 15)} == {" black"}  # the hole
        for image in (asked, *pieces):
            pixels, side = np.asarray(image.load()).astype(float), int(len(image.reading) ** 0.5)
            for i, word in enumerate(image.reading):
                top, left = CELL * (i // side), CELL * (i % side)
                mean = pixels[top : top + CELL, left : left + CELL].mean(axis=(0, 1))
                gaps = {name: np.linalg.norm(mean - tone) for name, tone in PALETTE.items()}
                assert gaps[word.strip()] < min(gaps.values()) + 2


def test_things_are_named_where_they_are_seen():
    counts = {"colour": 0, "shape": 0}
    for example in told("sat-seen", 40):
        things = example.meta["scene"]["things"]
        for image in example.images():
            words = {word.strip() for word in image.reading} - {"none"}
            kind = "colour" if words <= set(COLOURS) else "shape"
            assert words <= {thing[kind] for thing in things}
            counts[kind] += 1
            if kind == "shape":
                continue
            pixels = np.asarray(image.load().resize((64, 64))).astype(int)
            for i, word in enumerate(image.reading):
                if word in (" red", " blue"):  # what nothing else in a room looks like
                    patch = pixels[16 * (i // 4) : 16 * (i // 4 + 1), 16 * (i % 4) : 16 * (i % 4 + 1)]
                    main, other = (0, 2) if word == " red" else (2, 0)
                    assert (
                        patch[..., main] - patch[..., other] > 40
                    ).sum() >= 4  # of 256; the least that is named is 15
    assert min(counts.values()) > 10


def test_a_thought_in_words_begins_with_what_meets_the_edges():
    for level in (1, 2, 3):
        fits = []
        for i in range(40):
            example = get_task("jigsaw-seen").make(random.Random(i), level, "words", CELL)
            edges, *counts = re.search(
                r"<think>Edges: ([a-z ,]+)\. Second (\d), third (\d)\. I ", example.text
            ).groups()
            met = [words.split() for words in edges.split(", ")]
            assert len(met) == 8 and all({*colours} <= {*PALETTE} for *colours, _ in met)
            said = [("second" if a == b else "") + ("third" if a == c else "") for a, b, c, _ in met]
            assert [who for *_, who in met] == [{"secondthird": "both", "": "none"}.get(who, who) for who in said]
            alike = [sum(part in who for who in said) for part in ("second", "third")]
            assert alike == list(map(int, counts))
            right = "AB".index(example.answer)
            fits.append(0.5 if alike[0] == alike[1] else float(alike[right] > alike[1 - right]))
        assert sum(fits) / len(fits) > 0.75, "the piece that fits goes on in the colours of the photo"


def test_the_choices_are_said_again_before_the_letter():
    told = set()
    for i in range(80):
        example = get_task("sat-seen").make(random.Random(i), 1 + i % 4, ("words", "cot")[i % 2], CELL)
        choices, right = example.meta["scene"]["choices"], "AB".index(example.answer)
        form = rf" Which: (\S+) (\S+) (\S+) (second|third)\. It is {example.answer}\.</think>"
        found, *both, which = re.search(form, example.text).groups()
        assert (found, which) == (both[right], ("second", "third")[right]) and both[0] != both[1]
        for word, words in zip(both, choices, strict=True):
            assert word in words.split()
        told.add(example.meta["kind"])
    assert told == set(KINDS)


def test_a_thought_in_words_begins_with_where_the_things_are():
    kinds, goals, sides = {}, [], []
    for i in range(80):
        example = get_task("sat-seen").make(random.Random(i), 1, "words", CELL)
        scene, kind = example.meta["scene"], example.meta["kind"]
        kinds[kind] = kinds.get(kind, 0) + 1
        (told,) = re.findall(r"<think>Places: ([^.]+)\.", example.text)
        names = [name_of(scene, i) for i in range(len(scene["things"]))]
        if len(list(example.images())) == 2:
            moved = {}
            for one in told.split(", "):
                form = r"([a-z ]+) (\d+) (\d+) (\d+) (\d+) (left|right|none) (nearer|away|none)"
                name, *rest = re.fullmatch(form, one).groups()
                moved[name] = (*map(int, rest[:4]), *rest[4:])
            for x, y, then_x, then_y, way, depth in moved.values():
                assert max(x, y, then_x, then_y) < 16
                assert way == ("left" if then_x < x else "right" if then_x > x else "none")
                assert depth == ("away" if then_y < y else "nearer" if then_y > y else "none")
            if scene["ask"].get("about") == "side":
                assert scene["choices"]["AB".index(example.answer)] == moved[names[0]][4]
            continue
        here = {name: (int(x), int(y)) for name, x, y in re.findall(r"([a-z ]+?) (\d+) (\d+)(?:, )?", told)}
        assert here and here.keys() <= {*names} and all(max(place) < 16 for place in here.values())
        (then,) = re.findall(r"\. Then: ([^.]+)\. ", example.text)
        there = dict(re.fullmatch(r"([a-z ]+) (none|\d+ \d+)", one).groups() for one in then.split(", "))
        assert list(there) == names[: KINDS[kind].asked]
        if kind == "goal aiming":  # one looks straight at it
            goals.append(int(there[names[0]].split()[0]))
        if kind == "perspective":
            assert there[names[0]] == "none", "who looks does not see himself"
            way = scene["choices"]["AB".index(example.answer)]
            sides.append((int(there[names[2]].split()[0]) < 8) == (way == "left"))
        latent = get_task("sat-seen").make(random.Random(i), 1, "cot", CELL)
        before, span, _ = latent.response
        assert isinstance(span, LatentSpan) and before.text.startswith(f"<think>Places: {told}. "), "instead of: Then"
        assert "Then: " not in latent.text
    assert set(kinds) == set(KINDS) and set(goals) <= {7, 8} and sides and all(sides)
