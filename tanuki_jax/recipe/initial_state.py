"""What a stage starts from, resolved once: the checkpoint, the adapters to train on, and what lies frozen below adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from dataclasses import dataclass
from pathlib import Path

import jax
import optax

from tanuki_jax import checkpoint, config, model
from tanuki_jax.config.schema import Recipe
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import placement
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.train.contract import Params
from tanuki_jax.train.step import State


@dataclass(frozen=True)
class InitialState:
    """What a stage starts from.  Parameters are loaded when they are asked for; adapters, which are small, at once."""

    recipe: Recipe
    stage: str
    mesh: jax.sharding.Mesh
    cfg: config.ModelConfig
    init_checkpoint: Path | None  # None: random weights
    base_checkpoint: Path | None  # what the stage's adapters lie on; None without adapters
    adapters: checkpoint.Adapters | None  # the parent's, where they are trained on
    adapter_scales: dict[str, list[float]]  # by what the stage's adapters are multiplied; empty without adapters
    inherited_meta: checkpoint.Meta  # what the stage's checkpoints take over from the one that it starts from

    @property
    def lora(self) -> config.Lora:
        """The stage's adapters."""
        return self.recipe.stages[self.stage].lora

    def key(self, purpose: str) -> jax.Array:
        """The random key of a purpose in this stage."""
        return derive_key(self.recipe.seed, self.stage, purpose)

    def load_params(self) -> Params:
        """The parameters that the stage trains, as it begins, on the mesh: of the checkpoint, or random ones; or adapters."""
        cfg, mesh, key = self.cfg, self.mesh, self.key("init")
        if self.adapters:
            return jax.tree.map(lambda w: w.copy(), self.adapters.params)  # the train step donates what it is given
        if self.lora.rank:
            initialize = jax.jit(
                lambda k: model.lora.init_adapters(cfg, self.lora, k)[0],
                out_shardings=placement.trained_shardings(cfg, self.lora, mesh),
            )
            return initialize(key)
        if self.init_checkpoint is None:
            initialize = jax.jit(lambda k: model.init(cfg, k), out_shardings=checkpoint.parameter_shardings(cfg, mesh))
            return initialize(key)
        return checkpoint.load_for(self.init_checkpoint, cfg, mesh).params

    def load_frozen(self) -> Params:
        """The parameters that the stage does not train, on the mesh: none, or those below its adapters with their scales.

        Matrices lie in the dtype that they are computed in, so the model is the same, in half the memory on accelerators.
        """
        if self.base_checkpoint is None:
            return {}
        cfg, mesh = self.cfg, self.mesh
        loaded = checkpoint.load_for(self.base_checkpoint, cfg, mesh)
        shardings = placement.frozen_shardings(cfg, self.lora, mesh)
        cast = jax.jit(lambda p, s: model.lora.frozen_params(cfg, p) | s, out_shardings=shardings, donate_argnums=0)
        with jax.set_mesh(mesh):
            return cast(loaded.params, model.lora.scale_tree(self.adapter_scales))

    def adapter_meta(self, stage_dir: Path) -> checkpoint.AdapterMeta:
        """What the stage's checkpoints say of their adapters."""
        assert self.base_checkpoint is not None
        ranks = model.lora.ranks(self.cfg, self.lora)
        return checkpoint.adapters_meta(stage_dir, self.base_checkpoint, ranks, self.adapter_scales)


def resolve_initial_state(recipe: Recipe, stage: str, workdir: Workdir, mesh: jax.sharding.Mesh) -> InitialState:
    """Finds what a stage starts from; an error where adapters that it trains on are not of the shapes that it asks for."""
    options, cfg = recipe.stages[stage], config.model_config(recipe, stage)
    parent = workdir.init_checkpoint(options.init_from, recipe.stages)
    base, adapters, scales = None, None, dict[str, list[float]]()
    if options.lora.rank:
        assert parent is not None  # config/validate.py
        base, scales = parent, model.lora.scales(cfg, options.lora)
        if options.restore != "params":
            adapters = _load_adapters(stage, parent, cfg, options.lora, mesh)
            base, scales = adapters.base, adapters.meta["adapter"]["scales"]
    return InitialState(
        recipe=recipe,
        stage=stage,
        mesh=mesh,
        cfg=cfg,
        init_checkpoint=parent,
        base_checkpoint=base,
        adapters=adapters,
        adapter_scales=scales,
        inherited_meta=inherit_meta(parent, workdir.stage_dir(stage)),
    )


def inherit_meta(*places: Path | None) -> checkpoint.Meta:
    """What a stage's meta takes over from the first of `places` that holds a checkpoint: the one that it starts from, or,
    where that is gone, its own last one."""
    for place in filter(None, places):
        with contextlib.suppress(UserError):  # who loads the weights will say what is wrong
            return checkpoint.inherited_meta(checkpoint.read_meta(*checkpoint.locate(place)))
    return {}


def derive_key(seed: int, *names: str) -> jax.Array:
    """The random key of a named purpose."""
    key = jax.random.key(seed)
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key


def _load_adapters(
    stage: str, parent: Path, cfg: config.ModelConfig, lora: config.Lora, mesh: jax.sharding.Mesh
) -> checkpoint.Adapters:
    """Those of the parent; an error where they are not of the shapes that the stage asks for."""
    adapters, ranks = checkpoint.load_adapters(parent, mesh), model.lora.ranks(cfg, lora)
    checkpoint.check_architecture(str(parent), adapters.meta["model"], cfg)
    if adapters.ranks != ranks:
        raise UserError(
            f"stage {stage}: the adapters in {parent} have ranks {adapters.ranks}, lora.rank and lora.targets ask for {ranks}; "
            "make them equal, or set restore='params' to merge the old ones and begin new ones"
        )
    return adapters


def load_moments(path: Path, abstract: State) -> optax.OptState:
    """The optimizer's state of a checkpoint; abstract: shapes and shardings of the train state that holds it."""
    stage_dir, step = checkpoint.locate(path)
    checkpoint.check_sums(stage_dir, step, "optimizer")
    checkpoints = checkpoint.Checkpoints(stage_dir, keep=checkpoint.KEEP_ALL)
    try:
        return checkpoints.restore(step, dataclasses.replace(abstract, balance={})).opt_state
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"checkpoint: {path} has no optimizer state of this model; set restore='params'") from error
    finally:
        checkpoints.close()
