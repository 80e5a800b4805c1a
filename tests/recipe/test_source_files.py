"""Where the rows of a source lie, and what is looked at before anything long begins."""

import json

import pytest

from tanuki_jax import config
from tanuki_jax.data import paths
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import source_files
from tanuki_jax.recipe.workdir import Workdir
from tests.synth import fake_server

URL = "http://127.0.0.1:1/v1"


def recipe(url=URL, prompts="prompts.jsonl", turns=2, **sources):
    c = config.recipe(data=sources)
    c.endpoints.far = config.endpoint(url, model="fake")
    c.synth.talks = config.synth("answer", seeds=dict(prompts=prompts), generator="far", turns=turns)
    c.synth.own = config.synth("preferences", seeds=dict(prompts="rules:prompts"), judge="rules")
    c.data.more = "rules:documents_ja"
    c.stages.base = config.stage("pretrain", mixture=dict(more=(1.0,)), steps=1)
    c.stages.sampling = config.stage("synth", init_from="base", synth="own")
    c.stages.pretrain = config.stage("pretrain", init_from="base", mixture={name: (1.0,) for name in sources}, steps=1)
    return config.resolve(c)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_two_sources_is_told(tmp_path, capsys):
    paths.warn.cache_clear()
    file = write(tmp_path / "ja.jsonl", {"text": "a"})
    source_files.check(recipe(ja=file, en=file), ["pretrain"])
    assert "ja.jsonl is in the sources en and ja" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, words",
    [
        ("", "data.ja is empty; set it to your files"),
        ("nowhere/*.jsonl", "no such file: 'nowhere/"),
        ("rules:poems", "'rules:poems'; rules: makes documents_ja"),
        ("bad.jsonl", "bad.jsonl:1"),
    ],
)
def test_what_cannot_be_read_is_told_before_anything_long_begins(tmp_path, monkeypatch, files, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bad.jsonl", {"title": "no text"}, {"text": "a"})
    with pytest.raises(UserError, match=words):
        source_files.check(recipe(ja=files), ["pretrain"])


def test_rows_that_are_there_are_never_made_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = Workdir(tmp_path)
    write(tmp_path / "prompts.jsonl", {"prompt": "空の色は何ですか。"})
    with fake_server.serve(lambda request: "空の色は青です。") as (url, _):
        made = recipe(url=url, ja="synth:talks")
        source_files.check(made, ["pretrain"])
        first = source_files.locate(made, "ja", workdir)
    # No endpoint answers at that address any more, and none is asked.
    assert source_files.locate(made, "ja", workdir) == first and first.generated
    write(workdir.rows_file("talks"), {"messages": [{"role": "user", "content": "a"}]})
    assert source_files.locate(made, "ja", workdir).identity != first.identity  # so that a changed file is seen
    with pytest.raises(UserError, match="made with other settings"):
        source_files.locate(recipe(url=url, turns=3, ja="synth:talks"), "ja", workdir)


@pytest.mark.parametrize("seeds", ["builtin:nowhere", "nowhere.jsonl"])
def test_seeds_that_are_not_there_are_told_before_anything_long_begins(tmp_path, monkeypatch, seeds):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        source_files.check(recipe(prompts=seeds, ja="synth:talks"), ["pretrain"])


def test_rows_of_a_stage_that_has_not_run_are_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"synth\.own is made by stage sampling, .* run it first"):
        source_files.locate(recipe(ja="synth:own"), "ja", Workdir(tmp_path))
