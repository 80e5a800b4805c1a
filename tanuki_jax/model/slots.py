"""The decoder: B slots of a batch, each with a text of its own, that all get their next token together.

    weights = unstack(cfg, params)                                                  # once
    slots = empty(cfg, batch_size, length)
    slots = admit(cfg, weights, slots, Prompts(tokens_RP, lengths_R, slots_R, choices, keys_R))  # into free slots
    slots, tokens = step(cfg, weights, slots, n)                                    # n tokens for every slot

`admit` and `step` take the slots' memory over.  A slot knows no end: which tokens count is for the caller to say, and a slot
without a use computes something meaningless until a prompt is admitted.  A row is what its prompt alone gives: keys, options
and cache are its own, and no expert drops a token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config, parallel
from tanuki_jax.model.attention import Cache
from tanuki_jax.model.layer_groups import Params, split_layers
from tanuki_jax.model.layers import compute_dtype, rms_norm
from tanuki_jax.model.lora import delta, frozen_params
from tanuki_jax.model.sampling import Choices, Sampling, choose, stack
from tanuki_jax.model.transformer import Block, dropless, logical_axes

Array = jax.Array | np.ndarray


class Weights(NamedTuple):
    """A model's parameters as the decoder takes them: a tree for each layer, cast to the dtype that they are used in."""

    table_VD: jax.Array
    layers: tuple[Params, ...]  # variables of `Block`: params and, where there are adapters, lora
    norm_final_D: jax.Array
    head_DV: jax.Array


class Slots(NamedTuple):
    """The state of B texts between two tokens."""

    cache: tuple[Cache, ...]  # of each layer
    hidden_BD: jax.Array  # of the last token, after the last norm: what the next token is chosen by
    position_B: jax.Array  # int32, of the next token
    step_B: jax.Array  # int32, how many tokens have been chosen
    key_B2: jax.Array  # uint32, the data of each row's random key
    choices: Choices
    seen_BV: jax.Array  # bool, tokens that the row holds


class Prompts(NamedTuple):
    """R prompts for slots, and how each one goes on."""

    tokens_RP: Array  # int32, padded at the end with any id; P is at most the slots' length
    lengths_R: Array  # int32, at least 1
    slots_R: Array  # int32, the number of each one's slot; one with a number that no slot has is left out
    choices: Choices
    keys_R: jax.Array  # random keys, as of `request_key`


class Tokens(NamedTuple):
    """Chosen tokens; log-probabilities are natural ones, of the distribution before any option changes it."""

    ids: jax.Array  # [n, B] int32
    logprobs: jax.Array  # [n, B] float32
    top_ids: jax.Array  # [n, B, top] int32, the likeliest tokens
    top_logprobs: jax.Array  # [n, B, top] float32


class Scores(NamedTuple):
    """Of tokens 1 to S-1 of rows, given those before each."""

    logprobs: jax.Array  # [B, S-1] float32
    top_ids: jax.Array  # [B, S-1, top] int32
    top_logprobs: jax.Array  # [B, S-1, top] float32


# --- the weights ----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def unstack(cfg: config.ModelConfig, params: Params) -> Weights:
    """The weights from parameters, with or without adapters; on a mesh they stay split as they are stored.

    Adapters of attention and of dense FFNs stay beside their matrices; to experts and routers, which compute with the sum
    anyway, theirs are added here, in float32.
    """
    base = {name: part for name, part in params.items() if name not in ("lora", "lora_scale")}
    adapters = params.get("lora", {}).get("layers", {})
    scales = params.get("lora_scale", {}).get("layers", {})
    moe = dict(base["layers"].get("moe", {}))
    for name, adapter in adapters.get("moe", {}).items():
        moe[name], _ = delta(f"moe/{name}", moe[name], adapter["a"], adapter["b"], scales["moe"][name])
    if "router" in moe:
        moe["router"] = moe["router"].astype(jnp.float32)
    base["layers"] = base["layers"] | ({"moe": moe} if moe else {})
    base = jax.tree.map(_place_parameter, frozen_params(cfg, base), logical_axes(cfg))
    layers = [{"params": layer} for layer in split_layers(cfg, base["layers"])]
    separate = {name: part for name, part in adapters.items() if name != "moe"}
    if separate:
        dtype = compute_dtype(cfg)
        scaled = {
            kind: {
                name: {"a": adapter["a"].astype(dtype), "b": adapter["b"].astype(dtype), "scale": scales[kind][name]}
                for name, adapter in part.items()
            }
            for kind, part in separate.items()
        }
        layers = [layer | {"lora": lora} for layer, lora in zip(layers, split_layers(cfg, scaled), strict=True)]
    return Weights(base["embed"]["table"], tuple(layers), base["norm_final"], base["head"])


def _place_parameter(w: jax.Array, axes: Sequence[str]) -> jax.Array:
    return parallel.constrain_as_stored(w, "".join(axes))


# --- the slots ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("cfg", "batch_size", "length"))
def empty(cfg: config.ModelConfig, batch_size: int, length: int) -> Slots:
    """Slots for texts of up to `length` tokens, prompt and answer."""
    shape, dtype = (batch_size, cfg.n_kv_heads, length, cfg.head_dim), compute_dtype(cfg)
    zeros_B = jnp.zeros(batch_size, jnp.int32)
    slots = Slots(
        cache=tuple({"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(cfg.n_layers)),
        hidden_BD=jnp.zeros((batch_size, cfg.d_model), dtype),
        position_B=zeros_B,
        step_B=zeros_B,
        key_B2=jnp.zeros((batch_size, 2), jnp.uint32),
        choices=jax.tree.map(lambda a: jnp.broadcast_to(a, (batch_size, *a.shape[1:])), stack([Sampling()])),
        seen_BV=jnp.zeros((batch_size, cfg.vocab_size), bool),
    )
    return _place(slots)


def _place(slots: Slots) -> Slots:
    """The slots over the mesh in context: rows over the devices where they divide, heads over `tensor`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return slots
    rows = "B" if parallel.batch_is_sharded(len(slots.step_B)) else "-"

    def place(x: jax.Array, axes: str) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, parallel.spec(rows + axes, "activation", mesh, x.shape))

    return Slots(
        cache=jax.tree.map(lambda c: place(c, "KMH"), slots.cache),
        hidden_BD=place(slots.hidden_BD, "-"),
        position_B=place(slots.position_B, ""),
        step_B=place(slots.step_B, ""),
        key_B2=place(slots.key_B2, "-"),
        choices=jax.tree.map(lambda c: place(c, ""), slots.choices),
        seen_BV=place(slots.seen_BV, "V"),
    )


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="slots")
def admit(cfg: config.ModelConfig, weights: Weights, slots: Slots, prompts: Prompts) -> Slots:
    """The slots with R prompts in place of what some of them held; a program for each R and P."""
    return _admit(cfg, weights, slots, prompts)[0]


@functools.partial(jax.jit, static_argnames=("cfg", "top"), donate_argnames="slots")
def admit_scored(
    cfg: config.ModelConfig, weights: Weights, slots: Slots, prompts: Prompts, with_scores: Array, top: int
) -> tuple[Slots, Scores]:
    """What `admit` gives, and the scores of the prompts' tokens, from one pass and one program.

    Where a token is the likeliest its log-probability is the first of `top_logprobs`, bit for bit.

    with_scores: bool; without it the scores are zeros, and cost nothing.
    """
    slots, hidden_RPD = _admit(cfg, weights, slots, prompts)

    def count() -> Scores:
        return _score(cfg, weights, hidden_RPD, jnp.asarray(prompts.tokens_RP, jnp.int32), top)

    def skip() -> Scores:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(count))

    return slots, jax.lax.cond(with_scores, count, skip)


def _admit(cfg: config.ModelConfig, weights: Weights, slots: Slots, prompts: Prompts) -> tuple[Slots, jax.Array]:
    """The slots, and the prompts' hidden states [R, P, D]."""
    (R, P), V = prompts.tokens_RP.shape, cfg.vocab_size
    tokens_RP, lengths_R = jnp.asarray(prompts.tokens_RP, jnp.int32), jnp.asarray(prompts.lengths_R, jnp.int32)
    rows_R = jnp.arange(R)
    positions_RP = jnp.broadcast_to(jnp.arange(P), (R, P))
    hidden_RPD, new = _forward(cfg, weights, parallel.embedding_lookup(weights.table_VD, tokens_RP), positions_RP)
    inside_RP = positions_RP < lengths_R[:, None]
    seen_RV = jnp.zeros((R, V), bool).at[rows_R[:, None], jnp.where(inside_RP, tokens_RP, V)].set(True, mode="drop")
    admitted = Slots(
        cache=new,
        hidden_BD=hidden_RPD[rows_R, lengths_R - 1],
        position_B=lengths_R,
        step_B=jnp.zeros(R, jnp.int32),
        key_B2=jax.random.key_data(prompts.keys_R),
        choices=prompts.choices,
        seen_BV=seen_RV,
    )

    def put(whole: jax.Array, part: Array) -> jax.Array:
        part, at = jnp.asarray(part, whole.dtype), prompts.slots_R
        return whole.at[at].set(part) if part.shape[1:] == whole.shape[1:] else whole.at[at, :, :P].set(part)

    return _place(jax.tree.map(put, slots, admitted)), hidden_RPD


@functools.partial(jax.jit, static_argnames=("cfg", "n", "top"), donate_argnames="slots")
def step(cfg: config.ModelConfig, weights: Weights, slots: Slots, n: int, top: int = 0) -> tuple[Slots, Tokens]:
    """The next n tokens of every slot, with the `top` likeliest ones of each place."""
    return jax.lax.scan(lambda slots, _: next_token(cfg, weights, slots, top), slots, None, length=n)


@functools.partial(jax.jit, static_argnames=("cfg", "limit", "top"), donate_argnames="slots")
def step_up_to(
    cfg: config.ModelConfig, weights: Weights, slots: Slots, n: Array, with_top: Array, limit: int, top: int
) -> tuple[Slots, Tokens]:
    """What `step` gives for any n up to `limit`, with the likeliest tokens or without, by one program.

    Args:
      n: int32; tokens [limit, B] have zeros after the first n.
      with_top: bool; without it there are zeros in place of the likeliest tokens, and they cost nothing.
    """
    B = len(slots.step_B)
    none = Tokens(
        ids=jnp.zeros((limit, B), jnp.int32),
        logprobs=jnp.zeros((limit, B)),
        top_ids=jnp.zeros((limit, B, top), jnp.int32),
        top_logprobs=jnp.zeros((limit, B, top)),
    )

    def add(i: jax.Array, state: tuple[Slots, Tokens]) -> tuple[Slots, Tokens]:
        slots, new = next_token(cfg, weights, state[0], top, with_top=with_top)
        return slots, jax.tree.map(lambda whole, part: whole.at[i].set(part), state[1], new)

    return jax.lax.fori_loop(0, n, add, (slots, none))


def next_token(
    cfg: config.ModelConfig, weights: Weights, slots: Slots, top: int = 0, greedy: bool = False, with_top: Array | bool = True
) -> tuple[Slots, Tokens]:
    """The same for one token, inside a program; n is left out of the shapes.

    Args:
      greedy: whether every row is known to ask for nothing but the likeliest token, which is less to compile.
      with_top: as in `step_up_to`.
    """
    logits_BV = _logits(weights, slots.hidden_BD)
    if greedy:
        token_B = logits_BV.argmax(axis=-1).astype(jnp.int32)
    else:
        token_B = choose(logits_BV, slots.choices, slots.seen_BV, jax.random.wrap_key_data(slots.key_B2), slots.step_B)
    tokens = Tokens(token_B, *_logprobs(logits_BV, token_B, top, with_top))
    x_B1D = weights.table_VD[token_B][:, None]
    hidden_B1D, cache = _forward(cfg, weights, x_B1D, slots.position_B[:, None], slots.cache)
    seen_BV = slots.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    slots = slots._replace(
        cache=cache,
        hidden_BD=hidden_B1D[:, 0],
        position_B=slots.position_B + 1,
        step_B=slots.step_B + 1,
        seen_BV=seen_BV,
    )
    return _place(slots), tokens


@functools.partial(jax.jit, donate_argnums=0)
def release(slots: Slots, slots_R: Array) -> Slots:
    """The slots, of which some are not in use: they choose the likeliest token, so that no work is done for their options."""
    neutral = stack([Sampling()])
    return slots._replace(choices=jax.tree.map(lambda a, b: a.at[slots_R].set(b[0]), slots.choices, neutral))


def _score(cfg: config.ModelConfig, weights: Weights, hidden_BSD: jax.Array, tokens_BS: jax.Array, top: int) -> Scores:
    """Scores from hidden states; never more than `logits_chunk` rows of logits at once."""
    B, S, D = hidden_BSD.shape
    chunk = min(B * S, cfg.compute.logits_chunk)
    padding = -B * S % chunk
    targets_T = jnp.pad(jnp.roll(tokens_BS, -1, axis=1).reshape(-1), (0, padding)).reshape(-1, chunk)
    hidden_TD = jnp.pad(hidden_BSD.reshape(-1, D), ((0, padding), (0, 0))).reshape(-1, chunk, D)
    scores = jax.lax.map(lambda c: Scores(*_logprobs(_logits(weights, c[0]), c[1], top)), (hidden_TD, targets_T))
    return jax.tree.map(
        lambda a: a.reshape(B * S + padding, *a.shape[2:])[: B * S].reshape(B, S, *a.shape[2:])[:, : S - 1], scores
    )


# --- the model ------------------------------------------------------------------------------------------------------


def _forward(
    cfg: config.ModelConfig,
    weights: Weights,
    x_BSD: jax.Array,
    positions_BS: jax.Array,
    cache: Sequence[Cache | None] | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Hidden states [B, S, D] after the last norm, and what the tokens leave in the cache; without one they begin the text."""
    batch = {"positions": positions_BS, "segment_ids": jnp.ones_like(positions_BS)}
    new = []
    for layer, layer_cache in zip(weights.layers, cache or [None] * len(weights.layers), strict=True):
        x_BSD, layer_cache = _block(dropless(cfg), layer, x_BSD, batch, layer_cache)
        new.append(layer_cache)
    return rms_norm(x_BSD, weights.norm_final_D, cfg.norm_eps), tuple(new)


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers of a kind
def _block(
    cfg: config.ModelConfig, layer: Params, x_BSD: jax.Array, batch: dict[str, jax.Array], cache: Cache | None
) -> tuple[jax.Array, Cache]:
    if parallel.axis_size(*parallel.MESH_AXES) > 1:
        # Tied to what goes in, so that weights are gathered when their layer begins: the compiler would take it out of the loop
        # over tokens, and every device would hold the whole model.
        layer, x_BSD = jax.lax.optimization_barrier((layer, x_BSD))
    variables = layer | ({"cache": {"attn": cache}} if cache else {})
    block = Block(cfg, "moe" in layer["params"])
    outputs, updates = block.apply(variables, x_BSD, batch, None, mutable=["cache"])
    return cast(tuple[jax.Array, object], outputs)[0], updates["cache"]["attn"]


def _logits(weights: Weights, hidden_XD: jax.Array) -> jax.Array:
    """[..., V] float32."""
    return jnp.einsum("...D,DV->...V", hidden_XD, weights.head_DV, preferred_element_type=jnp.float32)


def _logprobs(
    logits_XV: jax.Array, tokens_X: jax.Array, top: int, with_top: Array | bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities [...] of tokens, and ids and log-probabilities [..., top] of the likeliest."""
    # The barrier keeps the sum from being computed twice, in two orders: the same token would have two log-probabilities.
    logits_XV, sum_X1 = jax.lax.optimization_barrier((logits_XV, jax.nn.logsumexp(logits_XV, axis=-1, keepdims=True)))
    chosen_X = jnp.take_along_axis(logits_XV, tokens_X[..., None], axis=-1) - sum_X1

    def likeliest() -> tuple[jax.Array, jax.Array]:
        top_logits, top_ids = jax.lax.top_k(logits_XV, top)
        return top_ids.astype(jnp.int32), top_logits - sum_X1

    def nothing() -> tuple[jax.Array, jax.Array]:
        shape = (*tokens_X.shape, top)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape)

    if not top:
        return chosen_X[..., 0], *nothing()
    return chosen_X[..., 0], *(likeliest() if with_top is True else jax.lax.cond(with_top, likeliest, nothing))
