import collections
import functools
import gzip
import itertools
import json
import math
import os
import random
import resource
import tempfile
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.recipe.train_tokenizer import HOOKS
from tests.conftest import TEXTS
from tokenization import languages as languages_module
from tokenization import vocabulary
from tokenization.errors import TokenizationError
from tokenization.export import export
from tokenization.fit import seed_pieces
from tokenization.options import TrainOptions
from tokenization.report import is_japanese
from tokenization.segment import BOUNDARIES, Segmenter
from tokenization.train import train
from tokenization.vocabulary import BOS, CONTROLS, EOS, LARGE_VOCAB, MODERN, PAD, SPELLING, SYMBOLS, UNK

PAIRS = [("", text) for text in TEXTS]


def read_model(directory):
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def readable(model):
    """The pieces that text can give, with real spaces, and not the bytes."""
    ids = (i for i in range(len(model)) if not model.is_control(i) and not model.is_unknown(i) and not model.is_byte(i))
    return [model.id_to_piece(i).replace("▁", " ") for i in ids]


@pytest.fixture(scope="module")
def model(tokenizer):
    return read_model(tokenizer.directory)


@pytest.fixture(scope="module")
def pieces(model):
    return readable(model)


# --- what no piece may cross ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences():
    """Japanese with many units, numbers and English words in it."""
    rng = random.Random(0)
    parts = (
        "狸|山|川の魚|第3回|新製品|お茶|東京都",
        "が|を|は|には|からは",
        "食べた|走っている|見ました|勉強しなければならない|moonだ",
        "。|、",
    )
    parts = [part.split("|") for part in parts]
    return ["".join(rng.choice(part) for _ in range(8) for part in parts) for _ in range(150)]


@pytest.fixture(scope="module")
def by_boundary(sentences, tmp_path_factory):
    """Boundary -> a tokenizer of that boundary."""
    directories = {boundary: tmp_path_factory.mktemp(boundary) for boundary in BOUNDARIES}
    for boundary, directory in directories.items():
        train([*PAIRS, *(("", text) for text in sentences)], directory, TrainOptions(700, 1.0, boundary))
    return {boundary: Tokenizer(directory) for boundary, directory in directories.items()}


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_no_piece_crosses_a_boundary(by_boundary, sentences, boundary):
    longer = [p for p in readable(read_model(by_boundary[boundary].directory)) if len(p) > 1]
    lines = [line for text in [*dict.fromkeys(TEXTS), *sentences] for line in text.splitlines()]
    units = set(lines) if boundary == "none" else {u for line in lines for u in Segmenter(boundary).units(line)}
    assert len(longer) > 30 and any(map(is_japanese, longer))
    assert not any("\n" in p for p in longer)
    joined = "\n".join(units)
    assert [p for p in longer if p not in joined] == []


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_digits_stand_alone_and_a_space_only_begins_a_piece(by_boundary, boundary):
    tokenizer = by_boundary[boundary]
    pieces = readable(read_model(tokenizer.directory))
    assert [p for p in pieces if len(p) > 1 and (any(c.isdigit() for c in p) or " " in p.lstrip(" "))] == []
    assert [tokenizer.piece(i) for i in tokenizer.encode("1234")] == list("1234")


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.sampled_from([*TEXTS[:6], "狸が", " ", "\n", "\t", "\u3000", "▁", "<s>", "3.14"]) | st.text(), max_size=6)
)
def test_any_text_comes_back_whatever_the_boundary(by_boundary, text):
    text = "".join(text)
    for tokenizer in by_boundary.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_coarser_boundary_makes_fewer_tokens(by_boundary, sentences):
    tokens = {boundary: sum(map(len, tokenizer.encode_batch(sentences))) for boundary, tokenizer in by_boundary.items()}
    assert tokens["bunsetsu"] < tokens["predicate"] < tokens["morpheme"]


@pytest.mark.parametrize("boundary", ["bunsetsu", "none"])
def test_a_long_line_is_learnt_from_too(tmp_path, boundary):
    long = "".join(random.Random(0).choice(("狸が", "月を", "山の", " ")) + "銀河鉄道" for _ in range(400))
    assert len(long.encode()) > 5000
    train([*PAIRS, ("", long)], tmp_path, TrainOptions(600, 1.0, boundary))
    assert [p for p in readable(read_model(tmp_path)) if len(p) > 1 and ("銀河" in p or "鉄道" in p)]


def test_an_unknown_boundary_is_an_error_that_names_the_boundaries(tmp_path):
    with pytest.raises(TokenizationError, match="boundary 'word' is none of morpheme, predicate, bunsetsu, none"):
        train(PAIRS, tmp_path, TrainOptions(512, boundary="word"))


# --- several languages ----------------------------------------------------------------------------------------------------


@functools.cache
def made_up_text(alphabet):
    """Words of the letters of an alphabet, some far commoner than others."""
    rng = random.Random(alphabet)
    words = ["".join(rng.choices(alphabet, k=rng.randint(2, 5))) for _ in range(2000)]
    return " ".join(rng.choices(words, [1 / (i + 1) for i in range(2000)], k=10_000))


@pytest.fixture
def languages(monkeypatch):
    """Two languages of made-up words without a letter in common: (language, text) pairs."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # so little text is not worth a process
    return [("ja", made_up_text("かきくけこさしすせそたちつてとなにぬね")), ("en", made_up_text("abcdefghijklmnopqrstuvw"))]


def by_script(directory):
    """Pieces of several characters: with kana, and without."""
    longer = [p for p in readable(read_model(directory)) if len(p) > 1]
    japanese = sum(map(is_japanese, longer))
    return japanese, len(longer) - japanese


@pytest.mark.parametrize(("language_weights", "japanese"), [({"ja": 3.0, "en": 1.0}, 0.75), ({"en": 0.65, "ja": 0.35}, 0.35)])
def test_each_language_has_its_share_of_the_longer_pieces(monkeypatch, tmp_path, languages, language_weights, japanese):
    monkeypatch.setattr(languages_module, "SURPLUS", 10)  # so that each language is sure to have as many as its share
    trained = train(languages, tmp_path, TrainOptions(1500, 1.0, language_weights=language_weights))
    ja, en = by_script(tmp_path)
    assert ja == pytest.approx(japanese * (ja + en), abs=1) and en == pytest.approx((1 - japanese) * (ja + en), abs=1)
    assert trained.pieces == pytest.approx(1500, abs=1) and trained.by_language.keys() == language_weights.keys()


def test_a_piece_of_two_languages_counts_for_the_one_in_which_it_is_commonest(monkeypatch, tmp_path, languages):
    monkeypatch.setattr(languages_module, "SURPLUS", 10)
    (ja, ja_text), (en, en_text) = languages
    texts = [(ja, ja_text + " tanuki moon" * 20), (en, en_text + " tanuki moon" * 2000)]
    trained = train(texts, tmp_path, TrainOptions(1500, 1.0, language_weights={"ja": 0.5, "en": 0.5}))
    japanese, others = by_script(tmp_path)
    assert {" tanuki", " moon"} <= set(readable(read_model(tmp_path)))
    assert japanese == pytest.approx(others, abs=1)
    assert sum(trained.by_language.values()) <= trained.pieces


def test_the_mixture_weighs_each_language_by_its_tokens(monkeypatch, tmp_path, languages):
    monkeypatch.setattr(languages_module, "SURPLUS", 10)
    (_, ja_text), (_, en_text) = languages
    texts = {"ja": ja_text, "en": en_text[: len(en_text) // 4]}
    train(texts.items(), tmp_path, TrainOptions(5000, 1.0, language_weights={"ja": 0.5, "en": 0.5}))
    model = read_model(tmp_path)
    odd = [i for i in range(len(model)) if model.is_control(i) or model.is_unknown(i) or model.is_byte(i)]
    mass = {model.id_to_piece(i): math.exp(model.get_score(i)) for i in range(len(model)) if i not in odd}
    mass.pop("\n")
    assert list(mass.values()) == sorted(mass.values(), reverse=True) and 0.9 < sum(mass.values()) < 1.001
    tokens = {name: len(model.encode(text)) for name, text in texts.items()}
    share = tokens["ja"] / sum(tokens.values())
    assert sum(p for piece, p in mass.items() if is_japanese(piece)) == pytest.approx(share, abs=0.05)
    text = ja_text[:500] + en_text[:500]
    assert model.decode(model.encode(text)) == text == Tokenizer(tmp_path).decode(Tokenizer(tmp_path).encode(text))


@pytest.mark.parametrize(("surplus", "size"), [(None, 1500), (10, 1501)])
def test_shares_do_not_change_the_size_of_the_vocabulary(monkeypatch, tmp_path, languages, surplus, size):
    if surplus:
        monkeypatch.setattr(languages_module, "SURPLUS", surplus)
    assert train(languages, tmp_path, TrainOptions(size, 1.0, language_weights={"ja": 0.5, "en": 0.5})).pieces == size


def test_a_language_of_little_text_loses_nothing_to_the_other(monkeypatch, tmp_path, languages):
    monkeypatch.setattr(languages_module, "SURPLUS", 10)
    (_, ja_text), (_, en_text) = languages
    texts = [("ja", ja_text), ("en", en_text[:5000])]
    train(texts, tmp_path / "shared", TrainOptions(1500, 1.0, language_weights={"ja": 0.5, "en": 0.5}))
    train(texts, tmp_path / "together", TrainOptions(1500, 1.0))
    assert by_script(tmp_path / "shared")[1] > by_script(tmp_path / "together")[1]


@pytest.mark.parametrize(
    ("language_weights", "message"),
    [
        ({"ja": 1.0}, "given for ja, the text is in 'ja', 'en'"),
        ({"ja": 0.5, "en": 0.3, "fr": 0.2}, "given for ja, en, fr"),
        ({"ja": 0.5, "EN": 0.5}, "given for ja, EN"),
        ({"ja": 1.0, "en": 0.0}, "above 0"),
        ({"ja": 1.5, "en": -0.5}, "above 0"),
    ],
)
def test_shares_that_do_not_fit_the_text_are_an_error_that_says_why(tmp_path, languages, language_weights, message):
    with pytest.raises(TokenizationError, match=message):
        train(languages, tmp_path, TrainOptions(1500, language_weights=language_weights))


def test_shares_for_text_of_no_named_language_are_refused(tmp_path):
    with pytest.raises(TokenizationError, match="the text is in ''"):
        train(PAIRS, tmp_path, TrainOptions(512, language_weights={"ja": 1.0}))


CORPUS = Path(__file__).parents[2] / "../shared/corpus"


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpora of books are not here")
def test_books_in_two_languages_are_learnt_from_without_a_piece_over_a_boundary(tmp_path):
    texts = []
    for language in ("ja", "en"):
        with gzip.open(CORPUS / f"{language}.jsonl.gz", "rt", encoding="utf-8") as f:
            texts += [(language, json.loads(line)["text"][:100_000]) for line in itertools.islice(f, 6)]
    train(texts, tmp_path, TrainOptions(6000, language_weights={"ja": 0.65, "en": 0.35}))
    segmenter, tokenizer = Segmenter(), Tokenizer(tmp_path)
    units = {u for _, text in texts for line in text.splitlines() for u in segmenter.units(line)}
    inside = {unit[a:b] for unit in units for a in range(len(unit)) for b in range(a + 2, min(a + 16, len(unit)) + 1)}
    longer = [p for p in readable(read_model(tmp_path)) if len(p) > 1]
    assert len(longer) > 2000 and [p for p in longer if is_japanese(p) and p not in inside] == []
    ids = tokenizer.encode_batch([text for _, text in texts])
    assert [tokenizer.decode(found) for found in ids] == [text for _, text in texts]


# --- what modern text needs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """The readable pieces of a vocabulary with room."""
    directory = tmp_path_factory.mktemp("roomy")
    train(PAIRS, directory, TrainOptions(LARGE_VOCAB))
    return set(readable(read_model(directory)))


def test_a_vocabulary_with_room_has_all_modern_characters_and_marks(roomy, pieces):
    assert set(MODERN) <= roomy
    marks = [m for m in SYMBOLS if m.isascii() and len(m) > 1 and not any(c.isalnum() for c in m)]
    words = [m for m in SYMBOLS if m.isascii() and len(m) > 1 and m.isalpha()]
    assert len(marks) > 50 and len(words) > 50 and {*marks, *words} <= roomy
    assert {f" {m}" for m in marks} <= roomy
    assert not set(MODERN) <= set(pieces) and not set(marks) <= set(pieces)  # a smaller one has only its text's


def test_marks_join_no_units(roomy):
    units = {u for text in TEXTS for line in text.splitlines() for u in Segmenter().units(line)} | {f" {m}" for m in SYMBOLS}
    assert [p for p in roomy if len(p) > 1 and is_japanese(p) and not any(p in unit for unit in units)] == []


def test_modern_characters_are_those_that_today_s_text_is_written_with():
    kanji = [c for c in MODERN if "\u4e00" <= c <= "\u9fff"]
    assert len(kanji) == 6355 + len("仝") and set(SPELLING) <= set(MODERN)
    assert set(map(chr, range(0x21, 0x7F))) <= set(MODERN) and set("あんアンヴー々〆→≦Ωж“”…〜￥") <= set(MODERN)
    assert not any(c.isspace() for c in MODERN) and len(set(MODERN)) == len(MODERN)
    assert len(set(SYMBOLS)) == len(SYMBOLS) and not any(c.isspace() for mark in SYMBOLS for c in mark)


def test_room_decides_whether_modern_characters_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(vocabulary, "MODERN", SPELLING + "鵺驢")
    monkeypatch.setattr(vocabulary, "SYMBOLS", ("-*-",))
    for room, wanted in ((512, True), (513, False)):
        monkeypatch.setattr(vocabulary, "LARGE_VOCAB", room)
        train(PAIRS, tmp_path, TrainOptions(512))
        assert [piece in readable(read_model(tmp_path)) for piece in ("鵺", "驢", "-*-", " -*-")] == [wanted] * 4


# --- the model ------------------------------------------------------------------------------------------------------------


def test_the_newline_is_a_piece_of_its_own(pieces, model, tokenizer):
    assert [p for p in pieces if "\n" in p] == ["\n"]
    assert model.encode("狸\n\na", out_type=str) == ["狸", "\n", "\n", "a"]
    assert [tokenizer.piece(i) for i in tokenizer.encode("狸\n\na")] == ["狸", "\n", "\n", "a"]


def test_all_bytes_are_pieces_and_spell_what_is_unknown(model):
    assert [model.id_to_piece(i) for i in range(len(model)) if model.is_byte(i)] == [f"<0x{b:02X}>" for b in range(256)]
    assert model.encode("🦝", out_type=str) == [f"<0x{b:02X}>" for b in "🦝".encode()]


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from("狸山 aＡ①㍿é\u3099か\n\t"), max_size=12))
def test_the_model_neither_normalises_nor_adds_a_space_before_the_text(model, text):
    assert model.decode(model.encode(text)) == text
    assert not text or text.startswith(" ") or not model.encode(text, out_type=str)[0].startswith("▁")


def test_special_tokens_are_controls_that_the_model_does_not_read_from_text(model):
    assert [model.id_to_piece(i) for i in range(4)] == [UNK, BOS, EOS, PAD] and model.is_unknown(0)
    controls = [model.piece_to_id(p) for p in (BOS, EOS, PAD, *CONTROLS)]
    assert all(map(model.is_control, controls)) and len(set(controls)) == 3 + len(CONTROLS)
    spelt = "".join((UNK, BOS, EOS, PAD, *CONTROLS))
    assert not set(model.encode(spelt)) & {0, *controls} and model.decode(model.encode(spelt)) == spelt


def test_the_vocabulary_has_the_size_asked_for(tmp_path):
    trained = train(PAIRS, tmp_path, TrainOptions(405, character_coverage=1.0))
    assert trained.pieces == Tokenizer(tmp_path).vocab_size == 405


def test_little_text_gives_fewer_pieces_than_asked_for(tmp_path):
    assert train([("", "狸 山")] * 3, tmp_path, TrainOptions(2000)).pieces < 400
    assert Tokenizer(tmp_path).decode(Tokenizer(tmp_path).encode("狸 山 moon")) == "狸 山 moon"


def test_what_was_learnt_is_counted(tmp_path):
    units = collections.Counter(u for text in TEXTS for line in text.splitlines() for u in Segmenter().units(line))
    trained = train(PAIRS, tmp_path, TrainOptions(420))
    assert (trained.units, trained.distinct_units, trained.forgotten) == (units.total(), len(units), 0)
    assert str(trained) == (
        f"{trained.pieces:,} pieces ({trained.by_language['']:,} of no named language) "
        f"from {trained.units:,} units ({trained.distinct_units:,} distinct)"
    )
    used = {i for unit in units for i in read_model(tmp_path).encode(unit)}
    assert trained.by_language[""] == sum(not read_model(tmp_path).is_byte(i) for i in used)


def test_units_too_rare_for_memory_are_told_of(monkeypatch, tmp_path):
    monkeypatch.setattr("tokenization.segment.MAX_UNITS", 20)
    trained = train([*PAIRS, ("", "一度だけの長い話。")], tmp_path, TrainOptions(420))
    assert trained.forgotten > 0 and f"{trained.forgotten:,} units too rare for memory were left out" in str(trained)


@pytest.mark.parametrize("options", [{}, {"boundary": "none"}, {"language_weights": {"ja": 0.5, "en": 0.5}}], ids=str)
def test_training_twice_gives_the_same_tokenizer(monkeypatch, tmp_path, options):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    texts = [("en" if text.isascii() else "ja", text) for text in TEXTS]
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        train(iter(texts), directory, TrainOptions(700, **options))
    names = sorted(p.name for p in one.iterdir())
    assert names == ["special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert len({export(directory / "tokenizer.model", tmp_path / "three") for directory in (one, two)}) == 1
    assert (tmp_path / "three" / "tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()


def test_the_model_tells_nothing_of_the_machine_it_was_trained_on(tokenizer):
    data = (tokenizer.directory / "tokenizer.model").read_bytes()
    assert tempfile.gettempdir().encode() not in data and str(tokenizer.directory).encode() not in data


@pytest.mark.parametrize(
    ("texts", "size", "message"), [([], 512, "corpus is empty"), (["\n"], 512, "empty"), (TEXTS, 100, "100 pieces")]
)
@pytest.mark.parametrize("boundary", ["bunsetsu", "none"])
def test_what_cannot_be_trained_is_an_error_that_says_why(tmp_path, texts, size, message, boundary):
    with pytest.raises(TokenizationError, match=message):
        train([("", text) for text in texts], tmp_path, TrainOptions(size, boundary=boundary))


NUMBERS = [
    (dict(vocab_size=0), "vocab_size 0 "),
    (dict(vocab_size=-5), "vocab_size -5 "),
    (dict(vocab_size=10**11), "vocab_size 100000000000 "),
    (dict(vocab_size=512, character_coverage=math.nan), "character_coverage nan"),
    (dict(vocab_size=512, character_coverage=1.5), "character_coverage 1.5"),
    *((dict(vocab_size=512, language_weights={"": share}), "above 0") for share in (math.nan, math.inf, 0.0, -1.0)),
]


@pytest.mark.parametrize(("options", "message"), NUMBERS, ids=str)
def test_numbers_that_cannot_be_are_an_error_before_any_text_is_read(tmp_path, options, message):
    with pytest.raises(TokenizationError, match=message):
        train((pytest.fail("read") for _ in range(1)), tmp_path, TrainOptions(**options))


@pytest.mark.parametrize("most", [100, 3000, 9000, 200_000])
def test_a_full_disk_is_one_line(tmp_path, most):
    """Wherever it comes: in our own tables, in SentencePiece's model, in tokenizer.json."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        train(PAIRS, tmp_path / "out", TrainOptions(512), HOOKS)
    except UserError as error:
        assert "disk" in str(error) and "\n" not in str(error)
    else:
        assert most == 200_000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_seeds_are_the_repeated_substrings_of_units_with_their_true_counts():
    assert dict(seed_pieces({" aba": 3, "ab": 4, "xy": 1})) == {
        "▁a": 3, "▁ab": 3, "▁aba": 3, "ab": 7, "aba": 3, "ba": 3,
    }  # fmt: skip


def test_seeds_count_every_substring_as_a_slow_loop_does():
    counts = {unit: n for n, unit in enumerate(("狸が山に", " moonmoon", "a" * 20, "月", "狸が"), 1)}
    slow = collections.Counter()
    for unit, n in counts.items():
        for size in range(2, 17):
            for start in range(len(unit) - size + 1):
                slow[unit[start : start + size].replace(" ", "▁")] += n
    assert dict(seed_pieces(counts)) == {piece: n for piece, n in slow.items() if n > 1}
