"""What a run says of its config as it begins, and of a stage that is done."""

import pytest

from tanuki_jax import config, parallel
from tanuki_jax.recipe import announce
from tests import tiny_recipe


def printed(capsys, change=lambda c: None, stages=tiny_recipe.STAGES):
    c = tiny_recipe.get_config()
    change(c)
    mesh = parallel.make_mesh(config.Mesh())
    announce.announce(config.resolve(c), mesh, dict.fromkeys(stages, mesh))
    return capsys.readouterr().err


def test_keys_that_differ_from_the_defaults_and_both_tables_of_parameters(capsys):
    found = printed(capsys)
    assert "  model.d_model = 16" in found and "model.norm_eps" not in found
    assert "parameters, dense:" in found and "parameters, mixture:" in found
    assert "parameters, mixture:" not in printed(capsys, stages=("pretrain",))


def test_a_schedule_that_does_not_end_within_its_stage_is_told(capsys):
    def change(c):
        c.stages.pretrain.optimizer.warmup_steps = 9

    assert "stage pretrain: its schedule warms up and decays over 9 steps, but it ends at step 4" in printed(capsys, change)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "stage sft done: 4 steps, 2,048 tokens"),
        (
            {"final_loss": 1.2345, "scores": {"exact_match": 0.25, "prompts": 8, "pair_accuracy": 0.5}},
            "stage sft done: 4 steps, 2,048 tokens, loss of the last step 1.234, exact answers 25.0% of 8 held-out prompts, "
            "pair accuracy 50.0%",
        ),
        (
            {"learning_rate_range": {"lowest_at": 1e-2, "steepest_at": 1e-3, "suggested": 5e-4}},
            "stage sft done: 4 steps, 2,048 tokens, learning rate: lowest loss at 0.01, steepest fall at 0.001, try 0.0005",
        ),
    ],
)
def test_a_finished_stage_is_one_line(values, line):
    entry = {"name": "sft", "steps": 4, "tokens": 2048, "final_loss": None, "scores": {}, **values}
    assert announce.format_stage_summary(entry) == line
