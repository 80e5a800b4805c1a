"""Prompts that are made harder twice, in ways that differ from prompt to prompt, and then answered (Evol-Instruct).

tanuki synth --config=configs/synth/evol.py --workdir=runs/evol --config.endpoints.writer.base_url=http://127.0.0.1:8000/v1

Three requests for each dialogue.
"""

from tanuki_jax import config


def get_config():
    c = config.recipe(name="Harder prompts", seed=0)
    c.endpoints.writer = config.endpoint("http://127.0.0.1:8000/v1", temperature=0.7, max_tokens=768)
    c.filters.dialogues = config.filters(language="ja", repetition=True, leaks=True)
    c.synth.dialogues = config.synth(
        "evol",
        seeds=dict(prompts="rules:prompts"),  # your prompts: prompts="prompts/*.jsonl"
        language="ja",
        items=200,
        rounds=2,
        generator="writer",
        filters="dialogues",
    )
    return c
