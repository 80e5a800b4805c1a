"""Preferences of a finished stage between held-out pairs."""

import json

import numpy as np

from tanuki_jax import config
from tanuki_jax.recipe import scores
from tanuki_jax.recipe.workdir import Workdir
from tests import tiny_recipe

RECIPE = config.resolve(tiny_recipe.get_config())


def preferences(workdir, stage, *margins):
    workdir.stage_dir(stage).mkdir(parents=True)
    return scores._preferences(RECIPE, stage, workdir, np.array(margins))


def test_a_preference_stage_is_compared_with_the_margins_of_the_one_before(tmp_path):
    workdir = Workdir(tmp_path)
    assert preferences(workdir, "sft", 1.0, -1.0, 2.0, -2.0) == {"pair_accuracy": 0.5}
    assert preferences(workdir, "dpo", 1.5, -0.5, 1.0, 3.0) == {"pair_accuracy": 0.75, "reward_accuracy": 0.75}
    assert json.loads(workdir.pair_margins_file("dpo").read_text()) == [1.5, -0.5, 1.0, 3.0]


def test_without_the_margins_before_there_is_no_accuracy_of_rewards(tmp_path):
    assert preferences(Workdir(tmp_path), "dpo", 1.0, -1.0) == {"pair_accuracy": 0.5}
