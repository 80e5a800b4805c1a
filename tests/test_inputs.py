import json

import pytest

from tanuki_jax import config, inputs
from tanuki_jax.data.prepare import read_manifest
from tanuki_jax.errors import UserError
from tests.conftest import TEXTS

BAD = [{"title": "no text"}, {"messages": [{"role": "bot", "content": "?"}]}]


def recipe(tmp_path, skip_bad):
    rows = [*BAD, *({"text": text} for text in TEXTS)]
    (tmp_path / "ja.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config.recipe(data=dict(ja=dict(files=str(tmp_path / "ja.jsonl"), skip_bad=skip_bad)))
    c.tokenizer.update(dict(vocab_size=512, character_coverage=1.0))
    c.stages.pretrain = config.stage("pretrain", mixture=dict(ja=(1.0,)), steps=1)
    return config.resolve(c)


def test_bad_rows_of_a_source_are_left_out_of_tokenizer_and_store_on_request(tmp_path):
    ready = inputs.prepare(recipe(tmp_path, True), tmp_path / "run", {"ja"})
    manifest = read_manifest(ready.stores["ja"])
    assert (manifest.rows, manifest.rejected) == (len(TEXTS), len(BAD))


def test_otherwise_they_are_an_error_that_names_the_line(tmp_path):
    with pytest.raises(UserError, match=r"ja\.jsonl:1"):
        inputs.prepare(recipe(tmp_path, False), tmp_path / "run", {"ja"})
