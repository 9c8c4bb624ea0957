"""Paged attention by a kernel of our own: in C on the CPU, in Triton on CUDA.

torch has no attention over a paged cache, and what `blocks` composes of its operations passes over memory several
times. The kernels read each key and value once. That of the CPU, `attend.c`, is compiled on first use where a C
compiler is found, computes in float32, and reads a cache in float32, bfloat16 or float16; that of CUDA is in
`triton_kernels`.
Elsewhere the engine uses torch's operations; tests hold all of them together.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mirage_vlm.decoding.blocks import LOG2_E

if TYPE_CHECKING:
    from mirage_vlm.decoding.pool import BlockPool

SOURCE = Path(__file__).with_name("attend.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
LARGEST = 512  # of a block and of a head, as in the source
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of the cache, as in the source


class _Arguments(ctypes.Structure):
    """`Step` of the source."""

    _fields_ = [(f"p{i}", ctypes.c_void_p) for i in range(14)] + [(f"n{i}", ctypes.c_int64) for i in range(7)]
    _fields_ += [("scale", ctypes.c_float)]


def compiler() -> str | None:
    """The C compiler of this machine: `$CC`, or the first of the usual ones."""
    return os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)


@cache
def load() -> ctypes.CDLL | None:
    """The kernel, or None where it cannot be built: a warning then says why."""
    name = compiler()
    if name is None:
        return None
    mark = "\n".join((SOURCE.read_text(), name, *FLAGS, platform.machine(), platform.node()))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = root / "mirage-vlm" / f"attend-{hashlib.sha256(mark.encode()).hexdigest()[:16]}.so"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                built = Path(scratch) / target.name
                command = [name, *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
                built.replace(target)
        kernel = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as fault:
        said = getattr(fault, "stderr", None) or str(fault)
        logging.getLogger(__name__).warning(
            "the attention kernel could not be built with %s; torch's operations are used: %s", name, said.strip()
        )
        return None
    kernel.mirage_attend.argtypes = [ctypes.POINTER(_Arguments), ctypes.c_int]
    kernel.mirage_attend.restype = None
    kernel.mirage_half.restype = ctypes.c_int
    return kernel


def usable(pool: BlockPool, dtype: torch.dtype) -> bool:
    """Whether a kernel can attend over this pool, in a model of that dtype."""
    *_, size, width = pool.shape
    if pool.device.type == "cuda":
        return 16 <= width <= 128 and width & (width - 1) == 0 and load_triton()  # more needs too much shared memory
    fits = width % 8 == 0 and pool.device.type == "cpu" and max(size, width) <= LARGEST
    if not fits or pool.dtype not in KINDS or dtype not in KINDS:
        return False
    kernel = load()
    return kernel is not None and (pool.dtype != torch.float16 or bool(kernel.mirage_half()))


@cache
def load_triton() -> bool:
    """Make the kernels in Triton known to torch; False where there is no Triton."""
    try:
        from mirage_vlm.decoding import triton_kernels
    except ImportError:
        return False
    _LIBRARY.impl("attend", triton_kernels.attend, "CUDA")
    _LIBRARY.impl("project", triton_kernels.project, "CUDA")
    return True


@dataclass
class NativeStep:
    """One position of every row, by a kernel; takes the place of `blocks.Step`.

    Attributes:
        table: [B, M] each row's blocks, its own in order and then its prompt's.
        own: [B] how many of them are its own.
        length: [B] index of the new position in the response.
        shared: [B] positions of the prompt.
        block, offset: [B] where the new position is written.
        hidden: [blocks, size] positions that the rows of `evicted` [B] do not see; both None where all see everything.
    """

    pool: BlockPool
    table: torch.Tensor
    own: torch.Tensor
    length: torch.Tensor
    shared: torch.Tensor
    block: torch.Tensor
    offset: torch.Tensor
    hidden: torch.Tensor | None
    evicted: torch.Tensor | None

    def attend(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """[B, H, 1, d] queries, [B, K, 1, d] new keys and values → [B, 1, H, d]."""
        return self.of(layer.layer_idx).attend(layer, query, key, value, scaling)

    def of(self, layer: int) -> NativeLayer:
        """The same for one layer, whose number the compiler need not know."""
        return NativeLayer(self, *self.pool.layers[layer])

    def attend_over(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """As `attend`, over the storage of one layer, [blocks, K, size, d]."""
        run = _attend if keys.device.type == "cpu" and not torch.compiler.is_compiling() else torch.ops.mirage.attend
        rows = (self.table, self.own, self.length, self.shared)
        places = (self.block, self.offset)
        unseen = (self.hidden, self.evicted)
        return run(query, key, value, keys, values, *rows, *places, *unseen, scaling * LOG2_E)


@dataclass
class NativeLayer:
    """A step in one layer."""

    step: NativeStep
    keys: torch.Tensor
    values: torch.Tensor

    def attend(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """As `NativeStep.attend`."""
        return self.step.attend_over(self.keys, self.values, query, key, value, scaling)


def _attend(
    query: torch.Tensor,  # [B, H, 1, d]; head h reads key head h // (H / K)
    key: torch.Tensor,  # [B, K, 1, d]
    value: torch.Tensor,
    keys: torch.Tensor,  # [blocks, K, size, d]
    values: torch.Tensor,
    table: torch.Tensor,
    own: torch.Tensor,
    length: torch.Tensor,
    shared: torch.Tensor,
    block: torch.Tensor,
    offset: torch.Tensor,
    hidden: torch.Tensor | None,
    evicted: torch.Tensor | None,
    scale: float,  # of scores in base 2
) -> torch.Tensor:
    """Call the kernel; the arguments are those of `NativeStep` → [B, 1, H, d]."""
    kernel = load()
    assert kernel is not None
    rows, heads, _, width = query.shape
    groups = key.shape[1]
    dtype = query.dtype
    query, key, value = (tensor.float().contiguous() for tensor in (query, key, value))
    found = query.new_empty(rows, 1, heads, width)
    tensors = (found, query, key, value, keys, values, table, own, length, shared, block, offset, hidden, evicted)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = (rows, groups, heads // groups, width, keys.shape[2], table.shape[1], KINDS[keys.dtype])
    arguments = _Arguments(*pointers, *sizes, scale)
    few = table.numel() < 32  # waking threads would cost more than the work
    kernel.mirage_attend(ctypes.byref(arguments), 1 if few else torch.get_num_threads())
    return found.to(dtype)


# The same as an operator of torch, for the compiled step. Defined by schema: the decorator for custom operators adds
# about as much time to each call as the kernel takes for one row.
_LIBRARY = torch.library.Library("mirage", "DEF")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor table, Tensor own, "
    "Tensor length, Tensor shared, Tensor block, Tensor offset, Tensor? hidden, Tensor? evicted, float scale) -> Tensor"
)
_LIBRARY.impl("attend", _attend, "CPU")
torch.library.register_fake("mirage::attend", lambda query, *_: query.new_empty(*query.transpose(1, 2).shape))


def _project(vector: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    """One vector [..., inputs] times several matrices [n, inputs], with biases [n] or none → [..., sum of n]."""
    added: list[torch.Tensor | None] = [*biases] or [None] * len(weights)
    return torch.cat([torch.nn.functional.linear(vector, w, b) for w, b in zip(weights, added, strict=True)], dim=-1)


_LIBRARY.define("project(Tensor vector, Tensor[] weights, Tensor[] biases) -> Tensor")
_LIBRARY.impl("project", _project, "CPU")
torch.library.register_fake(
    "mirage::project",
    lambda vector, weights, biases: vector.new_empty(*vector.shape[:-1], sum(len(weight) for weight in weights)),
)
