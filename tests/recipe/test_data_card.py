"""A data card counts the licences of rows that a model has made; a user's files may have any name and any field."""

import json

import pytest

from tanuki_jax.data import sources
from tanuki_jax.recipe import data_card
from tanuki_jax.recipe.source_files import SourceFiles


def write(path, *rows):
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_made_rows_name_the_licences_of_model_and_seed(tmp_path):
    calls = [{"license": "mit", "seed_license": "cc-by-nc-4.0"}, {"license": ""}]
    rows = write(tmp_path / "a/rows.jsonl", {"text": "a", "provenance": calls}, {"text": "b"})
    counts = tmp_path / "report.json"
    counts.write_text(json.dumps({"dropped": {"cut": 2}, "filtered": {"leaks": 1, "cut": 1}}))
    located = SourceFiles(rows, "", sources.PLAIN, (counts,), generated=True)
    assert data_card._licenses(located) == {"cc-by-nc-4.0, mit, not named": 1, "not named": 1}
    assert data_card._dropped(located) == {"cut": 3, "leaks": 1}


@pytest.mark.parametrize("pattern", ["a/rows.jsonl", "*/rows.jsonl", "a/rows.jsonl,b/rows.jsonl"])
def test_a_users_file_of_that_name_is_a_file_like_any_other(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write(tmp_path / name / "rows.jsonl", {"text": "a", "provenance": "web"}, {"title": "no text"})
    located = SourceFiles(pattern, "", sources.PLAIN)
    assert data_card._licenses(located) == data_card._dropped(located) == {}
    assert data_card._samples(located)[0] == {"text": "a", "provenance": "web"}
