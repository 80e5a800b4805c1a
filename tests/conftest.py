"""Tests run on CPU with 8 forced host devices; a GPU is touched only where TANUKI_TEST_PLATFORM=cuda asks for one."""

import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("TANUKI_TEST_PLATFORM", "cpu")
# The programs here are tiny and compiling them is nearly all the time that tests take, so LLVM need not try hard, and XLA's
# older code for fusions, which it compiles in half the time, will do where it is still there: a flag that XLA does not know
# ends the process without a word.
OLDER_FUSIONS = ["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        *OLDER_FUSIONS,
    ]
)
# XLA's CPU collectives block threads of a pool sized by the cores; with fewer cores than devices they would deadlock.
os.environ["NPROC"] = "16"
# The same small programs are compiled by many tests and by the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tanuki_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from hypothesis import settings

from tanuki_jax.data.chat import TEMPLATE
from tanuki_jax.data.tokenizer import Tokenizer

settings.register_profile("tests", deadline=None)  # a busy machine is no fault
settings.load_profile("tests")
jax.config.update("jax_cpu_enable_async_dispatch", False)
# Tracing makes many objects and hardly any cycles; looking for these as often as Python does took 7 % of the time.
gc.set_threshold(50_000, 10, 5)

TEXTS = [
    "昔々、山の奥に狸が住んでいました。狸は毎日、川で魚を取り、夜は月を見ていました。",
    "The tanuki lived deep in the mountains, 3 miles from the river; it caught fish and watched the moon.",
    "1、2、3を足すと6です。合計は6です。平均は2です。",
    "What is the sum of 1, 2, 3? The sum is 6. The mean is 2.",
    "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。",
    "### 指示:\nこんにちは\n\n### 応答:\nこんにちは。",
] * 20


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Every compiled program maps memory, and a process may have 65,530 maps; the thousands of a whole run are too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A small tokenizer trained on TEXTS."""
    from tokenization.options import Hooks, TrainOptions
    from tokenization.train import train

    directory = tmp_path_factory.mktemp("tokenizer")
    options = TrainOptions(vocab_size=512, character_coverage=1.0, boundary="morpheme")
    train([("", text) for text in TEXTS], directory, options, Hooks(chat_template=TEMPLATE))
    return Tokenizer(directory)
