"""The compiled layer and the captured step, which CUDA needs, on the CPU: what they compute, not how fast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import ragged
from test_generate import assert_same

from mirage_vlm.decoding import Engine, EngineConfig, Finished, compiled, native
from mirage_vlm.decoding.graphs import StepGraphs, rounded
from mirage_vlm.errors import MirageError
from mirage_vlm.trajectory import Trajectory

KINDS = [
    {},
    {"temperature": 1.0, "seed": 5, "n": 3},
    {"evict_images": True},
    {"max_new_tokens": 9},
    {"temperature": 0.7, "top_p": 0.9, "seed": 8, "logprobs": True},
    {"latent_size": 2, "max_spans": 1, "latent_noise": 0.1},
]


@pytest.fixture(autouse=True)
def kernel():
    if native.load() is None:
        pytest.skip("no C compiler, and so no kernel of paged attention")


@pytest.fixture(scope="module")
def prompts() -> list[Trajectory]:
    return [*ragged(), *ragged()[:3]]


def run(engine: Engine, prompts: list[Trajectory], kinds=KINDS, **options) -> dict[tuple[int, int], Trajectory]:
    for i, prompt in enumerate(prompts):
        engine.submit(prompt, **{"max_new_tokens": 40, "latent_size": 4, **options, **kinds[i % len(kinds)]})
    return {(e.request, e.sample): e.trajectory for e in engine.run() if isinstance(e, Finished)}


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for ours, theirs in ((found[key].decoding, expected[key].decoding) for key in expected):
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        for a, b in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
            assert (a is None) == (b is None) and (a is None or a == pytest.approx(b, abs=1e-4))
    assert_same(
        *(
            [replace(t, decoding=replace(t.decoding, logprobs=None)) for t in ts]
            for ts in ([found[key] for key in expected], expected.values())
        )
    )


def again(work):
    """A capture that does the work anew each time, and puts what comes out where the first time put it."""
    kept = work.__closure__[[*work.__code__.co_freevars].index("kept")].cell_contents
    still = work.__closure__[[*work.__code__.co_freevars].index("still")].cell_contents
    before = {name: value.clone() for name, value in vars(still).items()}
    work()
    for name, value in before.items():
        getattr(still, name).copy_(value)
    first = kept[-1]

    def replay():
        work()
        for name in ("log", "chances", "inputs"):
            if getattr(first, name) is not None:
                getattr(first, name).copy_(getattr(kept[-1], name))

    return replay


@pytest.mark.parametrize("options", [{"max_rows": 3}, {"look_every": 8}, {"look_every": 3, "max_rows": 6}])
def test_steps_in_memory_that_stays_are_the_same(tiny, prompts, options):
    """Rows join and leave, grow and evict, in text and in spans, in graphs of several sizes and kinds."""
    expected = run(Engine(tiny, EngineConfig(max_batch_tokens=8192)), prompts)
    engine = Engine(tiny, EngineConfig(max_batch_tokens=8192, **options))
    engine._graphs = StepGraphs(again)
    same(run(engine, prompts), expected)
    assert len(engine._graphs.graphs) > 1 and engine.pool.used == 0
    for graph in engine._graphs.graphs.values():
        assert all(n == rounded(n) for n in (len(graph.rows), *graph.plan.table.shape, *graph.plan.own.shape))


def test_requests_that_cannot_be_captured_stand_between(tiny, prompts):
    """A hook asks the host, and a replay has a length of its own."""

    def hook(latents, rows, steps):
        return 0.5 * latents

    kinds = [{}, {"latent_hook": hook, "max_new_tokens": 6}, {}]
    expected = run(Engine(tiny, EngineConfig(max_batch_tokens=8192)), prompts, kinds)
    engine = Engine(tiny, EngineConfig(max_batch_tokens=8192, look_every=2))
    engine._graphs = StepGraphs(again)
    same(run(engine, prompts, kinds), expected)
    assert engine._graphs.graphs


def test_one_layer_is_compiled_for_all(tiny, prompts):
    """By torch's own compiler: one piece for a single row, one for several, however many layers there are."""
    made: list[int] = []

    def counted(graph, inputs):
        made.append(compiled.merge_projections(graph))
        return graph

    torch._dynamo.reset()
    step = torch.compile(compiled._copy(compiled._layer), fullgraph=True, dynamic=True, backend=counted)
    for chosen, merged in ((prompts[:1], 4), (prompts, 0)):
        made.clear()
        expected = run(Engine(tiny, EngineConfig(max_batch_tokens=8192)), chosen, [{}])
        engine = Engine(tiny, EngineConfig(max_batch_tokens=8192))
        engine._decode = compiled.by_layer(step)
        same(run(engine, chosen, [{}]), expected)
        assert made and set(made) <= {merged, 4} and len(made) <= 2
    torch._dynamo.reset()


def test_a_chain_of_projections_is_merged_link_by_link():
    """As in LoRA, where the second reads what the first gives."""
    torch.manual_seed(0)
    first, second, side = torch.nn.Linear(8, 4), torch.nn.Linear(4, 8), torch.nn.Linear(8, 8)

    def backend(graph, inputs):
        compiled.merge_projections(graph)
        return graph

    x = torch.randn(1, 8)
    with torch.no_grad():
        found = torch.compile(lambda x: second(first(x)) + side(x), backend=backend)(x)
        torch.testing.assert_close(found, second(first(x)) + side(x))


def test_a_layer_with_a_forward_of_its_own_is_refused(fresh, prompts):
    layer = fresh.language_model.layers[0]
    layer.forward = layer.forward
    engine = Engine(fresh, EngineConfig(max_batch_tokens=8192))
    engine._decode = compiled.by_layer(compiled._layer)
    engine.submit(prompts[0])
    with pytest.raises(MirageError, match="leave compile off"):
        list(engine.run())
    assert "forward" in layer.__dict__


def test_merged_projections_are_what_they_were():
    """Products that cannot be merged stay: other vectors, several rows, odd heights."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(
        torch.nn.Linear(12, n, bias=b) for n, b in ((16, True), (8, True), (8, False), (5, True))
    )

    def function(x, y):
        return [layer(x) for layer in layers], layers[0](y), layers[1](x)

    calls: list[int] = []

    def backend(graph, inputs):
        calls.append(compiled.merge_projections(graph))
        assert sum(node.target is torch._C._nn.linear for node in graph.graph.nodes) == 2
        return graph

    x, y = torch.randn(1, 1, 12), torch.randn(2, 12)
    with torch.no_grad():
        found, expected = torch.compile(function, backend=backend)(x, y), function(x, y)
    assert calls == [2]
    for ours, theirs in zip([*found[0], *found[1:]], [*expected[0], *expected[1:]], strict=True):
        torch.testing.assert_close(ours, theirs)
