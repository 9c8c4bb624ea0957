"""From trajectories to tensors: chat template, pictures, latent spans, labels.

The prompt is tokenised on its own and in the same way for training and decoding, so that a model decodes from
exactly the tokens it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from PIL.Image import Resampling
from torch.nn.utils.rnn import pad_sequence

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import Fault
from mirage_vlm.modeling import refusing
from mirage_vlm.modeling.config import LATENT_END, LATENT_PAD, LATENT_START, LatentConfig
from mirage_vlm.modeling.family import QwenVL
from mirage_vlm.modeling.features import picture_keys
from mirage_vlm.modeling.plain_text import PlainText
from mirage_vlm.modeling.pooling import span_length
from mirage_vlm.trajectory import Image, LatentSpan, Message, Segment, Text, Trajectory

IGNORED = -100
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Pictures:
    """Processed pictures: `pixel_values` [patches, C · t · p · p] and `grid_thw` [n, 3]."""

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Their names by content; see `picture_keys`."""
        return picture_keys(self.pixel_values, self.grid_thw)

    def first(self) -> Pictures:
        """The first of them alone, on the same memory."""
        return Pictures(self.pixel_values[: int(self.grid_thw[0].prod())], self.grid_thw[:1])

    @staticmethod
    def join(parts: Sequence[Pictures | None]) -> Pictures | None:
        """All pictures of several examples in one; None where there are none."""
        found = [part for part in parts if part is not None]
        if not found:
            return None
        return Pictures(torch.cat([p.pixel_values for p in found]), torch.cat([p.grid_thw for p in found]))


@dataclass(frozen=True)
class Encoded:
    """One example.

    Attributes:
        input_ids: [T].
        labels: [T], −100 = no loss.
        images: its pictures.
        helpers: the picture that each span's targets are taken from.
        regions: [latents, 4 · most boxes of a latent] the boxes of each latent, NaN for those that are not there; None
            where no span has any.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    images: Pictures | None
    helpers: Pictures | None
    regions: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors; what two of them share counts once."""
        pictures = [p for p in (self.images, self.helpers) if p is not None]
        tensors = [self.input_ids, self.labels, *(p.pixel_values for p in pictures)]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@dataclass(frozen=True)
class Encoder:
    """Everything of a checkpoint that turns trajectories into tensors; light, so that workers can hold it.

    Attributes:
        stops: the tokens that end a response.
    """

    tokenizer: Any
    image_processor: Any
    config: LatentConfig
    family: QwenVL
    stops: tuple[int, ...] = ()

    @cached_property
    def plain(self) -> PlainText:
        """What keeps text from becoming control tokens."""
        return PlainText(self.tokenizer, (*self.family.mark_ids, *self.stops))

    def prompt(self, messages: Sequence[Message]) -> tuple[list[int], Pictures | None]:
        """Token ids of a prompt up to where the response begins, and its pictures.

        Raises:
            MirageError: a picture cannot be read, an earlier turn holds a latent span, a role is unknown, or the prompt
                is longer than the model's context.
        """
        if unknown := [m.role for m in messages if m.role not in ROLES]:
            raise MirageError(f"a turn's role must be one of {', '.join(ROLES)}, not {unknown[0]!r}")
        pictures = self.pictures([s for m in messages for s in m.segments if isinstance(s, Image)])
        hidden = self.plain.hide([run for m in messages for run in _runs(m.segments, Image)])
        texts = iter(hidden.texts)
        turns = [{"role": m.role, "content": [_template_part(s, texts) for s in m.segments]} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as fault:  # some allow no system turn, for one
            raise MirageError(f"the chat template refuses this prompt: {fault}") from fault
        ids = self._expand_images(self.plain.ids(text, hidden), pictures)
        self._check_length(len(ids), "a prompt")
        return ids, pictures

    def example(self, trajectory: Trajectory, *, targets: bool = True) -> Encoded:
        """A training example: prompt and response, loss on the response's text.

        Latent positions hold `latent_pad` and bear no label, except under the stop rule `learned`, where every
        pad but the first of its span is a label that says "go on".

        Args:
            targets: process the helper images too. Without, they are not even opened, unless the pooling is
                `full` and a span's length follows from its helper image.

        Raises:
            MirageError: as `prompt`, and for a span without helper image or with k larger than its patches.
        """
        prompt, images = self.prompt(trajectory.prompt)
        helpers = None
        if targets or self.config.pooling == "full":
            helpers = self._target_pictures(trajectory, images)
        grids = [None] * len(trajectory.spans) if helpers is None else list(helpers.grid_thw)
        lengths = [self._span_length(span, grid) for span, grid in zip(trajectory.spans, grids, strict=True)]
        input_ids = torch.tensor(prompt + self._response(trajectory.response, lengths))
        self._check_length(len(input_ids), "an example")
        labels = input_ids.clone()
        labels[: len(prompt)] = IGNORED
        pads = input_ids == self.config.pad_id
        if self.config.stop_rule == "learned":
            pads &= ~pads.roll(1)  # the first pad of each span
        labels[pads] = IGNORED
        self._label_readings(labels, input_ids, trajectory, images)
        if not targets:
            return Encoded(input_ids, labels, images, None)
        return Encoded(input_ids, labels, images, helpers, boxes(trajectory.spans, lengths))

    def _response(self, segments: Sequence[Segment], lengths: Sequence[int]) -> list[int]:
        """Token ids of a response, each span as start, k pads and end, and of the end of its turn."""
        hidden = self.plain.hide(_runs(segments, LatentSpan))
        texts, remaining = iter(hidden.texts), iter(lengths)
        text = "".join(
            LATENT_START + LATENT_PAD * next(remaining) + LATENT_END if isinstance(s, LatentSpan) else next(texts)
            for s in segments
        )
        return self.plain.ids(text + self.tokenizer.eos_token, hidden)

    def pictures(self, images: Sequence[Image]) -> Pictures | None:
        """Pictures through the image processor, resized by the checkpoint's `image_scale` first.

        Raises:
            MirageError: a picture cannot be read or has an impossible shape.
        """
        if not images:
            return None
        loaded = [image.load() for image in images]
        if self.config.image_scale != 1.0:
            loaded = [p.resize(self.scaled(p.size), Resampling.BICUBIC) for p in loaded]
        try:
            processed = self.image_processor(images=loaded, return_tensors="pt")
        except ValueError as fault:
            raise MirageError(f"cannot process {', '.join(map(str, images))}: {fault}") from fault
        return Pictures(processed["pixel_values"], processed["image_grid_thw"])

    def _label_readings(
        self, labels: torch.Tensor, input_ids: torch.Tensor, trajectory: Trajectory, pictures: Pictures | None
    ) -> None:
        """Labels for the words of `Image.reading`, said at the patches themselves: position t bears label t + 1."""
        places = (input_ids == self.family.image_token_id).nonzero().flatten()
        grids = [] if pictures is None else list(map(self.family.merged_grid, pictures.grid_thw))
        for image, (height, width) in zip(trajectory.images(), grids, strict=True):
            patches, places = places[: height * width], places[height * width :]
            if image.reading is None:
                continue
            known = {word: self.plain.words(word) for word in set(image.reading)}
            longer = next((word for word, ids in known.items() if len(ids) != 1), None)
            if len(image.reading) != len(patches) or longer is not None:
                fault = (
                    f"{len(image.reading)} words" if longer is None else f"{longer!r} is {len(known[longer])} tokens"
                )
                raise MirageError(
                    f"the reading of {image} must be one token for each of its {len(patches)} patches: {fault}"
                )
            labels[patches + 1] = torch.tensor([known[word][0] for word in image.reading])

    def check_span(self, span: LatentSpan, trajectory: Trajectory) -> None:
        """Whether a span can be trained on, from the size of its helper image alone.

        Raises:
            MirageError: it has no helper image, the picture cannot be opened, k is larger than its patches, or it is
                not the number of its regions.
        """
        picture = self.target_picture(span, trajectory)
        width, height = self.scaled(picture.size())
        if self.own_length(span) is None:
            try:
                patches = self.image_processor.get_number_of_image_patches(height, width, {}) // self.family.merge**2
            except ValueError as fault:
                raise MirageError(f"cannot process {picture}: {fault}") from fault
            span_length(self.config.pooling, patches, span.k or self.config.latent_size, picture)

    def faults(self, trajectory: Trajectory, *, response: bool = True, targets: bool = True) -> Iterator[Fault]:
        """What `example` would refuse, with its field; arguments as for `mirage_vlm.modeling.refusing.faults`."""
        return refusing.faults(self, trajectory, response=response, targets=targets)

    def target_picture(self, span: LatentSpan, trajectory: Trajectory) -> Image:
        """What a span's targets are features of: its helper image, or the prompt's picture."""
        if self.config.target == "prompt":
            if (picture := next(trajectory.images(), None)) is None:
                raise MirageError("the targets are to be taken from the prompt's picture, but the prompt has none")
            return picture
        if span.helper is None:
            raise MirageError("a latent span has no helper image, so it cannot be trained on")
        return span.helper

    def _target_pictures(self, trajectory: Trajectory, images: Pictures | None) -> Pictures | None:
        """The picture of each span's targets, processed; the prompt's own is not processed again."""
        shown = [self.target_picture(span, trajectory) for span in trajectory.spans]
        if self.config.target != "prompt" or not shown or images is None:
            return self.pictures(shown)
        first = images.first()
        return first if len(shown) == 1 else Pictures.join([first] * len(shown))

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of a picture as the image processor sees it."""
        scale = self.config.image_scale
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def _span_length(self, span: LatentSpan, grid: torch.Tensor | None) -> int:
        own = self.own_length(span)
        k = own or (self.config.latent_size if span.k is None else span.k)
        if k < 1:
            raise MirageError(f"a latent span must have at least one latent, not k = {k}")
        if grid is None or own is not None:
            return k
        height, width = self.family.merged_grid(grid)
        return span_length(self.config.pooling, height * width, k, span.helper)

    @staticmethod
    def own_length(span: LatentSpan) -> int | None:
        """k of a span whose latents have regions; None of one that has none."""
        if span.regions is None:
            return None
        if not span.regions or span.k not in (None, len(span.regions)):
            raise MirageError(f"a latent span of k = {span.k} has {len(span.regions)} regions; it needs one a latent")
        return len(span.regions)

    def _check_length(self, length: int, what: str) -> None:
        if length > self.family.max_positions:
            raise MirageError(
                f"{what} has {length} tokens, but the model's context holds {self.family.max_positions}: "
                "use smaller or fewer pictures, or shorter text"
            )

    def _expand_images(self, ids: list[int], pictures: Pictures | None) -> list[int]:
        """Repeat each image token as often as the picture has merged patches."""
        counts = [] if pictures is None else [h * w for h, w in map(self.family.merged_grid, pictures.grid_thw)]
        image_token = self.family.image_token_id
        if ids.count(image_token) != len(counts):
            raise MirageError(f"the chat template made {ids.count(image_token)} places for {len(counts)} pictures")
        remaining = iter(counts)
        return [token for i in ids for token in ([i] * next(remaining) if i == image_token else [i])]


def boxes(spans: Sequence[LatentSpan], lengths: Sequence[int]) -> torch.Tensor | None:
    """[latents, 4 · most of a latent] boxes of all latents, NaN for those not there; None where no span has any."""
    if all(span.regions is None for span in spans):
        return None
    each = [torch.tensor(b) for s, k in zip(spans, lengths, strict=True) for b in s.regions or [(torch.nan,) * 4] * k]
    return pad_sequence(each, batch_first=True, padding_value=torch.nan)


def _runs(segments: Sequence[Segment], between: type) -> list[list[str]]:
    """The texts of a turn, those in one list that nothing stands between."""
    runs: list[list[str]] = [[]]
    for segment in segments:
        if isinstance(segment, between):
            runs.append([])
        else:
            runs[-1].append(_text(segment))
    return runs


def _template_part(segment: Segment, texts: Iterator[str]) -> dict[str, Any]:
    if isinstance(segment, Image):
        return {"type": "image"}
    return {"type": "text", "text": next(texts)}


def _text(segment: Segment) -> str:
    if isinstance(segment, Text):
        return segment.text
    if isinstance(segment, LatentSpan):
        raise MirageError("an earlier turn holds a latent span; only the last response may have spans")
    raise MirageError("a response holds a picture; only prompts may have pictures (a span's helper image is not one)")
