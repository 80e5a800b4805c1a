"""Questions that an aligned model makes up from nothing but the beginning of a user's turn, with its answers (Magpie).

tanuki synth --config=configs/synth/magpie.py --workdir=runs/magpie --config.endpoints.writer.base_url=http://127.0.0.1:8000/v1

Two requests for each dialogue.  The server must have /v1/completions, and the prefix must be that of its model's chat template:
ours has Tanuki's; templates=FILE.toml gives another one.
"""

from tanuki_jax import config


def get_config():
    c = config.recipe(name="Questions from nothing", seed=0)
    c.endpoints.writer = config.endpoint("http://127.0.0.1:8000/v1", temperature=1.0, max_tokens=512)
    c.filters.dialogues = config.filters(language="ja", repetition=True, leaks=True, near_duplicates=0.8)
    c.synth.dialogues = config.synth("magpie", language="ja", items=200, generator="writer", filters="dialogues")
    return c
