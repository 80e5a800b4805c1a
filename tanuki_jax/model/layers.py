"""The small pieces of the transformer: parameters named by their axis letters, norm, rotary positions."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tanuki_jax import config, ops, parallel

FFN_MATRICES = ("gate", "up", "down")  # of a SwiGLU FFN, dense or an expert

# How a parameter is initialized: "input" is N(0, init_std); "residual_out" writes to the residual stream and is divided by
# sqrt(2L), as in Megatron-LM; "scale" is 1, "zero" is 0.
Kind: TypeAlias = Literal["input", "residual_out", "scale", "zero"]


class Matrix(NamedTuple):
    """A parameter that multiplies activations: its name, its axis letters, "DNH" say, and how many of them are inputs."""

    name: str
    axes: str
    kind: Kind = "input"
    inputs: int = 1


def axis_sizes(cfg: config.ModelConfig, expert: bool = False) -> dict[str, int]:
    """The size of each axis letter of the parameters of a layer; with `expert`, F is that of an expert."""
    return {
        "V": cfg.vocab_size,
        "D": cfg.d_model,
        "F": cfg.expert_d_ff if expert and cfg.expert_d_ff else cfg.d_ff,
        "N": cfg.n_heads,
        "K": cfg.n_kv_heads,
        "H": cfg.head_dim,
        "E": cfg.n_experts,
    }


def parameter(
    module: nn.Module, cfg: config.ModelConfig, name: str, axes: str, kind: Kind = "input", expert: bool = False
) -> jax.Array:
    """A parameter whose shape follows from its axis letters, in its `parameter_dtype`; `expert` as in `axis_sizes`."""
    sizes = axis_sizes(cfg, expert)
    std = cfg.init_std / (2 * cfg.n_layers) ** 0.5 if kind == "residual_out" else cfg.init_std
    constant = {"scale": nn.initializers.ones, "zero": nn.initializers.zeros}
    initializer = constant.get(kind) or nn.initializers.normal(std)

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
        return initializer(key, shape, jnp.float32).astype(dtype)  # in bfloat16 there are 128 random numbers between 1 and 2

    partitioned = nn.with_logical_partitioning(initialize, tuple(axes))
    return cast(jax.Array, module.param(name, partitioned, tuple(sizes[a] for a in axes), parameter_dtype(cfg, name)))


def is_vector(name: str) -> bool:
    """Whether a parameter, by its name or path, is the scale of a norm or a bias: small, always float32, and not decayed."""
    return name.rpartition("/")[2].startswith(("norm", "bias"))


def parameter_dtype(cfg: config.ModelConfig, name: str) -> str:
    """The dtype in which a parameter is stored: float32 for norms and biases, else `param_dtype`."""
    return "float32" if is_vector(name) else cfg.param_dtype


def unsharded_param(module: nn.Module, cfg: config.ModelConfig, name: str, axes: str, kind: Kind = "input") -> jax.Array:
    """A parameter in the compute dtype, gathered from the devices that store its parts."""
    return parallel.unshard(parameter(module, cfg, name, axes, kind).astype(compute_dtype(cfg)), axes)


def project(
    module: nn.Module,
    cfg: config.ModelConfig,
    x: jax.Array,
    matrix: Matrix,
    dropout_rate: jax.Array | None = None,
    zigzag: bool = False,
) -> jax.Array:
    """x [..., *in] times a matrix [*in, *out], plus its adapter's product where it has one (model/lora.py).

    dropout_rate: of the inputs of the adapter, with random numbers from the module's "dropout" key; None is no dropout.
    zigzag: whether the tokens of x lie in `parallel.zigzag_order`; a token's dropout is that of its place in the row.
    """
    name, axes, kind, inputs = matrix
    y = ops.linear(x, unsharded_param(module, cfg, name, axes, kind), inputs)
    if not module.has_variable("lora", name):
        return y
    adapter: dict[str, jax.Array] = module.get_variable("lora", name)
    a = parallel.unshard(adapter["a"].astype(x.dtype), axes[:inputs] + "r")
    b = parallel.unshard(adapter["b"].astype(x.dtype), "r" + axes[inputs:])
    if dropout_rate is not None:
        mask = dropout_mask(module.make_rng("dropout"), dropout_rate, x.shape)
        if zigzag:
            mask = mask[:, parallel.zigzag_order(x.shape[1], parallel.axis_size("context"))]
        # The barrier keeps the compiler from repeating the random numbers, and the norm, for every block of the product.
        x = jax.lax.optimization_barrier(jnp.where(mask, x / (1 - dropout_rate).astype(x.dtype), 0))
    return y + adapter["scale"].astype(x.dtype) * ops.linear(ops.linear(x, a, inputs), b)


def dropout_mask(key: jax.Array, rate: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Which entries dropout keeps, bool, each with probability 1 - rate to within 2^-17: two from every random word."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    halves = jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., : shape[-1]]
    return halves < jnp.round((1 - rate) * 2**16).astype(jnp.uint32)


def param_with_lora(
    module: nn.Module, cfg: config.ModelConfig, name: str, axes: str, kind: Kind = "input", expert: bool = False
) -> jax.Array:
    """Weight with its LoRA delta merged, for ops that are not a plain matmul (experts, router)."""
    w = parameter(module, cfg, name, axes, kind, expert)
    if not module.has_variable("lora", name):
        return w
    adapter: dict[str, jax.Array] = module.get_variable("lora", name)
    product = jnp.einsum("...ir,...ro->...io", adapter["a"], adapter["b"], precision="highest")
    return parallel.constrain_as_stored(w + adapter["scale"] * product, axes)


def compute_dtype(cfg: config.ModelConfig) -> jnp.dtype:
    """The dtype of matrix products; `auto` is bfloat16 on accelerators and float32 on CPU."""
    if cfg.compute.dtype == "auto":
        return jnp.dtype("float32" if ops.platform() == "cpu" else "bfloat16")
    return jnp.dtype(cfg.compute.dtype)


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019); statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    inverse = checkpoint_name(jax.lax.rsqrt((x32**2).mean(axis=-1, keepdims=True) + eps), "norm")
    return (x32 * inverse * scale_D.astype(jnp.float32)).astype(x.dtype)


def apply_rope(x_BSNH: jax.Array, positions_BS: jax.Array, theta: float, scale: float = 1.0) -> jax.Array:
    """Rotary position encoding (Su et al. 2021) in the half-split layout of Llama, times `scale`; in float32."""
    H = x_BSNH.shape[-1]
    frequencies = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angles = jnp.tile(positions_BS[:, :, None, None].astype(jnp.float32) * frequencies, 2)
    return _rope(x_BSNH, scale * jnp.cos(angles), scale * jnp.sin(angles))


@jax.custom_vjp
def _rope(x_BSNH: jax.Array, cos_BS1H: jax.Array, sin_BS1H: jax.Array) -> jax.Array:
    rotated_BSNH = _rotate_half(x_BSNH).astype(jnp.float32)
    return (x_BSNH.astype(jnp.float32) * cos_BS1H + rotated_BSNH * sin_BS1H).astype(x_BSNH.dtype)


def _rope_forward(x_BSNH: jax.Array, cos_BS1H: jax.Array, sin_BS1H: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rope(x_BSNH, cos_BS1H, sin_BS1H), (cos_BS1H, sin_BS1H)


def _rope_backward(residuals: tuple[jax.Array, jax.Array], gradient_BSNH: jax.Array) -> tuple[jax.Array, None, None]:
    cos_BS1H, sin_BS1H = residuals
    return _rope(gradient_BSNH, cos_BS1H, -sin_BS1H), None, None  # back by the same angles


_rope.defvjp(_rope_forward, _rope_backward)


def _rotate_half(x: jax.Array) -> jax.Array:
    """The halves of the last axis (a, b) as (-b, a)."""
    half = x.shape[-1] // 2
    if ops.on_tpu():  # as a product, what follows is fused into it; lanes that change places would be written out
        matrix = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=1) * jnp.where(jnp.arange(2 * half) < half, -1, 1)
        return jnp.matmul(x, matrix.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
