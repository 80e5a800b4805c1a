"""What a config's values must be beyond their types; every message names the key and the fix."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tanuki_jax.config.derived import is_moe, model_config, moe_layers, stage_steps, tokens_per_step
from tanuki_jax.config.kinds import STAGE_KINDS
from tanuki_jax.config.ranges import LARGEST
from tanuki_jax.config.schema import PREFERENCES, PROJECTED, ROUTED, Lora, Model, Optimizer, Recipe, Stage, Upcycle, range_of
from tanuki_jax.errors import UserError

NAME = re.compile(r"\w[\w.-]{0,99}")
SECRET = r"(?:sig|[^=&/,]*(?:key|token|secret|signature|credential|auth|password|pwd))"
CREDENTIALS = re.compile(rf"://[^/@,]*@|://[^,]*[?&]{SECRET}=", re.IGNORECASE)


def _check_range(group: Any, name: str, where: str) -> None:
    value, allowed = getattr(group, name), range_of(type(group), name)
    if value not in allowed:
        raise UserError(f"{where}{name} is {value}; it must be {allowed.describe()}")


def check_moe(model: Model, where: str, trained: bool = True) -> None:
    """An error, that begins with `where`, about a mixture that cannot be; where it is `trained`, that cannot learn to route."""
    for name in ("first_dense", "moe_every", "expert_d_ff", "gate_scale"):
        _check_range(model, name, where)
    if not model.n_experts:
        return
    if not 1 <= model.top_k <= model.n_experts:
        raise UserError(f"{where}top_k {model.top_k} must lie between 1 and n_experts {model.n_experts}")
    if model.normalized_gate and model.n_experts < 2:
        raise UserError(f"{where}normalized_gate: the normalised gate needs two experts, not n_experts 1; use the plain gate")
    if not moe_layers(model):
        raise UserError(
            f"{where}first_dense {model.first_dense} and moe_every {model.moe_every} leave no mixture "
            f"in {model.n_layers} layers"
        )
    if not trained or model.n_experts == 1:  # one expert leaves nothing to learn
        return
    if model.top_k == 1:
        raise UserError(
            f"{where}top_k 1: the softmax over the one expert chosen is always 1, so the router gets no gradient and cannot "
            "learn; set top_k to 2 or more"
        )
    if model.normalized_gate and model.n_experts == 2:
        raise UserError(
            f"{where}n_experts 2 with normalized_gate: the z-scores of two experts are always 0.71 and -0.71, so the router "
            "gets no gradient and cannot learn; set n_experts to 3 or more, or use the plain gate (normalized_gate=False)"
        )


def check_upcycle(model: Model, options: Upcycle, where: str) -> None:
    """An error, that begins with `where`, about settings with which no dense model becomes the mixture `model`."""
    for name in ("noise_std", "router_std"):
        if getattr(options, name) not in range_of(Upcycle, name):
            raise UserError(f"{where}{name} is {getattr(options, name)}; a standard deviation is a number and not negative")
    if options.drop_ratio not in range_of(Upcycle, "drop_ratio"):
        raise UserError(f"{where}drop_ratio {options.drop_ratio} must lie between 0 and 1")
    width = model.expert_width
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
    """An error about a name that would lead out of the workdir, or that nothing to start from has."""
    for group, names in (("stages", recipe.stages), ("data", recipe.data)):
        for name in names:
            if not NAME.fullmatch(name):
                raise UserError(
                    f"config: {group}: the name {name!r} becomes a file's; use letters, digits, _, - and . after the first"
                )
    for name in recipe.stages:
        _check_parents(recipe, name)


def _check_parents(recipe: Recipe, name: str) -> None:
    stage, names = recipe.stages[name], ", ".join(n for n in recipe.stages if n != name)
    if stage.init_from and stage.init_from not in recipe.stages and not _exists(stage.init_from):
        raise UserError(
            f"config: stages.{name}.init_from {stage.init_from!r} is neither a stage ({names}) nor a checkpoint directory"
        )
    for other in stage.upcycle.experts_from if STAGE_KINDS[stage.kind].makes_moe else ():
        if other not in recipe.stages and not _exists(other):
            raise UserError(
                f"config: stages.{name}.upcycle.experts_from {other!r} is neither a stage nor a checkpoint directory"
            )


def check_recipe(recipe: Recipe) -> None:
    """An error about the first key of a recipe whose value cannot be, with the fix."""
    model = recipe.model
    if model.n_heads % model.n_kv_heads:
        raise UserError(f"config: model.n_heads {model.n_heads} is not a multiple of model.n_kv_heads {model.n_kv_heads}")
    if model.head_dim % 2:
        raise UserError(f"config: model.head_dim {model.head_dim} must be even, rotary position encoding turns pairs")
    check_moe(model, "config: model.", trained=any(_trains_router(recipe, name) for name in recipe.stages))
    for name, source in recipe.data.items():
        if CREDENTIALS.search(source.files):
            raise UserError(
                f"config: data.{name}.files has a password or key in its address, and configs are stored in every checkpoint; "
                "give it in the environment, as the file system asks for it"
            )
    if not recipe.stages and not recipe.synth:
        raise UserError("config: the recipe has no stages; add one, for example c.stages.pretrain = config.stage('pretrain')")
    _check_language_weights(recipe)
    for name in recipe.tokenizer.sources:
        if name not in recipe.data:
            raise UserError(f"config: tokenizer.sources names {name!r}, which is not in data ({', '.join(recipe.data)})")
    for name, stage in recipe.stages.items():
        _check_stage(recipe, name, stage)


def _trains_router(recipe: Recipe, name: str) -> bool:
    """Whether stage `name` makes a router or trains it: adapters may leave it as it is."""
    stage = recipe.stages[name]
    if not is_moe(recipe, name):
        return False
    return not stage.lora.rank or any(fnmatch.fnmatchcase("moe/router", pattern) for pattern in stage.lora.patterns())


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long, a directory that may not be read
        return False


def _check_language_weights(recipe: Recipe) -> None:
    language_weights = recipe.tokenizer.language_weights
    languages = {recipe.data[name].language for name in recipe.tokenizer.sources or recipe.data if name in recipe.data}
    if language_weights and set(language_weights) != languages:
        raise UserError(
            f"config: tokenizer.language_weights {language_weights} must give a share above 0 to each language of its sources "
            f"({', '.join(map(repr, sorted(languages)))}; set data.NAME.language)"
        )


def _check_stage(recipe: Recipe, name: str, stage: Stage) -> None:
    where = f"config: stages.{name}"
    parent = stage.init_from in recipe.stages
    if is_moe(recipe, name) and not recipe.model.n_experts:
        raise UserError(f"{where} is a mixture of experts, but model.n_experts is 0")
    kind = STAGE_KINDS[stage.kind]
    if kind.makes_moe:
        _check_upcycling(recipe, where, stage)
        return
    if stage.moe and parent:
        raise UserError(f"{where}.moe follows from stage {stage.init_from!r} that it starts from; leave it out")
    if not kind.from_scratch and not stage.init_from:
        raise UserError(f"{where}.init_from is empty; a {stage.kind} stage must start from a trained model")
    if stage.restore == "all" and not stage.init_from:
        raise UserError("config: restore='all' needs a stage or checkpoint in init_from")
    _check_amounts(where, stage, recipe.validation.tokens)
    check_moments(f"{where}.optimizer.", stage.optimizer)
    _check_losses(where, stage)
    _check_retention(recipe, where, stage)
    _check_schedule(where, stage.optimizer)
    _check_lora(recipe, name, stage)
    _check_data_mixture(recipe, where, stage)


def _check_upcycling(recipe: Recipe, where: str, stage: Stage) -> None:
    parent = stage.init_from in recipe.stages
    if stage.lora.rank:
        raise UserError(f"{where}.lora.rank: nothing is trained when a model is upcycled; set it in a later stage")
    if not stage.init_from or (parent and is_moe(recipe, stage.init_from)):
        raise UserError(f"{where}.init_from must name a dense stage or checkpoint to upcycle")
    check_upcycle(recipe.model, stage.upcycle, f"{where}.upcycle: ")
    for other in stage.upcycle.experts_from:
        if not other:
            raise UserError(f"{where}.upcycle.experts_from has an empty name; name dense stages or checkpoint directories")
        if other in recipe.stages and is_moe(recipe, other):
            raise UserError(f"{where}.upcycle.experts_from names {other!r}, which is a mixture; it must be dense")


def _check_amounts(where: str, stage: Stage, held_out: int) -> None:
    if sum(bool(b) for b in (stage.steps, stage.tokens, stage.epochs)) != 1:
        raise UserError(
            f"{where}: set exactly one of steps, tokens and epochs (now {stage.steps}, {stage.tokens}, {stage.epochs})"
        )
    if stage.batch_size % stage.gradient_accumulation_steps:
        raise UserError(
            f"{where}.batch_size {stage.batch_size} is not a multiple of gradient_accumulation_steps "
            f"{stage.gradient_accumulation_steps}"
        )
    streams = STAGE_KINDS[stage.kind].streams
    if stage.epochs and streams:
        raise UserError(f"{where}.epochs is for sft and dpo; give a pretraining stage tokens or steps")
    if streams and 0 < held_out < stage.seq_len:
        raise UserError(
            f"config: validation.tokens is {held_out}, less than one row ({where.removeprefix('config: ')}.seq_len "
            f"{stage.seq_len}); raise it, or set it to 0"
        )
    batch = tokens_per_step(stage)
    if batch > LARGEST:
        raise UserError(
            f"{where}: batch_size {stage.batch_size} x seq_len {stage.seq_len} is {batch:,} tokens a step; more than "
            f"{LARGEST:,} cannot be counted"
        )
    if 0 < stage.tokens < batch:
        raise UserError(
            f"{where}.tokens {stage.tokens:,} is less than one step, batch_size {stage.batch_size} x seq_len {stage.seq_len} = "
            f"{batch:,}; give it more tokens or a smaller batch"
        )
    if stage.tokens // batch > LARGEST:
        raise UserError(
            f"{where}.tokens {stage.tokens:,} is {stage.tokens // batch:,} steps; no more than {LARGEST:,} can be counted"
        )


def _check_schedule(where: str, optimizer: Optimizer) -> None:
    where, warmup, decay = f"{where}.optimizer", optimizer.warmup_steps, optimizer.decay_steps
    peak, floor = optimizer.learning_rate, optimizer.learning_rate_floor
    if floor > peak:
        raise UserError(f"{where}.learning_rate_floor {floor:g} is above learning_rate {peak:g}; the floor is where it ends")
    if optimizer.schedule == "lr_range_test" and not 0 < floor < peak:
        raise UserError(
            f"{where}: schedule lr_range_test rises from learning_rate_floor {floor:g} to learning_rate {peak:g}; the "
            "floor must be above 0 and below"
        )
    if peak * optimizer.weight_decay >= 1:
        raise UserError(
            f"{where}.weight_decay {optimizer.weight_decay:g} x learning_rate {peak:g} is {peak * optimizer.weight_decay:g}: "
            "each step would take away that share of every weight; it must be below 1"
        )
    if warmup and optimizer.warmup_ratio:
        raise UserError(
            f"{where}: warmup_steps {warmup} and warmup_ratio {optimizer.warmup_ratio:g} are both set; set one to 0"
        )
    if optimizer.schedule == "cosine" and 0 < decay < warmup:
        raise UserError(f"{where}.decay_steps {decay} is below warmup_steps {warmup}; the decay ends after the warm-up, or 0")


def unreached_schedule(optimizer: Optimizer, steps: int) -> str:
    """Words about a schedule that is longer than its stage, which recorded runs have had; empty where all of it comes."""
    end = optimizer.schedule_start + steps
    needed = optimizer.warmup_steps + (optimizer.decay_steps if optimizer.schedule == "wsd" else 0)
    return "" if needed <= end else f"its schedule warms up and decays over {needed} steps, but it ends at step {end}"


def _check_losses(where: str, stage: Stage) -> None:
    for loss in stage.loss.preference:
        if loss not in PREFERENCES:
            raise UserError(f"{where}.loss.preference: there is no loss {loss!r}; it needs a name of {', '.join(PREFERENCES)}")
    smoothed = {"cdpo", "robust"}.intersection(stage.loss.preference)
    if stage.loss.label_smoothing and not smoothed:
        raise UserError(f"{where}.loss.label_smoothing is for cdpo and robust; set loss.preference to {{'cdpo': 1.0}}")


def _check_retention(recipe: Recipe, where: str, stage: Stage) -> None:
    if stage.keep_every % stage.save_every:
        raise UserError(
            f"{where}.keep_every {stage.keep_every} is not a multiple of save_every {stage.save_every}; only what is saved can "
            "be kept"
        )
    if stage.keep_best and (
        not recipe.validation.tokens or not STAGE_KINDS[stage.kind].streams or stage.save_every % recipe.validation.every_steps
    ):
        raise UserError(
            f"{where}.keep_best needs a validation loss at every save: a pretraining stage, validation.tokens above 0, and a "
            f"save_every {stage.save_every} that is a multiple of validation.every_steps {recipe.validation.every_steps}"
        )


def _check_lora(recipe: Recipe, name: str, stage: Stage) -> None:
    where, options = f"config: stages.{name}", stage.lora
    if not options.rank:
        if stage.restore == "adapter":
            raise UserError(f"{where}.restore is adapter, but lora.rank is 0; set the rank of the adapter in init_from")
        return
    if not stage.init_from:
        raise UserError(f"{where}.lora: adapters need a model in init_from")
    model = model_config(recipe, name)
    mixtures = len(moe_layers(model))
    matrices = [n for n in PROJECTED if mixtures < model.n_layers or not n.startswith("mlp/")] + [*ROUTED][: 4 * bool(mixtures)]
    lora_ranks(options, matrices, f"{where}.lora.")
    for pattern, rank in options.patterns().items():
        if not fnmatch.filter(matrices, pattern):
            raise UserError(
                f"{where}.lora.targets: {pattern!r} with rank {rank} fits nothing; the matrices are {', '.join(matrices)}"
            )
        if options.dropout and set(fnmatch.filter(matrices, pattern)) & set(ROUTED):
            raise UserError(f"{where}.lora.dropout is for attention and dense FFN; set it to 0 for {pattern!r}")


def lora_ranks(options: Lora, matrices: Sequence[str], where: str = "") -> dict[str, int]:
    """Rank of the adapter of each of a model's `matrices` that the targets fit, in their order.

    Of several patterns that fit a matrix the one that fits the fewest of all counts, in whatever order they stand.  Two that
    fit as few with different ranks are an error that begins with `where`.
    """
    targets = {pattern: rank or options.rank for pattern, rank in options.patterns().items()}
    fits = {pattern: [m for m in matrices if fnmatch.fnmatchcase(m, pattern)] for pattern in targets}
    ranks = {}
    for matrix in matrices:
        patterns = sorted((p for p in targets if matrix in fits[p]), key=lambda p: (len(fits[p]), p))
        closest = [p for p in patterns if len(fits[p]) == len(fits[patterns[0]])]
        if len({targets[p] for p in closest}) > 1:
            conflict = " and ".join(f"{p!r} ({targets[p]})" for p in closest)
            raise UserError(f"{where}targets: {conflict} give {matrix} different ranks and fit as few matrices; add {matrix!r}")
        if closest:
            ranks[matrix] = targets[closest[0]]
    return ranks


def _check_data_mixture(recipe: Recipe, where: str, stage: Stage) -> None:
    if not stage.mixture:
        raise UserError(f"{where}.mixture is empty; give each source a weight, for example {{'ja': (1.0,)}}")
    starts = stage.phase_start_tokens
    if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)):
        raise UserError(f"{where}.phase_start_tokens {starts} must begin with 0 and rise")
    for source, weights in stage.mixture.items():
        if source not in recipe.data:
            raise UserError(f"{where}.mixture names {source!r}, which is not in data ({', '.join(recipe.data)})")
        if len(weights) != len(starts):
            raise UserError(
                f"{where}.mixture.{source} has {len(weights)} weights for {len(starts)} phases (phase_start_tokens)"
            )
    for phase, total in enumerate(map(sum, zip(*stage.mixture.values(), strict=True))):
        if total <= 0:
            raise UserError(f"{where}.mixture: the weights of phase {phase} sum to 0; give at least one source a weight")
    if len(starts) > 1 and not STAGE_KINDS[stage.kind].streams:
        raise UserError(f"{where}.phase_start_tokens: only a pretraining mixture may change inside a stage")
    total = stage_steps(stage) * tokens_per_step(stage)
    if total and starts[-1] >= total:
        raise UserError(
            f"{where}.phase_start_tokens {starts}: the last phase begins after {starts[-1]:,} tokens, but the stage has "
            f"{total:,} tokens, so it never comes; let it begin earlier, or give the stage more tokens or steps"
        )


MIN_ONE_MINUS_BETA2 = 2**-8  # 1 - beta2: a step of bfloat16


def check_moments(where: str, optimizer: Optimizer) -> None:
    """An error, that begins with `where`, about moments in bfloat16 that would be more rounding than gradients.

    Stochastic rounding keeps the mean of the second moment, and adds noise of variance 2.8e-6 / (1 - beta2) of its square,
    where that of the gradients has about 1 - beta2: from 0.998 on rounding has the greater part.
    """
    if optimizer.moment_dtype == "bfloat16" and 1 - optimizer.beta2 < MIN_ONE_MINUS_BETA2:
        raise UserError(
            f"{where}moment_dtype is bfloat16, which has too few digits for a beta2 of {optimizer.beta2:g}; use a beta2 up to "
            f"{1 - MIN_ONE_MINUS_BETA2:.3f}, or moment_dtype=float32"
        )
