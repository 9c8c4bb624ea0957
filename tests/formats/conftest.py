from pathlib import Path

import pytest
from samples import COLOURS, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in COLOURS:
        picture(name).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "broken.png").write_bytes((tmp_path / "images" / "map.png").read_bytes()[:45])
    (tmp_path / "images" / "notes.txt").write_text("no picture")
    return tmp_path
