"""Problems of mathematics, coding and reasoning with their solutions, and the same again for what a model is weak in.

tanuki synth --config=configs/synth/topic.py --workdir=runs/topic --name=problems
tanuki synth --config=configs/synth/topic.py --workdir=runs/topic --name=weak

scores.json, in the directory of the command (or --config.synth.weak.scores=PATH), has {"maths": 0.31, "coding": 0.52, ...}, as
an evaluation by category gives them; `weak` draws topics from the categories with the lowest scores alone.
"""

from tanuki_jax import config


def get_config():
    c = config.recipe(name="Problems about topics", seed=0)
    c.endpoints.writer = config.endpoint("http://127.0.0.1:8000/v1", temperature=0.7, max_tokens=768)
    c.filters.dialogues = config.filters(language="ja", repetition=True, leaks=True)
    topics = dict(seeds=dict(topics="builtin:topics_ja"), language="ja", turns=2, generator="writer", filters="dialogues")
    c.synth.problems = config.synth("topic", **topics)
    c.synth.weak = config.synth("topic", scores="scores.json", weakest=1, **topics)
    return c
