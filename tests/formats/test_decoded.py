"""What decoding leaves on a trajectory is written and read back, in records, files, datasets and kept responses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from mirage_vlm.decoding import Engine, Finished
from mirage_vlm.errors import MirageError
from mirage_vlm.evaluation.kept import Kept
from mirage_vlm.formats import (
    faults,
    from_dataset,
    from_record,
    load_dataset_dir,
    read_jsonl,
    save_dataset_dir,
    to_dataset,
    to_record,
    write_jsonl,
)
from mirage_vlm.trajectory import Decoding, LatentSpan, Trajectory, assistant_turn, user_turn

IDS = (5, 6, 7, 8)
DECODINGS = [
    Decoding(IDS, "stop"),
    Decoding(IDS, "stop", (-0.1, None, None, -1e-9, -2.25), 9),
    Decoding(IDS, "length", (-0.1, None, -math.inf, 0.0)),
    Decoding((), "cancelled", ()),
    Decoding(IDS[:1], "cancelled", (None,)),
    Decoding(IDS, "stop", stop_id=0),
]
SPANS = [
    LatentSpan(k=2, latents=torch.tensor([[0.1, -2.5e-8], [3.0, 4.0]])),
    LatentSpan(k=3),  # latents that were not returned
    LatentSpan(k=0),  # closed at once, or cut before the first
]


def decoded(decoding: Decoding) -> Trajectory:
    return Trajectory((user_turn("?"), assistant_turn("a", SPANS[0], "b", *SPANS[1:])), decoding=decoding)


def same(found: Trajectory, expected: Trajectory) -> None:
    assert found.decoding == expected.decoding and found.text == expected.text
    assert [span.k for span in found.spans] == [span.k for span in expected.spans]
    for one, other in zip(found.spans, expected.spans, strict=True):
        assert (one.latents is None) == (other.latents is None)
        if one.latents is not None:
            assert torch.equal(one.latents, other.latents.float())


@pytest.mark.parametrize("decoding", DECODINGS)
def test_there_and_back(decoding, tmp_path):
    row = decoded(decoding)
    same(from_record(json.loads(json.dumps(to_record(row), allow_nan=False))), row)
    write_jsonl(tmp_path / "a.jsonl", [row, row])
    for found in read_jsonl(tmp_path / "a.jsonl"):
        same(found, row)
    same(from_dataset(to_dataset([row]))[0], row)
    kept = Kept(tmp_path / "a.partial", {"x": 1})
    kept.add("self", 3, row, 0.5)
    same(Kept(tmp_path / "a.partial", {"x": 1}).response("self", 3, row), row)


def test_rows_of_all_kinds_in_one_dataset(tmp_path):
    rows = [Trajectory((user_turn("?"),)), *map(decoded, DECODINGS)]
    save_dataset_dir(tmp_path / "d", rows)
    for found, row in zip(load_dataset_dir(tmp_path / "d"), rows, strict=True):
        same(found, row)


def test_what_an_engine_gives(tiny, tmp_path):
    """Every way of ending, with and without vectors, in the model's precision too."""
    engine = Engine(tiny)
    for changes in ({}, {"logprobs": True}, {"return_latents": False}, {"spans": "forced", "latent_size": 0}):
        for most in (3, 60):
            engine.submit("Which way?", max_new_tokens=most, **changes)
    engine.cancel(engine.submit("Which way?", logprobs=True))
    cut = engine.submit("Which way?", logprobs=True, spans="forced")
    ends = [event for _ in range(3) for event in engine.step()]
    engine.cancel(cut)
    ends += engine.run()
    rows = [event.trajectory for event in ends if isinstance(event, Finished)]
    assert {row.decoding.finish_reason for row in rows} == {"stop", "length", "cancelled"}
    assert any(None in (row.decoding.logprobs or ()) for row in rows) and any(row.spans for row in rows)
    write_jsonl(tmp_path / "a.jsonl", rows)
    for found, row in zip(read_jsonl(tmp_path / "a.jsonl"), rows, strict=True):
        same(found, row)
    engine.submit(rows[-1], replay=found, logprobs=True)
    (again,) = (event.trajectory for event in engine.run() if isinstance(event, Finished))
    assert again.decoding.token_ids == found.decoding.token_ids, "what was read is replayed"


def test_older_records_are_read():
    record = to_record(decoded(DECODINGS[0]))
    record["decoding"] = {"token_ids": [1, 2], "finish_reason": "stop"}
    assert from_record(record).decoding == Decoding((1, 2), "stop")
    record["decoding"] |= {"logprobs": None, "stop_id": None}
    assert from_record(record).decoding == Decoding((1, 2), "stop")


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"finish_reason": "eos"}, "finish_reason", "must be one of stop, length, cancelled, error, not 'eos'"),
        ({"finish_reason": ["stop"]}, "finish_reason", "must be one of"),
        ({"stop_id": -1}, "stop_id", "must be a token id"),
        ({"stop_id": True}, "stop_id", "must be a token id"),
        ({"finish_reason": "length", "logprobs": None}, "stop_id", "is of a response that ended by itself"),
        ({"logprobs": "x"}, "logprobs", "must be a list of numbers"),
        ({"logprobs": [0.0, 0.5, None, None, None]}, "logprobs[1]", "must be a number up to 0"),
        ({"logprobs": [math.nan] * 5}, "logprobs[0]", "must be a number up to 0"),
        ({"logprobs": [False] * 5}, "logprobs[0]", "must be a number up to 0"),
        ({"logprobs": [None] * 4}, "logprobs", "must have 5 entries, one for each token and the end of turn, not 4"),
        ({"token_ids": [1, True]}, "token_ids", "must be a list of token ids"),
        ({"token_ids": [1 << 70]}, "token_ids", "must be a list of token ids"),
    ],
)
def test_faults_have_their_field(changes, field, message):
    record = to_record(decoded(DECODINGS[1]))
    record["decoding"] |= changes
    found = {fault.field: fault.message for fault in faults(record)}
    assert message in found[f"decoding.{field}"]


def test_a_span_without_vectors_is_of_decoded_responses_alone():
    record = to_record(replace(decoded(DECODINGS[0]), decoding=None))
    with pytest.raises(MirageError, match="helper: is missing"):
        from_record(record)
