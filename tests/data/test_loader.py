import jax
import numpy as np
import pytest

from tanuki_jax import config, parallel
from tanuki_jax.data import loader
from tanuki_jax.data.mixture import StagedMixture

STEPS, BATCH = 6, 16


class Numbered:
    """A source of rows that say who they are."""

    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"tokens": np.array([self.name, index], np.int32)}


def rows(seed=0, sizes=(40, 23)):
    mixture = StagedMixture([[1.0] * len(sizes), [1.0] + [0.0] * (len(sizes) - 1)], [0, 50], STEPS * BATCH)
    return loader.mixed_rows([Numbered(k, n) for k, n in enumerate(sizes)], mixture, seed)


def read(dataset, first=0, steps=STEPS):
    mesh = parallel.make_mesh(config.Mesh())
    return np.array([np.asarray(b["tokens"]) for b in loader.batches(dataset, mesh, BATCH, first, steps)])


def test_batch_n_holds_the_rows_of_step_n_in_order():
    dataset = rows()
    expected = [dataset[i]["tokens"] for i in range(STEPS * BATCH)]
    np.testing.assert_array_equal(read(dataset).reshape(-1, 2), expected)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_reads_the_same_global_batches(monkeypatch, hosts):
    expected = read(rows())
    parts = []
    for host in range(hosts):
        mine = list(range(host * BATCH // hosts, (host + 1) * BATCH // hosts))
        with monkeypatch.context() as patch:
            patch.setattr(loader, "_host_rows", lambda mesh, size, mine=mine: mine)
            patch.setattr(loader, "on_devices", lambda batch, mesh, size, first: (first, batch["tokens"]))
            found = list(loader.batches(rows(), None, BATCH, 0, STEPS))
        assert all(first == mine[0] for first, _ in found)
        parts.append([tokens for _, tokens in found])
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


@pytest.mark.parametrize("first", [1, 4, STEPS])
def test_starting_at_a_later_step_gives_the_tail(first):
    assert read(rows(), first).tolist() == read(rows())[first:].tolist()


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


@pytest.mark.parametrize("sizes", [config.Mesh(), config.Mesh(data=2, fsdp=4)])
def test_every_device_holds_only_its_rows(sizes):
    value = np.arange(BATCH * 3).reshape(BATCH, 3)
    placed = loader.on_devices({"x": value}, parallel.make_mesh(sizes), BATCH)["x"]
    np.testing.assert_array_equal(placed, value)
    assert len(placed.addressable_shards) == jax.device_count()
    assert {s.data.shape for s in placed.addressable_shards} == {(BATCH // 8, 3)}
    assert loader._host_rows(parallel.make_mesh(sizes), BATCH) == list(range(BATCH))
