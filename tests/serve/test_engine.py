"""The engine's turns over a decoder without a model, whose rows count upwards from their prompt's last token."""

import threading

import numpy as np
import pytest

from tanuki_jax.model import Sampling
from tanuki_jax.serve.engine import Engine
from tanuki_jax.serve.errors import ApiError
from tanuki_jax.serve.jobs import Job
from tanuki_jax.serve.rows import Block, PromptScores

WAIT = 30  # seconds, after which a test has failed


class Counting:
    n_slots, n_together, max_steps = 3, 2, 8

    def __init__(self, gate=None):
        self.last = np.zeros(self.n_slots, int)
        self.admitted, self.steps, self.released, self.gate = [], [], [], gate

    def width(self, n_tokens):
        return 16 if n_tokens <= 16 else 32

    def admit(self, rows):
        assert len({self.width(len(job.prompt)) for _, job in rows}) == 1 and len(rows) <= self.n_together
        self.admitted.append([len(job.prompt) for _, job in rows])
        for slot, job in rows:
            self.last[slot] = job.prompt[-1]
        return [scores_of(job.prompt) for _, job in rows]

    def start(self, n, wants_top):
        self.steps.append(n)
        top = 20 * wants_top
        ids = self.last + np.arange(1, n + 1)[:, None]
        self.last = ids[-1].copy()
        return ids, top

    def read(self, block):
        ids, top = block
        if self.gate:
            self.gate()
        tops = np.repeat(ids[..., None], top, axis=2)
        return Block(ids, -ids.astype(np.float32), tops, -tops.astype(np.float32))

    def release(self, free):
        self.released += free


def scores_of(prompt):
    return PromptScores(np.zeros(len(prompt)), np.zeros((len(prompt), 20), int), np.zeros((len(prompt), 20)))


class Listener:
    def __init__(self):
        self.pieces, self.ended = [], threading.Event()

    def __call__(self, piece):
        self.pieces.append(piece)
        if piece.finish or piece.error:
            self.ended.set()

    def wait(self):
        assert self.ended.wait(WAIT)
        return self

    @property
    def ids(self):
        return [s.token for piece in self.pieces for s in piece.scored]


@pytest.fixture
def start(tokenizer):
    engines = []

    def begin(decoder, queue=100):
        ready = threading.Event()

        def build(take_note):
            take_note("building")
            return decoder

        engine = Engine(build, tokenizer, queue)
        engine.start()
        for _ in range(WAIT * 1000):
            if engine.state != "loading" and engine.metrics.slots:
                break
            ready.wait(0.001)
        engines.append(engine)
        return engine

    yield begin
    for engine in engines:
        engine.stop()


def job(first=5, n=10, **options):
    return Job((1, first), Sampling(n, stop=options.pop("stop", ())), top=0, **options)


def submit(engine, *jobs):
    listeners = [Listener() for _ in jobs]
    return engine.submit(jobs, listeners), listeners


def test_many_rows_share_few_slots_and_each_gets_its_own_tokens(start):
    engine = start(Counting())
    _, listeners = submit(engine, *(job(10 * i, i + 1) for i in range(20)))
    for i, listener in enumerate(listeners):
        assert listener.wait().ids == list(range(10 * i + 1, 11 * i + 2))
        assert listener.pieces[-1].finish == "length" and sum(p.n_tokens for p in listener.pieces) == i + 1
    assert engine.is_idle() and engine.metrics.completion_tokens == sum(range(1, 21))


def test_a_stop_id_ends_a_row_is_scored_and_is_no_text(start, tokenizer):
    engine = start(Counting())
    _, [listener] = submit(engine, job(5, 30, stop=(9,)))
    assert listener.wait().ids == [6, 7, 8, 9] and listener.pieces[-1].finish == "stop"
    assert "".join(p.text for p in listener.pieces) == tokenizer.decode([6, 7, 8])


def test_a_long_prompt_does_not_keep_short_ones_waiting_for_ever(start):
    decoder = Counting()
    engine = start(decoder)
    _, listeners = submit(engine, *(Job((1,) * n, Sampling(3)) for n in (20, 2, 20, 2, 2)))
    for listener in listeners:
        listener.wait()
    assert decoder.admitted == [[20, 20], [2], [2, 2]]  # in the order of the first of each width


def test_somebody_alone_who_reads_along_gets_tokens_one_by_one_and_others_in_blocks(start):
    decoder = Counting()
    engine = start(decoder)
    _, [listener] = submit(engine, job(5, 6, streams=True))
    listener.wait()
    assert set(decoder.steps) == {1} and [p.n_tokens for p in listener.pieces] == [1] * 6
    decoder.steps.clear()
    _, [listener] = submit(engine, job(5, 20))
    listener.wait()
    assert decoder.steps == [8, 8, 4]


def test_what_is_cancelled_frees_its_slot_and_its_place_in_the_queue(start):
    turn = threading.Semaphore(0)
    decoder = Counting(gate=lambda: turn.acquire(timeout=WAIT))
    engine = start(decoder)
    rows, listeners = submit(engine, *(job(5, 10_000) for _ in range(5)))
    _, [last] = submit(engine, job(50, 2))
    engine.cancel(rows)
    turn.release(10_000)
    assert last.wait().ids == [51, 52]
    assert not any(listener.ended.is_set() for listener in listeners)


def test_a_full_queue_refuses_the_whole_request_and_says_when_to_come_back(start):
    turn = threading.Semaphore(0)
    engine = start(Counting(gate=lambda: turn.acquire(timeout=WAIT)), queue=2)
    rows, _ = submit(engine, *(job(5, 10_000) for _ in range(5)))
    with pytest.raises(ApiError, match="at most 2 may wait") as refused:
        submit(engine, job())
    assert refused.value.status == 429 and refused.value.headers()["Retry-After"]
    with pytest.raises(ApiError, match="asks for 6 rows; this server takes at most 5") as refused:
        submit(engine, *(job() for _ in range(6)))  # which no waiting helps
    assert refused.value.status == 400 and "Retry-After" not in refused.value.headers()
    engine.cancel(rows)
    turn.release(10_000)


def test_rows_that_want_only_their_prompts_scores_need_no_slot_and_no_steps(start):
    decoder = Counting()
    engine = start(decoder)
    _, listeners = submit(engine, *(job(n, 0, score_prompt=n % 2 > 0) for n in range(4)), job(7, 2))
    for n, listener in enumerate(listeners[:4]):
        [piece] = listener.wait().pieces
        assert len(piece.prompt) == 2 * (n % 2) and piece.finish == "length" and not piece.n_tokens
    assert listeners[4].wait().ids == [8, 9] and decoder.steps == [2] and sum(map(len, decoder.admitted)) == 3


def test_options_of_a_row_that_has_left_cost_nothing_more(start):
    decoder = Counting()
    engine = start(decoder)
    for temperature in (0, 1):
        _, [listener] = submit(engine, Job((1,), Sampling(2, temperature)))
        listener.wait()
        _, [listener] = submit(engine, job(5, 1))
        listener.wait()
    assert len(decoder.released) == 1


@pytest.mark.parametrize("method", ["admit", "start", "read"])
def test_where_the_device_fails_every_request_hears_of_it_once(start, method, monkeypatch):
    decoder = Counting()

    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    engine = start(decoder)
    monkeypatch.setattr(decoder, method, fail)
    _, listeners = submit(engine, *(job() for _ in range(7)))
    for listener in listeners:
        [piece] = listener.wait().pieces
        assert piece.error.status == 500 and "out of memory" in piece.error.message
    assert engine.state == "failed" and "out of memory" in engine.note
    with pytest.raises(ApiError, match="out of memory"):
        submit(engine, job())


def test_before_it_is_ready_and_after_it_was_asked_to_stop_it_takes_nothing(start, tokenizer):
    engine = Engine(lambda note: Counting(), tokenizer, 1)
    with pytest.raises(ApiError, match="not ready") as refused:
        submit(engine, job())
    assert refused.value.status == 503
    engine = start(Counting())
    _, [listener] = submit(engine, job(5, 50))
    engine.drain()
    with pytest.raises(ApiError, match="is stopping"):
        submit(engine, job())
    assert listener.wait().pieces[-1].finish == "length"


def test_a_stop_ends_what_is_left_with_an_error(start):
    turn = threading.Semaphore(0)
    engine = start(Counting(gate=lambda: turn.acquire(timeout=WAIT)))
    _, listeners = submit(engine, *(job(5, 10_000) for _ in range(5)))
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    turn.release(10_000)
    stopping.join(WAIT)
    assert [listener.wait().pieces[-1].error.status for listener in listeners] == [503] * 5


def test_weights_that_give_no_numbers_fail_the_row_and_not_the_engine(start, monkeypatch):
    decoder = Counting()
    engine = start(decoder)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "read", lambda block: nan_block(block[0]))
        _, [listener] = submit(engine, job())
        assert listener.wait().pieces[-1].error.code == "damaged_model"
    _, [listener] = submit(engine, job())
    assert listener.wait().pieces[-1].finish


def nan_block(ids):
    none = np.zeros((*ids.shape, 0))
    return Block(ids, np.full(ids.shape, np.nan), none, none)
