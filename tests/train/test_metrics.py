import json

import jax.numpy as jnp
import pytest

from tanuki_jax.train import metrics
from tanuki_jax.train.metrics import MetricsWriter, mfu, read_metrics, to_plain


def rows(*steps):
    return [{"step": step, "loss": 1.0 / step, "seconds": float(step)} for step in steps]


def test_a_run_that_goes_on_drops_the_lines_after_its_checkpoint(tmp_path):
    first = MetricsWriter(tmp_path, 0, tensorboard=False)
    for row in rows(1, 2, 3, 4):
        first.write(row)
    first.close()
    second = MetricsWriter(tmp_path, 2, tensorboard=False)
    assert second.rows[-1]["seconds"] == second.replayed_seconds == 2.0  # time is counted over all runs
    second.write(rows(3)[0])
    second.close()
    assert read_metrics(tmp_path) == rows(1, 2, 3)


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    whole = "".join(json.dumps(row) + "\n" for row in rows(1, 2))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 3, "lo')
    assert read_metrics(tmp_path) == rows(1, 2)


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_arrays_become_lists_and_scalars_floats():
    found = to_plain({"loss": jnp.float32(2.5), "moe/load": jnp.array([[0.25, 0.75]])})
    assert found == {"loss": 2.5, "moe/load": [[0.25, 0.75]]} and json.dumps(found)


def test_mfu_is_a_share_of_the_peak_of_all_devices_and_none_where_that_is_unknown(monkeypatch):
    assert mfu(1000.0, 1e9) is None  # this CPU
    monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 1e12)
    assert mfu(1000.0, 1e9) == pytest.approx(1 / 8)  # 8 devices here
