"""What several commands share."""

from pathlib import Path

import pytest

from mirage_vlm.cli.data import Style
from mirage_vlm.cli.options import open_sources

MAPS = Path(__file__).parents[1] / "data" / "vsp" / "planning.jsonl"


@pytest.mark.parametrize("style", list(Style))
def test_plain_maps_take_the_style_that_is_asked_for(style):
    (source,) = open_sources([MAPS], [], (3,), 1, style, 0, 2)
    wanted = "cot" if style is Style.MIXED else style.value
    assert [example.meta["style"] for example in source.examples] == [wanted] * 2
    assert source.origin == {"path": str(MAPS), "style": style.value, "limit": 2}
