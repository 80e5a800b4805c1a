"""A recipe with a stage of every kind in a few steps, itself a config file; `trained` runs it once for all tests."""

import fcntl
import functools
import os
import shutil
from pathlib import Path

from tanuki_jax import config

CONFIG = f"--config={__file__}"
STAGES = ("pretrain", "upcycle", "continued", "sft", "dpo")


def get_config():
    c = config.recipe(name="極小の狸", seed=0, tensorboard=False)
    c.model.update(
        dict(vocab_size=768, n_layers=2, d_model=16, d_ff=24, n_heads=2, n_kv_heads=1, head_dim=8, init_std=0.05, n_experts=4)
    )
    c.data = dict(ja="rules:documents_ja", synthetic="rules:synthetic_en", dialogues="rules:dialogues", pairs="rules:pairs")
    c.rules.update(dict(documents=150, dialogues=150, pairs=40))
    c.tokenizer.update(dict(vocab_size=720, character_coverage=1.0, sources=("ja", "synthetic", "dialogues")))
    c.scoring.update(dict(prompts=30, pairs=10, max_new_tokens=6, batch_size=32))
    row = dict(seq_len=64, batch_size=8, steps=4, save_every=2, log_every=1, optimizer=dict(learning_rate=1e-3))
    text = dict(ja=(0.5,), synthetic=(0.5,))
    c.stages.pretrain = config.stage("pretrain", mixture=text, **row)
    c.stages.upcycle = config.stage("upcycle", init_from="pretrain", upcycle=dict(strategy="copy"))
    c.stages.continued = config.stage("pretrain", init_from="upcycle", mixture=text, **row)
    c.stages.sft = config.stage("sft", init_from="continued", mixture=dict(dialogues=(1.0,)), **row)
    c.stages.dpo = config.stage("dpo", init_from="sft", mixture=dict(pairs=(1.0,)), **{**row, "seq_len": 256})
    return c


@functools.cache
def trained(base: Path, config_flag: str = CONFIG, name: str = "tiny-run") -> Path:
    """The workdir of a finished run, under pytest's base directory; of several workers one runs it, and each has a copy."""
    from tanuki_jax.cli.main import main

    together = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    shared, workdir = together / f"{name}-of-all", base / name
    with (together / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "summary.json").is_file():
            assert main(["run", config_flag, f"--workdir={shared}"]) == 0
        shutil.copytree(shared, workdir)
    return workdir


def times(directory: Path) -> dict[str, int]:
    """When each file was written last."""
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
