"""The tasks: checkers against an independent simulator, texts replayed on the map, and reproducible data."""

import json
import pickle
import random
import re
from collections import Counter

import numpy as np
import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks import from_record, get_task, task_names
from mirage_vlm.tasks.base import boxed, split_of
from mirage_vlm.tasks.frozenlake import Maze, shortest_path
from mirage_vlm.tasks.make import GeneratedDataset, write_dataset
from mirage_vlm.tasks.vsp import parse_moves
from mirage_vlm.trajectory import Image, LatentSpan, Text

PLANNING, REASONING, PERCEPTION = (get_task(name) for name in task_names()[:3])
WORDS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
LETTERS = {"U": "up", "D": "down", "L": "left", "R": "right"}


def naive_walk(rows, moves):
    """An independent simulator: positions with the outside padded by walls, a letter as the result."""
    grid = {(r, c): letter for r, row in enumerate(rows) for c, letter in enumerate(row)}
    here = next(cell for cell, letter in grid.items() if letter == "S")
    visited = [here]
    for move in moves:
        down, right = WORDS[LETTERS[move]]
        if (here[0] + down, here[1] + right) in grid:
            here = here[0] + down, here[1] + right
        visited.append(here)
        if grid[here] == "H":
            return visited, "B"
    return visited, "A" if grid[here] == "G" else "C"


def answered(trajectory, text):
    return trajectory.with_response((Text(text),))


def examples(task, n=150, levels=(3, 4, 5, 6, 8), **options):
    return list(GeneratedDataset(task, levels, n, **options))


def test_every_task_scores_its_own_examples_as_correct():
    for name in task_names()[:3]:
        for split in ("train", "test"):
            for example in examples(name, 60, style="mixed", split=split):
                score = get_task(name).score(example)
                assert score.correct and score.valid and score.optimal in (True, None)
                assert example.task == name and example.answer in example.text


def test_planning_score_agrees_with_a_naive_simulator_on_random_plans():
    rng = random.Random(0)
    seen = Counter()
    for example in examples("vsp-planning", 300, levels=(3, 4)):
        moves = "".join(rng.choices("UDLR", k=rng.randint(1, 7)))
        score = PLANNING.score(answered(example, rf"\boxed{{{','.join(moves)}}}"))
        _, letter = naive_walk(example.meta["map"], moves)
        fewest = len(shortest_path(Maze.from_rows(example.meta["map"]))) - 1
        assert (score.valid, score.correct) == (True, letter == "A")
        assert score.optimal == (letter == "A" and len(moves) == fewest)
        seen[letter] += 1
    assert min(seen[letter] for letter in "ABC") > 10


MAP = {"level": 3, "id": 7, "map": ["SFG", "FHF", "FFF"]}


@pytest.mark.parametrize(
    ("text", "valid", "correct", "optimal"),
    [
        (r"\boxed{R,R}", True, True, True),
        (r"\boxed{R R}", True, True, True),
        (r"\boxed{rr}", True, True, True),
        (r"\boxed{right, Right}", True, True, True),
        (r"\boxed{\text{R,R}}", True, True, True),
        (r"\boxed{L,R,R,U}", True, True, False),  # off-board moves count as moves
        (r"\boxed{D}\boxed{R,R}", True, True, True),  # the last box counts
        (r"\boxed{R,R}\boxed{D}", True, False, False),
        (r"\boxed{R,R} then \boxed{R,", False, False, False),  # the last box is never closed
        (r"\boxed{R,R,D}", True, False, False),  # passes the gift and leaves it
        (r"\boxed{R,D,U,R}", True, False, False),  # through a hole
        (r"\boxed{R,R or D,D}", False, False, False),
        (r"\boxed{R,R,X}", False, False, False),
        (r"\boxed{}", False, False, False),
        ("R,R", False, False, False),
        ("", False, False, False),
    ],
)
def test_planning_answers(text, valid, correct, optimal):
    score = PLANNING.score(answered(from_record(MAP), text))
    assert (score.valid, score.correct, score.optimal) == (valid, correct, optimal)


def test_planning_verdicts():
    def verdict(moves):
        return PLANNING.score(answered(from_record(MAP), rf"\boxed{{{moves}}}")).verdict

    assert verdict("RR") == "reaches the gift in 2 moves (fewest)"
    assert verdict("RLRR") == "reaches the gift in 4 moves (2 would do)"
    assert verdict("RDR") == "falls into the hole at r2c2 with move 2"
    assert verdict("R") == "ends at r1c2, but the gift is at r1c3"
    assert verdict("no idea") == r"\boxed{no idea} is not a plan"


QUESTION = {"steps": 2, "id": 3, "map": ["SFG", "FHF", "FFF"], "plan": "RD", "safe": False}


@pytest.mark.parametrize(
    ("text", "valid", "correct"),
    [
        (r"\boxed{B}", True, True),
        (r"\boxed{b}", True, True),
        (r"\boxed{(B)}", True, True),
        (r"\boxed{B: in a hole}", True, True),
        (r"A? No. \boxed{A} \boxed{B.}", True, True),
        (r"\boxed{C}", True, False),
        (r"\boxed{A or B}", False, False),
        (r"\boxed{AB}", False, False),
        (r"\boxed{B: at the gift}", False, False),
        (r"\boxed{D}", False, False),
        (r"\boxed{}", False, False),
        ("B", False, False),
    ],
)
def test_reasoning_answers(text, valid, correct):
    score = REASONING.score(answered(from_record(QUESTION), text))
    assert (score.valid, score.correct, score.optimal) == (valid, correct, None)


def test_reasoning_score_ignores_the_reference_answer():
    example = from_record(QUESTION)
    lied_to = type(example)(example.messages, example.task, "A", example.meta)
    assert REASONING.score(lied_to).correct
    assert not REASONING.score(answered(lied_to, r"\boxed{A}")).correct


def test_scoring_without_a_map_is_refused():
    example = from_record(MAP)
    for task in (PLANNING, REASONING):
        with pytest.raises(MirageError, match='no "map"'):
            task.score(type(example)(example.messages))


def test_the_reasoning_text_replays_on_the_map():
    step = r"( (?:up|down|left|right) r\dc\d)"
    for task in ("vsp-planning", "vsp-reasoning"):
        for example in examples(task, style="cot"):
            rows, text = example.meta["map"], example.text
            match = re.search(rf"(?:Path|Walk): (r\dc\d)({step}*)( gift| hole| safe|)\.</think>", text)
            words, places = match[2].split()[::2], [match[1], *match[2].split()[1::2]]
            moves = "".join(word[0].upper() for word in words)
            visited, letter = naive_walk(rows, example.meta.get("plan", moves))
            assert places == [f"r{r + 1}c{c + 1}" for r, c in visited]
            assert text.startswith(f"<think>The elf is at {places[0]}")
            if task == "vsp-planning":
                assert letter == "A" and boxed(text) == ",".join(moves)
                assert f"the gift is at {places[-1]}. " in text
            else:
                assert match[4] == {"A": " gift", "B": " hole", "C": " safe"}[letter]
                assert boxed(text) == letter and example.meta["plan"].startswith(moves)


def test_exact_texts():
    def parts(trajectory):
        return [part.text if isinstance(part, Text) else type(part) for part in trajectory.response]

    record = {"level": 3, "map": ["FFG", "HFF", "FSH"]}
    assert parts(from_record(record)) == [LatentSpan, r"\boxed{U,U,R}"]
    assert parts(from_record(record, "cot")) == [
        "<think>The elf is at r3c2 and the gift is at r1c3. Distance from the gift: r2c3 r1c2; r2c2 r1c1; r3c2.",
        LatentSpan,
        r" Path: r3c2 up r2c2 up r1c2 right r1c3.</think>\boxed{U,U,R}",
    ]
    question = from_record({"steps": 3, "map": record["map"], "plan": "DUL", "safe": False}, "cot")
    assert parts(question) == [
        "<think>The elf is at r3c2.",
        LatentSpan,
        r" Walk: r3c2 down r3c2 up r2c2 left r2c1 hole.</think>\boxed{B}",
    ]
    assert question.prompt[0].segments[1].text == (
        "The elf moves D,U,L. Moves off the board do nothing. Where does it end? A: at the gift. "
        r"B: in a hole. C: safe, but not at the gift. Answer in \boxed{}. Think step by step."
    )


def test_helper_images_differ_from_the_question_s_and_have_its_size():
    for task in ("vsp-planning", "vsp-reasoning"):
        changed = 0
        for example in examples(task, 30, cell=28):
            question, helper = next(example.images()).load(), example.spans[0].helper.load()
            assert question.size == helper.size == (28 * example.meta["level"],) * 2
            changed += question.tobytes() != helper.tobytes()
        assert changed > 20  # a plan may end its first half where it began


def test_reasoning_is_balanced_and_length_does_not_tell():
    made = examples("vsp-reasoning", 1800, levels=(3, 5))
    for example in made:
        assert naive_walk(example.meta["map"], example.meta["plan"])[1] == example.answer
        assert shortest_path(Maze.from_rows(example.meta["map"]))
    table = Counter((len(example.meta["plan"]), example.answer) for example in made)
    for letter in "ABC":
        assert 520 < sum(table[length, letter] for length in range(1, 10)) < 680
        assert all(table[length, letter] > 35 for length in range(1, 10))


def test_perception_never_shows_a_plan_and_answers_match_the_map():
    for example in examples("vsp-perception", 400):
        maze = Maze.from_rows(example.meta["map"])
        match example.meta["kind"]:
            case "map":
                assert example.text.replace(" ", "").split("/") == example.meta["map"]
            case "path":
                cells = [tuple(int(n) - 1 for n in cell) for cell in re.findall(r"r(\d)c(\d)", example.text)]
                assert len(set(cells)) == len(cells) > 1 and not maze.holes & set(cells)
                assert (cells[0], cells[-1]) != (maze.start, maze.goal)
                for (r, c), word, after in zip(cells, example.text.split()[1::2], cells[1:], strict=False):
                    assert (r + WORDS[word][0], c + WORDS[word][1]) == after
            case "place":
                row, column, what = re.search(r", r(\d)c(\d) (\w+)$", example.text).groups()
                letter = {"start": "S", "gift": "G", "ice": "F", "hole": "H"}[what]
                assert maze[int(row) - 1, int(column) - 1] == letter
        assert not example.spans


def test_to_look_is_to_think_of_the_cells_that_are_asked_for():
    kinds = Counter()
    for example in examples("vsp-perception", 200, style="look"):
        maze = Maze.from_rows(example.meta["map"])
        kinds[kind := example.meta["kind"]] += 1
        (span,) = example.spans
        looked_at = [cell_in(region, maze.size) for region in span.regions]
        answer = re.findall(r"r(\d)c(\d) (\w+)", example.text)
        assert [(int(row) - 1, int(column) - 1) for row, column, _ in answer] == looked_at
        names = {"S": "start", "G": "gift", "F": "ice", "H": "hole"}
        assert [word for *_, word in answer] == [names[maze[cell]] for cell in looked_at]
        picture, helper = (np.asarray(x.load()) for x in (next(example.images()), span.helper))
        assert (picture == helper).all()
        red = (picture == (255, 0, 0)).all(axis=2)
        if kind == "look":
            assert looked_at[:2] == [maze.start, maze.goal] and looked_at[2:] == sorted(maze.holes) and not red.any()
        else:
            crossed = {(r // 64, c // 64) for r, c in zip(*red.nonzero(), strict=True)}
            assert crossed == set(looked_at) and (looked_at[0], looked_at[-1]) != (maze.start, maze.goal)
    assert min(kinds["look"], kinds["follow"]) > 60 and kinds.total() == 200


def cell_in(box, side):
    """The cell that a box in fractions of the picture is, exactly."""
    left, top, right, bottom = (round(side * edge, 9) for edge in box)
    assert (right - left, bottom - top) == (1, 1)
    return int(top), int(left)


@pytest.mark.parametrize("task", [PLANNING, REASONING], ids=lambda task: task.name)
def test_every_style_thinks_the_same_cells(task):
    """Cells in latents, step by step and in words: those that the simulator enters, without the start."""
    data = GeneratedDataset(task.name, (3, 4, 5, 6), 60, seed=3, style="plain")
    for i in range(60):
        meta = data[i].meta
        side = len(meta["map"])
        record = {"map": meta["map"], "level": side}
        if task is REASONING:
            moves = meta["plan"]
            safe = naive_walk(meta["map"], moves)[1] != "B"
            record |= {"plan": moves, "steps": len(moves), "safe": safe}
        else:
            moves = data[i].answer.replace(",", "")
        entered = naive_walk(meta["map"], moves)[0][1:]
        made = {style: from_record(record, style=style) for style in task.styles}
        assert {example.answer for example in made.values()} == {made["plain"].answer}
        assert all(task.score(example).correct for example in made.values())
        box = rf"\boxed{{{made['plain'].answer}}}"
        for style in ("plain", "shown", "cells", "steps", "direct"):
            assert made[style].text == box
        named = "".join(f" r{row + 1}c{column + 1}" for row, column in entered)
        assert made["words"].text == f"<think>{named}</think>{box}"
        (span,) = made["cells"].spans
        assert [cell_in(region, side) for region in span.regions] == entered
        steps = made["steps"].spans
        assert [cell_in(step.regions[0], side) for step in steps] == entered
        for step, (row, column) in zip(steps, entered, strict=True):
            plain, moved = (np.asarray(x.load()) for x in (next(made["plain"].images()), step.helper))
            cells = {(r, c) for r in range(side) for c in range(side)}
            differ = {(r, c) for r, c in cells if (plain != moved)[64 * r : 64 * r + 64, 64 * c : 64 * c + 64].any()}
            assert differ <= {(row, column), made_start(meta["map"])}, "only the elf moves"
        shown = list(made["shown"].images())
        assert len(shown) == 2 and shown[1].load().tobytes() == made["direct"].spans[0].helper.load().tobytes()
        assert [len(list(made[style].images())) for style in ("plain", "words", "cells")] == [1, 1, 1]
        if task is PLANNING:
            waves = naive_waves(meta["map"])
            (span,) = made["waves"].spans
            found = [[cell_in(r[j : j + 4], side) for j in range(0, len(r), 4)] for r in span.regions]
            assert [set(cells) for cells in found] == waves and [len(c) for c in found] == [len(w) for w in waves]
            named = "; ".join(" ".join(f"r{r + 1}c{c + 1}" for r, c in cells) for cells in found)
            assert made["wave-words"].text == f"<think> {named}</think>{box}" and made["waves"].text == box


def naive_waves(rows):
    """Sets of cells by their distance from the gift, from 1 to that of the elf, by relaxing all distances."""
    side = len(rows)
    cells = [(r, c) for r in range(side) for c in range(side) if rows[r][c] != "H"]
    far = {cell: 0 if rows[cell[0]][cell[1]] == "G" else 99 for cell in cells}
    for _ in cells:
        for r, c in cells:
            around = [far[n] for n in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)) if n in far]
            far[r, c] = min([far[r, c], *(d + 1 for d in around)])
    return [{cell for cell in cells if far[cell] == d} for d in range(1, far[made_start(rows)] + 1)]


def made_start(rows):
    return next((r, row.index("S")) for r, row in enumerate(rows) if "S" in row)


def test_the_shown_style_needs_its_picture():
    with pytest.raises(MirageError, match="has the helper image in its prompt; give one"):
        PLANNING.prompt(Image("x.png"), "shown")


def test_parse_moves():
    assert parse_moves(" up, DOWN left r") == "UDLR"
    assert parse_moves("L,U,U,R,") == "LUUR"
    for bad in ("", ",", "u p", "north", "U->D", "1", "L;R"):
        assert parse_moves(bad) is None


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"level": 3}, "map: missing"),
        ({**MAP, "level": 4}, "level: it says 4"),
        ({**MAP, "level": "3"}, "level: must be a whole number"),
        ({**MAP, "map": "SFG"}, "map: must be a list"),
        ({**MAP, "map": ["SFG", "FHF", "FF"]}, "map: a map must be square"),
        ({**MAP, "map": ["SHG", "HHF", "FFF"]}, "map: no safe path"),
        ({**QUESTION, "plan": "RX"}, "plan: 'RX'"),
        ({**QUESTION, "steps": 3}, "steps: it says 3"),
        ({**QUESTION, "safe": True}, "safe: it says true"),
        ({key: QUESTION[key] for key in ("steps", "map", "plan")}, "safe: missing"),
        ([], "must be an object"),
    ],
)
def test_bad_records_name_the_field(record, field):
    with pytest.raises(MirageError, match=field):
        from_record(record)


def test_unknown_names_are_refused():
    with pytest.raises(MirageError, match="vsp-planning, vsp-reasoning, vsp-perception"):
        get_task("vsp")
    with pytest.raises(MirageError, match="direct, cot"):
        PLANNING.prompt(Image("x.png"), "long")
    with pytest.raises(MirageError, match="needs a plan"):
        REASONING.prompt(Image("x.png"))
    with pytest.raises(MirageError, match="levels"):
        GeneratedDataset("vsp-planning", [1], 5)


def test_train_and_test_are_disjoint_by_map_across_seeds_and_tasks():
    maps = {"train": set(), "test": set()}
    for split, seen in maps.items():
        for task in task_names()[:3]:
            for seed in (0, 1):
                for example in examples(task, 60, levels=(3, 4), split=split, seed=seed):
                    seen.add(tuple(example.meta["map"]))
                    assert split_of("/".join(example.meta["map"])) == split
    assert not maps["train"] & maps["test"]


def test_items_depend_on_their_number_and_seed_only():
    data = GeneratedDataset("vsp-reasoning", [3, 4, 5], 12, seed=4, style="mixed")
    again = pickle.loads(pickle.dumps(data))
    assert [again[i].meta for i in reversed(range(12))] == [data[i].meta for i in reversed(range(12))]
    assert data[-1].meta == data[11].meta and len(data) == 12
    assert [data[i].meta["level"] for i in range(4)] == [3, 4, 5, 3]
    assert data[0].meta != GeneratedDataset("vsp-reasoning", [3, 4, 5], 12, seed=5, style="mixed")[0].meta
    with pytest.raises(IndexError):
        data[12]


def test_styles_can_be_compared_on_the_same_maps():
    def maps(style, **options):
        return [example.meta["map"] for example in GeneratedDataset("vsp-planning", [4], 8, style=style, **options)]

    assert maps("words") == maps("cells") == maps("plain") == maps("cot", drawn_as="plain")
    assert maps("cot") != maps("plain") != maps("direct")


def test_written_data_is_the_same_byte_for_byte(tmp_path):
    calls = []
    for name in ("one", "two"):
        out = tmp_path / name
        write_dataset(
            "vsp-planning",
            [3, 4],
            6,
            out,
            n_test=2,
            style="cot",
            cell=28,
            progress=lambda *at: calls.append(at),
        )
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 2 + 2 * 8
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    assert calls[:8] == [(i, 8) for i in range(1, 9)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]

    lines = (tmp_path / "one" / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["meta"]["level"] for record in records] == [3, 4] * 3
    named = re.findall(r"images/[\w-]+\.png", "".join(lines))
    assert len(named) == 12 and all((tmp_path / "one" / name).is_file() for name in named)


def test_nothing_is_half_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("keep")
    with pytest.raises(MirageError, match="not an empty folder"):
        write_dataset("vsp-planning", [3], 1, tmp_path / "full", n_test=0)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset("vsp-planning", [3], 3, tmp_path / "new", n_test=0, progress=interrupt)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "precious"]
