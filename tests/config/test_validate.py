"""What no config may ask for: what is put in, and the words that the message must have."""

import json

import pytest

from tanuki_jax import config
from tanuki_jax.config import schema, validate
from tanuki_jax.errors import UserError
from tests.config.test_config import message, recipe, with_changes

INVALID = {
    "a negative capacity": ({"model__capacity_factor": -1.0}, ["model.capacity_factor is -1", "dropless"]),
    **{
        f"model.{name} of zero": ({f"model__{name}": 0}, [f"model.{name} is 0", "at least 1"])
        for name in ("vocab_size", "n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim")
    },
    **{
        f"compute.{name} of zero": ({f"compute__{name}": 0}, [f"compute.{name} is 0", "at least 1"])
        for name in ("scan_unroll", "logits_chunk")
    },
    **{
        f"{name} of zero": ({f"stages__pretrain__{name}": 0}, [f"stages.pretrain.{name} is 0", "at least 1"])
        for name in ("seq_len", "batch_size", "gradient_accumulation_steps", "save_every", "keep_latest", "log_every")
    },
    "heads": (dict(model__n_heads=6, model__n_kv_heads=4), ["n_heads 6", "multiple of model.n_kv_heads 4"]),
    "odd head": (dict(model__head_dim=7), ["head_dim 7", "even"]),
    "top_k": (dict(model__top_k=5), ["top_k 5", "n_experts 4"]),
    "no top_k": (dict(model__top_k=0), ["top_k is 0", "at least 1"]),
    "no stages": (dict(stages={}, synth={}), ["no stages", "config.stage("]),
    "tokenizer source": (dict(tokenizer__sources=("fr",)), ["tokenizer.sources", "'fr'", "en, ja, pairs, talks"]),
    "circle": (dict(stages__pretrain__init_from="dpo"), ["pretrain", "circle", "init_from"]),
    "unknown parent": (dict(stages__sft__init_from="nowhere"), ["stages.sft.init_from", "'nowhere'", "pretrain", "directory"]),
    "no experts": (dict(model__n_experts=0), ["stages.upcycle", "mixture of experts", "model.n_experts is 0"]),
    "upcycling nothing": (dict(stages__upcycle__init_from=""), ["stages.upcycle.init_from", "dense"]),
    "upcycling a mixture": (dict(stages__pretrain__moe=True), ["stages.upcycle.init_from", "dense"]),
    "mixture from a parent": (dict(stages__sft__moe=True), ["stages.sft.moe", "'upcycle'"]),
    "sft of nothing": (dict(stages__sft__init_from=""), ["stages.sft.init_from is empty", "trained model"]),
    "dpo of nothing": (dict(stages__dpo__init_from=""), ["stages.dpo.init_from is empty", "trained model"]),
    "moments of nothing": (dict(stages__pretrain__restore="all"), ["restore='all' needs a stage or checkpoint in init_from"]),
    "no budget": (dict(stages__pretrain__steps=0), ["stages.pretrain", "exactly one of steps, tokens and epochs", "0, 0"]),
    "two budgets": (dict(stages__pretrain__tokens=9), ["stages.pretrain", "exactly one of", "3, 9"]),
    "negative steps": (dict(stages__pretrain__steps=-3), ["stages.pretrain.steps", "-3"]),
    "negative tokens": (dict(stages__pretrain__steps=0, stages__pretrain__tokens=-9), ["stages.pretrain.tokens", "-9"]),
    "negative epochs": (dict(stages__sft__epochs=-1.0), ["stages.sft.epochs", "-1.0"]),
    "decoding nothing together": (dict(scoring__batch_size=0), ["scoring.batch_size", "0"]),
    "gradient_accumulation_steps": (
        dict(stages__pretrain__gradient_accumulation_steps=3),
        ["batch_size 256", "multiple of gradient_accumulation_steps 3"],
    ),
    "epochs of text": (dict(stages__pretrain__steps=0, stages__pretrain__epochs=1.0), ["stages.pretrain.epochs", "tokens or"]),
    "no mixture": (dict(stages__pretrain__mixture={}), ["stages.pretrain.mixture is empty", "weight"]),
    "late first phase": (dict(stages__pretrain__phase_start_tokens=(5,)), ["phase_start_tokens (5,)", "begin with 0"]),
    "no phase": (dict(stages__pretrain__phase_start_tokens=()), ["phase_start_tokens ()", "begin with 0"]),
    "falling phases": (dict(stages__pretrain__phase_start_tokens=(0, 9, 5)), ["phase_start_tokens (0, 9, 5)", "rise"]),
    "twice the same phase": (dict(stages__pretrain__phase_start_tokens=(0, 5, 5)), ["phase_start_tokens (0, 5, 5)", "rise"]),
    "unknown source": (dict(stages__pretrain__mixture={"fr": (1.0,)}), ["stages.pretrain.mixture", "'fr'", "en, ja"]),
    "weights and phases": (dict(stages__pretrain__mixture__ja=(1.0, 2.0)), ["mixture.ja", "2 weights for 1 phases"]),
    "negative weight": (dict(stages__pretrain__mixture__ja=(-1.0,)), ["mixture.ja", "at least 0", "-1.0"]),
    "no weight": (dict(stages__pretrain__mixture={"ja": (0.0,), "en": (0.0,)}), ["phase 0", "sum to 0"]),
    "changing dialogues": (
        dict(stages__sft__phase_start_tokens=(0, 5), stages__sft__mixture={"talks": (1.0, 1.0)}),
        ["stages.sft.phase_start_tokens", "only a pretraining mixture"],
    ),
    # the schedule of learning rates
    "a floor above the peak": (
        dict(stages__pretrain__optimizer__learning_rate_floor=1.0),
        ["stages.pretrain.optimizer.learning_rate_floor 1", "above learning_rate 0.0001"],
    ),
    "a decay below the warm-up": (
        dict(stages__pretrain__optimizer__warmup_steps=8, stages__pretrain__optimizer__decay_steps=5),
        ["stages.pretrain.optimizer.decay_steps 5", "below warmup_steps 8"],
    ),
    "two warm-ups": (
        dict(stages__pretrain__optimizer__warmup_steps=1, stages__pretrain__optimizer__warmup_ratio=0.1),
        ["stages.pretrain.optimizer", "warmup_steps 1", "warmup_ratio 0.1"],
    ),
    "a decay that turns weights over": (
        dict(stages__pretrain__optimizer__weight_decay=2000.0, stages__pretrain__optimizer__learning_rate=1e-3),
        ["stages.pretrain.optimizer.weight_decay 2000", "learning_rate 0.001"],
    ),
    "a range that falls": (
        dict(stages__pretrain__optimizer__schedule="lr_range_test"),
        ["stages.pretrain.optimizer", "learning_rate_floor 0"],
    ),
    # the budget
    "a phase after the steps": (
        dict(
            stages__pretrain__phase_start_tokens=(0, 3 * 256 * 2048),
            stages__pretrain__mixture=dict(ja=(1.0, 0.0), en=(0.0, 1.0)),
        ),
        ["stages.pretrain.phase_start_tokens (0, 1572864)", "1,572,864 tokens", "never comes"],
    ),
    "a phase after the tokens": (
        dict(
            stages__pretrain__steps=0,
            stages__pretrain__tokens=2**20 + 5,  # two steps
            stages__pretrain__phase_start_tokens=(0, 2**20),
            stages__pretrain__mixture=dict(ja=(1.0, 0.0), en=(0.0, 1.0)),
        ),
        ["stages.pretrain.phase_start_tokens", "1,048,576 tokens", "never comes"],
    ),
    "less than a row held out": (dict(validation__tokens=2047), ["validation.tokens is 2047", "stages.pretrain.seq_len 2048"]),
    "less than a step": (
        dict(stages__pretrain__steps=0, stages__pretrain__tokens=1000),
        ["stages.pretrain.tokens 1,000", "batch_size 256", "524,288"],
    ),
    "a batch beyond counting": (
        dict(stages__pretrain__batch_size=2**20, stages__pretrain__seq_len=2**20),
        ["stages.pretrain", "batch_size 1048576", "seq_len 1048576"],
    ),
    "steps beyond counting": (
        dict(
            stages__pretrain__steps=0,
            stages__pretrain__tokens=10**15,
            stages__pretrain__batch_size=1,
            stages__pretrain__seq_len=8,
        ),
        ["stages.pretrain.tokens", "125,000,000,000,000 steps"],
    ),
    # the mixture
    "a router of one choice": (dict(model__top_k=1), ["model.top_k 1", "cannot learn", "2 or more"]),
    "a plain router of one choice": (dict(model__top_k=1, model__normalized_gate=False), ["model.top_k 1", "cannot learn"]),
    "two normalised experts": (dict(model__n_experts=2), ["model.n_experts 2", "normalized_gate", "3 or more", "plain gate"]),
    **{
        f"model.{name} of {value}": ({f"model__{name}": value}, [f"model.{name} is {value}", f"at least {least}"])
        for name, value, least in (("first_dense", -1, 0), ("moe_every", 0, 1), ("moe_every", -2, 1), ("expert_d_ff", -8, 0))
    },
    "lambda of zero": (dict(model__gate_scale=0.0), ["model.gate_scale is 0.0", "above 0"]),
    "negative lambda": (dict(model__gate_scale=-1.0), ["model.gate_scale is -1.0", "above 0"]),
    "no mixture left": (dict(model__first_dense=32), ["first_dense 32", "moe_every 1", "no mixture in 32 layers"]),
    "no mixture comes": (dict(model__moe_every=33), ["first_dense 0", "moe_every 33", "no mixture in 32 layers"]),
    "no mixture left for the last": (
        dict(model__first_dense=30, model__moe_every=3),
        ["first_dense 30", "moe_every 3", "no mixture in 32 layers"],
    ),
    "one normalised expert": (dict(model__n_experts=1, model__top_k=1), ["normalized_gate", "n_experts 1"]),
    "a negative xi": (dict(stages__pretrain__loss__router_aux_adaptive=-0.2), ["loss.router_aux_adaptive", "-0.2"]),
    "a negative rate of the bias": (dict(stages__pretrain__loss__router_bias_rate=-1e-3), ["loss.router_bias_rate", "-0.001"]),
    # upcycling: refused before the dense model is trained, not after
    "negative noise": (dict(stages__upcycle__upcycle__noise_std=-1.0), ["stages.upcycle", "noise_std", "-1.0"]),
    "negative router": (dict(stages__upcycle__upcycle__router_std=-0.5), ["stages.upcycle", "router_std", "-0.5"]),
    "dropping more than all": (dict(stages__upcycle__upcycle__drop_ratio=1.5), ["stages.upcycle", "drop_ratio", "1.5"]),
    "dropping less than nothing": (dict(stages__upcycle__upcycle__drop_ratio=-0.5), ["stages.upcycle", "drop_ratio", "-0.5"]),
    "parts without groups": (dict(model__expert_d_ff=7168), ["stages.upcycle", "expert_d_ff 7168", "groups"]),
    "uneven parts": (
        dict(model__expert_d_ff=5000, stages__upcycle__upcycle__strategy="groups"),
        ["stages.upcycle", "d_ff 14336", "expert_d_ff 5000"],
    ),
    "experts and parts": (
        dict(model__expert_d_ff=7168, model__n_experts=5, stages__upcycle__upcycle__strategy="groups"),
        ["stages.upcycle", "n_experts 5", "2 parts"],
    ),
    "experts from a mixture": (
        dict(stages__upcycle__upcycle__experts_from=("other",), stages__other=dict(kind="upcycle", init_from="pretrain")),
        ["stages.upcycle.upcycle.experts_from", "'other'", "mixture"],
    ),
    "experts from nowhere": (
        dict(stages__upcycle__upcycle__experts_from=("pretrain", "nowhere")),
        ["stages.upcycle.upcycle.experts_from", "'nowhere'", "neither a stage nor a checkpoint"],
    ),
    "experts from itself": (dict(stages__upcycle__upcycle__experts_from=("upcycle",)), ["upcycle", "circle"]),
    "experts from what comes after": (dict(stages__upcycle__upcycle__experts_from=("dpo",)), ["upcycle", "circle"]),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_recipe_is_refused_in_words_that_help(case):
    changes, words = INVALID[case]
    found = message(with_changes(**changes))
    assert all(word in found for word in words), found


VALID = {
    "parts in groups": dict(model__expert_d_ff=7168, stages__upcycle__upcycle__strategy="groups"),
    "everything drawn anew": dict(stages__upcycle__upcycle__strategy="drop", stages__upcycle__upcycle__drop_ratio=1.0),
    "nothing drawn anew": dict(stages__upcycle__upcycle__drop_ratio=0.0, stages__upcycle__upcycle__router_std=0.0),
    "only the last layer": dict(model__first_dense=31),
    "the last of a stride": dict(model__first_dense=29, model__moe_every=3),
    "one expert of a plain gate": dict(model__n_experts=1, model__top_k=1, model__normalized_gate=False),
    "two experts of a plain gate": dict(model__n_experts=2, model__normalized_gate=False),
    "a floor as high as the peak": dict(stages__pretrain__optimizer__learning_rate_floor=1e-4),
    "a decay that ends with the warm-up": dict(
        stages__pretrain__optimizer__warmup_steps=2, stages__pretrain__optimizer__decay_steps=2
    ),
    "a last phase of one token": dict(
        stages__pretrain__phase_start_tokens=(0, 3 * 256 * 2048 - 1),
        stages__pretrain__mixture=dict(ja=(1.0, 0.0), en=(0.0, 1.0)),
    ),
    "experts from a directory": dict(stages__upcycle__upcycle__experts_from=(".",)),
}


@pytest.mark.parametrize("case", VALID)
def test_the_edge_of_what_is_valid_is_valid(case):
    config.resolve(with_changes(**VALID[case]))


@pytest.mark.parametrize(
    ("targets", "learns"), [({}, False), ({"*": 0}, True), ({"moe/router": 0}, True), ({"moe/up": 0}, False)]
)
def test_a_router_that_adapters_leave_alone_need_not_learn(targets, learns):
    """What is published with one choice, and is given here as a directory, can be fine-tuned so."""
    values = with_changes(model__top_k=1)
    sft = {**values["stages"]["sft"], "init_from": ".", "moe": True, "lora": {"rank": 2, "targets": targets}}
    made = config.from_dict(config.Recipe, {**values, "stages": {"sft": sft}})
    if not learns:
        return validate.check_recipe(made)
    with pytest.raises(UserError, match="model.top_k 1: .* cannot learn"):
        validate.check_recipe(made)


@pytest.mark.parametrize(
    ("schedule", "options", "steps", "told"),
    [
        ("cosine", dict(warmup_steps=10), 9, True),
        ("cosine", dict(warmup_steps=10), 10, False),
        ("cosine", dict(warmup_steps=10, schedule_start=5), 5, False),
        ("cosine", dict(warmup_steps=10, decay_steps=99), 20, False),
        ("wsd", dict(warmup_steps=10, decay_steps=11), 20, True),
        ("wsd", dict(warmup_steps=10, decay_steps=10), 20, False),
    ],
)
def test_a_schedule_longer_than_its_stage_is_told(schedule, options, steps, told):
    assert bool(config.unreached_schedule(config.Optimizer(schedule=schedule, **options), steps)) == told


@pytest.mark.parametrize("order", [1, -1])
def test_the_ranks_of_adapters_do_not_depend_on_the_order_of_their_patterns(order):
    c = config.recipe(data=dict(talks="t.jsonl"))
    targets = {"attn/*": 0, "*": 8, "attn/q": 3, "*/[kv]": 0, "**": 8}
    lora = dict(rank=4, targets=dict([*targets.items()][::order]))
    c.stages.base = config.stage("pretrain", mixture=dict(talks=(1.0,)), steps=1)
    c.stages.sft = config.stage("sft", init_from="base", mixture=dict(talks=(1.0,)), steps=1, lora=lora)
    made = config.resolve(c)
    assert config.resolve(json.loads(json.dumps(config.to_dict(made)))) == made
    ranks = config.lora_ranks(made.stages["sft"].lora, schema.PROJECTED)
    expected = dict.fromkeys(schema.PROJECTED, 8) | {"attn/q": 3, "attn/k": 4, "attn/v": 4, "attn/o": 4}
    assert ranks == expected


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ({"attn/[qk]": 2, "attn/[kv]": 3}, ["'attn/[kv]' (3)", "'attn/[qk]' (2)", "attn/k"]),
        ({"*": 2, "**": 3}, ["'*' (2)", "'**' (3)", "attn/q"]),
        ({"*": 0, "**": 3}, ["'*' (4)", "'**' (3)"]),
        ({"mlp/gates": 2}, ["'mlp/gates'", "mlp/gate, "]),
        ({"attn/q": 0, "moe/*": 0}, ["'moe/*'", "attn/q, attn/k"]),
        ({"ATTN/Q": 1}, ["'ATTN/Q'"]),
    ],
)
def test_patterns_that_contradict_each_other_or_fit_nothing_are_named(targets, words):
    values = recipe()
    values["stages"]["sft"] |= {"init_from": "pretrain", "lora": {"rank": 4, "targets": targets}}
    values["stages"].pop("dpo")
    found = message(values)
    assert "stages.sft.lora.targets" in found and all(word in found for word in words), found
