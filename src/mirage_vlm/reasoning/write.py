"""Writing reasoning texts for a data file: a stronger model sees the answer and the helper image, the reader does not.

Every text that is accepted goes to a journal beside the output at once. A process that starts again goes on from
there, and the output is written from it, whole, when all lines have been tried.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mirage_vlm.errors import MirageError
from mirage_vlm.formats import atomic_writer, scan, to_record, write_jsonl
from mirage_vlm.formats.faults import Fault, summary
from mirage_vlm.formats.pictures import as_given, file_of, is_file
from mirage_vlm.reasoning.accept import Check, Rules, Written, answer_check, judge
from mirage_vlm.reasoning.endpoint import Connection, Endpoint, NoReply, Refused, Reply
from mirage_vlm.reasoning.journal import Journal
from mirage_vlm.reasoning.prompt import PROMPT_VERSION, correction, prompt_of
from mirage_vlm.trajectory import Image, LatentSpan, Trajectory

MOST_SILENT = 5  # lines in a row without a reply, after which the endpoint counts as broken
MOST_REFUSED = 20  # lines, from the first on: then it is the settings that are refused, not the lines


@dataclass(frozen=True)
class Line:
    """One line of the data.

    Attributes:
        number: of the line in the file, from 1.
        where: file and line, for messages.
        example: what it holds.
        check: judges a final answer.
        sha256: of the example with its pictures' bytes.
    """

    number: int
    where: str
    example: Trajectory
    check: Check
    sha256: str


@dataclass
class Report:
    """How far it is.

    Attributes:
        lines: lines to write a text for.
        written: lines with an accepted text, those of earlier processes included.
        earlier: of these, those of earlier processes.
        rejected: lines for which no text was accepted in this process.
        replies: replies that were read, in all processes.
        prompt_tokens, completion_tokens: what they cost.
        untold: replies without usage.
    """

    lines: int
    written: int = 0
    earlier: int = 0
    rejected: int = 0
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    untold: int = 0

    def spend(self, usage: Mapping[str, int]) -> None:
        """Add the usage of a line."""
        for name in ("replies", "prompt_tokens", "completion_tokens", "untold"):
            setattr(self, name, getattr(self, name) + usage[name])

    def cost(self, price_in: float, price_out: float) -> float:
        """In the currency of the prices, which are for a million tokens."""
        return (self.prompt_tokens * price_in + self.completion_tokens * price_out) / 1e6


@dataclass
class Tried:
    """What came of a line: the accepted parts and who wrote them, or what spoke against each attempt.

    `silent` says that the endpoint gave no sign of life: neither a text nor a refusal; `refused` that it will not.
    """

    line: Line
    written: Written | None = None
    model: str | None = None
    faults: list[list[str]] = field(default_factory=list)
    text: str = ""
    silent: bool = False
    refused: bool = False
    usage: dict[str, int] = field(
        default_factory=lambda: {"replies": 0, "prompt_tokens": 0, "completion_tokens": 0, "untold": 0}
    )

    def count(self, reply: Reply) -> None:
        """Add the usage of a reply."""
        self.usage["replies"] += 1
        self.usage["untold"] += reply.prompt_tokens is None or reply.completion_tokens is None
        self.usage["prompt_tokens"] += reply.prompt_tokens or 0
        self.usage["completion_tokens"] += reply.completion_tokens or 0


def read_lines(path: Path) -> list[Line]:
    """The lines of a JSONL file, each with an answer and one latent span that has a helper image.

    Raises:
        MirageError: the file cannot be read or has no examples; a line has a fault, or lacks what is needed.
    """
    if path.is_dir():
        raise MirageError(f"{path}: is a folder; name a JSONL file (`mirage data convert` makes one of a dataset)")
    found, faults = [], []
    for scanned in scan(path):
        faults += [(scanned.where, fault) for fault in scanned.faults]
        if scanned.trajectory is None:
            continue
        try:
            check = _prepare(scanned.trajectory)
        except MirageError as fault:
            faults.append((scanned.where, Fault("", str(fault))))
        else:
            number = int(scanned.where.rpartition(":")[2])
            found.append(Line(number, scanned.where, scanned.trajectory, check, _sha256(scanned.trajectory)))
    if faults:
        raise MirageError(summary(faults))
    if not found:
        raise MirageError(f"{path}: holds no examples")
    return found


def _prepare(example: Trajectory) -> Check:
    if len(example.spans) != 1 or example.spans[0].helper is None:
        n = len(example.spans)
        raise MirageError(f"messages: the response must have one latent span with a helper image; it has {n} spans")
    if any(isinstance(segment, LatentSpan) for message in example.prompt for segment in message.segments):
        raise MirageError("messages: only the last turn may have a latent span")
    if example.decoding is not None or example.spans[0].latents is not None:
        raise MirageError("decoding: is a decoded trajectory; texts are written for training data")
    if "reasoning" in example.meta:
        raise MirageError("meta.reasoning: a text has been written for this line already")
    return answer_check(example)


def _sha256(example: Trajectory) -> str:
    def content(image: Image) -> str:
        if not is_file(image):
            return as_given(image)
        try:
            return hashlib.sha256(file_of(image).read_bytes()).hexdigest()
        except OSError as fault:
            raise MirageError(f"cannot read the picture {image}: {fault}") from fault

    record = json.dumps(to_record(example, image_source=content), sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()


def settings_of(connection: Connection, rules: Rules) -> dict[str, Any]:
    """What an accepted text depends on, beside its line."""
    return {
        "model": connection.model,
        "endpoint": connection.host,
        "params": dict(connection.params),
        "rules": asdict(rules),
        "prompt_version": PROMPT_VERSION,
    }


def rejected_path(out: Path) -> Path:
    """Where the lines without a text are listed: `OUT.rejected.jsonl`, without the `.jsonl` of `out`."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.rejected.jsonl")


def journal_path(out: Path) -> Path:
    """Where accepted texts are kept: `OUT.journal.jsonl`, without the `.jsonl` of `out`."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.journal.jsonl")


def write_reasoning(
    data: Path,
    out: Path,
    connection: Connection,
    rules: Rules,
    *,
    attempts: int = 3,
    concurrency: int = 4,
    limit: int | None = None,
    restart: bool = False,
    progress: Callable[[Report], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Report:
    """Write a text for each line of `data` that has none yet, then `out` and the list of rejected lines.

    Not for a thread in which an asyncio loop runs.

    Args:
        data: JSONL; see `read_lines`.
        out: JSONL with the lines that have a text, in the order of `data`.
        connection: the endpoint.
        rules: what a text must be like.
        attempts: most texts that are asked for of each line.
        concurrency: most requests at a time.
        limit: try only the first lines, and report of them; what the others have stays in `out`.
        restart: forget what the journal holds.
        progress: called at the start and after each line.
        tell: called with lines for people.

    Raises:
        MirageError: a file is faulty, or of another run; another process writes the same output; the endpoint refuses
            all requests, or gives no reply to several lines in a row. What was accepted stays in the journal.
    """
    if attempts < 1 or concurrency < 1:
        raise MirageError("--attempts and --concurrency must be at least 1")
    if data.resolve() in {path.resolve() for path in (out, journal_path(out), rejected_path(out))}:
        raise MirageError(f"--out: {out} would replace the data or has its name; choose another")
    endpoint = Endpoint(connection, tell=tell)
    lock = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):  # the system takes it back from a process that dies
            lines = read_lines(data)
            journal = Journal(journal_path(out), out, settings_of(connection, rules), restart)
            try:
                journal.check({line.number: line.sha256 for line in lines}, data)
                return _run(lines, limit, out, endpoint, rules, journal, attempts, concurrency, progress, tell)
            finally:
                journal.close()
    except Timeout as fault:
        raise MirageError(f"{out}: another process is writing it ({lock} is held)") from fault
    except OSError as fault:
        raise MirageError(f"{out}: cannot be written: {fault.strerror or fault}") from fault


def _run(
    lines: Sequence[Line],
    limit: int | None,
    out: Path,
    endpoint: Endpoint,
    rules: Rules,
    journal: Journal,
    attempts: int,
    concurrency: int,
    progress: Callable[[Report], None] | None,
    tell: Callable[[str], None] | None,
) -> Report:
    wanted = lines[:limit]
    report = Report(len(wanted))
    report.written = report.earlier = sum(line.number in journal.accepted for line in wanted)
    for usage in journal.usages:
        report.spend(usage)
    if report.earlier and tell is not None:
        tell(f"{journal.path}: goes on after {report.earlier} of {len(wanted)} lines")
    silent = refused = 0

    def finish(tried: Tried) -> None:
        nonlocal silent, refused
        journal.add(_entry(tried, endpoint.connection))
        report.spend(tried.usage)
        if tried.written is not None:
            report.written += 1
        else:
            report.rejected += 1
        if progress is not None:
            progress(report)
        silent = silent + 1 if tried.silent else 0
        if silent >= MOST_SILENT:
            raise MirageError(
                f"{endpoint.connection.host}: {silent} lines in a row got no reply; the last, {tried.line.where}: "
                f"{tried.faults[-1][-1]}"
            )

        refused += tried.refused
        if refused == MOST_REFUSED == report.written + report.rejected and not report.earlier:
            raise MirageError(
                f"{endpoint.connection.host}: refuses every line, {refused} so far; the last, {tried.line.where}: "
                f"{tried.faults[-1][-1]}"
            )

    if progress is not None:
        progress(report)
    todo = [line for line in wanted if line.number not in journal.accepted]
    todo.sort(key=lambda line: line.number in journal.rejected)  # those that may fail again are not in the others' way
    asyncio.run(_all(todo, endpoint, rules, attempts, concurrency, finish))
    _write_out(lines, out, journal)
    return report


async def _all(
    lines: Sequence[Line],
    endpoint: Endpoint,
    rules: Rules,
    attempts: int,
    concurrency: int,
    finish: Callable[[Tried], None],
) -> None:
    """Try all lines; the first exception ends the others' requests."""
    queue: Iterator[Line] = iter(lines)  # shared by all workers, which take turns only where they wait

    async def work() -> None:
        for line in queue:
            finish(await _try(line, endpoint, rules, attempts))

    workers: list[asyncio.Task[None]] = []
    try:
        if lines:
            await endpoint.reach()
        workers += [asyncio.create_task(work()) for _ in range(min(concurrency, len(lines)))]
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await endpoint.close()


async def _try(line: Line, endpoint: Endpoint, rules: Rules, attempts: int) -> Tried:
    """Ask until a text is accepted; each further request says what was wrong with the text before."""
    tried = Tried(line)
    asked = prompt_of(line.example, rules)
    messages = asked
    for _ in range(attempts):
        try:
            reply = await endpoint.ask(messages)
        except NoReply as fault:
            tried.refused = isinstance(fault, Refused)
            tried.silent = not tried.faults and not tried.refused
            tried.faults.append([str(fault)])
            break
        tried.count(reply)
        tried.text, tried.model = reply.text, reply.model
        written, faults = judge(reply.text, line.example, rules, line.check)
        if reply.finish_reason in ("length", "content_filter"):
            written = None
            faults.insert(0, f"the text was cut off (finish reason {reply.finish_reason})")
        tried.faults.append(faults)
        if written is not None:
            tried.written = written
            break
        messages = [*asked, *correction(reply.text, faults)]
    return tried


def _entry(tried: Tried, connection: Connection) -> dict[str, Any]:
    """What the journal keeps of a line."""
    entry: dict[str, Any] = {"line": tried.line.number, "sha256": tried.line.sha256, "usage": tried.usage}
    if tried.written is None:
        return entry | {"rejected": tried.faults, "last_text": tried.text}
    told = {name: tried.usage[name] for name in ("prompt_tokens", "completion_tokens")}
    reasoning = {
        "model": connection.model,
        "served_as": tried.model,
        "endpoint": connection.host,
        "attempts": len(tried.faults),
        "prompt_version": PROMPT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "usage": None if tried.usage["untold"] else told,
    }
    return entry | {"accepted": asdict(tried.written), "reasoning": reasoning}


def _write_out(lines: Sequence[Line], out: Path, journal: Journal) -> None:
    """The output and the list of rejected lines, both as the journal has them, in the order of the data."""
    done = [(line, journal.accepted[line.number]) for line in lines if line.number in journal.accepted]
    if done:
        write_jsonl(out, (_with_text(line, entry) for line, entry in done))
    else:
        out.unlink(missing_ok=True)  # of before a restart
    rejected = [(line, journal.rejected[line.number]) for line in lines if line.number in journal.rejected]
    if rejected:
        with atomic_writer(rejected_path(out)) as file:
            for line, entry in rejected:
                record = {"line": line.number, "where": line.where, **entry}
                file.write(json.dumps(record).encode() + b"\n")
    else:
        rejected_path(out).unlink(missing_ok=True)


def _with_text(line: Line, entry: Mapping[str, Any]) -> Trajectory:
    example = line.example
    found = example.with_response(Written(**entry["accepted"]).response(example.spans[0]))
    return replace(found, meta={**example.meta, "reasoning": entry["reasoning"]})
