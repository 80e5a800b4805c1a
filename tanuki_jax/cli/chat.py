"""A conversation on the terminal."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tanuki_jax import config, files, model
from tanuki_jax.data.chat import encode_chat
from tanuki_jax.data.detokenizer import Detokenizer
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.model.transformer import Params

HINT = "日本語でも英語でもどうぞ。 /new begins a new conversation, /quit (or end of input) leaves."
OFFER = "このモデルが正しく答えた質問: Questions that this model has answered rightly:"
EXIT_SECONDS = 1.0  # within which a second Ctrl-C leaves


class ChatModel(NamedTuple):
    """A model to talk to."""

    cfg: config.ModelConfig
    params: Params | model.slots.Weights
    tokenizer: Tokenizer
    max_seq_len: int = 0  # tokens that a conversation may have; 0 = any number


def chat(talker: ChatModel, sampling: model.Sampling, seed: int, questions: Sequence[str] = ()) -> None:
    """Reads questions from stdin and prints answers on stdout token by token, each turn with all turns before it.

    Where stdin or stdout is no terminal, stdout has nothing but answers.  Ctrl-C ends an answer; twice, or while a question is
    awaited, it leaves.

    Args:
      questions: offered by the hint.
    """
    _print_hint(HINT)
    for offer in (OFFER, *questions) if questions else ():
        _print_hint(offer)
    max_seq_len = talker.max_seq_len
    messages: list[dict[str, str]] = []
    interrupted_at = -EXIT_SECONDS
    for line in iter(_read_question, None):
        if line.strip() == "/new":
            messages = []
        if not line.strip() or line.strip() == "/new":
            continue
        turns = [*messages, {"role": "user", "content": line}]
        prompt, _ = encode_chat(talker.tokenizer, turns, add_generation_prompt=True)
        left = max_seq_len - len(prompt) if max_seq_len else sampling.max_new_tokens
        if left < 1:
            _print_hint(
                f"no room for an answer: {len(prompt):,} of {max_seq_len:,} tokens that this model knows; /new begins anew"
            )
            continue
        limited = dataclasses.replace(sampling, max_new_tokens=min(left, sampling.max_new_tokens))
        ids = model.stream(talker.cfg, talker.params, prompt, limited, (seed + len(turns)) % 2**32)
        answer, end = _print_answer(talker.tokenizer, prompt, ids, limited.max_new_tokens)
        if end == "interrupted":
            if time.monotonic() - interrupted_at < EXIT_SECONDS:
                return
            interrupted_at = time.monotonic()
        elif end == "cut":
            limit = f"this model knows {max_seq_len:,} tokens"
            if limited == sampling:
                limit = f"--max_new_tokens={sampling.max_new_tokens}"
            _print_hint(f"(the answer is cut here: {limit})")
        if answer:
            messages = [*turns, {"role": "assistant", "content": answer}]


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


def _print_answer(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterator[int], limit: int) -> tuple[str, str]:
    """Prints an answer token by token; returns it and its end: "interrupted", "cut" (after `limit` tokens) or ""."""
    answer, end, count = "", "", 0

    def counted() -> Iterator[int]:
        nonlocal count
        for token in ids:
            count += 1
            yield token

    try:
        for piece in text_pieces(tokenizer, prompt, counted()):
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        end = "interrupted"
    print(flush=True)
    return answer, end or ("cut" if count == limit else "")


def text_pieces(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """The text that each id adds to that of the ids before it, as far as it is whole characters; nothing is empty."""
    detokenizer = Detokenizer(tokenizer, prompt)
    for token in ids:
        if piece := detokenizer.add(token):
            yield piece
    if remainder := detokenizer.finish():
        yield remainder


def stored_questions(stage_directory: Path) -> list[str]:
    """The questions that a finished stage has answered rightly, one after the other; none of any other checkpoint."""
    try:
        questions = files.read_json(stage_directory / "done.json")["questions"]
    except (OSError, KeyError, TypeError, UserError):
        return []  # a foreign or damaged file is no reason not to talk
    return [text for text in questions if isinstance(text, str)] if isinstance(questions, list) else []
