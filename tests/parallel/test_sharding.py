"""Where arrays lie: the table of rules, applied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tanuki_jax import config, model, parallel
from tests.tiny import init, small


def mesh(**sizes):
    return parallel.make_mesh(config.Mesh(**sizes))


EXPERTS = dict(fsdp=2, expert=2, tensor=2)
CONTEXT = dict(fsdp=2, context=2, tensor=2)
REPLICAS = dict(data=2, fsdp=4)
BOTH = ("fsdp", "expert")
SPECS = [
    (EXPERTS, "stored", "EDF", ("expert", "fsdp", "tensor")),
    (EXPERTS, "stored", "EFD", ("expert", ("tensor", "fsdp"), None)),
    (EXPERTS, "stored", "LEDF", (None, "expert", "fsdp", "tensor")),
    (EXPERTS, "stored", "DE", (BOTH, None)),
    (EXPERTS, "stored", "DNH", (BOTH, "tensor", None)),
    (EXPERTS, "stored", "DKH", (BOTH, "tensor", None)),
    (EXPERTS, "stored", "NHD", ("tensor", None, BOTH)),
    (EXPERTS, "stored", "DF", (BOTH, "tensor")),
    (EXPERTS, "stored", "VD", ("tensor", BOTH)),
    (EXPERTS, "stored", "D", (BOTH,)),
    (EXPERTS, "used", "EDF", ("expert", None, "tensor")),
    (EXPERTS, "used", "DNH", (None, "tensor", None)),
    (EXPERTS, "used", "VD", ("tensor", None)),
    (EXPERTS, "activation", "BSD", (BOTH, None, None)),
    (EXPERTS, "activation", "BSNH", (BOTH, None, "tensor", None)),
    (CONTEXT, "stored", "DNH", (("fsdp", "context"), "tensor", None)),
    (CONTEXT, "stored", "EDF", (None, ("fsdp", "context"), "tensor")),
    (CONTEXT, "used", "DF", (None, "tensor")),
    (CONTEXT, "activation", "BSD", ("fsdp", "context", None)),
    (CONTEXT, "activation", "BSKH", ("fsdp", "context", "tensor", None)),
    (CONTEXT, "activation", "BSV", ("fsdp", "context", "tensor")),
    (REPLICAS, "stored", "DNH", ("fsdp", None, None)),
    (REPLICAS, "used", "DNH", (None, None, None)),
    (REPLICAS, "activation", "BS", (("data", "fsdp"), None)),
]


@pytest.mark.parametrize(("sizes", "layout", "axes", "expected"), SPECS)
def test_which_mesh_axes_an_axis_is_split_over(sizes, layout, axes, expected):
    assert tuple(parallel.spec(axes, layout, mesh(**sizes))) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        ("DNH", (32, 4, 8), (BOTH, "tensor", None)),
        ("DNH", (30, 4, 8), ("fsdp", "tensor", None)),
        ("DNH", (31, 4, 8), (None, "tensor", None)),
        ("DKH", (32, 1, 8), (BOTH, None, None)),
        ("EDF", (3, 32, 48), (None, BOTH, "tensor")),
        ("VD", (97, 32), (None, BOTH)),
    ],
)
def test_an_axis_that_does_not_divide_stays_whole_and_leaves_its_devices_to_others(axes, shape, expected):
    assert tuple(parallel.spec(axes, "stored", mesh(**EXPERTS), shape)) == expected


@pytest.mark.parametrize("sizes", [EXPERTS, CONTEXT, dict(fsdp=8), dict(fsdp=1, tensor=2, expert=4), dict(data=2, context=4)])
def test_every_matrix_is_stored_in_as_many_parts_as_a_replica_has_devices(sizes):
    cfg, where = small(n_experts=4, n_kv_heads=4, d_model=64), mesh(**sizes)
    shapes = model.parameter_shapes(cfg)
    parts = 8 // where.shape["data"]
    for path, (shape, stored) in zip_leaves(shapes, parallel.tree_shardings(where, model.logical_axes(cfg), shapes)):
        share = np.prod(shape.shape) / np.prod(stored.shard_shape(shape.shape))
        assert share == parts / (where.shape["tensor"] if "norm" in path or "router" in path else 1), path


def zip_leaves(*trees):
    leaves = [jax.tree_util.tree_leaves_with_path(t) for t in trees]
    return [(jax.tree_util.keystr(same[0][0]), [leaf for _, leaf in same]) for same in zip(*leaves, strict=True)]


@pytest.mark.parametrize(
    ("sizes", "axes", "shape"), [(EXPERTS, "DNH", (32, 4, 8)), (CONTEXT, "VD", (96, 32)), (REPLICAS, "DF", (32, 48))]
)
def test_a_parameter_is_gathered_to_be_used_and_its_gradient_is_scattered(sizes, axes, shape):
    where = mesh(**sizes)
    stored, used = (NamedSharding(where, parallel.spec(axes, layout, where, shape)) for layout in ("stored", "used"))
    w = jax.device_put(jnp.arange(float(np.prod(shape))).reshape(shape), stored)
    with jax.set_mesh(where):
        gathered = jax.jit(lambda w: parallel.unshard(w, axes))(w)
        whole = jax.jit(lambda w: parallel.unshard(w, axes, whole=True))(w)
        gradient = jax.jit(jax.grad(lambda w: (parallel.unshard(w, axes) ** 2).sum()))(w)
    assert gathered.sharding.is_equivalent_to(used, len(shape))
    assert whole.sharding.is_fully_replicated
    assert gradient.sharding.is_equivalent_to(stored, len(shape))
    np.testing.assert_array_equal(gathered, w)
    np.testing.assert_array_equal(whole, w)
    np.testing.assert_allclose(gradient, 2 * w)
    assert parallel.unshard(w, axes) is w  # without a mesh


@pytest.mark.parametrize(("length", "parts"), [(8, 1), (8, 2), (24, 3), (64, 4), (2048, 16)])
def test_the_zigzag_order_gives_every_device_the_same_causal_work(length, parts):
    order = parallel.zigzag_order(length, parts)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))
    work = (order + 1).reshape(parts, -1).sum(axis=1)  # keys that the queries of a device see
    assert (work == work[0]).all()


def test_a_zigzag_batch_holds_the_same_tokens_in_that_order():
    batch = {"tokens": jnp.arange(64).reshape(4, 16), "pair_segments": jnp.ones((4, 2, 2), jnp.int32)}
    assert parallel.zigzag(batch) == (batch, False)  # without a mesh
    with jax.set_mesh(mesh(fsdp=2, context=2, tensor=2)):
        moved, reordered = jax.jit(parallel.zigzag)(batch)
        few = {"tokens": batch["tokens"][:3]}  # rows that do not divide are not split, so attention needs their order
        assert parallel.zigzag(few) == (few, False)
    order = parallel.zigzag_order(16, 2)
    assert reordered and moved.keys() == batch.keys()
    np.testing.assert_array_equal(moved["tokens"], batch["tokens"][:, order])
    np.testing.assert_array_equal(moved["pair_segments"], batch["pair_segments"])
    assert moved["tokens"].sharding.spec == PartitionSpec("fsdp", "context")


def test_sizes_and_rows_of_the_mesh_in_context():
    assert parallel.axis_size("data", "fsdp") == 1 and not parallel.batch_is_sharded(8)
    with jax.set_mesh(mesh(**EXPERTS)):
        assert parallel.axis_size("fsdp", "tensor") == 4 and parallel.axis_size("context") == 1
        assert parallel.batch_is_sharded(8) and not parallel.batch_is_sharded(6)
        assert parallel.activation_spec("BSF") == PartitionSpec(BOTH, None, "tensor")


def test_explain_names_every_parameter_and_activation_with_its_split():
    cfg = small(n_experts=4)
    shapes, axes = model.parameter_shapes(cfg), model.logical_axes(cfg)
    letters = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
    names = [path for path, _ in zip_leaves(shapes)]
    rows = [(n, "".join(a), s.shape) for n, a, s in zip(names, letters, jax.tree.leaves(shapes), strict=True)]
    lines = parallel.explain(mesh(**EXPERTS), iter(rows))
    assert lines[0] == "mesh: data 1, fsdp 2, expert 2, context 1, tensor 2"
    for name, _, shape in rows:
        [line] = [line for line in lines if line.split()[0] == name]
        assert str(shape) in line
    [gate] = [line for line in lines if "['moe']['gate']" in line]
    assert "E over expert, D over fsdp, F over tensor" in gate and gate.endswith("E over expert, F over tensor")
    [stream] = [line for line in lines if line.startswith("residual stream")]
    assert stream.endswith("B over fsdp+expert")
    for name in ("batch", "queries", "keys, values", "FFN", "logits"):
        assert sum(line.startswith(name) for line in lines) == 1
    assert "whole" in next(line for line in parallel.explain(mesh(data=8), iter(rows)) if "norm_final" in line)


def test_parameters_are_made_where_they_are_stored():
    cfg, where = small(n_experts=4), mesh(**EXPERTS)
    shardings = parallel.tree_shardings(where, model.logical_axes(cfg), model.parameter_shapes(cfg))
    params = jax.jit(model.init, static_argnums=0, out_shardings=shardings)(cfg, jax.random.key(0))
    for path, (a, b, where) in zip_leaves(params, init(cfg, jax.random.key(0)), shardings):
        assert a.sharding.is_equivalent_to(where, a.ndim), path
        np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=4), EXPERTS, CONTEXT, dict(fsdp=2, expert=2, context=2)])
def test_rows_of_a_table_and_their_gradient_are_those_of_one_device(sizes):
    table, index = jax.random.normal(jax.random.key(0), (6, 8)), jax.random.randint(jax.random.key(1), (8, 4), 0, 6)
    weight = jax.random.normal(jax.random.key(2), (8, 4, 8))

    def loss(table, index):
        rows = parallel.embedding_lookup(table, index)
        return (rows * weight).sum(), rows

    (_, expected), expected_gradient = jax.value_and_grad(loss, has_aux=True)(table, index)
    here = mesh(**sizes)
    with jax.set_mesh(here):
        table = jax.device_put(table, NamedSharding(here, parallel.spec("VD", "stored", here, table.shape)))
        index = jax.device_put(index, parallel.sharding(here, "BS"))
        (_, rows), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(table, index)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-6)
    assert rows.sharding.is_equivalent_to(parallel.sharding(here, "BSD"), 3)
    assert gradient.sharding.is_equivalent_to(table.sharding, 2)
