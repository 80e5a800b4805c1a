"""The stage that trains nothing: parameters of dense checkpoints become those of a mixture of experts, sharded."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from tanuki_jax import checkpoint, config, multihost, upcycle
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import placement
from tanuki_jax.recipe.initial_state import derive_key, inherit_meta, load_moments
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.train.contract import Params
from tanuki_jax.train.loop import StageSummary
from tanuki_jax.train.optimizer import make_optimizer
from tanuki_jax.train.step import State


def run_upcycle(recipe: Recipe, stage: str, workdir: Workdir, mesh: jax.sharding.Mesh) -> StageSummary:
    """Converts the parent's parameters and writes them as step 0 of the stage."""
    options, cfg, stage_dir = recipe.stages[stage], config.model_config(recipe, stage), workdir.stage_dir(stage)
    began = time.monotonic()
    parent = workdir.init_checkpoint(options.init_from, recipe.stages)
    others = [workdir.init_checkpoint(name, recipe.stages) for name in options.upcycle.experts_from]
    assert parent is not None and None not in others  # config/validate.py
    dense = [_load_dense(path, cfg, mesh) for path in (parent, *filter(None, others))]
    multihost.enter_phase(f"upcycling in stage {stage}")
    with jax.set_mesh(mesh):
        convert = jax.jit(
            lambda trees, k: upcycle.upcycle(trees[0], cfg, options.upcycle, k, trees[1:]),
            out_shardings=checkpoint.parameter_shardings(cfg, mesh),
        )
        params = convert(dense, derive_key(recipe.seed, stage, "upcycle"))
        state = _with_moments(recipe, stage, parent, params, mesh) if options.restore == "all" else None
    meta: checkpoint.Meta = {
        "stage": stage,
        "model": config.to_dict(cfg),
        "recipe": config.to_dict(recipe),
        "data_fingerprint": "",
        **inherit_meta(parent, stage_dir),
    }
    if state:
        checkpoints = checkpoint.Checkpoints(stage_dir)
        checkpoints.save(0, state, meta)
        checkpoints.close()
    else:
        checkpoint.save_params(stage_dir, params, meta)
    return StageSummary(seconds=round(time.monotonic() - began, 1))


def _load_dense(path: Path, cfg: config.ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """The parameters of a dense checkpoint from which the mixture `cfg` can be made."""
    multihost.enter_phase(f"loading {path}")
    loaded = checkpoint.load(path, mesh, cfg.param_dtype)
    mixture = upcycle.moe_config(loaded.cfg, **{key: getattr(cfg, key) for key in upcycle.MOE_KEYS})
    checkpoint.check_architecture(str(path), config.to_dict(mixture), cfg)
    _check_finite(str(path), loaded.params)
    return loaded.params


def _with_moments(recipe: Recipe, stage: str, parent: Path, params: Params, mesh: jax.sharding.Mesh) -> State:
    """The mixture's state with the moments that survive of the parent's."""
    cfg, optimizer = config.model_config(recipe, stage), make_optimizer(recipe.stages[stage].optimizer)
    abstract, _ = placement.state_shardings(dataclasses.replace(cfg, n_experts=0), optimizer, mesh)
    _, shardings = placement.state_shardings(cfg, optimizer, mesh)
    make = jax.jit(
        lambda p, old: upcycle.carry_moments(optimizer.init(p), old, cfg),
        out_shardings=shardings.opt_state,
    )
    return State(jnp.int32(0), params, make(params, load_moments(parent, abstract)), jax.random.key(0))


def _check_finite(where: str, params: Params) -> None:
    """An error that names the first parameter with a NaN or an infinity."""
    finite = jax.jit(lambda tree: jax.tree.map(lambda w: jnp.isfinite(w).all(), tree))(params)
    for path, is_finite in jax.tree_util.tree_flatten_with_path(jax.device_get(finite))[0]:
        if not is_finite:
            name = "/".join(str(part.key) for part in path)
            raise UserError(f"upcycle: {where} has NaN or Inf in {name}; use an earlier checkpoint")
