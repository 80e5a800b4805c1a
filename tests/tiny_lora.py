"""Recipes whose stages train adapters, in a few steps, itself a config file; `trained` runs one once for all tests."""

from pathlib import Path

from tanuki_jax import config
from tests import tiny_recipe

CONFIG = f"--config={__file__}"
LORA = dict(rank=2, alpha=8.0, targets={"attn/*": 0, "mlp/*": 3})


def get_config(argument="dense"):
    """dense: SFT, then all that may come after it; one: a stage from a directory."""
    c = config.recipe(name="小さな添え木", seed=0, tensorboard=False)
    c.model.update(dict(vocab_size=640, n_layers=2, d_model=16, d_ff=24, n_heads=2, n_kv_heads=1, head_dim=8, init_std=0.1))
    c.data = dict(talk="rules:dialogues", rare="rules:dialogues", pairs="rules:pairs")
    c.rules.update(dict(dialogues=120, pairs=30))
    c.tokenizer.update(dict(vocab_size=600, character_coverage=1.0, sources=("talk",)))
    c.scoring.prompts = 0
    row = dict(seq_len=64, batch_size=8, steps=4, save_every=2, keep_latest=2, log_every=1, optimizer=dict(learning_rate=1e-2))
    talk, pairs = dict(talk=(1.0,)), dict(pairs=(1.0,))
    if argument == "one":
        c.stages.one = config.stage("sft", init_from="?", mixture=talk, **row)
        return c
    still = {**row, "steps": 1, "optimizer": dict(learning_rate=0.0)}
    c.stages.base = config.stage("pretrain", mixture=talk, **{**row, "steps": 2})
    # Some of the batches have no row of the second source.
    both = dict(talk=(1.0,), rare=(0.06,))
    c.stages.sft = config.stage("sft", init_from="base", mixture=both, lora=dict(LORA, dropout=0.2), **row)
    c.stages.dpo = config.stage(
        "dpo", init_from="sft", restore="adapter", mixture=pairs, lora=LORA, **{**row, "steps": 2, "seq_len": 256}
    )
    c.stages.still = config.stage("sft", init_from="sft", restore="all", mixture=talk, lora=LORA, **still)
    c.stages.whole = config.stage("sft", init_from="sft", mixture=talk, **still)
    return c


def trained(base: Path) -> Path:
    """The workdir of a finished run, under pytest's base directory."""
    return tiny_recipe.trained(base, CONFIG, "tiny-lora")
