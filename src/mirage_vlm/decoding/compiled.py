"""The decode step, compiled: in one piece for the CPU, one decoder layer for all of them on CUDA."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from mirage_vlm.decoding.blocks import run_paged
from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    from mirage_vlm.decoding.native import NativeStep
    from mirage_vlm.modeling.latent_vlm import LatentVLM

Decode = Callable[..., torch.Tensor]  # as `run_paged`
PIECES = 64  # of compiled code for one layer: torch makes one for each equality of sizes that once held
MATRICES, OUTPUTS = 3, 2  # that one call of `mirage::project` takes at most; what their heights are multiples of


def can_compile(device: str) -> bool:
    """Whether `torch.compile` has what it needs on a type of device: for the CPU a C++ compiler."""
    return device != "cpu" or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


_STEPS: WeakKeyDictionary[LatentVLM, dict[tuple[str, torch.dtype], Decode]] = WeakKeyDictionary()


def compiled(vlm: LatentVLM) -> Decode:
    """A model's decode step, compiled without a graph break.

    On a CPU, torch would look before each step whether any module of the model has changed, which is a twentieth of a
    step. It is told not to, and so each model and dtype has a step of its own; weights may change, what a module is
    may not. On CUDA, where the step is replayed as a graph, see `by_layer`.

    Raises:
        MirageError: there is no C++ compiler, which torch needs for the CPU.
    """
    device = vlm.device.type
    if not can_compile(device):
        raise MirageError("compiling for the CPU needs a C++ compiler (g++ or clang++); leave compile off without")
    steps = _STEPS.setdefault(vlm, {})
    kind = (device, vlm.model.dtype)
    if kind not in steps:
        if device == "cpu":
            unguarded: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
            steps[kind] = torch.compile(_copy(run_paged), fullgraph=True, dynamic=True, options=unguarded)
        else:
            steps[kind] = by_layer(torch.compile(_copy(_layer), fullgraph=True, dynamic=True, backend=inductor))
    return steps[kind]


def _copy(function: Any) -> FunctionType:
    """A function with a code object of its own, by which torch keeps what it has compiled."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


# -- layer by layer --------------------------------------------------------------------------------------------------


def _layer(layer: Any, hidden: torch.Tensor, told: dict[str, Any]) -> torch.Tensor:
    """One decoder layer, as its class defines it."""
    return type(layer).forward(layer, hidden, **told)


def by_layer(layer_step: Callable[..., torch.Tensor]) -> Decode:
    """`run_paged` with each decoder layer done by `layer_step`, a compiled `_layer`.

    What is compiled takes the layer as an argument and so is one for all layers, made in seconds however many there
    are.
    """

    def decode(vlm: LatentVLM, embeds: torch.Tensor, positions: torch.Tensor, paged: NativeStep) -> torch.Tensor:
        with _replaced(vlm.language_model.layers, layer_step), torch._dynamo.config.patch(recompile_limit=PIECES):
            return run_paged(vlm, embeds, positions, paged)

    return decode


@contextmanager
def _replaced(layers: Any, layer_step: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within, the layers are run by `layer_step`."""

    def forward(layer: Any, index: int, hidden: torch.Tensor, *, paged: NativeStep, **told: Any) -> torch.Tensor:
        return layer_step(layer, hidden, {**told, "paged": paged.of(index)})

    if any("forward" in layer.__dict__ for layer in layers):
        raise MirageError("a decoder layer has a forward of its own (offloading, a hook); leave compile off with it")
    for index, layer in enumerate(layers):
        layer.forward = partial(forward, layer, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """torch's own compiler, after products of one vector have been given to a kernel that reads matrices faster."""
    from torch._inductor.compile_fx import compile_fx

    merge_projections(graph)
    return compile_fx(graph, inputs)


def merge_projections(graph: torch.fx.GraphModule) -> int:
    """Let linear layers that read the same single vector be one call of `mirage::project`; returns how many calls.

    A batch of one is bound by reading weights. The libraries' products of one vector share it out among too few
    processors where a matrix is small, as those of keys and values are.
    """
    waiting: dict[tuple[torch.fx.Node, bool], list[torch.fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is torch._C._nn.linear:
            (vector, weight, *rest), bias = node.args, node.kwargs.get("bias")
            bias = rest[0] if rest else bias
            shape = _shape(vector)
            one = bool(shape) and all(isinstance(n, int) for n in shape) and math.prod(shape[:-1]) == 1
            if one and _shape(weight)[0] % OUTPUTS == 0:
                waiting.setdefault((vector, bias is not None), []).append(node)
    calls = 0
    for (_, biased), nodes in waiting.items():
        for first in range(0, len(nodes), MATRICES):
            _merge(graph, nodes[first : first + MATRICES], biased)
            calls += 1
    graph.graph.lint()
    graph.recompile()
    return calls


def _merge(graph: torch.fx.GraphModule, nodes: list[torch.fx.Node], biased: bool) -> None:
    """One call in the place of several linear layers; their weights stand before all of them, as inputs do."""
    vector = nodes[0].args[0]  # read now: it may be a part of what was merged before
    weights = [node.args[1] for node in nodes]
    biases = [node.args[2] if len(node.args) > 2 else node.kwargs["bias"] for node in nodes] if biased else []
    with graph.graph.inserting_before(nodes[0]):
        found = graph.graph.call_function(torch.ops.mirage.project.default, (vector, weights, biases))
        begin = 0
        for node in nodes:
            height = _shape(node.args[1])[0]
            part = graph.graph.call_function(torch.ops.aten.slice.Tensor, (found, -1, begin, begin + height))
            node.replace_all_uses_with(part)
            begin += height
    for node in nodes:
        graph.graph.erase_node(node)


def _shape(node: Any) -> torch.Size:
    return node.meta["example_value"].shape
