"""Items to rows: nothing is asked twice, nothing is lost, and a run ends with one message."""

import asyncio
import errno
import json
import os
import random
import signal
import threading
from types import SimpleNamespace

import pytest

from tanuki_jax import endpoint
from tanuki_jax.endpoint import Budget, Drop, NoAnswer, asker, runner
from tanuki_jax.endpoint.budget import BudgetSpent
from tanuki_jax.errors import Preempted, UserError
from tests.endpoint import chains
from tests.endpoint.chains import Lazy, after, lines, question, run, two_steps
from tests.endpoint.faulty_server import Behaviour, serve
from tests.endpoint.test_client import FAULTS


def jobs_of(path):
    return [json.loads(line)["id"] for line in lines(path)] if path.exists() else []


def test_a_server_that_fails_in_nine_ways(tmp_path):
    with serve(Behaviour(share=0.05)) as server:
        summary = run(server, tmp_path, 75, retries=20, timeout_seconds=1.0)
        assert set(server.requests) == {"answer", *server.behaviour.faults}
        assert server.most_at_once <= 16 + server.requests["time_out"]  # a client that gives up leaves its request there
    assert summary.complete and summary.items == summary.rows == 75 and not summary.failed
    ids = jobs_of(tmp_path / "answers.jsonl")
    assert len(ids) == len(set(ids)) == summary.answers == 150
    assert summary.outcomes["answer"] == 150 and summary.outcomes.total() == summary.calls
    late = summary.outcomes["time_out"]  # a busy machine may make other requests late
    for fault, kind in FAULTS.items():
        sent = sum(server.requests[other] for other in FAULTS if FAULTS[other] == kind)
        assert sent - late <= summary.outcomes[kind] <= sent + (late if fault == "time_out" else 0)
    assert lines(tmp_path / "failed.jsonl") == []
    assert [json.loads(line)["item"] for line in lines(tmp_path / "rows.jsonl")] == list(range(75))


def test_rows_say_where_they_come_from(server, tmp_path):
    async def chain(item, ask):
        return await two_steps(item["text"], ask)

    run(server, tmp_path, [("seed-1", {"text": "x", "license": "cc-by-4.0"})], chain)
    (row,) = (json.loads(line) for line in lines(tmp_path / "rows.jsonl"))
    first, second = row.pop("provenance")
    assert row["question"] != row["answer"]
    assert first.pop("job") != second["job"] and len(first.pop("prompt_sha256")) == 64 and first.pop("date")
    assert first.pop("seed") == server.bodies[0]["seed"]
    assert first == {
        "model": "tiny",
        "role": "generator",
        "step": "q1",
        "sample": 0,
        "template": "",
        "sampling": {"temperature": 0.7, "top_p": 1.0, "max_tokens": 512},
        "item": "seed-1",
        "license": "apache-2.0",
        "seed_license": "cc-by-4.0",
    }


def test_a_row_comes_from_the_steps_that_it_names(server, tmp_path):
    async def chain(item, ask):
        texts = [(await ask(question(f"{step} of {item}", step))).text for step in "ab"]
        return [{"text": texts[0], "steps": ["a"]}, Drop("bad", {"text": texts[1], "steps": ["b"]}), {"text": "".join(texts)}]

    run(server, tmp_path, 2, chain)
    rows = [json.loads(line) for line in lines(tmp_path / "rows.jsonl")]
    assert [[call["step"] for call in row["provenance"]] for row in rows] == [["a"], ["a", "b"]] * 2
    assert all({*row} == {"text", "provenance"} for row in rows)
    for dropped, row in zip(map(json.loads, lines(tmp_path / "dropped.jsonl")), rows[1::2], strict=True):
        assert {*dropped["row"]} == {"text"} and dropped["jobs"] == [row["provenance"][1]["job"]]


def test_what_was_answered_is_not_asked_again_and_rows_do_not_depend_on_the_order(server, tmp_path):
    run(server, tmp_path / "a", 20)
    asked, answers = server.requests["answer"], lines(tmp_path / "a/answers.jsonl")
    rows = (tmp_path / "a/rows.jsonl").read_bytes()
    assert run(server, tmp_path / "a", 20).rows_sha256 and server.requests["answer"] == asked  # it is done
    random.Random(0).shuffle(answers)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/answers.jsonl").write_text("\n".join(answers[5:]) + "\n", encoding="utf-8")
    run(server, tmp_path / "b", 20)
    assert server.requests["answer"] == asked + 5
    without = [{**json.loads(line), "provenance": 0} for line in lines(tmp_path / "b/rows.jsonl")]
    assert without == [{**json.loads(line), "provenance": 0} for line in rows.decode().splitlines()]
    (tmp_path / "a/rows.jsonl").unlink()
    run("http://127.0.0.1:9/v1", tmp_path / "a", 20, model="tiny")  # no server is needed
    assert (tmp_path / "a/rows.jsonl").read_bytes() == rows


def test_rows_of_another_version_are_written_anew_from_the_answers_that_are_there(server, tmp_path):
    async def shout(item, ask):
        return [{"text": row["answer"].upper()} for row in await two_steps(item, ask)]

    run(server, tmp_path, 3, version="1")
    assert run(server, tmp_path, 5, shout, version="2").rows == 5
    assert server.requests["answer"] == 2 * 5 and "text" in json.loads(lines(tmp_path / "rows.jsonl")[0])
    assert run("http://127.0.0.1:9/v1", tmp_path, 5, shout, version="2").rows == 5


def test_a_directory_of_other_settings_is_refused(server, tmp_path):
    run(server, tmp_path)
    with pytest.raises(UserError, match="were made with other settings"):
        run(server, tmp_path, recipe="other")


def test_a_torn_last_line_costs_one_request(server, tmp_path):
    run(server, tmp_path, 5)
    rows = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "done.json").unlink()
    path = tmp_path / "answers.jsonl"
    os.truncate(path, path.stat().st_size - 9)
    run(server, tmp_path, 5)
    assert server.requests["answer"] == 11
    assert len((tmp_path / "rows.jsonl").read_bytes()) == len(rows)


def test_a_job_that_two_items_want_at_the_same_time_is_asked_once(server, tmp_path):
    async def chain(item, ask):
        answers = await asyncio.gather(*(ask(question("the same", item="shared")) for _ in range(3)))
        return [{"text": answer.text} for answer in answers]

    summary = run(server, tmp_path, 10, chain)
    assert server.requests["answer"] == summary.answers == 1 and summary.rows == 30


def test_samples_are_asked_apart(server, tmp_path):
    async def chain(item, ask):
        answers = await asyncio.gather(*(ask(question("x", sample=number)) for number in range(4)))
        return [{"samples": sorted({answer.text for answer in answers})}]

    run(server, tmp_path, 1, chain)
    assert len(json.loads(lines(tmp_path / "rows.jsonl")[0])["samples"]) == 4


def test_items_are_read_as_they_are_needed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(runner._Runner, "_workers", lambda self: 4)
    source = Lazy(10**9)
    with pytest.raises(BudgetSpent):
        run(server, tmp_path, source, budget=Budget(max_calls=20))
    assert source.read <= 20


def test_rows_that_are_left_out_are_counted_by_reason(server, tmp_path):
    async def chain(item, ask):
        answer = await ask(question(("plain", "<cut>", "<refuse>", "<empty>", "<long>" * 100)[item]))
        if answer.finish_reason == "length":
            raise Drop("cut", {"text": answer.text})
        return [{"text": answer.text}, Drop("second")]

    server.behaviour.context = 100
    summary = run(server, tmp_path, 5, chain)
    assert summary.complete and summary.rows == 1
    assert summary.dropped == dict(second=1, cut=1, refused=1, empty=1, overflow=1)
    assert summary.outcomes == dict(answer=1, cut=1, refused=1, empty=asker.EMPTY_TRIES, overflow=1)
    dropped = [json.loads(line) for line in lines(tmp_path / "dropped.jsonl")]
    assert [row["item"] for row in dropped] == [f"item-{number}" for number in range(5)]
    assert dropped[1]["row"]["text"].startswith("answer") and len(dropped[1]["jobs"]) == 1
    (tmp_path / "done.json").unlink()
    again = run(server, tmp_path, 5, chain)  # none of it is asked again
    assert again.dropped == summary.dropped and again.calls == summary.calls == server.requests.total()


def test_a_seed_that_is_no_text(server, tmp_path):
    summary = run(server, tmp_path, [("a", "\ud83d"), ("b", "狸")])
    assert summary.rows == 1 and summary.dropped == {"invalid_text": 1}


def test_a_chain_may_do_without_an_answer(server, tmp_path):
    async def chain(item, ask):
        try:
            return [{"text": (await ask(question("<refuse>"))).text}]
        except NoAnswer as none:
            return [{"text": "", "reason": none.reason}]

    assert run(server, tmp_path, 1, chain).rows == 1
    assert json.loads(lines(tmp_path / "rows.jsonl")[0])["reason"] == "refused"


def test_failed_jobs_are_put_apart_and_tried_again(tmp_path):
    with serve(Behaviour(share=1.0, faults=("error_500",))) as server:
        summary = run(server, tmp_path, 3, retries=2)
        assert not summary.complete and summary.failed == {"server_error": 3} and server.requests["error_500"] == 9
        assert not (tmp_path / "rows.jsonl").exists()
        failed = [json.loads(line) for line in lines(tmp_path / "failed.jsonl")]
        assert {row["item"] for row in failed} == {"item-0", "item-1", "item-2"}
        assert failed[0]["outcome"] == "server_error" and failed[0]["message"] == "HTTP 500: The server had an error"
        server.behaviour.share = 0.0
        summary = run(server, tmp_path, 3, retries=2)
    assert summary.complete and summary.rows == 3 and summary.calls == 9 + 6 and not summary.failed


def test_some_items_may_have_failed(tmp_path):
    async def chain(item, ask):
        return [{"text": (await ask(question("x", sampling={"max_tokens": 0 if item == 1 else 9}))).text}]

    with serve(Behaviour(min_max_tokens=1)) as server:
        assert not run(server, tmp_path, 4, chain).complete
        summary = run(server, tmp_path, 4, chain, max_failed=0.25)
    assert summary.complete and summary.rows == 3 and summary.dropped == {"failed": 1}
    assert summary.outcomes["bad_request"] == 2


def test_settings_that_no_request_can_succeed_with_end_the_run(tmp_path):
    with serve(Behaviour(min_max_tokens=1000)) as server, pytest.raises(UserError, match="refuses every request.*HTTP 400"):
        run(server, tmp_path, 500)
    assert server.requests["bad_request"] < 20 + 16


def test_prompts_none_of_which_fits_end_the_run(server, tmp_path):
    server.behaviour.context = 3
    with pytest.raises(UserError, match="refuses every request.*maximum context length.*lower max_tokens"):
        run(server, tmp_path, 500)
    server.behaviour.context = 1000
    assert run(server, tmp_path, 20, max_tokens=100).complete  # with these settings nothing has been refused


@pytest.mark.parametrize("calls", [1, 7, 40])
def test_a_budget_of_calls(server, tmp_path, calls):
    with pytest.raises(BudgetSpent, match=f"the budget max_calls={calls} is spent .*raise it, and the same command goes on"):
        run(server, tmp_path, 500, budget=Budget(max_calls=calls))
    assert server.requests["answer"] == len(jobs_of(tmp_path / "answers.jsonl")) == calls
    with pytest.raises(BudgetSpent):  # it is that of all runs together
        run(server, tmp_path, 500, budget=Budget(max_calls=calls))
    assert server.requests["answer"] == calls
    with pytest.raises(BudgetSpent):
        run(server, tmp_path, 500, budget=Budget(max_calls=calls + 3))
    assert server.requests["answer"] == calls + 3


def test_a_budget_of_calls_counts_those_that_fail(tmp_path):
    with serve(Behaviour(share=0.1, faults=("error_500", "html", "cut_body"))) as server, pytest.raises(BudgetSpent):
        run(server, tmp_path, 500, budget=Budget(max_calls=50))
    assert server.requests.total() == 50


@pytest.mark.parametrize("budget", [Budget(max_tokens=1000), Budget(max_cost=1e-3)], ids=str)
def test_budgets_of_tokens_and_money_are_overdrawn_by_one_call_at_most(server, tmp_path, budget):
    with pytest.raises(BudgetSpent, match="is spent"):
        run(server, tmp_path, 500, budget=budget, input_price=1.0, output_price=1.0, max_tokens=20)
    answers = [json.loads(line)["usage"] for line in lines(tmp_path / "answers.jsonl")]
    tokens = [sum(usage.values()) for usage in answers]
    assert 1000 <= sum(tokens) < 1000 + max(tokens)


def test_an_endpoint_that_goes_down_ends_the_run_and_nothing_is_lost(tmp_path):
    with serve(Behaviour(slots=4, seconds=0.01)) as server:
        after(server, 40, server.stop)
        with pytest.raises(UserError, match=r"cannot be reached .*, 9 times in a row; what was answered is saved"):
            run(server, tmp_path, 10_000)
        count, port = len(jobs_of(tmp_path / "answers.jsonl")), int(server.url.split(":")[2].split("/")[0])
    assert count >= 40 - 16
    with serve(port=port) as server:
        assert run(server, tmp_path, 5, model="tiny").complete


def test_an_endpoint_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="endpoint tiny .*cannot be reached"):
        run("http://127.0.0.1:9/v1", tmp_path)


def test_an_endpoint_that_only_asks_to_wait(tmp_path):
    behaviour = Behaviour(share=1.0, faults=("rate_limit",), retry_after=0.001)
    with serve(behaviour) as server, pytest.raises(UserError, match="HTTP 429.*times in a row.*lower `concurrency`"):
        run(server, tmp_path, 50, retries=2)
    assert server.requests["rate_limit"] < 16 * 4 * 3 + 50


def test_an_endpoint_behind_a_proxy_that_is_restarted_fails_few_items(tmp_path):
    with serve(Behaviour(share=1.0, faults=("error_500",))) as server:
        with pytest.raises(UserError, match="HTTP 500.*, 7 times in a row.*look at its server"):
            run(server, tmp_path, 10_000, retries=2)
        assert len(jobs_of(tmp_path / "failed.jsonl")) < 16 * 7
        server.behaviour.share = 0.0
        assert run(server, tmp_path, 200, retries=2).complete


def test_answers_that_never_come_are_empty_and_too_many_failures_are_failures(tmp_path):
    with serve(Behaviour(share=0.4, faults=("null_content", "error_500"))) as server:
        summary = run(server, tmp_path, 60, retries=3)
    final = [json.loads(line) for line in lines(tmp_path / "answers.jsonl")]
    failed = [json.loads(line) for line in lines(tmp_path / "failed.jsonl")]
    assert len(failed) == summary.failed.total() > 0
    assert all(row["faults"]["empty"] >= asker.EMPTY_TRIES for row in final if row["outcome"] == "empty")
    assert all(sum(row["faults"].values()) == 4 for row in failed)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_with_what_is_under_way(tmp_path, name):
    with serve(Behaviour(slots=16, seconds=0.05)) as server:
        before = signal.getsignal(getattr(signal, name))
        after(server, 40, lambda: os.kill(os.getpid(), getattr(signal, name)))
        with pytest.raises(Preempted, match="was told to stop"):
            run(server, tmp_path, 10_000)
        assert signal.getsignal(getattr(signal, name)) is before
    assert server.requests["answer"] == len(jobs_of(tmp_path / "answers.jsonl")) >= 40  # none was given up


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    with serve(Behaviour(share=1.0, faults=("time_out",))) as server:
        for seconds in (0.3, 0.5):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Preempted):
            run(server, tmp_path, 100, timeout_seconds=60.0)


def test_a_full_disk(server, tmp_path, monkeypatch):
    write = os.write

    def full(file, data):
        if b'"outcome"' in bytes(data) and len(server.bodies) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="disk of .* is full; free some space and run the same command again"):
        run(server, tmp_path, 500)
    monkeypatch.undo()
    ids = jobs_of(tmp_path / "answers.jsonl")
    assert len(ids) == len(set(ids)) <= 8
    assert run(server, tmp_path, 20).complete


def test_a_chain_that_is_no_function_of_its_answers(server, tmp_path):
    async def chain(item, ask):
        return [{"text": (await ask(question(f"{random.random()}"))).text}]

    with pytest.raises(UserError, match="item item-0: .*a chain must ask the same"):
        run(server, tmp_path, 1, chain)
    assert not (tmp_path / "rows.jsonl").exists()


def test_an_error_in_a_chain_ends_the_run(server, tmp_path):
    async def chain(item, ask):
        await ask(question("x"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(server, tmp_path, 100, chain)


def test_a_role_without_an_endpoint(server, tmp_path):
    async def chain(item, ask):
        return [{"text": (await ask(question("x", role="judge"))).text}]

    with pytest.raises(UserError, match="no endpoint for the role 'judge'; there are generator"):
        run(server, tmp_path, 1, chain)


def test_two_runs_in_one_directory(server, tmp_path):
    async def chain(item, ask):
        await ask(question("x"))
        with pytest.raises(UserError, match="is in use by"):
            await asyncio.to_thread(run, server, tmp_path)
        return [{}]

    assert run(server, tmp_path, 1, chain).complete


def test_roles_of_one_endpoint_share_its_limit(tmp_path):
    async def chain(item, ask):
        await asyncio.gather(ask(question("x")), ask(question("x", role="judge")))
        return [{}]

    with serve(Behaviour(seconds=0.02)) as server:
        clients = {role: chains.client(server, concurrency=3) for role in ("generator", "judge")}
        endpoint.run(chains.items(10), chain, clients, tmp_path, recipe="r", quiet=True)
    assert server.most_at_once == 3


def test_a_model_that_was_not_named_is_that_of_the_first_run(tmp_path):
    with serve(Behaviour(models=("a",))) as server:
        with pytest.raises(BudgetSpent):
            run(server, tmp_path, 5, budget=Budget(max_calls=2))
        server.behaviour.models = ("b",)
        with pytest.raises(UserError, match="no model 'a'; it has b"):
            run(server, tmp_path, 5)


def test_a_server_that_does_not_count_tokens(server, tmp_path):
    server.behaviour.usage = False
    summary = run(server, tmp_path, 1)
    assert summary.prompt_tokens > 0 and summary.completion_tokens > 0


def test_a_summary_is_json(server, tmp_path):
    summary = run(server, tmp_path)
    assert endpoint.Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary == run(server, tmp_path)


def test_progress_says_what_it_costs(server, tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(monotonic=iter(range(0, 10**6, 7)).__next__)
    monkeypatch.setattr("tanuki_jax.progress.time", clock)
    run(server, tmp_path, 20, quiet=False, label="synth chats", output_price=1e6)
    shown = capsys.readouterr().err
    assert "synth chats  20/20 items  40 calls, " in shown and "tokens/s, cost 200.00" in shown and "left" in shown


def test_a_dry_run_asks_nothing():
    async def chain(item, ask):
        answer = await ask(question("質問" * 50))
        if (await ask(question(answer.text, "judge", role="judge"))).text != "[[A]]":
            raise Drop("not parsed")
        await ask(question("abcd" * 10, "last"))
        return [{}]

    generator, judge = (chains.client("http://127.0.0.1:9/v1", max_tokens=n, output_price=1e6).endpoint for n in (100, 10))
    endpoints = {"generator": generator, "judge": judge}
    found = endpoint.estimate(Lazy(1000), chain, endpoints, reply=lambda job: "[[A]]", sample=10)
    assert (found.items, found.calls, found.completion_tokens, found.cost) == (1000, 3000, 210_000, 210_000)
    assert found.prompt_tokens == 1000 * (100 + 2 + 10)
    assert str(found).startswith("1,000 items, about 3,000 calls, 112,000 prompt tokens and at most 210,000 answer tokens")
    assert endpoint.estimate([], chain, endpoints, reply=str).calls == 0
    assert endpoint.estimate(chains.items(5), two_steps, endpoints, reply=lambda job: "word " * 100).prompt_tokens > 5 * 100
