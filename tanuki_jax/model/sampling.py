"""The choice of the next token from the logits of each row: every row has its own options and its own random numbers."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a row ends.  What the numbers mean is said in `Choices`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()  # token ids that end a row; not part of the result
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return not self.temperature and self.repetition_penalty == 1


class Choices(NamedTuple):
    """How each of R rows chooses; [R] each.  They count in this order, as in transformers."""

    repetition_penalty: jax.Array | np.ndarray  # float32; divides positive logits of tokens that the row holds; 1 = off
    temperature: jax.Array | np.ndarray  # float32; 0 = the likeliest token, whatever the options below
    top_k: jax.Array | np.ndarray  # int32; only the likeliest k tokens; 0 = off
    top_p: jax.Array | np.ndarray  # float32; only the smallest set of likeliest tokens that reaches this probability; 1 = off
    min_p: jax.Array | np.ndarray  # float32; only tokens with this share of the likeliest one's probability; 0 = off


def stack(rows: Sequence[Sampling]) -> Choices:
    """The options of rows."""

    def column(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], np.int32 if name == "top_k" else np.float32)

    return Choices(**{name: column(name) for name in Choices._fields})


# --- random numbers -------------------------------------------------------------------------------------------------


def request_key(seed: int, prompt: Sequence[int], sample_index: int = 0) -> jax.Array:
    """The random key of a prompt's sample, which depends on nothing else: sample 0 is what `generate` draws with this seed.

    seed: of up to 64 bits; the lower 32 count.
    """
    return row_keys(int32_seed(seed), np.array([[_checksum(prompt), sample_index]], np.uint32))[0]


def row_numbers(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """The checksum of each prompt, and how many equal ones come before it, [B, 2] uint32."""
    counts: Counter[int] = Counter()
    numbers = []
    for checksum in map(_checksum, prompts):
        numbers.append((checksum, counts[checksum]))
        counts[checksum] += 1
    return np.array(numbers, np.uint32)


@jax.jit
def row_keys(seed: jax.Array | np.int32, numbers_B2: jax.Array | np.ndarray) -> jax.Array:
    """The random key of each row, [B], from the seed and the two numbers of `row_numbers`."""
    key = jax.random.key(seed)
    return jax.vmap(lambda numbers_2: jax.random.fold_in(jax.random.fold_in(key, numbers_2[0]), numbers_2[1]))(numbers_B2)


def int32_seed(seed: int) -> np.int32:
    """The lower 32 bits of a seed."""
    return np.int64(seed).astype(np.int32)


def _checksum(prompt: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(prompt, np.int64).tobytes())


# --- the choice -----------------------------------------------------------------------------------------------------


def choose(logits_BV: jax.Array, choices: Choices, seen_BV: jax.Array, keys_B: jax.Array, steps_B: jax.Array) -> jax.Array:
    """The next token of each row, [B] int32.  What no row asks for is not computed.

    Args:
      logits_BV: float32.
      seen_BV: bool, the tokens that a row holds, those of its prompt included.
      keys_B, steps_B: token number `step` of a row is drawn with `fold_in(key, step)`.
    """
    penalties_B1, temperatures_B = choices.repetition_penalty[:, None], choices.temperature

    def likeliest() -> jax.Array:
        return logits_BV.argmax(axis=-1).astype(jnp.int32)

    def other() -> jax.Array:
        penalised_BV = jnp.where(logits_BV < 0, logits_BV * penalties_B1, logits_BV / penalties_B1)
        scores_BV = jnp.where(seen_BV & (penalties_B1 != 1), penalised_BV, logits_BV)
        greedy_B = scores_BV.argmax(axis=-1).astype(jnp.int32)

        def drawn() -> jax.Array:
            scaled_BV = keep_likeliest(scores_BV / jnp.where(temperatures_B > 0, temperatures_B, 1)[:, None], choices)
            drawn_B = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in)(keys_B, steps_B), scaled_BV)
            return jnp.where(temperatures_B > 0, drawn_B.astype(jnp.int32), greedy_B)

        return jax.lax.cond((temperatures_B > 0).any(), drawn, lambda: greedy_B)

    return jax.lax.cond(((temperatures_B > 0) | (choices.repetition_penalty != 1)).any(), other, likeliest)


def keep_likeliest(logits_BV: jax.Array, choices: Choices) -> jax.Array:
    """The logits with -inf for what top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024) leave out.

    The likeliest token always stays; of equal tokens all stay or none.
    """
    top_k, top_p, min_p = (a[:, None] for a in (choices.top_k, choices.top_p, choices.min_p))

    def cut_by_count(logits_BV: jax.Array) -> jax.Array:
        kept_BV = _smallest_set(logits_BV, lambda set_BV: set_BV.sum(axis=-1, keepdims=True) >= top_k)
        return jnp.where(kept_BV | (top_k < 1), logits_BV, -jnp.inf)

    def cut_by_probability(logits_BV: jax.Array) -> jax.Array:
        exp_BV = jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True))
        wanted_B1 = top_p * exp_BV.sum(axis=-1, keepdims=True)
        kept_BV = _smallest_set(logits_BV, lambda set_BV: (set_BV * exp_BV).sum(axis=-1, keepdims=True) >= wanted_B1)
        return jnp.where(kept_BV | (top_p >= 1), logits_BV, -jnp.inf)

    logits_BV = jax.lax.cond((top_k > 0).any(), cut_by_count, lambda a: a, logits_BV)
    logits_BV = jax.lax.cond((top_p < 1).any(), cut_by_probability, lambda a: a, logits_BV)
    return jnp.where(logits_BV >= logits_BV.max(axis=-1, keepdims=True) + jnp.log(min_p), logits_BV, -jnp.inf)


def _smallest_set(logits_BV: jax.Array, is_enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The smallest set of a row's likeliest tokens that is enough, bool [B, V]; all of them where no set is.

    The threshold is bisected as an integer whose order is that of the floats: 32 passes, far less than a sort.

    is_enough: whether the sets [B, V] are enough, [B, 1]; of a larger set it must be true, too.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ jnp.iinfo(jnp.int32).max, bits_BV)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = bounds  # low is enough, or the least integer
        middle_B1 = (low_B1 | high_B1) - ((low_B1 ^ high_B1) >> 1)  # rounded up, without overflow
        enough_B1 = is_enough(order_BV >= middle_B1)
        return jnp.where(enough_B1, middle_B1, low_B1), jnp.where(enough_B1, high_B1, middle_B1 - 1)

    high_B1 = order_BV.max(axis=-1, keepdims=True)
    low_B1 = jnp.full_like(high_B1, jnp.iinfo(jnp.int32).min)
    return order_BV >= jax.lax.fori_loop(0, 32, halve, (low_B1, high_B1))[0]
