"""Log-probabilities of given tokens under a vocabulary softmax, without float32 [B, S, V] for long rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 512  # most positions of a row whose logits exist at one time


class TokenScores(NamedTuple):
    """What a loss needs of the logits; all [B, S] float32."""

    logprob: jax.Array  # natural log-probability of the target
    log_z: jax.Array  # log of the softmax's denominator
    correct: jax.Array  # 1 where the target is the likeliest token


def token_logprobs(x_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array, *, impl: str = "xla") -> TokenScores:
    """Scores of `targets` under softmax(x @ head).

    Products run in the dtype of x and accumulate in float32; everything after them is float32.  "xla" walks over the
    row in chunks and recomputes their logits in the backward pass; "reference" holds all logits.
    """
    S = x_BSD.shape[1]
    chunk = next(size for size in range(min(S, CHUNK), 0, -1) if S % size == 0)
    if impl == "reference" or chunk == S or chunk < CHUNK // 8:  # a prime length is not worth so many small products
        return _scores(x_BSD, head_DV, targets_BS)

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(a.shape[0], S // chunk, chunk, *a.shape[2:]).swapaxes(0, 1)

    body = jax.checkpoint(lambda xs: _scores(xs[0], head_DV, xs[1]))
    scores = jax.lax.map(body, (split(x_BSD), split(targets_BS)))
    return TokenScores(*(a.swapaxes(0, 1).reshape(targets_BS.shape) for a in scores))


def _scores(x_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array) -> TokenScores:
    # As one matrix of tokens: with two batch axes XLA's CPU backend transposes all logits for the gradient of the head.
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    logits_TV = jnp.einsum("TD,DV->TV", x_TD, head_DV.astype(x_TD.dtype), preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits_TV, axis=-1)
    target = jnp.take_along_axis(logits_TV, targets_BS.reshape(-1, 1), axis=-1)[:, 0]
    correct = (target >= logits_TV.max(axis=-1)).astype(jnp.float32)
    return TokenScores(*(a.reshape(targets_BS.shape) for a in (target - log_z, log_z, correct)))
