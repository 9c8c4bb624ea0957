"""Decoding: every row of a batch is in text or in a latent span on its own.

A row keeps a queue of tokens that must come next. Opening a span queues its pads and its end, so the shape of a
span is held by the queue alone: nothing can end inside a span, and no pad can stand outside of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from mirage_vlm.decoding.sampling import Sampling, choose
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.config import STOP_RULES
from mirage_vlm.modeling.encoding import Pictures
from mirage_vlm.trajectory import Decoding, LatentSpan, Message, Segment, Text, Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM

LatentHook = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode.

    Attributes:
        max_new_tokens: most positions of a response, latents included.
        latent_size: k of a span; None takes the checkpoint's. Under the stop rule `learned` it is the most.
        stop_rule: `fixed` (k latents, then `latent_end`) or `learned` (the model chooses between one more latent
            and `latent_end`); None takes the checkpoint's.
        max_spans: most spans of a response; the model cannot open more.
        temperature: 0 is greedy.
        top_p, top_k: restrict sampling; 1 and 0 switch them off.
        seed: row i is sampled with seed + i, whatever batch it is in.
        seeds: a seed for each prompt, instead of `seed`.
        batch_size: prompts decoded together.
        return_latents: keep the latent vectors on the returned spans.
        latent_hook: called at each latent step as hook(latents [n, D], prompts [n], steps [n]) with the inputs
            about to be consumed, the index of their prompts and their place in the span; returns what to consume.
    """

    max_new_tokens: int = 256
    latent_size: int | None = None
    stop_rule: str | None = None
    max_spans: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    seeds: Sequence[int] | None = None
    batch_size: int = 32
    return_latents: bool = True
    latent_hook: LatentHook | None = None

    def __post_init__(self) -> None:
        if self.stop_rule is not None and self.stop_rule not in STOP_RULES:
            raise MirageError(f"unknown stop rule {self.stop_rule!r}; choose one of {', '.join(STOP_RULES)}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise MirageError(f"{name} must be positive, not {getattr(self, name)}")
        if self.latent_size is not None and self.latent_size < 1:
            raise MirageError(f"latent_size must be positive, not {self.latent_size}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise MirageError("temperature must be at least 0, top_p in (0, 1], top_k at least 0")


@torch.no_grad()
def generate(
    vlm: LatentVLM, prompts: Sequence[Trajectory | Sequence[Message]], config: GenerationConfig
) -> list[Trajectory]:
    """Decode a response to each prompt; what a trajectory already holds as a response is ignored.

    Args:
        prompts: trajectories, or bare messages.

    Returns:
        For each prompt, in order, its trajectory with the decoded response (text and latent spans).

    Raises:
        MirageError: a picture cannot be read, or a prompt with its response would not fit the model's context.
    """
    wanted = [p if isinstance(p, Trajectory) else Trajectory(tuple(p)) for p in prompts]
    if config.seeds is not None and len(config.seeds) != len(wanted):
        raise MirageError(f"got {len(config.seeds)} seeds for {len(wanted)} prompts")
    was_training = vlm.training
    vlm.eval()
    try:
        done: list[Trajectory] = []
        for start in range(0, len(wanted), config.batch_size):
            chunk = wanted[start : start + config.batch_size]
            rows = [_Row(vlm, config, start + i, trajectory) for i, trajectory in enumerate(chunk)]
            _Decoder(vlm, config, rows).run()
            done += [row.trajectory() for row in rows]
        return done
    finally:
        vlm.train(was_training)


@dataclass
class _Row:
    """One response in the making."""

    vlm: LatentVLM
    config: GenerationConfig
    index: int
    source: Trajectory
    tokens: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    spans: list[list[torch.Tensor]] = field(default_factory=list)
    open: bool = False  # in a span whose end the model chooses
    finish_reason: str = ""

    def __post_init__(self) -> None:
        latent = self.vlm.config
        self.k = self.config.latent_size or latent.latent_size
        self.learned = (self.config.stop_rule or latent.stop_rule) == "learned"
        seed = self.config.seed + self.index if self.config.seeds is None else self.config.seeds[self.index]
        self.generator = torch.Generator().manual_seed(seed)
        self.sampling = Sampling(self.config.temperature, self.config.top_p, self.config.top_k)

    def next_token(self, logits: torch.Tensor | None) -> int:
        """Choose the next token; `logits` [V] may be None where the next token is forced."""
        latent = self.vlm.config
        if self.forced:
            token = self.forced.popleft()
        elif self.open:
            assert logits is not None
            more = len(self.spans[-1]) < self.k and bool(logits[latent.pad_id] >= logits[latent.end_id])
            token = latent.pad_id if more else latent.end_id
            self.open = more
        else:
            assert logits is not None
            banned = [latent.pad_id, latent.end_id]
            if self.config.max_spans is not None and len(self.spans) >= self.config.max_spans:
                banned.append(latent.start_id)
            token = choose(logits, banned, self.sampling, self.generator)
        if token == latent.start_id:
            self.spans.append([])
            self.open = self.learned
            self.forced.extend([latent.pad_id] if self.learned else [latent.pad_id] * self.k + [latent.end_id])
        return token

    def take(self, token: int, stops: set[int]) -> None:
        """Write a token down, or finish."""
        if token in stops:
            self.finish_reason = "stop"
            return
        last = len(self.tokens) + 1 == self.config.max_new_tokens
        if not (last and token == self.vlm.config.pad_id):  # that latent is never consumed, so it is not written
            self.tokens.append(token)
        if last:
            self.finish_reason = "length"

    def trajectory(self) -> Trajectory:
        """The prompt with what was decoded."""
        return self.source.with_response(
            tuple(self._segments()), Decoding(token_ids=tuple(self.tokens), finish_reason=self.finish_reason)
        )

    def _segments(self) -> Iterable[Segment]:
        latent = self.vlm.config
        spans = iter(self.spans)
        text: list[int] = []
        for token in [*self.tokens, latent.start_id]:  # a last one to flush the text
            if token == latent.start_id:
                if piece := self.vlm.tokenizer.decode(text, skip_special_tokens=True):
                    yield Text(piece)
                text = []
                if (vectors := next(spans, None)) is not None:
                    kept = torch.stack(vectors) if vectors and self.config.return_latents else None
                    yield LatentSpan(k=len(vectors), latents=kept)
            elif token not in (latent.pad_id, latent.end_id):
                text.append(token)


class _Decoder:
    """Decodes one batch of rows: a prefill, then one position of every unfinished row a step."""

    def __init__(self, vlm: LatentVLM, config: GenerationConfig, rows: list[_Row]):
        self.vlm, self.config, self.rows = vlm, config, rows
        self.cache = DynamicCache(config=vlm.model.config.get_text_config())
        self.stops = vlm.stop_ids()

    def run(self) -> None:
        hidden = self._prefill()
        while True:
            tokens = self._next_tokens(hidden)
            if all(row.finish_reason for row in self.rows):
                return
            hidden = self._step(tokens, hidden)

    def _prefill(self) -> torch.Tensor:
        """Run all prompts, right-padded; returns the newest hidden states [B, D]."""
        vlm, device = self.vlm, self.vlm.device
        encoded = [vlm.encoder.prompt(row.source.prompt) for row in self.rows]
        lengths = torch.tensor([len(ids) for ids, _ in encoded])
        for ids, _ in encoded:
            if len(ids) + self.config.max_new_tokens > vlm.family.max_positions:
                raise MirageError(
                    f"a prompt of {len(ids)} tokens and {self.config.max_new_tokens} new ones do not fit the model's "
                    f"context of {vlm.family.max_positions}: use smaller pictures, shorter text or a lower "
                    "max_new_tokens"
                )
        width = int(lengths.max())
        input_ids = torch.full((len(encoded), width), vlm.tokenizer.pad_token_id)
        for row, (ids, _) in enumerate(encoded):
            input_ids[row, : len(ids)] = torch.tensor(ids)
        input_ids = input_ids.to(device)
        self.mask = (torch.arange(width) < lengths.unsqueeze(1)).long().to(device)  # [B, cache]
        pictures = Pictures.join([found for _, found in encoded])
        grid = None if pictures is None else pictures.grid_thw.to(device)
        pixels = None if pictures is None else pictures.pixel_values.to(device)
        positions = vlm.positions(input_ids, self.mask, grid)  # [3, B, T]
        self.position = positions.amax(dim=(0, 2)) + 1  # [B] of the next token
        hidden = self._advance(vlm.embed_prompt(input_ids, pixels, grid), positions)
        return hidden[torch.arange(len(encoded)), lengths - 1]

    def _next_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B] next tokens; the LM head runs only for rows that have a choice."""
        free = [i for i, row in enumerate(self.rows) if not row.forced and not row.finish_reason]
        logits = dict(zip(free, self.vlm.logits(hidden[free]).float().cpu(), strict=True)) if free else {}
        tokens = []
        for i, row in enumerate(self.rows):
            token = self.vlm.tokenizer.pad_token_id
            if not row.finish_reason:
                token = row.next_token(logits.get(i))
                row.take(token, self.stops)
            tokens.append(token)
        return torch.tensor(tokens, device=hidden.device)

    def _step(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Consume one token or latent of every row; finished rows are masked."""
        alive = torch.tensor([not row.finish_reason for row in self.rows], device=tokens.device)
        inputs = self.vlm.recast(tokens, hidden)  # [B, D]
        thinking = ((tokens == self.vlm.config.pad_id) & alive).nonzero().flatten().tolist()
        if thinking:
            if self.config.latent_hook is not None:
                steps = [len(self.rows[i].spans[-1]) for i in thinking]
                changed = self.config.latent_hook(inputs[thinking], [self.rows[i].index for i in thinking], steps)
                inputs[thinking] = changed.to(inputs.dtype)
            for i in thinking:
                self.rows[i].spans[-1].append(inputs[i].cpu())
        self.mask = torch.cat([self.mask, alive.long().unsqueeze(1)], dim=1)
        positions = self.position.expand(3, -1).unsqueeze(-1)  # [3, B, 1]
        self.position = self.position + 1
        return self._advance(inputs.unsqueeze(1), positions).squeeze(1)

    def _advance(self, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.vlm.language_model(
            inputs_embeds=inputs,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
