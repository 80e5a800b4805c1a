import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax.data.layouts import HeldOutRows, PackedDialogues, PackedPairs, Windows
from tanuki_jax.data.packing import best_fit
from tanuki_jax.data.store import Store, StoreWriter
from tanuki_jax.errors import UserError

LENGTHS = st.lists(st.integers(1, 30), max_size=40)
SEQ_LEN = st.integers(1, 24)
DOCUMENTS = st.lists(st.lists(st.integers(1, 500), max_size=12), min_size=1, max_size=12).filter(any)
SHARDS = st.lists(st.lists(st.lists(st.integers(1, 500), max_size=12), max_size=6), min_size=1, max_size=4)
VOCAB = 501
quick = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def new_store(tmp_path_factory):
    def make(documents, dtype=np.uint16):
        prefix = tmp_path_factory.mktemp("store") / "tokens"
        writer = StoreWriter(prefix, np.dtype(dtype))
        for document in documents:
            writer.add(document)
        writer.close()
        return Store(prefix)

    return make


def dialogues(seed, count, longest):
    """Random conversations with masks, and of pairs the odd ones are the rejected."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    return [rng.integers(1, 500, n).tolist() for n in lengths], [rng.integers(0, 2, n).tolist() for n in lengths]


def packed_rows(packing):
    return [packing.units[a:b].tolist() for a, b in zip(packing.starts, packing.starts[1:], strict=False)]


@quick
@given(LENGTHS, SEQ_LEN)
def test_every_unit_that_fits_is_in_exactly_one_row_and_the_others_are_counted(lengths, seq_len):
    packing = best_fit(lengths, seq_len)
    assert sorted(packing.units.tolist()) == [i for i, n in enumerate(lengths) if n <= seq_len]
    assert packing.dropped == sum(n > seq_len for n in lengths)
    rows = packed_rows(packing)
    assert sorted(sum(rows, [])) == sorted(packing.units.tolist())
    assert all(0 < sum(lengths[u] for u in row) <= seq_len for row in rows)


@quick
@given(LENGTHS, SEQ_LEN)
def test_packing_is_deterministic_and_as_tight_as_best_fit_done_the_slow_way(lengths, seq_len):
    packing = best_fit(lengths, seq_len)
    assert packed_rows(packing) == packed_rows(best_fit(np.array(lengths), seq_len))
    free = []
    for n in sorted((n for n in lengths if n <= seq_len), reverse=True):
        fits = [i for i, f in enumerate(free) if f >= n]
        if fits:
            free[min(fits, key=free.__getitem__)] -= n
        else:
            free.append(seq_len - n)
    assert sorted(seq_len - sum(lengths[u] for u in row) for row in packed_rows(packing)) == sorted(free)


@quick
@given(DOCUMENTS, SEQ_LEN, st.booleans())
def test_windows_cover_the_stream_once_each_token_predicting_the_next(new_store, documents, seq_len, reset):
    store, stream = new_store(documents), sum(documents, [])
    windows = Windows(store, seq_len, reset, VOCAB)
    rows = [windows[i] for i in range(len(windows))]
    assert len(rows) == (len(stream) - 1) // seq_len
    covered = len(rows) * seq_len
    assert [t for row in rows for t in row["tokens"]] == stream[:covered]
    assert [t for row in rows for t in row["targets"]] == stream[1 : covered + 1]


def cut_into_sequences(prefix, seed):
    """Rewrites an index so that its documents have several sequences each (or none), by the format's description."""
    index = np.fromfile(prefix.with_suffix(".idx"), np.uint8).tobytes()
    count = int.from_bytes(index[18:26], "little")
    rng, lengths, first = np.random.default_rng(seed), [], [0]
    for whole in np.frombuffer(index, "<i4", count, 34).tolist():
        cuts = [0, *sorted(rng.integers(0, whole + 1, rng.integers(0, 3)).tolist()), whole]
        lengths += np.diff(cuts).tolist() if whole or rng.integers(2) else []
        first.append(len(lengths))
    lengths = np.array(lengths, np.int64)
    header = index[:18] + len(lengths).to_bytes(8, "little") + len(first).to_bytes(8, "little")
    arrays = lengths.astype("<i4"), (np.cumsum(lengths) - lengths) * 2, np.array(first, np.int64)
    prefix.with_suffix(".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))


@quick
@given(SHARDS, SEQ_LEN, st.integers(0, 30), st.integers(0, 1000))
def test_with_reset_segments_positions_and_loss_follow_the_documents_of_all_shards(new_store, shards, seq_len, held_out, seed):
    stores = [new_store(shard) for shard in shards]
    prefixes = [store.shards[0].prefix for store in stores]
    for k, prefix in enumerate(prefixes):
        if (seed >> k) % 2:
            cut_into_sequences(prefix, seed)
    documents = sum(shards, [])
    owner = [d for d, document in enumerate(documents) for _ in document]
    windows = Windows(Store(*prefixes), seq_len, True, VOCAB, held_out)
    rows = [windows[i] for i in range(len(windows))]
    rows += [held[i] for held in [HeldOutRows(windows)] if rows for i in range(len(held))]
    for i, row in enumerate(rows):
        place = i * seq_len
        for s in range(seq_len):
            fresh = s == 0 or owner[place + s] != owner[place + s - 1]
            assert row["positions"][s] == (0 if fresh else row["positions"][s - 1] + 1)
            assert s == 0 or (row["segment_ids"][s] != row["segment_ids"][s - 1]) == fresh
            assert row["loss_weights"][s] == (owner[place + s] == owner[place + s + 1])
        assert row["segment_ids"][0] == 1 and set(np.diff(row["segment_ids"]).tolist()) <= {0, 1}


def test_without_reset_a_row_is_one_segment_all_of_which_counts(new_store):
    row = Windows(new_store([[1, 2], [3, 4, 5]]), 4, False, VOCAB)[0]
    assert row["segment_ids"].tolist() == [1] * 4 and row["positions"].tolist() == [0, 1, 2, 3]
    assert row["loss_weights"].tolist() == [1] * 4


@quick
@given(st.integers(0, 300), SEQ_LEN, st.integers(0, 100), st.booleans())
def test_held_out_rows_lie_at_the_end_and_share_no_token_with_the_others(new_store, size, seq_len, held_out, reset):
    windows = Windows(new_store([list(range(size))]), seq_len, reset, VOCAB, held_out)  # every token is its own place
    held = HeldOutRows(windows)
    trained = [t for i in range(len(windows)) for t in windows[i]["tokens"].tolist()]
    assert len(windows) == max(0, (size - held_out - 1) // seq_len) and trained == list(range(len(windows) * seq_len))
    if not trained:
        return
    validated = [t for i in range(len(held)) for t in held[i]["tokens"].tolist()]
    assert len(validated) == held_out // seq_len * seq_len
    assert validated == list(range(len(trained), len(trained) + len(validated)))
    assert size - 2 * seq_len < len(trained) + len(validated) < size


@pytest.mark.parametrize(("dtype", "bad"), [(np.uint16, 501), (np.int32, 70_000), (np.int32, -1), (np.int64, (1 << 32) + 5)])
@pytest.mark.parametrize("place", [0, 7, 8], ids=["first", "last", "target"])
def test_an_id_that_the_model_does_not_have_is_an_error_that_names_the_store(new_store, dtype, bad, place):
    stream = [500] * 17
    stream[place] = bad
    windows = Windows(new_store([stream], dtype), 8, False, VOCAB)
    with pytest.raises(UserError, match=rf"tokens.* holds id {bad} .*vocabulary is 501; it was made with another tokenizer"):
        windows[0]
    if place < 8:
        assert windows[1]["tokens"].tolist() == [500] * 8


def check_segments(row, units, tokens, masks, seq_len):
    """A row holds exactly these units, in order, cut at the end of the row, with the loss on what the mask marks."""
    at = 0
    for segment, unit in enumerate(units, 1):
        ids, mask = (values[unit][: seq_len - at] for values in (tokens, masks))
        part = slice(at, at + len(ids))
        assert row["tokens"][part].tolist() == ids
        assert (row["segment_ids"][part] == segment).all()
        assert row["positions"][part].tolist() == list(range(len(ids)))
        assert row["targets"][part][:-1].tolist() == ids[1:]
        assert row["loss_weights"][part].tolist() == [*mask[1:], 0]
        at += len(ids)
    for name in ("tokens", "segment_ids", "loss_weights"):
        assert not row[name][at:].any()


@quick
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(6, 24))
def test_dialogue_rows_hold_what_the_store_holds_and_no_loss_crosses_two(new_store, seed, count, seq_len):
    tokens, masks = dialogues(seed, count, longest=30)
    packing = best_fit([min(len(t), seq_len) for t in tokens], seq_len)
    rows = PackedDialogues(new_store(tokens), new_store(masks, np.uint8), packing, seq_len)
    units = packed_rows(packing)
    assert len(rows) == len(units) and packing.dropped == 0
    for i, row_units in enumerate(units):
        check_segments(rows[i], row_units, tokens, masks, seq_len)
    counted = sum(rows[i]["loss_weights"].sum() for i in range(len(rows)))
    assert counted == sum(sum(m[1:seq_len]) for m in masks)


@quick
@given(st.integers(0, 1000), st.integers(1, 8), st.integers(16, 40))
def test_pair_rows_hold_whole_pairs_with_their_reference_log_probabilities(new_store, seed, count, seq_len):
    tokens, masks = dialogues(seed, 2 * count, longest=8)
    packing = best_fit([len(a) + len(b) for a, b in zip(tokens[::2], tokens[1::2], strict=True)], seq_len)
    reference = np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32)
    widest = int(np.diff(packing.starts).max()) + 1
    rows = PackedPairs(new_store(tokens), new_store(masks, np.uint8), packing, seq_len, widest, reference)
    for i, pairs in enumerate(packed_rows(packing)):
        row = rows[i]
        assert rows.pairs(i).tolist() == pairs
        check_segments(row, [side for p in pairs for side in (2 * p, 2 * p + 1)], tokens, masks, seq_len)
        assert row["pair_segments"].shape == row["ref_logprobs"].shape == (widest, 2)
        assert row["pair_segments"][: len(pairs)].tolist() == [[2 * p + 1, 2 * p + 2] for p in range(len(pairs))]
        assert (row["ref_logprobs"][: len(pairs)] == reference[pairs]).all()
        assert not row["pair_segments"][len(pairs) :].any() and not row["ref_logprobs"][len(pairs) :].any()
