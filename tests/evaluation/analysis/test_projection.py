"""A plane that was hidden in many dimensions is found again; norms and kinds are those of the vectors."""

from __future__ import annotations

import json

import pytest
import torch
from test_material import prompts_with_helpers

from mirage_vlm.decoding import GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.analysis import projection
from mirage_vlm.evaluation.analysis.material import PROMPT, TEXT, gather


@pytest.fixture(scope="module")
def examples(tiny):
    return gather(tiny, prompts_with_helpers(), GenerationConfig(max_new_tokens=40))


def apart(points):
    """[n, n] distances."""
    return (points[:, None] - points).square().sum(dim=2).sqrt()


def test_a_hidden_plane_is_found_up_to_rotation():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(50, 2, generator=generator) * torch.tensor([4.0, 1.0])
    axes = torch.linalg.qr(torch.randn(20, 2, generator=generator))[0]
    points, explained = projection.project(9 + plane @ axes.T, "pca")
    centred = (plane - plane.mean(dim=0)).double()
    assert torch.allclose(apart(points), apart(plane), atol=1e-4)
    variances = torch.linalg.eigvalsh(centred.T @ centred).flip(0)
    assert explained == pytest.approx((variances / variances.sum()).tolist(), abs=1e-5)
    assert points[:, 0].var() > points[:, 1].var() and sum(explained) == pytest.approx(1)


def test_kinds_and_norms(tiny, examples, monkeypatch):
    kinds = projection.vectors_of(tiny, examples)
    assert torch.equal(kinds["latents"], torch.cat([e.latents for e in examples]))
    assert torch.equal(kinds["patches"], torch.cat([p.features for e in examples for p in e.pictures]))
    assert torch.equal(kinds["targets"], torch.cat([t for e in examples for t in e.targets]))
    words = {int(i) for e in examples for i, r in zip(e.ids, e.roles, strict=True) if r in (PROMPT, TEXT)}
    assert len(kinds["words"]) == len(words)
    assert torch.equal(kinds["words"], tiny.model.get_input_embeddings().weight.detach()[sorted(words)])
    monkeypatch.setattr(projection, "MOST", 6)
    numbers = projection.measure(tiny, examples)
    for name, vectors in kinds.items():
        norms = torch.tensor([float(v.square().sum().sqrt()) for v in vectors])
        found = numbers["norms"][name]
        assert found["n"] == len(vectors)
        assert (found["mean"], found["std"]) == pytest.approx((float(norms.mean()), float(norms.std(correction=0))))
        assert len(numbers["point_norms"][name]) == min(6, len(vectors))
        for plane in numbers["planes"].values():
            assert len(plane["points"][name]) == min(6, len(vectors))
    assert json.loads(json.dumps(numbers)) == numbers
    assert projection.measure(tiny, examples) == numbers, "the same seed draws the same"
    assert projection.measure(tiny, examples, seed=1) != numbers
    assert [row[0] for row in projection.table(numbers)] == ["", *kinds]


def test_the_plane_of_directions_does_not_see_lengths(tiny, examples, monkeypatch):
    before = projection.measure(tiny, examples)
    kinds = projection.vectors_of(tiny, examples)
    monkeypatch.setattr(projection, "vectors_of", lambda *_: kinds | {"latents": 50 * kinds["latents"]})
    after = projection.measure(tiny, examples)

    for plane, same in (("directions", True), ("vectors", False)):
        one, other = (
            torch.tensor([p for own in numbers["planes"][plane]["points"].values() for p in own])
            for numbers in (before, after)
        )
        assert torch.allclose(apart(one), apart(other), atol=1e-4) is same


def test_without_helpers_there_are_no_targets(tiny):
    bare = gather(tiny, prompts_with_helpers(), GenerationConfig(max_new_tokens=40), helpers=False)
    numbers = projection.measure(tiny, bare)
    assert "targets" not in numbers["norms"]
    first, _, lengths = projection.draw(numbers).axes
    assert [c.get_label() for c in first.collections] == list(numbers["norms"])
    assert len(first.collections[0].get_offsets()) == len(numbers["planes"]["vectors"]["points"]["patches"])
    assert [label.get_text() for label in lengths.get_xticklabels()] == list(numbers["norms"])


def test_tsne(tiny, examples):
    pytest.importorskip("sklearn")
    clusters = torch.cat([torch.randn(12, 8) * 0.01, 10 + torch.randn(12, 8) * 0.01])
    points, explained = projection.project(clusters, "tsne", seed=1)
    assert points.shape == (24, 2) and explained is None
    distances = torch.cdist(points, points)
    assert distances[:12, :12].max() < distances[:12, 12:].min()
    assert torch.equal(points, projection.project(clusters, "tsne", seed=1)[0])
    projection.draw(projection.measure(tiny, examples, "tsne"))


def test_what_cannot_be_projected(monkeypatch):
    with pytest.raises(MirageError, match="unknown method 'svd'; choose one of pca, tsne, umap"):
        projection.check_method("svd")
    with pytest.raises(MirageError, match="at least 4 vectors, not 3"):
        projection.project(torch.zeros(3, 4), "pca")
    monkeypatch.setattr(projection, "find_spec", lambda name: None)
    projection.check_method("pca")
    with pytest.raises(MirageError, match=r"tsne is not installed: pip install 'mirage-vlm\[analysis\]'"):
        projection.project(torch.zeros(9, 4), "tsne")
    with pytest.raises(MirageError, match="umap is not installed: pip install umap-learn"):
        projection.check_method("umap")
