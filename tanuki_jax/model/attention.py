"""Grouped-query attention over the mesh: rows over devices, heads over `tensor`, tokens over `context`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from tanuki_jax import config, ops, parallel
from tanuki_jax.model.layers import apply_rope, parameter, project, rms_norm

Cache = Any
Batch = dict[str, jax.Array]


class Attention(nn.Module):
    """Grouped-query attention; with a cache, the new keys and values are written to the slots of their positions."""

    cfg: config.ModelConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, batch: Batch, cache: Cache) -> tuple[jax.Array, Cache]:
        cfg = self.cfg
        names = (("q", "DNH"), ("k", "DKH"), ("v", "DKH"))
        q_BSNH, k_BSKH, v_BSKH = (project(self, cfg, x_BSD, name, axes) for name, axes in names)
        if cfg.qk_norm:
            q_BSNH = rms_norm(q_BSNH, parameter(self, cfg, "norm_q", "H", "scale"), cfg.norm_eps)
            k_BSKH = rms_norm(k_BSKH, parameter(self, cfg, "norm_k", "H", "scale"), cfg.norm_eps)
        positions_BS = batch["positions"]
        q_BSNH = apply_rope(q_BSNH, positions_BS, cfg.rope_theta, scale=cfg.head_dim**-0.5)
        k_BSKH = apply_rope(k_BSKH, positions_BS, cfg.rope_theta)
        if cache is None:
            y_BSNH = attend(q_BSNH, k_BSKH, v_BSKH, batch["segment_ids"], cfg.compute.attention_impl, "balanced" in batch)
        else:
            rows_B1 = jnp.arange(q_BSNH.shape[0])[:, None]
            cache = {
                "k": cache["k"].at[rows_B1, positions_BS].set(k_BSKH),
                "v": cache["v"].at[rows_B1, positions_BS].set(v_BSKH),
            }
            y_BSNH = ops.cached_attention(q_BSNH, cache["k"], cache["v"], positions_BS)
        return project(self, cfg, y_BSNH, "o", "NHD", "outer", inner=2), cache


def attend(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BS: jax.Array, impl: str, balanced: bool
) -> jax.Array:
    """Attention of each device's rows and heads.

    Where the tokens of a row are split over `context`, a device gathers the keys and values of the whole row, which are
    small beside the queries' work: all-gather context parallelism as in Llama 3 (Grattafiori et al. 2024, section 3.3.2).
    With `balanced` the tokens lie in the order of `parallel.balanced_order`.
    """
    B, S, N, _ = q_BSNH.shape
    if not parallel.batch_is_sharded(B):
        return ops.attention(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, impl=impl)
    parts = parallel.axis_size("context")
    order_S = parallel.zigzag_order(S, parts) if balanced else np.arange(S)
    kernel = ops.splash_kernel(impl, order_S, S, N // parallel.axis_size("tensor"), parts)
    spec, mesh = parallel.activation_spec, jax.sharding.get_abstract_mesh()
    queries, keys, tokens = spec("BSNH"), spec("BSKH"), spec("BS")
    along_context = NamedSharding(mesh, PartitionSpec(None, "context"))
    kernel_spec = kernel.manual_sharding_spec(along_context) if kernel is not None else None

    def local(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, places_S, kernel):
        if parts == 1:
            return ops.attention(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, impl=impl)
        k_BSKH, v_BSKH = checkpoint_name(k_BSKH, "k"), checkpoint_name(v_BSKH, "v")  # before they are gathered
        back = np.argsort(order_S)
        k_BTKH, v_BTKH, segment_ids_BT = (
            jax.lax.all_gather(a, "context", axis=1, tiled=True)[:, back] for a in (k_BSKH, v_BSKH, segment_ids_BS)
        )
        return ops.attention(
            q_BSNH,
            k_BTKH,
            v_BTKH,
            segment_ids_BS,
            impl=impl,
            key_segment_ids_BT=segment_ids_BT,
            places_S=places_S,
            kernel=kernel,
        )

    arguments = (q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, jnp.asarray(order_S), kernel)
    specs = (queries, keys, keys, tokens, spec("S"), kernel_spec)
    return jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)(*arguments)
