"""Grouped-query attention over the mesh: rows over devices, heads over `tensor`, tokens over `context`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from tanuki_jax import config, ops, parallel
from tanuki_jax.model.layers import Matrix, apply_rope, parameter, project, rms_norm

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel

Cache: TypeAlias = dict[str, jax.Array]  # k and v of a layer, [B, K, M, H] for M positions
Batch: TypeAlias = dict[str, jax.Array]  # tokens, segment_ids, positions, ... (docs/architecture.md)
INPUTS = (Matrix("q", "DNH"), Matrix("k", "DKH"), Matrix("v", "DKH"))
OUTPUT = Matrix("o", "NHD", "residual_out", inputs=2)


class Attention(nn.Module):
    """Grouped-query attention.

    The collection "cache" (a `Cache`) is for decoding.  Where it holds keys and values, those of the new tokens, one of each
    row, are added to it and the queries see all of it; where it is empty and may be written, it becomes what the tokens leave.

    zigzag: whether the tokens lie in `parallel.zigzag_order`.
    """

    cfg: config.ModelConfig
    zigzag: bool = False

    @nn.compact
    def __call__(self, x_BSD: jax.Array, batch: Batch, dropout_rate: jax.Array | None = None) -> jax.Array:
        cfg = self.cfg
        q_BSNH, k_BSKH, v_BSKH = (project(self, cfg, x_BSD, matrix, dropout_rate, self.zigzag) for matrix in INPUTS)
        if cfg.qk_norm:
            q_BSNH = rms_norm(q_BSNH, parameter(self, cfg, "norm_q", "H", "scale"), cfg.norm_eps)
            k_BSKH = rms_norm(k_BSKH, parameter(self, cfg, "norm_k", "H", "scale"), cfg.norm_eps)
        positions_BS = batch["positions"]
        q_BSNH = apply_rope(q_BSNH, positions_BS, cfg.rope_theta, scale=cfg.head_dim**-0.5)
        k_BSKH = apply_rope(k_BSKH, positions_BS, cfg.rope_theta)
        if self.has_variable("cache", "k"):
            k_BKMH, v_BKMH = (
                add_to_cache(self.get_variable("cache", name), new_BSKH[:, 0], positions_BS[:, 0])
                for name, new_BSKH in (("k", k_BSKH), ("v", v_BSKH))
            )
            y_BSNH = ops.cached_attention(q_BSNH, k_BKMH, v_BKMH, positions_BS)
        else:
            k_BKMH, v_BKMH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
            y_BSNH = attend(q_BSNH, k_BSKH, v_BSKH, batch["segment_ids"], cfg.compute.attention_impl, self.zigzag)
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", "k", k_BKMH)
            self.put_variable("cache", "v", v_BKMH)
        return project(self, cfg, y_BSNH, OUTPUT, dropout_rate, self.zigzag)


def add_to_cache(cache_BKMH: jax.Array, new_BKH: jax.Array, positions_B: jax.Array) -> jax.Array:
    """The cache with each row's new key or value at the row's position; a position past the end is left out."""

    def add(cache_KMH: jax.Array, new_KH: jax.Array, position: jax.Array) -> jax.Array:
        return cache_KMH.at[:, position].set(new_KH)

    return jax.vmap(add)(cache_BKMH, new_BKH, positions_B)


def attend(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BS: jax.Array, impl: str, zigzag: bool
) -> jax.Array:
    """Attention of each device's rows and heads.

    Where the tokens of a row are split over `context`, a device gathers the keys and values of the whole row, which are
    small next to the queries' work: all-gather context parallelism as in Llama 3 (Grattafiori et al. 2024, section 3.3.2).
    With `zigzag` the tokens lie in the order of `parallel.zigzag_order`.
    """
    B, S, N, _ = q_BSNH.shape
    if not parallel.batch_is_sharded(B):
        return ops.attention(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, impl=impl)
    shards = parallel.axis_size("context")
    order_S = parallel.zigzag_order(S, shards) if zigzag else np.arange(S)
    kernel = ops.splash_kernel(impl, order_S, S, N // parallel.axis_size("tensor"), shards)
    spec, mesh = parallel.activation_spec, jax.sharding.get_abstract_mesh()
    queries, keys, tokens = spec("BSNH"), spec("BSKH"), spec("BS")
    along_context = NamedSharding(mesh, PartitionSpec(None, "context"))
    kernel_spec = kernel.manual_sharding_spec(along_context) if kernel is not None else None

    def attend_local(
        q_BSNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        segment_ids_BS: jax.Array,
        query_positions_S: jax.Array,
        kernel: SplashAttentionKernel | None,
    ) -> jax.Array:
        if shards == 1:
            return ops.attention(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, impl=impl)
        k_BSKH, v_BSKH = checkpoint_name(k_BSKH, "k"), checkpoint_name(v_BSKH, "v")  # before they are gathered
        inverse = np.argsort(order_S)
        k_BTKH, v_BTKH, segment_ids_BT = (
            jax.lax.all_gather(a, "context", axis=1, tiled=True)[:, inverse] for a in (k_BSKH, v_BSKH, segment_ids_BS)
        )
        return ops.attention(
            q_BSNH,
            k_BTKH,
            v_BTKH,
            segment_ids_BS,
            impl=impl,
            key_segment_ids_BT=segment_ids_BT,
            query_positions_S=query_positions_S,
            kernel=kernel,
        )

    arguments = (q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, jnp.asarray(order_S), kernel)
    specs = (queries, keys, keys, tokens, spec("S"), kernel_spec)
    return jax.shard_map(attend_local, in_specs=specs, out_specs=queries, check_vma=False)(*arguments)
