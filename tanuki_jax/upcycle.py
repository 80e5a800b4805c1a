"""Upcycling: a dense parameter tree becomes a mixture of experts (Komatsuzaki et al. 2022; Tanuki-8x8B)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tanuki_jax import config
from tanuki_jax.errors import UserError


def upcycle(params: Any, cfg: config.Model, options: config.Upcycle, key: jax.Array) -> Any:
    """Every expert starts as the dense FFN; attention, norms, embedding and head stay as they are.

    Args:
      params: dense tree; `layers/mlp/{gate, up [L,D,F], down [L,F,D]}`.
      cfg: the mixture's shape (n_experts > 0, otherwise the dense model's).
      options: `copy`, or `noise`: N(0, noise_std) is added to every FFN weight of every expert, as Tanuki did with an
        absolute 1e-3 (the router is not part of the FFN).  The router is N(0, router_std).
      key: the only source of randomness; equal on any mesh.

    Returns:
      The tree with `layers/moe/{router [L,D,E], gate, up [L,E,D,F], down [L,E,F,D]}` in place of `mlp`.  With `copy` and a
      softmax over the chosen experts alone, the function computed is that of the dense model, whatever the router says.
    """
    for name in ("noise_std", "router_std"):
        if getattr(options, name) < 0:
            raise UserError(f"upcycle: {name} is {getattr(options, name)}; a standard deviation is not negative")
    layers = dict(params["layers"])
    if "mlp" not in layers:
        raise UserError("upcycle: the checkpoint is a mixture already; give a dense one")
    dense = layers.pop("mlp")
    router_key, noise_key = jax.random.split(key)
    keys = dict(zip(("gate", "up", "down"), jax.random.split(noise_key, 3), strict=True))

    def experts(name: str) -> jax.Array:
        weights = jnp.repeat(dense[name][:, None], cfg.n_experts, axis=1)
        if options.strategy == "noise":
            noise = jax.random.normal(keys[name], weights.shape, jnp.float32) * options.noise_std
            weights = (weights.astype(jnp.float32) + noise).astype(weights.dtype)
        return weights

    router = jax.random.normal(router_key, (cfg.n_layers, cfg.d_model, cfg.n_experts), jnp.float32) * options.router_std
    layers["moe"] = {"router": router.astype(dense["gate"].dtype), **{name: experts(name) for name in keys}}
    return {**params, "layers": layers}


def mixture_of(cfg: config.Model, n_experts: int, top_k: int, normalized_gate: bool) -> config.Model:
    """The mixture's config for a dense one."""
    if cfg.n_experts:
        raise UserError("upcycle: the checkpoint is a mixture already; give a dense one")
    if not 1 <= top_k <= n_experts:
        raise UserError(f"upcycle: top_k {top_k} must lie between 1 and n_experts {n_experts}")
    return dataclasses.replace(cfg, n_experts=n_experts, top_k=top_k, normalized_gate=normalized_gate)
