"""Where the rows of a source lie, and what is looked at before anything long begins."""

import json

import pytest

from tanuki_jax import config
from tanuki_jax.data import paths
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import source_files
from tanuki_jax.recipe.workdir import Workdir

URL = "http://127.0.0.1:1/v1"


def recipe(**sources):
    c = config.recipe(data=sources)
    c.endpoints.far = config.endpoint(URL)
    c.synth.talks = config.synth("answer", seeds=dict(prompts="prompts.jsonl"), generator="far")
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
    source_files.check(recipe(ja=file, en=file), {"ja", "en"})
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
        source_files.check(recipe(ja=files), {"ja"})


def test_rows_that_are_there_are_never_made_again(tmp_path):
    """No endpoint answers at that address, and none is asked."""
    workdir = Workdir(tmp_path)
    made = recipe(ja="synth:talks")
    source_files.check(made, {"ja"})
    workdir.rows_file("talks").parent.mkdir(parents=True)
    rows = write(workdir.rows_file("talks"), {"messages": []})
    first = source_files.locate(made, "ja", workdir)
    assert first.files == rows and source_files.locate(made, "ja", workdir) == first
    write(workdir.rows_file("talks"), {"messages": [{"role": "user", "content": "a"}]})
    assert source_files.locate(made, "ja", workdir).identity != first.identity  # so that a changed file is seen


def test_rows_of_a_stage_that_has_not_run_are_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"synth\.own is made by stage sampling, .* run it first"):
        source_files.locate(recipe(ja="synth:own"), "ja", Workdir(tmp_path))
