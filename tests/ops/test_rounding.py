import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import ops

rounded = jax.jit(ops.round_stochastically)
KEY = jnp.array([3, 5], jnp.uint32)


def neighbours(x):
    """The numbers of bfloat16 next to a float32, towards zero and away from it."""
    bits = np.float32(x).view(np.uint32)
    low = (bits & 0xFFFF0000).astype(np.uint32)
    return low.view(np.float32), (low + np.uint32(1 << 16)).view(np.float32)


@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, -7e-20, 1e30, 3e-41, 1 + 2**-9, 1 + 2**-20])
def test_the_mean_is_the_number_and_only_its_neighbours_come(value):
    count, x = 1 << 18, np.float32(value)
    found = np.asarray(rounded(jnp.full((64, count // 64), x), KEY)).astype(np.float64)
    low, high = map(float, neighbours(x))
    assert set(np.unique(found)) <= {low, high}
    share = (float(x) - low) / (high - low)
    assert abs((found == high).mean() - share) < 5 * np.sqrt(share * (1 - share) / count) + 2**-16


def test_what_bfloat16_holds_stays_as_it_is():
    kept = jnp.array([0.0, -0.0, 1.0, -2.5, 2.0**-133, jnp.inf, -jnp.inf, 3.0e38], jnp.bfloat16)
    found = rounded(jnp.tile(kept.astype(jnp.float32), (500, 1)), KEY)
    np.testing.assert_array_equal(found.view(jnp.uint16), jnp.tile(kept, (500, 1)).view(jnp.uint16))
    assert found.dtype == jnp.bfloat16
    nan = jnp.array([0x7F800001, 0x7FC00000, 0xFFFFFFFF], jnp.uint32).view(jnp.float32)
    assert jnp.isnan(rounded(nan, KEY)).all()


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 6)])
def test_every_place_and_every_key_has_its_own_draw_whatever_the_shape(shape):
    x = jnp.full((*shape, 512), 1 + 2**-8 + 2**-9)[..., 0] if shape == () else jnp.full(shape, 1 + 2**-8 + 2**-9)
    found = rounded(x, KEY)
    assert found.shape == shape
    if shape == (3, 4, 6):
        flat = np.stack([np.asarray(rounded(x, KEY + i)).astype(np.float32).ravel() for i in range(200)])
        assert np.abs(np.corrcoef(flat.T) - np.eye(72)).max() < 0.4  # 5.6 deviations
        assert np.abs(np.corrcoef(flat) - np.eye(200)).max() < 0.7


def test_a_mesh_changes_no_bit():
    x = jax.random.normal(jax.random.key(0), (4, 16, 24))
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "a", "b"))
    whole, parts = rounded(x, KEY), jax.jit(ops.round_stochastically, out_shardings=split)(jax.device_put(x, split), KEY)
    np.testing.assert_array_equal(whole, parts)
    assert len(parts.sharding.device_set) == 8 and (whole != x.astype(jnp.bfloat16)).any()
