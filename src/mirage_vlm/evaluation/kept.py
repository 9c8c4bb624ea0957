"""Finished responses of an evaluation that is under way: one that was killed goes on from them."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mirage_vlm.differences import differences, in_short
from mirage_vlm.errors import MirageError
from mirage_vlm.formats import chat, to_record
from mirage_vlm.trajectory import Decoding, Trajectory, assistant_turn


class Kept:
    """Responses by the name of their replacement and the number of their example.

    With a path they are also appended to a file, one line of JSON as each finishes: first the settings of the
    evaluation, then `replacement`, `example`, `seconds`, and the response as a chat record with its latents; of an
    example that could not be decoded `error`, the reason, and an empty response. The file is made when the first
    response is there. A last line that was cut off by the end of the process is dropped.

    Args:
        path: the file; None keeps responses in memory alone.
        settings: what the responses depend on, as JSON can hold it.
        restart: forget what the file holds.

    Raises:
        MirageError: the file cannot be read, is damaged, or is of other settings; the message names the first few that
            differ.
    """

    def __init__(self, path: Path | None = None, settings: Mapping[str, Any] | None = None, restart: bool = False):
        self.path = path
        self.settings = json.loads(json.dumps(settings or {}))
        self._found: dict[tuple[str, int], Trajectory] = {}
        self._errors: dict[tuple[str, int], str] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._file: BinaryIO | None = None
        self._size = 0  # of the whole lines that are in the file
        if path is not None and path.exists():
            try:
                if restart:
                    path.unlink()
                else:
                    self._read(path)
            except OSError as fault:
                raise MirageError(f"{path}: cannot be read or removed: {fault.strerror or fault}") from fault
        self.resumed = len(self._found)

    def __contains__(self, place: tuple[str, int]) -> bool:
        return place in self._found

    def response(self, name: str, i: int, example: Trajectory) -> Trajectory:
        """The example with the response that is kept for it."""
        found = self._found[name, i]
        return example.with_response(found.response, found.decoding)

    def error(self, name: str, i: int) -> str | None:
        """Why an example could not be decoded; None where it was."""
        return self._errors.get((name, i))

    @property
    def failed(self) -> int:
        """How many could not be decoded."""
        return len(self._errors)

    def seconds(self, name: str | None = None) -> float:
        """What decoding took, in all processes that took part: of one replacement, or of all."""
        return sum(self._seconds.values()) if name is None else self._seconds.get(name, 0.0)

    def add(self, name: str, i: int, trajectory: Trajectory, seconds: float) -> None:
        """Keep the response of a decoded trajectory.

        Raises:
            MirageError: the file cannot be written.
        """
        assert trajectory.decoding is not None
        response = Trajectory(trajectory.messages[-1:], decoding=trajectory.decoding)
        self._found[name, i] = response
        self._seconds[name] += seconds
        if self.path is not None:
            line = {"replacement": name, "example": i, "seconds": round(seconds, 6), **to_record(response)}
            if (reason := self.error(name, i)) is not None:
                line["error"] = reason
            try:
                self._append(self.path, line)
            except OSError as fault:
                raise MirageError(f"cannot write {self.path}: {fault.strerror or fault}") from fault

    def fail(self, name: str, i: int, reason: str) -> None:
        """Keep that an example cannot be decoded, so that it is not tried again.

        Raises:
            MirageError: the file cannot be written.
        """
        self._errors[name, i] = reason
        self.add(name, i, Trajectory((assistant_turn(),), decoding=Decoding((), "error")), 0.0)

    def discard(self) -> None:
        """Remove the file: the results are written."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _append(self, path: Path, line: Mapping[str, Any]) -> None:
        if self._file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                os.truncate(path, self._size)
            self._file = path.open("ab")
            if not self._size:
                self._file.write(json.dumps({"settings": self.settings}).encode() + b"\n")
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        self._size = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._size].split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                if number == 1:
                    settings = record["settings"]
                else:
                    place = (str(record["replacement"]), int(record["example"]))
                    if "error" in record:
                        self._errors[place] = str(record.pop("error"))
                    response = chat.from_record(record, None)
                    if response.decoding is None:
                        raise KeyError("decoding")
                    self._found[place] = response
                    self._seconds[place[0]] += float(record["seconds"])
            except (ValueError, KeyError, TypeError) as fault:
                raise MirageError(f"{path}:{number}: is damaged; remove it or start over with --restart") from fault
            if number == 1 and (differing := list(differences(settings, self.settings))):
                raise MirageError(
                    f"{path} was left by another evaluation ({in_short(differing)}): repeat that one to finish "
                    "it, remove it, or start over with --restart"
                )
