import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tanuki_jax import config, model, parallel
from tanuki_jax.errors import UserError
from tests.tiny import small

SIZES = {  # sizes that are set -> the shape over 8 devices: data, fsdp, expert, context, tensor
    "rest to fsdp": (dict(), (1, 8, 1, 1, 1)),
    "rest to data": (dict(data=-1, fsdp=2), (4, 2, 1, 1, 1)),
    "all given": (dict(data=2, fsdp=4), (2, 4, 1, 1, 1)),
    "nothing left": (dict(data=8), (8, 1, 1, 1, 1)),
    "three axes": (dict(expert=2, context=2), (1, 2, 2, 2, 1)),
    "rest to tensor": (dict(fsdp=1, expert=2, tensor=-1), (1, 1, 2, 1, 4)),
    "slices": (dict(slices=2, data=2), (4, 2, 1, 1, 1)),
    "rest of a slice": (dict(slices=2, data=-1, fsdp=2), (4, 2, 1, 1, 1)),
}


@pytest.mark.parametrize("case", SIZES)
def test_minus_one_stands_for_the_devices_that_are_left(case):
    sizes, shape = SIZES[case]
    mesh = parallel.make_mesh(config.Mesh(**sizes))
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp", "expert", "context", "tensor")
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


def test_only_data_crosses_slices():
    mesh = parallel.make_mesh(config.Mesh(slices=2, data=2, fsdp=1, tensor=2))
    slices = np.array([d.id // 4 for d in mesh.devices.flat]).reshape(mesh.devices.shape)
    assert (slices[:2] == 0).all() and (slices[2:] == 1).all()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(data=3), "6 places for 8 devices"),
        (dict(data=2, fsdp=2), "4 places for 8 devices"),
        (dict(data=-1), "one of the axes may be -1"),
        (dict(data=0), "positive"),
        (dict(tensor=-2), "positive"),
        (dict(data=16), "for 8 devices"),
        (dict(slices=3), "'slices': 3.* for 8 devices"),
        (dict(slices=-1), "positive"),
        (dict(slices=0), "positive"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(sizes, words):
    with pytest.raises(UserError, match=words):
        parallel.make_mesh(config.Mesh(**sizes))


def test_parameters_are_split_over_fsdp_along_d_or_f_where_it_divides():
    mesh = parallel.make_mesh(config.Mesh(data=2, fsdp=4))
    for cfg, splits in ((small(d_model=32, d_ff=64), True), (small(d_model=30, d_ff=62), False)):
        axes, shapes = model.logical_axes(cfg), model.parameter_shapes(cfg)
        shardings = jax.tree.leaves(parallel.tree_shardings(mesh, axes, shapes))
        letters = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
        for names, sharding in zip(letters, shardings, strict=True):
            first = next(n for n in names if n in "DF")
            assert [n for n, over in zip(names, sharding.spec, strict=True) if over] == ([first] if splits else [])


@pytest.mark.parametrize(("rows", "gradient_accumulation_steps", "each"), [(8, 1, 1), (32, 1, 4), (32, 2, 2)])
def test_rows_of_a_device(rows, gradient_accumulation_steps, each):
    assert parallel.per_device_rows(parallel.make_mesh(config.Mesh()), rows, gradient_accumulation_steps) == each


def test_a_batch_that_does_not_divide_names_the_next_size_that_does():
    with pytest.raises(UserError, match="batch_size 24 .* use a multiple of 16"):
        parallel.per_device_rows(parallel.make_mesh(config.Mesh()), 24, 2)


def test_constraints_split_the_batch_over_all_devices_and_do_nothing_without_a_mesh():
    x = jnp.arange(8.0 * 6).reshape(8, 2, 3)
    np.testing.assert_array_equal(parallel.constrain(x, "BSD"), x)
    mesh = parallel.make_mesh(config.Mesh(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: parallel.constrain(x, "BSD"))(x)
        assert split.sharding.is_equivalent_to(jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), 3)
        odd = jax.jit(lambda x: parallel.constrain(x, "BSD"))(x[:3])  # a few rows while decoding
        whole = jax.jit(lambda w: parallel.unshard(w, "VDH", whole=True))(split)
    np.testing.assert_array_equal(split, x)
    np.testing.assert_array_equal(odd, x[:3])
    assert whole.sharding.is_fully_replicated
