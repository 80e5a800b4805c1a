import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tanuki_jax.cli import jax_platform

MAKEFILE = Path(__file__).parents[2] / "Makefile"


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """A Linux machine with libtpu and without any accelerator."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(jax_platform.sys, "platform", "linux")
    monkeypatch.setattr(jax_platform.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(jax_platform, "DEVICES", (f"{tmp_path}/dev/accel*", f"{tmp_path}/dev/nvidia*"))
    monkeypatch.setattr(jax_platform, "has_tpu", lambda: False)
    (tmp_path / "dev").mkdir()
    yield tmp_path / "dev"
    os.environ.pop("JAX_PLATFORMS", None)


def test_libtpu_is_not_started_where_there_is_no_accelerator(plain):
    jax_platform.choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", ["accel0", "nvidia0", "nvidiactl"])
def test_a_machine_with_an_accelerator_is_left_alone(plain, name):
    (plain / name).touch()
    jax_platform.choose_platform()
    assert "JAX_PLATFORMS" not in os.environ


def test_what_the_user_has_chosen_or_what_has_no_libtpu_is_left_alone(plain, monkeypatch):
    for chosen in ("", "tpu", "cuda,cpu"):
        monkeypatch.setenv("JAX_PLATFORMS", chosen)
        jax_platform.choose_platform()
        assert os.environ["JAX_PLATFORMS"] == chosen
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(jax_platform.importlib.util, "find_spec", lambda name: None)
    jax_platform.choose_platform()
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [("0x1ae0", "0x120000", True), ("0x1ae0", "0x020000", False), ("0x1ae0", "0x010802", False), ("0x10de", "0x030200", False)],
    ids=["a chip", "network of a cloud machine", "storage of one", "somebody else's"],
)
def test_a_chip_without_a_driver_is_found_by_its_class(tmp_path, vendor, kind, found):
    (tmp_path / "0000:00:04.0").mkdir()
    (tmp_path / "0000:00:05.0").mkdir()  # says nothing
    (tmp_path / "0000:00:04.0/vendor").write_text(f"{vendor}\n")
    (tmp_path / "0000:00:04.0/class").write_text(f"{kind}\n")
    assert jax_platform.has_tpu(str(tmp_path)) == found


# --- what can be pasted anywhere -----------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """A virtual environment with `tanuki` in a folder with a space and a quotation mark."""
    home = tmp_path / "a folder's name" / "bin"
    home.mkdir(parents=True)
    for name in ("python", "tanuki"):
        (home / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(home / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return home


def test_the_program_is_named_so_that_any_shell_in_any_directory_finds_it(environment, monkeypatch):
    assert shlex.split(jax_platform.program()) == [str(environment / "tanuki")]
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin:/bin")
    assert jax_platform.program() == "tanuki"


def test_another_tanuki_on_the_path_is_not_taken_for_this_one(environment, monkeypatch, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tanuki").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    assert shlex.split(jax_platform.program()) == [str(environment / "tanuki")]
    (environment / "tanuki").unlink()
    assert jax_platform.program() == "tanuki"
    monkeypatch.setenv("PATH", "")
    assert shlex.split(jax_platform.program()) == [str(environment / "python"), "-m", "tanuki_jax.cli"]


def dry_run(folder, *arguments):
    """What make would run, said as if no other make had started it (as the one that runs these tests has)."""
    make = ["make", "--dry-run", "--no-print-directory", f"--file={MAKEFILE}", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(make, cwd=folder, capture_output=True, text=True, check=True, env=environment).stdout


@pytest.mark.parametrize("target", ["demo", "test", "check", "format", "lock"])
def test_every_path_of_the_makefile_is_one_word_of_the_shell(tmp_path, target):
    here = tmp_path / "a folder's name"
    here.mkdir()
    for name in ("pyproject.toml", "the lock.txt"):
        (here / name).touch()
    given = {"VENV": f"{here}/an env", "PYTHON": f"{here}/a python", "WORKDIR": "it's mine", "LOCK": "the lock.txt"}
    printed = dry_run(here, target, *(f"{name}={value}" for name, value in given.items()))
    words = [word for line in printed.splitlines() for word in shlex.split(line)]
    whole = {given["PYTHON"], *(f"{given['VENV']}{end}" for end in ("", "/.installed", "-lock"))}
    broken = [w for w in words if str(here) in w and w not in whole and not w.startswith(tuple(f"{p}/bin/" for p in whole))]
    assert broken == [] and given["PYTHON"] in words
    assert target != "demo" or words[-1] == "--workdir=it's mine" and given["LOCK"] in words


def test_a_finished_setup_in_a_folder_with_a_space_is_not_made_again(tmp_path):
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).touch()
    (tmp_path / "an env").mkdir()
    (tmp_path / "an env/.installed").touch()
    assert "Nothing to be done" in dry_run(tmp_path, "setup", "VENV=an env")
