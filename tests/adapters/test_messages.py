"""Model arguments, messages, generation settings, stop strings."""

from __future__ import annotations

import io
import pickle

import PIL.Image
import pytest
import torch

from mirage_vlm.adapters.messages import (
    ModelArgs,
    conversation,
    first_stop,
    generation,
    ignored,
    picture,
    sampling_seed,
    shown,
)
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling import LatentVLM
from mirage_vlm.trajectory import Image, LatentSpan, Text, Trajectory, assistant_turn, user_turn

ARGS = ModelArgs("somewhere")


# -- model arguments -------------------------------------------------------------------------------------------------


def test_arguments_are_read_from_text():
    found = ModelArgs.parse(
        "pretrained=a/b,device=cpu,dtype=float32,max_rows=32,latents=4,compile=false,temperature=0.7,max_spans=none"
    )
    assert found == ModelArgs(
        "a/b", device="cpu", dtype="float32", max_rows=32, latents=4, temperature=0.7, max_spans=None
    )
    assert found.engine().max_rows == 32


def test_arguments_are_read_from_values_of_a_harness():
    found = ModelArgs.read({"pretrained": 7, "max_rows": 8.0, "evict_images": True, "temperature": 1, "latents": None})
    assert found == ModelArgs("7", max_rows=8, evict_images=True, temperature=1.0)
    assert isinstance(found.max_rows, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the model argument 'pretrained' is missing: give pretrained=PATH"),
        ("pretrained=a,latent=4", "unknown model argument 'latent'; did you mean 'latents'?"),
        ("pretrained=a,xyz=4", "unknown model argument 'xyz'; known: pretrained, device"),
        ("pretrained=a,cpu", "model arguments must be name=value with commas between them; got 'cpu'"),
        ("pretrained=a,max_rows=2.5", "model argument 'max_rows' must be int, not '2.5'"),
        ("pretrained=a,max_rows=none", "model argument 'max_rows' must be int, not 'none'"),
        ("pretrained=a,compile=maybe", "model argument 'compile' must be true or false, not 'maybe'"),
        ("pretrained=a,max_rows=0", "max_rows must be positive: 0"),
        ("pretrained=a,max_pixels=0", "max_pixels must be a whole number of at least 1, not 0"),
        ("pretrained=a,min_pixels=x", "model argument 'min_pixels' must be int, not 'x'"),
        ("pretrained=a,min_pixels=9,max_pixels=8", "min_pixels is 9, above max_pixels, which is 8"),
        ("pretrained=a,stop_rule=never", "unknown stop rule 'never'"),
    ],
)
def test_wrong_arguments_are_named(text, message):
    with pytest.raises(MirageError, match="^" + message.replace("?", r"\?")):
        ModelArgs.parse(text)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MirageError, match="nowhere"):
        ModelArgs(str(tmp_path / "nowhere"), device="cpu").load()


def test_limits_of_pixels_are_handed_on(monkeypatch):
    monkeypatch.setattr(LatentVLM, "from_pretrained", lambda path, **known: known)
    assert ModelArgs.parse("pretrained=a,device=cpu,max_pixels=50176").load()["max_pixels"] == 50176
    assert "max_pixels" not in ModelArgs("a", device="cpu").load(), "the checkpoint's"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "'cuda' is not there; CUDA devices found: 0"),
        ("cuda:3", "'cuda:3' is not there; CUDA devices found: 0"),
        ("nowhere", "torch knows no device 'nowhere'"),
    ],
)
def test_a_device_that_is_not_there_is_named(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(MirageError, match=f"^model argument 'device': {message}"):
        ModelArgs("bundled", device=device).load()


@pytest.mark.parametrize(("rank", "device"), [(None, "cuda:0"), ("3", "cuda:1")])
def test_each_process_takes_a_card(monkeypatch, rank, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(LatentVLM, "from_pretrained", lambda path, **known: known["device"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert ModelArgs("bundled", device="cuda").load() == torch.device(device)
    assert ModelArgs("bundled", device="cuda:1").load() == torch.device("cuda:1")


# -- generation settings ---------------------------------------------------------------------------------------------


def test_settings_of_a_request_go_before_arguments():
    args = ModelArgs("a", latents=4, max_spans=2, temperature=0.5, max_new_tokens=99, top_k=3, stop_rule="fixed")
    config, stops = generation(args, {})
    assert (config.latent_size, config.max_spans, config.temperature, config.max_new_tokens) == (4, 2, 0.5, 99)
    assert (config.top_k, config.stop_rule, config.return_latents, stops) == (3, "fixed", False, ())
    wanted = {"max_new_tokens": 7, "latent_size": "0", "temperature": 1, "top_p": 0.9, "until": ["A", "", "B"]}
    config, stops = generation(args, wanted)
    assert (config.latent_size, config.max_new_tokens, config.temperature, config.top_p) == (0, 7, 1.0, 0.9)
    assert (config.max_spans, stops) == (2, ("A", "B"))


@pytest.mark.parametrize(
    ("wanted", "temperature"),
    [
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.3}, 0.3),
        ({"temperature": 0.3}, 0.3),
        ({"temperature": None, "do_sample": None}, 0.0),
        ({}, 0.0),
    ],
)
def test_whether_tokens_are_drawn(wanted, temperature):
    assert generation(ARGS, wanted)[0].temperature == temperature


@pytest.mark.parametrize(
    ("wanted", "top_p", "top_k"),
    [
        ({"do_sample": False, "top_p": 0, "top_k": -1}, 0.8, 5),
        ({"temperature": 0, "top_p": 0.5, "top_k": 2}, 0.8, 5),
        ({"temperature": 1, "top_k": -1}, 0.8, 0),
        ({"temperature": 1, "top_p": 0.5, "top_k": 2}, 0.5, 2),
    ],
)
def test_what_tasks_write_beside_a_temperature_of_0_does_not_count(wanted, top_p, top_k):
    config, _ = generation(ModelArgs("a", top_p=0.8, top_k=5), wanted)
    assert (config.top_p, config.top_k) == (top_p, top_k)


def test_an_empty_line_ends_an_answer_only_where_the_user_says_so():
    wanted = {"until": ["\n\n", "END"]}
    assert generation(ARGS, wanted)[1] == ("END",)
    assert generation(ModelArgs("a", blank_line_stops=True), wanted)[1] == ("\n\n", "END")
    assert generation(ARGS, {"until": "END"})[1] == ("END",)


def test_seeds_depend_on_the_name_alone():
    seeds = [generation(ARGS, {}, "task", i)[0].seed for i in range(100)]
    assert len(set(seeds)) == 100
    assert seeds[3] == sampling_seed(0, "task", 3) == generation(ARGS, {"seed": 0}, "task", 3)[0].seed
    assert generation(ARGS, {"seed": 5}, "task", 3)[0].seed == (seeds[3] + 5) % 2**31
    assert generation(ModelArgs("a", seed=5), {}, "task", 3)[0].seed == (seeds[3] + 5) % 2**31


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_beams": 4}, "num_beams must be 1, not 4"),
        ({"max_new_tokens": "many"}, "max_new_tokens must be int, not 'many'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive: 0"),
        ({"temperature": 1, "top_p": 0}, r"top_p in \(0, 1\]"),
        ({"do_sample": "perhaps"}, "do_sample must be true or false, not 'perhaps'"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(wanted, message):
    with pytest.raises(MirageError, match=message):
        generation(ARGS, wanted)


def test_settings_without_a_meaning_are_told():
    assert ignored({"image_aspect_ratio": "pad", "until": ["x"], "num_beams": 1, "x": None, "seed": 1}) == (
        "image_aspect_ratio",
    )


# -- messages --------------------------------------------------------------------------------------------------------


def test_turns_become_messages_in_order(tmp_path):
    first, second = PIL.Image.new("RGB", (4, 4), "red"), tmp_path / "b.png"
    PIL.Image.new("RGB", (6, 4), "blue").save(second)
    messages = conversation(
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "image", "url": first}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "value": "And"},
                    {"type": "image", "value": str(second)},
                    {"type": "text", "value": "?"},
                ],
            },
        ],
        system="not this one",
    )
    assert [m.role for m in messages] == ["system", "user", "assistant", "user"]
    kinds = [[type(s) for s in m.segments] for m in messages]
    assert kinds == [[Text], [Image, Text], [Text], [Text, Image, Text]]
    assert messages[0].segments == (Text("Be short."),)
    assert [s.size() for m in messages for s in m.segments if isinstance(s, Image)] == [(4, 4), (6, 4)]


def test_a_system_prompt_is_put_before_a_conversation_without_one():
    messages = conversation([{"role": "user", "content": "Hello"}], system="Think.")
    assert messages == (conversation([{"role": "system", "content": "Think."}, {"role": "user", "content": "Hello"}]))
    assert conversation([{"role": "user", "content": "Hello"}]) == (user_turn("Hello"),)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "only text and pictures .* 'video'"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "must end with the user's turn"),
        ([], "must end with the user's turn"),
    ],
)
def test_conversations_that_cannot_be_read_are_refused(turns, message):
    with pytest.raises(MirageError, match=message):
        conversation(turns)


def test_pictures_of_all_kinds(tmp_path):
    drawn = PIL.Image.new("RGB", (5, 3), "green")
    path = tmp_path / "a.png"
    drawn.save(path)
    raw = path.read_bytes()
    kinds = [drawn, path, str(path), f"file://{path}", raw, {"bytes": raw, "path": None}, {"url": str(path)}]
    for source in kinds:
        assert picture(source).load().tobytes() == drawn.tobytes()
        assert picture(source).load().tobytes() == drawn.tobytes(), "twice"
        assert pickle.loads(pickle.dumps(picture(source))).load().tobytes() == drawn.tobytes(), "in another process"
    assert picture(raw).load().size == PIL.Image.open(io.BytesIO(raw)).size
    for source in (3, {"bytes": None}):
        with pytest.raises(MirageError, match="a picture must be a PIL image, bytes, a path or a URL, not"):
            picture(source)


# -- text ------------------------------------------------------------------------------------------------------------


def test_answers_end_at_the_first_stop_string():
    row = Trajectory((user_turn("?"), assistant_turn("ab", LatentSpan(k=2), "cd", LatentSpan(k=2), "ef")))
    assert shown(row) == ("abcdef", False)
    assert shown(row, mark="<L>") == ("ab<L>cd<L>ef", False)
    assert shown(row, ["e", "bc"], "<L>") == ("a", True), "a stop string may have a span inside it"
    assert shown(row, ["cd"], "<L>") == ("ab<L>", True), "the span came before what ended the answer"
    assert shown(row, ["x", "f"]) == ("abcde", True)
    assert shown(row, ["x"]) == ("abcdef", False)
    assert first_stop("abc", []) is None
