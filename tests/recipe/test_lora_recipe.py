"""Adapters from the command line: the switch, what is refused and in which words, mixtures, other meshes."""

import shutil

import jax
import numpy as np
import pytest

from tanuki_jax import checkpoint, config
from tanuki_jax.cli.main import main
from tests import tiny_lora, tiny_recipe
from tests.recipe.test_lora_stage import assert_equal, flat, one, refused, rows_of, weights
from tests.tiny import init


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny_lora.trained(tmp_path_factory.getbasetemp())


# --- what is refused before anything is done ------------------------------------------------------------------------

SFT = "--config.stages.sft."
BAD = {
    "unknown target": (["lora.rank=2", "lora.targets={'attn/x': 0}"], ["stages.sft.lora.targets", "'attn/x'", "attn/q"]),
    "a target of dense layers": (["lora.rank=2", "lora.targets={'mlp/up': 0}"], ["stages.sft.lora.targets", "'mlp/up'"]),
    "a norm": (["lora.rank=2", "lora.targets={'norm_attn': 0}"], ["stages.sft.lora.targets", "'norm_attn'"]),
    "a rank below 0": (["lora.rank=-1"], ["stages.sft.lora.rank", "-1"]),
    "a target's rank below 0": (["lora.rank=2", "lora.targets={'attn/q': -3}"], ["stages.sft.lora.targets", "-3"]),
    "dropout of experts": (
        ["lora.rank=2", "lora.dropout=0.1", "lora.targets={'attn/*': 0, 'moe/up': 0}"],
        ["stages.sft.lora.dropout", "'moe/up'"],
    ),
    "dropout of the router": (
        ["lora.rank=2", "lora.dropout=0.1", "lora.targets={'*': 0}"],
        ["stages.sft.lora.dropout", "'*'"],
    ),
    "all dropped": (["lora.rank=2", "lora.dropout=1.0"], ["stages.sft.lora", "dropout"]),
    "a negative share": (["lora.rank=2", "lora.dropout=-0.1"], ["stages.sft.lora", "dropout"]),
    "no scale": (["lora.rank=2", "lora.alpha=0.0"], ["stages.sft.lora", "alpha"]),
    "an adapter without a rank": (["restore=adapter"], ["stages.sft.restore", "lora.rank"]),
    "another word": (["lora.rank=2", "restore=adapters"], ["stages.sft.restore", "adapters"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_named_with_its_key(case, tmp_path, capsys):
    changes, words = BAD[case]
    status = main(["run", tiny_recipe.CONFIG, f"--workdir={tmp_path / 'run'}", *(SFT + change for change in changes)])
    refused(capsys, status, *words)
    assert not (tmp_path / "run").exists()


def test_adapters_need_something_to_lie_on(tmp_path, capsys):
    flags = ["--config.stages.pretrain.lora.rank=2"]
    status = main(["run", tiny_recipe.CONFIG, f"--workdir={tmp_path / 'run'}", *flags])
    refused(capsys, status, "stages.pretrain.lora", "init_from")


# --- what is refused of the parent ----------------------------------------------------------------------------------

OTHERS = {
    "another rank": (["lora.rank=3"], ["'layers/attn/q': 2", "'layers/attn/q': 3", "lora.rank"]),
    "fewer targets": (["lora.targets={'attn/*': 0}"], ["'layers/mlp/up': 3", "lora.targets"]),
}


@pytest.mark.parametrize("restore", ["adapter", "all"])
@pytest.mark.parametrize("case", OTHERS)
def test_adapters_of_other_shapes_are_not_trained_on(case, restore, home, tmp_path, capsys):
    flags, words = OTHERS[case]
    refused(
        capsys, one(tmp_path, home / "stages" / "sft", f"restore={restore}", *flags), "stage one", *words, "restore='params'"
    )
    assert not (tmp_path / "one" / "stages" / "one" / "checkpoints").exists()


@pytest.mark.parametrize("restore", ["adapter", "all"])
def test_a_whole_model_has_no_adapters_to_train_on(restore, home, tmp_path, capsys):
    refused(capsys, one(tmp_path, home / "stages" / "base", f"restore={restore}"), str(home / "stages" / "base"), "no adapters")


def test_all_parameters_cannot_go_on_with_moments_of_adapters(home, tmp_path, capsys):
    status = one(tmp_path, home / "stages" / "sft", "restore=all", "lora.rank=0", "lora.targets={}")
    refused(capsys, status, str(home / "stages" / "sft"), "restore='params'")


# --- what is accepted -----------------------------------------------------------------------------------------------


def plainly(workdir, base, *flags):
    """Rows of a stage from a whole model, of which nothing is said but its rank."""
    known = [f"--config.tokenizer.path={base}/tokenizer", f"--config.stages.one.init_from={base}"]
    assert (
        main(["run", f"{tiny_lora.CONFIG}:one", f"--workdir={workdir}", *known, "--config.stages.one.lora.rank=4", *flags]) == 0
    )
    return rows_of(workdir, "one")


@pytest.mark.slow
def test_a_rank_is_all_that_is_needed_on_any_mesh_in_any_parts(home, tmp_path):
    base = home / "stages" / "base"
    wanted = plainly(tmp_path / "run", base)
    made = checkpoint.load_adapters(tmp_path / "run" / "stages" / "one")
    assert made.ranks == {f"layers/attn/{name}": 4 for name in "qkvo"} and made.base == base / "checkpoints" / "2"
    assert {s for scale_L in made.meta["adapter"]["scales"].values() for s in scale_L} == {16.0 / 4}
    assert wanted[-1]["loss"] < wanted[0]["loss"]
    flags = [
        "--config.stages.one.gradient_accumulation_steps=2",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
        "--config.mesh.context=2",
    ]
    for found, expected in zip(plainly(tmp_path / "other", base, *flags), wanted, strict=True):
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-4)


@pytest.mark.slow
def test_a_mixture_learns_through_its_experts_and_router_and_keeps_its_bias(home, tmp_path):
    base, model_flags = tmp_path / "base", ["n_experts=3", "router_bias=True"]
    shape = {**checkpoint.load(home / "stages" / "base").meta["model"], "n_experts": 3, "router_bias": True}
    params = init(config.read_model({"model": shape}), jax.random.key(0))
    params["layers"]["moe"]["bias"] = jax.random.normal(jax.random.key(1), (2, 3))
    checkpoint.save_params(base, params, {"stage": "base", "model": shape, "data_fingerprint": ""})
    shutil.copytree(home / "stages" / "base" / "tokenizer", base / "tokenizer")
    loss = ["loss.router_bias_rate=0.1", "loss.router_aux_adaptive=0.2"]
    flags = ["moe=True", "steps=2", "gradient_accumulation_steps=2", "batch_size=16", "lora.targets={'*': 0}", *loss]
    assert one(tmp_path, base, *flags, more=[f"--config.model.{flag}" for flag in model_flags]) == 0
    ours, theirs = weights(tmp_path / "one", "one"), flat(params)
    changed = {path for path in ours if (ours[path] != theirs[path]).any()}
    assert changed == {f"layers/attn/{n}" for n in "qkvo"} | {f"layers/moe/{n}" for n in ("router", "gate", "up", "down")}
    first, last = rows_of(tmp_path / "one", "one")
    assert len(first["moe/load_max"]) == len(first["moe/coefficient"]) == 2
    assert first["moe/coefficient"] != last["moe/coefficient"]  # what balances by the loss goes on


def test_adapters_of_adapters_are_merged_into_what_they_lie_on(home, tmp_path):
    """Fresh ones on a parent that is adapters itself, other ranks or not: three models in a row."""
    parent = home / "stages" / "sft"
    flags = ["kind=pretrain", "lora.rank=1", "lora.targets={'attn/v': 0}", "optimizer.learning_rate=0.0"]
    assert one(tmp_path, parent, *flags, more=["--config.validation.tokens=128"]) == 0
    assert rows_of(tmp_path / "one", "one")[-1]["validation/talk/loss"] > 1
    mine = tmp_path / "one" / "stages" / "one"
    assert checkpoint.load_adapters(mine).base == parent / "checkpoints" / "4"
    assert_equal(flat(checkpoint.load(mine).params), weights(home, "sft"))  # B is 0 still
    assert jax.tree.leaves(checkpoint.load_adapters(mine).params)[0].dtype == np.float32
