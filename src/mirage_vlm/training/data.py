"""What a run trains on: sources of trajectories, their order, and collation into tensors."""

from __future__ import annotations

import bisect
import glob
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Sampler

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import Fault, Faults, read_data
from mirage_vlm.modeling.encoding import IGNORED, Encoded, Encoder, Pictures
from mirage_vlm.tasks.make import GeneratedDataset
from mirage_vlm.training.packing import arrange
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.training.recipe import DataRecipe


WORD = re.compile(r"\w+|[^\w\s]")


class Examples(Dataset[Trajectory]):
    """Several sources one after the other.

    Args:
        repeats: how many times each counts; once by default.
    """

    def __init__(self, sources: Sequence[Sequence[Trajectory]], repeats: Sequence[int] | None = None):
        self.sources = list(sources)
        times = [1] * len(self.sources) if repeats is None else repeats
        self.ends = list(
            itertools.accumulate(len(source) * count for source, count in zip(self.sources, times, strict=True))
        )

    @cached_property
    def sizes(self) -> Sizes:
        """A rough size of each example, for batches of similar ones."""
        return Sizes(self)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Trajectory:
        source, i = self.place(index)
        return source[i]

    def place(self, index: int) -> tuple[Sequence[Trajectory], int]:
        """The source that an example is of, and its number there."""
        which, _, i = self._find(index)
        return self.sources[which], i

    def first(self, index: int) -> int:
        """The first index of the same example, where its source counts several times."""
        _, begin, i = self._find(index)
        return begin + i

    def _find(self, index: int) -> tuple[int, int, int]:
        """Which source an example is of, where that begins, and the example's number in it."""
        which = bisect.bisect_right(self.ends, index)
        begin = self.ends[which - 1] if which else 0
        return which, begin, (index - begin) % len(self.sources[which])


class Kept(Dataset[Encoded]):
    """Examples as tensors, each made once and kept in main memory as long as there is room.

    Most of what a small model waits for is pictures being drawn, resized and hashed anew in each epoch.

    Args:
        examples: what is kept.
        encoder, targets: as for `Collator`.
        room: bytes, of each process that prepares batches. What does not fit is made anew each time.
    """

    def __init__(self, examples: Examples, encoder: Encoder, targets: bool, room: float):
        self.examples, self.encoder, self.targets, self.room = examples, encoder, targets, room
        self.made: dict[int, Encoded] = {}

    @property
    def sizes(self) -> Sizes:
        return self.examples.sizes

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Encoded:
        index = self.examples.first(index)
        if (kept := self.made.get(index)) is not None:
            return kept
        example = self.encoder.example(self.examples[index], targets=self.targets)
        if example.nbytes <= self.room:
            self.room -= example.nbytes
            self.made[index] = example
        return example


class Sizes:
    """Words and signs of each example's response; of a generated one also the cells of its map.

    To measure an example is to make it, so each is measured when its size is first asked for, and once.
    """

    def __init__(self, examples: Examples):
        self.examples = examples
        self.known: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> int:
        index = self.examples.first(index)
        if index not in self.known:
            source, i = self.examples.place(index)
            cells = source.levels[i % len(source.levels)] ** 2 if isinstance(source, GeneratedDataset) else 0
            self.known[index] = cells + len(WORD.findall(source[i].text))
        return self.known[index]


def all_sources(sources: Sequence[DataRecipe]) -> list[DataRecipe]:
    """The sources with each pattern (`data/*/train.jsonl`) in the place of what it matches, in the order of names.

    Raises:
        MirageError: there is no such file, or a pattern matches nothing.
    """
    found: list[DataRecipe] = []
    for source in sources:
        if source.path is None or Path(source.path).exists():
            found.append(source)
            continue
        hint = f"; relative paths of a recipe start at the working directory, {Path.cwd()}"
        hint = "" if Path(source.path).is_absolute() else hint
        if not glob.has_magic(source.path):
            raise MirageError(f"{source.path}: no such file{hint}")
        paths = sorted(glob.glob(source.path, recursive=True))
        if not paths:
            raise MirageError(f"{source.path}: no file matches{hint}")
        found += [replace(source, path=path) for path in paths]
    return found


def open_source(source: DataRecipe, responses: bool = True) -> Sequence[Trajectory]:
    """The trajectories that a recipe's source names.

    Args:
        responses: each must have one.

    Raises:
        MirageError: it cannot be read, or an example has no response.
    """
    if source.task is not None:
        return GeneratedDataset(source.task, source.levels, source.n, source.seed, source.style, "train")
    assert source.path is not None
    found = read_data(source.path)
    lacking = Faults()
    for i, trajectory in enumerate(found, start=1):
        if responses and not trajectory.response:
            problem = "there is no assistant turn to train on; a question alone is for evaluation and stage grpo"
            lacking.add(trajectory.where or f"{source.path}:{i}", Fault("messages", problem))
    if lacking:
        raise MirageError(lacking.summary())
    return found


def open_all(sources: Sequence[DataRecipe], responses: bool = True) -> Examples:
    """Every source, opened as by `open_source` and counted as often as it says; without patterns, see `all_sources`."""
    return Examples([open_source(source, responses) for source in sources], [source.repeat for source in sources])


def has_spans(source: Sequence[Trajectory]) -> bool:
    """Whether any example has a latent span; of a generated source the first tells for all."""
    looked_at = [source[0]] if isinstance(source, GeneratedDataset) else source
    return any(trajectory.spans for trajectory in looked_at)


def check_examples(encoder: Encoder, source: Sequence[Trajectory], where: str, targets: bool) -> None:
    """Before a run: what the encoder would refuse, which would otherwise end it in the middle.

    Of a file all examples are looked at (pictures are opened, not decoded); of a generated source, whose spans alone
    depend on the model, one for each level where there are targets.

    Args:
        where: what messages name: the file, or the task.
        targets: helper images are to be learnt from.

    Raises:
        MirageError: there is any; the message names the place and the field of the first, and how many there are.
    """
    made = isinstance(source, GeneratedDataset)
    found = Faults()
    count = len(source)
    if isinstance(source, GeneratedDataset):
        count = min(len(source.levels), count) if targets else 0
    for i in range(count):
        example = source[i]
        for fault in encoder.faults(example, targets=targets):
            if made:  # there is no file to look at
                raise MirageError(f"{where}: example {i + 1}: {fault.message}")
            found.add(example.where or f"{where}:{i + 1}", fault)
    if found:
        raise MirageError(found.summary())


class BucketSampler(Sampler[int]):
    """A random order in which neighbours are of similar size; a function of seed and epoch alone.

    A shuffled pool of 50 batches is sorted by size and its batches are shuffled again. `batch` is that of one forward
    pass: accumulated passes and processes then see different sizes, which keeps the mixture of an optimisation step
    that of the data. Since nothing else enters, a resumed run sees the same order. The sizes of a pool are asked for
    when its turn comes.
    """

    def __init__(self, sizes: Sequence[int] | Sizes, batch: int, seed: int, bucket: bool = True):
        self.sizes, self.batch, self.seed, self.bucket, self.epoch = sizes, batch, seed, bucket, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = list(range(len(self.sizes)))
        rng.shuffle(order)
        if not self.bucket:
            yield from order
            return
        for start in range(0, len(order), 50 * self.batch):
            pool = sorted(order[start : start + 50 * self.batch], key=lambda i: self.sizes[i])
            whole = len(pool) - len(pool) % self.batch
            batches = [pool[j : j + self.batch] for j in range(0, whole, self.batch)]
            rng.shuffle(batches)
            yield from itertools.chain.from_iterable(batches)
            yield from pool[whole:]  # a short batch must come last


@dataclass(frozen=True)
class Collator:
    """Trajectories, or examples as tensors → what `mirage_vlm.training.rollout.Batch` takes, right-padded.

    Attributes:
        encoder: of the checkpoint.
        targets: process the helper images (stage 1).
        pack: most tokens of a row that holds several examples; 0 gives each a row of its own.
        keys: name the pictures by their content, for a feature store.
    """

    encoder: Encoder
    targets: bool
    pack: int = 0
    keys: bool = False

    def __call__(self, examples: Sequence[Trajectory | Encoded]) -> dict[str, Any]:
        made = [e if isinstance(e, Encoded) else self.encoder.example(e, targets=self.targets) for e in examples]
        return collate(made, self.encoder, self.pack, self.keys)


def collate(examples: Sequence[Encoded], encoder: Encoder, pack: int = 0, keys: bool = False) -> dict[str, Any]:
    """Pad rows on the right and join the pictures of all rows; absent pictures leave their keys out.

    Args:
        pack: put several examples into a row, up to so many tokens, and say in `segments` which is where.
        keys: name the pictures.
    """
    lengths = [len(example.input_ids) for example in examples]
    order = arrange(lengths, pack) if pack else [[i] for i in range(len(examples))]
    width = max(sum(lengths[i] for i in row) for row in order)
    token = encoder.tokenizer.pad_token_id if encoder.tokenizer is not None else 0

    def rows(values: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
        joined = [torch.cat([values[i] for i in row]) for row in order]
        return torch.stack([torch.nn.functional.pad(v, (0, width - len(v)), value=fill) for v in joined])

    batch: dict[str, Any] = {
        "input_ids": rows([e.input_ids for e in examples], token),
        "attention_mask": rows([torch.ones_like(e.input_ids) for e in examples], 0),
        # the first token follows nothing of its own, so in a packed row it must not be asked for
        "labels": rows([torch.cat([e.labels.new_tensor([IGNORED]), e.labels[1:]]) for e in examples], IGNORED),
    }
    if pack:
        number = {i: place for row in order for place, i in enumerate(row, start=1)}
        batch["segments"] = rows([torch.full_like(e.input_ids, number[i]) for i, e in enumerate(examples)], 0)
    ordered = [examples[i] for row in order for i in row]
    for pictures, kind, name in (
        ([e.images for e in ordered], "", "picture_keys"),
        ([e.helpers for e in ordered], "helper_", "helper_keys"),
    ):
        if (joined := Pictures.join(pictures)) is not None:
            batch |= {kind + "pixel_values": joined.pixel_values, kind + "grid_thw": joined.grid_thw}
            if keys:
                batch[name] = tuple(key for each in pictures if each is not None for key in each.keys)
    if any(e.regions is not None for e in ordered):
        pads = encoder.config.pad_id
        latents = [int((e.input_ids == pads).sum()) for e in ordered]
        each = [
            torch.full((n, 4), torch.nan) if e.regions is None else e.regions
            for e, n in zip(ordered, latents, strict=True)
        ]
        most = max(boxes.shape[1] for boxes in each)
        batch["helper_regions"] = torch.cat(
            [torch.nn.functional.pad(boxes, (0, most - boxes.shape[1]), value=torch.nan) for boxes in each]
        )
    return batch
