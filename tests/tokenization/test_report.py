import functools
import itertools
import json
import warnings
from pathlib import Path

import ipadic
import MeCab
import pytest
import sentencepiece

from tanuki_jax.cli.main import main
from tanuki_jax.data.tokenizer import Tokenizer, byte_of
from tanuki_jax.errors import UserError
from tests.conftest import TEXTS
from tokenization import encoders
from tokenization.errors import TokenizationError
from tokenization.options import TrainOptions
from tokenization.report import MAX_EXAMPLES, is_japanese, plot, plot_format, report, table
from tokenization.segment import Segmenter
from tokenization.train import train

SAMPLE = [*TEXTS[:6], "見たことのない漢字: 鵺 🦝🦝", "two\nlines"]
LINES = [line for text in SAMPLE for line in text.splitlines(keepends=True)]
open_encoder = functools.partial(encoders.open_encoder, open_directory=Tokenizer)
KINDS = {"directory": "", "json": "tokenizer.json", "model": "tokenizer.model"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tokenizer whose pieces are as long as a bunsetsu."""
    directory = tmp_path_factory.mktemp("report") / "bunsetsu"
    train([("", text) for text in TEXTS], directory, TrainOptions(512, 1.0))
    return directory


@pytest.fixture(scope="module")
def model(home):
    return sentencepiece.SentencePieceProcessor(model_file=str(home / "tokenizer.model"))


@pytest.fixture(scope="module")
def injectable(tmp_path_factory):
    """A model of another make, in which text can spell markers of a conversation."""
    home = tmp_path_factory.mktemp("injectable")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(home / "loose"),
        vocab_size=420,
        user_defined_symbols=["<|user|>", "<sep>"],
        control_symbols=["<never>"],
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return home / "loose.model"


def measured(encoder, texts=SAMPLE, **options):
    """The figures of one tokenizer on one domain, and of its vocabulary."""
    found = report([encoder], {"sample": texts}, **options)
    return found["domains"]["sample"][encoder.name], found["vocabulary"][encoder.name]


def crossings(model, line, boundary):
    """Tokens of a line that go over the beginning of a unit; a character that is spelt in bytes crosses nothing."""
    begins = [0, *itertools.accumulate(map(len, Segmenter(boundary).units(line)))]
    at = found = 0
    spelt = b""
    for piece in model.encode(line, return_type=str):
        if byte_of(piece) is None:
            found += any(at < begin < at + len(piece) for begin in begins)
            at += len(piece)
        else:
            spelt += bytes([byte_of(piece)])
            done = spelt.decode(errors="ignore")
            at, spelt = at + len(done), b"" if done else spelt
    assert at == len(line)
    return found


# --- figures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", ["morpheme", "predicate", "bunsetsu"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_are_what_sentencepiece_and_mecab_count(home, model, kind, boundary):
    wakati = MeCab.Tagger(f"{ipadic.MECAB_ARGS} -O wakati")
    ids = [i for line in LINES for i in model.encode(line)]
    characters, size = sum(map(len, SAMPLE)), sum(len(t.encode()) for t in SAMPLE)
    words = sum(len(wakati.parse(line).split()) for line in LINES)
    crossing = sum(crossings(model, line, boundary) for line in LINES)
    assert crossing > 0 or boundary == "bunsetsu"
    figures, _ = measured(open_encoder(home / KINDS[kind]), boundary=boundary)
    assert figures.pop("disagreements", []) == [] and figures.pop("agreement", 1.0) == 1.0
    assert figures == {
        "lines": len(LINES),
        "characters": characters,
        "tokens": len(ids),
        "characters_per_token": pytest.approx(characters / len(ids), abs=1e-4),
        "bytes_per_token": pytest.approx(size / len(ids), abs=1e-4),
        "fertility": pytest.approx(len(ids) / words, abs=1e-4),
        "byte_fallback": pytest.approx(sum(map(model.is_byte, ids)) / len(ids), abs=1e-6),
        "round_trip": 1.0,
        "crossing": pytest.approx(crossing / len(ids), abs=1e-6),
        "special": 0,
    }


def test_only_a_directory_with_a_model_is_compared_with_it(home, tokenizer):
    compared = {kind: "agreement" in measured(open_encoder(home / name))[0] for kind, name in KINDS.items()}
    assert compared == {"directory": True, "json": False, "model": False}


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_is_what_its_pieces_are(home, model, kind):
    pieces = [model.id_to_piece(i).replace("▁", " ") for i in range(len(model))]
    japanese = [p for p in pieces if any("ぁ" <= c <= "ヿ" or "一" <= c <= "\u9fff" for c in p)]
    longer = [p.strip() for p in japanese if len(p.strip()) > 1]
    cut = sum(len(Segmenter("morpheme").units(p)) > 1 for p in longer)
    assert 0 < cut < len(longer)
    vocabulary = measured(open_encoder(home / KINDS[kind]))[1]
    assert vocabulary.pop("injected") == 0 or kind == "json"
    assert vocabulary == {
        "pieces": len(model),
        "japanese": len(japanese),
        "split_alone": pytest.approx(cut / len(longer), abs=1e-4),
        "used": len({i for line in LINES for i in model.encode(line)}),
    }


def test_unknown_characters_count_as_the_bytes_they_fall_back_to(home):
    encoder = open_encoder(home)
    assert [measured(encoder, [text])[0]["byte_fallback"] for text in ("🦝", "狸", "🦝狸")] == [1.0, 0.0, 0.8]


def test_figures_of_a_domain_do_not_depend_on_the_others(home, injectable):
    encoders = [open_encoder(home), open_encoder(home / "tokenizer.model"), open_encoder(injectable)]
    domains = {"ja": TEXTS[:1], "en": TEXTS[1:2], "numbers": TEXTS[2:4]}
    found = report(encoders, {name: iter(texts) for name, texts in domains.items()})
    assert found["boundary"] == "bunsetsu" and list(found["domains"]) == list(domains)
    for name, texts in domains.items():
        assert found["domains"][name] == {e.name: measured(e, texts)[0] for e in encoders}
    assert list(found["vocabulary"]) == ["bunsetsu", "tokenizer.model", "loose.model"]
    alone = [measured(encoders[0], texts)[1]["used"] for texts in domains.values()]
    assert max(alone) <= found["vocabulary"]["bunsetsu"]["used"] <= sum(alone)


def test_two_tokenizers_whose_directories_have_one_name_are_told_apart(home, tokenizer, tmp_path):
    (tmp_path / "bunsetsu").symlink_to(tokenizer.directory)
    rows = report([open_encoder(home), open_encoder(tmp_path / "bunsetsu")], {"sample": SAMPLE})["domains"]["sample"]
    assert sorted(row["tokens"] for row in rows.values()) == sorted(
        measured(open_encoder(path))[0]["tokens"] for path in (home, tokenizer.directory)
    )


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_an_error_that_names_the_domain(home, texts):
    with pytest.raises(TokenizationError, match="nothing has no text"):
        report([open_encoder(home)], {"ja": ["狸"], "nothing": texts})


# --- special tokens -----------------------------------------------------------------------------------------------------


def test_control_tokens_spelt_in_text_are_not_counted_as_special(tokenizer):
    figures, vocabulary = measured(open_encoder(tokenizer.directory), ["<s></s><pad> <0x41>\n"])
    assert (figures["special"], figures["round_trip"], figures["byte_fallback"]) == (0, 1.0, 0.0)
    assert vocabulary["injected"] == 0


def test_markers_that_text_can_spell_are_counted(injectable):
    figures, vocabulary = measured(open_encoder(injectable), ["狸<sep>月\n", "<|user|><|user|>", "<never>"])
    assert figures["special"] == 3 and vocabulary["injected"] == 2


def test_a_plain_tokenizer_json_reads_special_tokens_from_text(home):
    figures, vocabulary = measured(open_encoder(home / "tokenizer.json"), ["狸</s>"])
    specials = json.loads((home / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert figures["special"] == 1 and vocabulary["injected"] == len(specials)


# --- agreement ----------------------------------------------------------------------------------------------------------


def test_a_line_that_the_two_models_read_differently_is_shown_with_the_reason(home, model):
    figures, _ = measured(open_encoder(home), ["狸\n", "狸▁月\n", "月"])
    assert figures["agreement"] == pytest.approx(2 / 3) and figures["round_trip"] == 1.0
    assert figures["disagreements"] == ["'狸▁月\\n': U+2581, which SentencePiece writes for a space"]


class Other:
    """A model that spells everything in single characters, with scores that are `gap` apart from the real one's."""

    def __init__(self, encoder, gap):
        self.encoder, self.gap = encoder, gap

    def encode(self, line):
        return [i for c in line for i in self.encoder.encode(c)[0]]

    def get_score(self, i):
        return self.gap if self.encoder.pieces[i] == "こんにちは" else 0.0


@pytest.mark.parametrize(("gap", "reason"), [(0.0, "equal scores"), (0.25, "scores 0.2500 apart")])
def test_the_scores_of_two_readings_say_whether_it_was_a_tie(home, gap, reason):
    encoder = open_encoder(home)
    figures, _ = measured(encoder._replace(sentencepiece=Other(encoder, gap)), ["狸がこんにちは\n"] * 9)
    assert figures["agreement"] == 0 and len(figures["disagreements"]) == MAX_EXAMPLES
    assert figures["disagreements"][0] == (
        f"'狸がこんにちは\\n': ['狸が', 'こんにちは', '\\n'] and ['狸', 'が', 'こ', 'ん'], {reason}"
    )


PUBLISHED = Path(__file__).parents[2] / "../shared/fixtures/tanuki_tokenizer/tokenizer_scale200.model"


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published tokenizer is not here")
def test_a_published_model_has_the_figures_that_its_library_counts():
    model, texts = sentencepiece.SentencePieceProcessor(model_file=str(PUBLISHED)), TEXTS[:5]
    figures, vocabulary = measured(open_encoder(PUBLISHED), texts, boundary="morpheme")
    ids = [model.encode(text) for text in texts]
    assert figures["tokens"] == sum(map(len, ids)) and vocabulary["used"] == len({i for found in ids for i in found})
    exact = [model.decode(found) == text for found, text in zip(ids, texts, strict=True)]
    assert figures["round_trip"] == sum(exact) / len(exact)
    assert vocabulary["pieces"] == 65_000 and vocabulary["injected"] > 0  # its conversation markers can be spelt


# --- for people ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(home, injectable):
    return report([open_encoder(home), open_encoder(injectable)], {"日本語": TEXTS[:1], "English": [TEXTS[1], "a▁b"]})


def test_the_table_names_every_domain_and_tokenizer_with_its_figures(found):
    lines = table(found).splitlines()
    for domain, rows in found["domains"].items():
        at = lines.index(domain)
        for name, row in rows.items():
            [line] = [line for line in lines[at : at + 4] if line.split()[0] == name]
            assert f"{row['characters_per_token']:.3f}" in line and f"{row['crossing']:.3%}" in line
            assert line.endswith("-") == ("agreement" not in row)
    vocabulary = lines[[line.startswith("vocabulary") for line in lines].index(True) :]
    for name, row in found["vocabulary"].items():
        [line] = [line for line in vocabulary if line.split()[0] == name]
        assert line.split()[1:] == [
            f"{row['pieces']:,}", f"{row['japanese']:,}", f"{row['split_alone']:.1%}", f"{row['used']:,}", f"{row['injected']}",
        ]  # fmt: skip
    assert "U+2581" in table(found) and "bunsetsu units" in lines[-1]


@pytest.mark.parametrize(("suffix", "begin"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_the_picture_is_drawn_with_japanese_letters(found, tmp_path, suffix, begin):
    path = tmp_path / f"picture{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter that the font lacks is a warning
        plot(found, path, plot_format(path))
    data = path.read_bytes()
    assert data.startswith(begin) and len(data) > 5000 and [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".svg":
        assert b"<svg" in data and all(word in data.decode() for word in ("文字/トークン", "日本語", "loose.model"))


def test_a_picture_that_cannot_be_drawn_leaves_the_one_before(home, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    (tmp_path / "text.txt").write_text("\n".join(SAMPLE), encoding="utf-8")
    path = tmp_path / "picture.png"
    path.write_text("before")

    def broken(self, target, **options):
        target.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        main(["tokenizer", "report", f"--tokenizer={home}", f"--input={tmp_path}/text.txt", f"--plot={path}"])
    assert path.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["picture.png", "text.txt"]


def test_a_picture_of_another_format_is_refused():
    with pytest.raises(TokenizationError, match="--plot: picture.gif must end with .svg, .png or .pdf"):
        plot_format(Path("picture.gif"))


# --- reading tokenizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "no such tokenizer: .*none"),
        ("broken.model", "狸", "broken.model is not a SentencePiece model"),
        ("empty.model", "", "empty.model is not a SentencePiece model"),
        ("broken.json", "{", "broken.json cannot be read"),
        ("list.json", "[]", "list.json cannot be read"),
    ],
)
def test_what_is_no_tokenizer_is_an_error_that_names_it(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizationError, match=message):
        open_encoder(tmp_path / name)


def test_a_directory_without_a_tokenizer_or_with_a_broken_model_is_an_error(home, tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        open_encoder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((home / name).read_bytes())
    assert open_encoder(tmp_path).sentencepiece is None
    (tmp_path / "tokenizer.model").write_text("狸")
    with pytest.raises(TokenizationError, match="tokenizer.model is not a SentencePiece model"):
        open_encoder(tmp_path)


@pytest.mark.parametrize(("piece", "byte"), [("<0x41>", 0x41), ("<0xFF>", 255), ("<0x4>", None), ("<pad>", None), ("a", None)])
def test_byte_pieces_are_known_by_their_spelling(piece, byte):
    assert byte_of(piece) == byte


@pytest.mark.parametrize(("piece", "answer"), [("狸", True), (" か", True), ("moon", False), ("。", False), ("１", False)])
def test_a_japanese_piece_has_kana_or_kanji(piece, answer):
    assert is_japanese(piece) == answer
