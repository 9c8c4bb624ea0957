"""Compression against sums written out patch by patch."""

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from support import batch_of, dialogue, distance, span

from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.modeling.pooling import (
    POOLINGS,
    build_pooling,
    check_pooling,
    place_code,
    pool,
    region_averages,
    span_length,
)
from mirage_vlm.training.losses import targets_of
from mirage_vlm.trajectory import LatentSpan

WIDTH = 5


def features(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * height + width)
    return torch.randn(height * width, WIDTH, generator=generator)


def mean_of(patches: list[torch.Tensor]) -> torch.Tensor:
    return sum(patches[1:], patches[0]) / len(patches)


@pytest.mark.parametrize(
    ("height", "width", "k", "chunk"),
    [
        (4, 6, 4, 6),
        (3, 3, 4, 2),  # 9 = 4 · 2 + 1: the last patch is dropped
        (5, 4, 7, 2),  # 20 = 7 · 2 + 6: the last six are
        (2, 3, 6, 1),
        (2, 3, 1, 6),
        (2, 3, 5, 1),
    ],
)
def test_average_cuts_raster_order_into_equal_chunks(height, width, k, chunk):
    patches = features(height, width)
    expected = [mean_of([patches[j * chunk + i] for i in range(chunk)]) for j in range(k)]
    torch.testing.assert_close(pool(patches, (height, width), k, "average"), torch.stack(expected))


@pytest.mark.parametrize(
    ("height", "width", "k", "rows", "columns"),
    [
        (4, 6, 6, 2, 3),
        (6, 4, 6, 3, 2),
        (2, 8, 4, 1, 4),
        (8, 2, 4, 4, 1),
        (4, 4, 4, 2, 2),
        (5, 4, 4, 2, 2),  # 5 rows in 2: both halves take the middle one
        (3, 3, 9, 3, 3),
        (1, 5, 5, 1, 5),
        (4, 5, 1, 1, 1),
    ],
)
def test_grid_averages_over_the_lattice_nearest_in_shape(height, width, k, rows, columns):
    patches = features(height, width)
    expected = []
    for row in range(rows):
        for column in range(columns):
            expected.append(
                mean_of(
                    [
                        patches[y * width + x]
                        for y in range(height)
                        for x in range(width)
                        if y + 1 > row * height / rows and y < (row + 1) * height / rows
                        if x + 1 > column * width / columns and x < (column + 1) * width / columns
                    ]
                )
            )
    torch.testing.assert_close(pool(patches, (height, width), k, "grid"), torch.stack(expected))


def test_random_takes_different_patches_in_raster_order():
    patches = features(4, 4)
    places = {tuple(patch.tolist()): i for i, patch in enumerate(patches)}
    torch.manual_seed(0)
    drawn = [[places[tuple(p.tolist())] for p in pool(patches, (4, 4), 5, "random")] for _ in range(200)]
    assert all(len(set(chosen)) == 5 and chosen == sorted(chosen) for chosen in drawn)
    counts = torch.tensor(drawn).flatten().bincount(minlength=16)
    assert counts.min() > 30 and counts.max() < 100, "every patch is as likely: 62.5 of 1,000, standard deviation 6.6"
    torch.manual_seed(0)
    again = [places[tuple(p.tolist())] for p in pool(patches, (4, 4), 5, "random")]
    assert again == drawn[0], "the global seed decides"


def test_full_keeps_every_patch():
    assert torch.equal(pool(features(3, 4), (3, 4), 2, "full"), features(3, 4))
    assert span_length("full", 12, 2) == 12


@pytest.mark.parametrize("name", sorted(POOLINGS))
@pytest.mark.parametrize("k", range(1, 13))
def test_every_pooling_gives_as_many_targets_as_span_length_says(name, k):
    length = span_length(name, 12, k)
    assert pool(features(3, 4), (3, 4), k, name).shape == (length, WIDTH)


def test_a_resampler_mixes_the_patches_each_query_looks_at():
    """Written out for one query; it begins near the mean of all patches, and learns through the targets."""
    torch.manual_seed(0)
    resampler, patches = build_pooling("resampler", WIDTH, 3), features(2, 3)
    boxes = [(c / 3, r / 2, (c + 1) / 3, (r + 1) / 2) for r in range(2) for c in range(3)]
    codes = place_code(torch.tensor(boxes), (2, 3), WIDTH) * WIDTH**0.5
    found = resampler(patches, (2, 3), 2)
    assert found.shape == (2, WIDTH)
    for query, target in zip(resampler.queries, found, strict=False):
        keys = [resampler.key.weight @ (p / p.square().mean().sqrt() + c) for p, c in zip(patches, codes, strict=True)]
        weights = torch.stack([query @ key / WIDTH**0.5 for key in keys]).exp()
        expected = sum(w * p for w, p in zip(weights / weights.sum(), patches, strict=True))
        torch.testing.assert_close(target, expected, atol=1e-4, rtol=1e-4)
    found.sum().backward()
    assert resampler.queries.grad[:2].abs().sum() > 0 and resampler.queries.grad[2].abs().sum() == 0
    with pytest.raises(MirageError, match="wants k = 4 latents, but the resampler has 3 queries; raise latent_size"):
        resampler(patches, (2, 3), 4)


def test_a_resampler_is_saved_with_the_checkpoint(tiny, tmp_path):
    parts = copy.deepcopy(tiny)
    vlm = LatentVLM(parts.model, parts.tokenizer, parts.image_processor, replace(tiny.config, pooling="resampler"))
    torch.nn.init.normal_(vlm.pooling.queries)
    vlm.save_pretrained(tmp_path / "saved")
    loaded = LatentVLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.pooling.queries, vlm.pooling.queries)
    with pytest.raises(MirageError, match=r"its resampler gives \d latents and cannot be made to give 9"):
        LatentVLM.from_pretrained(tmp_path / "saved", latent_size=9)
    assert LatentVLM.from_pretrained(tmp_path / "saved", pooling="grid", latent_size=9).config.pooling == "grid"
    (tmp_path / "saved" / "latent_pooling.safetensors").unlink()
    with pytest.raises(MirageError, match="pooling 'resampler' has weights, but latent_pooling"):
        LatentVLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("name", ["average", "grid", "random"])
def test_more_latents_than_patches(name):
    with pytest.raises(MirageError, match=r"k = 7 .* 6 patches of h\.png: lower latent_size"):
        span_length(name, 6, 7, "h.png")
    with pytest.raises(MirageError, match="k = 7"):
        pool(features(2, 3), (2, 3), 7, name)


def test_an_unknown_pooling():
    assert check_pooling("grid") == "grid"
    with pytest.raises(MirageError, match="unknown pooling 'avg'; choose one of average, grid, random, full"):
        check_pooling("avg")


def test_targets_of_many_helpers_are_those_of_each_alone(tiny):
    """Pictures of different sizes go through the tower together without seeing one another."""
    spans = [span(1, 2, 3, 2), span(2, 5, 2, 4), span(3, 1, 1, 1)]
    together = batch_of(tiny, [dialogue(["Go"], spans)])
    with torch.no_grad():
        found = tiny.targets(together.helper_pixel_values, together.helper_grid_thw, [2, 5, 1]).pooled
        expected = []
        for one in spans:
            alone = batch_of(tiny, [dialogue(["Go"], [one])])
            pixels, grid = alone.helper_pixel_values, alone.helper_grid_thw
            patches = tiny.model.model.get_image_features(pixels, grid, return_dict=True).pooler_output[0]
            size = len(patches) // one.k
            expected += [patches[j * size : (j + 1) * size].mean(dim=0) for j in range(one.k)]
    assert distance(found, torch.stack(expected)) < 1e-5


def test_a_region_is_the_mean_of_the_patches_whose_centres_it_holds():
    rng = random.Random(0)
    for _ in range(100):
        height, width = rng.randint(1, 6), rng.randint(1, 6)
        patches = features(height, width)
        box = [*sorted(rng.sample(range(101), 2)), *sorted(rng.sample(range(101), 2))]
        left, right, top, bottom = (number / 100 for number in box)
        held = [
            patches[y * width + x]
            for y in range(height)
            for x in range(width)
            if left <= (x + 0.5) / width < right and top <= (y + 0.5) / height < bottom
        ]
        if not held:
            column, row = (left + right) / 2 * width, (top + bottom) / 2 * height
            held = [patches[int(row) * width + int(column)]]
        found = region_averages(patches, (height, width), torch.tensor([[left, top, right, bottom]]))
        torch.testing.assert_close(found, mean_of(held)[None])


def test_a_place_code_tells_places_apart():
    """Unit vectors whose angle grows with distance, written out for one box."""
    cells = [(c / 6, r / 6, (c + 1) / 6, (r + 1) / 6) for r in range(6) for c in range(6)]
    codes = place_code(torch.tensor(cells), (6, 6), 32)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(36))
    x, y, waves = 1.5, 2.5, [math.pi / 16 ** (i / 7) for i in range(8)]
    raw = [f(v * w) for v in (x, y) for f in (math.sin, math.cos) for w in waves]
    torch.testing.assert_close(codes[2 * 6 + 1], torch.tensor(raw) / sum(v * v for v in raw) ** 0.5)
    alike = codes @ codes.T
    assert (alike - 2 * torch.eye(36)).max() < 0.95, "no two cells are alike"
    here = alike[14]
    near, far = [here[i] for i in (13, 15, 8, 20)], [here[i] for i in (35, 30, 5)]
    assert min(near) > max(far)
    assert place_code(torch.tensor(cells[:1]), (6, 6), 7).shape == (1, 7)
    smaller = [(c / 4, r / 4, (c + 1) / 4, (r + 1) / 4) for r in range(4) for c in range(4)]
    same = codes.view(6, 6, 32)[:4, :4].flatten(0, 1)
    torch.testing.assert_close(place_code(torch.tensor(smaller), (4, 4), 32), same)  # patch for patch


def test_targets_of_regions_can_say_their_places(tiny):
    parts = copy.deepcopy(tiny)
    vlm = LatentVLM(parts.model, parts.tokenizer, parts.image_processor, replace(tiny.config, places=True))
    boxes = ((0.0, 0.0, 1 / 3, 0.5), (1 / 3, 0.5, 2 / 3, 1.0))
    batch = batch_of(tiny, [dialogue(["Go"], [LatentSpan(span(1).helper, regions=boxes), "x"])])
    plain, placed = targets_of(tiny, batch).pooled, targets_of(vlm, batch).pooled
    for target, other, code in zip(plain, placed, place_code(torch.tensor(boxes), (2, 3), tiny.width), strict=True):
        torch.testing.assert_close(other, target + target.norm() * code)
