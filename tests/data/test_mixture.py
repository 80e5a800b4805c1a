from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tanuki_jax.data.mixture import BLOCK, StagedMixture

quick = settings(max_examples=10, deadline=None)


@st.composite
def mixtures(draw):
    """Weights [phases][sources] and the rows at which the phases begin."""
    sources, phases = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    weights = [draw(st.lists(st.integers(0, 20), min_size=sources, max_size=sources)) for _ in range(phases)]
    assume(all(map(any, weights)))
    gaps = draw(st.lists(st.integers(1, 2 * BLOCK), min_size=phases - 1, max_size=phases - 1))
    return weights, [0, *np.cumsum(gaps).tolist()]


@quick
@given(mixtures())
@example(([[10, 1, 1, 1], [1, 2, 5, 8]], [0, 5000]))
@example(([[20, 1, 1, 1, 1, 1]], [0]))
def test_shares_follow_the_weights_of_each_phase_to_within_a_row_at_any_point(mixture):
    weights, starts = mixture
    staged = StagedMixture(weights, starts, starts[-1] + 2 * BLOCK)
    for phase, (start, stop) in enumerate(zip(starts, [*starts[1:], len(staged)], strict=True)):
        chosen = np.array([staged[i][0] for i in range(start, min(stop, start + BLOCK))])
        counts = np.cumsum(chosen[:, None] == np.arange(len(weights[0])), axis=0)
        rows = np.arange(1, len(chosen) + 1)[:, None]
        due = rows * np.array(weights[phase]) / sum(weights[phase])
        assert np.abs(counts - due).max() <= 1 + 1e-9


@quick
@given(mixtures())
def test_no_row_of_a_source_is_skipped_or_repeated_through_all_phases(mixture):
    weights, starts = mixture
    staged = StagedMixture(weights, starts, starts[-1] + BLOCK)
    seen = [0] * len(weights[0])
    for i in range(0, starts[-1] + 200):
        source, row = staged[i]
        assert row == seen[source]
        seen[source] += 1
        if i % 97 == 0:
            assert staged.used(i + 1).tolist() == seen


@quick
@given(mixtures(), st.integers(0, 10**9))
def test_a_row_is_a_pure_function_of_its_number(mixture, far):
    weights, starts = mixture
    staged, again = (StagedMixture(weights, starts, n) for n in (10, 10**10))
    order = np.random.default_rng(0).permutation(starts[-1] + 100)[:300].tolist()
    assert {i: staged[i] for i in order} == {i: again[i] for i in sorted(order)}
    source, row = staged[far]
    assert row == staged.used(far)[source] and staged.used(far).sum() == far


def test_phases_change_exactly_where_they_are_said_to():
    starts = [0, 5000, 5001, 12_000]
    staged = StagedMixture([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]], starts, 15_000)
    sources = [staged[i][0] for i in range(15_000)]
    assert sources == [0] * 5000 + [1] + [2] * 6999 + [0] * 3000
    assert staged[12_000] == (0, 5000) and staged[5001] == (2, 0)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_tokens_of_a_phase_follow_its_weights_closely_within_a_thousand_steps(data):
    sources, phases = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    weight = st.one_of(st.just(0.0), st.floats(1e-3, 1.0))
    weights = [data.draw(st.lists(weight, min_size=sources, max_size=sources).filter(any)) for _ in range(phases)]
    rows = 1000 * data.draw(st.integers(8, 12))
    extra = data.draw(st.lists(st.integers(0, BLOCK), min_size=phases, max_size=phases))
    starts = [0, *np.cumsum([rows + more for more in extra]).tolist()[:-1]]
    staged = StagedMixture(weights, starts, starts[-1] + rows)
    for phase, start in enumerate(starts):
        drawn = (staged.used(start + rows) - staged.used(start)) / rows
        np.testing.assert_allclose(drawn, np.array(weights[phase]) / sum(weights[phase]), rtol=0, atol=1e-3)


@settings(max_examples=8, deadline=None)
@given(mixtures(), st.integers(0, 3 * BLOCK), st.integers(0, 2**40))
def test_a_later_stage_goes_on_from_the_rows_that_were_used_before(mixture, rows, far):
    weights, starts = mixture
    plain = StagedMixture(weights, starts, 10)
    before = plain.used(rows) + far
    later = StagedMixture(weights, starts, 10, before.tolist())
    for i in (0, 1, rows, rows + 1, starts[-1], starts[-1] + 1, 10**9):
        source, row = plain[i]
        assert later[i] == (source, row + before[source])
    assert later.used(rows).tolist() == plain.used(rows).tolist() and later.first.tolist() == before.tolist()


def weights_of(kind, rng):
    count = int(rng.integers(1, 13))
    if kind == "over six decades":
        return (10.0 ** rng.uniform(-6, 0, count)).tolist()
    if kind == "a few large ones":
        return (rng.dirichlet(np.full(count, 0.3)) + 1e-6).tolist()
    return rng.uniform(1e-6, 1, count).tolist()


def check_shares(kind, seed, rows, step):
    weights = weights_of(kind, np.random.default_rng(seed))
    staged = StagedMixture([weights], [0], rows)
    share = np.array(weights) / sum(weights)
    for n in range(step, rows + 1, step):
        assert np.abs(staged.used(n) - n * share).max() <= 1, (weights, n)


@pytest.mark.parametrize("kind", ["over six decades", "a few large ones", "any"])
def test_every_source_is_within_a_row_of_its_share_however_small(kind):
    for seed in range(4):
        check_shares(kind, seed, 10**6, 10**5)


@pytest.mark.parametrize("weights", [[1.0] * 3 + [1e-4] * 5, [0.25] * 4 + [1e-5] * 4, [1.0] * 12, [1, 0.1, 0.01, 0.1, 1, 1e-6]])
def test_sources_whose_shares_are_multiples_of_one_another_do_not_crowd(weights):
    staged = StagedMixture([weights], [0], 10**7)
    share = np.array(weights) / sum(weights)
    for first in (0, 2000 * BLOCK, 2001 * BLOCK):
        chosen = np.array([staged[first + i][0] for i in range(BLOCK)])
        counts = staged.used(first) + np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
        assert np.abs(counts - (first + 1 + np.arange(BLOCK))[:, None] * share).max() <= 1 + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["over six decades", "a few large ones", "any"])
def test_many_mixtures_are_within_a_row_of_every_share_at_every_ten_thousandth_row(kind):
    for seed in range(25):
        check_shares(kind, 1000 + seed, 10**6, 10**4)


@pytest.mark.parametrize("weight", [1e-3, 1.5e-4, 1e-4, 5e-5, 1e-6, 1e-12])
def test_a_rare_source_is_read_when_its_first_row_is_due_and_not_before(weight):
    staged = StagedMixture([[1.0, weight]], [0], 10**14)
    for rows in (10**4, 10**6, 10**9, 10**13):
        assert abs(int(staged.used(rows)[1]) - rows * weight / (1 + weight)) <= 1


def test_shares_do_not_drift_at_the_end_of_any_run():
    weights = [0.1, 0.3, 1 / 3, 1e-5]
    exact = [Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    staged = StagedMixture([weights], [0], 1 << 60)
    for rows in (10**12, (1 << 50) + 12_345):
        assert max(abs(n - rows * share) for n, share in zip(staged.used(rows).tolist(), exact, strict=True)) <= 1


def test_weights_of_any_size_are_shares():
    huge, tiny = (StagedMixture([[a, b, 0.0]], [0], 10) for a, b in ((1e300, 3e300), (1e-300, 3e-300)))
    assert huge.used(1000).tolist() == tiny.used(1000).tolist() == [250, 750, 0]
    assert StagedMixture([[1e300, 1e-300]], [0], 10).used(10**6).tolist() == [10**6, 0]
    for bad in ([0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises((ValueError, OverflowError)):
            StagedMixture([bad], [0], 10)
