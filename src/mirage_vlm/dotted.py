"""What users name as `module:attribute` in recipes and on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from mirage_vlm.errors import MirageError


def load_named(name: str, what: str) -> Any:
    """The attribute of a module, which may lie in the working directory.

    Args:
        name: `package.module:attribute`.
        what: it is, for messages.

    Raises:
        MirageError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:  # a console script's own folder is there, not the user's
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as fault:
        raise MirageError(f"the {what} {name!r} cannot be had: {fault}") from fault
