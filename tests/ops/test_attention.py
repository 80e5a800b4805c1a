import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo

from tanuki_jax import config, model, ops
from tanuki_jax.ops import cudnn


def inputs(S, N, K, H=8, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, S, heads, H), dtype) for key, heads in zip(keys, (N, K, K), strict=True))
    segments = jnp.array([[1] * (S // 3) + [2] * (S - S // 3), [1] * (S - 2) + [0] * 2], jnp.int32)
    return q, k, v, segments


def value_and_gradients(impl, q, k, v, segments):
    """The output where there are tokens, and the gradients of a sum over them."""
    valid = (segments > 0)[..., None, None]

    def total(q, k, v):
        y = jnp.where(valid, ops.attention(q * q.shape[-1] ** -0.5, k, v, segments, impl=impl), 0)
        return (y.astype(jnp.float32) ** 2).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return y, *grads


@pytest.mark.parametrize(
    ("impl", "S", "N", "K", "H"),
    [
        ("xla", 7, 4, 4, 8),
        ("xla", 16, 4, 2, 8),
        ("xla", 33, 6, 1, 8),
        ("xla", 130, 8, 2, 8),
        pytest.param("splash", 128, 2, 2, 128, marks=pytest.mark.slow),
        ("splash", 130, 4, 2, 128),
        ("splash", 200, 4, 1, 64),
    ],
)
def test_equals_the_reference_in_value_and_gradient(impl, S, N, K, H):
    arguments = inputs(S, N, K, H)
    found, expected = (value_and_gradients(i, *arguments) for i in (impl, "reference"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def runs(ids, capacity):
    """Lengths and starts of the first runs of equal ids in a row, filled up with -1."""
    lengths = [len(list(run)) for _, run in itertools.groupby(ids)]
    starts = np.cumsum([0, *lengths])[:-1]
    return [([*a[:capacity], *[-1] * size])[:size] for a, size in ((lengths, capacity), (starts, capacity + 1))]


segments = jax.jit(cudnn.segments, static_argnums=1)


@hypothesis.given(
    st.sampled_from([1, 2, 12]).flatmap(
        lambda S: st.lists(st.lists(st.integers(0, 3), min_size=S, max_size=S), min_size=3, max_size=3)
    ),
    st.sampled_from([2, 5, 12]),
)
@hypothesis.settings(deadline=None, max_examples=100)
def test_cudnn_gets_the_length_and_the_start_of_every_segment(rows, capacity):
    found = segments(jnp.array(rows, jnp.int32), capacity)
    np.testing.assert_array_equal(found[0], [runs(row, capacity)[0] for row in rows])
    np.testing.assert_array_equal(found[1], [runs(row, capacity)[1] for row in rows])


@pytest.fixture
def hopper(monkeypatch):
    """As if there were a GPU and cuDNN; enough to trace for."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "_packs", lambda N, K: True)


@pytest.mark.parametrize(("remat", "forwards"), [("dots", 4), ("attention", 4), ("full", 9)])
def test_a_remat_policy_that_keeps_attention_keeps_what_cudnn_needs(hopper, remat, forwards):
    """Forward once for each of four ways to tell it the segments, or again (the mask's a third time) where it keeps nothing."""
    compute = config.Compute(dtype="bfloat16", attention_impl="cudnn", remat=remat)
    cfg = config.ModelConfig(d_model=64, n_layers=2, d_ff=64, n_heads=4, n_kv_heads=2, head_dim=16, compute=compute)
    batch = {name: jnp.ones((2, 512), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    loss = jax.grad(lambda params: model.apply(cfg, params, batch).hidden.astype(jnp.float32).sum())
    program = str(jax.make_jaxpr(loss)(model.parameter_shapes(cfg)))
    assert program.count("dot_product_attention_fwd_wrapper[") == forwards
    assert program.count("dot_product_attention_bwd_wrapper[") == 4


def packed(S, counts):
    """Segment ids of rows with so many segments of uneven lengths, and some padding after them where there is room."""
    rows = []
    for count in counts:
        cuts = np.sort(np.random.default_rng(count).choice(np.arange(1, S - 3), count, replace=False))
        rows.append(np.searchsorted(cuts, np.arange(S), side="right") + 1)
        rows[-1][cuts[-1] :] = 0
    return jnp.array(rows, jnp.int32)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU: TANUKI_TEST_PLATFORM=cuda")
@pytest.mark.parametrize(
    ("S", "K", "counts"),
    [(64, 2, (1, 1)), (130, 4, (1, 2)), (512, 2, (3, 6)), (1000, 1, (14, 1)), (2048, 2, (7, 1)), (512, 2, (60, 3))],
)
def test_cudnn_equals_the_reference_in_value_and_gradient(S, K, counts):
    q, k, v, _ = inputs(S, 4, K, 64, "bfloat16")
    arguments = (q, k, v, packed(S, counts))
    found, expected = (value_and_gradients(i, *arguments) for i in ("cudnn", "reference"))
    for a, b in zip(found, expected, strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert jnp.linalg.norm(a - b) < 1e-2 * jnp.linalg.norm(b)


def test_an_unknown_impl_is_an_error():
    with pytest.raises(ValueError, match="flash"):
        ops.attention(*inputs(8, 2, 2), impl="flash")


@pytest.mark.parametrize(("impl", "H"), [("xla", 8), ("splash", 128)])
def test_nothing_leaks_from_later_tokens_or_other_segments(impl, H):
    q, k, v, segments = inputs(12, 4, 2, H)
    attention = jax.jit(lambda k, v: ops.attention(q, k, v, segments, impl=impl))
    out = attention(k, v)
    changed = attention(k.at[0, 4:].add(1.0), v.at[0, 4:].add(1.0))  # row 0: segment 2 begins at 4
    np.testing.assert_array_equal(out[0, :4], changed[0, :4])
    assert jnp.abs(out[0, 5:] - changed[0, 5:]).max() > 1e-3
    changed = attention(k.at[0, :4].add(1.0), v.at[0, :4].add(1.0))
    np.testing.assert_array_equal(out[0, 4:], changed[0, 4:])


def test_low_precision_inputs_keep_a_float32_softmax():
    q, k, v, segments = inputs(64, 4, 2)
    low = ops.attention(*(a.astype(jnp.bfloat16) for a in (q, k, v)), segments)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), ops.attention(q, k, v, segments), atol=0.05)


def test_splash_refuses_parts_that_its_blocks_do_not_divide():
    assert ops.splash_kernel("xla", np.arange(256), 256, 2, 2) is None
    with pytest.raises(ValueError, match="256 tokens over 2 devices; each needs a multiple of 256"):
        ops.splash_kernel("splash", np.arange(256), 256, 2, 2)
