"""Documents in six styles each, so that a fact is met in many forms: summary, questions, paraphrase, textbook, ...

tanuki synth --config=configs/synth/rewrite.py --workdir=runs/rewrite --config.synth.styles.items=1000

Six requests for each document; a pretraining stage reads the rows as the source synth:styles.
"""

from tanuki_jax import config


def get_config():
    c = config.recipe(name="Documents in many styles", seed=0)
    c.endpoints.writer = config.endpoint("http://127.0.0.1:8000/v1", temperature=0.3, max_tokens=1024)
    c.filters.documents = config.filters(min_characters=20, repetition=True, leaks=True)
    c.synth.styles = config.synth(
        "rewrite",
        seeds=dict(documents="texts/*.jsonl"),  # rows with `text`
        language="ja",
        generator="writer",
        filters="documents",
    )
    return c
