r"""Texts are taken apart at the mark and the box, and judged by rules."""

import random

import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.reasoning.accept import Rules, Written, answer_check, judge, phrases
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.base import boxed, find_boxed
from mirage_vlm.tasks.frozenlake import Maze
from mirage_vlm.trajectory import Image, LatentSpan, Text, Trajectory, assistant_turn, user_turn

BEFORE, AFTER = "I look for a way around the holes, step by step. ", " Now I can read it off."
SPAN = LatentSpan(Image("helper.png"))


def example(answer="B", pictures=1, question="Which one is it?", **known) -> Trajectory:
    prompt = user_turn(*[Image(f"{i}.png") for i in range(pictures)], question)
    return Trajectory((prompt, assistant_turn(SPAN, rf"\boxed{{{answer}}}")), answer=answer, **known)


def faults_of(text: str, of: Trajectory | None = None, rules: Rules = Rules()) -> list[str]:
    of = of or example()
    written, faults = judge(text, of, rules, answer_check(of))
    assert (written is None) == bool(faults)
    return faults


def test_an_accepted_text_becomes_a_response():
    of = example()
    written, faults = judge(rf" {BEFORE}<helper/>{AFTER}" + "\n\n\\boxed{b}.\n", of, Rules(), answer_check(of))
    assert faults == []
    assert written == Written(BEFORE, AFTER, "B")  # as the reference answer is written
    assert written.response(SPAN) == (
        Text(f"<think>{BEFORE}"),
        SPAN,
        Text(f"{AFTER}</think>" + r"\boxed{B}"),
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "there is no text"),
        (rf"{BEFORE}{AFTER}\boxed{{B}}", "exactly once, but it stands there 0 times"),
        (rf"{BEFORE}<helper/>{AFTER}<helper/>\boxed{{B}}", "exactly once, but it stands there 2 times"),
        (rf"{BEFORE}<Helper />{AFTER}\boxed{{B}}", "<Helper /> is not the mark"),
        (rf"{BEFORE}<helper/>x</helper>{AFTER}\boxed{{B}}", "</helper> is not the mark"),
        (rf"{BEFORE}{AFTER}\boxed{{B}} <helper/>", "must stand before the final answer"),
        (rf"{BEFORE}<helper/>{AFTER}", r"does not end with the final answer in \boxed{}"),
        (rf"{BEFORE}<helper/>{AFTER}\boxed{{B", r"does not end with the final answer in \boxed{}"),
        (rf"{BEFORE}<helper/>{AFTER}\boxed{{B}} as I said", "nothing may follow"),
        (rf"{BEFORE}\boxed{{A}}<helper/>{AFTER}\boxed{{B}}", r"there must be one \boxed{}"),
        (rf"{BEFORE}<helper/>{AFTER}\boxed{{A}}", r"\boxed{A} is wrong; it must be \boxed{B}"),
        (r"<helper/> So \boxed{B}", "has 1 words, but a reasoning has at least 8"),
        (rf"{BEFORE}<helper/>{'on ' * 300}\boxed{{B}}", "but may have 300"),
        (rf"{BEFORE}<|latent_start|><helper/>{AFTER}\boxed{{B}}", "<|latent_start|> must not stand"),
        (rf"{BEFORE}<helper/><think>{AFTER}\boxed{{B}}", "<think> must not stand"),
        (f"{BEFORE}\ud800<helper/>{AFTER}" + r"\boxed{B}", "surrogate"),
    ],
)
def test_what_speaks_against_a_text(text, fault):
    assert fault in "; ".join(faults_of(text))


def test_all_faults_are_told_at_once():
    assert len(faults_of(r"The helper image shows it. \boxed{A}")) == 4  # mark, answer, words, phrase


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"a \boxed{B} c", r"\boxed{B}"),
        (r"\boxed{A} or \boxed{\text{in {B}}}}", r"\boxed{\text{in {B}}}"),
        (r"a \boxed{}", r"\boxed{}"),
        (r"\boxed{A} \boxed{B", None),
        ("boxed{A}", None),
    ],
)
def test_where_the_box_is(text, box):
    place = find_boxed(text)
    assert (None if place is None else text[slice(*place)]) == box
    assert place is None or place[0] == text.rindex(box)
    assert (boxed(text) is None) == (box is None)


def test_words_are_counted_without_mark_and_box():
    text = r"one two three four<helper/>five six seven eight \boxed{B}"
    assert faults_of(text, rules=Rules(max_words=8)) == []
    assert faults_of("zero " + text, rules=Rules(max_words=8)) == ["the text has 9 words, but may have 8"]


@pytest.mark.parametrize("thought", ["<think>Hm. <helper/> \\boxed{A}</think>\n", "the start is left out</think> "])
def test_a_thought_of_the_writers_own_is_left_out(thought):
    assert faults_of(rf"{thought}{BEFORE}<helper/>{AFTER}\boxed{{B}}") == []


def test_a_text_inside_think_tags_is_the_text():
    of = example()
    text = rf"<think>{BEFORE}<helper/>{AFTER}</think>\boxed{{B}}"
    assert judge(text, of, Rules(), answer_check(of)) == (Written(BEFORE, AFTER, "B"), [])


def test_signs_around_the_box_are_left_out():
    of = example()
    written, _ = judge(rf"{BEFORE}<helper/> So it is **$\boxed{{B}}$**.", of, Rules(), answer_check(of))
    assert written is not None and written.after == " So it is"


# what a reader of the prompt alone cannot know of, and what is like it but allowed; by the number of its pictures
UNSEEN = [
    (1, "In the helper image the path is red"),
    (1, "as the *helper* picture has it"),
    (1, "Look at the second image"),
    (1, "in the 2nd picture"),
    (1, "The first image has the map"),
    (1, "as image 2 shows"),
    (1, "see Picture #2"),
    (1, "photo two has it"),
    (1, "the provided solution image"),
    (1, "as shown in the annotated\nimage"),
    (1, "the marked map"),
    (1, "as shown in the solution"),
    (1, "the last picture"),
    (1, "both images agree"),
    (1, "the other picture"),
    (1, "the images"),
    (1, "the provided images"),
    (1, "in the modified picture"),
    (1, "the given answer is B"),
    (1, "the answer is given"),
    (1, "I was told the answer"),
    (1, "we are given that the answer is B"),
    (1, "according to the solution"),
    (2, "the third image"),
    (2, "image 3"),
    (2, "the reference figure"),
    (0, "in the picture"),
    (0, "the given photo"),
]
SEEN = [
    (1, "In the image the elf is at a1"),
    (1, "the picture shows a hole"),
    (1, "I picture two moves to the left"),
    (1, "Let me picture one way"),
    (1, "I imagine the path drawn in red"),
    (1, "the second row and the third column"),
    (1, "the correct answer is B"),
    (1, "so the solution is to go left"),
    (1, "in image 10x larger"),
    (2, "the second image"),
    (2, "image 2 has it"),
    (2, "both images"),
    (2, "the other picture"),
    (2, "the last picture"),
    (0, "I picture the board"),
]


@pytest.mark.parametrize(("pictures", "text"), UNSEEN)
def test_pictures_that_the_reader_will_not_have(pictures, text):
    assert list(phrases(text, example(pictures=pictures), Rules()))


@pytest.mark.parametrize(("pictures", "text"), SEEN)
def test_what_a_reader_can_say(pictures, text):
    assert list(phrases(text, example(pictures=pictures), Rules())) == []


def test_what_the_question_says_may_be_said():
    of = example(question="Which is the marked figure?")
    assert list(phrases("I look at the marked figure", of, Rules())) == []
    assert list(phrases("I look at the marked figure", of, Rules(forbid=("marked",)))) == ["marked"]


def test_own_rules_are_added():
    rules = Rules(forbid=(r"\bobviously\b", "red (line|path)"))
    assert list(phrases("Obviously, the red path in the second image", example(), rules)) == [
        "second image",
        "Obviously",
        "red path",
    ]


@pytest.mark.parametrize("mark", ["", " ", "<>", " <h/>", "<|latent_pad|>", r"\boxed{h}", "<image>"])
def test_marks_that_cannot_be(mark):
    with pytest.raises(MirageError, match="--mark"):
        Rules(mark=mark)


def test_another_mark():
    text = rf"{BEFORE}[PICTURE]{AFTER}\boxed{{B}}"
    assert faults_of(text, rules=Rules(mark="[PICTURE]")) == []
    assert "[picture] is not the mark" in faults_of(text + "[picture]", rules=Rules(mark="[PICTURE]"))[0]


def test_faulty_rules():
    with pytest.raises(MirageError, match=r"--forbid: '\(' is not a regular expression"):
        Rules(forbid=("(",))
    with pytest.raises(MirageError, match="--max-words must be at least 8"):
        Rules(max_words=3)


@pytest.mark.parametrize(("box", "right"), [("in a  HOLE", True), (r"\text{In a hole}", True), ("in the hole", False)])
def test_without_a_checker_the_answers_must_be_equal(box, right):
    for known in ({}, {"task": "of-nobody"}, {"task": "vsp-planning"}):  # the last without the map
        content = boxed(rf"\boxed{{{box}}}")
        assert (answer_check(example("In a hole", **known))(content) is None) == right


def test_the_tasks_checker_decides():
    of = get_task("vsp-planning").example(Maze.from_rows(["SFF", "FFF", "FFG"]), "direct", 8)
    check = answer_check(of)
    assert check(of.answer) is None
    assert check("D,D,R,R") is None and check("right right down down") is None  # whichever of them `answer` is
    assert "gift is at" in check("R")
    assert "4 would do" in check("R,L,D,D,R,R")  # it gets there, but not with the fewest moves
    other = "D,R,D,R" if of.answer != "D,R,D,R" else "R,D,R,D"
    written, _ = judge(rf"{BEFORE}<helper/>{AFTER}\boxed{{{other}}}", of, Rules(), check)
    assert written is not None and written.answer == other  # not the reference, which the text does not lead to


@pytest.mark.parametrize("answer", [None, " ", "}", "{", r"\boxed{B}"])
def test_answers_that_cannot_be_asked_for(answer):
    with pytest.raises(MirageError, match="answer:"):
        answer_check(Trajectory(example().messages, answer=answer))


def test_an_answer_that_its_own_checker_calls_wrong():
    made = get_task("vsp-planning").make(random.Random(0), 3)
    with pytest.raises(MirageError, match="the checker of vsp-planning does not take it"):
        answer_check(Trajectory(made.messages, made.task, "U,U", made.meta))
