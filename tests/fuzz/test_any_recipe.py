"""Whatever stands in a recipe, it is a recipe or one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirage_vlm.errors import MirageError
from mirage_vlm.training.recipe import Recipe, load_recipe

FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SOUND = {
    "stage": "stage2",
    "output_dir": "runs/x",
    "model": {"scratch": {}},
    "data": [{"task": "vsp-planning", "levels": [3], "n": 4, "style": "cot"}],
}
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**30), max_value=10**30),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "~", "null", "1e999", "-1", "0", "nan", "none", "yes", "2020-01-01", "\0", "../..", "$HOME"]),
    st.dates(),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def keys_of(kind: type, before: str = "") -> list[str]:
    """Every key of the tree of dataclasses, with dots."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        found.append(before + name)
        inner = [arm for arm in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(arm)]
        found += [key for arm in inner for key in keys_of(arm, f"{before}{name}.")]
    return found


KEYS = keys_of(Recipe)


def tried(path: Path, overrides: tuple[str, ...] = ()) -> None:
    """Read it: a recipe, or one line that names the file or the override."""
    try:
        recipe = load_recipe(path, overrides)
    except MirageError as fault:
        assert "\n" not in str(fault), fault
        assert path.name in str(fault) or "override" in str(fault), fault
    else:
        assert isinstance(recipe, Recipe)
        recipe.to_dict()


def put(tree: dict, key: str, value: object) -> dict:
    """A copy of the tree with a value at a key; lists on the way are entered at their first item."""
    name, _, rest = key.partition(".")
    if not rest:
        return {**tree, name: value}
    inner = tree.get(name)
    if isinstance(inner, list):
        first = inner[0] if inner and isinstance(inner[0], dict) else {}
        return {**tree, name: [put(first, rest, value), *inner[1:]]}
    return {**tree, name: put(inner if isinstance(inner, dict) else {}, rest, value)}


def test_the_sound_one_is_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SOUND))
    assert load_recipe(path).stage == "stage2"


@FUZZ
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_at_any_key(tmp_path, key, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(put(SOUND, key, value), allow_unicode=True), encoding="utf-8", errors="replace")
    tried(path)


@FUZZ
@given(key=st.sampled_from(KEYS), value=st.text(max_size=20).filter(lambda text: "\n" not in text))
def test_any_override(tmp_path, key, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SOUND))
    tried(path, (f"{key}={value}",))


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    tried(path)


YAML_BITS = (
    "a: ",
    "&x ",
    "*x",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "\n",
    "  ",
    "!!python/object:os.system ",
    "<<: ",
    "? ",
    "stage",
)
PIECES = st.sampled_from(YAML_BITS) | st.text(max_size=4)


@FUZZ
@given(pieces=st.lists(PIECES, max_size=30))
def test_any_text_of_pieces_of_yaml(tmp_path, pieces):
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(pieces), encoding="utf-8", errors="replace")
    tried(path)


@pytest.mark.parametrize("stage", ["sft", "stage1", "stage2", "grpo"])
@FUZZ
@given(key=st.sampled_from([key for key in KEYS if key.startswith(("rl.", "train.", "loss."))]), value=LEAVES)
def test_any_number_in_any_stage(tmp_path, stage, key, value):
    path = tmp_path / "recipe.yaml"
    tree = put(SOUND, "stage", stage)
    path.write_text(yaml.safe_dump(put(tree, key, value), allow_unicode=True), encoding="utf-8", errors="replace")
    tried(path)
