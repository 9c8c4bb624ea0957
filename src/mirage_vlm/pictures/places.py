"""Where a picture is: what a path or a URL means, and what can be opened there."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes

from mirage_vlm.errors import MirageError

NOT_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

_SCHEME = re.compile(r"(https?)://|(data):|(file):/", re.IGNORECASE)


def scheme_of(source: object) -> str:
    """`http`, `data` or `file` for such a URL, `path` for another string or path, and nothing for anything else."""
    if not isinstance(source, str | Path):
        return ""
    found = _SCHEME.match(str(source))
    if found is None:
        return "path"
    return "http" if found[1] else "data" if found[2] else "file"


def path_of(source: str | Path) -> Path:
    """The path that is meant by a path or a `file:` URL.

    Raises:
        MirageError: the URL names another machine or no absolute path, or there is a NUL character in it.
    """
    text = str(source)
    if scheme_of(source) != "file":
        found = Path(source)
    else:
        rest = text[len("file:") :]
        if rest.startswith("//"):
            host, slash, rest = rest[2:].partition("/")
            rest = slash + rest
            if host.lower() not in ("", "localhost"):
                hint = "file:///folder/picture.png is one of this machine"
                raise MirageError(f"{text}: a file URL of another machine, {host!r}; {hint}")
        if re.match(r"/[A-Za-z][:|]", rest):  # a drive of Windows
            rest = f"{rest[1]}:{rest[3:]}"
        found = Path(os.fsdecode(unquote_to_bytes(os.fsencode(rest))))
        if rest in ("", "/"):
            raise MirageError(f"{text}: a file URL without a path; file:///folder/picture.png has one")
    if "\0" in str(found):
        raise MirageError(f"{str(source)!r}: holds a NUL character, which no path has")
    return found


def check_file(path: Path) -> None:
    """Whether something at a path can be opened as a picture, without opening it.

    Raises:
        OSError: there is nothing, or no file.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise OSError(f"is {NOT_FILES.get(kind, 'no file')}, not a picture file")
