"""How answers are read out of responses, and what each scorer would refuse of an example."""

import random
from dataclasses import replace

import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.rl.rewards import boxed_once
from mirage_vlm.tasks import faults, get_task, score, task_names, with_task
from mirage_vlm.tasks.base import boxed, count_answers, find_boxed
from mirage_vlm.trajectory import Trajectory, assistant_turn, user_turn


@pytest.mark.parametrize(
    ("text", "answer", "count"),
    [
        (r"\boxed{A}", "A", 1),
        (r"\boxed {A}", "A", 1),
        ("\\boxed\n {A}", "A", 1),
        (r"\boxed{\text{A}}", "A", 1),
        (r"\boxed{\text {A}}", "A", 1),
        (r"\boxed{\mathbf{\text{A}}}", "A", 1),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1),
        (r"\boxed{A} no, \boxed{B}", "B", 2),
        (r"\boxed{A} no, \boxed{B", None, 2),
        ("<answer>A</answer>", "A", 1),
        ("<think>x</think> <answer> A\n</answer>", "A", 1),
        ("<Answer>A</ANSWER>", "A", 1),
        ("<answer>A</answer> no <answer>B</answer>", "B", 2),
        (r"<answer>\boxed{A}</answer>", "A", 1),
        (r"\boxed{<answer>A</answer>}", "A", 1),
        (r"<answer>\text{A}</answer>", "A", 1),
        ("<answer>A", None, 1),
        ("A", None, 0),
        ("", None, 0),
        (r"\boxed A", None, 0),
    ],
)
def test_the_last_answer_that_is_opened_counts(text, answer, count):
    assert boxed(text) == answer and count_answers(text) == count
    assert (find_boxed(text) is None) == (answer is None)
    assert boxed_once([Trajectory((user_turn("q"), assistant_turn(text)))]) == [float(count == 1)]


def test_any_of_several_answers_is_right():
    example = Trajectory((user_turn("q"),), answer=("A", "the first"))

    def right(text: str, **changes: object) -> bool:
        return score(replace(example, **changes).with_response(assistant_turn(text).segments)).correct

    assert right(r"\boxed{A}") and right("the first") and not right("B")
    assert right(r"\boxed{the First.}", task="choice") and not right("B", task="choice")
    assert right("<answer>1/2</answer>", task="choice", answer="0.5")


def test_a_task_for_those_that_have_none():
    bare = Trajectory((user_turn("q"),), answer="A")
    assert with_task(bare, "choice").task == "choice" and with_task(bare, None).task is None
    assert with_task(replace(bare, task="sat"), "choice").task == "sat"
    said = Trajectory((user_turn("q"), assistant_turn("So <answer>B</answer>")))
    assert with_task(said, "choice").answer == "B" and with_task(said, None).answer is None
    assert with_task(replace(said, answer="A"), "choice").answer == "A"


MAP = ["SF", "FG"]


@pytest.mark.parametrize(
    ("task", "meta", "field", "message"),
    [
        ("nonsense", {}, "task", "there is no task 'nonsense'"),
        ("no.such.module:TASK", {}, "task", "no.such.module"),
        ("vsp-planning", {}, "meta.map", "is missing"),
        ("vsp-planning", {"map": None}, "meta.map", "is missing"),
        ("vsp-planning", {"map": "SFFG"}, "meta.map", "list of strings"),
        ("vsp-planning", {"map": [1, 2]}, "meta.map", "list of strings"),
        ("vsp-planning", {"map": ["SF", "F"]}, "meta.map", "square"),
        ("vsp-planning", {"map": ["SX", "FG"]}, "meta.map", "'X'"),
        ("vsp-reasoning", {"map": MAP}, "meta.plan", "is missing"),
        ("vsp-reasoning", {"map": MAP, "plan": "north"}, "meta.plan", "must be made of the moves"),
        ("choice", {"choices": ["a", "b"]}, "meta.choices", "must be an object of texts"),
        ("choice", {"choices": {"A": 1}}, "meta.choices", "must be an object of texts"),
        ("choice", {"choices": {"A": "a"}}, "meta.letter", "none of A"),
        ("choice", {"choices": {"A": "a"}, "letter": ["A"]}, "meta.letter", "none of A"),
        ("choice", {"answer": 5}, "meta.answer", "text or a list of texts"),
        ("choice", {}, "answer", "is missing"),
        ("vsp-perception", {}, "answer", "is missing"),
        ("geometry", {}, "meta", "kind"),
        ("geometry", {"kind": ["x"], "figure": {}}, "meta", "kind"),
        ("sat", {"kind": "turn"}, "meta", "scene"),
        ("jigsaw", {"whole": 3, "candidates": {}}, "meta", "no jigsaw"),
        ("mirage_vlm.sources.blocks:BLOCKS", {"start": [["B"]], "end": [[["B"]]]}, "meta", "stacks"),
        (None, {}, "", "neither a task nor an answer"),
    ],
)
def test_what_the_scorer_would_refuse(task, meta, field, message):
    example = Trajectory((user_turn("q"),), task=task, meta=meta)
    fault, *_ = faults(example)
    assert fault.field == field and message in fault.message
    with pytest.raises(MirageError):
        score(example)


def test_neither_task_nor_answer_is_a_fault_only_where_it_is_scored():
    assert list(faults(Trajectory((user_turn("q"),)), scored=False)) == []


@pytest.mark.parametrize("name", sorted(set(task_names()) - {"choice", "jigsaw-photo", "jigsaw-folder"}))
def test_made_examples_have_no_faults(name):
    task = get_task(name)
    try:
        example = task.make(random.Random(0), task.usual[0])
    except MirageError as fault:
        pytest.skip(f"needs files: {fault}")
    assert list(faults(example)) == []
