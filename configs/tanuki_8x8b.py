"""Tanuki-8x8B: the dense runs up to the split, upcycling to 8 experts, fifteen mixture runs, SFT and DPO.

tanuki run --config=configs/tanuki_8x8b.py:/data --workdir=runs/tanuki_8x8b

The argument is the directory of the corpora, as in tanuki_8b.py.  Expected: 46,973,325,312 parameters, 13,150,457,856 of them
active; 635 billion tokens after the split (1,711 with the dense part; about 211 billion synthetic); losses at the ends of the
runs as in the comments, from the ledger.

Where the sources disagree, or say nothing (see tanuki_8b.py for the dense part):
- "Following Skywork-MoE" (paper): only the normalized gate was adopted.  The balancing loss had a fixed coefficient, 0.02.  The
  router's z-loss was computed and logged, but its gradient was disabled, so it is 0 here.
- The router was drawn from N(0, 1), as below.  With a normalized gate its scale changes no output, only how fast it turns:
  about fifty times slower than N(0, 0.02^2) at the same learning rate.
- The gate was normalized in bfloat16; here it is float32.
- From run 9 on, rows were packed by best fit from whole documents.  These stages cut windows.
- Runs 12-15 use sequences of 4096 (the scripts of 1 August and later).  Shares inside a description are assumed equal.  The
  learning rate of run 13 (5e-6) has no script; we take floor and warm-up of run 12.
- Tokens inside a group of runs that share a description (6-8, 9-11) are split as the ledger splits them, their data alike.
- SFT: 640 examples per batch are the 8B's.  Of the mixture's batch only 2 x 4 per GPU is recorded, so we use the 8B's.
- DPO: the paper has 30,078 pairs, the published config 10,000 from each of three sets, the ledger a row of 10,078 that is
  labelled with an SFT set.  We follow the config: LoRA (rank 128, alpha 256, dropout 0.05 on q, k, v) with 2e-6 for two
  epochs; the ledger says "full".  Its fan_in_fan_out=True, which PEFT resets for these layers, has no counterpart.
"""

import runpy
from pathlib import Path

from tanuki_jax import config

DENSE = runpy.run_path(str(Path(__file__).with_name("tanuki_8b.py")))
B = 1_000_000_000
SHORT = dict(seq_len=2048, batch_size=3072, gradient_accumulation_steps=2, rope_theta=1e4)
PACKED = dict(seq_len=4096, batch_size=3072, gradient_accumulation_steps=4, rope_theta=5e5)
TEXT = (
    *("branch_ja", "branch_en", "llm_jp", "fineweb_edu", "twitter", "pmc", "rewritten"),
    *("open_web_math", "starcoder", "cosmopedia", "instruct_en", "instruct_ja", "wizardlm"),
)


def get_config(root="data"):
    c = DENSE["base"](root, "Tanuki-8x8B", TEXT, conversations=("sft_140k", "pairs_evol", "pairs_reasoning", "pairs_maths"))
    c.model.update(dict(n_experts=8, top_k=2, normalized_gate=True))
    last = DENSE["dense_before_split"](c)
    c.stages.upcycle = config.stage("upcycle", init_from=last, upcycle=dict(strategy="noise", noise_std=1e-3, router_std=1.0))
    last = "upcycle"

    web = dict(llm_jp=(0.5,), fineweb_edu=(0.5,))
    phase1 = dict(branch_ja=(0.25,), branch_en=(0.25,), fineweb_edu=(0.5,))
    rewritten = dict(rewritten=(1.0,))
    wide = dict(open_web_math=(0.2,), fineweb_edu=(0.2,), llm_jp=(0.2,), starcoder=(0.2,), cosmopedia=(0.2,))
    instruct = dict(instruct_en=(0.5,), instruct_ja=(0.5,))
    runs = [
        ("01", 64 * B, web, 5e-5, 5e-6, 1000, SHORT),  # 1.86
        ("02", 39 * B, phase1, 5e-5, 5e-6, 1000, SHORT),  # 1.90
        ("03", 5 * B, dict(llm_jp=(0.5,), twitter=(0.5,)), 5e-5, 5e-6, 1000, SHORT),  # 2.1
        ("04", 65 * B, dict(llm_jp=(0.5,), twitter=(0.5,)), 5e-5, 5e-6, 1000, SHORT),  # 1.93
        ("05", 96 * B, dict(pmc=(0.5,), llm_jp=(0.5,)), 5e-5, 5e-6, 1000, SHORT),  # 1.80
        ("06", 45 * B, rewritten, 5e-5, 5e-6, 500, SHORT),  # 1.20
        ("07", 35 * B, rewritten, 5e-5, 5e-6, 500, SHORT),  # 1.17
        ("08", 55 * B, rewritten, 5e-5, 5e-6, 500, SHORT),  # 1.14
        ("09", 16 * B, wide, 2.5e-5, 5e-6, 500, SHORT),  # 1.4
        ("10", 40 * B, wide, 2.5e-5, 5e-6, 500, SHORT),  # 1.3
        ("11", 99 * B, wide, 2.5e-5, 5e-6, 500, SHORT),  # 1.3
        ("12", 25 * B, instruct, 3e-6, 1e-6, 50, PACKED),  # .73
        ("13", 15 * B, instruct, 5e-6, 1e-6, 50, PACKED),  # .92
        ("14", 34 * B, instruct, 1e-5, 1e-7, 50, PACKED),  # .43
        ("15", 2 * B, dict(wizardlm=(1.0,)), 8e-7, 7e-7, 10, PACKED),  # .63
    ]
    for number, tokens, mixture, peak, floor, warmup, rows in runs:
        c.stages[f"moe_{number}"] = config.stage(
            "pretrain",
            init_from=last,
            tokens=tokens,
            mixture=mixture,
            optimizer=dict(learning_rate=peak, learning_rate_floor=floor, warmup_steps=warmup, clip_norm=1.0),
            loss=dict(z_loss=1e-4, router_aux_loss=0.02, router_z_loss=0.0),
            reset_attention=False,
            **rows,
        )
        last = f"moe_{number}"

    c.stages.sft = config.stage(
        "sft",
        init_from=last,
        mixture=dict(sft_140k=(1.0,)),
        epochs=1.0,
        seq_len=4096,
        batch_size=80,  # about 640 examples of 500 tokens
        rope_theta=5e5,
        optimizer=DENSE["trl"](5e-7),
        save_every=100,
    )
    c.stages.dpo = config.stage(
        "dpo",
        init_from="sft",
        mixture=dict(pairs_evol=(1.0,), pairs_reasoning=(1.0,), pairs_maths=(1.0,)),
        epochs=2.0,
        seq_len=2304,
        batch_size=256,
        rope_theta=5e5,
        loss=dict(beta=0.1),
        lora=dict(rank=128, alpha=256.0, dropout=0.05, targets={"attn/q": 0, "attn/k": 0, "attn/v": 0}),
        optimizer=DENSE["trl"](2e-6),
        save_every=50,
    )
    return c
