"""The adapter for lmms-eval, on a stand-in of the harness, against direct calls of `vlm.generate`."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from harnesses import Instance, lmms_eval_adapter, without
from support import picture

from mirage_vlm.adapters.answering import of_rank
from mirage_vlm.adapters.messages import ModelArgs, sampling_seed
from mirage_vlm.errors import MirageError
from mirage_vlm.trajectory import Trajectory, user_turn

DOCS = [
    {"pictures": [picture(1 + i % 3, 2, i), picture(2, 1, 50 + i)][: i % 3], "text": text}
    for i, text in enumerate(
        ["Go up, then right.", "Which way?", "The hole is on the left.", "Go", "Answer with moves.", "The elf walks"]
    )
]


@pytest.fixture
def metrics() -> list[tuple]:
    return []


@pytest.fixture
def adapter(monkeypatch, metrics) -> ModuleType:
    return lmms_eval_adapter(monkeypatch, metrics)


@pytest.fixture
def make(adapter, tiny, monkeypatch):
    """The adapter's model with `tiny` in place of a checkpoint."""
    monkeypatch.setattr(ModelArgs, "load", lambda args: tiny)

    def made(text: str = "", **more: Any):
        model = adapter.MirageVLM.create_from_arg_string(f"pretrained=tiny,max_new_tokens=30,{text}", more)
        model.task_dict = {"maze": {"test": DOCS}}
        return model

    return made


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "url": image.source} for image in doc["pictures"]]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["text"]}]}]


def instance(doc_id: int, settings: dict[str, Any] | None = None, messages: Any = doc_to_messages) -> Instance:
    arguments = ("context", messages, settings, doc_id, "maze", "test")
    return Instance("generate_until", arguments, 0, {"task": "maze", "doc_id": doc_id, "repeats": 1})


def prompt(doc: dict[str, Any]) -> Trajectory:
    return Trajectory((user_turn(*doc["pictures"], doc["text"]),))


def test_the_model_is_one_of_lmms_evals(adapter):
    from lmms_eval.api.model import lmms

    from mirage_vlm.adapters import lmms_eval_manifest

    manifest = lmms_eval_manifest()
    assert manifest.model_id == "mirage_vlm"
    assert manifest.chat_class_path == f"{adapter.__name__}.MirageVLM"
    assert issubclass(adapter.MirageVLM, lmms) and not adapter.MirageVLM.is_simple


def test_answers_are_those_of_generate_in_the_order_of_the_requests(make, tiny):
    order = [4, 0, 5, 2, 1, 3]
    wanted = tiny.generate([prompt(DOCS[i]) for i in order], max_new_tokens=30)
    assert len({row.text for row in wanted}) > 3
    assert len({len(row.decoding.token_ids) for row in wanted}) > 1, "rows leave at different times"
    for rows in (2, 64):
        model = make(f"max_rows={rows}", batch_size=1, max_batch_size=None)
        answers = model.generate_until([instance(i) for i in order])
        assert [answer.text for answer in answers] == [row.text for row in wanted]
        for answer, row, doc in zip(answers, wanted, order, strict=True):
            counts = answer.token_counts
            assert counts.input_tokens == len(tiny.encoder.prompt(prompt(DOCS[doc]).messages)[0])
            assert counts.output_tokens == len(row.decoding.token_ids)
            assert counts.reasoning_tokens == row.decoding.token_ids.count(tiny.config.pad_id)
        assert [text for _, _, text in model.cache_hook.told] == [row.text for row in wanted]


def test_each_request_has_its_own_settings(make, tiny):
    settings = [
        {"max_new_tokens": 5, "do_sample": False},
        {"max_new_tokens": 25, "do_sample": True, "temperature": 1.1, "top_p": 0.9, "image_aspect_ratio": "pad"},
        {"max_new_tokens": 25, "latent_size": 1, "num_beams": 1},
        {"max_new_tokens": 25, "max_spans": 0},
        None,
        {"max_new_tokens": 25, "temperature": 1.3, "seed": 9},
    ]
    changes = [
        {"max_new_tokens": 5},
        {"max_new_tokens": 25, "temperature": 1.1, "top_p": 0.9, "seed": sampling_seed(3, "maze", "test", 1, 0, 0)},
        {"max_new_tokens": 25, "latent_size": 1},
        {"max_new_tokens": 25, "max_spans": 0},
        {"max_new_tokens": 30, "latent_size": 2},
        {"max_new_tokens": 25, "temperature": 1.3, "seed": sampling_seed(9, "maze", "test", 5, 0, 0)},
    ]
    model = make("seed=3,latents=2")
    answers = model.generate_until([instance(i, own) for i, own in enumerate(settings)])
    for doc, (answer, own) in enumerate(zip(answers, changes, strict=True)):
        (wanted,) = tiny.generate([prompt(DOCS[doc])], **{"latent_size": 2, **own})
        assert answer.text == wanted.text, f"request {doc}"
        assert answer.token_counts.output_tokens == len(wanted.decoding.token_ids)
    assert model.statistics.ignored == {"image_aspect_ratio"}


def test_repeats_of_a_request_are_drawn_anew_and_the_same_each_time(make):
    request = instance(1, {"temperature": 1.0})
    model = make()
    first = [answer.text for answer in model.generate_until([request] * 4)]
    assert len(set(first)) > 1
    assert [answer.text for answer in model.generate_until([instance(0), *[request] * 4])][1:] == first


def test_stop_strings_end_the_text_and_the_decoding(make, tiny):
    whole = tiny.generate([prompt(doc) for doc in DOCS], max_new_tokens=30)
    row = max(range(len(DOCS)), key=lambda i: len(whole[i].text))
    text = whole[row].text
    stop = text[len(text) // 3 : len(text) // 3 + 2]
    model = make()
    cut, kept = model.generate_until([instance(row, {"until": ["never said", stop]}), instance(row)])
    assert cut.text == text[: text.index(stop)] and kept.text == text
    assert cut.token_counts.output_tokens < kept.token_counts.output_tokens
    ends = sorted(found["finish_reason"] for found in model.statistics.requests)
    assert ends == sorted(["stop_string", whole[row].decoding.finish_reason])


def test_several_pictures_stay_in_order(make, tiny):
    first, second = picture(2, 2, 1), picture(3, 1, 2)

    def turned(doc: dict[str, Any]) -> list[dict[str, Any]]:
        parts = [{"type": "image", "url": second.source}, {"type": "text", "text": "Which "}]
        return [{"role": "user", "content": [*parts, {"type": "image", "url": first.source}]}]

    def straight(doc: dict[str, Any]) -> list[dict[str, Any]]:
        parts = [{"type": "image", "url": first.source}, {"type": "text", "text": "Which "}]
        return [{"role": "user", "content": [*parts, {"type": "image", "url": second.source}]}]

    said = make().generate_until([instance(0, messages=turned), instance(0, messages=straight)])
    wanted = tiny.generate(
        [(user_turn(second, "Which ", first),), (user_turn(first, "Which ", second),)], max_new_tokens=30
    )
    assert [answer.text for answer in said] == [row.text for row in wanted]
    assert wanted[0].text != wanted[1].text


def test_marks_of_spans_are_shown_where_asked_for(make, tiny):
    wanted = tiny.generate([prompt(doc) for doc in DOCS], max_new_tokens=30)
    said = make("mark=<latent>").generate_until([instance(i) for i in range(len(DOCS))])
    assert [answer.text.count("<latent>") for answer in said] == [len(row.spans) for row in wanted]
    assert [answer.text.replace("<latent>", "") for answer in said] == [row.text for row in wanted]


def test_statistics_say_what_the_spans_did(make, tiny, tmp_path, metrics):
    path = tmp_path / "new" / "statistics.json"
    model = make(f"statistics={path}")
    model.generate_until([instance(i) for i in range(3)])
    model.generate_until([instance(i, {"max_spans": 0}) for i in (3, 4)])
    free = tiny.generate([prompt(DOCS[i]) for i in range(3)], max_new_tokens=30)
    told = json.loads(path.read_text())
    by_document = {found["document"]: found for found in told["requests"]}
    for i, row in enumerate(free):
        found, pads = by_document[i], row.decoding.token_ids.count(tiny.config.pad_id)
        assert (found["spans"], found["latents"]) == (len(row.spans), pads)
        assert found["tokens"] == len(row.decoding.token_ids) - pads
    assert by_document[3]["latents"] == by_document[4]["spans"] == 0
    thought = sum(tiny.config.pad_id in row.decoding.token_ids for row in free)
    assert thought > 0
    assert told["summary"]["latent_rate"] == thought / 5 and told["summary"]["n"] == 5
    assert told["model_args"]["pretrained"] == "tiny"
    assert [values[3]["latent_rate"] for values in metrics] == [thought / 3, 0]
    from loguru import logger

    assert logger.warnings == ["no latent was consumed in 2 responses: the model has answered as a plain VLM"]


def test_statistics_are_a_file_for_each_process(make, tmp_path):
    model = make(f"statistics={tmp_path / 'told.json'}")
    model._rank, model._world_size = 1, 2
    model.generate_until([instance(0)])
    assert json.loads((tmp_path / "told.rank1.json").read_text())["summary"]["n"] == 1
    assert of_rank(tmp_path / "told.json", 1) == tmp_path / "told.rank1.json"


def test_rounds_follow_one_another(make, tiny):
    def rounds(doc, *, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return doc_to_messages(doc)
        done = round_idx == 1 + len(doc["pictures"])
        if done:
            return None, True, previous_output, previous_round_info
        assert previous_round_info == (None if round_idx == 1 else round_idx - 1)
        turns = [
            *doc_to_messages(doc),
            {"role": "assistant", "content": [{"type": "text", "text": previous_output[-1]}]},
            {"role": "user", "content": [{"type": "text", "text": f"Then {round_idx}?"}]},
        ]
        return turns, False, previous_output, round_idx

    said = make().generate_until_multi_round([instance(i, messages=rounds) for i in range(3)])
    assert [len(texts) for texts in said] == [1, 2, 3]
    for doc, texts in zip(DOCS, said, strict=False):
        (first,) = tiny.generate([prompt(doc)], max_new_tokens=30)
        assert texts[0] == first.text
        for place in range(1, len(texts)):
            from mirage_vlm.trajectory import assistant_turn

            turns = (*prompt(doc).messages, assistant_turn(texts[place - 1]), user_turn(f"Then {place}?"))
            (row,) = tiny.generate([turns], max_new_tokens=30)
            assert texts[place] == row.text


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (instance(2, {"num_beams": 3}), "task maze, document 2: num_beams must be 1"),
        (
            instance(2, messages=lambda doc: [{"role": "user", "content": [{"type": "audio", "url": "a"}]}]),
            "task maze, document 2: only text and pictures can be read; this request holds 'audio'",
        ),
        (instance(2, {"max_new_tokens": 5000}), "task maze, split test, document 2: a prompt of .* do not fit"),
    ],
)
def test_a_request_that_cannot_be_answered_is_named(make, request_, message):
    with pytest.raises(MirageError, match=message):
        make().generate_until([instance(0), request_])


def test_likelihoods_are_not_there(make):
    with pytest.raises(NotImplementedError, match="answers by generation only"):
        make().loglikelihood([instance(0)])


def test_wrong_arguments_are_named_before_a_model_is_loaded(adapter):
    with pytest.raises(MirageError, match="did you mean 'max_rows'"):
        adapter.MirageVLM.create_from_arg_string("pretrained=nowhere,maxrows=3", {})
    with pytest.raises(MirageError, match="'pretrained' is missing"):
        adapter.MirageVLM.create_from_arg_string("", {"batch_size": 1})


def test_without_the_harness_one_line_says_so(monkeypatch):
    with pytest.raises(MirageError, match=r"^lmms-eval 0.7 or newer cannot be imported .*pip install"):
        without(monkeypatch, "lmms_eval", "mirage_vlm.adapters.lmms_eval")


def test_importing_the_package_imports_no_harness_and_is_light():
    """lmms-eval imports it for every model."""
    script = "import sys, mirage_vlm.adapters; print(sorted({'lmms_eval', 'vlmeval', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
