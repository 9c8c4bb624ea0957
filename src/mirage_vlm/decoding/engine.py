"""The engine: a queue of requests, rows that join and leave at any step, and one cache for all of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Unpack

import torch

from mirage_vlm.decoding import native
from mirage_vlm.decoding.blocks import run_paged
from mirage_vlm.decoding.compiled import compiled
from mirage_vlm.decoding.config import EngineConfig, GenerationChanges, GenerationConfig, checked
from mirage_vlm.decoding.graphs import Logged, StepGraphs, cuda_capture
from mirage_vlm.decoding.marks import DONE, Marks
from mirage_vlm.decoding.memory import free_memory
from mirage_vlm.decoding.plan import NativePlan, Plan, make_native_plan, make_plan
from mirage_vlm.decoding.pool import NOBODY, BlockPool
from mirage_vlm.decoding.prompts import Prompt, Reader
from mirage_vlm.decoding.response import Event, Response
from mirage_vlm.decoding.rows import FULL, LIVE, NOTHING, STOPPED, Chooser, Rows, forced_tokens, new_rows
from mirage_vlm.decoding.sampling import never_said, normals
from mirage_vlm.errors import MirageError, NoRoom
from mirage_vlm.formats.asked import Asked, as_prompt
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling.encoding import Pictures
    from mirage_vlm.modeling.latent_vlm import LatentVLM

REASONS = {STOPPED: "stop", FULL: "length"}


class Engine:
    """Decodes a queue of requests.

    `submit` puts a request into the queue, `step` moves all of them on and returns what happened, `run` goes on
    until nothing is left. A request is admitted when blocks for its prompt and its whole limit are free, in the order
    of submission, so a running response never has to give way and a waiting one never starves.

    Args:
        vlm: the model; it is put into evaluation mode.
        config: what may be used.
    """

    def __init__(self, vlm: LatentVLM, config: EngineConfig | None = None):
        self.vlm = vlm.eval()
        self.config = config = checked(config, EngineConfig, "engine")
        self.device = vlm.device
        text = vlm.language_model.config
        if other := set(text.layer_types) - {"full_attention"}:
            raise MirageError(f"the engine knows full attention only; this model has layers of {', '.join(other)}")
        fixed = config.compile and self.device.type != "cpu"
        size = config.block_size
        dtype = vlm.model.dtype if config.cache_dtype is None else getattr(torch, config.cache_dtype)
        if config.max_batch_tokens is None:
            room = config.memory_fraction * free_memory(self.device)
            limit = int(room / BlockPool.bytes_per_block(text, size, dtype))
        else:
            limit = config.max_batch_tokens // size
        self.pool = BlockPool(text, size, limit, dtype, self.device, fixed)
        self.reader = Reader(vlm, self.pool, config.prefill_tokens, config.image_cache)
        self.look_every = config.look_every or (1 if self.device.type == "cpu" else 8)
        self.marks = Marks(vlm)
        self.queue: deque[Response] = deque()
        self.active: list[Response] = []
        self.rows: Rows | None = None
        self.stops = torch.tensor(sorted(vlm.stop_ids()), device=self.device)
        self.banned = torch.tensor(never_said(vlm), device=self.device)
        self._requests, self._responses = count(), count()
        self._cancelled: set[int] = set()
        self._plan: Plan | NativePlan | None = None
        self._native = config.native and native.usable(self.pool, vlm.model.dtype)
        if fixed and not self._native:
            raise MirageError("compile on CUDA needs the engine's own kernel: Triton, heads as wide as a power of two")
        self._decode = compiled(vlm) if config.compile else run_paged
        self._graphs = StepGraphs(cuda_capture(self.device)) if fixed else None

    # -- what users call ---------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether any response is waiting or being decoded."""
        return bool(self.queue or self.active)

    def submit(
        self,
        prompt: Asked,
        config: GenerationConfig | None = None,
        *,
        replay: Trajectory | None = None,
        quiet: bool = False,
        encoded: tuple[list[int], Pictures | None] | None = None,
        **changes: Unpack[GenerationChanges],
    ) -> int:
        """Put a request into the queue.

        Args:
            prompt: a trajectory, whose response is ignored, or a conversation; see `mirage_vlm.formats.asked`.
            config: how to decode.
            replay: a decoded trajectory; its tokens are consumed again instead of chosen ones, and its latents
                instead of the model's own where it holds them. With `logprobs=True` the result says how likely
                each token was.
            quiet: of its events give out `Finished` alone, which spares the host most of its work.
            encoded: what `vlm.encoder.prompt` gives for the prompt, where it is known already.
            changes: fields of `config` to replace.

        Returns:
            The request's number, which its events bear.

        Raises:
            MirageError: a picture cannot be read, the prompt with its response can never fit, seeds are not one for
                each response or too large, or an empty response is to be replayed.
        """
        config = checked(config, GenerationConfig, "config").changed(changes)
        if config.evict_images is None:
            config = replace(config, evict_images=self.vlm.config.evict_images)
        source = as_prompt(prompt)
        if replay is not None:
            if not isinstance(replay, Trajectory) or replay.decoding is None:
                raise MirageError("only a decoded trajectory can be replayed; this one has no token ids")
            if not (forced := forced_tokens(self.vlm, replay)):
                raise MirageError("an empty response cannot be replayed")
            config = replace(config, max_new_tokens=len(forced))
        config.check_room(self.vlm.config)
        seeds = config.response_seeds()
        ids, pictures = encoded or self.vlm.encoder.prompt(source.prompt)
        context = self.vlm.family.max_positions
        if len(ids) + config.max_new_tokens > context:
            raise MirageError(
                f"a prompt of {len(ids)} tokens and {config.max_new_tokens} new ones do not fit the model's "
                f"context of {context}: use smaller pictures, shorter text or a lower max_new_tokens"
            )
        own, shared = self.pool.blocks_for(config.max_new_tokens), self.pool.blocks_for(len(ids))
        if own + shared > self.pool.limit:
            raise NoRoom(
                f"a prompt of {len(ids)} tokens and {config.max_new_tokens} new ones take {own + shared} blocks of "
                f"{self.pool.size} tokens, but the cache holds {self.pool.limit}: raise max_batch_tokens to at least "
                f"{(own + shared) * self.pool.size}, or lower max_new_tokens"
            )
        mark = self.marks.start(config.span_after) if config.spans == "forced" else DONE
        request = next(self._requests)
        shared_prompt = Prompt(source, ids, pictures, waiting=config.n)
        for sample, seed in enumerate(seeds):
            index = next(self._responses)
            response = Response(self.vlm, config, request, sample, index, seed, shared_prompt, replay)
            response.reserved, response.quiet, response.mark = own, quiet, mark
            self.queue.append(response)
        return request

    def cancel(self, request: int) -> None:
        """End a request; its responses finish with reason `cancelled` at the next step, with what they have."""
        self._cancelled.add(request)

    def run(self) -> Iterator[Event]:
        """Go on until every response is finished."""
        while self.busy:
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Admit what fits, move every row on by `look_every` positions, and tell what happened."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():  # for kernels and graphs
            return self._step()

    def _step(self) -> list[Event]:
        events = self._drop_cancelled()
        events += self._admit()
        if self.active:
            events += self._advance()
        if not self.busy:
            self.pool.trim()
            self.marks.forget()
            self.rows = None
        return events

    # -- joining -----------------------------------------------------------------------------------------------

    def _admit(self) -> list[Event]:
        """Give rows to those at the head of the queue for whom there is room, and choose their first tokens."""
        wave: list[Response] = []
        reserved = self.pool.reserved
        new: dict[int, Prompt] = {}
        for response in self.queue:
            prompt = response.prompt
            need = response.reserved
            if not prompt.blocks and id(prompt) not in new:
                need += self.pool.blocks_for(len(prompt.ids))
            if len(self.active) + len(wave) == self.config.max_rows or reserved + need > self.pool.limit:
                break
            reserved += need
            new[id(prompt)] = prompt
            wave.append(response)
        few = len(wave) < min(len(self.queue), len(self.active) // 8)
        if not wave or few:  # a pass over a handful of prompts costs nearly as much as over many
            return []
        unread = [prompt for prompt in new.values() if not prompt.blocks]
        before, self.pool.reserved = self.pool.reserved, reserved
        try:
            self.reader.read(unread)
            fresh = new_rows(self.vlm, wave)
            step = Logged(*self._chooser(wave)(fresh), inputs=None, consumed=False)
        except BaseException:  # memory, for one: all still wait, and what has been read of them stays so
            self.pool.reserved = before + sum(self.reader.kept(prompt) for prompt in unread)
            raise
        for response in wave:
            self.queue.popleft()
            response.prompt.waiting -= 1
            response.prompt.rows += 1
        self.rows = fresh if self.rows is None else self.rows.join(fresh)
        self.active += wave
        self._plan = None
        return self._look(wave, fresh, [step])

    # -- one chunk of steps ------------------------------------------------------------------------------------

    def _advance(self) -> list[Event]:
        """Move every row on by `look_every` positions, without asking the device anything in between."""
        assert self.rows is not None
        rows, plan, chooser = self.rows, self._planned(), self._chooser(self.active)
        kept = any(response.config.return_latents for response in self.active)

        def step(rows: Rows, plan: Plan | NativePlan) -> Logged:
            inputs = self._consume(rows, plan)
            return Logged(*chooser(rows), inputs if kept else None, consumed=True)

        hooked = any(response.config.latent_hook for response in self.active)  # which asks the host
        replayed = rows.forced.shape[1] or rows.given.shape[1]  # of any length, so of too many sizes
        if self._graphs is not None and isinstance(plan, NativePlan) and not (hooked or replayed):
            own = [(bool(r.config.latent_noise), r.config.evict_images) for r in self.active]
            kind = (chooser.kind, kept, *map(any, zip(*own, strict=True)))
            steps = self._graphs.run(step, kind, rows, plan, self.look_every)
        else:
            steps = [step(rows, plan) for _ in range(self.look_every)]
            if self._graphs is not None:
                self._graphs.forget()
        return self._look(self.active, rows, steps)

    def _planned(self) -> Plan | NativePlan:
        """Give rows the blocks they will write to before the next look."""
        for response in self.active:
            ahead = response.config.max_new_tokens
            if not self._native:  # which reads nothing of blocks that are still empty
                ahead = min(ahead, len(response.tokens) - 1 + self.look_every)
            missing = self.pool.blocks_for(ahead) - len(response.blocks)
            if missing > 0:
                response.blocks += self.pool.take(missing)
                self._plan = None
        if self._plan is None:
            if self._native:
                self._plan = make_native_plan(self.active, self.device)
            else:
                self._plan = make_plan(self.active, self.pool.size, self.device)
        return self._plan

    def _consume(self, rows: Rows, plan: Plan | NativePlan) -> torch.Tensor:
        """Run the decoder over the newest token or latent of each live row; returns its inputs [B, D]."""
        live = rows.status == LIVE
        rows.length = rows.length + live
        rows.position = rows.position + live
        seen = rows.seen() if self.vlm.feedback.reads_patches else None
        inputs = self.vlm.recast(rows.token, rows.hidden, seen)  # [B, D]
        thinking = live & (rows.token == self.vlm.config.pad_id)
        if any(response.config.latent_noise for response in self.active):
            noise = normals(rows.seed, rows.written, inputs.shape[1]) * rows.noise.unsqueeze(1)
            inputs = torch.where(thinking.unsqueeze(1), inputs + noise.to(inputs.dtype), inputs)
        if rows.given.shape[1]:
            which = (rows.latents - 1).clamp(min=0, max=rows.given.shape[1] - 1)
            given = rows.given[torch.arange(len(rows), device=self.device), which]
            held = rows.held.gather(1, which.unsqueeze(1)) & (rows.latents <= rows.held.shape[1]).unsqueeze(1)
            inputs = torch.where(thinking.unsqueeze(1) & held, given, inputs)
        if any(response.config.latent_hook for response in self.active):
            inputs = self._hooked(inputs, thinking, rows)
        place = torch.div(rows.length, self.pool.size, rounding_mode="floor").clamp(max=plan.own.shape[1] - 1)
        block = plan.own.gather(1, place.unsqueeze(1)).squeeze(1)
        block = torch.where(live, block, NOBODY)
        evicted = rows.evicted if any(r.config.evict_images for r in self.active) else None
        step = plan.step(self.pool, block, rows.length % self.pool.size, rows.length, evicted)
        positions = rows.position.expand(3, -1).unsqueeze(-1)
        rows.hidden = self._decode(self.vlm, inputs.unsqueeze(1), positions, step)[:, 0]
        return inputs

    def _hooked(self, inputs: torch.Tensor, thinking: torch.Tensor, rows: Rows) -> torch.Tensor:
        """What the requests' hooks make of the latents that are about to be consumed."""
        there = thinking.nonzero().flatten().tolist()
        steps = (rows.thought - 1).tolist()
        inputs = inputs.clone()
        for hook in {r.config.latent_hook for r in self.active} - {None}:
            mine = [i for i in there if self.active[i].config.latent_hook is hook]
            if mine and hook is not None:
                changed = hook(inputs[mine], [self.active[i].index for i in mine], [steps[i] for i in mine])
                inputs[mine] = changed.to(inputs)
        return inputs

    def _chooser(self, responses: Sequence[Response]) -> Chooser:
        configs = [response.config for response in responses]
        return Chooser(
            self.vlm,
            self.stops,
            self.banned,
            pack=self.device.type == "cpu",
            marks=self.marks if any(c.spans == "forced" for c in configs) else None,
            limited=any(c.most_spans is not None or c.max_latents is not None for c in configs),
            learned=any((c.stop_rule or self.vlm.config.stop_rule) == "learned" for c in configs),
            sampled=any(c.temperature > 0 for c in configs),
            restricted=any(c.top_k > 0 or c.top_p < 1 for c in configs),
            scored=any(c.logprobs for c in configs),
        )

    # -- the host's look, and leaving --------------------------------------------------------------------------

    def _look(self, responses: Sequence[Response], rows: Rows, steps: Sequence[Logged]) -> list[Event]:
        """Fetch what the rows wrote since the last look, and let go of those that are done."""
        logs = torch.stack([*(step.log for step in steps), rows.status]).tolist()
        status = logs.pop()
        events: list[Event] = []
        for step, log in zip(steps, logs, strict=True):
            chances = [math.nan] * len(log) if step.chances is None else step.chances.tolist()
            thinking = [i for i, r in enumerate(responses) if r.thinking] if step.consumed else []
            kept = [i for i in thinking if responses[i].config.return_latents]
            vectors = dict(zip(kept, step.inputs[kept].cpu(), strict=True)) if kept and step.inputs is not None else {}
            for i in thinking:
                events += responses[i].consumed(vectors.get(i))
            for response, entry, chance in zip(responses, log, chances, strict=True):
                if entry != NOTHING:
                    events += response.wrote(entry, chance)
        for response, state in zip(responses, status, strict=True):
            if state != LIVE:
                events += response.finish(REASONS[state])
        self._let_go()
        return events

    def _drop_cancelled(self) -> list[Event]:
        """Finish the responses of cancelled requests, wherever they are."""
        events: list[Event] = []
        if self._cancelled:
            for response in [r for r in (*self.queue, *self.active) if r.request in self._cancelled]:
                events += response.finish("cancelled")
                if response not in self.active:
                    self.queue.remove(response)
                    response.prompt.waiting -= 1
                    self._release(response.prompt)
            self._cancelled.clear()
            self._let_go()
        return events

    def _let_go(self) -> None:
        """Take the finished rows out and free what they held, and the pictures that nobody looks at any more."""
        staying = [i for i, response in enumerate(self.active) if not response.finish_reason]
        for response in self.active:
            if response.finish_reason:
                self.pool.give_back(response.blocks)
                self.pool.reserved -= response.reserved
                response.prompt.rows -= 1
                self._release(response.prompt)
        if len(staying) < len(self.active):
            self.active = [self.active[i] for i in staying]
            assert self.rows is not None
            self.rows = self.rows.pick(torch.tensor(staying, dtype=torch.long, device=self.device))
            self.rows = self.rows.narrowed(
                any(response.replay is not None for response in self.active),
                max((len(p) for r in self.active if (p := r.prompt.patches) is not None), default=0),
            )
            self._plan = None
        blind = {id(r.prompt): r.prompt for r in self.active if r.evicted and not r.prompt.blind}
        for prompt in blind.values():
            if prompt.waiting == 0 and all(r.evicted for r in self.active if r.prompt is prompt):
                self.pool.reserved -= prompt.drop_pictures(self.pool, self.vlm.family.image_token_id)
                self._plan = None

    def _release(self, prompt: Prompt) -> None:
        """Free a prompt that nobody reads or will read."""
        if prompt.rows == 0 and prompt.waiting == 0:
            self.pool.give_back(prompt.blocks)
            self.pool.reserved -= len(prompt.blocks)
            prompt.blocks = []
