"""Preference pairs of a model's own answers, judged in both orders by another model, by rules, or not at all.

tanuki synth --config=configs/synth/preferences.py --workdir=runs/preferences --name=judged
tanuki synth --config=configs/synth/preferences.py --workdir=runs/preferences --name=checked
tanuki synth --config=configs/synth/preferences.py --workdir=runs/preferences --name=better

judged: two answers to each prompt, four requests; kept where the judge prefers the same answer in both orders.  checked: the
checker of rule-made questions judges.  better: the answer of a better model is chosen, the model's own is rejected.
"""

from tanuki_jax import config


def get_config():
    c = config.recipe(name="Preferences between a model's own answers", seed=0)
    c.endpoints.student = config.endpoint("http://127.0.0.1:8000/v1", temperature=0.7, max_tokens=512)
    c.endpoints.judge = config.endpoint("http://127.0.0.1:8001/v1", max_tokens=1024)
    pairs = dict(seeds=dict(prompts="rules:prompts"), items=200, generator="student")
    c.synth.judged = config.synth("preferences", judge="judge", **pairs)
    c.synth.checked = config.synth("preferences", judge="rules", samples=4, **pairs)
    c.synth.better = config.synth("preferences", better="judge", **pairs)
    return c
