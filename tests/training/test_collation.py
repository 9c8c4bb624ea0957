"""Batches: padding, pictures, and the order of the examples."""

import itertools
from collections import Counter

import PIL.Image
import pytest
import torch
from support import batch_of, dialogue, picture, ragged, span

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import read_data, write_jsonl
from mirage_vlm.tasks.make import GeneratedDataset, write_dataset
from mirage_vlm.training.data import BucketSampler, Collator, Examples, Kept, all_sources, check_examples, open_source
from mirage_vlm.training.recipe import DataRecipe
from mirage_vlm.trajectory import Image, LatentSpan, Trajectory, assistant_turn, user_turn

# -- collation -------------------------------------------------------------------------------------------------------


def test_rows_are_padded_on_the_right(tiny):
    trajectories = ragged()
    examples = [tiny.encoder.example(t) for t in trajectories]
    batch = Collator(tiny.encoder, targets=True)(trajectories)
    width = max(len(example.input_ids) for example in examples)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        rest = width - length
        assert batch["input_ids"][row].tolist() == example.input_ids.tolist() + [tiny.tokenizer.pad_token_id] * rest
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * rest
        assert batch["labels"][row].tolist() == example.labels.tolist() + [-100] * rest
    assert any(len(example.input_ids) < width for example in examples)


def test_pictures_of_all_rows_are_joined_in_row_order(tiny):
    trajectories = ragged()
    examples = [tiny.encoder.example(t) for t in trajectories]
    batch = Collator(tiny.encoder, targets=True)(trajectories)
    images = [e.images for e in examples if e.images is not None]
    helpers = [e.helpers for e in examples if e.helpers is not None]
    assert len(images) < len(examples), "one row has none"
    assert torch.equal(batch["pixel_values"], torch.cat([p.pixel_values for p in images]))
    assert torch.equal(batch["grid_thw"], torch.cat([p.grid_thw for p in images]))
    assert torch.equal(batch["helper_pixel_values"], torch.cat([p.pixel_values for p in helpers]))
    assert torch.equal(batch["helper_grid_thw"], torch.cat([p.grid_thw for p in helpers]))
    assert len(batch["helper_grid_thw"]) == sum(len(t.spans) for t in trajectories)


def test_what_is_absent_leaves_no_key(tiny):
    text = dialogue(["Go"], ["up"])
    thinking = dialogue(["Go"], [span(0)])
    looking = dialogue(["Go", picture(1, 1, 0)], ["up"])
    always = {"input_ids", "attention_mask", "labels"}
    assert Collator(tiny.encoder, targets=True)([text, text]).keys() == always
    assert Collator(tiny.encoder, targets=True)([text, looking]).keys() == always | {"pixel_values", "grid_thw"}
    helpers = {"helper_pixel_values", "helper_grid_thw"}
    assert Collator(tiny.encoder, targets=True)([text, thinking]).keys() == always | helpers
    assert Collator(tiny.encoder, targets=False)([text, thinking]).keys() == always
    assert batch_of(tiny, [text]).pixel_values is None


def test_examples_are_made_once_while_there_is_room(tiny):
    trajectories = ragged()
    made = []

    class Counting(Examples):
        def __getitem__(self, index):
            made.append(index)
            return super().__getitem__(index)

    collator = Collator(tiny.encoder, targets=True, keys=True)
    expected = collator(trajectories)
    sizes = [tiny.encoder.example(t).nbytes for t in trajectories]
    kept = Kept(Counting([trajectories]), tiny.encoder, True, room=sum(sizes[:-1]))
    for _ in range(3):
        batch = collator([kept[i] for i in range(len(kept))])
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value
    last = len(trajectories) - 1
    assert made == [*range(last), last, last, last], "the last did not fit"
    parts = (expected["input_ids"], expected["pixel_values"], expected["helper_pixel_values"])
    assert sum(sizes) >= sum(part.nbytes for part in parts[1:])


def test_one_row_is_not_padded(tiny):
    for trajectory in ragged():
        assert Collator(tiny.encoder, targets=False)([trajectory])["attention_mask"].all()


# -- sources ---------------------------------------------------------------------------------------------------------


def test_sources_follow_one_another():
    sources = [
        GeneratedDataset("vsp-planning", [3], 4),
        GeneratedDataset("vsp-perception", [4, 5], 3),
        [dialogue(["Go"], ["up, ", "down"])],
    ]
    examples = Examples(sources)
    assert len(examples) == len(examples.sizes) == 8
    found = [(examples[i].task, examples[i].meta.get("level")) for i in range(8)]
    assert found == [("vsp-planning", 3)] * 4 + [("vsp-perception", level) for level in (4, 5, 4)] + [(None, None)]


def test_a_source_can_count_several_times(tiny):
    answers = ["up", "left, right", "up, down, left"]
    sources = [[dialogue(["Go"], [answer]) for answer in answers[:2]], [dialogue(["Go"], [answers[2]])]]
    examples = Examples(sources, [3, 1])
    assert [examples[i].text for i in range(len(examples))] == answers[:2] * 3 + answers[2:]
    assert [examples.first(i) for i in range(len(examples))] == [0, 1, 0, 1, 0, 1, 6]
    sizes = list(examples.sizes)
    assert sizes[:2] * 3 == sizes[:6]
    kept = Kept(examples, tiny.encoder, targets=False, room=1e9)
    assert kept[0] is kept[2] is kept[4] and kept[1] is kept[5] and len(kept.made) == 2


def test_sizes_tell_long_examples_from_short_ones():
    written = [dialogue(["Go"], [answer]) for answer in ("up", "up, down", "up, down, up, down, left")]
    direct, cot = (GeneratedDataset("vsp-planning", [3, 6], 40, style=style) for style in ("direct", "cot"))
    sizes = list(Examples([written]).sizes)
    assert sizes == sorted(set(sizes)) and sizes[0] < sizes[2] / 3
    small, large = list(Examples([direct]).sizes)[::2], list(Examples([direct]).sizes)[1::2]
    assert max(small) < min(large), "a larger map has more image tokens"
    assert sum(Examples([cot]).sizes) > sum(Examples([direct]).sizes)


def test_a_source_without_responses(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": [{"type": "text", "text": "Go"}]}]}\n')
    with pytest.raises(MirageError, match=rf"{path}:1: messages: there is no assistant turn to train on"):
        open_source(DataRecipe(path=str(path)))


def test_a_generated_source_draws_training_maps():
    source = open_source(DataRecipe(task="vsp-planning", levels=(3, 4), n=5, seed=7, style="cot"))
    expected = GeneratedDataset("vsp-planning", (3, 4), 5, 7, "cot", "train")
    assert [t.meta for t in source] == [t.meta for t in expected]
    assert source[0].meta["style"] == "cot"


# -- order -----------------------------------------------------------------------------------------------------------

SIZES = [3 * (i % 7) + i % 3 for i in range(1037)]


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("batch", [1, 8, 64, 5000])
def test_every_example_comes_once_an_epoch(bucket, batch):
    sampler = BucketSampler(SIZES, batch, 0, bucket)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert Counter(sampler) == Counter(range(1037)) and len(sampler) == 1037


@pytest.mark.parametrize("bucket", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(bucket):
    def order(seed: int, epoch: int) -> list[int]:
        sampler = BucketSampler(SIZES, 8, seed, bucket)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0)
    first = order(1, 2)
    torch.manual_seed(5)
    assert order(1, 2) == first
    sampler = BucketSampler(SIZES, 8, 1, bucket)
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        last = list(sampler)
    assert last == first, "whatever was drawn before"
    assert list(sampler) == first, "and however often"
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


def spread(order: list[int], batch: int) -> float:
    """Mean difference of the largest and smallest size in a batch."""
    batches = [[SIZES[i] for i in order[j : j + batch]] for j in range(0, len(order) - batch + 1, batch)]
    return sum(max(sizes) - min(sizes) for sizes in batches) / len(batches)


def test_buckets_hold_examples_of_similar_size():
    bucketed = list(BucketSampler(SIZES, 8, 0, bucket=True))
    shuffled = list(BucketSampler(SIZES, 8, 0, bucket=False))
    assert spread(bucketed, 8) < 2 < 10 < spread(shuffled, 8)
    means = [sum(SIZES[i] for i in bucketed[j : j + 8]) for j in range(0, 1032, 8)]
    rising = sum(a < b for a, b in itertools.pairwise(means))
    assert 30 < rising < 100, "the batches themselves come in no order of size"


def test_a_short_batch_comes_last():
    """Elsewhere it would shift the bounds of all batches after it."""
    order = list(BucketSampler(SIZES, 8, 0, bucket=True))
    assert 1037 % 8 == 5
    assert spread(order[:1032], 8) < 2


class Counting(GeneratedDataset):
    """A generated source that counts how often each example is made."""

    def __init__(self, *args):
        super().__init__(*args)
        self.made = Counter()

    def __getitem__(self, i):
        self.made[i] += 1
        return super().__getitem__(i)


def test_examples_are_measured_when_their_turn_comes_and_once():
    source = Counting("vsp-planning", [3, 4], 500)
    sampler = BucketSampler(Examples([source]).sizes, 2, 0)
    order = iter(sampler)
    next(order)
    assert sum(source.made.values()) == 100, "50 batches of 2"
    rest = list(order)
    assert len(rest) == 499 and list(sampler)[1:] == rest
    assert set(source.made.values()) == {1} and len(source.made) == 500


def test_a_pattern_is_all_files_that_match(tmp_path):
    for name in ("b", "a"):
        write_dataset("vsp-planning", [3], 2, tmp_path / f"maps-{name}", n_test=0, cell=16)
    found = all_sources([DataRecipe(path=f"{tmp_path}/maps-*/train.jsonl"), DataRecipe(task="vsp-planning")])
    assert [source.path and source.path[len(str(tmp_path)) :] for source in found] == [
        "/maps-a/train.jsonl",
        "/maps-b/train.jsonl",
        None,
    ]
    odd = tmp_path / "maps[1].jsonl"
    odd.write_bytes((tmp_path / "maps-a" / "train.jsonl").read_bytes())
    assert all_sources([DataRecipe(path=str(odd))]) == [DataRecipe(path=str(odd))]
    with pytest.raises(MirageError, match=r"none-\*\.jsonl: no file matches"):
        all_sources([DataRecipe(path=f"{tmp_path}/none-*.jsonl")])


def test_what_the_encoder_would_refuse_is_told_before_a_run(tmp_path, tiny):
    path = tmp_path / "train.jsonl"
    helper = Image(PIL.Image.new("RGB", (64, 64)))
    sound = Trajectory((user_turn("q"), assistant_turn(LatentSpan(helper, k=1), "A")))
    slim = Trajectory((user_turn("q"), assistant_turn(LatentSpan(helper, k=30), "A")))
    shown = Trajectory((user_turn("q"), assistant_turn(helper, "A")))
    write_jsonl(path, [sound, *[slim] * 3, shown])
    with pytest.raises(MirageError) as error:
        check_examples(tiny.encoder, read_data(path), str(path), targets=True)
    assert str(error.value).startswith(f"{path}: messages[1].content[0].k: k = 30 latents")
    assert str(error.value).endswith("in 3 lines, first 2 (and 1 more fault)")
    with pytest.raises(MirageError, match=rf"{path}:5: messages\[1\].content\[0\]: a response holds a picture"):
        check_examples(tiny.encoder, read_data(path), str(path), targets=False)
    check_examples(tiny.encoder, [sound], str(path), targets=True)


def test_paths_of_a_recipe_start_at_the_working_directory(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", [Trajectory((user_turn("q"), assistant_turn("A")))])
    monkeypatch.chdir(tmp_path)
    for path in ("train.jsonl", "t*.jsonl", "./train.jsonl"):
        (source,) = all_sources([DataRecipe(path=path)])
        assert len(open_source(source)) == 1
    for path in ("no.jsonl", "no*.jsonl"):
        with pytest.raises(MirageError, match=f"start at the working directory, {tmp_path}"):
            all_sources([DataRecipe(path=path)])
