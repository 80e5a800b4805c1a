"""One table of settings: a TOML file, flags over it, and one line for every mistake."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tanuki_jax import launch
from tanuki_jax.cli import main
from tanuki_jax.errors import UserError
from tanuki_jax.launch import settings as launch_settings

ROOT = Path(__file__).parents[2]
WORK = ["--name=tanuki", "--config=configs/nano.py", "--workdir=/mnt/run"]


def test_flags_have_the_last_word(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "other"\nslices = 2\npoll = 5\nflags = ["--stage=a"]\npass_env = []\n[env]\nA = "1"\nB = "2"\n')
    read = launch_settings.read("tpu", path, ["--name=tanuki", "--env=B=3=4", "--config.mesh.slices=2", "--queued=false"])
    assert (read.name, read.slices, read.poll, read.queued) == ("tanuki", 2, 5.0, False)
    assert read.env == {"A": "1", "B": "3=4"} and read.flags == ["--stage=a", "--config.mesh.slices=2"]
    assert launch_settings.read("tpu", None, []) == launch_settings.Settings()


@pytest.mark.parametrize("platform", launch.PLATFORMS)
def test_the_example_has_keys_of_its_platform_and_what_is_required(platform):
    path = ROOT / "launch" / f"{platform}.toml"
    read = launch_settings.read(platform, path, [])
    required = [name for name, f in launch_settings.keys_of(platform).items() if f.metadata["required"]]
    launch_settings.require(read, *required)
    assert tomllib.loads(path.read_text())


@pytest.mark.parametrize(
    "text, words",
    [
        ("nmae = 'x'", "there is no setting 'nmae'; do you mean name?"),
        ("zzz = 1", "there is no setting 'zzz'; tanuki launch tpu --help lists them"),
        ("claim = 'x'", "claim is a setting of gke, not of tpu"),
        ("slices = '2'", "slices is '2'; it must be a whole number"),
        ("slices = 2.5", "slices is 2.5; it must be a whole number"),
        ("slices = true", "slices is True; it must be a whole number"),
        ("flags = '--a'", "flags is '--a'; it must be a list of texts"),
        ("flags = [1]", "it must be a list of texts"),
        ("env = {A = 1}", "it must be a table of texts"),
        ("queued = 'no'", "it must be true or false"),
        ("name = ", "is not TOML"),
    ],
)
def test_mistakes_in_the_file(text, words, tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert main.main(["launch", "tpu", "status", "--dry_run", f"--settings={path}"]) == 1
    error = capsys.readouterr().err
    assert words in error and str(path) in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--slices=0", "slices is 0; it must be more than 0"),
        ("--slices=two", "slices is 'two'; it must be a whole number"),
        ("--poll=nan", "poll is nan"),
        ("--queued=yes", "queued is 'yes'; it must be true or false"),
        ("--env=A", "write --env=NAME=VALUE"),
        ("--env=1A=b", "'1A' is no name of an environment variable"),
        ("--name=My_Run", "use at most 50 small letters"),
        ("--workdir=runs/x", "give an absolute path"),
        ("--delete=maybe", "delete is 'maybe'"),
        ("--provisioning_model=cheap", "provisioning_model is 'cheap'"),
        ("--pass_env=NOT_SET_ANYWHERE", "pass_env names NOT_SET_ANYWHERE, which is not set here"),
        ("--settings=nowhere.toml", "cannot read nowhere.toml: No such file"),
        ("--claim=x", "unrecognized arguments: --claim=x"),
        ("--slice=2", "unrecognized arguments: --slice=2"),
        ("--config=configs/nowhere.py", "config: there is no configs/nowhere.py in the committed state"),
    ],
)
def test_mistakes_in_flags(flag, words, capsys):
    assert main.main(["launch", "tpu", "run", "--dry_run", "--zone=z", "--type=v5p-8", *WORK, flag]) == 1
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("platform", launch.PLATFORMS)
def test_help_has_every_action_and_every_key(platform, capsys):
    with pytest.raises(SystemExit):
        main.main(["launch", platform, "--help"])
    shown = capsys.readouterr().out
    assert all(f"  {action} " in shown for action in launch.actions(platform))
    assert all(f"--{name} " in shown for name in launch_settings.keys_of(platform))
    with pytest.raises(SystemExit):
        main.main(["launch", "--help"])
    assert main.main(["launch", platform, "explode"]) == 1 and "explode" in capsys.readouterr().err


def test_a_program_that_is_not_there_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main.main(["launch", "tpu", "status", "--zone=z", "--type=v5p-8", *WORK]) == 1
    assert "gcloud is not installed; see https://cloud.google.com/sdk" in capsys.readouterr().err


def test_a_launch_needs_no_jax():
    script = "import sys, tanuki_jax.launch as l; [l.actions(p) for p in l.PLATFORMS]; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_a_name_that_is_not_set():
    with pytest.raises(UserError, match="name is not set; it is of the request|name is not set"):
        launch_settings.require(launch_settings.Settings(), "name")
