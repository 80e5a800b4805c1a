"""The runner is killed again and again, while its server fails in nine ways."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.endpoint.chains import lines, run, two_steps
from tests.endpoint.faulty_server import Behaviour, serve

ROOT = Path(__file__).parents[2]
WORK = """
import sys
from pathlib import Path
from tests.endpoint.chains import run
url, directory, count = sys.argv[1:]
run(url, Path(directory), int(count), retries=12, concurrency=64, timeout_seconds=5.0)
"""


def kill_often(server, directory, items, kills):
    """Runs the work and kills it often, at moments that are spread over it."""
    chance, answers = random.Random(0), directory / "answers.jsonl"
    for number in range(1, kills + 1):
        process = subprocess.Popen([sys.executable, "-c", WORK, server.url, str(directory), str(items)], cwd=ROOT)
        while process.poll() is None and not (answers.exists() and len(lines(answers)) >= number * 2 * items // (kills + 1)):
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        assert process.wait() < 0, "it ended before it was killed"


def check(server, directory, items):
    while not (summary := run(server, directory, items, retries=12, concurrency=64, timeout_seconds=5.0)).complete:
        pass
    jobs = Counter(json.loads(line)["id"] for line in lines(directory / "answers.jsonl"))
    assert len(jobs) == 2 * items and set(jobs.values()) == {1}
    rows = [json.loads(line) for line in lines(directory / "rows.jsonl")]
    dropped = [json.loads(line) for line in lines(directory / "dropped.jsonl")]
    assert {row["reason"] for row in dropped} <= {"empty"}
    done = [row["item"] for row in rows] + [int(row["item"].removeprefix("item-")) for row in dropped]
    assert sorted(done) == list(range(items)) and [row["item"] for row in rows] == sorted(row["item"] for row in rows)
    return summary, rows


def test_a_run_that_is_killed_twice(tmp_path):
    with serve(Behaviour(seconds=0.05, slots=8)) as server:
        kill_often(server, tmp_path / "a", 60, 2)
        summary, rows = check(server, tmp_path / "a", 60)
        assert 120 <= server.requests["answer"] <= 120 + 2 * 64  # at most those under way are asked twice
        whole = run(server, tmp_path / "b", 60, two_steps)
    assert summary.answers == whole.answers == 120
    same = [json.loads(line) for line in lines(tmp_path / "b/rows.jsonl")]
    assert [{**row, "provenance": 0} for row in rows] == [{**row, "provenance": 0} for row in same]


@pytest.mark.slow
def test_many_jobs_and_kills_while_the_server_fails(tmp_path):
    """A fourth of what benchmarks/endpoint.py does: that has 5,000 jobs and ten kills."""
    with serve(Behaviour(share=0.05, slots=64, seconds=0.1, retry_after=0.1)) as server:
        kill_often(server, tmp_path, 600, 4)
        summary, rows = check(server, tmp_path, 600)
        assert server.refused_early < 0.01 * server.requests.total()  # the pauses are kept
    assert len(rows) >= 598
    assert all(summary.outcomes[kind] for kind in ("server_error", "rate_limit", "time_out", "cut_body", "html", "bad_json"))
