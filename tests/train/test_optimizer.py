import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tanuki_jax import config
from tanuki_jax.config import validate
from tanuki_jax.errors import UserError
from tanuki_jax.train import losses
from tanuki_jax.train.optimizer import make_optimizer, make_schedule, weight_decay_mask
from tanuki_jax.train.step import init_state, make_train_step, make_update
from tests.tiny import init, of_batch, packed_batch, small


def rates(total, **options):
    rate = make_schedule(config.Optimizer(**options), total)
    return np.array([float(rate(jnp.int32(s))) for s in range(total)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_schedule_in_two_parts_is_the_schedule(schedule):
    options = dict(schedule=schedule, learning_rate=1e-3, learning_rate_floor=1e-4, warmup_steps=10, decay_steps=40)
    whole = rates(100, **options)
    np.testing.assert_allclose(rates(30, schedule_start=70, **options), whole[70:], rtol=1e-6)


def test_cosine_has_warmup_peak_and_floor():
    r = rates(100, learning_rate=1e-3, learning_rate_floor=1e-4, warmup_steps=10)
    np.testing.assert_allclose(r[:10], 1e-3 * np.arange(1, 11) / 10, rtol=1e-5)
    np.testing.assert_allclose(r[55], (1e-3 + 1e-4) / 2, rtol=1e-4)
    assert (np.diff(r[10:]) < 0).all() and 1e-4 < r[-1] < 1.01e-4


def test_cosine_horizon_beyond_the_stage_stops_on_the_way():
    r = rates(100, learning_rate=1.5e-4, learning_rate_floor=1.5e-5, decay_steps=300)
    np.testing.assert_allclose(r[99], 1.5e-5 + 1.35e-4 * 0.5 * (1 + np.cos(np.pi * 99 / 300)), rtol=1e-5)


def test_wsd_is_flat_then_linear():
    r = rates(100, schedule="wsd", learning_rate=1e-3, learning_rate_floor=1e-4, warmup_ratio=0.1, decay_steps=20)
    np.testing.assert_allclose(r[10:81], 1e-3, rtol=1e-5)
    np.testing.assert_allclose(r[90], 1e-3 - 9e-4 / 2, rtol=1e-4)


def test_norms_do_not_decay():
    marked = weight_decay_mask(init(small(n_experts=4), jax.random.key(0)))
    assert not marked["norm_final"] and not marked["layers"]["norm_attn"] and not marked["layers"]["norm_mlp"]
    assert marked["head"] and marked["embed"]["table"] and marked["layers"]["moe"]["router"]


def test_low_precision_moments_change_a_step_little():
    params = init(small(), jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    found = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(config.Optimizer(moment_dtype=dtype))
        state, found[dtype] = optimizer.init(params), []
        update = jax.jit(optimizer.update)
        for key in keys:
            grads = jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params)
            directions, state = update(grads, state, params)
            found[dtype].append(directions)
            assert {a.dtype for a in jax.tree.leaves((state[0].mu, state[0].nu))} == {jnp.dtype(dtype)}
        assert state[0].count == 3
    jax.tree.map(np.testing.assert_array_equal, found["bfloat16"][0], found["float32"][0])  # from moments of zero
    for low, high in zip(jax.tree.leaves(found["bfloat16"]), jax.tree.leaves(found["float32"]), strict=True):
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, high, rtol=0.02, atol=0.02)


def stationary(beta2, dtype="bfloat16", steps=4000, size=400):
    """The second moment after so many gradients of 1, before them ten of 100: a spike, which has to be forgotten."""
    optimizer = make_optimizer(config.Optimizer(beta2=beta2, moment_dtype=dtype))
    params = {"w": jnp.zeros(size)}

    def one(state, n):
        return optimizer.update({"w": jnp.where(n < 10, 100.0, 1.0) * jnp.ones(size)}, state, params)[1], None

    state = jax.jit(lambda s: jax.lax.scan(one, s, jnp.arange(steps))[0])(optimizer.init(params))
    return np.float32(state[0].nu["w"]), np.float32(state[0].mu["w"])


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.99, 0.996])
def test_moments_in_bfloat16_keep_their_mean_for_every_beta2_that_is_accepted(beta2):
    validate.check_moments("", config.Optimizer(beta2=beta2, moment_dtype="bfloat16"))
    exact, _ = stationary(beta2, "float32", size=1)
    nu, mu = stationary(beta2)
    deviation = np.sqrt(2.8e-6 / (1 - beta2))
    assert abs(nu.mean() / exact - 1) < 4 * deviation / np.sqrt(len(nu)) + 1e-3
    assert nu.std() < 1.5 * deviation < 0.05
    np.testing.assert_allclose(mu.mean(), 1, atol=2e-3)


@pytest.mark.parametrize("beta2", [0.997, 0.999, 0.9999])
def test_a_beta2_that_bfloat16_drowns_in_rounding_is_refused_with_both_keys(beta2):
    with pytest.raises(UserError, match=f"optimizer.moment_dtype is bfloat16.*beta2 of {beta2:g}.*or moment_dtype=float32"):
        validate.check_moments("optimizer.", config.Optimizer(beta2=beta2, moment_dtype="bfloat16"))
    validate.check_moments("optimizer.", config.Optimizer(beta2=beta2))


@pytest.mark.parametrize("rate", [1e-3, 1e-5, 1e-6])
def test_parameters_in_bfloat16_move_as_far_as_in_float32_at_any_rate(rate):
    """Norms are float32, whatever they are given in."""
    options = config.Optimizer(learning_rate=rate, schedule="constant")
    optimizer, w = make_optimizer(options), 0.02 * jax.random.normal(jax.random.key(1), (2000,))
    update, moved = jax.jit(make_update(optimizer, make_schedule(options, 50), 1.0)), {}
    for dtype in ("bfloat16", "float32"):
        state = init_state({"w": w.astype(dtype), "norm_x": jnp.ones(4, dtype)}, optimizer, jax.random.key(0))
        first = jax.tree.map(np.float32, state.params)
        assert state.params["norm_x"].dtype == jnp.float32 and state.params["w"].dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves((state.opt_state[0].mu, state.opt_state[0].nu))} == {
            jnp.dtype("float32")
        }
        for _ in range(50):
            state, _ = update(state, {"w": jnp.sign(w), "norm_x": jnp.full(4, 0.1)}, {"loss": jnp.float32(1)})
        moved[dtype] = {name: np.abs(np.float32(state.params[name]) - first[name]).mean() for name in first}
        assert state.params["w"].dtype == dtype
    assert moved["bfloat16"]["w"] == pytest.approx(moved["float32"]["w"], rel=0.2)
    assert moved["bfloat16"]["norm_x"] == pytest.approx(moved["float32"]["norm_x"], rel=1e-4)


def test_draws_follow_seed_step_and_path_alone():
    """A step made again is the same, another step, key or parameter has other draws."""
    options = config.Optimizer(learning_rate=1e-4, schedule="constant", weight_decay=0.0)
    optimizer = make_optimizer(options)
    update = jax.jit(make_update(optimizer, make_schedule(options, 50)))

    def after(seed=0, step=0):
        ones = {name: jnp.ones(300, jnp.bfloat16) for name in "ab"}
        state = init_state(ones, optimizer, jax.random.key(seed))
        state = dataclasses.replace(state, step=jnp.int32(step))
        params = update(state, {name: jnp.ones(300) for name in "ab"}, {"loss": jnp.float32(1)})[0].params
        return np.stack([np.float32(params[name]) for name in "ab"])

    np.testing.assert_array_equal(after(), after())
    assert 0 < (after() < 1).mean() < 0.1 and (after()[0] != after()[1]).any()
    assert (after() != after(step=1)).any() and (after() != after(seed=1)).any()


def test_steps_equal_optax_adamw():
    """Our step against optax's own adamw with clipping, ten steps."""
    cfg = small()
    options = config.Optimizer(learning_rate=1e-2, learning_rate_floor=1e-3, warmup_steps=3, weight_decay=0.1, clip_norm=0.5)
    loss = losses.next_token(cfg, config.Loss())
    optimizer, rate = make_optimizer(options), make_schedule(options, 10)
    step = make_train_step(loss, make_update(optimizer, rate, options.clip_norm))
    # The step donates its state, so each side starts from its own copy.
    state = init_state(init(cfg, jax.random.key(0)), optimizer, jax.random.key(0))
    params = init(cfg, jax.random.key(0))
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=weight_decay_mask)
    )
    slots = theirs.init(params)

    @jax.jit
    def expected_step(params, slots, batch):
        def mean(p):
            total, weight, _ = of_batch(loss)(p, batch)
            return total / weight

        value, grads = jax.value_and_grad(mean)(params)
        updates, slots = theirs.update(grads, slots, params)
        return optax.apply_updates(params, updates), slots, value

    rng = np.random.default_rng(0)
    for _ in range(10):
        batch = {name: jnp.asarray(value) for name, value in packed_batch(rng, cfg).items()}
        state, metrics = step(state, batch)
        params, slots, value = expected_step(params, slots, batch)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
