import functools
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax import config, parallel
from tanuki_jax.data import loader
from tanuki_jax.data.layouts import Windows
from tanuki_jax.data.mixture import StagedMixture
from tanuki_jax.data.store import Store, StoreWriter
from tanuki_jax.errors import UserError

STEPS, BATCH = 6, 16
FAR = 10**6


class Numbered:
    """A source of rows that say who they are, and remembers which were read."""

    def __init__(self, name, size):
        self.name, self.size, self.read = name, size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        return {"tokens": np.array([self.name, index], np.int32)}


def rows(seed=0, sizes=(40, 23), run=1, steps=STEPS):
    mixture = StagedMixture([[1.0] * len(sizes), [1.0] + [0.0] * (len(sizes) - 1)], [0, 50], steps * BATCH)
    return loader.mixed_rows([loader.Source(Numbered(k, n), 10 * seed + k, run) for k, n in enumerate(sizes)], mixture)


def read(dataset, first=0, steps=STEPS):
    mesh = parallel.make_mesh(config.Mesh())
    return np.array([np.asarray(b["tokens"]) for b in loader.batches(dataset, mesh, BATCH, first, steps)])


# --- batches ------------------------------------------------------------------------------------------------------------


def test_batch_n_holds_the_rows_of_step_n_in_order():
    dataset = rows()
    expected = [dataset[i]["tokens"] for i in range(STEPS * BATCH)]
    np.testing.assert_array_equal(read(dataset).reshape(-1, 2), expected)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_reads_the_same_global_batches(monkeypatch, hosts):
    expected = read(rows())
    parts = []
    for host in range(hosts):
        host_rows = list(range(host * BATCH // hosts, (host + 1) * BATCH // hosts))
        with monkeypatch.context() as patch:
            patch.setattr(loader, "_host_rows", lambda mesh, size, host_rows=host_rows: host_rows)
            patch.setattr(loader, "on_devices", lambda batch, mesh, size, first: (first, batch["tokens"]))
            batches = list(loader.batches(rows(), None, BATCH, 0, STEPS))
        assert all(first == host_rows[0] for first, _ in batches)
        parts.append([tokens for _, tokens in batches])
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


class Cached:
    """Rows that are computed once (Grain's shuffle of a short range takes milliseconds per row)."""

    def __init__(self, dataset):
        self.dataset, self.rows = dataset, {}

    def __getitem__(self, index):
        if index not in self.rows:
            self.rows[index] = self.dataset[index]
        return self.rows[index]


@pytest.mark.parametrize("run", [1, 3])
@pytest.mark.parametrize("step", [0, 1, 1000, FAR])
def test_the_batch_of_a_step_depends_on_neither_hosts_nor_what_is_read_ahead(monkeypatch, step, run):
    dataset = Cached(rows(run=run, steps=FAR + 2))
    expected = [[dataset[n * BATCH + row]["tokens"] for row in range(BATCH)] for n in (step, step + 1)]
    for hosts, prefetch in ((1, 1), (1, 32), (2, 4), (4, 1), (8, 4)):
        monkeypatch.setattr(loader, "PREFETCH", prefetch)
        spans = np.split(np.arange(BATCH), hosts)
        parts = [list(loader.host_batches(dataset, BATCH, span.tolist(), step, step + 2)) for span in spans]
        batches = [np.concatenate([batch["tokens"] for batch in shares]) for shares in zip(*parts, strict=True)]
        np.testing.assert_array_equal(batches, expected)


@pytest.mark.parametrize("first", [1, 4, STEPS])
def test_starting_at_a_later_step_gives_the_tail(first):
    assert read(rows(), first).tolist() == read(rows())[first:].tolist()


def test_starting_late_reads_no_earlier_row():
    sources = [Numbered(0, 1000), Numbered(1, 300)]
    mixture = StagedMixture([[3.0, 1.0]], [0], (FAR + 3) * BATCH)
    dataset = loader.mixed_rows([loader.Source(source, k) for k, source in enumerate(sources)], mixture)
    batches = list(loader.host_batches(dataset, BATCH, range(BATCH), FAR, FAR + 3))
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    assert len(tokens) == 3 * BATCH == sum(len(source.read) for source in sources)
    for source in sources:
        assert source.read == tokens[tokens[:, 0] == source.name, 1].tolist()


def test_only_a_few_batches_are_read_ahead():
    source = Numbered(0, 50)
    dataset = loader.mixed_rows([loader.Source(source, 0)], StagedMixture([[1.0]], [0], FAR))
    batches = loader.host_batches(dataset, 4, range(4), 0, FAR // 4)
    next(batches)
    time.sleep(0.1)
    assert len(source.read) <= 4 * (loader.PREFETCH + 3)
    batches.close()


def test_a_row_that_cannot_be_read_stops_the_loop_with_its_own_error():
    class Broken(Numbered):
        def __getitem__(self, index):
            raise UserError(f"row {index} is damaged")

    dataset = loader.mixed_rows([loader.Source(Broken(0, 1), 0)], StagedMixture([[1.0]], [0], BATCH))
    with pytest.raises(UserError, match="row 0 is damaged"):
        list(loader.host_batches(dataset, BATCH, range(BATCH), 0, 1))


@pytest.mark.parametrize("sizes", [config.Mesh(), config.Mesh(data=2, fsdp=4)])
def test_every_device_holds_only_its_rows(sizes):
    value = np.arange(BATCH * 3).reshape(BATCH, 3)
    placed = loader.on_devices({"x": value}, parallel.make_mesh(sizes), BATCH)["x"]
    np.testing.assert_array_equal(placed, value)
    assert len(placed.addressable_shards) == jax.device_count()
    assert {s.data.shape for s in placed.addressable_shards} == {(BATCH // 8, 3)}
    assert loader._host_rows(parallel.make_mesh(sizes), BATCH) == list(range(BATCH))


# --- the order of a source ------------------------------------------------------------------------------------------------


def test_a_seed_sets_the_order():
    assert read(rows(1)).tolist() == read(rows(1)).tolist() != read(rows(2)).tolist()


def test_every_epoch_of_a_source_holds_each_row_once_in_a_new_order():
    dataset = rows(sizes=(30,))
    first, second, third = ([dataset[e * 30 + i]["tokens"][1] for i in range(30)] for e in range(3))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(30))
    assert first != second != third != first


def test_sources_of_one_size_are_not_shuffled_alike():
    dataset = rows(sizes=(30, 30))
    drawn = [dataset[i]["tokens"].tolist() for i in range(40)]
    assert [i for k, i in drawn if k == 0] != [i for k, i in drawn if k == 1]


SOURCES = ((40, 1), (61, 2), (50, 3))  # sizes and runs; the last two have rows that fill no run


@functools.cache
def drawn(source):
    """The first rows of a source, as they are drawn (Grain's shuffle of a short range takes milliseconds a row)."""
    size, run = SOURCES[source]
    ordered = loader.Source(Numbered(source, size), source, run).ordered()
    return [int(ordered[place]["tokens"][1]) for place in range(120)]


@st.composite
def chains(draw):
    """For each of two or three stages its weights by phase, the starts of the phases and its rows."""
    weight = st.lists(st.integers(0, 5), min_size=len(SOURCES), max_size=len(SOURCES)).filter(any)
    starts = st.sets(st.integers(1, 60), max_size=2).map(lambda later: [0, *sorted(later)])
    length = st.integers(1, 40)
    stages = draw(st.lists(starts, min_size=2, max_size=3))
    return [([draw(weight) for _ in phases], phases, draw(length)) for phases in stages]


@settings(max_examples=40, deadline=None)
@given(chains())
def test_no_row_is_lost_or_repeated_in_an_epoch_through_phases_and_stages(chain):
    used, read_rows = np.zeros(len(SOURCES), np.int64), [[] for _ in SOURCES]
    for weights, starts, length in chain:
        mixture = StagedMixture(weights, starts, length, used.tolist())
        for source, place in map(mixture.__getitem__, range(length)):
            read_rows[source].append(drawn(source)[place])
        used = used + mixture.used(length)
    assert [len(rows) for rows in read_rows] == used.tolist()
    for source_rows, (size, run) in zip(read_rows, SOURCES, strict=True):
        for begin in range(0, len(source_rows), size):
            part = source_rows[begin : begin + size]
            assert len(set(part)) == len(part) and max(part) < size
            for start in range(0, min(len(part), size - size % run) - run + 1, run):  # rows of a run follow each other
                first = part[start]
                assert first % run == 0 and part[start : start + run] == list(range(first, first + run))


@pytest.mark.parametrize(("size", "run"), [(7, 4), (249, 128), (13, 2), (11, 3), (5, 5), (3, 4)])
def test_an_epoch_has_every_row_once_whatever_the_runs(size, run):
    ordered = loader.Source(Numbered(0, size), 1, run).ordered()
    for epoch in range(3):
        assert sorted(int(ordered[epoch * size + i]["tokens"][1]) for i in range(size)) == list(range(size))


def test_the_mixture_draws_each_source_in_its_own_order():
    mixture = StagedMixture([[2, 1, 1], [0, 1, 3]], [0, 70], 150, [5, 0, 11])
    sources = [loader.Source(Numbered(k, size), k, run) for k, (size, run) in enumerate(SOURCES)]
    dataset = loader.mixed_rows(sources, mixture)
    drawn_rows = [dataset[i]["tokens"].tolist() for i in range(150)]
    for k, before in enumerate([5, 0, 11]):
        source_rows = [row for source, row in drawn_rows if source == k]
        assert source_rows == drawn(k)[before : before + len(source_rows)] and len(source_rows) == mixture.used(150)[k]


# --- rows of another length -------------------------------------------------------------------------------------------------


STREAM = 505  # tokens, so that rows of 24 and all that divide it cover the same 504


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A store whose tokens are their places."""
    writer = StoreWriter(tmp_path_factory.mktemp("stream") / "tokens", np.dtype(np.int32))
    for start in range(0, STREAM, 7):
        writer.add(range(start, min(start + 7, STREAM)))
    writer.close()
    return Store(writer.prefix)


@functools.cache
def epoch_of(stream, seq_len, run, seed):
    """The rows of an epoch of a source, in its order."""
    windows = Windows(stream, seq_len, True, STREAM)
    order = loader.Source(windows, seed, run).ordered()
    return [order[i]["tokens"].tolist() for i in range(len(windows))]


def tokens_of(stream, seq_len, run, start, stop, seed=5):
    """Tokens of the rows [start, stop) of a source's order."""
    return [t for row in epoch_of(stream, seq_len, run, seed)[start:stop] for t in row]


def test_rows_of_any_length_are_one_order_of_the_text(stream):
    expected = tokens_of(stream, 24, 1, 0, 21)
    assert sorted(expected) == list(range(504)) and expected != sorted(expected)
    for seq_len in (4, 6, 8, 12):
        assert tokens_of(stream, seq_len, 24 // seq_len, 0, 504 // seq_len) == expected


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("first", "then"), [(4, 8), (8, 4), (6, 4), (4, 6)])
def test_a_stage_of_another_length_goes_on_at_the_same_place_of_the_text(stream, first, then, seed):
    whole = int(np.lcm(first, then))
    epoch = (stream.size - 1) // whole * whole
    for drawn in (0, 1, 7, 50):
        earlier = tokens_of(stream, first, whole // first, 0, drawn, seed)
        place = -(-drawn * first // then)
        later = tokens_of(stream, then, whole // then, place, epoch // then, seed)
        assert not set(earlier) & set(later)
        assert epoch - len(earlier) - len(later) == place * then - drawn * first < then  # less than one row is passed over
