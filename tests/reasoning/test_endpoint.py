"""The endpoint asked through the openai client, against a server that misbehaves."""

import asyncio
import email.utils
import json
import sys
import time

import pytest
from scripted import Act, ScriptedEndpoint, refuses, right, says

from mirage_vlm.errors import MirageError
from mirage_vlm.reasoning.endpoint import Connection, Endpoint, Limiter, NoReply, Reply, retry_after

MESSAGES = [
    {"role": "system", "content": "."},
    {"role": "user", "content": [{"type": "text", "text": "The right answer: B"}]},
]


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self):
        self.now = 100.0
        self.slept = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def ask(server: ScriptedEndpoint, clock: Clock | None = None, tell=None, **settings) -> Reply:
    clock = clock or Clock()

    async def once() -> Reply:
        limiter = Limiter(None, clock, clock.sleep)
        endpoint = Endpoint(Connection(server.url, "m", **settings), limiter, clock.sleep, tell)
        try:
            return await endpoint.ask(MESSAGES)
        finally:
            await endpoint.close()

    return asyncio.run(once())


def test_a_reply_and_what_is_sent():
    with ScriptedEndpoint(lambda asked: says("hello", finish_reason="length")) as server:
        reply = ask(server, key="secret", params={"temperature": 0.5, "max_tokens": 9})
    assert reply == Reply("hello", "length", "served-model", 100, 10)
    assert server.asked[0].key == "secret"
    assert server.asked[0].body == {"model": "m", "messages": MESSAGES, "temperature": 0.5, "max_tokens": 9}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{bad",
        b"[]",
        b"null",
        b"<html>busy</html>",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"{}",
        b'{"choices": null}',
        b'{"choices": []}',
        b'{"choices": [3]}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": [1]}}]}',
    ],
)
def test_a_body_that_cannot_be_read_is_asked_for_again(body):
    with ScriptedEndpoint(lambda asked: Act(body=body) if asked.number == 0 else says("yes")) as server:
        assert ask(server).text == "yes"
    assert len(server.asked) == 2


@pytest.mark.parametrize("usage", [{}, {"usage": None}, {"usage": {"prompt_tokens": "many"}}])
def test_usage_may_be_untold(usage):
    body = {"choices": [{"message": {"content": None}}], **usage}
    with ScriptedEndpoint(lambda asked: Act(body=json.dumps(body).encode())) as server:
        assert ask(server) == Reply("", None, None, None, None)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_a_status_that_passes(status):
    clock = Clock()
    with ScriptedEndpoint(lambda asked: refuses(status) if asked.number < 3 else says("yes")) as server:
        assert ask(server, clock).text == "yes"
    assert len(server.asked) == 4
    assert len(clock.slept) == 3
    assert all(2.0**i / 2 <= slept <= 2.0**i for i, slept in enumerate(clock.slept))


def test_backoff_is_bounded_and_ends():
    clock, told = Clock(), []
    failing = pytest.raises(NoReply, match="no reply in 9 tries, the last: 500 out of order")
    with ScriptedEndpoint(lambda asked: refuses(500, "out of order")) as server, failing:
        ask(server, clock, told.append, tries=9)
    assert len(told) == 6 and told[0].endswith(": 500 out of order; try 4 of 9 follows")
    assert len(server.asked) == 9 and len(clock.slept) == 8
    assert max(clock.slept) <= 60 and len(set(clock.slept)) == 8


def test_retry_after_is_honoured():
    clock, told = Clock(), []

    def script(asked):
        return refuses(429, "slow", retry_after="17") if asked.number == 0 else right(asked)

    with ScriptedEndpoint(script) as server:
        ask(server, clock, told.append)
    assert clock.slept == [0.0, 17.0] and clock.now == 117.0
    assert "asks to wait for 17 s" in told[0]


def test_retry_after_holds_back_all_requests():
    clock = Clock()
    limiter = Limiter(None, clock, clock.sleep)

    async def two() -> list[float]:
        times = []

        async def one() -> None:
            await limiter.turn()
            times.append(clock.now)

        limiter.pause(5)
        await asyncio.gather(one(), one())
        return times

    assert asyncio.run(two()) == [105.0, 105.0]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("-2", 0.0), ("nan", None), ("inf", None), ("soon", None), (None, None)],
)
def test_forms_of_retry_after(value, seconds):
    assert retry_after({} if value is None else {"retry-after": value}, 0.0) == seconds


def test_retry_after_as_a_date():
    assert retry_after({"retry-after": email.utils.formatdate(1_000_090, usegmt=True)}, 1_000_000.0) == 90.0
    assert retry_after({"retry-after": email.utils.formatdate(999_000, usegmt=True)}, 1_000_000.0) == 0.0


def test_a_slow_reply_is_asked_for_again():
    with ScriptedEndpoint(lambda asked: Act(200, right(asked).body, wait=0.6 * (asked.number == 0))) as server:
        assert r"\boxed{B}" in ask(server, timeout=0.3).text
    assert len(server.asked) == 2


def test_a_dropped_connection_is_asked_for_again():
    def script(asked):
        return Act(200, right(asked).body, drop=asked.number == 0)

    with ScriptedEndpoint(script) as server:
        assert r"\boxed{B}" in ask(server).text
    assert len(server.asked) == 2


def test_nobody_listens():
    with ScriptedEndpoint() as server:
        pass
    with pytest.raises(NoReply, match="no reply in 3 tries, the last: no connection"):
        ask(server, tries=3)


def reach(url):
    """What the first look says of a URL."""

    async def look():
        endpoint = Endpoint(Connection(url, "model", timeout=5))
        try:
            await endpoint.reach()
        finally:
            await endpoint.close()

    asyncio.run(look())


@pytest.mark.parametrize(
    ("url", "hint"),
    [("http://127.0.0.1:9/v1", ""), ("http://no-such-host.invalid/v1", ""), ("https://127.0.0.1:{port}/v1", "http://")],
)
def test_nobody_there_is_told_at_once(url, hint):
    began = time.monotonic()
    with ScriptedEndpoint() as server:
        port = server.url.rpartition(":")[2].partition("/")[0]
        with pytest.raises(MirageError, match=f"no connection: .*{hint}.*--endpoint is the base URL"):
            reach(url.format(port=port))
    assert time.monotonic() - began < 15


def test_whoever_answers_is_there():
    with ScriptedEndpoint() as server:
        reach(server.url)
    assert not server.asked


@pytest.mark.parametrize("status", [401, 402, 404, 405])
def test_a_refusal_of_all_requests_ends_at_once(status):
    failing = pytest.raises(MirageError, match=rf"^127\.0\.0\.1:\d+: {status} the key \*\*\* is bad")
    with ScriptedEndpoint(lambda a: refuses(status, "the key top-secret\nis bad")) as server, failing as caught:
        ask(server, key="top-secret")
    assert len(server.asked) == 1
    assert "\n" not in str(caught.value)


def test_a_quota_that_is_used_up_ends_at_once():
    body = b'{"error": {"message": "pay first", "code": "insufficient_quota"}}'
    with ScriptedEndpoint(lambda asked: Act(429, body)) as server, pytest.raises(MirageError, match="pay first"):
        ask(server)
    assert len(server.asked) == 1


def test_a_base_url_that_is_wrong():
    with ScriptedEndpoint() as server:
        server.url = server.url.removesuffix("/v1")
        with pytest.raises(MirageError, match="404 there is no /chat/completions; --endpoint is the base URL"):
            ask(server)


def test_one_request_that_is_refused():
    failing = pytest.raises(NoReply, match="400 picture too large")
    with ScriptedEndpoint(lambda asked: refuses(400, "picture too large")) as server, failing:
        ask(server)
    assert len(server.asked) == 1


def test_no_minute_has_more_requests_than_allowed():
    clock = Clock()
    limiter = Limiter(7, clock, clock.sleep)
    times: list[float] = []

    async def one(pause: float) -> None:
        await limiter.turn()
        times.append(clock.now)
        if pause:
            limiter.pause(pause)

    async def many() -> None:
        await asyncio.gather(*(one(30.0 if i == 10 else 0.0) for i in range(40)))

    asyncio.run(many())
    assert len(times) == 40 and times[0] == 100.0
    assert all(sum(start <= t < start + 60 - 1e-6 for t in times) <= 7 for start in times)
    assert times[11] - times[10] == pytest.approx(30.0)
    assert times[-1] - times[0] == pytest.approx(38 * 60 / 7 + 30)  # and not fewer than allowed


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://host/v1", "http://", "http://host:99999/v1"])
def test_urls_that_are_none(url):
    with pytest.raises(MirageError, match="--endpoint must be a base URL"):
        Connection(url, "m")


def test_no_credentials_in_the_url():
    with pytest.raises(MirageError, match="put no name or password") as caught:
        Connection("http://me:pass@host/v1", "m")
    assert "pass@" not in str(caught.value)


def test_the_host_alone_is_written_down():
    assert Connection("https://api.example.org:8443/v1?key=abc", "m").host == "api.example.org:8443"
    assert Connection("https://api.example.org/v1", "m").host == "api.example.org"
    assert "secret" not in repr(Connection("https://api.example.org/v1", "m", key="secret"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0}, "--timeout must be above 0"),
        ({"per_minute": -1}, "--per-minute must be above 0"),
        ({"params": {"model": "x"}}, "--param: model is set by the command"),
    ],
)
def test_faulty_settings(settings, message):
    with pytest.raises(MirageError, match=message):
        Connection("http://host/v1", "m", **settings)


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MirageError, match=r"pip install 'mirage-vlm\[write\]'"):
        Endpoint(Connection("http://host/v1", "m"))
