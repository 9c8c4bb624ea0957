"""`mirage write-reasoning`, from the command line down to the endpoint: nothing is lost, nothing is asked twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer
from scripted import GOOD, Act, ScriptedEndpoint, refuses, right, says
from typer.testing import CliRunner

from mirage_vlm.cli.write_reasoning import write_reasoning as command
from mirage_vlm.errors import MirageError
from mirage_vlm.formats import ImageFolder, read_jsonl, scan, write_jsonl
from mirage_vlm.reasoning.accept import Rules
from mirage_vlm.reasoning.endpoint import Connection
from mirage_vlm.reasoning.write import Report, write_reasoning
from mirage_vlm.tasks import get_task
from mirage_vlm.trajectory import LatentSpan, Text


def write(data: Path, server: ScriptedEndpoint, out: Path | None = None, rules: Rules | None = None, **known) -> Report:
    settings = {name: known.pop(name) for name in ("model", "key", "timeout", "tries") if name in known}
    connection = Connection(server.url, **{"model": "m", "backoff": 0.001, **settings})
    return write_reasoning(data, out or data.with_name("out.jsonl"), connection, rules or Rules(), **known)


def numbers(journal: Path) -> list[int]:
    """The lines that have a text in the journal."""
    records = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    return [record["line"] for record in records if "accepted" in record]


def check_written(data: Path, out: Path) -> None:
    """Every line of the data has one text, in order, and all the rest is as it was."""
    before, after = read_jsonl(data), read_jsonl(out)
    assert [t.meta["map"] for t in after] == [t.meta["map"] for t in before]
    for old, new in zip(before, after, strict=True):
        assert new.prompt[0].segments[1:] == old.prompt[0].segments[1:]
        assert [i.load().tobytes() for i in new.images()] == [i.load().tobytes() for i in old.images()]
        first, span, last = new.response
        assert isinstance(first, Text) and isinstance(span, LatentSpan) and isinstance(last, Text)
        assert first.text.startswith("<think>") and last.text.endswith(rf"</think>\boxed{{{old.answer}}}")
        assert span.helper.load().tobytes() == old.spans[0].helper.load().tobytes()
        assert get_task(new.task).score(new).correct
        assert {name: new.meta[name] for name in old.meta} == old.meta
    assert all(not scanned.faults for scanned in scan(out))


def test_texts_and_where_they_come_from(data):
    with ScriptedEndpoint(lambda a: says("no") if a.number == 0 else right(a)) as server:
        report = write(data, server, key="top-secret")
    out = data.with_name("out.jsonl")
    check_written(data, out)
    assert report == Report(6, written=6, replies=12, prompt_tokens=1200, completion_tokens=120)
    assert report.cost(2.0, 10.0) == pytest.approx(0.0036)
    found = read_jsonl(out)[0]
    before, after = GOOD.split("<helper/>")
    assert [s.text for s in found.response if isinstance(s, Text)] == [
        f"<think>{before}",
        rf"{after}</think>\boxed{{{found.answer}}}",
    ]
    reasoning = found.meta["reasoning"]
    assert reasoning.pop("date").startswith("20")
    assert reasoning == {
        "model": "m",
        "served_as": "served-model",
        "endpoint": server.url.removeprefix("http://").removesuffix("/v1"),
        "attempts": 2,
        "prompt_version": 1,
        "usage": {"prompt_tokens": 200, "completion_tokens": 20},
    }
    assert not any(b"top-secret" in path.read_bytes() for path in data.parent.iterdir() if path.is_file())


def test_what_the_model_is_shown(data):
    with ScriptedEndpoint(lambda a: says(rf"{GOOD} \boxed{{R}}") if a.number == 0 else right(a)) as server:
        write(data, server, limit=1)
    example = read_jsonl(data)[0]
    system, user = server.asked[0].body["messages"]
    assert system["role"] == "system"
    text = "\n".join(part["text"] for part in user["content"] if part["type"] == "text")
    assert example.prompt[0].segments[1].text in text and f"The right answer: {example.answer}" in text
    assert "write <helper/> in place" in text and "at most 300 words" in text
    urls = [part["image_url"]["url"] for part in user["content"] if part["type"] == "image_url"]
    assert urls == [next(example.images()).source, example.spans[0].helper.source]
    again = server.asked[1].body["messages"]
    assert again[:2] == [system, user]
    assert again[2] == {"role": "assistant", "content": rf"{GOOD} \boxed{{R}}"}
    assert again[3]["role"] == "user" and r"- the final answer \boxed{R} is wrong: ends at" in again[3]["content"]


def test_a_server_that_does_everything_wrong_loses_nothing(data):
    acts = [
        lambda a: refuses(500),
        lambda a: says(rf"{GOOD} \boxed{{R}}"),
        lambda a: Act(body=b"{bad"),
        lambda a: Act(body=b'{"choices": []}'),
        lambda a: refuses(429, retry_after="0.01"),
        lambda a: says(rf"As the second image has it. {GOOD} \boxed{{{a.answer}}}"),
        lambda a: Act(200, right(a).body, drop=True),
        lambda a: Act(200, right(a).body, wait=0.5),
        lambda a: says(rf"{GOOD.replace('<helper/>', '')} \boxed{{{a.answer}}}"),
        lambda a: says(rf"{GOOD} \boxed{{{a.answer}}}", finish_reason="length"),
        right,
    ]
    rng = random.Random(1)
    orders: dict[str, list] = {}

    def script(asked):
        order = orders.setdefault(asked.question, [*rng.sample(acts[:-1], len(acts) - 1), right])
        return order[asked.number](asked)

    with ScriptedEndpoint(script) as server:
        report = write(data, server, timeout=0.3, attempts=5, concurrency=3)
    check_written(data, data.with_name("out.jsonl"))
    assert report.written == 6 and report.rejected == 0 and report.replies == 6 * 5
    assert len(server.asked) == 6 * len(acts)


def test_what_fails_is_listed_and_tried_again_by_the_next_run(data):
    bad = json.loads(data.read_text().splitlines()[2])["answer"]
    out, listed = data.with_name("out.jsonl"), data.with_name("out.rejected.jsonl")

    def script(asked):
        return says(r"\boxed{U}") if asked.question == third else right(asked)

    with ScriptedEndpoint() as server:
        write(data, server, data.with_name("all.jsonl"), concurrency=1)
        third = server.asked[2].question
    with ScriptedEndpoint(script) as server:
        report = write(data, server, attempts=2)
        assert (report.written, report.rejected, report.replies) == (5, 1, 7)
        assert len(read_jsonl(out)) == 5
        (record,) = map(json.loads, listed.read_text().splitlines())
        assert (record["line"], record["where"], record["last_text"]) == (3, f"{data}:3", r"\boxed{U}")
        assert len(record["reasons"]) == 2 and any("0 times" in reason for reason in record["reasons"][0])
        server.script = right
        report = write(data, server, attempts=2)
        assert (report.written, report.earlier, report.rejected, report.replies) == (6, 5, 0, 8)
        assert len(server.asked) == 8
    assert read_jsonl(out)[2].answer == bad
    check_written(data, out)
    assert not listed.exists()


def test_a_finished_run_asks_nothing_more_and_writes_the_same(data):
    out = data.with_name("out.jsonl")
    with ScriptedEndpoint() as server:
        write(data, server, limit=4)
        assert len(server.asked) == 4 and len(read_jsonl(out)) == 4
        write(data, server)
        assert len(server.asked) == 6
        first = out.read_bytes()
        write(data, server)
        assert len(server.asked) == 6 and out.read_bytes() == first
        write(data, server, restart=True)
        assert len(server.asked) == 12
    check_written(data, out)


def test_a_limit_cuts_nothing_away(data):
    out, listed = data.with_name("out.jsonl"), data.with_name("out.rejected.jsonl")
    with ScriptedEndpoint(lambda a: says("no") if len(server.asked) == 6 else right(a)) as server:
        write(data, server, concurrency=1, attempts=1)
        before = out.read_bytes(), listed.read_bytes()
        assert len(read_jsonl(out)) == 5 and json.loads(before[1])["line"] == 6
        report = write(data, server, limit=2)
        assert (report.lines, report.written, len(server.asked)) == (2, 2, 6)
        assert (out.read_bytes(), listed.read_bytes()) == before
        write(data, server)
    check_written(data, out)
    assert not listed.exists()


def test_a_restart_without_a_text_leaves_none_of_before(data):
    out = data.with_name("out.jsonl")
    with ScriptedEndpoint() as server:
        write(data, server)
        server.script = lambda a: says("no")
        assert write(data, server, restart=True, attempts=1).written == 0
    assert not out.exists()
    assert len(data.with_name("out.rejected.jsonl").read_text().splitlines()) == 6


def test_half_of_a_surrogate_pair_costs_an_attempt_not_the_line(data):
    with ScriptedEndpoint(lambda a: right(a) if a.number else says(f"{GOOD} \ud800")) as server:
        report = write(data, server, limit=1, attempts=2, tries=1)
    assert (report.written, report.replies) == (1, 2)
    assert server.asked[1].body["messages"][2]["content"] == f"{GOOD} ?"
    assert "half of a surrogate pair" in server.asked[1].body["messages"][3]["content"]


def test_a_journal_that_was_cut_anywhere(data, tmp_path):
    with ScriptedEndpoint() as server:
        write(data, server, concurrency=1)
        journal, out = data.with_name("out.journal.jsonl"), data.with_name("out.jsonl")
        whole, rng = journal.read_bytes(), random.Random(2)
        for cut in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(4))]:
            journal.write_bytes(whole[:cut])
            out.unlink()
            done = max(0, whole[:cut].count(b"\n") - 1)
            before = len(server.asked)
            write(data, server)
            assert len(server.asked) - before == 6 - done
            assert sorted(numbers(journal)) == [1, 2, 3, 4, 5, 6]
            check_written(data, out)


def test_killed_and_started_again(data):
    """The process is killed while requests are under way; what was accepted is not asked for again."""
    out, journal = data.with_name("out.jsonl"), data.with_name("out.journal.jsonl")
    script = "import typer; from mirage_vlm.cli.write_reasoning import write_reasoning as run; typer.run(run)"
    with ScriptedEndpoint(lambda a: Act(200, right(a).body, wait=0.3)) as server:
        options = ["--endpoint", server.url, "--model", "m", "--out", str(out), "--concurrency", "2"]
        process = subprocess.Popen([sys.executable, "-c", script, str(data), *options], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not out.exists()
        kept = numbers(journal)
        assert 3 <= len(kept) < 6
        asked_before = len(server.asked)
        server.script = right
        report = write(data, server)
    assert report.earlier == len(kept)
    assert len(server.asked) - asked_before == 6 - len(kept)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    later = {a.body["messages"][1]["content"][1]["image_url"]["url"] for a in server.asked[asked_before:]}
    assert later == {line["messages"][0]["content"][0]["image"] for i, line in enumerate(lines, 1) if i not in kept}
    assert sorted(numbers(journal)) == [1, 2, 3, 4, 5, 6]
    check_written(data, out)


def test_two_at_a_time(data):
    started = threading.Event()

    def script(asked):
        started.set()
        return Act(200, right(asked).body, wait=0.2)

    with ScriptedEndpoint(script) as server:
        first = threading.Thread(target=write, args=(data, server))
        first.start()
        assert started.wait(20)
        with pytest.raises(MirageError, match="another process is writing it"):
            write(data, server)
        first.join()
        assert len(server.asked) == 6
    check_written(data, data.with_name("out.jsonl"))


def test_a_refusal_ends_the_run_at_once_and_keeps_what_there_is(data):
    with ScriptedEndpoint(lambda a: right(a) if len(server.asked) < 4 else refuses(401, "bad key")) as server:
        with pytest.raises(MirageError, match="401 bad key; is the key"):
            write(data, server, concurrency=1)
        assert len(server.asked) == 4
        assert not data.with_name("out.jsonl").exists()
        server.script = right
        assert write(data, server).earlier == 3
    check_written(data, data.with_name("out.jsonl"))


def test_an_endpoint_that_is_down_ends_the_run(data):
    with ScriptedEndpoint(lambda a: refuses(503, "down")) as server:
        with pytest.raises(
            MirageError, match=r"5 lines in a row got no reply; the last, .*data.jsonl:5: no reply in 2"
        ):
            write(data, server, tries=2, concurrency=1)
        assert len(server.asked) == 10
        server.script = right
        assert write(data, server).written == 6


def test_a_line_that_is_refused_does_not_end_the_run(data):
    refused = set()

    def script(asked):
        if asked.question in refused or len(server.asked) in (2, 4):
            refused.add(asked.question)
            return refuses(400, "a picture is too large")
        return right(asked)

    with ScriptedEndpoint(script) as server:
        report = write(data, server, concurrency=1)
        assert (report.written, report.rejected, len(server.asked)) == (4, 2, 6)
    records = [json.loads(line) for line in data.with_name("out.rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reasons"]) for r in records] == [(n, [["400 a picture is too large"]]) for n in (2, 4)]


def test_an_endpoint_that_refuses_every_line_ends_the_run(data, monkeypatch):
    monkeypatch.setattr("mirage_vlm.reasoning.write.MOST_REFUSED", 4)
    with ScriptedEndpoint(lambda a: refuses(400, "unknown parameter")) as server:
        with pytest.raises(MirageError, match=r"refuses every line, 4 so far; the last, .*: 400 unknown parameter"):
            write(data, server, concurrency=1)
        assert len(server.asked) == 4
        server.script = right
        assert write(data, server).written == 6


def test_lines_that_are_refused_neither_end_the_run_nor_stand_in_the_way(data):
    with ScriptedEndpoint(lambda a: right(a) if len(server.asked) == 6 else refuses(400, "too large")) as server:
        report = write(data, server, concurrency=1)
        assert (report.written, report.rejected) == (1, 5), "five refusals in a row are five answers"
        lines = data.read_text().splitlines(keepends=True)
        extra = get_task("vsp-planning").make(random.Random(9), 3, cell=16)
        write_jsonl(data.with_name("extra.jsonl"), [extra])
        data.write_text("".join(lines) + data.with_name("extra.jsonl").read_text())
        refused = [a.question for a in server.asked[:5]]
        server.script = right
        write(data, server, concurrency=1)
        later = [a.question for a in server.asked[6:]]
        assert later[0] not in refused and later[1:] == refused
    check_written(data, data.with_name("out.jsonl"))


def test_an_endpoint_that_gave_a_text_was_not_silent(data):
    with ScriptedEndpoint(lambda a: refuses(503) if a.number else says("no")) as server:
        report = write(data, server, concurrency=1, tries=1)
    assert (report.rejected, report.replies) == (6, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, 'model is "other", was "m"'),
        ({"rules": Rules(max_words=50)}, "rules.max_words is 50, was 300"),
        ({"rules": Rules(forbid=("x",))}, "rules.forbid"),
    ],
)
def test_changed_settings_are_refused(data, change, message):
    with ScriptedEndpoint() as server:
        write(data, server, limit=1)
        with pytest.raises(MirageError, match=rf"left by other settings \(.*{message}.*--restart"):
            write(data, server, **change)
        assert len(server.asked) == 1
        assert write(data, server, restart=True, **change).written == 6


def test_changed_data_is_refused_but_may_grow(data):
    lines = data.read_text().splitlines(keepends=True)
    with ScriptedEndpoint() as server:
        data.write_text("".join(lines[:4]))
        write(data, server)
        data.write_text("".join([lines[0], lines[2], *lines[2:]]))
        with pytest.raises(MirageError, match=r"data.jsonl:2: has changed since its text was written .*--restart"):
            write(data, server)
        data.write_text("".join(lines[:3]))
        with pytest.raises(MirageError, match=r"data.jsonl:4: has changed"):
            write(data, server)
        data.write_text("".join(lines))
        assert write(data, server).earlier == 4
        assert len(server.asked) == 6
    check_written(data, data.with_name("out.jsonl"))


def test_a_changed_picture_is_changed_data(tmp_path):
    made = get_task("vsp-planning").make(random.Random(0), 3, cell=16)
    data = tmp_path / "d.jsonl"
    write_jsonl(data, [made], image_source=ImageFolder(tmp_path / "images", tmp_path))
    with ScriptedEndpoint() as server:
        write(data, server)
        one, other = sorted((tmp_path / "images").iterdir())
        shutil.copy(one, other)
        with pytest.raises(MirageError, match=r"d.jsonl:1: has changed"):
            write(data, server)


def test_an_output_of_something_else_stays(data):
    out = data.with_name("out.jsonl")
    out.write_text("precious\n")
    with ScriptedEndpoint() as server:
        with pytest.raises(MirageError, match=r"out.jsonl: is there already, without out.journal.jsonl"):
            write(data, server)
        for path in (data, data.with_name("data.journal.jsonl")):
            path.exists() or path.write_text("x")
        with pytest.raises(MirageError, match="would replace the data"):
            write(data, server, data, restart=True)
        for content in ("", '{"settings": {'):  # of which nothing is left, or a part of the first line
            data.with_name("out.journal.jsonl").write_text(content)
            with pytest.raises(MirageError, match=r"out.jsonl: is there already, with an empty out.journal.jsonl"):
                write(data, server)
        assert server.asked == [] and out.read_text() == "precious\n"


def test_a_damaged_journal(data):
    journal = data.with_name("out.journal.jsonl")
    with ScriptedEndpoint() as server:
        write(data, server, concurrency=1)
        lines = journal.read_bytes().splitlines(keepends=True)
        for damage in (b"\0\0\0\n", b"{}\n", lines[1]):
            journal.write_bytes(b"".join([lines[0], lines[1], damage]))
            with pytest.raises(MirageError, match=r"out.journal.jsonl:3: is damaged"):
                write(data, server)
        assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("answer"), "answer: is missing"),
        (lambda r: r["messages"][1]["content"].pop(0), "must have one latent span with a helper image; it has 0 spans"),
        (lambda r: r["messages"][1]["content"].append(r["messages"][1]["content"][0]), "it has 2 spans"),
        (lambda r: r["meta"].update(reasoning={}), "meta.reasoning: a text has been written"),
        (lambda r: r.update(answer="U,U,U"), "the checker of vsp-planning does not take it"),
        (lambda r: r["messages"][0].update(role="judge"), "messages"),
    ],
)
def test_faulty_lines_are_named_before_anything_is_asked(data, change, message):
    records = [json.loads(line) for line in data.read_text().splitlines()]
    change(records[3])
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    with ScriptedEndpoint() as server:
        with pytest.raises(MirageError, match=rf"data.jsonl:4: .*{message}"):
            write(data, server)
        assert server.asked == []


def test_requests_at_a_time(data):
    now = most = 0
    lock = threading.Lock()

    def script(asked):
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.1)
        with lock:
            now -= 1
        return right(asked)

    with ScriptedEndpoint(script) as server:
        write(data, server, concurrency=3)
    assert most == 3


def invoke(*arguments: object, **environment: str):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments], env=environment)


def test_the_command(data):
    out = data.with_name("texts.jsonl")

    def script(asked):
        assert asked.key == "abc" and asked.body["temperature"] == 0.5 and asked.body["reasoning_effort"] == "low"
        return right(asked) if asked.question == server.asked[0].question else says("no", usage=False)

    with ScriptedEndpoint(script) as server:
        prices = ["--price-in", 10_000, "--price-out", 100_000]
        options = [
            "--endpoint",
            server.url,
            "--model",
            "m",
            "--out",
            out,
            "--attempts",
            1,
            "--key-env",
            "MY_KEY",
            *prices,
        ]
        params = ["--param", "temperature=0.5", "--param", "reasoning_effort=low"]
        done = invoke(data, *options, *params, "--limit", 2, MY_KEY="abc")
    assert done.exit_code == 1, done.output
    assert done.stdout.splitlines() == [
        f"{out}: 1 of 2 texts, 1 rejected, 2 replies, 100 + 10 tokens, cost 2.00, 1 reply without usage, not counted",
        f"1 without a text, see {out.with_name('texts.rejected.jsonl')}; the same command tries them again",
    ]
    assert done.stderr.splitlines()[0] == "0 of 2 texts, 0 replies, 0 + 0 tokens, cost 0.00"
    assert len(read_jsonl(out)) == 1
    journal = out.with_name("texts.journal.jsonl").read_text()
    assert "abc" not in journal.split('"sha256"')[0]


def test_the_command_names_an_output_that_holds_other_lines(data):
    out = data.with_name("texts.jsonl")
    with ScriptedEndpoint(lambda a: says("no") if len(server.asked) in (1, 7) else right(a)) as server:
        options = ["--endpoint", server.url, "--model", "m", "--out", out, "--attempts", 1, "--concurrency", 1]
        invoke(data, *options)
        done = invoke(data, *options, "--limit", 1)
    assert done.stdout.startswith(f"{out}: 0 of 1 texts, 1 rejected")
    assert len(read_jsonl(out)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--price-in", 1], "give both --price-in and --price-out"),
        (["--param", "x"], "--param must be NAME=VALUE"),
        (["--key-env", "NO_SUCH_KEY"], "--key-env: the environment has no NO_SUCH_KEY"),
        (["--forbid", "("], "--forbid"),
        (["--endpoint", "nowhere"], "--endpoint must be a base URL"),
    ],
)
def test_faulty_options(data, options, message):
    done = invoke(
        data, "--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--out", data.parent / "o.jsonl", *options
    )
    assert isinstance(done.exception, MirageError) and message in str(done.exception)
