"""Which checkpoints a stage keeps beside the newest."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.test_loop import job, run

LOSSES = [5.0, 3.0, 4.0, 1.0, 2.0, 6.0, 1.5, 7.0, 8.0, 9.0]  # validation after each step


def validated(losses):
    left = iter(losses)
    return [(1, lambda params: {"validation/ja/loss": next(left), "validation/ja/bits_per_byte": 0.0})]


def kept(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir())


@given(st.integers(1, 3), st.integers(0, 4), st.integers(0, 3), st.permutations(LOSSES))
@settings(max_examples=6, deadline=None)
def test_the_newest_every_kth_and_the_best_are_kept(tmp_path_factory, keep, every, best, losses):
    home = tmp_path_factory.mktemp("kept")
    run(job(home, steps=10, save_every=1, keep_latest=keep, keep_every=every, keep_best=best), probes=validated(losses))
    lowest = sorted(range(1, 11), key=lambda step: losses[step - 1])[:best]
    multiples = [step for step in range(1, 11) if every and step % every == 0]
    assert set(kept(home)) == {*range(11 - keep, 11), *lowest, *multiples}


def test_the_best_are_remembered_by_a_run_that_goes_on(tmp_path):
    options = dict(steps=10, save_every=1, keep_latest=1, keep_best=2)

    def dies(first):
        yield from range(first, 6)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, **options), dies, probes=validated(LOSSES))
    run(job(tmp_path, **options), probes=validated(LOSSES[6:]))
    assert kept(tmp_path) == [4, 7, 10]


def test_steps_that_were_not_validated_are_not_the_best(tmp_path):
    probes = [(5, validated([3.0, 2.0])[0][1])]
    run(job(tmp_path, steps=10, save_every=1, keep_latest=1, keep_best=2), probes=probes)
    assert kept(tmp_path) == [5, 10]
