"""The configs of the benchmarks have keys that there are."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tanuki_jax import config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WITH_CONFIG = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if "def get_config" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_a_benchmarks_config_resolves(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert config.resolve(module.get_config()).stages
