"""A conversation on the terminal."""

from __future__ import annotations

import codecs
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tanuki_jax import config, files, model
from tanuki_jax.data.chat import encode_chat
from tanuki_jax.data.tokenizer import Tokenizer, byte_of
from tanuki_jax.errors import UserError

HINT = "日本語でも英語でもどうぞ。 /new begins a new conversation, /quit (or end of input) leaves."
OFFER = "このモデルが正しく答えた質問: Questions that this model has answered rightly:"
CONTEXT = 16  # ids of a prompt that are decoded with what follows
EXIT_HINT = 1.0  # seconds within which a second Ctrl-C leaves


def chat(
    cfg: config.ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    sampling: model.Sampling,
    seed: int,
    questions: Sequence[str] = (),
    longest: int = 0,
) -> None:
    """Reads questions from stdin and answers on stdout as the answers come, every turn with all turns before it.

    Stdout has nothing but answers where it or stdin is no terminal.  Ctrl-C ends an answer; twice, or where a question is
    awaited, it leaves.

    Args:
      questions: what the hint offers to ask.
      longest: tokens that a conversation may have; 0 = any number.
    """
    _print_hint(HINT)
    for offer in (OFFER, *questions) if questions else ():
        _print_hint(offer)
    messages: list[dict[str, str]] = []
    stopped = -EXIT_HINT
    while (line := _read_question()) is not None:
        if line.strip() == "/new":
            messages = []
        if not line.strip() or line.strip() == "/new":
            continue
        asked = [*messages, {"role": "user", "content": line}]
        prompt, _ = encode_chat(tokenizer, asked, add_generation_prompt=True)
        room = longest - len(prompt) if longest else sampling.max_new_tokens
        if room < 1:
            _print_hint(f"no room for an answer: {len(prompt):,} of {longest:,} tokens that this model knows; /new begins anew")
            continue
        limited = dataclasses.replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))
        ids = model.stream(cfg, params, prompt, limited, (seed + len(asked)) % 2**32)
        answer, end = _say(tokenizer, prompt, ids, limited.max_new_tokens)
        if end == "interrupted":
            if time.monotonic() - stopped < EXIT_HINT:
                return
            stopped = time.monotonic()
        elif end == "cut":
            why = (
                f"--max_new_tokens={sampling.max_new_tokens}" if limited == sampling else f"this model knows {longest:,} tokens"
            )
            _print_hint(f"(the answer is cut here: {why})")
        if answer:
            messages = [*asked, {"role": "assistant", "content": answer}]


def _print_hint(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _read_question() -> str | None:
    """The next line without its end; None where the conversation is over."""
    try:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"chat: what is typed is not {error.encoding.upper()}: {error.reason}") from error
    except KeyboardInterrupt:
        _print_hint("")
        return None
    return None if not line or line.strip() == "/quit" else line.rstrip("\n")


def _say(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterator[int], limit: int) -> tuple[str, str]:
    """Prints an answer as it comes; returns it, and how it ended: "interrupted", "cut" (after `limit` tokens) or ""."""
    answer, seen, end = "", [0] * 0, ""
    try:
        for piece in text_pieces(tokenizer, prompt, _stored_questions(ids, seen)):
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        end = "interrupted"
    print(flush=True)
    return answer, end or ("cut" if len(seen) == limit else "")


def _stored_questions(ids: Iterator[int], seen: list[int]) -> Iterator[int]:
    for token in ids:
        seen.append(token)
        yield token


def text_pieces(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """What each id adds to the text of those before it; what is a part of a character waits until the character is whole.

    Ids are decoded together with the end of the prompt, since the first of a text may lose its space.  Bytes that no
    character begins with become U+FFFD each, and spoil nothing else.
    """
    everything = list(prompt[-CONTEXT:])
    told = tokenizer.decode(everything)
    spelling = codecs.getincrementaldecoder("utf-8")("replace")  # characters that are spelt as pieces <0xE7>, <0x8B>, <0xB8>
    for token in ids:
        everything.append(token)
        text = tokenizer.decode(everything)
        piece = tokenizer.piece(token)
        byte = byte_of(piece)
        if byte is not None and tokenizer.decode([token]) != piece:
            new = spelling.decode(bytes([byte]))
        elif text.endswith("\ufffd"):  # a part of a character, in a vocabulary of bytes
            continue
        else:
            new = spelling.decode(b"", final=True) + text[len(told) :]
            spelling.reset()
        told = text
        if new:
            yield new
    if rest := spelling.decode(b"", final=True) + tokenizer.decode(everything)[len(told) :]:
        yield rest


def stored_suggestions(stage_directory: Path) -> list[str]:
    """The questions that a finished stage has shown to answer rightly, one after the other; none of any other checkpoint."""
    try:
        found = files.read_json(stage_directory / "done.json")["questions"]
    except (OSError, KeyError, TypeError, UserError):
        return []  # what somebody else has put there is no reason not to talk
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []
