"""YAML that surprises: each is refused in one line that names file and line, or read as what it looks like."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mirage_vlm.errors import MirageError
from mirage_vlm.settings import PATH, not_finite, read_settings

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@dataclass(frozen=True)
class Part:
    n: int = 0
    rate: float = 0.0
    on: bool = False
    name: str = ""


@dataclass(frozen=True)
class Whole:
    part: Part = field(default_factory=Part)
    parts: tuple[Part, ...] = ()
    numbers: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    text: str = ""
    folder: str = field(default="x", metadata=PATH)
    files: tuple[str, ...] = field(default=(), metadata=PATH)
    perhaps: str | None = field(default=None, metadata=PATH)


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def read(path: Path, *overrides: str) -> Whole:
    return read_settings(Whole, path, overrides, "the settings")[0]


def refusal(path: Path, *overrides: str) -> str:
    began = time.monotonic()
    with pytest.raises(MirageError) as caught:
        read(path, *overrides)
    assert time.monotonic() - began < 5
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message.replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text: a\nfolder: b\ntext: c\n", "FILE:3: 'text' is there twice, first in line 1; remove one of them"),
        ("part:\n  n: 1\n  n: 1\n", "FILE:3: 'part.n' is there twice, first in line 2"),
        ("parts:\n- {n: 1}\n- {n: 1, n: 2}\n", "FILE:3: 'parts[1].n' is there twice, first in line 3"),
        ('{"text": "a",\n "text": "b"}', "FILE:2: 'text' is there twice, first in line 1"),
        ("'text': a\n\"text\": b\n", "FILE:2: 'text' is there twice"),
        ("1: a\n", "FILE:1: unknown key '1'"),
        ("true: a\n", "FILE:1: unknown key 'true'"),
        ("null: a\n", "FILE:1: unknown key 'null'"),
        ("2026-01-01: a\n", "FILE:1: unknown key '2026-01-01'"),
        ("? [a, b]\n: c\n", "FILE:1: a key must be a word, not a list or a mapping"),
        ("? {a: b}\n: c\n", "FILE:1: a key must be a word"),
        ("part: &p {n: 1}\nparts:\n- <<: *p\n", "FILE:3: merge keys (<<) are not read; write the keys out"),
        (BOMB, "values once its aliases are written out"),
        ("part: &p\n  n: *p\n", "FILE:1: is an alias of what it is in itself"),
        ("text: *nothing\n", "FILE:1: not valid YAML: found undefined alias"),
        ("text: !!python/object/apply:os.system [ls]\n", "FILE:1: the tag !!python/object/apply:os.system is not"),
        ("text: !!python/name:os.system\n", "FILE:1: the tag !!python/name:os.system is not read"),
        ("text: !mine x\n", "FILE:1: the tag !mine is not read"),
        ("text: !!binary aGk=\n", "FILE:1: the tag !!binary is not read"),
        ("part: !!set {a, b}\n", "FILE:1: the tag !!set is not read"),
        ("part: !!omap [a: 1]\n", "FILE:1: the tag !!omap is not read"),
        ("!!python/tuple n: 3\n", "FILE:1: the tag !!python/tuple is not read"),
        ("part: {n: !!int x}\n", "FILE:1: x cannot be read as int"),
        ("part: {on: !!bool perhaps}\n", "FILE:1: perhaps cannot be read as bool"),
        ("part:\n  n: 010\n", "FILE:2: 010 would be read as octal"),
        ("numbers: [1,\n 1:30]\n", "FILE:2: 1:30 would be read as a number to base 60"),
        ("part: {rate: 1:30.5}\n", "FILE:1: 1:30.5 would be read as a number to base 60"),
        ("part:\n  rate: 1e999\n", "FILE:2: part.rate: '1e999' is too large for a number"),
        ("part:\n  rate: -1.0e+999\n", "FILE:2: -1.0e+999 is too large for a number"),
        (f"part:\n  rate: {'9' * 400}\n", "is too large for a whole number"),
        (f"part:\n  n: {'9' * 5000}\n", "FILE:2: 999"),
        ("part: {n: 9223372036854775808}\n", "FILE:1: 9223372036854775808 is too large for a whole number"),
        ("part: {n: 1.0}\n", "FILE:1: part.n: expected int, got 1.0"),
        ("part: {n: true}\n", "FILE:1: part.n: expected int, got True"),
        ("part: {on: 1}\n", "FILE:1: part.on: expected bool, got 1"),
        ("text: no\n", "FILE:1: text: expected str, got False; yes, no, on, off"),
        ("text: ~\n", "FILE:1: text: expected str, got None; null, ~ and an empty value"),
        ("text:\n", "FILE:1: text: expected str, got None"),
        ("text: [a]\n", "FILE:1: text: expected str, got ['a']"),
        ("parts: {n: 1}\n", "FILE:1: parts: expected a list, got {'n': 1}"),
        ("parts: [[1]]\n", "FILE:1: parts[0]: expected keys and values, got [1]"),
        ("part: [1]\n", "FILE:1: part: expected keys and values, got [1]"),
        ("files: a\n", "FILE:1: files: expected a list, got 'a'"),
        (f"files: {'x' * 500}\n", "FILE:1: files: expected a list, got 'xxx"),
        ("text: " + "[" * 500 + "]" * 500, "not valid YAML: nested more than 32 deep"),
        ("text: " + "{a: " * 500 + "}" * 500, "not valid YAML: nested more than 32 deep"),
        ("".join(f"{' ' * i}- \n" for i in range(200)), "nested more than 32 deep"),
        ("text: a\n\tfolder: b\n", "FILE:2: not valid YAML: found character '\\t'"),
        ("text: 'a\n", "not valid YAML: found unexpected end of stream"),
        ("text: a\n---\ntext: b\n", "FILE:2: not valid YAML: but found another document"),
        ("text: \x07\n", "not valid YAML"),
        ("folder: ''\n", "FILE:1: folder: is empty; give a path"),
        ('folder: "a\\0b"\n', "FILE:1: folder: holds a zero byte"),
        ("folder: ~nobody-of-that-name/x\n", "FILE:1: folder: there is no home folder of '~nobody-of-that-name'"),
        ("files:\n- a\n- ''\n", "FILE:1: files: is empty; give a path"),
    ],
)
def test_what_is_refused(write, text, message):
    assert message in refusal(write(text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("part={n: 1, n: 2}", "override 'part={n: 1, n: 2}': 'n' is there twice"),
        ("part.n=010", "override 'part.n=010': 010 would be read as octal"),
        ("part.rate=1e999", "override 'part.rate=1e999': part.rate: '1e999' is too large"),
        ("part.rate=!!python/name:os.x", "is not read"),
        ("part.n=[1", "not valid YAML"),
        ("text=" + "[" * 100, "nested more than 32 deep"),
        ("=3", "must be key=value"),
        ("folder=", "folder: expected str, got None"),
        ("a..b=1", "unknown key 'a'"),
    ],
)
def test_overrides_are_read_as_strictly(write, override, message):
    assert message in refusal(write("text: a\n"), override)


def test_files_that_are_none(tmp_path):
    assert refusal(tmp_path) == "FILE: cannot read the settings: it is a folder"
    assert "No such file" in refusal(tmp_path / "none.yaml")
    os.mkfifo(tmp_path / "pipe")
    assert "it is not a regular file" in refusal(tmp_path / "pipe")
    assert "it is not a regular file" in refusal(Path("/dev/zero"))
    assert "cannot read the settings" in refusal(Path("a\0b"))


def test_files_of_other_kinds(write):
    assert "more than 1 MiB" in refusal(write("text: a\n" + "# more\n" * 200_000))
    assert "FILE:2: cannot read the settings: it is not UTF-8" in refusal(write("text: a\n# é".encode("latin-1")))
    assert "not UTF-8" in refusal(write("text: a\n".encode("utf-16")))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- a\n", "just words", "3", "~"])
def test_what_is_no_mapping(write, text):
    assert refusal(write(text)) == "FILE: the settings is not a mapping of keys to values"


def test_what_looks_odd_and_is_right(write):
    found = read(
        write(
            "\ufefftext: 2026-11-29\nfolder: ./x\n"
            "part: &p {n: 0x10, rate: 1e-5, on: yes, name: 'no'}\nparts: [*p, *p, {n: 1_000, rate: 3, name: '010'}]\n"
            "numbers: [0, -3, +4]\nrates: [.5, 1.5e+3, 2E4]\nperhaps: null\n"
        )
    )
    assert found.text == "2026-11-29", "a date is the text that it is written as"
    assert found.part == Part(16, 1e-5, True, "no")
    assert found.parts == (found.part, found.part, Part(1000, 3.0, False, "010")), "an alias that says the same again"
    assert found.numbers == (0, -3, 4) and found.rates == (0.5, 1500.0, 20000.0) and found.perhaps is None


def test_an_override_within_an_alias_changes_one_place(write):
    found = read(write("part: &p {n: 1}\nparts: [*p]\n"), "part.n=2")
    assert (found.part.n, found.parts[0].n) == (2, 1)


def test_home(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = read(write("folder: ~/x\nfiles: [~/a, b/~c, ./~]\nperhaps: '~'\n"), "text=~/stays")
    assert (found.folder, found.files, found.perhaps) == ("/home/me/x", ("/home/me/a", "b/~c", "./~"), "/home/me")
    assert found.text == "~/stays", "which is no path"
    assert read(write("text: a\n"), "folder=~/y").folder == "/home/me/y"


def test_the_place_of_a_number_that_is_none():
    assert not_finite(Whole()) is None
    assert not_finite(Whole(parts=(Part(), Part(rate=float("nan"))))) == "parts[1].rate"
    assert not_finite(Whole(rates=(1.0, float("inf")))) == "rates[1]"
