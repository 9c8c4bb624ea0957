"""Where a model is: the small ones that come with the package, a folder, or a name on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mirage_vlm.errors import MirageError

BUNDLED = "bundled"
BUNDLED_BASE = "bundled-base"
BUNDLED_TASKS = "bundled-tasks"

FOLDERS = {BUNDLED: "vsp-small", BUNDLED_BASE: "vsp-small-base", BUNDLED_TASKS: "tasks-small"}
ABOUT = {
    BUNDLED: "thinks about maps: vsp-planning, vsp-reasoning",
    BUNDLED_BASE: "sees maps; its spans mean nothing yet: recipes start from it",
    BUNDLED_TASKS: "jigsaw, sat and geometry in words; has not learnt to use latents",
}


def resolve(model: str) -> str:
    """A model name as a path: the package's own models by name, `~` as the home folder; anything else is left alone."""
    if model in FOLDERS:
        return str(Path(__file__).parent.parent / "assets" / FOLDERS[model])
    return os.path.expanduser(model)


def located(model: str | Path) -> str:
    """A folder that holds a checkpoint, or a name that the hub may know; the network is not asked.

    Raises:
        MirageError: it is neither: no such folder, not a checkpoint, or no name that a model on the hub can have.
    """
    name = str(model)
    folder = Path(resolve(name))
    if name and folder.exists():
        if not (folder / "config.json").is_file():
            what = "there is no config.json in it" if folder.is_dir() else "it is a file; give the folder it is in"
            raise MirageError(f"{name}: not a checkpoint ({what})")
        return str(folder)
    if hub_name(name):
        return name
    hint = f"; the package's own are {', '.join(FOLDERS)}" if name.startswith(BUNDLED) else ""
    raise MirageError(f"{name or repr(name)}: no such folder, and no name of a model on the hub (owner/name){hint}")


def hub_name(name: str) -> bool:
    """Whether it may be a name on the hub: `owner/name`, where no folder is called as the owner is."""
    word = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
    return bool(re.fullmatch(f"{word}/{word}", name, re.ASCII)) and not Path(name).parent.exists()
