"""From trajectories to tensors: tokens, labels, spans, pictures, and what is refused."""

from dataclasses import replace

import PIL.Image
import pytest
import torch
from support import dialogue, picture, ragged, span

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.encoding import Encoder
from mirage_vlm.trajectory import Image, LatentSpan, Message, Text, Trajectory, assistant_turn, user_turn


@pytest.fixture
def encoder(tiny) -> Encoder:
    return tiny.encoder


def written(encoder: Encoder, ids) -> str:
    return encoder.tokenizer.decode(list(ids), skip_special_tokens=False)


def thought(k: int) -> str:
    return "<|latent_start|>" + "<|latent_pad|>" * k + "<|latent_end|>"


def seen(patches: int) -> str:
    return "<|vision_start|>" + "<|image_pad|>" * patches + "<|vision_end|>"


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_an_example_reads_as_the_chat_form_says(encoder):
    trajectory = Trajectory(
        (
            Message("system", (Text("Answer with moves"),)),
            user_turn(picture(3, 2, 0), " Which way? ", picture(1, 1, 1)),
            assistant_turn("Go up."),
            user_turn("And then?"),
            assistant_turn("right ", span(0, 2), span(1), r" \boxed{R}"),
        )
    )
    ids = encoder.example(trajectory).input_ids
    assert written(encoder, ids) == (
        "<|im_start|>system\nAnswer with moves<|im_end|>\n"
        f"<|im_start|>user\n{seen(6)} Which way? {seen(1)}<|im_end|>\n"
        "<|im_start|>assistant\nGo up.<|im_end|>\n"
        "<|im_start|>user\nAnd then?<|im_end|>\n"
        f"<|im_start|>assistant\nright {thought(2)}{thought(3)} \\boxed{{R}}<|im_end|>"
    )
    assert (ids == encoder.config.pad_id).sum() == 5, "each latent is one token"


def test_the_prompt_is_the_same_in_training_and_decoding(tiny, encoder, monkeypatch):
    """Not as text: token for token, and picture for picture, in what the model is fed."""
    read, seen = [], []
    positions, features = type(tiny).positions, type(tiny.family).image_features

    def spy(self, input_ids, *rest):
        read.append(input_ids)
        return positions(self, input_ids, *rest)

    def spy_on_pictures(self, model, pixels, grid):
        seen.append(pixels)
        return features(self, model, pixels, grid)

    monkeypatch.setattr(type(tiny), "positions", spy)
    monkeypatch.setattr(type(tiny.family), "image_features", spy_on_pictures)
    for trajectory in ragged():
        example = encoder.example(trajectory)
        tiny.generate([trajectory], max_new_tokens=1)
        ids, pixels = read.pop(), seen.pop() if seen else None
        length = ids.shape[1]
        assert ids[0].tolist() == example.input_ids[:length].tolist()
        assert written(encoder, ids[0]).endswith("<|im_start|>assistant\n")
        assert (example.labels[:length] == -100).all()
        if example.images is None:
            assert pixels is None
        else:
            assert torch.equal(pixels, example.images.pixel_values)


def test_words_keep_their_tokens_beside_a_span(encoder):
    """A span is a wall: what follows it is tokenised as if it stood alone, as decoding writes it."""
    left, right = "The gift is at r3", "c3. Go up"
    ids = encoder.example(dialogue(["Go"], [left, span(0, 1), right])).input_ids.tolist()
    at = ids.index(encoder.config.start_id)

    def alone(text):
        return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids[at - len(alone(left)) : at] == alone(left)
    assert ids[at + 3 : -1] == alone(right)


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixed", "learned"])
def test_labels(encoder, rule):
    encoder = replace(encoder, config=replace(encoder.config, stop_rule=rule))
    config = encoder.config
    for trajectory in ragged():
        example = encoder.example(trajectory)
        prompt, _ = encoder.prompt(trajectory.prompt)
        before = None
        for t, (token, label) in enumerate(zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)):
            if t < len(prompt):
                expected = -100
            elif token != config.pad_id:
                expected = token  # text, latent_start, latent_end and the end of the turn
            elif rule == "learned" and before == config.pad_id:
                expected = token  # go on thinking
            else:
                expected = -100
            assert label == expected, f"position {t}, token {token}"
            before = token
        assert example.labels[-1] == encoder.tokenizer.eos_token_id


def test_a_learned_span_counts_its_own_length(encoder):
    """Under `learned`, a span of k gives k − 1 labels to go on and one to end."""
    encoder = replace(encoder, config=replace(encoder.config, stop_rule="learned"))
    labels = encoder.example(dialogue(["Go"], [span(0, 1), span(1, 4)])).labels
    assert (labels == encoder.config.pad_id).sum() == 0 + 3
    assert (labels == encoder.config.end_id).sum() == 2


# -- spans and helper images -----------------------------------------------------------------------------------------


def test_a_span_without_k_takes_the_models(encoder):
    for size in (1, 5):
        sized = replace(encoder, config=replace(encoder.config, latent_size=size))
        ids = sized.example(dialogue(["Go"], [span(0), span(1, 2)])).input_ids
        assert (ids == encoder.config.pad_id).sum() == size + 2


def test_k_larger_than_the_helpers_patches(encoder, tmp_path):
    helper = tmp_path / "helper.png"
    picture(2, 1, 0).load().save(helper)
    trajectory = dialogue(["Go"], [LatentSpan(helper=Image(helper), k=3)])
    with pytest.raises(MirageError, match=rf"k = 3 latents .* the 2 patches of {helper}"):
        encoder.example(trajectory)
    for pooling in ("grid", "random"):
        with pytest.raises(MirageError, match="k = 3"):
            replace(encoder, config=replace(encoder.config, pooling=pooling)).example(trajectory)


def test_without_targets_helper_images_stay_closed(encoder):
    def refuse() -> PIL.Image.Image:
        raise AssertionError("opened")

    example = encoder.example(dialogue(["Go"], [LatentSpan(helper=Image(refuse), k=9)]), targets=False)
    assert example.helpers is None
    assert (example.input_ids == encoder.config.pad_id).sum() == 9


@pytest.mark.parametrize("targets", [True, False])
def test_full_pooling_takes_the_length_from_the_helper(encoder, targets):
    encoder = replace(encoder, config=replace(encoder.config, pooling="full"))
    example = encoder.example(dialogue(["Go"], [span(0, 2, 3, 4), "and", span(1, None, 2, 1)]), targets=targets)
    assert thought(12) + "and" + thought(2) in written(encoder, example.input_ids)
    assert (example.helpers is not None) == targets


def test_a_span_without_helper(encoder):
    with pytest.raises(MirageError, match="a latent span has no helper image"):
        encoder.example(dialogue(["Go"], [LatentSpan(k=2)]))


# -- pictures --------------------------------------------------------------------------------------------------------


def test_several_pictures_are_those_of_each_alone(encoder):
    pictures = [picture(3, 1, 0), picture(1, 2, 1), picture(2, 2, 2)]
    ids, found = encoder.prompt([user_turn(pictures[0], "a"), assistant_turn("b"), user_turn(pictures[1], pictures[2])])
    assert found.grid_thw.tolist() == [[1, 2, 6], [1, 4, 2], [1, 4, 4]]
    assert ids.count(encoder.family.image_token_id) == 3 + 2 + 4
    alone = [encoder.prompt([user_turn(one)])[1] for one in pictures]
    assert torch.equal(found.pixel_values, torch.cat([one.pixel_values for one in alone]))


@pytest.mark.parametrize(("scale", "patches"), [(0.4375, 6), (0.875, 24), (1.0, 35)])
def test_pictures_are_resized_by_the_checkpoints_scale(encoder, scale, patches):
    encoder = replace(encoder, config=replace(encoder.config, image_scale=scale))
    ids, _ = encoder.prompt([user_turn(Image(PIL.Image.new("RGB", (192, 128))))])  # 192 → 84, 168, 192 (7 · 28 = 196)
    assert ids.count(encoder.family.image_token_id) == patches


def test_pixels_are_in_raster_order_of_merged_patches(encoder):
    """One bright cell of the picture is bright in its own merged patch and nowhere else."""
    for cell in range(6):
        canvas = PIL.Image.new("RGB", (192, 128))
        canvas.paste((255, 255, 255), (64 * (cell % 3), 64 * (cell // 3), 64 * (cell % 3) + 64, 64 * (cell // 3) + 64))
        pixels = encoder.pictures([Image(canvas)]).pixel_values
        brightness = pixels.reshape(6, -1).mean(dim=1)  # four patches, one after the other, make a merged patch
        assert brightness.argmax() == cell
        assert brightness.sort().values[-1] - brightness.sort().values[-2] > 1


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context(encoder):
    words = "up, " * 300
    with pytest.raises(
        MirageError, match=r"a prompt has \d{3,} tokens, but the model's context holds 512: use smaller"
    ):
        encoder.prompt([user_turn(words)])
    with pytest.raises(MirageError, match="a prompt has"):
        encoder.prompt([user_turn(*(picture(14, 14, i) for i in range(3)))])
    with pytest.raises(MirageError, match=r"an example has \d{3,} tokens"):
        encoder.example(dialogue(["Go"], [words]))


def test_the_context_may_be_filled_to_the_last_token(encoder):
    empty = len(encoder.prompt([user_turn("")])[0])
    fits = "!" * (512 - empty)
    assert len(encoder.prompt([user_turn(fits)])[0]) == 512
    with pytest.raises(MirageError, match="a prompt has 513 tokens"):
        encoder.prompt([user_turn(fits + "!")])


def test_segments_where_they_cannot_be(encoder):
    with pytest.raises(MirageError, match="an earlier turn holds a latent span"):
        encoder.prompt([assistant_turn(span(0)), user_turn("Go")])
    with pytest.raises(MirageError, match="a response holds a picture"):
        encoder.example(dialogue(["Go"], [picture(1, 1, 0)]))


def test_pictures_that_cannot_be_used(encoder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("broken.png", "missing.png"):
        with pytest.raises(MirageError, match=f"cannot read the picture {tmp_path / name}"):
            encoder.prompt([user_turn(Image(tmp_path / name))])
    with pytest.raises(MirageError, match=r"cannot process .* aspect ratio"):
        encoder.prompt([user_turn(Image(PIL.Image.new("RGB", (4000, 3))))])


# -- reading in place ------------------------------------------------------------------------------------------------


def test_a_reading_labels_the_patches_themselves(encoder):
    """The state at a patch's own position learns to say the patch's word: its label stands one further."""
    words = (" up", " gift", " hole", " elf")
    read, plain = replace(picture(2, 2, 1), reading=words), picture(3, 1, 2)
    example = encoder.example(dialogue(["Go", plain, read, "Which way?"], ["up"]))
    patches = (example.input_ids == encoder.family.image_token_id).nonzero().flatten()
    assert len(patches) == 3 + 4
    assert (example.labels[patches[:3]] == -100).all(), "a picture without a reading bears no labels"
    said = [encoder.tokenizer.decode([i]) for i in example.labels[patches[3:] + 1]]
    assert said == list(words)
    silent = encoder.example(dialogue(["Go", plain, replace(read, reading=None), "Which way?"], ["up"]))
    assert (example.labels != silent.labels).sum() == 4


@pytest.mark.parametrize("reading", [(" up",), (" up", " up", " up", "a word that is not one token")])
def test_a_reading_that_does_not_fit(encoder, reading):
    with pytest.raises(MirageError, match="must be one token for each of its 4 patches"):
        encoder.example(dialogue([replace(picture(2, 2, 1), reading=reading)], ["up"]))
