"""The texts of a run that is under way or done, on disk as they come: what was paid for is not lost."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.kept import differences


class Journal:
    """A file with a line of JSON for the settings, then one for each line of the data that was tried.

    An entry has `line`, `sha256` of that line, `usage`, and either `accepted` and `reasoning`, or `rejected` (what
    spoke against each attempt) and `last_text`. A line has at most one accepted entry. What the end of a process has
    cut off is dropped. Whoever opens it holds a lock.

    Args:
        path: the file.
        out: the output that is written from it.
        settings: what accepted texts depend on, as JSON can hold it.
        restart: forget what the file holds.

    Raises:
        MirageError: the file is damaged, is of other settings, or is missing or empty beside an output.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, out: Path, settings: Mapping[str, Any], restart: bool = False):
        self.path = path
        self.accepted: dict[int, dict[str, Any]] = {}
        self.rejected: dict[int, dict[str, Any]] = {}  # what came last of the lines without a text
        self.usages: list[dict[str, int]] = []
        self._sha256: dict[int, str] = {}  # of the lines that have a text
        settings = json.loads(json.dumps(settings))
        if restart:
            path.unlink(missing_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and not restart and out.exists():
            state = "with an empty" if path.exists() else "without"
            raise MirageError(f"{out}: is there already, {state} {path.name}: name another file, or --restart")
        self._read(whole, settings)
        binary = getattr(os, "O_BINARY", 0)  # which only Windows has
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | binary, 0o666)
        os.ftruncate(self._file, len(whole))
        if not whole:
            self._append({"settings": settings})

    def check(self, sha256: Mapping[int, str], data: Path) -> None:
        """Whether the entries are of this data, which may have got more lines since.

        Args:
            sha256: of each line, by its number.
            data: the file, for the message.

        Raises:
            MirageError: a line is another, or gone.
        """
        for number, digest in self._sha256.items():
            if sha256.get(number) != digest:
                raise MirageError(
                    f"{data}:{number}: has changed since its text was written ({self.path}): bring the old line back, "
                    "or start over with --restart"
                )

    def add(self, entry: Mapping[str, Any]) -> None:
        """Keep an entry; when this returns, it is on disk.

        Raises:
            OSError: it cannot be written.
        """
        self._append(entry)
        self._take(dict(entry))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        if os.write(self._file, line) < len(line):
            raise OSError(f"{self.path}: only a part of a line could be written")
        os.fsync(self._file)

    def _take(self, entry: dict[str, Any]) -> None:
        number, digest = int(entry["line"]), str(entry["sha256"])
        usage = {
            name: int(entry["usage"][name]) for name in ("replies", "prompt_tokens", "completion_tokens", "untold")
        }
        if "accepted" in entry:
            if number in self.accepted:
                raise ValueError(f"line {number} has two texts")
            if any(not isinstance(entry["accepted"][name], str) for name in ("before", "after", "answer")):
                raise TypeError("a part of a text is no string")
            self._sha256[number] = digest
            self.accepted[number] = {"accepted": dict(entry["accepted"]), "reasoning": dict(entry["reasoning"])}
            self.rejected.pop(number, None)
        else:
            self.rejected[number] = {"reasons": list(entry["rejected"]), "last_text": str(entry["last_text"])}
        self.usages.append(usage)

    def _read(self, content: bytes, settings: Mapping[str, Any]) -> None:
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                if number > 1:
                    self._take(record)
                    continue
                there = dict(record["settings"])
            except (ValueError, KeyError, TypeError) as fault:
                raise MirageError(
                    f"{self.path}:{number}: is damaged; remove it or start over with --restart"
                ) from fault
            if differing := list(differences(there, settings)):
                raise MirageError(
                    f"{self.path}: was left by other settings ({'; '.join(differing[:3])}): repeat those, name another "
                    "--out, or start over with --restart"
                )
