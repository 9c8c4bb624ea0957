"""Where photos come from: scenes that are drawn here, photos that other packages bring along, a folder of one's own.

A photo goes by its name, and its name decides the split that it belongs to.
"""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import PIL.Image

from mirage_vlm.errors import MirageError
from mirage_vlm.tasks.base import Split, split_of
from mirage_vlm.tasks.scenes import draw_scene
from mirage_vlm.trajectory import Image

FOLDER = "MIRAGE_PHOTOS"  # the environment variable that names a folder of photos
ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LEAST, ENOUGH = 64, 512  # pixels of a photo's shorter side: needed; more than twice that is of no use

# What lies in the wheels themselves, so that nothing is fetched. Left out: drawings and charts, one of 102 pixels, and
# motorcycle_right.png, which is motorcycle_left.png from a hand's breadth beside it.
WHEELS = {"skimage": ("scikit-image", "data"), "sklearn": ("scikit-learn", "datasets/images")}
BUILTIN = tuple(
    f"{package}/{name}"
    for package, names in (
        ("skimage", "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png"),
        ("skimage", "grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png"),
        ("skimage", "retina.jpg rocket.jpg text.png"),
        ("sklearn", "china.jpg flower.jpg"),
    )
    for name in names.split()
)


class Photos(ABC):
    """A source of photos. It must be hashable and picklable, and give the same photo for the same name."""

    label: ClassVar[str]  # what `meta` calls it

    @abstractmethod
    def pick(self, rng: random.Random) -> str:
        """The name of a photo, by chance.

        Raises:
            MirageError: there are no photos to be had.
        """

    @abstractmethod
    def open(self, name: str) -> PIL.Image.Image:
        """The photo of that name, in RGB; it is kept, so it must not be painted on.

        Raises:
            MirageError: it cannot be found or read, or is too small.
        """

    def key(self, name: str) -> str:
        """What decides the photo's split."""
        return f"{self.label}/{name}"

    def pick_of(self, split: Split, rng: random.Random, but: str | None = None) -> str:
        """The name of a photo of one of the splits, which is not `but`."""
        while True:
            found = self.pick(rng)
            if found != but and split_of(self.key(found)) == split:
                return found

    def other(self, rng: random.Random, name: str) -> str:
        """The name of another photo of the same split."""
        return self.pick_of(split_of(self.key(name)), rng, but=name)


@dataclass(frozen=True)
class Scenes(Photos):
    """Scenes that are drawn from their number, 480 by 320 pixels; there are a thousand million."""

    label: ClassVar[str] = "scenes"

    def pick(self, rng: random.Random) -> str:
        return str(rng.randrange(10**9))

    def open(self, name: str) -> PIL.Image.Image:
        return draw_scene(name)


@dataclass(frozen=True)
class Folder(Photos):
    """The photos of a folder and of the folders in it; None is the one that MIRAGE_PHOTOS names."""

    label: ClassVar[str] = "folder"
    path: str | Path | None = None

    def pick(self, rng: random.Random) -> str:
        return rng.choice(_listed(self.root))

    def open(self, name: str) -> PIL.Image.Image:
        return _read(self.root / name)

    @property
    def root(self) -> Path:
        """The folder.

        Raises:
            MirageError: none is named, or it is not there.
        """
        path = self.path or os.environ.get(FOLDER)
        if not path:
            raise MirageError(f"no folder of photos is named; set {FOLDER} to one")
        root = Path(path).expanduser().absolute()
        if not root.is_dir():
            raise MirageError(f"{path} is not a folder of photos{'' if self.path else f' ({FOLDER} names it)'}")
        return root


@dataclass(frozen=True)
class BuiltIn(Photos):
    """The twenty photos that lie in the wheels of scikit-image and scikit-learn; nothing is imported or fetched."""

    label: ClassVar[str] = "builtin"  # by which chelsea, moon, rocket and china are for testing

    def pick(self, rng: random.Random) -> str:
        return rng.choice(BUILTIN)

    def open(self, name: str) -> PIL.Image.Image:
        if name not in BUILTIN:
            raise MirageError(f"there is no built-in photo {name!r}; they are {', '.join(BUILTIN)}")
        package, _, file = name.partition("/")
        wheel, folder = WHEELS[package]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise MirageError(f"the photo {file} lies in {wheel}, which is not installed: pip install {wheel}")
        return _read(Path(spec.submodule_search_locations[0]) / folder / file)


@lru_cache(maxsize=8)
def _listed(root: Path) -> tuple[str, ...]:
    """The names of a folder's photos: paths in it with forward slashes, sorted."""
    found = (path for path in root.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    names = tuple(sorted(path.relative_to(root).as_posix() for path in found))
    if not names:
        raise MirageError(f"{root} holds no photos ({', '.join(ENDINGS)})")
    for split in ("train", "test"):
        has = sum(split_of(Folder(root).key(name)) == split for name in names)
        if has < 2:
            raise MirageError(
                f"{root}: {has} of its {len(names)} photos would be for {split}, by their names, and 2 are the least; "
                "add photos (50 are nearly always enough), or rename some"
            )
    return names


@lru_cache(maxsize=64)
def _read(path: Path) -> PIL.Image.Image:
    """The photo of a file, upright, halved (or thirded …) as long as enough is left."""
    photo = Image(path).load()
    if min(photo.size) < LEAST:
        raise MirageError(f"{path}: a photo must have at least {LEAST} pixels a side, not {min(photo.size)}")
    return photo.reduce(max(1, min(photo.size) // ENOUGH))
