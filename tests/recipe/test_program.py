"""The train step of a stage: the shapes of its state, where they lie, and by what its loss was divided."""

import jax
import pytest

from tanuki_jax import config, parallel
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.recipe.program import make_program
from tests import tiny_recipe

RECIPE = config.resolve(tiny_recipe.get_config())


@pytest.mark.parametrize(("stage", "weight"), [("pretrain", "target_tokens"), ("dpo", "pairs")])
def test_a_step_gives_back_its_state_and_says_by_what_its_loss_was_divided(stage, weight):
    """Nothing is compiled."""
    options, mesh = RECIPE.stages[stage], parallel.make_mesh(config.Mesh())
    program = make_program(RECIPE, stage, options.steps, mesh)
    shape = (options.batch_size, options.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, "int32") for name in ("tokens", "targets", "segment_ids", "positions")}
    batch["loss_weights"] = jax.ShapeDtypeStruct(shape, "float32")
    batch["sources"] = jax.ShapeDtypeStruct(shape[:1], "int32")
    for name, array in STAGE_KINDS[options.kind].batch.items():
        batch[name] = jax.ShapeDtypeStruct((shape[0], *(3 if axis == "P" else axis for axis in array.axes)), array.dtype)
    with jax.set_mesh(mesh):
        state, metrics = jax.eval_shape(program.train_step, program.abstract_state, batch)
    assert {"loss", "grad_norm", "learning_rate", weight} <= metrics.keys() and "weight" not in metrics
    before, after, shardings = map(jax.tree.leaves, (program.abstract_state, state, program.shardings))
    assert [(a.shape, a.dtype) for a in before] == [(a.shape, a.dtype) for a in after]
    assert [a.sharding for a in before] == shardings
