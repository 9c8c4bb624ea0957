"""lmms-eval's model interface: `lmms-eval --model mirage_vlm --model_args pretrained=PATH`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mirage_vlm.adapters.answering import Answer, Request, Statistics, answer_all, of_rank
from mirage_vlm.adapters.messages import ModelArgs, conversation, generation, ignored
from mirage_vlm.errors import MirageError

try:
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from loguru import logger
    from tqdm import tqdm
except ImportError as fault:
    raise MirageError(
        f"lmms-eval 0.7 or newer cannot be imported ({fault}): pip install 'mirage-vlm[lmms-eval]'"
    ) from fault

Turns = Sequence[Mapping[str, Any]]


class MirageVLM(lmms):
    """A `LatentVLM` as a chat model of lmms-eval.

    Args:
        pretrained: the checkpoint.
        batch_size, max_batch_size: what lmms-eval always hands over; here `max_rows` says how many are decoded
            together, and results do not depend on it.
        given: the other `ModelArgs`.

    Raises:
        MirageError: an argument is wrong, or the checkpoint cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **given: Any,
    ):
        super().__init__()
        self.args = ModelArgs.read({**given, **({} if pretrained is None else {"pretrained": pretrained})})
        self.vlm = self.args.load()
        self.statistics = Statistics(self.args)
        self._device = self.vlm.device

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers its counts there."""
        return self._device  # which outlives the model: lmms-eval's `clean` takes that away

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests, all by one engine.

        Returns:
            For each request in order its text; of its tokens, those that were latents as `reasoning_tokens`.

        Raises:
            MirageError: a request cannot be answered; the message names its task and document.
        """
        copies: Counter[tuple[object, ...]] = Counter()

        def made() -> Iterator[Request]:
            for request in requests:
                _, doc_to_messages, settings, doc_id, task, split = request.args
                key = (task, split, doc_id, request.idx)
                turns = doc_to_messages(self.task_dict[task][split][doc_id])
                yield self._request(turns, settings, (*key, copies[key]))
                copies[key] += 1

        answers = self._answered(made(), len(requests))
        for request, answer in zip(requests, answers, strict=True):
            context, _, settings, *_ = request.args
            self.cache_hook.add_partial("generate_until", (context, settings), answer.text)
        return [_result(answer) for answer in answers]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer requests in rounds; the task makes each round's messages from the answers before it.

        Returns:
            For each request in order the texts of its rounds.

        Raises:
            MirageError: as `generate_until`.
        """
        said: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        copies: list[int] = []
        seen: Counter[int] = Counter()
        for request in requests:
            copies.append(seen[id(request)])
            seen[id(request)] += 1
        going, round_idx = list(range(len(requests))), 0
        while going:
            turns: dict[int, Turns] = {}
            for place in going:
                _, doc_to_messages, _, doc_id, task, split = requests[place].args
                doc = self.task_dict[task][split][doc_id]
                if round_idx == 0:
                    turns[place] = doc_to_messages(doc)
                    continue
                before = {"previous_output": list(said[place]), "previous_round_info": notes[place]}
                payload = doc_to_messages(doc, round_idx=round_idx, **before)
                if isinstance(payload, tuple) and len(payload) == 4 and not payload[1]:
                    turns[place], notes[place] = payload[0], payload[3]
            going = list(turns)
            made = []
            for place in going:
                _, _, settings, doc_id, task, split = requests[place].args
                key = (task, split, doc_id, requests[place].idx, copies[place], round_idx)
                made.append(self._request(turns[place], settings, key, round=round_idx))
            if made:
                for place, answer in zip(going, self._answered(iter(made), len(made)), strict=True):
                    said[place].append(answer.text)
            round_idx += 1
        return said

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not there: lmms-eval asks chat models for text alone.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a LatentVLM answers by generation only: the likelihood of an answer that is given without its latent "
            "spans is not what the model would say, and lmms-eval asks it of no chat model"
        )

    # -- one call ----------------------------------------------------------------------------------------------

    def _request(self, turns: Turns, settings: Mapping[str, Any] | None, key: tuple[Any, ...], **more: int) -> Request:
        task, split, doc_id, *_ = key
        settings = settings or {}
        name = {"task": task, "split": split, "document": doc_id, **more}
        try:
            config, stops = generation(self.args, settings, *key)
            messages = conversation(turns, self.args.system)
        except MirageError as fault:
            raise MirageError(f"task {task}, document {doc_id}: {fault}") from fault
        return Request(name, messages, config, stops, ignored(settings))

    def _answered(self, requests: Iterator[Request], n: int) -> list[Answer]:
        """Answers in order; what they cost and what their spans did goes into lmms-eval's own metrics and our file."""
        if self.args.statistics is not None:
            path = Path(self.args.statistics)
            self.statistics.path = path if self.world_size == 1 else of_rank(path, self.rank)
        before = time.perf_counter()
        with tqdm(total=n, disable=self.rank != 0, desc="Model Responding") as bar:
            answers = answer_all(self.vlm, requests, self.args, self.statistics, bar.update)
        seconds = time.perf_counter() - before
        self.statistics.save()
        if answers:
            tokens = sum(answer.tokens for answer in answers)
            rate = sum(answer.latents > 0 for answer in answers) / n
            latents = sum(answer.latents for answer in answers) / n
            measured = {"latent_rate": rate, "latents_per_response": latents, "rank": self.rank}
            log_metrics(seconds, tokens, tokens / seconds, measured)
            if rate == 0:
                logger.warning(f"no latent was consumed in {n} responses: the model has answered as a plain VLM")
        return answers


def _result(answer: Answer) -> GenerationResult:
    counts = TokenCounts(
        input_tokens=answer.prompt_tokens, output_tokens=answer.tokens, reasoning_tokens=answer.latents
    )
    return GenerationResult(text=answer.text, token_counts=counts)
