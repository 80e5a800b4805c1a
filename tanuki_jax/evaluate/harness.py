"""A checkpoint of ours as a model of EleutherAI's lm-evaluation-harness (the extra `harness`).

    from lm_eval import simple_evaluate
    from tanuki_jax.evaluate.harness import Harness

    simple_evaluate(model=Harness("runs/nano/stages/sft"), tasks=["jcommonsenseqa"])

Log-likelihoods are those that its `hf` model gives of the exported checkpoint.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tanuki_jax import checkpoint, model
from tanuki_jax.data import chat
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.evaluate.score import sequence_scores
from tanuki_jax.model import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)

TokenizedRequest: TypeAlias = tuple[object, list[int], list[int]]  # texts (for messages), context, continuation
# Stand around text of a task that spells a special token of a rendered conversation, which it must not become.
QUOTE = "\ue010{}\ue011"


class Harness(TemplateLM):
    """The harness's interface to a model.

    max_length: longest row, prompt and answer; by default the longest that the checkpoint's stages trained on.
    """

    backend = "causal"

    def __init__(self, path: str | Path, max_length: int = 0, max_new_tokens: int = 256, batch_size: int = 32) -> None:
        super().__init__()
        self._loaded = checkpoint.load(path)
        self._tokenizer = Tokenizer(self._loaded.tokenizer_directory)
        self.max_length = max_length or checkpoint.max_seq_len(self._loaded.meta)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.eos if self._tokenizer.bos is None else self._tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """As hf encodes: BOS where the tokenizer itself puts one, unless the text begins with it."""
        parts = re.split(f"[{QUOTE.format('')}]", string)
        if len(parts) == 1:
            if add_special_tokens is None:
                add_special_tokens = not string.startswith(self._tokenizer.piece(self.prefix_token_id))
            return self._tokenizer.encode_prompt(string, add_special_tokens)
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + len(part))
        quoted = list(zip(ends[1:-1:2], ends[2::2], strict=False))  # every other part
        return self._tokenizer.encode_rendered("".join(parts), quoted, frozenset(chat.stop_ids(self._tokenizer)))[0]

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenizedRequest], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        sequences, masks = [], []
        for text, context, continuation in requests:
            if not continuation:
                raise UserError(
                    f"harness: {str(text)[:200]!r}: one token spans the end of the context and the whole continuation, so that "
                    "nothing is left to score; end the context elsewhere"
                )
            ids = [*context, *continuation][-self.max_length - 1 :]
            sequences.append(ids)
            masks.append([0] * (len(ids) - len(continuation)) + [1] * len(continuation))
        return sequence_scores(self._loaded.cfg, self._loaded.params, sequences, masks)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[TokenizedRequest] = []
        request_numbers = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                request_numbers.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(request_numbers, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(number)
        weights = model.slots.unstack(self._loaded.cfg, self._loaded.params)
        for sampling, numbers in groups.items():
            prompts = {n: self.tok_encode(requests[n].args[0])[-(self.max_length - sampling.max_new_tokens) :] for n in numbers}
            numbers.sort(key=lambda n: len(prompts[n]))
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                filled = [prompts[n] or [self.prefix_token_id] for n in batch]
                results = model.generate(self._loaded.cfg, weights, filled, sampling)
                for n, ids in zip(batch, results, strict=True):
                    answers[n] = _cut_at(self._tokenizer.decode(ids), requests[n].args[1].get("until") or [])
        return answers

    def _sampling(self, options: Mapping[str, float]) -> Sampling:
        sampled = options.get("do_sample", options.get("temperature", 0) > 0)
        max_new_tokens = int(options.get("max_gen_toks", self.max_new_tokens))
        temperature = float(options.get("temperature", 1.0)) if sampled else 0.0
        return Sampling(
            max_new_tokens,
            temperature,
            float(options.get("top_p", 1.0)),
            chat.stop_ids(self._tokenizer),
            int(options.get("top_k", 0)),
            float(options.get("min_p", 0.0)),
            float(options.get("repetition_penalty", 1.0)),
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The rendered conversation; without a generation prompt it continues the last message, as hf's does."""
        try:
            rendered, quoted = chat.render_prompt(self._tokenizer, chat_history, add_generation_prompt)
        except UserError as error:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            logger.warning("harness: %s; the system message is left out", error)
            rendered, quoted = chat.render_prompt(self._tokenizer, without, add_generation_prompt)
        for start, stop in reversed(quoted):
            rendered = rendered[:start] + QUOTE.format(rendered[start:stop]) + rendered[stop:]
        return rendered

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._tokenizer.chat_template

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint


def _cut_at(text: str, stops: str | Sequence[str]) -> str:
    """The text before the first of these strings."""
    positions = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    return text[: min((position for position in positions if position >= 0), default=len(text))]
