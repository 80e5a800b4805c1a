import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tanuki_jax import config, upcycle
from tanuki_jax.upcycle import packed_bf16
from tests.tiny import small

EVERY = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
FINITE = np.resize(EVERY[np.isfinite(EVERY.astype(np.float32))], (64, 1020))


def test_planes_are_the_even_and_the_odd_columns_of_every_number_there_is():
    even, odd = jax.jit(packed_bf16.planes)(packed_bf16.pack(FINITE))
    np.testing.assert_array_equal(even, FINITE[:, 0::2].astype(np.float32))
    np.testing.assert_array_equal(odd, FINITE[:, 1::2].astype(np.float32))
    [plain] = packed_bf16.planes(jnp.asarray(FINITE))
    np.testing.assert_array_equal(plain, FINITE.astype(np.float32))


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TIES = st.integers(0, 2**15 - 2).map(lambda n: float(np.uint32(n << 16 | 0x8000).view(np.float32)))


@given(arrays(np.float32, (4, 6), elements=FLOATS | TIES.filter(np.isfinite)))
def test_joined_planes_are_rounded_as_numpy_does(x):
    expected = x.astype(jnp.bfloat16)
    found = packed_bf16.unpack([x[:, 0::2], x[:, 1::2]], jnp.zeros((4, 3), jnp.uint32))
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(packed_bf16.unpack([jnp.asarray(x)], jnp.zeros((4, 6), jnp.bfloat16)), expected)


def test_what_lies_beside_a_matrix_lies_beside_its_planes():
    w = np.random.default_rng(0).normal(size=(6, 10)).astype(jnp.bfloat16)
    expected = w.astype(np.float32) * np.arange(10, dtype=np.float32) * np.arange(6, dtype=np.float32)[:, None]
    for of, step in ((jnp.asarray(w), 1), (jnp.asarray(packed_bf16.pack(w)), 2)):
        across, down = packed_bf16.across(jnp.arange(10.0), of), packed_bf16.down(jnp.arange(6.0), of)
        planes = [part * a * b for part, a, b in zip(packed_bf16.planes(of), across, down, strict=True)]
        for start, part in enumerate(planes):
            np.testing.assert_array_equal(part, expected[:, start::step])


@pytest.mark.parametrize("options", [dict(strategy="noise", noise_std=0.3), dict(strategy="drop", drop_ratio=0.4)])
def test_an_expert_made_of_pairs_is_the_one_made_of_numbers(options):
    source = small(n_layers=1, d_model=34, d_ff=70, param_dtype="bfloat16")
    rng, shapes = np.random.default_rng(0), {"gate": (34, 70), "up": (34, 70), "down": (70, 34)}
    weights = {name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for name, shape in shapes.items()}
    cfg, chosen = upcycle.moe_config(source, n_experts=2), config.Upcycle(**options)

    @jax.jit
    def made(given):
        return upcycle.expert(given, upcycle.strategy_stats(weights, chosen), 1, 0, cfg, chosen, jax.random.key(3))

    plain = made(weights)
    paired = made({name: packed_bf16.pack(np.asarray(w)) for name, w in weights.items()})
    for name in shapes:
        found, expected = (np.asarray(w).view(jnp.bfloat16) for w in (paired[name], plain[name]))
        assert (found != np.asarray(weights[name])).mean() > 0.3
        np.testing.assert_array_equal(found, expected)
