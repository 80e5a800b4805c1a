import json
import os

import pytest
import sentencepiece
import tokenizers

from tanuki_jax.data.chat import TEMPLATE
from tanuki_jax.data.tokenizer import Tokenizer
from tests.conftest import TEXTS
from tokenization.export import export
from tokenization.options import Hooks, TrainOptions
from tokenization.train import train
from tokenization.vocabulary import CONTROLS


@pytest.fixture(scope="module", params=["of one text", "of two languages"])
def tokenizer(request, tokenizer, tmp_path_factory):
    """The tests' own tokenizer, and one whose model is a mixture of two."""
    if request.param == "of one text":
        return tokenizer
    directory = tmp_path_factory.mktemp("languages")
    texts = [("en" if text.isascii() else "ja", text) for text in TEXTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)  # so little text is not worth a process
        options = TrainOptions(800, 1.0, language_weights={"ja": 0.5, "en": 0.5})
        train(texts, directory, options, Hooks(chat_template=TEMPLATE))
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def saved(tokenizer):
    """The JSON files of the tokenizer, by name."""
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in tokenizer.directory.glob("*.json")}


@pytest.fixture(scope="module")
def model(tokenizer):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.directory / "tokenizer.model"))


def test_every_id_has_the_piece_and_the_score_of_the_model_with_real_spaces(saved, model):
    vocab = saved["tokenizer"]["model"]["vocab"]
    assert [p for p, _ in vocab] == [model.id_to_piece(i).replace("▁", " ") for i in range(len(model))]
    read = [i for i in range(len(model)) if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    assert [vocab[i][1] for i in read] == pytest.approx([model.get_score(i) for i in read])
    assert max(score for i, (_, score) in enumerate(vocab) if i not in set(read)) < 100 * min(vocab[i][1] for i in read)


def test_nothing_is_normalised_or_put_around_the_text(saved):
    assert saved["tokenizer"]["normalizer"] is None and saved["tokenizer"]["post_processor"] is None


def test_exactly_the_controls_are_special_tokens(saved, tokenizer):
    expected = {"<unk>", "<s>", "</s>", "<pad>", *CONTROLS}
    assert {t["content"] for t in saved["tokenizer"]["added_tokens"] if t["special"]} == expected == set(tokenizer.special)
    assert set(saved["tokenizer_config"]["additional_special_tokens"]) == set(CONTROLS)


def test_the_configuration_names_the_special_tokens_and_holds_the_chat_template(saved):
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert saved["special_tokens_map"] == names and names.items() <= saved["tokenizer_config"].items()
    assert saved["tokenizer_config"]["chat_template"] == TEMPLATE
    assert not saved["tokenizer_config"]["clean_up_tokenization_spaces"]


def test_tokenizer_json_alone_is_enough_for_the_tokenizers_library(tokenizer):
    alone = tokenizers.Tokenizer.from_file(str(tokenizer.directory / "tokenizer.json"))
    text = "昔々、山に  狸が\n\n住んで🦝▁いました。"
    assert alone.decode(alone.encode(text).ids, skip_special_tokens=False) == text
    assert alone.encode(text).ids == tokenizer.encode(text)


def test_exporting_again_writes_the_same_files(tokenizer, saved, tmp_path):
    assert export(tokenizer.directory / "tokenizer.model", tmp_path, TEMPLATE) == tokenizer.vocab_size
    assert {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in tmp_path.glob("*.json")} == saved


def test_both_files_give_the_same_ids(tokenizer, model):
    lines = [line for text in TEXTS[:6] for line in text.splitlines(keepends=True)]
    assert [tokenizer.encode(line) for line in lines] == [model.encode(line) for line in lines]
