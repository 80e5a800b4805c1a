"""Dialogues of two turns: a persona asks for help with a task, and asks again about the answer.

tanuki synth --config=configs/synth/persona.py --workdir=runs/persona --config.endpoints.writer.base_url=http://127.0.0.1:8000/v1

Four requests for each dialogue.  A recipe trains on them as the source synth:dialogues.
"""

from tanuki_jax import config


def get_config():
    c = config.recipe(name="Dialogues of personas", seed=0)
    c.endpoints.writer = config.endpoint("http://127.0.0.1:8000/v1", temperature=0.7, max_tokens=512)
    c.filters.dialogues = config.filters(language="ja", min_characters=2, repetition=True, leaks=True)
    c.synth.dialogues = config.synth(
        "persona",
        seeds=dict(personas="builtin:personas_ja", tasks="builtin:tasks_ja"),  # your lists: personas="personas/*.parquet"
        language="ja",
        items=200,
        turns=2,
        generator="writer",
        filters="dialogues",
    )
    return c
