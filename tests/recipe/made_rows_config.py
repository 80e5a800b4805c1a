"""A small model that makes dialogues and preferences, filters them, and trains on both: the whole chain in one recipe."""

from tanuki_jax import config


def get_config():
    c = config.recipe(name="作る狸", seed=0, tensorboard=False)
    shape = dict(n_layers=2, d_model=64, d_ff=192, n_heads=2, n_kv_heads=2, head_dim=32, init_std=0.04)
    c.model.update(dict(vocab_size=1024, **shape))
    c.data = dict(
        synthetic="rules:synthetic_ja",
        dialogues="rules:dialogues",
        answers=dict(files="synth:answers", filters="clean"),
        pairs="synth:pairs",
    )
    c.rules.update(dict(documents=10, dialogues=6_000))
    c.tokenizer.update(dict(vocab_size=1024, character_coverage=1.0, boundary="none", sources=("synthetic", "dialogues")))
    c.filters.clean = config.filters(min_characters=1, max_characters=80, repetition=True)
    c.endpoints.own = config.endpoint(temperature=1.0, max_tokens=32, concurrency=32, license="apache-2.0")
    c.synth.answers = config.synth(
        "answer", seeds=dict(prompts="rules:prompts"), items=200, generator="own", filters="clean", language="ja"
    )
    c.synth.pairs = config.synth("preferences", seeds=dict(prompts="synth:answers"), samples=4, generator="own", judge="rules")
    row = dict(seq_len=128, batch_size=16, save_every=200, log_every=50)

    def adam(peak):
        return dict(learning_rate=peak, learning_rate_floor=peak / 20, warmup_ratio=0.05, clip_norm=1.0)

    c.stages.pretrain = config.stage("pretrain", mixture=dict(synthetic=(1.0,)), steps=300, optimizer=adam(3e-3), **row)
    c.stages.sft = config.stage(
        "sft", init_from="pretrain", mixture=dict(dialogues=(1.0,)), steps=200, optimizer=adam(2e-3), **row
    )
    c.stages.answers = config.stage("synth", init_from="sft", synth="answers")
    c.stages.again = config.stage("sft", init_from="sft", mixture=dict(answers=(1.0,)), steps=10, optimizer=adam(1e-4), **row)
    c.stages.samples = config.stage("synth", init_from="again", synth="pairs")
    row["seq_len"] = 256
    c.stages.dpo = config.stage("dpo", init_from="again", mixture=dict(pairs=(1.0,)), steps=10, optimizer=adam(5e-5), **row)
    return c
