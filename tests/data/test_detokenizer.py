import random

from tanuki_jax.data.detokenizer import MAX_CONTEXT, Detokenizer


class Bytes:
    """A vocabulary of bytes, and of pairs of them; it counts the ids that are decoded at once."""

    longest = 0

    def decode(self, ids):
        self.longest = max(self.longest, len(ids))
        return b"".join(i.to_bytes(1 + (i > 255), "big") for i in ids).decode("utf-8", "replace")

    def piece(self, token):
        return f"byte {token}"


def text_of(ids, tokenizer=None):
    detokenizer = Detokenizer(tokenizer or Bytes(), ())
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


def test_pieces_of_any_bytes_are_together_what_a_whole_text_gives_and_nothing_is_decoded_again_and_again():
    rng = random.Random(0)
    for few in ((0xE7, 0x8B, 0xB8), (0xF0, 0x9F, 0xA6, 0x9D, 0x61), (0xB8, 0xE7, 0x61), (0xBF,), (0xE78B, 0xB8E7, 0x8BB8)):
        ids, tokenizer = [rng.choice(few) for _ in range(300)], Bytes()
        pieces = text_of(ids, tokenizer)
        assert tokenizer.longest <= MAX_CONTEXT + 1
        assert "".join(pieces) == Bytes().decode(ids)


def test_a_character_comes_with_its_last_byte_and_is_never_half():
    assert text_of("狸🦝a".encode()) == ["", "", "狸", "", "", "", "🦝", "a", ""]
    assert text_of([0xE78B, 0xB8E7, 0x8BB8]) == ["", "狸", "狸", ""]
    assert text_of([0xBF, 0xBF, 0x61]) == ["", "\ufffd", "\ufffda", ""]
