"""LR-range test of the nano model: the learning rate rises from 1e-5 to 1 in 400 steps, and the report plots the loss over it.

tanuki run --config=configs/lr_range.py --workdir=runs/lr_range

About a minute on a laptop.  It ends with a line like `learning rate: lowest loss at 0.02, steepest fall at 0.004, try 0.002`.
For another model, write a config of its own: a short stage with `schedule="lr_range_test"`, and a guard that never
interferes.
"""

from pathlib import Path
from runpy import run_path

from tanuki_jax import config

NANO = str(Path(__file__).with_name("nano.py"))


def get_config():
    c = run_path(NANO)["get_config"]()
    c.name = "LR-range test of Nano Tanuki"
    c.scoring.update(dict(prompts=0, pairs=0))
    pretrain = c.stages.pretrain.to_dict()
    c.stages = {}
    steps = 400
    pretrain |= dict(tokens=0, steps=steps, log_every=1, save_every=steps, phase_start_tokens=(0,))
    pretrain["mixture"] = {name: weights[:1] for name, weights in pretrain["mixture"].items()}
    pretrain["optimizer"] = dict(schedule="lr_range_test", learning_rate=1.0, learning_rate_floor=1e-5)
    pretrain["guard"] = dict(spike_sigma=0.0, skip_limit=steps)  # it is meant to diverge in the end
    c.stages.lr_range = config.stage(**pretrain)
    return c
