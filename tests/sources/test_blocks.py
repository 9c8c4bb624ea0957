"""Blocks: the simulator against one that is written otherwise, and plans that must not pass."""

import random
from itertools import pairwise

import PIL.Image
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.sources.blocks import BLOCKS, COLOURS, distance, move, parse_plan
from mirage_vlm.tasks import get_task
from mirage_vlm.trajectory import Image, Text, Trajectory, assistant_turn

START, END = [["B"], ["O", "R"]], [["R", "B"], ["O"]]


def scored(response, start=START, end=END):
    meta = {"start": start, "end": end}
    picture = Image(PIL.Image.new("RGB", (4, 4)))
    prompt = BLOCKS.prompt(picture, end=picture)
    return BLOCKS.score(Trajectory((*prompt, assistant_turn(Text(response))), task=BLOCKS.name, meta=meta))


def under(stacks):
    """What each block stands on; None is the table. Another form of the same arrangement."""
    return {stack[0]: None for stack in stacks} | {top: low for stack in stacks for low, top in pairwise(stack)}


def reference(on, block, target):
    taken = set(on.values())
    if block not in on or block in taken:
        return None
    if target == "table":
        return on | {block: None}
    if target not in on or target in taken or target == block:
        return None
    return on | {block: target}


def dealt(rng, n):
    stacks = []
    for block in rng.sample(sorted(COLOURS), n):
        if stacks and rng.random() < 0.6:
            rng.choice(stacks).append(block)
        else:
            stacks.append([block])
    return frozenset(map(tuple, stacks))


def test_moves_against_the_reference():
    rng = random.Random(0)
    made = 0
    for _ in range(300):
        stacks = dealt(rng, rng.randint(1, 6))
        for block in COLOURS:
            for target in (*COLOURS, "table"):
                after = move(stacks, block, target)
                expected = reference(under(stacks), block, target)
                assert (after and under(after)) == expected
                made += after is not None
    assert made > 1000


def test_the_fewest_moves_against_the_reference():
    """All arrangements of three blocks: distances from a table of neighbours of the other form."""
    rng = random.Random(1)
    for _ in range(20):
        start, end = dealt(rng, 3), dealt(rng, 3)
        if set(under(start)) != set(under(end)):
            assert distance(start, end) is None
            continue
        reached, steps = [under(start)], 0
        while under(end) not in reached:
            after = [reference(on, block, to) for on in reached for block in on for to in (*on, "table")]
            reached += [on for on in after if on is not None and on not in reached]
            steps += 1
        assert distance(start, end) == steps


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (r"\boxed{move(red,table), move(blue,red)}", "right in 2 moves (fewest)"),
        (r"\boxed{1. move(R, table)" + "\n" + "2. Move(B, R)}", "right in 2 moves (fewest)"),
        (r"\boxed{move(red,blue), move(red,table), move(blue,red)}", "right in 3 moves (2)"),
    ],
)
def test_right_plans(response, verdict):
    found = scored(response)
    assert (found.correct, found.valid, found.verdict) == (True, True, verdict)


@pytest.mark.parametrize(
    ("response", "valid", "verdict"),
    [
        (r"\boxed{move(red,table)}", True, "ends as B O R, not as O RB"),
        (r"\boxed{move(orange,table), move(red,table)}", True, "move 1 is not possible: move(orange,table)"),
        (r"\boxed{move(red,table), move(red,red)}", True, "move 2 is not possible: move(red,red)"),
        (r"\boxed{move(red,orange), move(red,table), move(blue,red)}", True, "move 1 is not possible: "),
        (r"\boxed{move(green,table)}", True, "move 1 is not possible: move(green,table)"),
        (r"\boxed{move(red,table) or move(blue,red)}", False, "is not a plan"),
        (r"\boxed{move(pink,table)}", False, "is not a plan"),
        (r"\boxed{move(table,red)}", False, "is not a plan"),
        (r"\boxed{}", False, "is not a plan"),
        ("move(red,table), move(blue,red)", False, r"no answer in \boxed{}"),
    ],
)
def test_wrong_plans(response, valid, verdict):
    found = scored(response)
    assert (found.correct, found.valid, found.optimal) == (False, valid, False)
    assert verdict in found.verdict


def test_the_order_of_stacks_means_nothing():
    assert scored(r"\boxed{move(red,table), move(blue,red)}", START[::-1], END[::-1]).correct


@pytest.mark.parametrize("start", [None, [], [[]], [["B", "B"]], [["X"]], ["B"], [["B"], 1]])
def test_examples_that_cannot_be_scored(start):
    with pytest.raises(MirageError, match=r'^cannot score: "start" in meta must be stacks of B, Y, P, O, R, G'):
        scored(r"\boxed{move(red,table)}", start)


def test_plans():
    assert parse_plan("move(red,blue)\nmove(G,table);") == [("R", "B"), ("G", "table")]
    assert parse_plan("move(red,blue) so") is None
    assert parse_plan("1, 2") is None


def test_the_task_is_found_by_its_name():
    assert get_task(BLOCKS.name) is BLOCKS
    with pytest.raises(MirageError, match="has no generator"):
        BLOCKS.make(random.Random(0), 1)
