"""Log-probabilities of given tokens under a vocabulary softmax, without float32 [B, S, V] for long rows."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tanuki_jax.ops.device import on_tpu


class TokenScores(NamedTuple):
    """What a loss needs of the logits; all [B, S] float32."""

    logprob: jax.Array  # natural log-probability of the target
    log_z: jax.Array  # log of the softmax's denominator
    correct: jax.Array  # 1 where the target is the likeliest token
    entropy: jax.Array | None = None  # of the distribution, in nats, where it was asked for; without a gradient


def token_logprobs(
    x_BSD: jax.Array,
    head_DV: jax.Array,
    targets_BS: jax.Array,
    *,
    impl: str = "xla",
    parts: int = 1,
    chunk: int = 512,
    entropy: bool = False,
) -> TokenScores:
    """Scores of `targets` under softmax(x @ head).

    Products run in the dtype of x and accumulate in float32; everything after them is float32.  "xla" walks over the row in
    chunks; for the backward pass it keeps the exponentials in the dtype of x where that is a 16-bit one or there is only one
    chunk, and else computes them again.  "reference" is the plain formula.

    Args:
      chunk: most positions of a row whose float32 logits exist at one time.
      parts: into how many equal parts the row is split over devices, so that every chunk takes some of each part.
      entropy: whether to compute that of every distribution too.
    """
    if impl == "reference":
        return _reference(x_BSD, head_DV, targets_BS, entropy)
    (B, S), here = targets_BS.shape, targets_BS.shape[1] // parts
    most, chunk = chunk, next(size for size in range(min(here, chunk), 0, -1) if here % size == 0)
    if chunk < most // 8:  # a prime length is not worth so many small products
        chunk = here
    keep = chunk == here or x_BSD.dtype.itemsize == 2

    def split(a: jax.Array) -> jax.Array:
        """[B, S, ...] -> [chunks, rows, ...]; one axis of rows where the devices do not split S.

        With two batch axes XLA's CPU backend transposes all logits for the gradient of the head.
        """
        a = a.reshape(B, parts, here // chunk, chunk, *a.shape[2:])
        a = a.transpose(2, 0, 1, 3, *range(4, a.ndim))
        return a.reshape(a.shape[0], B * chunk, *a.shape[4:]) if parts == 1 else a

    def join(a: jax.Array) -> jax.Array:
        return a.reshape(-1, B, parts, chunk).transpose(1, 2, 0, 3).reshape(B, S)

    scores = _scores(split(x_BSD), head_DV.astype(x_BSD.dtype), split(targets_BS), keep, entropy)
    return jax.tree.map(join, scores)


def _reference(x_BSD, head_DV, targets_BS, entropy):
    logits_BSV = (x_BSD @ head_DV.astype(x_BSD.dtype)).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits_BSV, axis=-1)
    target = jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
    spread = jax.lax.stop_gradient(jax.scipy.special.entr(jax.nn.softmax(logits_BSV)).sum(axis=-1)) if entropy else None
    return TokenScores(target - log_z, log_z, (target >= logits_BSV.max(axis=-1)).astype(jnp.float32), spread)


# n counts chunks, T stands for the one or more axes of rows.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scores(x_nTD: jax.Array, head_DV: jax.Array, targets_nT: jax.Array, keep: bool, entropy: bool) -> TokenScores:
    return _forward(x_nTD, head_DV, targets_nT, keep, entropy)[0]


def _forward(x_nTD, head_DV, targets_nT, keep, entropy):
    def one(part):
        scores, (exp_TV, inverse_T) = _of_chunk(part[0], head_DV, part[1], entropy)
        return scores, (exp_TV.astype(x_nTD.dtype), inverse_T) if keep else None

    if len(x_nTD) == 1:
        scores, kept = jax.tree.map(lambda a: a[None], one((x_nTD[0], targets_nT[0])))
    else:
        scores, kept = jax.lax.map(one, (x_nTD, targets_nT))
    return scores, (x_nTD, head_DV, targets_nT, kept)


def _backward(keep, entropy, residuals, gradients):
    x_nTD, head_DV, targets_nT, kept = residuals
    by_target, by_log_z = gradients.logprob, gradients.log_z - gradients.logprob

    def products(x_TD, exp_TV, inverse_T, targets_T, by_target_T, by_log_z_T, dtype=jnp.float32):
        logits_TV = exp_TV.astype(jnp.float32) * (by_log_z_T * inverse_T)[..., None]
        logits_TV += jnp.where(_vocabulary(exp_TV) == targets_T[..., None], by_target_T[..., None], 0)
        logits_TV = logits_TV.astype(x_TD.dtype)
        x_gradient = jnp.einsum("...V,DV->...D", logits_TV, head_DV)
        return x_gradient, jnp.einsum("...D,...V->DV", x_TD, logits_TV, preferred_element_type=dtype)

    if keep:
        exp_nTV, inverse_nT = kept
        return *products(x_nTD, exp_nTV, inverse_nT, targets_nT, by_target, by_log_z, head_DV.dtype), None

    def one(total_DV, part):
        x_TD, targets_T, by_target_T, by_log_z_T = part
        _, (exp_TV, inverse_T) = _of_chunk(x_TD, head_DV, targets_T, False)
        x_gradient, head_gradient = products(x_TD, exp_TV, inverse_T, targets_T, by_target_T, by_log_z_T)
        return total_DV + head_gradient, x_gradient

    zero_DV = jnp.zeros(head_DV.shape, jnp.float32)
    head_gradient, x_gradient = jax.lax.scan(one, zero_DV, (x_nTD, targets_nT, by_target, by_log_z))
    return x_gradient, head_gradient.astype(head_DV.dtype), None


def _of_chunk(x_TD, head_DV, targets_T, entropy):
    """The scores, and the softmax in two parts: exponentials of logits less the largest, and one over their sum.

    So that the pass over all logits that sums the exponentials is also the one that writes them.
    """
    logits_TV = jnp.einsum("...D,DV->...V", x_TD, head_DV, preferred_element_type=jnp.float32)
    most_T = logits_TV.max(axis=-1)
    exp_TV = jnp.exp(logits_TV - most_T[..., None])
    sum_T = exp_TV.sum(axis=-1)
    log_z = most_T + jnp.log(sum_T)
    if on_tpu():  # a sum in the pass that is made anyway; a gather would be one more over all logits
        target = jnp.where(_vocabulary(logits_TV) == targets_T[..., None], logits_TV, 0).sum(axis=-1)
    else:
        target = jnp.take_along_axis(logits_TV, targets_T[..., None], axis=-1)[..., 0]
    spread = log_z - (exp_TV * logits_TV).sum(axis=-1) / sum_T if entropy else None
    return TokenScores(target - log_z, log_z, (target >= most_T).astype(jnp.float32), spread), (exp_TV, 1 / sum_T)


def _vocabulary(logits_TV):
    return jax.lax.broadcasted_iota(jnp.int32, logits_TV.shape, logits_TV.ndim - 1)


_scores.defvjp(_forward, _backward)
