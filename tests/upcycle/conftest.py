import pytest

from tanuki_jax.cli.main import main
from tests.interop.llama import drawn, write
from tests.upcycle.sources import CFG, LLAMA, NOISY, Source, save


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where a source lies."""
    made = {}

    def find(source):
        if source not in made:
            home = tmp_path_factory.mktemp("dense") / "-".join(map(str, source))
            arrays = drawn(CFG, source.seed, source.dtype)
            made[source] = save(home, CFG, arrays) if source.kind == "ours" else write(home, CFG, arrays)
        return str(made[source])

    return find


@pytest.fixture(scope="module")
def ours(place):
    return place(Source())


@pytest.fixture(scope="module")
def mixture(place, tmp_path_factory):
    """What the command line makes of a checkpoint of Hugging Face with `NOISY` and the seed 7."""
    output = tmp_path_factory.mktemp("mixture") / "mixture"
    assert main(["upcycle", f"--checkpoint={place(LLAMA)}", f"--output={output}", *NOISY, "--seed=7"]) == 0
    return output
