"""Text from tokens as they come, whole characters at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tanuki_jax.data.tokenizer import Tokenizer, byte_of

CONTEXT = 16  # ids that are decoded together with a new one
MAX_CONTEXT = 64  # ids after which older ones are dropped, so that the cost of a token does not grow with its text


class Detokenizer:
    """The text that each id adds to that of the ids before it; part of a character waits until the character is whole.

    Ids are decoded together with some before them, since the first of a text may lose its space.  Bytes that begin no character
    become U+FFFD each, and spoil nothing else.

    prompt: the ids before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT:])
        self._decoded = tokenizer.decode(self._ids)
        self._spelling = codecs.getincrementaldecoder("utf-8")("replace")  # characters that are spelt as <0xE7>, <0x8B>, <0xB8>

    def add(self, token: int) -> str:
        """The text that the next id completes; it may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        piece = self._tokenizer.piece(token)
        byte = byte_of(piece)
        if byte is not None and self._tokenizer.decode([token]) != piece:
            self._note(text)
            return self._spelling.decode(bytes([byte]))
        if text.endswith("\ufffd"):  # a part of a character, in a vocabulary of bytes
            return ""
        new = self._spelling.decode(b"", final=True) + text[len(self._decoded) :]
        self._spelling.reset()
        self._note(text)
        return new

    def finish(self) -> str:
        """What is left when no more ids come: characters that were not completed."""
        return self._spelling.decode(b"", final=True) + self._tokenizer.decode(self._ids)[len(self._decoded) :]

    def _note(self, text: str) -> None:
        """Notes the text of the ids so far, and drops old ones."""
        self._decoded = text
        if len(self._ids) > MAX_CONTEXT:
            self._ids = self._ids[-CONTEXT:]
            self._decoded = self._tokenizer.decode(self._ids)
