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
    become U+FFFD each, and spoil nothing else; in a vocabulary of bytes only the last U+FFFD may still become a character.

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
        if text == self._decoded:  # the id has no text, as that of a special token
            self._note(text)
            return ""
        new = self._spelling.decode(b"", final=True) + text.removesuffix("\ufffd")[len(self._decoded) :]
        self._spelling.reset()
        self._note(text, is_open=True)
        return new

    def finish(self) -> str:
        """What is left when no more ids come: characters that were not completed."""
        return self._spelling.decode(b"", final=True) + self._tokenizer.decode(self._ids)[len(self._decoded) :]

    def _note(self, text: str, is_open: bool = False) -> None:
        """Notes the text of the ids so far, and drops old ones.  is_open: a U+FFFD at the end is yet to be given out."""
        if len(self._ids) > MAX_CONTEXT:
            self._ids = self._ids[-CONTEXT:]
            text = self._tokenizer.decode(self._ids)
        self._decoded = text.removesuffix("\ufffd") if is_open else text
