"""Log-probabilities of given tokens under a vocabulary softmax, without float32 [B, S, V] for long rows."""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from tanuki_jax.ops.device import on_tpu


class TokenScores(NamedTuple):
    """What a loss needs of the logits; all [B, S] float32."""

    logprob: jax.Array  # natural log-probability of the target
    log_z: jax.Array  # log of the softmax's denominator
    correct: jax.Array  # 1 where the target is the likeliest token
    entropy: jax.Array | None = None  # of the distribution, in nats, where it was asked for; without a gradient


# Seven arguments: three arrays, and options that are passed by name.
def token_logprobs(
    x_BSD: jax.Array,
    head_DV: jax.Array,
    targets_BS: jax.Array,
    *,
    impl: str = "xla",
    num_shards: int = 1,
    chunk: int = 512,
    entropy: bool = False,
) -> TokenScores:
    """Scores of `targets` under softmax(x @ head).

    Products run in the dtype of x and accumulate in float32; everything after them is float32.  "xla" walks over the row in
    chunks; for the backward pass it saves the exponentials in the dtype of x where that is a 16-bit one or there is only one
    chunk, and else computes them again.  "reference" is the plain formula.

    Args:
      num_shards: into how many equal parts the row is split over devices, so that every chunk takes some of each part.
      chunk: limit on the positions of a row whose float32 logits exist at one time.
      entropy: whether to compute the entropy of every distribution, too.
    """
    if impl == "reference":
        return _reference(x_BSD, head_DV, targets_BS, entropy)
    (B, S), shard_length, limit = targets_BS.shape, targets_BS.shape[1] // num_shards, chunk
    chunk = next(size for size in range(min(shard_length, limit), 0, -1) if shard_length % size == 0)
    if chunk < limit // 8:  # a prime length is not worth so many small products
        chunk = shard_length
    save = chunk == shard_length or x_BSD.dtype.itemsize == 2

    def split(a: jax.Array) -> jax.Array:
        """[B, S, ...] -> [chunks, rows, ...]; one axis of rows where the devices do not split S.

        With two batch axes XLA's CPU backend transposes all logits for the gradient of the head.
        """
        a = a.reshape(B, num_shards, shard_length // chunk, chunk, *a.shape[2:])
        a = a.transpose(2, 0, 1, 3, *range(4, a.ndim))
        return a.reshape(a.shape[0], B * chunk, *a.shape[4:]) if num_shards == 1 else a

    def join(a: jax.Array) -> jax.Array:
        return a.reshape(-1, B, num_shards, chunk).transpose(1, 2, 0, 3).reshape(B, S)

    scores = _scores(split(x_BSD), head_DV.astype(x_BSD.dtype), split(targets_BS), save, entropy)
    return jax.tree.map(join, scores)


def _reference(x_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array, entropy: bool) -> TokenScores:
    logits_BSV = (x_BSD @ head_DV.astype(x_BSD.dtype)).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits_BSV, axis=-1)
    target = jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
    entropy_BS = jax.lax.stop_gradient(jax.scipy.special.entr(jax.nn.softmax(logits_BSV)).sum(axis=-1)) if entropy else None
    return TokenScores(target - log_z, log_z, (target >= logits_BSV.max(axis=-1)).astype(jnp.float32), entropy_BS)


# n counts chunks, T stands for the one or more axes of rows.

# A softmax in two parts: exponentials of the logits less the largest [..., V], and one over their sum [...].
Softmax: TypeAlias = tuple[jax.Array, jax.Array]
Residuals: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, Softmax | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scores(x_nTD: jax.Array, head_DV: jax.Array, targets_nT: jax.Array, save: bool, entropy: bool) -> TokenScores:
    return _forward(x_nTD, head_DV, targets_nT, save, entropy)[0]


def _forward(
    x_nTD: jax.Array, head_DV: jax.Array, targets_nT: jax.Array, save: bool, entropy: bool
) -> tuple[TokenScores, Residuals]:
    def score_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[TokenScores, Softmax | None]:
        scores, (exp_TV, inverse_T) = _score(chunk[0], head_DV, chunk[1], entropy)
        return scores, (exp_TV.astype(x_nTD.dtype), inverse_T) if save else None

    if len(x_nTD) == 1:
        scores, softmax = jax.tree.map(lambda a: a[None], score_chunk((x_nTD[0], targets_nT[0])))
    else:
        scores, softmax = jax.lax.map(score_chunk, (x_nTD, targets_nT))
    return scores, (x_nTD, head_DV, targets_nT, softmax)


def _backward(save: bool, entropy: bool, residuals: Residuals, gradients: TokenScores) -> tuple[jax.Array, jax.Array, None]:
    x_nTD, head_DV, targets_nT, softmax = residuals
    by_target, by_log_z = gradients.logprob, gradients.log_z - gradients.logprob

    def products(
        x_TD: jax.Array,
        softmax: Softmax,
        targets_T: jax.Array,
        by_target_T: jax.Array,
        by_log_z_T: jax.Array,
        dtype: jnp.dtype,
    ) -> tuple[jax.Array, jax.Array]:
        """The gradients of x and of the head, the latter accumulated in `dtype`."""
        exp_TV, inverse_T = softmax
        logits_TV = exp_TV.astype(jnp.float32) * (by_log_z_T * inverse_T)[..., None]
        logits_TV += jnp.where(_vocabulary(exp_TV) == targets_T[..., None], by_target_T[..., None], 0)
        logits_TV = logits_TV.astype(x_TD.dtype)
        x_gradient = jnp.einsum("...V,DV->...D", logits_TV, head_DV)
        return x_gradient, jnp.einsum("...D,...V->DV", x_TD, logits_TV, preferred_element_type=dtype)

    if softmax is not None:
        return *products(x_nTD, softmax, targets_nT, by_target, by_log_z, head_DV.dtype), None

    def add_chunk(total_DV: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_TD, targets_T, by_target_T, by_log_z_T = chunk
        _, softmax = _score(x_TD, head_DV, targets_T, False)
        x_gradient, head_gradient = products(x_TD, softmax, targets_T, by_target_T, by_log_z_T, jnp.dtype(jnp.float32))
        return total_DV + head_gradient, x_gradient

    zero_DV = jnp.zeros(head_DV.shape, jnp.float32)
    head_gradient, x_gradient = jax.lax.scan(add_chunk, zero_DV, (x_nTD, targets_nT, by_target, by_log_z))
    return x_gradient, head_gradient.astype(head_DV.dtype), None


def _score(x_TD: jax.Array, head_DV: jax.Array, targets_T: jax.Array, entropy: bool) -> tuple[TokenScores, Softmax]:
    """The scores of a chunk, and its softmax in two parts.

    In two parts, so that the pass over all logits that sums the exponentials is also the one that writes them.
    """
    logits_TV = jnp.einsum("...D,DV->...V", x_TD, head_DV, preferred_element_type=jnp.float32)
    max_T = logits_TV.max(axis=-1)
    exp_TV = jnp.exp(logits_TV - max_T[..., None])
    sum_T = exp_TV.sum(axis=-1)
    log_z = max_T + jnp.log(sum_T)
    if on_tpu():  # a sum in a pass that is needed anyway; a gather would be one more pass over all logits
        target = jnp.where(_vocabulary(logits_TV) == targets_T[..., None], logits_TV, 0).sum(axis=-1)
    else:
        target = jnp.take_along_axis(logits_TV, targets_T[..., None], axis=-1)[..., 0]
    entropy_T = log_z - (exp_TV * logits_TV).sum(axis=-1) / sum_T if entropy else None
    return TokenScores(target - log_z, log_z, (target >= max_T).astype(jnp.float32), entropy_T), (exp_TV, 1 / sum_T)


def _vocabulary(logits_TV: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits_TV.shape, logits_TV.ndim - 1)


_scores.defvjp(_forward, _backward)
