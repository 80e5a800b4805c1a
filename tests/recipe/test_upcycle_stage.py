"""What the stage that upcycles refuses."""

import jax.numpy as jnp
import pytest

from tanuki_jax.errors import UserError
from tanuki_jax.recipe import upcycle_stage


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_dense_model_that_is_not_finite_is_refused_by_the_name_of_its_parameter(bad):
    params = {"embed": {"table": jnp.ones((4, 2))}, "layers": {"attn": {"q": jnp.ones((2, 3)).at[1, 2].set(bad)}}}
    with pytest.raises(UserError, match="runs/dense has NaN or Inf in layers/attn/q; use an earlier checkpoint"):
        upcycle_stage._check_finite("runs/dense", params)


def test_a_finite_one_is_not():
    upcycle_stage._check_finite("runs/dense", {"norm_final": jnp.full(3, 3e38)})
