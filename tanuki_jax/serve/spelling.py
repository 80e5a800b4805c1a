"""How single tokens are spelt in log-probabilities."""

from __future__ import annotations

import functools

from tanuki_jax.data.tokenizer import Tokenizer, byte_of

REPLACEMENT = "\ufffd"


class Spelling:
    """The spelling of tokens: their text, or OpenAI's `bytes:\\xe3` for those that are part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a")  # some decoders strip the space of a text's first token
        self._before = tokenizer.decode(self._anchor)
        self._find = functools.lru_cache(maxsize=1 << 16)(self._look_up)

    def text(self, token: int) -> str:
        """A token as text."""
        return self._find(token)[0]

    def utf8(self, token: int) -> list[int]:
        """The bytes that it adds to an answer."""
        return list(self._find(token)[1])

    def _look_up(self, token: int) -> tuple[str, bytes]:
        piece = self._tokenizer.piece(token)
        text = self._tokenizer.decode([*self._anchor, token])[len(self._before) :]
        byte = byte_of(piece)
        if REPLACEMENT not in text or REPLACEMENT in piece:
            return text, text.encode("utf-8", "replace")
        if byte is not None:
            data = bytes([byte])
        elif all(char in byte_alphabet() for char in piece):
            data = bytes(byte_alphabet()[char] for char in piece)
        else:
            return text, text.encode("utf-8")
        return "bytes:" + "".join(f"\\x{value:02x}" for value in data), data


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The characters in which byte-level vocabularies write bytes (GPT-2): printable ones as they are, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}
