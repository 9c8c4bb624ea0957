"""What the benchmarks run on: models that never stop by themselves, prompts, and the two ways of decoding a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from mirage_vlm.decoding import Engine, EngineConfig, Finished, GenerationConfig
from mirage_vlm.modeling.bundled import BUNDLED, resolve
from mirage_vlm.modeling.encoding import Pictures
from mirage_vlm.modeling.latent_vlm import LatentVLM
from mirage_vlm.modeling.scratch import ScratchConfig, build
from mirage_vlm.tasks.make import GeneratedDataset, Split
from mirage_vlm.trajectory import Image, LatentSpan, Message, Segment, Text, Trajectory

LEVELS = (3, 4, 5, 6)


class Endless(LatentVLM):
    """A model that never ends a response, so that every way decodes the same number of positions.

    The end of turn is a token like others. With `opens`, a span is opened wherever one may be: up to `max_spans` of
    them stand at the front of each response, which makes real decoding with spans of a model that knows none.
    """

    opens = False

    def stop_ids(self) -> set[int]:
        return set()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        found = super().logits(hidden)
        if self.opens:
            found[..., self.config.start_id] = 1e4
        return found


def endless(vlm: LatentVLM) -> Endless:
    """The same model, never ending; transformers' `generate` does not end on it either."""
    vlm.model.generation_config.eos_token_id = None
    return Endless(vlm.model, vlm.tokenizer, vlm.image_processor, vlm.config).eval()


def bundled(device: torch.device, dtype: torch.dtype) -> Endless:
    """The model that comes with the package."""
    return endless(LatentVLM.from_pretrained(resolve(BUNDLED), device=device, dtype=dtype))


def random_model(shape: ScratchConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Endless:
    """A model of any size with random weights, which opens a span now and then."""
    texts = [text for example in planning(64, "train") for text in _texts(example)]
    vlm = build(shape, texts, seed, latent_size=4, image_scale=0.4375)
    with torch.no_grad():
        row = torch.randn(vlm.width, generator=torch.Generator().manual_seed(seed))
        vlm.model.lm_head.weight[vlm.config.start_id] = 2 * row / vlm.width**0.5  # twice the size of other rows
    return endless(vlm.to(device, dtype))


def _texts(example: Trajectory) -> list[str]:
    return [s.text for message in example.messages for s in message.segments if isinstance(s, Text)]


def planning(n: int, split: Split, levels: Sequence[int] = LEVELS, style: str = "cot") -> list[Trajectory]:
    """Examples of planning on maps of mixed sizes, their pictures drawn already."""
    made = GeneratedDataset("vsp-planning", levels, n, 0, style, split)
    return [drawn(made[i]) for i in range(n)]


def drawn(example: Trajectory) -> Trajectory:
    """The same example with its pictures in memory."""

    def segment(s: Segment) -> Segment:
        if isinstance(s, Image):
            return Image(s.load())
        if isinstance(s, LatentSpan) and s.helper is not None:
            return replace(s, helper=Image(s.helper.load()))
        return s

    return replace(example, messages=tuple(Message(m.role, tuple(map(segment, m.segments))) for m in example.messages))


def engine_for(
    vlm: LatentVLM,
    prompts: Sequence[Trajectory],
    new_tokens: int,
    *,
    rows: int | None = None,
    compiled: bool = False,
    cache_dtype: str | None = None,
) -> Engine:
    """An engine with just enough room, which keeps no picture from one call to the next."""
    rows = rows or len(prompts)
    config = EngineConfig(max_rows=rows, image_cache=0, compile=compiled, cache_dtype=cache_dtype)
    longest = max(len(vlm.encoder.prompt(p.prompt)[0]) for p in prompts)
    blocks = sum(-(-positions // config.block_size) for positions in (longest, new_tokens))
    return Engine(vlm, replace(config, max_batch_tokens=rows * blocks * config.block_size))


def decode(engine: Engine, prompts: Sequence[Trajectory], generation: GenerationConfig) -> list[list[int]]:
    """The tokens of each response, from prompts as users have them to text as users get it."""
    numbers = [engine.submit(prompt, generation, quiet=True) for prompt in prompts]
    done = {event.request: event.trajectory.decoding for event in engine.run() if isinstance(event, Finished)}
    return [list(found.token_ids) for number in numbers if (found := done[number]) is not None]


@torch.no_grad()
def generate(vlm: LatentVLM, prompts: Sequence[Trajectory], new_tokens: int) -> list[list[int]]:
    """The same by transformers' `generate`: greedy, text only, left-padded; detokenised too."""
    latent, image, device = vlm.config, vlm.family.image_token_id, vlm.device
    encoded = [vlm.encoder.prompt(prompt.prompt) for prompt in prompts]
    width = max(len(ids) for ids, _ in encoded)
    blank = vlm.tokenizer.pad_token_id
    ids = torch.stack([F.pad(torch.tensor(ids), (width - len(ids), 0), value=blank) for ids, _ in encoded])
    mask = torch.stack([F.pad(torch.ones(len(ids), dtype=torch.long), (width - len(ids), 0)) for ids, _ in encoded])
    images = {}
    if (pictures := Pictures.join([pictures for _, pictures in encoded])) is not None:
        images = {
            "pixel_values": pictures.pixel_values.to(device),
            "image_grid_thw": pictures.grid_thw.to(device),
            "mm_token_type_ids": (ids == image).int().to(device),
        }
    found = vlm.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=new_tokens,
        do_sample=False,
        suppress_tokens=[latent.start_id, latent.pad_id, latent.end_id, image],
        **images,
    )[:, width:].tolist()
    vlm.tokenizer.batch_decode(found, skip_special_tokens=True)
    return found


@contextmanager
def attention(vlm: LatentVLM, name: str) -> Iterator[None]:
    """Within, transformers' own passes use this attention implementation."""
    usual = vlm.model.config._attn_implementation
    vlm.model.set_attn_implementation(name)
    try:
        yield
    finally:
        vlm.model.set_attn_implementation(usual)
