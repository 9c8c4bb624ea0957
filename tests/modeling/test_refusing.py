"""`Encoder.faults` says, from sizes, what `example` and `prompt` would raise; and the bounds without a model."""

import random
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
from support import dialogue, picture, ragged, span
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import fitting, read_jsonl
from mirage_vlm.trajectory import Image, LatentSpan, Trajectory, assistant_turn, user_turn

CASES = Path(__file__).parent.parent / "data" / "cases"
LONG = "way " * 600


def thin() -> Image:
    return Image(PIL.Image.new("RGB", (1, 900)))


def words(n: int) -> Image:
    return replace(picture(2, 1, 0), reading=("a",) * n)


REFUSED = [
    (dialogue(["q"], [picture(1, 1, 0), "A"]), "messages[1].content[0]", "a response holds a picture"),
    (
        Trajectory((user_turn("q"), assistant_turn(span(0), "A"), user_turn("r"), assistant_turn("B"))),
        "messages[1].content[0]",
        "an earlier turn holds a latent span",
    ),
    (dialogue([span(0), "q"], ["A"]), "messages[0].content[0]", "an earlier turn"),
    (dialogue(["q", thin()], ["A"]), "messages[0].content[1].image", "is 1 x 900 pixels"),
    (dialogue(["q"], [LatentSpan(thin())]), "messages[1].content[0].helper", "is 1 x 900 pixels"),
    (dialogue(["q"], [span(0, 7)]), "messages[1].content[0].k", "k = 7 latents cannot be pooled from the 6 patches"),
    (dialogue(["q"], [span(0, None, 1, 1)]), "messages[1].content[0].helper", "k = 3 latents"),
    (dialogue(["q"], ["A", LatentSpan(k=2)]), "messages[1].content[1].helper", "has no helper image"),
    (dialogue(["q"], [span(0, 10**9)]), "messages[1].content[0].k", "context holds 512"),
    (dialogue([LONG], ["A"]), "messages", "but the model's context holds 512"),
    (dialogue(["q"], [LONG]), "messages", "but the model's context holds 512"),
    (dialogue(["q", words(3)], ["A"]), "messages", "one token for each of its 2 patches"),
    (
        dialogue(["q"], [replace(span(0), regions=((0.0, 0.0, 1.0, 1.0),), k=2)]),
        "messages[1].content[0].k",
        "but there are 1 regions",
    ),
]


@pytest.mark.parametrize(("example", "field", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_is_refused_is_told_before(tiny, example, field, message):
    (fault,) = tiny.encoder.faults(example)
    assert fault.field == field and message in fault.message
    if (example.spans and (example.spans[0].k or 0) > 10**6) is not True:
        with pytest.raises(MirageError):
            tiny.encoder.example(example)


def test_what_is_not_refused_is_encoded(tiny):
    for example in ragged():
        assert list(tiny.encoder.faults(example)) == []
    assert list(tiny.encoder.faults(dialogue(["q", words(2)], ["A"]))) == []


def test_only_the_prompt_counts_where_there_is_nothing_to_learn(tiny):
    example = dialogue(["q"], [picture(1, 1, 0), LatentSpan(k=2), LONG])
    assert list(tiny.encoder.faults(example, response=False)) == []
    tiny.encoder.prompt(example.prompt)
    (fault,) = tiny.encoder.faults(dialogue([thin()], ["A"]), response=False)
    assert fault.field == "messages[0].content[0].image"
    assert list(tiny.encoder.faults(dialogue(["q"], [span(0, 7)]), targets=False)) == []


def test_targets_from_the_prompt(tiny):
    encoder = replace(tiny.encoder, config=replace(tiny.encoder.config, target="prompt"))
    assert list(encoder.faults(dialogue([picture(2, 2, 0)], [LatentSpan(k=4)]))) == []
    for question, k, message in (([picture(2, 2, 0)], 5, "k = 5"), (["q"], 2, "the prompt has none")):
        (fault,) = encoder.faults(dialogue(question, [LatentSpan(k=k)]))
        assert message in fault.message
        with pytest.raises(MirageError):
            encoder.example(dialogue(question, [LatentSpan(k=k)]))


def test_the_bounds_of_any_model_are_those_of_qwens_own_processor():
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28})
    rng = random.Random(0)
    ranges = [((1, 60), (1, 60)), ((1, 4000), (1, 4000)), ((1, 20), (500, 9000)), ((3000, 9000), (3000, 9000))]
    for _ in range(2000):
        (width, height) = (rng.randint(*side) for side in rng.choice(ranges))
        try:
            expected = processor.get_number_of_image_patches(height, width, {}) // 4
        except ValueError:
            with pytest.raises(ValueError, match="takes at most 200"):
                fitting.qwen_patches(width, height)
        else:
            assert fitting.qwen_patches(width, height) == expected, (width, height)


def test_the_case_of_checked_then_refused():
    found = {}
    for example in read_jsonl(CASES / "checked-then-refused.jsonl"):
        found |= {example.where.rpartition(":")[2]: [fault.field for fault in fitting.faults(example)]}
    assert found == {
        "1": [],
        "2": ["messages[1].content[0]"],
        "3": ["messages[1].content[0]"],
        "4": ["messages[0].content[0].image"],
        "5": ["messages[1].content[0].k"],
        "6": [],  # which is for the scorer to refuse
    }


def test_a_picture_that_is_not_at_hand_is_not_looked_at(tmp_path):
    for source in ("https://localhost:1/x.png", tmp_path / "gone.png"):
        assert fitting.size_of(Image(source)) is None
        assert list(fitting.faults(dialogue([Image(source)], [LatentSpan(Image(source), k=999)]))) == []
