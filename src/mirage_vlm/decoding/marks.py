"""Where a span is to be opened: at once, or as soon as a response has said a certain text.

The text is followed byte by byte, by an automaton that knows for each token how far its bytes bring the match. So it is
found however the model cuts it into tokens, on the device, without asking the host.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mirage_vlm.errors import MirageError

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM

DONE, DUE = 0, 1  # no span is owed (any more); one is to be opened now
MOST = 1 << 15  # states of a table
KEPT = 16  # texts that an idle engine remembers


class Marks:
    """The automata of an engine, one below the other in a table of states and tokens.

    `table` [S, V] is the state after a token; rows `DONE` and `DUE` lead to `DONE`. A text's states begin where `start`
    says, and the s-th of them is for s bytes of it that were said without a break.

    Args:
        vlm: whose tokens.
    """

    def __init__(self, vlm: LatentVLM):
        self.vlm = vlm
        self.version = 0  # of the table's memory
        self.texts: dict[str, int] = {}
        self.table = torch.zeros(0, 0)

    def start(self, text: str | None) -> int:
        """The state of a response that is to open a span after a text; None = at once.

        Raises:
            MirageError: the text of the model's tokens is not known byte by byte.
        """
        if not len(self.table):
            self._put(torch.zeros(2, self.vlm.model.lm_head.weight.shape[0], dtype=torch.int16))
        if text is None:
            return DUE
        if text not in self.texts:
            first = len(self.table)
            control = next((token for token in self.vlm.tokenizer.all_special_tokens if token in text), None)
            if control is not None:
                raise MirageError(f"span_after: {control} is a control token, which is never part of a response's text")
            if first + len(text.encode()) > MOST:
                raise MirageError("span_after: there are too many different texts for one engine; make another")
            spelt = spelling(self.vlm.tokenizer, self.table.shape[1])
            states = automaton(text.encode(), spelt)
            after = np.where(states == len(text.encode()), DUE, states + first)
            self._put(torch.cat([self.table.cpu(), torch.from_numpy(after.astype(np.int16))]))
            self.texts[text] = first
        return self.texts[text]

    def forget(self) -> None:
        """Let go of automata, if there are many; only when no response is on its way."""
        if len(self.texts) > KEPT:
            self._put(self.table[:2].clone())
            self.texts.clear()

    def after(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[B] states and the tokens that were written → [B] states."""
        return self.table[states, tokens].long()

    def _put(self, table: torch.Tensor) -> None:
        self.table, self.version = table.to(self.vlm.device), self.version + 1


def automaton(text: bytes, tokens: tuple[bytes, ...]) -> np.ndarray:
    """[m, V] how many bytes of a text of m are said, in order and to the end, after each token; m = it was said.

    Row s is for s bytes before the token (Knuth, Morris and Pratt 1977).
    """
    m = len(text)
    step = np.zeros((m + 1, 256), dtype=np.int16)
    step[m] = m  # found, and it stays so
    fallback = 0
    for s, byte in enumerate(text):
        step[s] = step[fallback]
        step[s, byte] = s + 1
        fallback = int(step[fallback, byte]) if s else 0
    order = np.argsort([-len(token) for token in tokens], kind="stable")  # the longest first
    lengths = np.array([len(tokens[i]) for i in order])
    states = np.repeat(np.arange(m, dtype=np.int16)[:, None], len(tokens), axis=1)
    for place in range(int(lengths[0]) if len(tokens) else 0):
        count = int((lengths > place).sum())
        bytes_here = np.array([tokens[i][place] for i in order[:count]])
        states[:, :count] = step[states[:, :count], bytes_here]
    found = np.empty_like(states)
    found[:, order] = states
    return found


def spelling(tokenizer: Any, size: int) -> tuple[bytes, ...]:
    """The bytes that each of a model's tokens adds to a response's text; special tokens add none.

    Raises:
        MirageError: the tokenizer does not spell text byte by byte.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if type(decoder).__name__ != "ByteLevel":
        raise MirageError("span_after needs a tokenizer of bytes, as Qwen's are; leave it out to open a span at once")
    special = set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    special |= {i for i, token in added.items() if token.special}
    found = []
    for i, name in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))):
        if i in special or name is None:
            found.append(b"")
        elif i in added:
            found.append(added[i].content.encode())
        else:
            found.append(bytes(_bytes()[character] for character in name))
    return tuple(found + [b""] * (size - len(found)))


@cache
def _bytes() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
