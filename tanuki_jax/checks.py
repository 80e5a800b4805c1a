"""What a config's values must be beyond their types; every message names the key and the fix."""

from __future__ import annotations

import fnmatch
import math
import re
from pathlib import Path

from tanuki_jax.errors import UserError
from tanuki_jax.schema import (
    PREFERENCES,
    PROJECTED,
    ROUTED,
    Model,
    Optimizer,
    Recipe,
    Stage,
    Upcycle,
    is_mixture,
    mixture_layers,
    model_of,
)

NAME = re.compile(r"\w[\w.-]{0,99}")
SECRET = r"(?:sig|[^=&/,]*(?:key|token|secret|signature|credential|auth|password|pwd))"
CREDENTIALS = re.compile(rf"://[^/@,]*@|://[^,]*[?&]{SECRET}=", re.IGNORECASE)


def check_mixture(model: Model, where: str) -> None:
    """An error, that begins with `where`, about a mixture that cannot be."""
    for name, least in (("first_dense", 0), ("moe_every", 1), ("expert_d_ff", 0)):
        if getattr(model, name) < least:
            raise UserError(f"{where}{name} is {getattr(model, name)}; it must be at least {least}")
    if not 0 < model.gate_scale < math.inf:
        raise UserError(f"{where}gate_scale is {model.gate_scale}; it must be above 0")
    if not model.n_experts:
        return
    if not 1 <= model.top_k <= model.n_experts:
        raise UserError(f"{where}top_k {model.top_k} must lie between 1 and n_experts {model.n_experts}")
    if model.normalized_gate and model.n_experts < 2:
        raise UserError(f"{where}normalized_gate: the normalised gate needs two experts, not n_experts 1; use the plain gate")
    if not mixture_layers(model):
        raise UserError(
            f"{where}first_dense {model.first_dense} and moe_every {model.moe_every} leave no mixture "
            f"in {model.n_layers} layers"
        )


def check_upcycle(model: Model, options: Upcycle, where: str) -> None:
    """An error, that begins with `where`, about settings with which no dense model becomes the mixture `model`."""
    for name in ("noise_std", "router_std"):
        if not 0 <= getattr(options, name) < math.inf:
            raise UserError(f"{where}{name} is {getattr(options, name)}; a standard deviation is a number and not negative")
    if not 0 <= options.drop_ratio <= 1:
        raise UserError(f"{where}drop_ratio {options.drop_ratio} must lie between 0 and 1")
    width = model.expert_d_ff or model.d_ff
    if options.strategy != "groups" and width != model.d_ff:
        raise UserError(f"{where}an expert_d_ff {width} other than d_ff {model.d_ff} needs the strategy groups")
    if model.d_ff % width:
        raise UserError(f"{where}d_ff {model.d_ff} is not a multiple of expert_d_ff {width}; the FFN cannot be split evenly")
    if model.n_experts % (model.d_ff // width):
        raise UserError(
            f"{where}n_experts {model.n_experts} is not a multiple of the {model.d_ff // width} parts of the FFN "
            f"(d_ff {model.d_ff} / expert_d_ff {width})"
        )


def check_names(recipe: Recipe) -> None:
    """An error about a name that would lead out of the workdir."""
    for group, names in (("stages", recipe.stages), ("data", recipe.data)):
        for name in names:
            if not NAME.fullmatch(name):
                raise UserError(
                    f"config: {group}: the name {name!r} becomes a file's; use letters, digits, _, - and . after the first"
                )


def check_recipe(recipe: Recipe) -> None:
    """An error about the first key of a recipe whose value cannot be, with the fix."""
    model = recipe.model
    sizes = ("vocab_size", "n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim", "unroll", "logits_chunk")
    for name in sizes:
        if getattr(model, name) < 1:
            raise UserError(f"config: model.{name} is {getattr(model, name)}; it must be at least 1")
    if model.capacity_factor < 0:
        raise UserError(f"config: model.capacity_factor is {model.capacity_factor}; it must be 0 (dropless) or more")
    if model.n_heads % model.n_kv_heads:
        raise UserError(f"config: model.n_heads {model.n_heads} is not a multiple of model.n_kv_heads {model.n_kv_heads}")
    if model.head_dim % 2:
        raise UserError(f"config: model.head_dim {model.head_dim} must be even, rotary position encoding turns pairs")
    check_mixture(model, "config: model.")
    for name, source in recipe.data.items():
        if CREDENTIALS.search(source.files):
            raise UserError(
                f"config: data.{name}.files has a password or key in its address, and configs are stored in every checkpoint; "
                "give it in the environment, as the file system asks for it"
            )
    if not recipe.stages:
        raise UserError("config: the recipe has no stages; add one, for example c.stages.pretrain = config.stage('pretrain')")
    for field, least in (("prompts", 0), ("pairs", 0), ("max_new_tokens", 1), ("batch_size", 1)):
        if getattr(recipe.scoring, field) < least:
            raise UserError(f"config: scoring.{field} is {getattr(recipe.scoring, field)}; it must be at least {least}")
    if recipe.validation.tokens < 0 or recipe.validation.every < 1:
        raise UserError("config: validation.tokens must not be negative, validation.every must be at least 1")
    if not 0 <= recipe.prometheus_port < 65536:
        raise UserError(f"config: prometheus_port is {recipe.prometheus_port}; it must be a port, or 0 for none")
    _check_shares(recipe)
    for name in recipe.tokenizer.sources:
        if name not in recipe.data:
            raise UserError(f"config: tokenizer.sources names {name!r}, which is not in data ({', '.join(recipe.data)})")
    for name, this in recipe.stages.items():
        _check_stage(recipe, name, this)


def _check_shares(recipe: Recipe) -> None:
    shares = recipe.tokenizer.shares
    languages = {recipe.data[name].language for name in recipe.tokenizer.sources or recipe.data if name in recipe.data}
    if shares and (set(shares) != languages or min(shares.values()) <= 0):
        raise UserError(
            f"config: tokenizer.shares {shares} must give a share above 0 to each language of its sources "
            f"({', '.join(map(repr, sorted(languages)))}; set data.NAME.language)"
        )


def _check_stage(recipe: Recipe, name: str, this: Stage) -> None:
    where = f"config: stages.{name}"
    parent = this.init_from in recipe.stages
    if this.init_from and not parent and not Path(this.init_from).exists():
        known = ", ".join(n for n in recipe.stages if n != name)
        raise UserError(f"{where}.init_from {this.init_from!r} is neither a stage ({known}) nor a checkpoint directory")
    if is_mixture(recipe, name) and not recipe.model.n_experts:
        raise UserError(f"{where} is a mixture of experts, but model.n_experts is 0")
    if this.kind == "upcycle":
        _check_upcycling(recipe, where, this)
        return
    if this.mixture_of_experts and parent:
        raise UserError(f"{where}.mixture_of_experts follows from stage {this.init_from!r} that it starts from; leave it out")
    if this.kind in ("sft", "dpo") and not this.init_from:
        raise UserError(f"{where}.init_from is empty; a {this.kind} stage must start from a trained model")
    _check_amounts(where, this)
    check_moments(f"{where}.optimizer.", this.optimizer)
    _check_losses(where, this)
    _check_kept(recipe, where, this)
    rates = this.optimizer
    if rates.schedule == "range" and not 0 < rates.learning_rate_floor < rates.learning_rate:
        raise UserError(
            f"{where}.optimizer: schedule range rises from learning_rate_floor {rates.learning_rate_floor:g} to learning_rate "
            f"{rates.learning_rate:g}; the floor must be above 0 and below"
        )
    _check_guard(where, this)
    _check_lora(recipe, name, this)
    _check_mixture(recipe, where, this)


def _check_upcycling(recipe: Recipe, where: str, this: Stage) -> None:
    parent = this.init_from in recipe.stages
    if this.lora.rank:
        raise UserError(f"{where}.lora.rank: nothing is trained when a model is upcycled; set it in a later stage")
    if not this.init_from or (parent and is_mixture(recipe, this.init_from)):
        raise UserError(f"{where}.init_from must name a dense stage or checkpoint to upcycle")
    check_upcycle(recipe.model, this.upcycle, f"{where}.upcycle: ")
    for other in this.upcycle.experts_from:
        if other in recipe.stages and is_mixture(recipe, other):
            raise UserError(f"{where}.upcycle.experts_from names {other!r}, which is a mixture; it must be dense")
        if other not in recipe.stages and not Path(other).exists():
            raise UserError(f"{where}.upcycle.experts_from {other!r} is neither a stage nor a checkpoint directory")


def _check_amounts(where: str, this: Stage) -> None:
    if sum(bool(b) for b in (this.steps, this.tokens, this.epochs)) != 1:
        raise UserError(
            f"{where}: set exactly one of steps, tokens and epochs (now {this.steps}, {this.tokens}, {this.epochs})"
        )
    for field in ("steps", "tokens", "epochs", "keep_every", "keep_best", "profile_start"):
        if getattr(this, field) < 0:
            raise UserError(f"{where}.{field} is {getattr(this, field)}; it must not be negative")
    for field in ("seq_len", "batch_size", "microbatches", "save_every", "keep", "log_every", "profile_steps"):
        if getattr(this, field) < 1:
            raise UserError(f"{where}.{field} is {getattr(this, field)}; it must be at least 1")
    if this.batch_size % this.microbatches:
        raise UserError(f"{where}.batch_size {this.batch_size} is not a multiple of microbatches {this.microbatches}")
    if this.epochs and this.kind == "pretrain":
        raise UserError(f"{where}.epochs is for sft and dpo; give a pretraining stage tokens or steps")


def _check_losses(where: str, this: Stage) -> None:
    for loss, weight in this.loss.preference.items():
        if loss not in PREFERENCES or weight <= 0:
            known = ", ".join(PREFERENCES)
            raise UserError(
                f"{where}.loss.preference: {loss!r} has weight {weight:g}; it needs a name of {known} and one above 0"
            )
    for key in ("router_aux_loss", "router_aux_adaptive", "router_z_loss", "router_bias_rate"):
        if not 0 <= getattr(this.loss, key) < math.inf:
            raise UserError(f"{where}.loss.{key} is {getattr(this.loss, key)}; it must be a number and not negative")
    smoothed = {"cdpo", "robust"}.intersection(this.loss.preference)
    if this.loss.label_smoothing and not smoothed:
        raise UserError(f"{where}.loss.label_smoothing is for cdpo and robust; set loss.preference to {{'cdpo': 1.0}}")
    if not 0 <= this.loss.label_smoothing < 0.5:
        raise UserError(f"{where}.loss.label_smoothing {this.loss.label_smoothing} must lie between 0 and 0.5")


def _check_kept(recipe: Recipe, where: str, this: Stage) -> None:
    if this.keep_every % this.save_every:
        raise UserError(
            f"{where}.keep_every {this.keep_every} is not a multiple of save_every {this.save_every}; only what is saved can "
            "be kept"
        )
    if this.keep_best and (
        not recipe.validation.tokens or this.kind != "pretrain" or this.save_every % recipe.validation.every
    ):
        raise UserError(
            f"{where}.keep_best needs a validation loss at every save: a pretraining stage, validation.tokens above 0, and a "
            f"save_every {this.save_every} that is a multiple of validation.every {recipe.validation.every}"
        )


def _check_guard(where: str, this: Stage) -> None:
    for key in ("skip_limit", "spike", "spike_steps", "rollbacks", "hang_seconds"):
        if not 0 <= getattr(this.guard, key) < math.inf:
            raise UserError(f"{where}.guard.{key} is {getattr(this.guard, key)}; it must be a number and not negative")
    if not 0 < this.guard.rollback_rate <= 1:
        raise UserError(f"{where}.guard.rollback_rate is {this.guard.rollback_rate}; it must be above 0 and at most 1")


def _check_lora(recipe: Recipe, name: str, this: Stage) -> None:
    where, options = f"config: stages.{name}", this.lora
    if options.rank < 0:
        raise UserError(f"{where}.lora.rank is {options.rank}; it must not be negative, and 0 trains all parameters")
    if not options.rank:
        if this.carry == "adapter":
            raise UserError(f"{where}.carry is adapter, but lora.rank is 0; set the rank of the adapter in init_from")
        return
    if not this.init_from:
        raise UserError(f"{where}.lora: adapters need a model in init_from")
    if not 0 < options.alpha < math.inf or not 0 <= options.dropout < 1:
        raise UserError(f"{where}.lora: alpha must be above 0, dropout at least 0 and below 1")
    model = model_of(recipe, name)
    mixtures = len(mixture_layers(model))
    known = [n for n in PROJECTED if mixtures < model.n_layers or not n.startswith("mlp/")] + [*ROUTED][: 4 * bool(mixtures)]
    for pattern, rank in options.patterns().items():
        fits = fnmatch.filter(known, pattern)
        if not fits or rank < 0:
            raise UserError(
                f"{where}.lora.targets: {pattern!r} with rank {rank} fits nothing; the matrices are {', '.join(known)}, a rank "
                "is at least 0"
            )
        if options.dropout and set(fits) & set(ROUTED):
            raise UserError(f"{where}.lora.dropout is for attention and dense FFN; set it to 0 for {pattern!r}")


def _check_mixture(recipe: Recipe, where: str, this: Stage) -> None:
    if not this.mixture:
        raise UserError(f"{where}.mixture is empty; give each source a weight, for example {{'ja': (1.0,)}}")
    starts = this.mixture_starts
    if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)):
        raise UserError(f"{where}.mixture_starts {starts} must begin with 0 and rise")
    for source, weights in this.mixture.items():
        if source not in recipe.data:
            raise UserError(f"{where}.mixture names {source!r}, which is not in data ({', '.join(recipe.data)})")
        if len(weights) != len(starts):
            raise UserError(f"{where}.mixture.{source} has {len(weights)} weights for {len(starts)} phases (mixture_starts)")
        if min(weights) < 0:
            raise UserError(f"{where}.mixture.{source} has a negative weight: {weights}")
    for phase, total in enumerate(map(sum, zip(*this.mixture.values(), strict=True))):
        if total <= 0:
            raise UserError(f"{where}.mixture: the weights of phase {phase} sum to 0; give at least one source a weight")
    if this.kind in ("sft", "dpo") and len(starts) > 1:
        raise UserError(f"{where}.mixture_starts: only a pretraining mixture may change inside a stage")


LEAST_FRESH = 2**-8  # 1 - beta2: a step of bfloat16


def check_moments(where: str, rates: Optimizer) -> None:
    """An error, that begins with `where`, about moments in bfloat16 that would be more rounding than gradients.

    Stochastic rounding keeps the mean of the second moment, and adds noise of variance 2.8e-6 / (1 - beta2) of its square,
    where that of the gradients has about 1 - beta2: from 0.998 on rounding has the greater part.
    """
    if rates.moment_dtype == "bfloat16" and 1 - rates.beta2 < LEAST_FRESH:
        raise UserError(
            f"{where}moment_dtype is bfloat16, which has too few digits for a beta2 of {rates.beta2:g}; use a beta2 up to "
            f"{1 - LEAST_FRESH:.3f}, or moment_dtype=float32"
        )
