"""Reference log-probabilities: progress is seen while they are computed, and their file is data, never code."""

import os
import types

import numpy as np

from tanuki_jax.multihost import watchdog
from tanuki_jax.recipe import reference
from tests.tiny import small


def test_every_batch_of_the_reference_shows_that_the_process_gets_on(monkeypatch):
    """With several processes one place may take an hour, and millions of pairs take more."""

    class Rows(list):
        ref_logprobs = np.zeros((8, 2), np.float32)

        def pairs(self, row):
            return [row]

    made = types.SimpleNamespace(logprobs=np.zeros((2, 1, 2), np.float32))
    monkeypatch.setattr(reference, "pair_scores", lambda cfg, params, batch: (made,))
    monkeypatch.setattr(reference.loader, "stack", lambda rows: np.zeros(2))
    monkeypatch.setattr(reference.loader, "on_devices", lambda batch, mesh, size: batch)
    monkeypatch.setattr(reference.jax, "jit", lambda f: f)
    before = watchdog._phase.number
    reference._source_logprobs(small(), {}, Rows(range(8)), 2, None)
    assert watchdog._phase.number >= before + 4


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_cached_array_is_never_unpickled(tmp_path):
    np.save(tmp_path / "reference.npy", np.array([Trap(tmp_path / "caught")], dtype=object), allow_pickle=True)
    assert not reference._is_whole(tmp_path / "reference.npy", 1) and not (tmp_path / "caught").exists()
