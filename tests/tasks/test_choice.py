"""Choice: what counts as an answer, and above all what does not."""

import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks import get_task
from mirage_vlm.tasks.choices import same_answer
from mirage_vlm.trajectory import Text, Trajectory, assistant_turn, user_turn

CHOICE = get_task("choice")
PLACES = {"choices": {"A": "in a hole", "B": "on safe ground", "C": "A cell", "D": "none"}, "letter": "B"}


def scored(response, meta):
    return CHOICE.score(
        Trajectory((user_turn("Where is the elf?"), assistant_turn(Text(response))), task="choice", meta=meta)
    )


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{B}",
        r"It may be A, but no. \boxed{(b)}",
        r"\boxed{A}, or rather \boxed{B.}",  # the last box counts
        r"\boxed{On safe ground}",
        r"\boxed{B: on safe ground}",
        r"\boxed{ B }",
        "B",
        "(B) on safe  ground.",
        "**B**",
    ],
)
def test_right_letters(response):
    found = scored(response, PLACES)
    assert (found.correct, found.valid, found.verdict) == (True, True, "B is right")


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (r"\boxed{A}", "A is wrong: it is B"),
        (r"\boxed{B} or \boxed{A}", "A is wrong: it is B"),
        (r"\boxed{a cell}", "C is wrong: it is B"),
    ],
)
def test_wrong_letters_are_valid(response, verdict):
    found = scored(response, PLACES)
    assert (found.correct, found.valid, found.verdict) == (False, True, verdict)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (r"\boxed{A or B}", "'A or B' is not one choice"),
        (r"\boxed{A, B, C, D}", "'A, B, C, D' is not one choice"),
        (r"\boxed{B, not A}", "'B, not A' is not one choice"),
        (r"\boxed{not B}", "'not B' is not one choice"),
        (r"\boxed{B: in a hole}", "'B: in a hole' is not one choice"),  # the text of another
        (r"The answer is \boxed{B", r"\boxed{} is not closed"),
        (r"\boxed{E}", "'E' is not one choice"),
        (r"\boxed{}", "no answer"),
        ("", "no answer"),
        ("I think it is B", "'I think it is B' is not one choice"),
    ],
)
def test_what_is_not_one_choice_is_wrong_and_says_so(response, reason):
    found = scored(response, PLACES)
    assert (found.correct, found.valid, found.verdict) == (False, False, reason)


def test_a_letter_alone_is_the_letter():
    """Even where the text of A is `B`; a text that two choices share is ambiguous."""
    meta = {"choices": {"A": "B", "B": "A"}, "letter": "B"}
    assert scored(r"\boxed{B}", meta).verdict == "B is right"
    assert scored(r"\boxed{(a)}", meta).verdict == "A is wrong: it is B"
    assert scored(r"\boxed{B: A}", meta).correct
    same = {"choices": {"A": "red", "B": "Red"}, "letter": "B"}
    assert scored(r"\boxed{red}", same).verdict == "'red' is A and B"


def test_choices_in_the_picture_have_letters_alone():
    meta = {"choices": dict.fromkeys("ABCDE", ""), "letter": "E"}
    assert scored(r"\boxed{e}", meta).correct
    assert not scored(r"\boxed{}", meta).correct


@pytest.mark.parametrize(
    ("given", "truth"),
    [
        (".50", "0.5"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"$\dfrac{2}{4}$", "1/2"),
        ("1,000", "1000"),
        ("7.", "7"),
        ("1e3", "1000"),
        ("\u22123", "-3"),
        (r"45^\circ", "45°"),
        ("Purple.", "purple"),
        ("  the  Red\nblock ", "the red block"),
        ("012", "012"),
        ("50 %", "50%"),
        ("5 cm", "5cm"),
        ("5.0 cm", "5 cm."),
        ("1,000 Meters", "1000 meters"),
        (r"$\frac{1}{2}$ km", "0.5km"),
        (r"45 ^\circ", "45.0°"),
    ],
)
def test_same_answers(given, truth):
    assert same_answer(given, truth)
    assert same_answer(truth, given)


@pytest.mark.parametrize(
    ("given", "truth"),
    [
        ("12", "012"),  # digits, not a number
        ("0.5000001", "0.5"),
        ("1,00", "100"),
        ("50%", "50"),
        ("50%", "0.5"),
        ("45", "45°"),
        ("-3", "3"),
        (".5", "5"),
        ("5", ".5"),
        ("red block", "red"),
        ("7 or 8", "7"),
        ("nan", "0"),
        ("1/0", "0"),
        ("5 cm", "5"),
        ("5 cm", "5 m"),
        ("5 cm", "6 cm"),
        ("012 cm", "12 cm"),
        ("5:30", "5.0:30"),
    ],
)
def test_other_answers(given, truth):
    assert not same_answer(given, truth)
    assert not same_answer(truth, given)


def test_lists_are_whole_and_in_any_order():
    for given in ("above, left", "Left and above", "left above", "left; above."):
        assert same_answer(given, ["above", "left"])
    for given in ("above", "above, left, right", "above, right", "aboveleft", ""):
        assert not same_answer(given, ["above", "left"])


@pytest.mark.parametrize(
    ("truth", "right", "wrong"),
    [
        (
            ["upper left", "lower right"],
            ["upper left, lower right", "Lower right and upper left.", "lower right; upper left"],
            ["upper left", "upper, left, lower, right", "upper right, lower left", "upper left lower right"],
        ),
        (["New York", "Rome"], ["New York, Rome", "Rome, and New York"], ["York, New Rome", "New York"]),
        (["1,000", "2"], ["1,000, 2", "2 and 1000", "1000 2", "2,1,000"], ["1, 2", "1,000", "1, 000, 2"]),
        (["100", "200"], ["100,200", "200, 100"], ["100200", "100"]),
        (["50%", "20%"], ["50 %, 20 %", "20% 50%"], ["50, 20"]),
        (["5 cm", "3 cm"], ["3cm, 5.0 cm", "5 cm and 3 cm"], ["5, 3", "5 3 cm"]),
    ],
)
def test_lists_of_parts_with_spaces_commas_and_units(truth, right, wrong):
    assert [given for given in right if not same_answer(given, truth)] == []
    assert [given for given in wrong if same_answer(given, truth)] == []


def test_open_answers():
    assert scored(r"So \boxed{1,000}", {"answer": "1000"}).correct
    assert scored("1000", {"answer": "1000"}).correct
    wrong = scored(r"\boxed{10}", {"answer": "1000"})
    assert (wrong.correct, wrong.valid, wrong.verdict) == (False, True, "'10' is wrong: it is '1000'")
    assert scored("It is 1000", {"answer": "1000"}).correct is False  # a sentence is no answer
    assert scored(r"\boxed{1000", {"answer": "1000"}).verdict == r"\boxed{} is not closed"
    assert scored(r"\boxed{.}", {"answer": "1000"}).verdict == "no answer"


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, 'neither "choices" with a "letter" nor "answer"'),
        ({"choices": ["a", "b"], "letter": "A"}, '"choices" in meta must be an object of texts'),
        ({"choices": {"A": "a", "B": "b"}}, '"letter" in meta is None, which is none of A, B'),
        ({"choices": {"A": "a", "B": "b"}, "letter": "C"}, "\"letter\" in meta is 'C'"),
        ({"answer": 5}, '"answer" in meta must be a text or a list of texts, not 5'),
        ({"answer": []}, '"answer" in meta must be'),
    ],
)
def test_examples_that_cannot_be_scored(meta, message):
    with pytest.raises(MirageError, match=r"^cannot score: ") as caught:
        scored(r"\boxed{A}", meta)
    assert message in str(caught.value)


def test_there_is_no_generator():
    with pytest.raises(MirageError, match="choice has no generator"):
        CHOICE.make(None, 1)
