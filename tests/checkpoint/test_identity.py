import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint


def tree(**changes):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(4, 8)).astype(np.float32), "b": rng.normal(size=6).astype(np.float32)}
    return jax.tree.map(jnp.asarray, params | changes)


def test_the_same_bits_have_the_same_name_on_any_mesh():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    sharded = jax.device_put(tree()["a"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y")))
    assert checkpoint.fingerprint(tree()) == checkpoint.fingerprint(tree()) == checkpoint.fingerprint(tree(a=sharded))


@pytest.mark.parametrize("change", ["bit", "places", "shape", "dtype", "name"])
def test_any_change_gives_another_name(change):
    a = np.asarray(tree()["a"])
    changed = {
        "bit": lambda: tree(a=np.nextafter(a, np.where(np.arange(8) == 3, np.inf, a), dtype=np.float32)),
        "places": lambda: tree(a=a[:, ::-1]),
        "shape": lambda: tree(a=a.reshape(8, 4)),
        "dtype": lambda: tree(a=a.astype(jnp.bfloat16)),
        "name": lambda: {"a": tree()["a"], "c": tree()["b"]},
    }[change]()
    assert checkpoint.fingerprint(changed) != checkpoint.fingerprint(tree())
