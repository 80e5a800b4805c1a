"""What a stage starts from: the parameters that it trains, and those that it leaves as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from pathlib import Path
from typing import Any

import jax

from tanuki_jax import checkpoint, config, model
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import placement
from tanuki_jax.train.step import State


def stage_dir(workdir: Path, name: str) -> Path:
    """Where a stage lives."""
    return workdir / "stages" / name


def derive_key(seed: int, *names: str) -> jax.Array:
    """The random key of a named purpose."""
    key = jax.random.key(seed)
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key


def init_checkpoint(recipe: Recipe, name: str, workdir: Path) -> Path | None:
    """Where the stage's starting checkpoint lies; None for random weights."""
    parent = recipe.stages[name].init_from
    if not parent:
        return None
    return stage_dir(workdir, parent) if parent in recipe.stages else Path(parent)


def inherited_meta(recipe: Recipe, name: str, workdir: Path) -> checkpoint.Meta:
    """What the stage's meta takes over from the checkpoint that it starts from; where that is gone, from its own last one."""
    for place in filter(None, (init_checkpoint(recipe, name, workdir), stage_dir(workdir, name))):
        with contextlib.suppress(UserError):  # who loads the weights will say what is wrong
            return checkpoint.inherited_meta(checkpoint.read_meta(*checkpoint.locate(place)))
    return {}


def base_checkpoint(recipe: Recipe, name: str, workdir: Path) -> Path:
    """What a stage's adapters lie on: the parent, or what the parent's adapters lie on where they are trained on."""
    parent = init_checkpoint(recipe, name, workdir)
    assert parent is not None
    return parent if recipe.stages[name].restore == "params" else _parent_adapters(recipe, name, workdir).base


def adapter_scales(recipe: Recipe, name: str, workdir: Path) -> dict[str, list[float]]:
    """By what a stage's adapters are multiplied: as its options say, or as it was where they are trained on."""
    if recipe.stages[name].restore != "params":
        scales: dict[str, list[float]] = _parent_adapters(recipe, name, workdir).meta["adapter"]["scales"]
        return scales
    return model.lora.scales(config.model_config(recipe, name), recipe.stages[name].lora)


def frozen_params(recipe: Recipe, name: str, workdir: Path, mesh: jax.sharding.Mesh) -> Any:
    """The parameters that a stage does not train, on the mesh: none, or those below its adapters, and the adapters' scales.

    Matrices lie in the dtype that they are computed in, so the model is the same, in half the memory on accelerators.
    """
    this, cfg = recipe.stages[name], config.model_config(recipe, name)
    if not this.lora.rank:
        return {}
    scales = adapter_scales(recipe, name, workdir)
    base = base_checkpoint(recipe, name, workdir)
    loaded = checkpoint.load_for(base, cfg, mesh)
    shardings = placement.frozen_shardings(cfg, this.lora, mesh)
    cast = jax.jit(lambda p, s: model.lora.frozen_params(cfg, p) | s, out_shardings=shardings, donate_argnums=0)
    with jax.set_mesh(mesh):
        return cast(loaded.params, model.lora.scale_tree(scales))


def trained_params(recipe: Recipe, name: str, workdir: Path, mesh: jax.sharding.Mesh) -> Any:
    """The parameters that a stage trains, as it begins, on the mesh: of the parent, or random ones; or adapters."""
    this, cfg = recipe.stages[name], config.model_config(recipe, name)
    parent = init_checkpoint(recipe, name, workdir)
    key = derive_key(recipe.seed, name, "init")
    if this.lora.rank and this.restore != "params":
        return _parent_adapters(recipe, name, workdir, mesh).params
    if this.lora.rank:
        initialize: Any = jax.jit(
            lambda k: model.lora.init_adapters(cfg, this.lora, k)[0],
            out_shardings=placement.trained_shardings(cfg, this.lora, mesh),
        )
        return initialize(key)
    if parent is None:
        initialize = jax.jit(model.init, static_argnums=0, out_shardings=checkpoint.parameter_shardings(cfg, mesh))
        return initialize(cfg, key)
    return checkpoint.load_for(parent, cfg, mesh).params


def _parent_adapters(recipe: Recipe, name: str, workdir: Path, mesh: jax.sharding.Mesh | None = None) -> checkpoint.Adapters:
    """Those that the stage trains on; an error where they are not of the shapes that it asks for."""
    parent, cfg = init_checkpoint(recipe, name, workdir), config.model_config(recipe, name)
    assert parent is not None
    found, wanted = checkpoint.load_adapters(parent, mesh), model.lora.ranks(cfg, recipe.stages[name].lora)
    checkpoint.check_architecture(str(parent), found.meta["model"], cfg)
    if found.ranks != wanted:
        raise UserError(
            f"stage {name}: the adapters in {parent} have ranks {found.ranks}, lora.rank and lora.targets ask for {wanted}; "
            "make them equal, or set restore='params' to merge the old ones and begin new ones"
        )
    return found


def parent_moments(parent: Path | None, abstract: State) -> Any:
    """The optimizer's state of the parent stage."""
    if parent is None:
        raise UserError("config: restore='all' needs a stage or checkpoint in init_from")
    stage_directory, step = checkpoint.locate(parent)
    checkpoint.check_sums(stage_directory, step, "optimizer")
    checkpoints = checkpoint.Checkpoints(stage_directory, keep=checkpoint.KEEP_ALL)
    try:
        return checkpoints.restore(step, dataclasses.replace(abstract, balance={})).opt_state
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"checkpoint: {parent} has no optimizer state of this model; set restore='params'") from error
    finally:
        checkpoints.close()
