"""The adapter for VLMEvalKit, on a stand-in of the harness, against direct calls of `vlm.generate`."""

from __future__ import annotations

import json
import sys
import threading
from types import ModuleType

import pytest
from harnesses import infer, vlmevalkit_adapter, without
from support import picture

from mirage_vlm.adapters.messages import ModelArgs, sampling_seed
from mirage_vlm.errors import MirageError
from mirage_vlm.trajectory import Image, Message, Text, assistant_turn, user_turn

TEXTS = ["Go up, then right.", "Which way?", "The hole is on the left.", "Go", "Answer with moves.", "The elf walks"]


@pytest.fixture
def adapter(monkeypatch) -> ModuleType:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return vlmevalkit_adapter(monkeypatch)


@pytest.fixture
def model(adapter, tiny, monkeypatch):
    monkeypatch.setattr(ModelArgs, "load", lambda args: tiny)
    return adapter.MirageVLM("tiny", max_new_tokens=30)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        picture(1 + i, 2, i).load().save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(3)]


def questions(paths: list[str]) -> list[list[dict[str, str]]]:
    """With 0, 1 and 2 pictures, before and between text."""
    found = []
    for i, text in enumerate(TEXTS):
        shown = [{"type": "image", "value": path} for path in paths[: i % 3]]
        found.append([*shown[:1], {"type": "text", "value": text}, *shown[1:]])
    return found


def prompt(question: list[dict[str, str]]) -> tuple[Message, ...]:
    return (user_turn(*(Image(p["value"]) if p["type"] == "image" else p["value"] for p in question)),)


@pytest.mark.parametrize("world", [None, "2"], ids=["from-threads", "one-after-the-other"])
def test_answers_are_those_of_generate_in_the_order_of_the_questions(model, tiny, paths, monkeypatch, world):
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    asked = questions(paths)
    wanted = tiny.generate(list(map(prompt, asked)), max_new_tokens=30)
    assert len({row.text for row in wanted}) > 3
    assert infer(model, asked, "maze", nproc=8) == [row.text for row in wanted]
    assert model.is_api is (world is None)
    told = model.statistics.summary()
    assert told["n"] == len(asked)
    assert told["spans_per_response"] == sum(len(row.spans) for row in wanted) / len(asked)
    assert told["latent_rate"] == sum(bool(row.spans) for row in wanted) / len(asked) > 0


def test_threads_are_decoded_together(model, paths, monkeypatch):
    most, step = 0, type(model.desk)._take
    started = threading.Barrier(4)
    ask = model.desk.ask

    def together(request):
        started.wait(timeout=60)
        return ask(request)

    def counted(desk, running, waiting):
        nonlocal most
        found = step(desk, running, waiting)
        most = max(most, len(waiting))
        return found

    monkeypatch.setattr(model.desk, "ask", together)
    monkeypatch.setattr(type(model.desk), "_take", counted)
    infer(model, questions(paths)[:4], "maze", nproc=4)
    assert most > 1


def test_the_thread_ends_with_the_last_answer(model, paths):
    for _ in range(2):
        infer(model, questions(paths)[:2], "maze", nproc=2)
        for thread in threading.enumerate():
            if thread.name == "mirage-vlm":
                thread.join(timeout=60)
                assert not thread.is_alive()


def test_what_is_drawn_depends_on_the_question_alone(adapter, tiny, paths, monkeypatch):
    monkeypatch.setattr(ModelArgs, "load", lambda args: tiny)
    asked = questions(paths)
    model = adapter.MirageVLM("tiny", max_new_tokens=20, temperature=1.0, seed=4, latents=1)
    said = infer(model, asked, "maze", nproc=8)
    assert infer(model, asked[::-1], "maze", nproc=3)[::-1] == said
    names = [("user", "image", "0.png"), ("user", "text", TEXTS[1])]
    seed = sampling_seed(4, "maze", names)
    (row,) = tiny.generate([prompt(asked[1])], max_new_tokens=20, temperature=1.0, latent_size=1, seed=seed)
    assert said[1] == row.text


def test_roles_and_turns(model, tiny, paths):
    parts = [
        {"type": "text", "value": "Be short.", "role": "system"},
        {"type": "image", "value": paths[0], "role": "user"},
        {"type": "text", "value": "Which way?", "role": "user"},
    ]
    system = Message("system", (Text("Be short."),))
    (row,) = tiny.generate([(system, user_turn(Image(paths[0]), "Which way?"))], max_new_tokens=30)
    assert model.generate(parts, "maze") == row.text
    turns = [
        {"role": "user", "content": parts[1:]},
        {"role": "assistant", "content": [{"type": "text", "value": "Up."}]},
        {"role": "user", "content": [{"type": "text", "value": "Then?"}]},
    ]
    first = user_turn(Image(paths[0]), "Which way?")
    (row,) = tiny.generate([(first, assistant_turn("Up."), user_turn("Then?"))], max_new_tokens=30)
    assert model.chat(turns, dataset="maze") == row.text


def test_a_question_that_cannot_be_answered_fails_alone(model, tiny, paths, tmp_path):
    lost = [{"type": "image", "value": str(tmp_path / "lost.png")}, {"type": "text", "value": "Which way?"}]
    with pytest.raises(MirageError, match=r"task maze: cannot read the picture .*lost\.png"):
        model.generate(lost, "maze")
    (row,) = tiny.generate([prompt(questions(paths)[1])], max_new_tokens=30)
    assert model.generate(questions(paths)[1], "maze") == row.text


def test_a_fault_of_the_engine_reaches_all_who_wait(model, tiny, paths, monkeypatch):
    from mirage_vlm.adapters.answering import Answering

    def broken(running):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Answering, "step", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            infer(model, questions(paths), "maze", nproc=4)
    (row,) = tiny.generate([prompt(questions(paths)[1])], max_new_tokens=30)
    assert model.generate(questions(paths)[1], "maze") == row.text, "the next has an engine of its own"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("where", ["__init__", "submit"])
def test_a_fault_before_the_first_step_leaves_nobody_waiting(model, tiny, paths, monkeypatch, where):
    from mirage_vlm.adapters.answering import Answering

    def broken(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Answering, where, broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.generate(questions(paths)[0], "maze")
    (row,) = tiny.generate([prompt(questions(paths)[1])], max_new_tokens=30)
    assert model.generate(questions(paths)[1], "maze") == row.text


def test_statistics_are_a_file_for_each_process(adapter, tiny, paths, monkeypatch, tmp_path):
    monkeypatch.setattr(ModelArgs, "load", lambda args: tiny)
    monkeypatch.setenv("RANK", "1")
    kept = []
    monkeypatch.setattr(adapter.atexit, "register", kept.append)
    model = adapter.MirageVLM("tiny", max_new_tokens=30, statistics=str(tmp_path / "told.json"))
    infer(model, questions(paths), "maze", nproc=4)
    (save,) = kept
    save()
    told = json.loads((tmp_path / "told.rank1.json").read_text())
    assert told["summary"]["n"] == len(told["requests"]) == len(TEXTS)
    assert {found["task"] for found in told["requests"]} == {"maze"}


# -- starting VLMEvalKit ---------------------------------------------------------------------------------------------

RUN = """
import json, sys
import beside
from vlmeval.config import supported_VLM
import vlmeval.vlm
made = supported_VLM["mine"]
said = {"argv": sys.argv, "name": __name__, "keywords": made.keywords, "class": made.func is vlmeval.vlm.MirageVLM}
open(sys.argv[-1], "w").write(json.dumps(said))
"""


def test_run_py_is_started_with_the_model_registered(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "beside.py").write_text("")
    out = str(tmp_path / "out.json")
    run = str(tmp_path / "run.py")
    adapter.main(["--model-args", "pretrained=a,latents=3", "--name", "mine", run, "--data", "MMVP", "--model", out])
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["argv"] == [run, "--data", "MMVP", "--model", out]
    assert said["name"] == "__main__" and said["class"]
    assert (said["keywords"]["pretrained"], said["keywords"]["latents"]) == ("a", 3)
    assert adapter.ModelArgs.read(said["keywords"]) == ModelArgs("a", latents=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/run.py"], "error: nowhere/run.py: there is no such file; give the run.py of VLMEvalKit's"),
        (["--model-args", "latents=3", __file__], "error: the model argument 'pretrained' is missing"),
    ],
)
def test_wrong_calls_end_with_one_line(adapter, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        adapter.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_without_the_harness_one_line_says_so(monkeypatch):
    with pytest.raises(MirageError, match=r"^VLMEvalKit cannot be imported .*install it, or go to its folder$"):
        without(monkeypatch, "vlmeval", "mirage_vlm.adapters.vlmevalkit")


def test_video_is_not_among_the_kinds_it_takes(model):
    assert set(model.allowed_types) == {"text", "image"} and model.INTERLEAVE
