import json

import pytest

from tanuki_jax import config
from tanuki_jax.data.prepare import read_manifest
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import artifacts
from tanuki_jax.recipe.workdir import Workdir
from tests.conftest import TEXTS

BAD = [{"title": "no text"}, {"messages": [{"role": "bot", "content": "?"}]}]


def recipe(tmp_path, skip_invalid):
    rows = [*BAD, *({"text": text} for text in TEXTS)]
    (tmp_path / "ja.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config.recipe(data=dict(ja=dict(files=str(tmp_path / "ja.jsonl"), skip_invalid=skip_invalid)))
    c.tokenizer.update(dict(vocab_size=512, character_coverage=1.0))
    c.stages.pretrain = config.stage("pretrain", mixture=dict(ja=(1.0,)), steps=1)
    return config.resolve(c)


def test_bad_rows_of_a_source_are_left_out_of_tokenizer_and_store_on_request(tmp_path):
    ready = artifacts.prepare(recipe(tmp_path, True), Workdir(tmp_path / "run"), {"ja"})
    manifest = read_manifest(ready.stores["ja"])
    assert (manifest.rows, manifest.rejected) == (len(TEXTS), len(BAD))


def test_otherwise_they_are_an_error_that_names_the_line(tmp_path):
    with pytest.raises(UserError, match=r"ja\.jsonl:1"):
        artifacts.prepare(recipe(tmp_path, False), Workdir(tmp_path / "run"), {"ja"})


def two_languages(tmp_path, **files):
    c = config.recipe(data=dict(ja="", en=""))
    for name in files:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        c.data[name] = str(tmp_path / f"{name}.jsonl")
    c.tokenizer.update(dict(vocab_size=512, character_coverage=1.0))
    c.stages.pretrain = config.stage("pretrain", mixture=dict(ja=(1.0,), en=(0.0,)), steps=1)
    return c


def test_a_source_without_files_that_no_stage_reads_is_not_asked_for(tmp_path):
    c = two_languages(tmp_path, ja=1)
    assert list(artifacts.prepare(config.resolve(c), Workdir(tmp_path / "run"), {"ja"}).stores) == ["ja"]
    c.stages.pretrain.mixture = dict(ja=(1.0,), en=(0.5,))
    with pytest.raises(UserError, match=r"data\.en is empty; set it to your files"):
        artifacts.prepare(config.resolve(c), Workdir(tmp_path / "run"), {"ja", "en"})
    c.stages.pretrain.mixture, c.tokenizer.sources = dict(ja=(1.0,)), ("ja", "en")  # asked for by name
    with pytest.raises(UserError, match=r"data\.en is empty"):
        artifacts.prepare(config.resolve(c), Workdir(tmp_path / "run"), {"ja"})


@pytest.mark.parametrize(
    "victim", ["store-*/manifest.json", "store-*/tokens-*.bin", "store-*/tokens-*.idx", "tokenizer-*/tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_what_is_damaged_of_the_cache_is_made_anew_and_told(tmp_path, capsys, caplog, victim, damage):
    made = config.resolve(two_languages(tmp_path, ja=1))
    before = read_manifest(artifacts.prepare(made, Workdir(tmp_path / "run"), {"ja"}).stores["ja"])
    [path] = (tmp_path / "run" / "data").glob(victim)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    caplog.clear()
    assert read_manifest(artifacts.prepare(made, Workdir(tmp_path / "run"), {"ja"}).stores["ja"]) == before
    told = [line for line in caplog.messages if "damaged" in line]
    capsys.readouterr()
    assert len(told) == 1 and str(path.parent) in told[0] and "made anew" in told[0]
    artifacts.prepare(made, Workdir(tmp_path / "run"), {"ja"})
    assert capsys.readouterr().err == ""
