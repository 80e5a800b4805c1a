"""Which files a pattern, a link or a folder stands for: each once, and of several splits the one that is trained on."""

import json
import os
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from tanuki_jax.data import paths, sources
from tanuki_jax.errors import UserError


@pytest.fixture(autouse=True)
def told_anew():
    paths.warn.cache_clear()


def texts(patterns):
    return [row.fields["text"] for row in sources.read_rows(str(patterns))]


def write(path, *found):
    """A file of rows that say which file they are of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text} for text in found or [path.name]]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


CLONES = {
    "shards in data": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        2,
    ),
    "folders": (["train/a.parquet", "train/b.parquet", "validation/a.parquet"], 2),
    "names of files": (["my_train.jsonl", "my_dev.jsonl", "README.md"], 1),
    "folders of configs": (["en/train-0.parquet", "en/test-0.parquet", "ja/train-0.parquet"], 2),
    "training": (["data/corpus.training.jsonl", "data/corpus.eval.jsonl"], 1),
    "a word that holds train": (["README.md", "trained.jsonl", "constraint.jsonl"], 2),  # no split: all
    "no split": (["data/a.jsonl", "data/b.jsonl"], 2),
}


@pytest.mark.parametrize("case", CLONES)
def test_of_a_clone_only_the_split_train_is_read_and_it_is_told(tmp_path, capsys, case):
    names, count = CLONES[case]
    folder = tmp_path / "testing" / "clone"  # the names above it say nothing
    for name in names:
        if name == "README.md":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("# A corpus\n")
        else:
            write(folder / name)
    write(folder / ".cache" / "train-9.parquet")
    expected = sorted(name.split("/")[-1] for name in names if name != "README.md")
    if case not in ("no split", "a word that holds train"):
        expected = [name for name in expected if not any(word in name for word in ("test", "dev", "eval"))]
        expected = expected if case != "folders" else ["a.parquet", "b.parquet"]
    assert sorted(texts(folder)) == sorted(expected) and len(expected) == count
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and ("split train" in told or "all 2 files are read" in told)
    texts(folder)
    assert capsys.readouterr().err == ""  # once


def test_of_a_folder_at_a_url_only_the_split_train_is_read(tmp_path, capsys):
    system = fsspec.filesystem("memory")
    for name in ("data/train-0.jsonl", "data/test-0.jsonl"):
        write(tmp_path / name)
        system.pipe(f"/clone/{name}", (tmp_path / name).read_bytes())
    try:
        assert texts("memory://clone") == ["train-0.jsonl"]
        assert "split train, 1 files; not read: test (1)" in capsys.readouterr().err
    finally:
        system.rm("/clone", recursive=True)


def test_a_clone_without_a_split_train_is_an_error_that_names_the_others(tmp_path):
    write(tmp_path / "clone/data/test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"no split train, only test; name the files"):
        texts(tmp_path / "clone")


def test_the_readme_of_a_clone_says_which_files_are_which_split(tmp_path, capsys):
    folder = tmp_path / "clone"
    for name in ("a/one.jsonl", "a/two.jsonl", "b/three.jsonl"):
        write(folder / name)
    one = "- config_name: one\n  data_files:\n  - split: train\n    path: a/one*\n  - split: test\n    path: a/two.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{one}---\n# A corpus\n")
    assert texts(folder) == ["one.jsonl"] and "not read: test (1)" in capsys.readouterr().err
    two = "- config_name: two\n  data_files: b/*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{one}{two}---\n")
    with pytest.raises(UserError, match="holds the configs one, two; name the files of one"):
        texts(folder)
    (folder / "README.md").write_text(f"---\nconfigs:\n{one}{two}  default: true\n---\n")
    assert texts(folder) == ["three.jsonl"]


def test_of_two_formats_of_a_clone_one_is_read(tmp_path, capsys):
    for name in ("data/train-0.parquet", "data/train-1.parquet", "data/train.jsonl"):
        write(tmp_path / "clone" / name)
    assert texts(tmp_path / "clone") == ["train-0.parquet", "train-1.parquet"]
    assert "of another format, and not read: 1 .jsonl" in capsys.readouterr().err


# --- one file once ----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_once_whatever_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl")
    write(tmp_path / "deep/c.jsonl")
    Path("b.jsonl").symlink_to("a.jsonl")
    os.link("a.jsonl", "hard.jsonl")
    Path("linked").symlink_to("deep")
    for patterns in ("a.jsonl,./a.jsonl", "*.jsonl,a.jsonl", f"a.jsonl,{tmp_path}/[ab].jsonl,hard.jsonl", "a.jsonl,a.jsonl"):
        paths.warn.cache_clear()
        assert texts(patterns) == ["a.jsonl"]
        assert capsys.readouterr().err.count("\n") == 1
    assert texts("deep/*.jsonl,linked/c.jsonl") == ["c.jsonl"]
    assert "linked/c.jsonl is the same file as deep/c.jsonl, and is read once" in capsys.readouterr().err
    assert [part.paths for part in sources.parts("a.jsonl,b.jsonl", 1 << 30)] == [("a.jsonl",)]


def test_a_path_that_is_there_is_itself_whatever_its_name_looks_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a[1].jsonl", "a1.jsonl", "b,c.jsonl", "d,e/x.jsonl", "q?.jsonl"):
        write(tmp_path / name)
    assert texts("a[1].jsonl") == ["a[1].jsonl"] and texts("b,c.jsonl") == ["b,c.jsonl"] and texts("q?.jsonl") == ["q?.jsonl"]
    assert texts("a1.jsonl,b,c.jsonl,a[1].jsonl") == ["a1.jsonl", "b,c.jsonl", "a[1].jsonl"]
    assert texts("d,e/*.jsonl,a1.jsonl") == ["x.jsonl", "a1.jsonl"]
    assert sources.split_patterns(",".join(["a1.jsonl"] * 3000)) == ["a1.jsonl"] * 3000  # in no time
    with pytest.raises(UserError, match="no such file: 'nosuch.jsonl'"):
        texts("a1.jsonl,nosuch.jsonl")


def test_what_is_no_file_is_one_line_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "gone.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    write(tmp_path / "closed.jsonl")
    with pytest.raises(UserError, match=r"broken\.jsonl cannot be read: a link to .*gone\.jsonl"):
        texts(tmp_path / "broken.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl is a pipe or a device"):
        texts(tmp_path / "pipe.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path))
    with pytest.raises(UserError, match=r"closed\.jsonl cannot be read: Permission denied"):
        texts(tmp_path / "closed.jsonl")


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("hf://datasets/a/b/*.parquet", "hf download NAME --repo-type dataset"),
        ("nosuch://a.jsonl", "copy it here"),
        ("s3://bucket/a.jsonl", "cannot be opened"),
    ],
)
def test_a_url_that_cannot_be_read_says_what_to_do(url, hint):
    with pytest.raises(UserError, match=hint) as caught:
        texts(url)
    assert "\n" not in str(caught.value)
