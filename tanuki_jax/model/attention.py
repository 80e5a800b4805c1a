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

Cache: TypeAlias = dict[str, jax.Array]  # k and v, [B, M, K, H] of a layer or [L, B, M, K, H] of all
Batch: TypeAlias = dict[str, jax.Array]  # tokens, segment_ids, positions, ... (docs/architecture.md)
INPUTS = (Matrix("q", "DNH"), Matrix("k", "DKH"), Matrix("v", "DKH"))
OUTPUT = Matrix("o", "NHD", "residual_out", inputs=2)


class Attention(nn.Module):
    """Grouped-query attention; with a cache, the new keys and values are written to the slots of their positions.

    zigzag: whether the tokens lie in `parallel.zigzag_order`.
    """

    cfg: config.ModelConfig
    zigzag: bool = False

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, batch: Batch, cache: Cache | None = None, dropout_rate: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.cfg
        q_BSNH, k_BSKH, v_BSKH = (project(self, cfg, x_BSD, matrix, dropout_rate, self.zigzag) for matrix in INPUTS)
        if cfg.qk_norm:
            q_BSNH = rms_norm(q_BSNH, parameter(self, cfg, "norm_q", "H", "scale"), cfg.norm_eps)
            k_BSKH = rms_norm(k_BSKH, parameter(self, cfg, "norm_k", "H", "scale"), cfg.norm_eps)
        positions_BS = batch["positions"]
        q_BSNH = apply_rope(q_BSNH, positions_BS, cfg.rope_theta, scale=cfg.head_dim**-0.5)
        k_BSKH = apply_rope(k_BSKH, positions_BS, cfg.rope_theta)
        if cache is None:
            y_BSNH = attend(q_BSNH, k_BSKH, v_BSKH, batch["segment_ids"], cfg.compute.attention_impl, self.zigzag)
        else:
            rows_B1 = jnp.arange(q_BSNH.shape[0])[:, None]
            cache = {
                "k": cache["k"].at[rows_B1, positions_BS].set(k_BSKH),
                "v": cache["v"].at[rows_B1, positions_BS].set(v_BSKH),
            }
            y_BSNH = ops.cached_attention(q_BSNH, cache["k"], cache["v"], positions_BS)
        return project(self, cfg, y_BSNH, OUTPUT, dropout_rate, self.zigzag), cache


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
