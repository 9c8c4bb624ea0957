import json
import random
import ssl
from pathlib import Path

import pytest

from mirage_vlm.formats import write_jsonl
from mirage_vlm.tasks import get_task


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No proxy and no key of whoever runs the tests; no certificates, whose loading would take most of the time."""
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six planning maps, their pictures embedded."""
    rng = random.Random(0)
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [get_task("vsp-planning").make(rng, 3, cell=16) for _ in range(6)])
    questions = [json.dumps(json.loads(line)["messages"]) for line in path.read_text().splitlines()]
    assert len(set(questions)) == 6
    return path
