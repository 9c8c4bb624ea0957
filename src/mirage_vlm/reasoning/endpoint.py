"""An OpenAI-compatible endpoint, asked patiently: rate limit, waits where it says so, tries again where that may help.

The `openai` package is optional. It is used through `chat.completions` alone; its own retries are off, so that every
request is counted by the rate limit, and replies are read here, since servers send what its types do not allow.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from mirage_vlm.errors import MirageError

PERMANENT = (401, 402, 404, 405)  # the same for every request: no key, no money, no such model or address
AGAIN = (408, 409, 425, 429)  # and all of 500 and above
LONGEST_BACKOFF = 60.0  # seconds
TOLD_FROM = 3  # failures in a row of one request, from which on people hear of them
FIRST_LOOK = 10.0  # seconds, most, to find out whether anybody is there
OURS = ("model", "messages", "stream", "n")


class NoReply(Exception):
    """A request that has failed for good, while others may not."""


class Refused(NoReply):
    """The endpoint answers, but not this request."""


@dataclass(frozen=True)
class Connection:
    """Where and how to ask.

    Attributes:
        url: the base URL, such as http://localhost:8000/v1.
        model: its name there.
        key: the API key; None where the endpoint asks for none. It is shown and written nowhere.
        timeout: seconds for one request, the whole reply included.
        tries: most requests for one reply.
        per_minute: most requests in any minute; None is no limit.
        params: other fields of the request, such as temperature.
        backoff: seconds before a second try, doubled for each further one; half of it is left to chance.

    Raises:
        MirageError: a value cannot be used.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    tries: int = 8
    per_minute: float | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    backoff: float = 1.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise MirageError(f"--endpoint must be a base URL, such as http://localhost:8000/v1, not {self.url!r}")
        if parts.username is not None or parts.password is not None:
            raise MirageError("--endpoint: put no name or password into the URL; a key goes into the environment")
        if taken := [name for name in self.params if name in OURS]:
            raise MirageError(f"--param: {taken[0]} is set by the command itself")
        for option, value in (("timeout", self.timeout), ("tries", self.tries), ("per-minute", self.per_minute)):
            if value is not None and not value > 0:
                raise MirageError(f"--{option} must be above 0, not {value}")

    @property
    def host(self) -> str:
        """Host and port alone, which may be written down."""
        parts = urlsplit(self.url)
        return f"{parts.hostname}:{parts.port}" if parts.port is not None else str(parts.hostname)


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: of the first choice; empty where there is none.
        finish_reason: `stop`, `length`, `content_filter`, or whatever the endpoint says.
        model: what the endpoint calls the model.
        prompt_tokens, completion_tokens: None where the endpoint tells no usage.
    """

    text: str
    finish_reason: str | None
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class Limiter:
    """Lets requests go one by one, evenly, so that no minute has more than `per_minute`.

    Args:
        per_minute: None lets them go at once.
        clock: seconds that never run back.
        sleep: waits for seconds.
    """

    def __init__(
        self,
        per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self._interval = 0.0 if per_minute is None else 60.0 / per_minute
        self._clock, self._sleep = clock, sleep
        self._next = clock()
        self._order = asyncio.Lock()

    async def turn(self) -> None:
        """Wait until the next request may go."""
        async with self._order:
            while (delay := self._next - self._clock()) > 0:  # again, since `pause` may have come in between
                await self._sleep(delay)
            self._next = self._clock() + self._interval

    def pause(self, seconds: float) -> None:
        """Let no request go for so long."""
        self._next = max(self._next, self._clock() + seconds)


class Endpoint:
    """A client of one endpoint, for any number of requests at a time.

    Args:
        connection: where and how to ask.
        limiter: None makes one of `connection.per_minute`.
        sleep: waits for seconds.
        tell: called with a line for people where there is something to wait for.

    Raises:
        MirageError: the openai package is missing.
    """

    def __init__(
        self,
        connection: Connection,
        limiter: Limiter | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        tell: Callable[[str], None] | None = None,
    ):
        try:
            import openai
        except ImportError as fault:
            raise MirageError("this needs the openai package: pip install 'mirage-vlm[write]'") from fault
        self._openai: Any = openai
        self.connection = connection
        self._limiter = limiter or Limiter(connection.per_minute)
        self._sleep, self._tell = sleep, tell
        self._chance = random.Random()
        self._client: Any = openai.AsyncOpenAI(
            base_url=connection.url, api_key=connection.key or "none", max_retries=0, timeout=None
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def reach(self) -> None:
        """Find out, with one small request, whether anybody is there: nothing is gained by asking again and again.

        Raises:
            MirageError: the host is not known or does not listen, or does not speak the URL's protocol.
        """
        try:
            async with asyncio.timeout(min(self.connection.timeout, FIRST_LOOK)):
                await self._client.models.list()
        except self._openai.APITimeoutError:
            return  # it may be slow, or be waking up
        except self._openai.APIConnectionError as fault:
            cause = fault.__cause__ or fault
            broken = type(cause).__name__ in ("RemoteProtocolError", "ReadError")  # words of no HTTP server
            scheme = urlsplit(self.connection.url).scheme
            other = {"http": "https", "https": "http"}[scheme]
            hint = f"; is it {other}://, not {scheme}://?" if broken or "SSL" in str(cause) else ""
            raise MirageError(
                f"{self.connection.host}: no connection: {self._one_line(str(cause))}{hint}; --endpoint is the base "
                "URL of a server that is running, such as http://localhost:8000/v1"
            ) from fault
        except (TimeoutError, self._openai.OpenAIError, ValueError):
            return  # somebody is there; what it makes of a real request will be seen

    async def ask(self, messages: Sequence[Mapping[str, Any]]) -> Reply:
        """One reply, after as many tries as it takes.

        Args:
            messages: in the form of chat.completions.

        Raises:
            NoReply: this request had no sound reply in all tries; `Refused`, if the endpoint will not answer it.
            MirageError: no request can succeed (`PERMANENT`, or a quota that is used up).
        """
        reason = ""
        for number in range(1, self.connection.tries + 1):
            await self._limiter.turn()
            delay = self.connection.backoff * 2.0 ** (number - 1)
            delay = min(LONGEST_BACKOFF, delay) * self._chance.uniform(0.5, 1.0)
            try:
                async with asyncio.timeout(self.connection.timeout):
                    found = await self._client.chat.completions.with_raw_response.create(
                        model=self.connection.model, messages=messages, extra_body=dict(self.connection.params)
                    )
                return _read(found.content)
            except (TimeoutError, self._openai.APITimeoutError):
                reason = f"no reply within {self.connection.timeout:g} s"
            except self._openai.APIStatusError as fault:
                reason = self._refusal(fault)
                wait = retry_after(fault.response.headers, time.time())
                if wait:  # which holds for all requests, not for this one alone
                    self._limiter.pause(wait)
                    delay = 0.0
                    if self._tell is not None and wait >= 10:
                        self._tell(f"{self.connection.host} asks to wait for {wait:.0f} s ({reason})")
            except self._openai.APIConnectionError as fault:
                reason = self._one_line(f"no connection: {fault.__cause__ or fault}")
            except ValueError as fault:
                reason = self._one_line(f"a reply that cannot be read: {fault}")
            if number < self.connection.tries:
                if self._tell is not None and number >= TOLD_FROM:
                    self._tell(f"{self.connection.host}: {reason}; try {number + 1} of {self.connection.tries} follows")
                await self._sleep(delay)
        raise NoReply(f"no reply in {self.connection.tries} tries, the last: {reason}")

    def _refusal(self, fault: Any) -> str:
        """The words of a status that may pass; raises for others."""
        status = int(fault.status_code)
        body = fault.body if isinstance(fault.body, Mapping) else {}
        reason = self._one_line(f"{status} {body.get('message') or fault.message}")
        if status in PERMANENT or body.get("code") == "insufficient_quota":
            hint = {
                401: "; is the key in the environment (OPENAI_API_KEY, or --key-env NAME) the right one?",
                404: "; --endpoint is the base URL, such as http://localhost:8000/v1, and --model a name known there",
            }.get(status, "")
            raise MirageError(f"{self.connection.host}: {reason}{hint}") from fault
        if status not in AGAIN and status < 500:
            raise Refused(reason) from fault
        return reason

    def _one_line(self, text: str) -> str:
        """Words of the endpoint, without the key, should it repeat that."""
        text = " ".join(text.split())
        if self.connection.key:
            text = text.replace(self.connection.key, "***")
        return text if len(text) <= 200 else text[:197] + "..."


def _read(content: bytes) -> Reply:
    """The reply in the body of a response.

    Raises:
        ValueError: it is not JSON, or not of the form of a chat completion.
    """
    try:
        body = json.loads(content)
    except RecursionError as fault:
        raise ValueError("nested too deeply") from fault
    choices = body.get("choices") if isinstance(body, Mapping) else None
    if not isinstance(choices, list) or not choices:
        raise ValueError("there are no choices in it")
    message = choices[0].get("message") if isinstance(choices[0], Mapping) else None
    if not isinstance(message, Mapping):
        raise ValueError("there is no message in it")
    text = message.get("content")
    if text is not None and not isinstance(text, str):
        raise ValueError("the content of its message is not text")
    usage = body["usage"] if isinstance(body.get("usage"), Mapping) else {}
    tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    spent = [n if isinstance(n, int) and n >= 0 else None for n in tokens]
    finish, model = choices[0].get("finish_reason"), body.get("model")
    return Reply(text or "", str(finish) if finish else None, str(model) if model else None, spent[0], spent[1])


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """The seconds for which a response asks to wait, in either form of Retry-After; None where it does not.

    Args:
        headers: names in lower case, or a mapping that does not mind.
        now: seconds since 1970.
    """
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return None
    return max(0.0, seconds) if seconds < float("inf") else None
