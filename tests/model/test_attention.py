"""Attention over the mesh equals attention on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import config, ops, parallel
from tanuki_jax.model.attention import attend

MESHES = {
    "context 2": dict(fsdp=1, context=2),
    "context 4": dict(fsdp=1, context=4),
    "fsdp 2 x context 2 x tensor 2": dict(fsdp=2, context=2, tensor=2),
    "fsdp 2 x tensor 2": dict(fsdp=2, tensor=2),
}
CASES = [
    pytest.param("xla", 24, 8, "context 2", True, marks=pytest.mark.slow),
    ("xla", 24, 8, "context 2", False),
    ("xla", 24, 8, "context 4", True),
    ("xla", 24, 8, "fsdp 2 x context 2 x tensor 2", True),
    ("xla", 24, 8, "fsdp 2 x tensor 2", False),
    pytest.param("splash", 512, 128, "context 2", True, marks=pytest.mark.slow),
    ("splash", 512, 128, "context 2", False),
    ("splash", 512, 128, "fsdp 2 x context 2 x tensor 2", True),
    ("splash", 130, 128, "fsdp 2 x tensor 2", False),
]


def inputs(S, H):
    rng = np.random.default_rng(0)
    q, k, v, c = (jnp.float32(rng.normal(size=(2, S, heads, H))) for heads in (4, 2, 2, 4))
    cut = S // 3
    segments = jnp.array([[1] * cut + [2] * (S - cut), [1] * (S - 5) + [0] * 5], jnp.int32)
    return q, k, v, c * (segments > 0)[..., None, None], segments


@functools.cache
def on_one_device(S, H):
    q, k, v, c, segments = inputs(S, H)

    def value(q, k, v):
        y = ops.attention(q, k, v, segments, impl="xla")
        return (y * c).sum(), y * (c != 0)

    (_, y), grads = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(q, k, v)
    return y, *grads


@pytest.mark.parametrize(("impl", "S", "H", "mesh", "zigzag"), CASES)
def test_a_mesh_changes_no_output_and_no_gradient(impl, S, H, mesh, zigzag):
    sizes = config.Mesh(**MESHES[mesh])
    mesh = parallel.make_mesh(sizes, jax.devices()[: sizes.fsdp * sizes.context * sizes.tensor])
    order = parallel.zigzag_order(S, sizes.context) if zigzag else np.arange(S)
    q, k, v, c, segments = inputs(S, H)

    def on_mesh(q, k, v):
        y = attend(q[:, order], k[:, order], v[:, order], segments[:, order], impl, zigzag)[:, np.argsort(order)]
        return (y * c).sum(), y * (c != 0)

    with jax.set_mesh(mesh):
        (_, found), grads = jax.jit(jax.value_and_grad(on_mesh, (0, 1, 2), has_aux=True))(q, k, v)
    for a, b in zip((found, *grads), on_one_device(S, H), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
