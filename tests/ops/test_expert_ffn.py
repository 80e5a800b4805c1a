import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tanuki_jax import config, ops, parallel
from tanuki_jax.ops import device, expert_kernels, mosaic_gpu

CASES = {
    "even": lambda rng, T, k, E: np.stack([rng.permutation(E)[:k] for _ in range(T)]),
    "one expert takes all": lambda rng, T, k, E: np.stack([[0, *(1 + rng.permutation(E - 1)[: k - 1])] for _ in range(T)]),
    "empty experts": lambda rng, T, k, E: np.stack([rng.permutation(k + 1)[:k] for _ in range(T)]),
}
IMPLS = ("padded", "ragged", "blocked", "megablox", "pallas")
SMALL, FEW, WIDE = (300, 2, 8, 12, 20), (5, 1, 4, 12, 20), (600, 2, 3, 128, 256)  # T, k, E, D, F
SIZES = [
    *((impl, sizes) for impl in IMPLS for sizes in (SMALL, FEW)),
    ("pallas", WIDE),
    pytest.param("megablox", WIDE, marks=pytest.mark.slow),  # test_grouped_matmul.py has its products of this width
]


def problem(case, T, k, E, D=12, F=20):
    rng = np.random.default_rng(0)
    experts = jnp.int32(CASES[case](rng, T, k, E))
    weights = jax.nn.softmax(jnp.float32(rng.normal(size=(T, k))))
    x = jnp.float32(rng.normal(size=(T, D)))
    gate, up, down = (jnp.float32(rng.normal(size=s) * s[1] ** -0.5) for s in ((E, D, F), (E, D, F), (E, F, D)))
    return x, weights, experts, gate, up, down


@functools.cache
def ffn_with(**options):
    """One function for the same options, so that it is compiled once for arguments of the same shapes."""
    return functools.partial(ops.expert_ffn, **options)


@functools.cache
def compiled(ffn):
    def total(x, weights, experts, *matrices):
        y, kept = ffn(x, weights, experts, *matrices)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), (y, kept)

    return jax.jit(jax.value_and_grad(total, (0, 1, 3, 4, 5), has_aux=True))


def value_and_gradients(ffn, *arguments):
    """What ffn gives for the tokens, and the gradients of a weighted sum of it; the expert numbers have none."""
    (_, (y, kept)), grads = compiled(ffn)(*arguments)
    return (y, *grads), kept


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(np.abs(b).max(), 1e-3))


@functools.cache
def reference(case, *sizes):
    return value_and_gradients(ffn_with(impl="reference"), *problem(case, *sizes))[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("impl", "sizes"), SIZES)
def test_equals_computing_every_expert(impl, case, sizes):
    found, kept = value_and_gradients(ffn_with(impl=impl), *problem(case, *sizes))
    assert kept.all() and kept.shape == (sizes[0], sizes[1])
    close(found, reference(case, *sizes))


@jax.custom_vjp
def careless(x, w, sizes):
    """As the kernels for Hopper: whole tiles alone, and anything at all in rows past the last group."""
    inside = (jnp.arange(len(x)) < sizes.sum())[:, None]
    sizes = jnp.where((sizes % mosaic_gpu.ROWS == 0).all(), sizes, -1)
    return jnp.where(inside, jax.lax.ragged_dot(jnp.where(inside, x, 0), w, sizes), jnp.nan)


def careless_backward(kept, g):
    x, w, sizes = kept
    inside = (jnp.arange(len(x)) < sizes.sum())[:, None]
    x, g = jnp.where(inside, x, 0), jnp.where(inside, g, 0)
    dx, dw = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)[1](g)
    return jnp.where(inside, dx, jnp.nan), dw, None


careless.defvjp(lambda *arguments: (careless(*arguments), arguments), careless_backward)


@pytest.mark.parametrize("sizes", [SMALL, FEW])
def test_rows_that_kernels_for_hopper_leave_unwritten_are_not_used(sizes, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "grouped_matmul", careless)
    ffn = functools.partial(ops.expert_ffn, impl="mosaic")
    for case in CASES:
        found, kept = value_and_gradients(ffn, *problem(case, *sizes))
        assert kept.all(), case
        close(found, reference(case, *sizes))


def test_on_a_gpu_the_kernels_are_chosen_where_they_fit(monkeypatch):
    def fits(D, dtype):
        return mosaic_gpu.fits(jax.ShapeDtypeStruct((8, D, 128), jnp.dtype(dtype)))

    monkeypatch.setattr(mosaic_gpu, "gpu_capability", lambda: (9, 0))
    assert fits(256, "bfloat16") and not fits(256, "float32") and not fits(192, "bfloat16")
    monkeypatch.setattr(mosaic_gpu, "gpu_capability", lambda: (8, 0))
    assert not fits(256, "bfloat16")


@pytest.mark.parametrize(("said", "expected"), [("9.0", (9, 0)), ("10.3", (10, 3)), ("gfx942", (0, 0)), (None, (0, 0))])
def test_the_capability_of_a_gpu_that_may_be_of_another_make(said, expected, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**{"compute_capability": said} if said else {})])
    assert device.gpu_capability() == expected


def test_against_a_loop_over_tokens():
    arguments = problem("even", 9, 2, 4)
    x, weights, experts, gate, up, down = (np.asarray(a) for a in arguments)
    expected = np.zeros(x.shape)
    for t in range(9):
        for w, e in zip(weights[t], experts[t], strict=True):
            a = np.asarray(x[t] @ gate[e], np.float64)
            expected[t] += w * ((a / (1 + np.exp(-a)) * (x[t] @ up[e])) @ down[e])
    found, _ = jax.jit(ops.expert_ffn)(*arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_blocks_computed_in_several_steps_are_the_same(monkeypatch):
    sizes, steps, loop = (600, 2, 3, 256, 768), [], jax.lax.fori_loop
    monkeypatch.setattr(expert_kernels, "mxu_columns", lambda: 32)
    monkeypatch.setattr(expert_kernels, "vmem_bytes", lambda: 2**26)  # room for whole matrices in a block
    monkeypatch.setattr(jax.lax, "fori_loop", lambda *arguments: steps.append(arguments[1]) or loop(*arguments))
    ffn = functools.partial(ops.expert_ffn, impl="pallas")
    for case in CASES:
        close(value_and_gradients(ffn, *problem(case, *sizes))[0], reference(case, *sizes))
    assert {2, 6} <= set(steps)  # of 256 and of 768 columns, 128 at once


def test_the_parts_of_a_tile_that_the_cost_leaves_out_are_not_computed():
    """NaN in them reaches neither results nor gradients, so the compiler is told of no fewer rows than are computed."""
    sizes, D, F = (100, 300, 0, 257, 512), 12, 20
    tiles, starts = expert_kernels.layout(jnp.array(sizes), sum(sizes))
    rng, R, E = np.random.default_rng(0), len(tiles.expert) * expert_kernels.TILE, len(sizes)
    used = np.zeros(R, bool)
    for start, size in zip(np.asarray(starts), sizes, strict=True):
        used[start : start + size] = True
    computed = np.repeat(used.reshape(-1, expert_kernels.HALF_TILE).any(axis=1), expert_kernels.HALF_TILE)
    matrices = [jnp.float32(rng.normal(size=s) * s[1] ** -0.5) for s in ((E, D, F), (E, D, F), (E, F, D))]
    x, dy = (jnp.float32(np.where(used[:, None], rng.normal(size=(R, D)), 0)) for _ in range(2))
    weight = jnp.float32(used)

    def run(x, dy):
        y, back = jax.vjp(lambda x, w, *m: expert_kernels.swiglu(x, w, *m, tiles), x, weight, *matrices)
        return y, *back(dy)

    expected, hole = jax.jit(run)(x, dy), jnp.where(computed[:, None], 0, jnp.nan)
    for a, b in zip(jax.jit(run)(x + hole, dy + hole), expected, strict=True):
        np.testing.assert_array_equal(a[used] if len(a) == R else a, b[used] if len(b) == R else b)
    assert 0 < computed.sum() - used.sum() < R - used.sum()


@pytest.mark.parametrize("impl", IMPLS)
def test_low_precision_is_close(impl):
    x, weights, experts, *matrices = problem("even", 300, 2, 4, 128, 128)
    low = (a.astype(jnp.bfloat16) for a in matrices)
    found, _ = jax.jit(ffn_with(impl=impl))(x.astype(jnp.bfloat16), weights, experts, *low)
    assert found.dtype == jnp.bfloat16
    expected = reference("even", 300, 2, 4, 128, 128)[0]
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.05 * np.abs(expected).max())


# --- capacity -------------------------------------------------------------------------------------------------------


def first_come(experts, capacity, E):
    """The assignments within an expert's capacity, one after another."""
    taken, kept = np.zeros(E, int), np.zeros(experts.shape, bool)
    for index in np.ndindex(experts.shape):
        kept[index] = taken[experts[index]] < capacity
        taken[experts[index]] += 1
    return kept


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("capacity", [0.5, 1.0])
def test_an_expert_takes_what_comes_first_and_the_rest_counts_nothing(case, capacity):
    T, k, E = 45, 2, 4
    x, weights, experts, *matrices = problem(case, T, k, E)
    found, kept = value_and_gradients(ffn_with(capacity_factor=capacity), x, weights, experts, *matrices)
    expected_kept = first_come(np.asarray(experts), int(np.ceil(capacity * T * k / E)), E)
    np.testing.assert_array_equal(kept, expected_kept)
    assert not kept.all()

    expected, _ = value_and_gradients(ffn_with(impl="reference"), x, jnp.where(expected_kept, weights, 0), experts, *matrices)
    y, of_x, of_weights, *of_matrices = expected
    close(found, (y, of_x, jnp.where(expected_kept, of_weights, 0), *of_matrices))
    assert (np.asarray(found[2])[~expected_kept] == 0).all()


def test_capacity_for_everything_drops_nothing():
    found, kept = value_and_gradients(ffn_with(capacity_factor=4.0), *problem("one expert takes all", 45, 2, 4))
    assert kept.all()
    close(found, reference("one expert takes all", 45, 2, 4))


@pytest.mark.parametrize("capacity", [0.5, 0.7, 1.0])
def test_padding_takes_no_capacity(capacity):
    """What real tokens get is what they get without the padding, wherever it lies; padding gives nothing and gets nothing."""
    T, k, E = 45, 2, 4
    x, weights, experts, *matrices = problem("even", T, k, E)
    valid = np.ones(T, bool)
    valid[[*range(0, 12), 20, *range(40, 45)]] = False
    ffn = jax.jit(ffn_with(capacity_factor=capacity))
    found, kept = ffn(x, weights, experts, *matrices, valid_T=jnp.asarray(valid))
    expected, expected_kept = ffn(x[valid], weights[valid], experts[valid], *matrices)
    np.testing.assert_array_equal(kept[valid], expected_kept)
    np.testing.assert_allclose(found[valid], expected, atol=1e-5)
    assert not kept[~valid].any() and not np.asarray(found)[~valid].any() and (capacity == 1 or not expected_kept.all())


# --- experts on several devices -------------------------------------------------------------------------------------


@functools.cache
def over_devices(shards, capacity_factor=0.0):
    """expert_ffn with tokens and experts split over `shards` devices."""
    tokens = PartitionSpec("expert")
    local = functools.partial(ops.expert_ffn, capacity_factor=capacity_factor, axis="expert")
    return jax.shard_map(local, in_specs=(tokens,) * 6, out_specs=(tokens, tokens), check_vma=False)


@pytest.fixture
def mesh(request):
    mesh = parallel.make_mesh(config.Mesh(fsdp=1, expert=request.param), jax.devices()[: request.param])
    with jax.set_mesh(mesh):
        yield request.param


@pytest.mark.parametrize(("mesh", "T"), [(2, 600), (4, 24)], indirect=["mesh"])  # many tokens choose the capacity of an expert
@pytest.mark.parametrize("case", CASES)
def test_tokens_that_travel_to_experts_come_back_the_same(mesh, case, T):
    found, kept = value_and_gradients(over_devices(mesh), *problem(case, T, 2, 4))
    assert kept.all()
    close(found, reference(case, T, 2, 4))


def apart(*arguments):
    """Each half of the tokens with its own capacity."""
    ffn, halves = ffn_with(capacity_factor=1.0), (slice(24), slice(24, 48))
    results = [ffn(*(a[half] for a in arguments[:3]), *arguments[3:]) for half in halves]
    return tuple(jnp.concatenate(parts) for parts in zip(*results, strict=True))


@pytest.mark.parametrize("mesh", [2], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_each_device_has_its_own_capacity_for_each_expert(mesh, case):
    x, weights, experts, *matrices = problem(case, 48, 2, 4)
    found, kept = value_and_gradients(over_devices(mesh, capacity_factor=1.0), x, weights, experts, *matrices)

    expected, expected_kept = value_and_gradients(apart, x, weights, experts, *matrices)
    np.testing.assert_array_equal(kept, expected_kept)
    close(found, expected)
