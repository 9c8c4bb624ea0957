"""Hashes of checkpoints and data: they are those of the bytes, and change with what they stand for."""

import hashlib

from mirage_vlm.evaluation.hashes import data_sha256, model_sha256
from mirage_vlm.modeling.bundled import resolve


def sha(content):
    return hashlib.sha256(content).hexdigest()


def write(folder, **contents):
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def test_a_folder(tmp_path):
    folder = write(
        tmp_path / "m",
        config__json=b"{}",
        model__safetensors=b"w",
        latent_feedback__safetensors=b"f",
        training_args__bin=b"not read",
        metrics__jsonl=b"neither",
    )
    wanted = {"config.json": sha(b"{}"), "latent_feedback.safetensors": sha(b"f"), "model.safetensors": sha(b"w")}
    assert model_sha256(str(folder)) == wanted
    assert model_sha256("bundled") == model_sha256(resolve("bundled"))
    (folder / "model.safetensors").write_bytes(b"v")
    assert model_sha256(str(folder)) == {**wanted, "model.safetensors": sha(b"v")}
    assert model_sha256(str(write(tmp_path / "empty"))) is None


def test_a_name_of_the_hub_is_looked_for_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_sha256("someone/model") is None
    assert model_sha256("no such/folder/at all") is None
    repository = tmp_path / "models--someone--model"
    write(repository / "refs", main=b"abc")
    write(repository / "snapshots" / "abc", config__json=b"{}", model__safetensors=b"w")
    assert model_sha256("someone/model") == {"config.json": sha(b"{}"), "model.safetensors": sha(b"w")}


def test_data(tmp_path):
    folder = write(tmp_path / "d", a__arrow=b"1", state__json=b"2")
    assert data_sha256(folder / "a.arrow") == sha(b"1")
    before = data_sha256(folder)
    assert before == data_sha256(folder) == sha(f"a.arrow {sha(b'1')}\nstate.json {sha(b'2')}\n".encode())
    (folder / "a.arrow").rename(folder / "b.arrow")
    assert data_sha256(folder) != before
