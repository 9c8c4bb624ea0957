import copy
from pathlib import Path

import pytest
from samples import chat_record, reference_record

from mirage_vlm.formats import faults, from_record


def change(path: str, value: object):
    """A change of the record: `messages.1.content.0.k` set to a value, or deleted if it is `...`."""

    def apply(record: dict) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            record = record[key]
        if value is ...:
            del record[last]
        else:
            record[last] = value

    return apply


USER, ASSISTANT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
PACKED = {"shape": [1, 2], "dtype": "float32", "data": "AACAPwAAAEA="}

REGIONS = "messages.1.content.1.regions"
REGIONS_FIELD = "messages[1].content[1].regions"

FAULTS = [
    (change(REGIONS, "all"), REGIONS_FIELD, "must be a list of boxes"),
    (change(REGIONS, []), REGIONS_FIELD, "must be a list of boxes"),
    (change(REGIONS, [[0, 0, 1, 1], [0, 0, 1]]), REGIONS_FIELD, "[1] must be [left, top, right, bottom]"),
    (change(REGIONS, [[0.5, 0, 0.5, 1]]), REGIONS_FIELD, "[0] must be"),
    (change(REGIONS, [[0, 0, 1, 1.1]]), REGIONS_FIELD, "[0] must be"),
    (change(REGIONS, [[0, True, 1, 1]]), REGIONS_FIELD, "[0] must be"),
    (change(REGIONS, [[0, 0, 1, 1]]), "messages[1].content[1].k", "is 4, but there are 1 regions"),
    (change("messages", ...), "messages", "is missing"),
    (change("messages", []), "messages", "at least one message"),
    (change("messages", {}), "messages", "must be a list"),
    (change("messages.0", "hello"), "messages[0]", "must be an object"),
    (change("messages.0.role", "tool"), "messages[0].role", "not 'tool'"),
    (change("messages.0.role", ...), "messages[0].role", "not None"),
    (change("messages.0.content", ...), "messages[0].content", "is missing"),
    (change("messages.0.content", 5), "messages[0].content", "is 5"),
    (change("messages.0.content", []), "messages[0].content", "has no parts"),
    (change("messages.0.content.1", "text"), "messages[0].content[1]", "must be an object"),
    (change("messages.0.content.1.type", "video"), "messages[0].content[1].type", "not 'video'"),
    (change("messages.0.content.1.type", ...), "messages[0].content[1].type", "not None"),
    (change("messages.0.content.1.text", ...), "messages[0].content[1].text", "is missing"),
    (change("messages.0.content.1.text", 7), "messages[0].content[1].text", "must be a string"),
    (change("messages.0.content.1.text", "\ud800"), "messages[0].content[1].text", "surrogate"),
    (change("messages.0.content.0.image", ...), "messages[0].content[0].image", "is missing"),
    (change("messages.0.content.0.reading", "x"), "messages[0].content[0].reading", "list of strings"),
    (change("messages.0.content.0.image", 3), "messages[0].content[0].image", "must be a path"),
    (change("messages.0.content.0.image", ""), "messages[0].content[0].image", "must be a path"),
    (change("messages.0.content.0.image", "a\0b"), "messages[0].content[0].image", "NUL"),
    (change("messages.0.content.0.image", "images/no.png"), "messages[0].content[0].image", "no such file"),
    (change("messages.0.content.0.image", "images"), "messages[0].content[0].image", "not a picture"),
    (
        change("messages.0.content.0.image", "images/broken.png"),
        "messages[0].content[0].image",
        "not a picture",
    ),
    (
        change("messages.0.content.0.image", "images/notes.txt"),
        "messages[0].content[0].image",
        "not a picture",
    ),
    (
        change("messages.0.content.0.image", "data:image/png;base64,AA"),
        "messages[0].content[0].image",
        "not a picture",
    ),
    (
        change("messages.0.content.0", {"type": "image_url", "image_url": {"url": "images/no.png"}}),
        "messages[0].content[0].image_url.url",
        "no such file",
    ),
    (change("messages.0.content.0", {"type": "image_url"}), "messages[0].content[0].image_url", "is missing"),
    (
        change("messages.0.content.0", {"type": "latent", "helper": "images/map.png"}),
        "messages[0].content[0]",
        "not in a user turn",
    ),
    (change("messages.1.content.1.helper", ...), "messages[1].content[1].helper", "needs its helper image"),
    (change("messages.1.content.1.helper", None), "messages[1].content[1].helper", "needs its helper image"),
    (change("messages.1.content.1.helper", "images/no.png"), "messages[1].content[1].helper", "no such file"),
    (
        change("messages.1.content.1.helper", "images/broken.png"),
        "messages[1].content[1].helper",
        "not a picture",
    ),
    (change("messages.1.content.1.k", 0), "messages[1].content[1].k", "not 0"),
    (change("messages.1.content.1.k", 2.0), "messages[1].content[1].k", "not 2.0"),
    (change("messages.1.content.1.k", True), "messages[1].content[1].k", "not True"),
    (change("messages.1.content.1.k", "4"), "messages[1].content[1].k", "not '4'"),
    (change("messages.1.content.1.latents", PACKED), "messages[1].content[1].k", "holds 1 latents"),
    (change("messages.1.content.1.latents", [1.0]), "messages[1].content[1].latents", "must be an object"),
    (
        change("messages.1.content.1.latents", {**PACKED, "shape": [2]}),
        "messages[1].content[1].latents",
        "shape",
    ),
    (
        change("messages.1.content.1.latents", {**PACKED, "shape": [4, 2]}),
        "messages[1].content[1].latents",
        "32 bytes",
    ),
    (
        change("messages.1.content.1.latents", {**PACKED, "dtype": "f8"}),
        "messages[1].content[1].latents",
        "float32",
    ),
    (
        change("messages.1.content.1.latents", {**PACKED, "data": "?"}),
        "messages[1].content[1].latents",
        "base64",
    ),
    (
        change("messages.1.content.1.latents", {**PACKED, "data": None}),
        "messages[1].content[1].latents",
        "base64",
    ),
    (change("messages", [ASSISTANT]), "messages[0].role", "must follow a user turn"),
    (change("messages", [USER, USER]), "messages[1].role", "another user turn"),
    (change("messages", [USER, ASSISTANT, ASSISTANT]), "messages[2].role", "another assistant turn"),
    (
        change("messages", [USER, {"role": "system", "content": "s"}, USER]),
        "messages[1].role",
        "only be the first",
    ),
    (change("messages", [{"role": "system", "content": "s"}]), "messages[0].role", "the last turn"),
    (change("images", "images/map.png"), "images", "must be a list"),
    (change("images", ["images/map.png"]), "images", "lists 1 for 0 image parts"),
    (change("helpers", ["images/map.png"]), "helpers", "lists 1 for 0 latent parts"),
    (change("task", 1), "task", "must be a string"),
    (change("answer", {"U": 1}), "answer", "must be a text, a number"),
    (change("answer", ["U", None]), "answer", "must be a text, a number"),
    (change("answer", ["U", ["D"]]), "answer", "must be a text, a number"),
    (change("answer", []), "answer", "at least one accepted answer"),
    (change("answer", "\ud800"), "answer", "surrogate"),
    (change("meta.level", [3]), "meta.level", "must be a number or a text"),
    (change("meta.notes", ["a", {"b": "\udc00"}]), "meta.notes[1].b", "surrogate"),
    (change("messages.1.content.1.region", [[0, 0, 1, 1]]), "messages[1].content[1].region", "did you mean `regions`"),
    (change("messages.1.content.1.image", "x.png"), "messages[1].content[1].image", "latent has helper, k"),
    (change("messages.0.content.0.min_pixels", 9), "messages[0].content[0].min_pixels", "an unknown key"),
    (change("messages.0.content.1.texts", "?"), "messages[0].content[1].texts", "did you mean `text`"),
    (change("meta", "level 3"), "meta", "must be an object"),
    (change("decoding", [1]), "decoding", "must be an object"),
    (change("decoding", {"token_ids": [1, -1], "finish_reason": "stop"}), "decoding.token_ids", "token ids"),
    (change("decoding", {"token_ids": [], "finish_reason": "eos"}), "decoding.finish_reason", "not 'eos'"),
]


@pytest.mark.parametrize(("apply", "field", "message"), FAULTS, ids=[f"{f}-{m}" for _, f, m in FAULTS])
def test_each_fault_is_named_once_with_its_field(folder, apply, field, message):
    record = chat_record()
    assert list(faults(record, base=folder)) == []
    apply(record)
    (fault,) = faults(record, base=folder)
    assert fault.field == field
    assert message in fault.message and "\n" not in fault.message


def test_every_fault_of_a_record_is_named(folder):
    record = chat_record()
    for apply in (
        change("messages.0.content.0.image", "images/no.png"),
        change("messages.0.content.1.text", ...),
        change("messages.1.content.1.helper", ...),
        change("messages.1.content.1.k", -1),
        change("answer", {}),
    ):
        apply(record)
    assert [fault.field for fault in faults(record, base=folder)] == [
        "messages[0].content[0].image",
        "messages[0].content[1].text",
        "messages[1].content[1].helper",
        "messages[1].content[1].k",
        "answer",
    ]


@pytest.mark.parametrize("record", [None, 3, "text", [], [{"role": "user", "content": "?"}]])
def test_a_record_that_is_no_object(record):
    (fault,) = faults(record)
    assert fault.field == "" and "must be an object" in fault.message


def test_a_missing_column_entry_leaves_its_part_without_a_picture(folder):
    record = chat_record()
    del record["messages"][0]["content"][0]["image"]
    record["images"] = []
    found = list(faults(record, base=folder))
    assert [fault.field for fault in found] == ["messages[0].content[0].image", "images"]


def test_check_files_off_opens_nothing():
    assert list(faults(chat_record(), base=Path("nowhere"), check_files=False)) == []


def test_remote_pictures_are_not_fetched():
    record = {"messages": [{"role": "user", "content": [{"type": "image", "image": "http://localhost:1/x.png"}]}]}
    assert list(faults(record)) == []


def test_a_file_that_changes_is_looked_at_again(folder):
    path = folder / "images/map.png"
    assert list(faults(chat_record(), base=folder)) == []
    path.write_bytes(b"gone")
    assert [fault.field for fault in faults(chat_record(), base=folder)] == ["messages[0].content[0].image"]


def test_faults_never_raises_on_nonsense(folder):
    """Every value of a good record, replaced by values of every type."""
    nonsense = [None, True, 0, -1, 1.5, "", "x", [], [None], {}, {"type": "latent"}, [[]], [{"role": None}]]

    def paths(value, prefix=()):
        yield prefix
        if isinstance(value, dict | list):
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                yield from paths(entry, (*prefix, key))

    for good in (chat_record(), reference_record(image_output=["images/helper.png"])):
        for path in list(paths(good)):
            for value in nonsense:
                record = copy.deepcopy(good)
                if not path:
                    record = value
                else:
                    parent = record
                    for key in path[:-1]:
                        parent = parent[key]
                    parent[path[-1]] = value
                if not list(faults(record, base=folder)):
                    from_record(record, base=folder)  # no fault: it must be readable
