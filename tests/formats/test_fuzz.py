"""Whatever bytes or JSON a data file holds is read, or refused by `MirageError`; and what the check passes works."""

import json
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirage_vlm import formats, tasks
from mirage_vlm.errors import MirageError
from mirage_vlm.trajectory import Text

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = st.sampled_from(
    ["A", "B", "map.png", "thin.png", "none.png", "<image>", "<image>q", "<output_image>", r"\boxed{A}", "\ud800", ""]
)
NONSENSE = st.recursive(
    SCALARS | WORDS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def often(*usual: object) -> st.SearchStrategy:
    """One of the usual values, and now and then anything."""
    return st.one_of(*[st.sampled_from(usual)] * 8, NONSENSE)


REGIONS = often(None, None, [[0, 0, 1, 1]], [[0, 0, 0.5, 1], [0.5, 0, 1, 1]], [[0, 0, 2, 1]])
PART = st.one_of(
    st.fixed_dictionaries({"type": often("text"), "text": WORDS}),
    st.fixed_dictionaries({"type": often("image"), "image": often("map.png", "thin.png")}),
    st.fixed_dictionaries({"type": st.just("image")}, optional={"image": often("map.png"), "url": WORDS}),
    st.fixed_dictionaries(
        {"type": often("latent"), "helper": often("map.png", "map.png", "thin.png", None)},
        optional={"k": often(1, 2, 4, 40, 10**12), "regions": REGIONS, "region": REGIONS},
    ),
)
CONTENT = st.one_of(WORDS, st.lists(PART, min_size=1, max_size=3), NONSENSE)
TURNS = st.lists(
    st.fixed_dictionaries({"role": often("user", "assistant"), "content": CONTENT}), max_size=4
) | st.tuples(
    st.fixed_dictionaries({"role": st.just("user"), "content": CONTENT}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": CONTENT}),
).map(list)
META = st.dictionaries(
    st.sampled_from(["map", "plan", "choices", "letter", "answer", "level", "kind", "figure", "scene", "whole"]),
    often(["SF", "FG"], "R,D", {"A": "a", "B": "b"}, "A", 3, ["a"]),
    max_size=4,
)
KNOWN = {
    "task": often(None, "choice", "vsp-planning", "vsp-reasoning", "vsp-perception", "geometry", "sat", "jigsaw"),
    "answer": often(None, "A", 3, True, ["A", "B"]),
    "meta": META | NONSENSE,
}
IMAGES = often("map.png", ["map.png"], ["map.png", "thin.png"], [], None)
SPEECH = st.fixed_dictionaries({"from": often("human", "gpt", "system"), "value": WORDS | NONSENSE})
SAID = WORDS | TURNS | NONSENSE
PLAN = st.one_of(
    st.fixed_dictionaries({"type": often("text"), "content": WORDS}),
    st.fixed_dictionaries({"type": often("latent"), "helper_image": often("map.png")}),
)
RECORD = st.one_of(
    st.fixed_dictionaries({"messages": TURNS}, optional=KNOWN | {"images": IMAGES, "helpers": IMAGES}),
    st.fixed_dictionaries(
        {"text_input": WORDS, "image_input": IMAGES},
        optional=KNOWN
        | {
            "text_output": WORDS,
            "image_output": IMAGES,
            "sequence_plan": st.lists(PLAN, max_size=3) | NONSENSE,
            "map_desc": often([[1, 2], [0, -1]], ["SF", "FG"], [[3]]),
        },
    ),
    st.fixed_dictionaries(
        {"conversations": st.lists(SPEECH, max_size=4) | NONSENSE}, optional=KNOWN | {"image": IMAGES, "images": IMAGES}
    ),
    st.fixed_dictionaries(
        {"prompt": WORDS | TURNS | NONSENSE}, optional=KNOWN | {"completion": WORDS | TURNS | NONSENSE}
    ),
    NONSENSE,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("fuzz")
    PIL.Image.new("RGB", (128, 64), "red").save(found / "map.png")
    PIL.Image.new("RGB", (3, 900), "red").save(found / "thin.png")
    return found


def read(path: Path) -> list[formats.Scanned]:
    try:
        return list(formats.scan(path, plain=tasks.from_record))
    except MirageError as fault:
        assert "\n" not in str(fault)
        return []


@SETTINGS
@given(st.binary(max_size=80) | st.lists(st.binary(max_size=20), max_size=4).map(b"\n".join))
def test_bytes(folder, content):
    (folder / "bytes.jsonl").write_bytes(content)
    for example in read(folder / "bytes.jsonl"):
        assert all("\n" not in str(fault) for fault in example.faults)


@SETTINGS
@given(st.lists(RECORD, min_size=1, max_size=2), st.sampled_from(["", " ", "\r", "\ufeff"]))
def test_what_is_passed_is_encoded_and_scored(folder, tiny, records, end):
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + end + "\n" for record in records), encoding="utf-8")
    for example in read(path):
        assert (example.trajectory is None) == bool(example.faults)
        for fault in example.faults:
            str(fault).encode()
            assert "\n" not in str(fault)
        if (trajectory := example.trajectory) is None:
            continue
        assert formats.from_record(formats.to_record(trajectory)).messages is not None
        if not list(tiny.encoder.faults(trajectory, response=False)):
            tiny.encoder.prompt(trajectory.prompt)
        if trajectory.response and not list(tiny.encoder.faults(trajectory)):
            tiny.encoder.example(trajectory)
        if not list(tasks.faults(trajectory)):
            for answer in (r"\boxed{A}", "<answer>R,D</answer>", "", "9" * 9000):
                tasks.score(trajectory.with_response((Text(answer),)))
