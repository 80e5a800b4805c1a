"""Batches left out after a rollback: which batch a step has, and what comes back from the file."""

import dataclasses
import math

from hypothesis import given
from hypothesis import strategies as st

from tanuki_jax.train.rollback import SkippedBatches

rollbacks = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9), st.sampled_from([1.0, 0.5])), max_size=6)


def left_out(entries):
    """The rollbacks after going back again and again, and the batches that each leaves out, by its own event."""
    found, gone = SkippedBatches(None), set()
    for first, count, rate in entries:
        gone |= {found.batch(step) for step in range(first, first + count)}
        found = found.with_rollback(max(0, first - 3), first, count, rate)
    return found, gone


@given(rollbacks)
def test_steps_are_a_bijection_onto_the_batches_not_left_out(entries):
    found, gone = left_out(entries)
    batches = [found.batch(step) for step in range(150)]
    assert batches == sorted(set(batches))
    assert batches == [n for n in range(300) if n not in gone][:150]


@given(rollbacks)
def test_rollbacks_come_back_from_their_file(tmp_path_factory, entries):
    directory = tmp_path_factory.mktemp("rollbacks")
    found = dataclasses.replace(left_out(entries)[0], path=directory / "rollbacks.json")
    found.write()
    assert SkippedBatches.read(directory) == found
    assert [found.lr_scale(s) for s in range(80)] == [math.prod(e[3] for e in found.rollbacks if s >= e[0]) for s in range(80)]
