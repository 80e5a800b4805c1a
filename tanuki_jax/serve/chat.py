"""A conversation on the terminal."""

from __future__ import annotations

import sys
from typing import Any

from tanuki_jax import config, model
from tanuki_jax.data.chat import encode_chat
from tanuki_jax.data.tokenizer import Tokenizer

HINT = "日本語でも英語でもどうぞ。 /new begins a new conversation, /quit (or end of input) leaves."


def chat(cfg: config.Model, params: Any, tokenizer: Tokenizer, sampling: model.Sampling, seed: int) -> None:
    """Reads questions from stdin and answers on stdout, every turn with all turns before it."""
    live = sys.stdin.isatty()
    print(HINT, file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        if live:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip() == "/new":
            messages = []
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        prompt, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
        [ids] = model.generate(cfg, params, [prompt], sampling, seed + len(messages))
        answer = tokenizer.decode(ids)
        print(answer, flush=True)
        messages.append({"role": "assistant", "content": answer})
