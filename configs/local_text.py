"""A small model on your own text: tokenizer, token store, dense pretraining.

tanuki run --config=configs/local_text.py --workdir=runs/mine --config.data.ja='ja/*.jsonl.gz' --config.data.en='en/*.txt'

Sources are .txt, .jsonl or .jsonl.gz files with a field `text`; both languages have the same weight.  To train on one language,
give its files alone and set the other's weight to 0:

tanuki run --config=configs/local_text.py --workdir=runs/ja --config.data.ja='ja/*.jsonl.gz' \\
    --config.stages.pretrain.mixture.en='(0.0,)'

About 5 million parameters and 1.2 million tokens: a few minutes on a laptop.  Expected on 36 MB of novels: the loss falls
from ln 16384 = 9.7 to 5.2 (benchmarks/results/2026-11-24-local_text.md).  With too little text for 16,000 pieces, the
tokenizer has fewer.  To train longer, raise --config.stages.pretrain.steps in a new --workdir.
"""

from tanuki_jax import config


def get_config():
    c = config.recipe(name="Local text", seed=0)
    c.model.update(
        dict(vocab_size=16_384, n_layers=4, d_model=128, d_ff=384, n_heads=4, n_kv_heads=2, head_dim=32, init_std=0.02)
    )
    c.data = dict(ja="", en="")
    c.tokenizer.update(dict(vocab_size=16_000))
    c.stages.pretrain = config.stage(
        "pretrain",
        mixture=dict(ja=(0.5,), en=(0.5,)),
        seq_len=256,
        batch_size=16,
        steps=300,
        optimizer=dict(learning_rate=2e-3, learning_rate_floor=2e-4, warmup_steps=30, clip_norm=1.0),
        save_every=100,
    )
    return c
