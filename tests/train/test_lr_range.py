"""What a learning-rate range test says of curves whose answer is known, and the whole recipe."""

import math
from pathlib import Path

import numpy as np
import pytest

from tanuki_jax import config
from tanuki_jax.errors import UserError
from tanuki_jax.train import lr_range
from tanuki_jax.train.optimizer import make_schedule
from tests import tiny_recipe

ROOT = Path(__file__).parents[2]


def rows(curve, steps=400, low=1e-5, high=1.0, noise=0.0):
    rng = np.random.default_rng(0)
    rates = low * (high / low) ** (np.arange(steps) / (steps - 1))
    return [{"learning_rate": r, "loss": curve(math.log10(r)) + noise * rng.standard_normal()} for r in rates]


def valley(x, bottom=-2.0):
    """A loss that falls, fastest at 1e-3, to the lowest at about 1e-2, and rises behind it."""
    return 8 - 4 / (1 + math.exp(-6 * (x + 3))) + 20 * max(0.0, x - bottom) ** 2


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_lowest_and_the_steepest_are_found(noise):
    found = lr_range.suggest(rows(valley, noise=noise))
    assert found["lowest_at"] == pytest.approx(1.3e-2, rel=0.7) and found["suggested"] == pytest.approx(found["lowest_at"] / 10)
    assert found["steepest_at"] == pytest.approx(1e-3, rel=0.8 if noise else 0.7) and found["steepest_at"] < found["lowest_at"]


def test_steps_without_a_loss_are_left_out_and_too_few_say_nothing():
    good = rows(valley)
    assert lr_range.suggest([*good, {"learning_rate": 2.0, "loss": None}]) == lr_range.suggest(good)
    assert lr_range.suggest([]) == {} and lr_range.suggest(good[:2]) == {}
    assert lr_range.suggest(rows(lambda x: x + 9)) == {}  # it only rises


def test_the_smoothed_loss_of_a_constant_is_that_constant():
    _, losses = lr_range.smooth(rows(lambda x: 3.0))
    np.testing.assert_allclose(losses, 3.0)


def test_the_schedule_rises_by_the_same_factor_from_floor_to_peak():
    rate = make_schedule(config.Optimizer(schedule="lr_range_test", learning_rate=1.0, learning_rate_floor=1e-4), 50)
    values = np.array([float(rate(step)) for step in range(50)])
    np.testing.assert_allclose(values[[0, -1]], [1e-4, 1.0], rtol=1e-5)
    np.testing.assert_allclose(values[1:] / values[:-1], 10 ** (4 / 49), rtol=1e-4)


@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_a_floor_from_which_nothing_rises_is_an_error(floor):
    c = tiny_recipe.get_config()
    c.stages.pretrain.optimizer.update(dict(schedule="lr_range_test", learning_rate=1e-4, learning_rate_floor=floor))
    with pytest.raises(UserError, match="stages.pretrain.optimizer: schedule lr_range_test rises from learning_rate_floor"):
        config.resolve(c)


@pytest.mark.slow
def test_the_shipped_recipe_prints_a_rate_and_draws_it(tmp_path, capfd):
    from tanuki_jax.cli.main import main

    tiny = [f"--config.model.{key}={value}" for key, value in (("n_layers", 1), ("d_model", 32), ("d_ff", 32), ("n_heads", 1))]
    tiny += ["--config.model.n_kv_heads=1", "--config.rules.documents=300", "--config.tensorboard=False"]
    tiny += ["--config.stages.lr_range.steps=120", "--config.stages.lr_range.save_every=120"]
    flags = [f"--config={ROOT}/configs/lr_range.py", f"--workdir={tmp_path}", *tiny]
    assert main(["run", *flags]) == 0
    assert "learning rate: lowest loss at" in capfd.readouterr().err
    assert "LR-range test" in (tmp_path / "report.html").read_text()
