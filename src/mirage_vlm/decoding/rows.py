"""The responses that are being decoded, as tensors: every rule of a latent span is an operation on all rows at once.

A row is in text (`thought` −1) or in a span (`thought` latents so far). Opening, thinking on, closing, stopping and
the limits are decided here, without asking the host.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from mirage_vlm.decoding.marks import DONE, DUE, Marks
from mirage_vlm.decoding.sampling import allowed, draw, more_or_end, uniforms
from mirage_vlm.modeling.feedback import Patches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mirage_vlm.decoding.response import Response
    from mirage_vlm.modeling.latent_vlm import LatentVLM
    from mirage_vlm.trajectory import Trajectory

LIVE, STOPPED, FULL = 0, 1, 2
NOTHING = -1  # in a log of tokens: the row wrote nothing
NEVER = 1 << 30  # a limit that is not one


@dataclass
class Rows:
    """State of B responses, all on the device; the first dimension of each tensor is the row.

    Attributes:
        hidden: [B, D] newest hidden states, after the final norm.
        token: [B] the token chosen last, which the next step consumes.
        position: [B] rotary position of that token.
        length: [B] positions of the response in the cache.
        written: [B] tokens written down.
        thought: [B] latents of the open span; −1 in text.
        spans, latents: [B] how many so far.
        status: [B] LIVE, STOPPED (end of turn) or FULL (a limit).
        evicted: [B] the prompt's pictures are out of sight.
        mark: [B] state of `Marks`: `DONE` where no span is to be opened on demand (any more), `DUE` where one is now.
        k, learned, max_tokens, max_spans, max_latents, temperature, top_p, top_k, noise, seed, evict: [B] as asked for.
        forced: [B, F] tokens of a replay, −1 after its end.
        given: [B, L, D] latents of a replay, in order, and [B, L] in `held` which of them it holds.
        patches: [B, N, D] features of the prompt's pictures, and [B] `patch_count` of them; N = 0 where the feedback
            does not read them.
    """

    hidden: torch.Tensor
    token: torch.Tensor
    position: torch.Tensor
    length: torch.Tensor
    written: torch.Tensor
    thought: torch.Tensor
    spans: torch.Tensor
    latents: torch.Tensor
    status: torch.Tensor
    evicted: torch.Tensor
    mark: torch.Tensor
    k: torch.Tensor
    learned: torch.Tensor
    max_tokens: torch.Tensor
    max_spans: torch.Tensor
    max_latents: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    noise: torch.Tensor
    seed: torch.Tensor
    evict: torch.Tensor
    forced: torch.Tensor
    given: torch.Tensor
    held: torch.Tensor
    patches: torch.Tensor
    patch_count: torch.Tensor

    def __len__(self) -> int:
        return len(self.token)

    def seen(self) -> Patches:
        """The patches, for a feedback that reads them."""
        places = torch.arange(self.patches.shape[1], device=self.patches.device)
        return Patches(self.patches, places < self.patch_count.unsqueeze(1))

    def pick(self, index: torch.Tensor) -> Rows:
        """The rows at `index`, in its order."""
        return Rows(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def narrowed(self, replays: bool, patches: int) -> Rows:
        """The same rows without the room of those that have left: for replays, if none stays, and for more patches."""
        most = {} if replays else {"forced": 0, "given": 0, "held": 0}
        most["patches"] = patches
        return replace(self, **{name: getattr(self, name)[:, :width] for name, width in most.items()})

    def padded(self, count: int, patches: int) -> Rows:
        """These rows and idle ones up to `count`, with room for so many patches, in memory of their own."""
        longer = {}
        for f in fields(self):
            ours = getattr(self, f.name)
            if f.name == "patches":
                ours = F.pad(ours, (0, 0, 0, patches - ours.shape[1]))
            longer[f.name] = torch.cat([ours, ours.new_zeros(count - len(ours), *ours.shape[1:])])
        padded = Rows(**longer)
        padded.idle(len(self))
        return padded

    def idle(self, first: int) -> None:
        """Let the rows from `first` on do nothing."""
        self.status[first:] = FULL

    def join(self, more: Rows) -> Rows:
        """These rows and then those."""
        joined = {}
        for f in fields(self):
            ours, theirs = getattr(self, f.name), getattr(more, f.name)
            if f.name in ("forced", "held"):
                width, empty = max(ours.shape[1], theirs.shape[1]), NOTHING if f.name == "forced" else False
                ours, theirs = (F.pad(t, (0, width - t.shape[1]), value=empty) for t in (ours, theirs))
            if f.name in ("given", "patches"):
                width = max(ours.shape[1], theirs.shape[1])
                ours, theirs = (F.pad(t, (0, 0, 0, width - t.shape[1])) for t in (ours, theirs))
            joined[f.name] = torch.cat([ours, theirs])
        return Rows(**joined)


def new_rows(vlm: LatentVLM, wave: Sequence[Response]) -> Rows:
    """The state of rows that are about to choose their first token."""
    latent, device, width = vlm.config, vlm.device, vlm.width
    configs = [response.config for response in wave]

    def numbers(values: Sequence[Any], dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def reals(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    def limit(value: int | None) -> int:
        return NEVER if value is None else value

    nothing = torch.zeros(len(wave), dtype=torch.long, device=device)
    forced = [[] if r.replay is None else forced_tokens(vlm, r.replay) for r in wave]
    given = [[] if r.replay is None else _given(r.replay) for r in wave]
    longest = max(map(len, forced))
    most = max(sum(k for k, _ in spans) for spans in given)
    latents = torch.zeros(len(wave), most, width, dtype=vlm.model.dtype, device=device)
    held = torch.zeros(len(wave), most, dtype=torch.bool, device=device)
    for row, spans in enumerate(given):
        end = 0
        for k, vectors in spans:
            begin, end = end, end + k
            if vectors is not None:
                latents[row, begin:end], held[row, begin:end] = vectors.to(latents), True
    patches = [r.prompt.patches if r.prompt.patches is not None else latents.new_zeros(0, width) for r in wave]
    return Rows(
        hidden=torch.stack([r.prompt.hidden for r in wave]),  # type: ignore[misc]
        token=nothing,
        position=numbers([r.prompt.position - 1 for r in wave]),
        length=nothing - 1,
        written=nothing,
        thought=nothing - 1,
        spans=nothing,
        latents=nothing,
        status=nothing,
        evicted=nothing.bool(),
        mark=numbers([r.mark for r in wave]),
        k=numbers([latent.latent_size if c.latent_size is None else c.latent_size for c in configs]),
        learned=numbers([(c.stop_rule or latent.stop_rule) == "learned" for c in configs], torch.bool),
        max_tokens=numbers([c.max_new_tokens for c in configs]),
        max_spans=numbers([limit(c.most_spans) for c in configs]),
        max_latents=numbers([limit(c.max_latents) for c in configs]),
        temperature=reals([c.temperature for c in configs]),
        top_p=reals([c.top_p for c in configs]),
        top_k=numbers([c.top_k for c in configs]),
        noise=reals([c.latent_noise for c in configs]),
        seed=numbers([r.seed for r in wave]),
        evict=numbers([bool(c.evict_images) for c in configs], torch.bool),
        forced=numbers([f + [NOTHING] * (longest - len(f)) for f in forced]).view(len(wave), longest),
        given=latents,
        held=held,
        patches=pad_sequence(patches, batch_first=True),
        patch_count=numbers([len(own) for own in patches]),
    )


def forced_tokens(vlm: LatentVLM, replay: Trajectory) -> list[int]:
    """The tokens of a replay, the end of turn among them.

    A response that was cut inside a span had begun one latent more, which was not consumed and so not written: it is
    begun again, or the last one of the replay would be that.
    """
    decoding = replay.decoding
    assert decoding is not None
    if decoding.finish_reason != "stop":
        pad_id = vlm.config.pad_id
        return [*decoding.token_ids, *([pad_id] if decoding.token_ids[-1:] == (pad_id,) else [])]
    return [*decoding.token_ids, vlm.tokenizer.eos_token_id if decoding.stop_id is None else decoding.stop_id]


def _given(replay: Trajectory) -> list[tuple[int, torch.Tensor | None]]:
    """Of each span of a replay the number of its latents, and these [k, D]; None where it does not hold them."""
    spans = [(span.latents, span.k or 0) for span in replay.spans]
    return [(k if latents is None else len(latents), latents) for latents, k in spans]


@dataclass(frozen=True)
class Chooser:
    """Chooses the next token of every row.

    Attributes:
        vlm: whose tokens and LM head.
        stops: [S] tokens that end a response.
        banned: [3] tokens that cannot be chosen as words: a latent, the end of a span, a picture's patch.
        pack: run the LM head only for rows that have a choice. That asks the device which they are, so it is for the
            CPU; elsewhere the head runs for all rows, and those in a span take no notice of it.
        marks: where spans are opened on demand; None if no row asks for one.
        limited: some row has a limit of spans or latents.
        learned: some row closes its spans by choice.
        sampled: some row has a temperature.
        restricted: some row has a top-k or top-p.
        scored: log-probabilities are wanted.
    """

    vlm: LatentVLM
    stops: torch.Tensor
    banned: torch.Tensor
    pack: bool
    marks: Marks | None
    limited: bool
    learned: bool
    sampled: bool
    restricted: bool
    scored: bool

    @property
    def kind(self) -> tuple[int, ...]:
        """What its work depends on beside sizes."""
        return (
            0 if self.marks is None else self.marks.version,
            self.limited,
            self.learned,
            self.sampled,
            self.restricted,
            self.scored,
        )

    def __call__(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose, write down, and move every row's state on.

        Returns:
            [B] the token that was written, `NOTHING`, or −2 − token for the one that ended a response; and [B]
            log-probabilities of chosen tokens in float32, NaN where there was no choice.
        """
        latent = self.vlm.config
        pad, start, end = latent.pad_id, latent.start_id, latent.end_id
        live = rows.status == LIVE
        inside = rows.thought >= 0
        due = None if self.marks is None else live & (rows.mark == DUE)  # never inside of a span
        text = live & ~inside if due is None else live & ~inside & ~due
        more = rows.thought < rows.k  # the span may go on
        if self.limited:
            more &= rows.latents < rows.max_latents - self._owed(rows)[1]
        asks = inside & rows.learned & (rows.thought > 0) & more if self.learned else None
        forced = self._forced(rows) if rows.forced.shape[1] else None
        token, chance = self._by_model(rows, text, asks, forced)
        token = torch.where(inside if asks is None else inside & ~asks, torch.where(more, pad, end), token)
        if due is not None:
            token = torch.where(due, start, token)
        if forced is not None:
            token = torch.where(forced >= 0, forced, token)
            if due is not None and chance is not None:
                chance = torch.where(due & (token != start), -torch.inf, chance)

        ends = token == self.stops if len(self.stops) == 1 else torch.isin(token, self.stops)
        stopped = live & ends
        live = live & ~stopped
        last = rows.written + 1 == rows.max_tokens
        kept = live & ~(last & (token == pad))  # that latent would never be consumed, so it is not written
        log = torch.where(kept, token, NOTHING)
        log = torch.where(stopped, -2 - token, log)
        rows.written = rows.written + kept
        opened, thinks, closed = live & (token == start), kept & (token == pad), live & (token == end)
        rows.spans = rows.spans + opened
        rows.latents = rows.latents + thinks
        rows.thought = torch.where(opened, 0, torch.where(closed, -1, rows.thought + thinks))
        rows.evicted = rows.evicted | (closed & rows.evict)
        if self.marks is not None:
            rows.mark = torch.where(live, self.marks.after(rows.mark, token), rows.mark)
        rows.status = torch.where(stopped, STOPPED, torch.where(live & last, FULL, rows.status))
        rows.token = token
        return log, chance

    def _owed(self, rows: Rows) -> tuple[torch.Tensor | int, torch.Tensor | int]:
        """[B] spans, 0 or 1, that are still to be opened on demand, and [B] latents that are kept for them."""
        if self.marks is None:
            return 0, 0
        owed = (rows.mark != DONE).long()
        return owed, owed * self._needed(rows)

    def _needed(self, rows: Rows) -> torch.Tensor:
        """[B] the fewest latents of a span."""
        return torch.where(rows.learned, rows.k.clamp(max=1), rows.k)

    def _forced(self, rows: Rows) -> torch.Tensor:
        """[B] the token that a replay puts here; −1 where the row is free."""
        width = rows.forced.shape[1]
        here = rows.forced.gather(1, rows.written.clamp(max=width - 1).unsqueeze(1)).squeeze(1)
        return torch.where(rows.written < width, here, NOTHING)

    def _by_model(
        self, rows: Rows, text: torch.Tensor, asks: torch.Tensor | None, forced: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B] tokens by the LM head: any token in text, one more latent or the end where `asks`."""
        chooses = text if asks is None else text | asks
        if not self.pack:
            return self._among(rows, chooses, asks, forced)
        if forced is not None and not self.scored:  # a replayed token needs logits only for its probability
            at = (chooses & (forced < 0)).nonzero().flatten()
        else:
            at = chooses.nonzero().flatten()
        if len(at) == len(rows):
            return self._among(rows, chooses, asks, forced)
        token = torch.zeros_like(rows.token)
        chance = torch.full(token.shape, torch.nan, device=token.device) if self.scored else None
        if len(at):
            asked = None if asks is None else asks[at]
            found, likely = self._among(rows.pick(at), chooses[at], asked, None if forced is None else forced[at])
            token = token.index_copy(0, at, found)
            if chance is not None and likely is not None:
                chance = chance.index_copy(0, at, likely)
        return token, chance

    def _among(
        self, rows: Rows, chooses: torch.Tensor, asks: torch.Tensor | None, forced: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_by_model`, with the LM head for every row given."""
        latent = self.vlm.config
        pad, start, end = latent.pad_id, latent.start_id, latent.end_id
        logits = self.vlm.logits(rows.hidden).float()  # [n, V]
        if self.sampled:
            logits = logits / torch.where(rows.temperature > 0, rows.temperature, 1.0).unsqueeze(1)
        choice = logits.index_fill(1, self.banned, -torch.inf)
        if self.limited:
            spans, latents = self._owed(rows)
            shut = rows.spans + spans >= rows.max_spans
            shut |= rows.max_latents - latents - rows.latents < self._needed(rows)
            choice[:, start] = choice[:, start].masked_fill(shut, -torch.inf)
        if asks is not None:
            choice = torch.where(asks.unsqueeze(1), more_or_end(logits, pad, end), choice)
        possible = choice
        found = choice.argmax(dim=-1)
        if self.sampled:
            if self.restricted:
                choice = allowed(choice, rows.top_k, rows.top_p)
            drawn = draw(choice, uniforms(rows.seed, rows.written))
            found = torch.where(rows.temperature > 0, drawn, found)
        if not self.scored:
            return found, None
        said = found if forced is None else torch.where(forced >= 0, forced, found)
        chance = possible.log_softmax(dim=-1).gather(1, said.unsqueeze(1)).squeeze(1)
        return found, torch.where(chooses, chance, torch.nan)
