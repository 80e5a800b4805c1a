"""Every numeric key of the schema has a range, which its page names and nothing passes, from a file or a flag."""

import copy
import math
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tanuki_jax import config
from tanuki_jax.config.ranges import Range
from tanuki_jax.errors import UserError
from tests.config.golden.__main__ import DOCS, numeric, ranges
from tests.config.test_config import kind_of, named, recipe

NUMERIC, VALID = numeric(), recipe()
RANGES = {name: field.metadata["range"] for name, field in NUMERIC.items()}
ODD = (-1, 0, math.nan, math.inf, -math.inf, 1e30, -1e30, 10**30, 10**5000, 1, 0.5, True, None, "1", [1], {})
# In dictionaries of the user's own names: the one that holds the number, and how.
HELD = {
    "tokenizer.language_weights": lambda x: {"": x},
    "stages.NAME.mixture": lambda x: {"ja": (x,)},
    "stages.NAME.phase_start_tokens": lambda x: (x,),
    "stages.NAME.loss.preference": lambda x: {"sigmoid": x},
    "stages.NAME.lora.targets": lambda x: {"attn/q": x},
}


def put(name, value):
    """The valid recipe of test_config with a number put where the key holds one."""
    values = copy.deepcopy(VALID)
    *groups, last = named(name).split(".")
    place = values
    for group in groups:
        place = place[group]
    place[last] = HELD.get(name, lambda x: x)(value)
    return values


def scalar(name):
    """int or float."""
    kind = kind_of(NUMERIC[name])
    while typing.get_origin(kind):
        kind = [a for a in typing.get_args(kind) if a not in (str, ...)][0]
    return kind


def fits(name, value):
    """Whether a value has the type of the key's numbers and lies in their range."""
    right = type(value) is int or (type(value) is float and scalar(name) is float)
    return right and value in RANGES[name]


def test_every_number_has_a_range_that_its_default_is_in():
    for name, field in NUMERIC.items():
        assert isinstance(RANGES[name], Range), f"{name} needs a range in the schema"
        if type(field.default) in (int, float):
            assert field.default in RANGES[name], name


def test_the_page_lists_the_ranges_of_the_schema():
    page = DOCS.read_text(encoding="utf-8")
    assert page.endswith(ranges()), "the keys have changed; run `python -m tests.config.golden`"
    assert all(f"| `{name}` |" in page and found.describe() in page for name, found in RANGES.items())


@pytest.mark.parametrize("name", NUMERIC)
def test_a_number_is_accepted_only_inside_its_range(name):
    for value in ODD:
        try:
            config.resolve(put(name, value))
        except UserError as error:
            assert "\n" not in str(error)
            if not fits(name, value):  # what is in range may contradict another key
                assert str(error).startswith(f"config: {named(name)}") and "must " in str(error), str(error)
        else:
            assert fits(name, value), f"{value} accepted"


@pytest.mark.parametrize("name", NUMERIC)
def test_the_ends_of_a_range(name):
    found, kind = RANGES[name], scalar(name)
    step = 1 if kind is int else 1e-3 * max(abs(found.low), 1e-9)
    for value, inside in ((found.low, found.open != "low"), (found.low - step, False), (found.high, found.open != "high")):
        if kind(value) != found.besides:
            said = ""
            try:
                config.resolve(put(name, kind(value)))
            except UserError as error:
                said = str(error)
            assert (f"it must be {found.describe()}" not in said) == inside, (value, said)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "valid.py"
    path.write_text(f"def get_config():\n    return {VALID!r}\n")
    return path


@pytest.mark.parametrize("name", NUMERIC)
def test_a_flag_is_accepted_only_inside_the_range(name, file):
    if name == "tokenizer.language_weights":  # has no name that a flag could set in this recipe
        return
    for value in (-1, 1e30, math.nan, "x"):  # of all others the test above
        held = HELD.get(name, lambda x: x)(value)
        try:
            config.load([f"--config={file}", f"--config.{named(name)}={held}"])
        except UserError as error:
            assert "\n" not in str(error) and named(name).rsplit(".", 1)[0] in str(error)
        else:
            assert fits(name, value), f"{value} accepted"


numbers = st.integers() | st.floats(allow_nan=False)


@given(numbers, numbers, st.sampled_from(["", "low", "high", "both"]), numbers)
def test_a_range_holds_what_it_says(low, high, open_, value):
    found = Range(low, high, open_)
    assert (value in found) == (
        low <= value <= high and (value != low or open_ in ("", "high")) and (value != high or open_ in ("", "low"))
    )
    assert math.nan not in found
    assert "at least" in found.describe() or "above" in found.describe()
