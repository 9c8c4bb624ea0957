"""Latent marks that were written out in texts: read as text, though whoever wrote them may have wanted a span."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mirage_vlm.formats.chat_faults import LATENT_TOKENS
from mirage_vlm.trajectory import Text, Trajectory


def latent_marks(trajectory: Trajectory) -> Iterator[tuple[str, str]]:
    """The field and the first latent mark of each turn whose text holds one."""
    for index, message in enumerate(trajectory.messages):
        texts = "\n".join(segment.text for segment in message.segments if isinstance(segment, Text))
        if found := next((token for token in LATENT_TOKENS if token in texts), None):
            yield f"messages[{index}].content", found


def marks_note(found: Sequence[tuple[str, str]]) -> str:
    """One line for all latent marks of a file."""
    (field, token), count = found[0], len(found)
    texts = "1 text holds" if count == 1 else f"{count:,} texts hold"
    return f"note: {field}: {texts} {token}, which is read as text; write a latent span as a part of its own"
