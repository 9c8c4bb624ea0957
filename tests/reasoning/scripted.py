"""An OpenAI-compatible endpoint on this machine that behaves, or misbehaves, as a script says."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = "I look for the start and the gift and go around every hole. <helper/> Along that way I read the moves."


@dataclass
class Asked:
    """One request.

    Attributes:
        body: its JSON.
        number: how many requests for the same question came before it.
        key: the bearer token.
    """

    body: dict[str, Any]
    number: int
    key: str

    @property
    def texts(self) -> list[str]:
        parts = self.body["messages"][1]["content"]
        return [part["text"] for part in parts if part["type"] == "text"]

    @property
    def answer(self) -> str:
        found = re.search(r"The right answer: (.*)", "\n".join(self.texts))
        assert found is not None
        return found[1]

    @property
    def question(self) -> str:
        """Tells lines apart: the bytes of the first picture and the text."""
        return json.dumps(self.body["messages"][1])


@dataclass
class Act:
    """What to do with a request: a whole response, after a pause; or none."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    drop: bool = False  # half of the body, then the connection is cut


def says(text: str, usage: bool = True, **changes: Any) -> Act:
    """A sound reply with a text."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "served-model",
        "choices": [{**choice, **changes}],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return Act(body=json.dumps(body).encode())


def right(asked: Asked) -> Act:
    """A text that is accepted."""
    return says(rf"{GOOD} \boxed{{{asked.answer}}}")


def refuses(status: int, message: str = "no", **headers: str) -> Act:
    body = json.dumps({"error": {"message": message, "code": "x"}}).encode()
    return Act(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


class ScriptedEndpoint:
    """Runs while used as a context; `script` says what to do with each request."""

    def __init__(self, script: Callable[[Asked], Act] = right, port: int = 0):
        self.script = script
        self.asked: list[Asked] = []
        self.times: list[float] = []
        self.answered: list[Asked] = []  # those whose whole response was sent
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        key = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        with self._lock:
            asked = Asked(body, 0, key)
            asked.number = sum(other.question == asked.question for other in self.asked)
            self.asked.append(asked)
            self.times.append(time.monotonic())
        found = handler.path == "/v1/chat/completions"
        act = self.script(asked) if found else refuses(404, f"there is no {handler.path}")
        time.sleep(act.wait)
        try:
            handler.send_response(act.status)
            for name, value in {"Content-Type": "application/json", **act.headers}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(act.body)))
            handler.end_headers()
            handler.wfile.write(act.body[: len(act.body) // 2] if act.drop else act.body)
            handler.wfile.flush()
            if act.drop:
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True
            else:
                self.answered.append(asked)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True

    def __enter__(self) -> "ScriptedEndpoint":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
