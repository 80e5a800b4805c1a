"""Nano Tanuki: every stage of the paper on a laptop, from rule-made text.

tanuki run --config=configs/nano.py --workdir=runs/nano
"""

from tanuki_jax import config


def get_config():
    c = config.recipe(name="Nano Tanuki", seed=0)
    c.model.update(
        dict(
            vocab_size=1280,
            n_layers=3,
            d_model=160,
            d_ff=448,
            n_heads=5,
            n_kv_heads=5,
            head_dim=32,
            init_std=0.04,
            n_experts=8,
            top_k=2,
        )
    )
    c.compute.remat = "full"
    c.mesh.update(dict(data=1, fsdp=-1))
    c.data = dict(
        ja="rules:documents_ja",
        en="rules:documents_en",
        synthetic_ja="rules:synthetic_ja",
        synthetic_en="rules:synthetic_en",
        dialogues="rules:dialogues",
        pairs="synth:pairs",
    )
    c.rules.update(dict(documents=12_000, dialogues=30_000))
    # The preferences are the model's own: of four answers to each prompt the right one is chosen over the first wrong one.
    c.endpoints.own = config.endpoint(temperature=1.0, max_tokens=40, concurrency=64, license="apache-2.0")
    c.synth.pairs = config.synth(
        "preferences", seeds=dict(prompts="rules:prompts"), items=1_000, samples=4, generator="own", judge="rules"
    )
    c.tokenizer.update(
        dict(
            vocab_size=1280,
            character_coverage=1.0,
            boundary="morpheme",  # the paper's rule; a vocabulary this small has no place for longer units
            sources=("ja", "en", "synthetic_ja", "synthetic_en", "dialogues"),
            max_bytes=2_000_000,
        )
    )
    c.scoring.update(dict(prompts=480, pairs=240, max_new_tokens=40, batch_size=160))

    def adam(peak, **options):
        return dict(learning_rate=peak, learning_rate_floor=peak / 20, warmup_ratio=0.05, clip_norm=1.0, **options)

    # Used with --config.stages.sft.lora.rank=16: adapters of all matrices are trained instead of the matrices.
    adapters = dict(alpha=32.0, targets={"attn/*": 0, "moe/*": 0})
    row = dict(seq_len=128, batch_size=8, save_every=500, log_every=10)
    c.stages.pretrain = config.stage(
        "pretrain",
        mixture=dict(ja=(0.35, 0.2), en=(0.25, 0.15), synthetic_ja=(0.24, 0.39), synthetic_en=(0.16, 0.26)),
        phase_start_tokens=(0, 600_000),
        tokens=1_300_000,
        optimizer=adam(2e-3),
        **row,
    )
    c.stages.upcycle = config.stage("upcycle", init_from="pretrain")
    c.stages.continued = config.stage(
        "pretrain",
        init_from="upcycle",
        mixture=dict(ja=(0.2, 0.0), en=(0.15, 0.0), synthetic_ja=(0.39, 0.6), synthetic_en=(0.26, 0.4)),
        phase_start_tokens=(0, 350_000),
        tokens=700_000,
        optimizer=adam(1.5e-3),
        **row,
    )
    c.stages.sft = config.stage(
        "sft",
        init_from="continued",
        mixture=dict(dialogues=(1.0,)),
        tokens=500_000,
        optimizer=adam(1e-3),
        lora=adapters,
        **row,
    )
    c.stages.samples = config.stage("synth", init_from="sft", synth="pairs")
    c.stages.dpo = config.stage(
        "dpo",
        init_from="sft",
        mixture=dict(pairs=(1.0,)),
        steps=60,
        loss=dict(beta=0.1, router_aux_loss=0.0),
        optimizer=adam(5e-5),
        lora=adapters,
        **{**row, "seq_len": 256},
    )
    return c
