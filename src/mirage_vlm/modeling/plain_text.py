"""Text is text: what a user or a data file wrote never becomes a control token.

A chat template and a tokenizer see one string, in which `<|im_end|>` that a user wrote looks like the end of a turn. So
each control string in somebody's text is replaced, before the template is applied, by a private character that stands
in none of the texts; the finished string is cut there, and what was written is tokenised as the letters it is made of.
Text without control strings goes through template and tokenizer untouched.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mirage_vlm.errors import MirageError
from mirage_vlm.formats.faults import text_fault
from mirage_vlm.modeling.config import LATENT_TOKENS

TURNS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
PICTURES = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

_PRIVATE = range(0xF0000, 0xFFFFE)  # a plane of characters that Unicode leaves to whoever wants them


class PlainText:
    """Tokenises strings in which somebody's text stands beside control tokens.

    Args:
        tokenizer: of the checkpoint; its state is never changed.
        ids: control tokens beside those that every checkpoint of the family has and the tokenizer's own begin, end and
            padding: those that the checkpoint's configs name for pictures and for the end of a response.
    """

    def __init__(self, tokenizer: Any, ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
        named = {*TURNS, *PICTURES, *LATENT_TOKENS, tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token}
        wanted = set(ids)
        # whatever else a stop id names is an ordinary word, which nobody can be forbidden to write
        self.controls = {token: i for token, i in added.items() if token and (token in named or i in wanted)}
        longest = sorted(self.controls, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest))) if longest else None
        self._spelled: dict[str, list[int]] = {}

    def hide(self, runs: Sequence[Sequence[str]]) -> Hidden:
        """Texts without control strings, and what brings these back.

        Args:
            runs: texts; those that follow one another with nothing between them are in one list, since a control string
                may not come about by joining them either.
        """
        for text in (text for texts in runs for text in texts):
            if message := text_fault(text):
                raise MirageError(f"a text {message}")
        if self._pattern is None or not any(self._pattern.search("".join(texts)) for texts in runs):
            return Hidden([text for texts in runs for text in texts])
        used = {character for texts in runs for text in texts for character in text if ord(character) in _PRIVATE}
        hidden = Hidden([], free=(chr(code) for code in _PRIVATE if chr(code) not in used))
        for texts in runs:
            self._hide(texts, hidden)
        return hidden

    def _hide(self, texts: Sequence[str], hidden: Hidden) -> None:
        """Add the texts of a run, with a private character for each part of a control string that one of them holds."""
        assert self._pattern is not None
        places = [match.span() for match in self._pattern.finditer("".join(texts))]
        start = 0
        for text in texts:
            end, at, pieces = start + len(text), start, []
            for first, last in places:
                left, right = max(first, start), min(last, end)
                if left < right:
                    pieces += [text[at - start : left - start], hidden.name(text[left - start : right - start])]
                    at = right
            hidden.texts.append("".join([*pieces, text[at - start :]]))
            start = end

    def ids(self, text: str, hidden: Hidden) -> list[int]:
        """Token ids of a string; what is hidden in it becomes the tokens of its letters."""
        if not hidden.written:
            return self._tokens(text)
        cut = re.split(f"([{''.join(map(re.escape, hidden.written))}])", text)
        return [
            token
            for piece in filter(None, cut)
            for token in (self._spell(hidden.written[piece]) if piece in hidden.written else self._tokens(piece))
        ]

    def words(self, text: str) -> list[int]:
        """Token ids of a text that stands alone."""
        hidden = self.hide([[text]])
        return self.ids(hidden.texts[0], hidden)

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _spell(self, part: str) -> list[int]:
        """Token ids of a control string, or a part of one, as ordinary text."""
        if part not in self._spelled:
            self._spelled[part] = self._spell_anew(part)
        return self._spelled[part]

    def _spell_anew(self, part: str) -> list[int]:
        control = set(self.controls.values())
        for found in (self._split(part), [i for letter in part for i in self._tokens(letter)]):
            if not control & set(found):
                return found
        # a tokenizer that has a single letter as its control token
        raise MirageError(f"the tokenizer cannot write {part!r} as text: it knows it as a control token only")

    def _split(self, part: str) -> list[int]:
        """Token ids with special tokens taken for text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            found: list[int] = self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            return found
        own = copy.deepcopy(backend)  # the setting is one of the whole tokenizer, which other threads use
        own.encode_special_tokens = True
        return list(own.encode(part, add_special_tokens=False).ids)


@dataclass
class Hidden:
    """Texts in which control strings are hidden.

    Attributes:
        texts: in order.
        written: private character → the control string, or the part of one, that it stands for.
        free: private characters that stand in none of the texts.
    """

    texts: list[str]
    written: dict[str, str] = field(default_factory=dict)
    free: Iterator[str] = field(default_factory=lambda: iter(()))

    def name(self, part: str) -> str:
        """The character that stands for a part."""
        for character, known in self.written.items():
            if known == part:
                return character
        character = next(self.free)
        self.written[character] = part
        return character
