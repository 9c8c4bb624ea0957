"""VLMEvalKit's model interface, and a way to start its `run.py` with it.

`python -m mirage_vlm.adapters.vlmevalkit --model-args pretrained=PATH run.py --model mirage_vlm --data MMVP`
"""

from __future__ import annotations

import argparse
import atexit
import os
import queue
import runpy
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mirage_vlm.adapters.answering import Answer, Answering, Request, Statistics, of_rank
from mirage_vlm.adapters.messages import ModelArgs, conversation, generation
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM

try:
    from vlmeval.vlm.base import BaseModel
except ImportError as fault:
    told = f"VLMEvalKit cannot be imported ({fault}): install it, or go to its folder"
    if __name__ == "__main__":
        sys.exit(f"error: {told}")
    raise MirageError(told) from fault

NAME = "mirage_vlm"


class MirageVLM(BaseModel):
    """A `LatentVLM` as a model of VLMEvalKit.

    VLMEvalKit asks local models one question after the other, and models behind an API many at once, from as many
    threads as `--api-nproc` says. This one calls itself the latter, so that its engine decodes them together; with
    several processes (torchrun), which VLMEvalKit allows to local models alone, each decodes one at a time.

    Args:
        pretrained: the checkpoint.
        given: the other `ModelArgs`.

    Raises:
        MirageError: an argument is wrong, or the checkpoint cannot be loaded.
    """

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(self, pretrained: str, **given: Any):
        super().__init__()
        self.args = ModelArgs.read({"pretrained": pretrained, **given})
        path = None if self.args.statistics is None else Path(self.args.statistics)
        if path is not None and "RANK" in os.environ:
            path = of_rank(path, os.environ["RANK"])
        self.statistics = Statistics(self.args, path)
        self.desk = Desk(self.args.load(), self.args, self.statistics)
        if path is not None:
            atexit.register(self.statistics.save)

    @property
    def is_api(self) -> bool:
        """Whether VLMEvalKit may ask from many threads."""
        return int(os.environ.get("WORLD_SIZE", 1)) == 1

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a message of parts `{"type": "text" or "image", "value": …}`, with a `role` where it has one.

        Raises:
            MirageError: it cannot be answered.
        """
        turns: list[dict[str, Any]] = []
        for part in message:
            role = part.get("role", "user")
            if not turns or turns[-1]["role"] != role:
                turns.append({"role": role, "content": []})
            turns[-1]["content"].append(part)
        return self._answer(turns, dataset).text

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a conversation of turns `{"role": …, "content": parts}`.

        Raises:
            MirageError: it cannot be answered.
        """
        return self._answer(message, dataset).text

    def _answer(self, turns: Sequence[Mapping[str, Any]], dataset: str | None) -> Answer:
        # VLMEvalKit says nothing of which line it asks, so what it asks must name it
        asked = [
            (turn["role"], part["type"], os.path.basename(part["value"]) if part["type"] == "image" else part["value"])
            for turn in turns
            for part in turn["content"]
        ]
        config, stops = generation(self.args, {}, dataset, asked)
        return self.desk.ask(Request({"task": dataset}, conversation(turns, self.args.system), config, stops))


class Desk:
    """Takes requests from many threads; one thread of its own decodes them all, and ends when there is none left.

    Args:
        vlm: the model.
        args: the user's arguments.
        statistics: told of every answer.
    """

    def __init__(self, vlm: LatentVLM, args: ModelArgs, statistics: Statistics):
        self.vlm, self.args, self.statistics = vlm, args, statistics
        self._inbox: queue.SimpleQueue[tuple[Request, Future[Answer]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._working = False
        self._running: Answering | None = None

    def ask(self, request: Request) -> Answer:
        """The answer, when it is there.

        Raises:
            MirageError: the request cannot be answered.
        """
        future: Future[Answer] = Future()
        with self._lock:
            self._inbox.put((request, future))
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="mirage-vlm", daemon=True).start()
        return future.result()

    def _work(self) -> None:
        waiting: dict[int, Future[Answer]] = {}
        try:
            if self._running is None:
                self._running = Answering(self.vlm, self.args, self.statistics)
            running = self._running
            while self._take(running, waiting):
                for number, answer in running.step().items():
                    waiting.pop(number).set_result(answer)
        except Exception as fault:  # of the engine itself: all who wait are to raise it
            failed = list(waiting.values())
            with self._lock:
                self._working, self._running = False, None
                while not self._inbox.empty():
                    failed.append(self._inbox.get()[1])
            for future in failed:
                future.set_exception(fault)

    def _take(self, running: Answering, waiting: dict[int, Future[Answer]]) -> bool:
        """Hand what has come to the engine; False where there is nothing to do."""
        while True:
            with self._lock:
                if self._inbox.empty():
                    self._working = bool(waiting)
                    return self._working
                request, future = self._inbox.get()
            try:
                waiting[running.submit(request)] = future
            except Exception as fault:
                future.set_exception(fault)
                if not isinstance(fault, MirageError):  # not of this request alone
                    raise


def register(args: ModelArgs | None = None, name: str = NAME) -> None:
    """Make VLMEvalKit know the class `MirageVLM`, for its `--config`, and with arguments a model, for its `--model`."""
    import vlmeval.vlm
    from vlmeval.config import supported_VLM

    vlmeval.vlm.MirageVLM = MirageVLM
    if args is not None:
        supported_VLM[name] = partial(MirageVLM, **asdict(args))


def main(arguments: Sequence[str] | None = None) -> None:
    """Start VLMEvalKit's `run.py` with the model registered."""
    parser = argparse.ArgumentParser(
        prog="python -m mirage_vlm.adapters.vlmevalkit",
        description="Start VLMEvalKit's run.py with a Mirage checkpoint.",
    )
    parser.add_argument("--model-args", metavar="ARGS", help="pretrained=PATH,device=cuda,… for run.py's --model")
    parser.add_argument("--name", default=NAME, help="the model's name for run.py's --model")
    parser.add_argument("run", type=Path, help="VLMEvalKit's run.py")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="what run.py is to be given")
    said = parser.parse_args(arguments)
    try:
        if not said.run.is_file():
            raise MirageError(f"{said.run}: there is no such file; give the run.py of VLMEvalKit's repository")
        register(None if said.model_args is None else ModelArgs.parse(said.model_args), said.name)
    except MirageError as fault:
        parser.exit(2, f"error: {fault}\n")
    sys.argv = [str(said.run), *said.rest]
    sys.path.insert(0, str(said.run.resolve().parent))  # as Python does for a script
    runpy.run_path(str(said.run), run_name="__main__")


if __name__ == "__main__":
    main()
