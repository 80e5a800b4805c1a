"""Each filter by itself."""

import collections

import pytest

from tanuki_jax.data.filters import evaluation, language, leaks, near_duplicates, personal, repetition
from tanuki_jax.data.filters.texts import Answer, Texts, change_texts, texts_of
from tanuki_jax.data.sources import Row
from tanuki_jax.errors import UserError


def dialogue(*turns, **first):
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    messages[1] |= first
    return Row("file:1", {"messages": messages})


# --- texts --------------------------------------------------------------------------------------------------------------------


def test_of_a_pair_the_rejected_answer_is_seen_but_not_judged():
    texts = texts_of(Row("", {"prompt": "q", "chosen": "good", "rejected": "bad"}))
    assert [answer.text for answer in texts.answers] == ["good"]
    assert texts.parts == ("q", "good", "bad")


def test_an_answer_that_is_not_trained_on_is_not_judged():
    assert [a.text for a in texts_of(dialogue("q", "first", "q2", "second", weight=0)).answers] == ["second"]


def test_an_answer_knows_what_came_before():
    answer = texts_of(dialogue("q1", "a1", "q2", "a2")).answers[1]
    assert (answer.prompt, answer.question) == ("q1\nq2", "q2")


def test_rows_of_tokens_have_no_text():
    with pytest.raises(UserError, match="file:3 holds tokens"):
        texts_of(Row("file:3", {"tokens": [1, 2]}))


def test_texts_are_changed_and_names_are_not():
    row = Row("", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "meta": {"id": "a"}})
    changed = change_texts(row, lambda text: text * 2).fields
    assert changed["messages"] == [{"role": "user", "content": [{"type": "text", "text": "aa"}]}]
    assert changed["meta"] == {"id": "a"}


# --- language -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def check_language():
    return {name: language.make_check(name) for name in ("ja", "en")}


@pytest.mark.parametrize(
    "text",
    [
        "東京都議会議員選挙公報",
        "日本国憲法",
        "第一章 総則 第二章 会員 第三章 役員",
        "はい",
        "3.14",
        "ls -l",
        "FAQ",
        "①②③",
        "猫",
    ],
)
def test_short_and_kanji_only_text_may_be_japanese(check_language, text):
    assert not check_language["ja"](Answer(text))


@pytest.mark.parametrize(
    "text", ["你好", "我们今天去北京大学学习", "這是我的書", "한국어 문장입니다", "The train leaves at nine tomorrow."]
)
def test_what_is_not_japanese_is_told(check_language, text):
    assert check_language["ja"](Answer(text))


@pytest.mark.parametrize("prompt", ["英語に訳してください。", "Pythonのコードを書いて", "フランス語で何と言いますか"])
def test_a_prompt_may_ask_for_another_language(check_language, prompt):
    text = "I would like to go there by train tomorrow morning."
    assert not check_language["ja"](Answer(text, prompt=prompt))
    assert check_language["ja"](Answer(text, prompt="日本語で答えて"))


def test_code_and_addresses_are_of_no_language(check_language):
    text = "次のように書きます。\n```python\nfor number in range(100):\n    print(number * number, end=' ')\n```\nhttps://example.com/a/long/path"
    assert not check_language["ja"](Answer(text))


# --- repetition ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "はい。" * 20,
        "今日は晴れです。" + "そして、彼は言った。" * 8,
        "a b c d e f g h " * 10,
        "同じ行です。\n" * 3 + "違う行です。\n別の行です。",
        "すごーーーーーーーーーーーーーーーーーーーーい",
    ],
)
def test_repetition_is_told(text):
    assert repetition.find_repetition(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "はい。",
        "|---|---|---|---|\n| 一 | 二 | 三 | 四 |\n|---|---|---|---|",
        "=" * 60 + "\n表題をここに書く",
        "```\n" + "x = 0\n" * 20 + "```\n繰り返しを初期化する。",
        "目次" + "." * 60 + "3",
    ],
)
def test_tables_rules_and_code_do_not_count(text):
    assert not repetition.find_repetition(text)


def test_a_loop_in_a_long_text_counts_by_its_share():
    prose = "".join(chr(0x4E00 + 7 * i % 3000) for i in range(700))
    assert not repetition.find_repetition(prose + "それは嘘だ。" * 9)
    assert repetition.find_repetition(prose + "それは嘘だ。" * 60)


# --- leaks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("### 応答:\n東京です。", "日本の首都は?"),
        ("東京です。<|im_end|>", "日本の首都は?"),
        ("As an AI language model, I can't say.", "Who is best?"),
        ("簡潔に、箇条書きで答えてください。東京です。", "日本の首都は?簡潔に、箇条書きで答えてください。"),
        ("Tokyo.\n\nJapanese translation: 東京", "What is the capital?"),
    ],
)
def test_leaks_are_told(text, prompt):
    assert leaks.find_leak(Answer(text, prompt=prompt, question=prompt))


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("User: hi\nAssistant: hello", "Continue this log.\nUser: ...\nAssistant: ..."),
        ("Translation: 東京", "Translate Tokyo, with a heading."),
        ("駅はどこですか、という意味です。", "「駅はどこですか。教えてください。」の意味は?"),
        ("AI is a branch of computing.", "What is AI?"),
        ("三つあります。一つ目は、早寝です。", "健康のコツを三つ教えてください。"),
    ],
)
def test_what_was_asked_for_is_no_leak(text, prompt):
    assert not leaks.find_leak(Answer(text, prompt=prompt, question=prompt))


def test_a_sentence_of_the_system_message_is_a_leak():
    answer = Answer(
        "You are a retired sailor who never lies. Aye.", system="You are a retired sailor who never lies.", prompt="hi"
    )
    assert "retired sailor" in leaks.find_leak(answer)


def test_every_phrase_can_match_where_its_word_is():
    """A phrase stands under a word; if its pattern could match without the word, it would never be looked for there."""
    for word, pattern in leaks.load_signs().phrases.items():
        letters = set(word.strip())
        assert word == word.casefold() and letters <= set(pattern.pattern.casefold()), word


# --- personal information -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def find():
    return personal.make_finder()


@pytest.mark.parametrize(
    ("kind", "text", "piece"),
    [
        ("phone", "電話は03-1234-5678です", "03-1234-5678"),
        ("phone", "電話は０３−１２３４−５６７８です", "０３−１２３４−５６７８"),
        ("phone", "携帯:09012345678まで", "09012345678"),
        ("phone", "090ー1234ー5678", "090ー1234ー5678"),
        ("phone", "(092)733-5918", "(092)733-5918"),
        ("phone", "TEL 0312345678", "0312345678"),
        ("phone", "call +81 90-1234-5678 now", "+81 90-1234-5678"),
        ("phone", "call (415) 732-8861 now", "(415) 732-8861"),
        ("email", "taro.yamada@mail-host.co.jpまで", "taro.yamada@mail-host.co.jp"),
        ("email", "write to a@b-c.org.", "a@b-c.org"),
        ("card", "4539 1488 0343 6467", "4539 1488 0343 6467"),
        ("card", "371449635398431", "371449635398431"),
        ("my_number", "マイナンバーは1234-5678-9018", "1234-5678-9018"),
        ("address", "東京都杉並区堀ノ内2丁目14番8号に住む", "東京都杉並区堀ノ内2丁目14番8号"),
        ("address", "横浜市港北区篠原町1583-7の家", "横浜市港北区篠原町1583-7"),
        ("postal_code", "〒166-0013", "〒166-0013"),
    ],
)
def test_personal_information_is_found_at_its_place(find, kind, text, piece):
    [finding] = find(text)
    assert (finding.kind, text[finding.start : finding.stop]) == (kind, piece)


@pytest.mark.parametrize(
    "text",
    [
        "2024-10-18に発売",
        "10000000000円",
        "ISBN 978-4-00-310101-8",
        "4539 1488 0343 6468",  # not Luhn's
        "1234-5678-9018",  # My Number's check digit, but no word for it
        "マイナンバーは1234-5678-9012",  # wrong check digit
        "0120-444-444",
        "user@example.com",
        "git@host.org:a/b",
        "東京都の人口は1400万人",
        "192.168.100.200",
        "3.14159265358979",
        "119番",
        "型番 0312-4567-89",
    ],
)
def test_other_numbers_are_left_alone(find, text):
    assert not find(text)


def test_a_mask_is_in_the_language_of_the_text_and_counted(find):
    counts = collections.Counter()
    texts = ["電話は03-1234-5678、a@b-c.orgです。", "Call (415) 732-8861, please."]
    masked = [personal.mask(text, find(text), counts) for text in texts]
    assert masked == ["電話は[電話番号]、[メールアドレス]です。", "Call [phone number], please."]
    assert counts == {"phone": 2, "email": 1}


def test_check_digits():
    assert personal.luhn("4539148803436467") and not personal.luhn("4539148803436476")
    assert personal.my_number_check("123456789018") and not personal.my_number_check("123456789012")


# --- evaluation ---------------------------------------------------------------------------------------------------------------


def texts(*parts):
    return Texts(True, (), parts)


def test_prompts_are_found_by_ngrams_after_normalisation():
    index = evaluation.build([("eval:1", "池の四分の一をおおうのは何日目ですか。"), ("eval:2", "one two three four five")], 5)
    assert evaluation.find_prompt(texts("では、池の 四分の\n一をおおうのは"), index).startswith("eval:1")
    assert evaluation.find_prompt(texts("x", "ONE, two; three four five six"), index).startswith("eval:2")
    assert not evaluation.find_prompt(texts("池の四隅", "one two three four"), index)


def test_a_prompt_shorter_than_an_ngram_counts_alone():
    index = evaluation.build([("eval:1", "続けて。"), ("eval:2", "Go on.")], 13)
    assert evaluation.find_prompt(texts("続けて。"), index) and evaluation.find_prompt(texts("go on."), index)
    assert not evaluation.find_prompt(texts("彼は続けて。と言った"), index)


def test_the_form_of_many_prompts_is_no_question():
    prompts = [
        (f"eval:{i}", f"次の選択肢から正しいものを一つ選びなさい。{word}の色は何か。")
        for i, word in enumerate(["海洋生物", "山岳", "太陽光線"])
    ]
    index = evaluation.build(prompts, 13)
    assert not evaluation.find_prompt(texts("次の選択肢から正しいものを一つ選びなさい。"), index)
    assert evaluation.find_prompt(texts("一つ選びなさい。太陽光線の色は何か。"), index)


def test_code_in_a_japanese_prompt_is_no_ngram_of_characters():
    index = evaluation.build([("eval:1", "次を直して。import numpy as np")], 8)
    assert not evaluation.find_prompt(texts("日本語の文。import numpy as np"), index)


def test_question_files_are_read_in_every_form(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"turns": ["a", "b"]}\n{"prompt": "c"}\n{"question": "d"}\n{"text": "e"}\n'
        '{"messages": [{"role": "user", "content": "f"}, {"role": "assistant", "content": "no"}]}\n'
    )
    assert [prompt for _, prompt in evaluation.read_prompts(str(path))] == list("abcdef")
    path.write_text('{"id": 1}\n')
    with pytest.raises(UserError, match=r"q.jsonl:1 has none of turns"):
        list(evaluation.read_prompts(str(path)))


# --- near-duplicates ----------------------------------------------------------------------------------------------------------


def test_similarity_is_exact():
    assert near_duplicates.jaccard(near_duplicates.shingles("abcdefg"), near_duplicates.shingles("ABC defh")) == 2 / 4
    assert near_duplicates.shingles("ab") == {"ab"}


def test_the_threshold_decides():
    base = "".join(chr(0x4E00 + i) for i in range(100))
    other = base[:90] + "".join(chr(0x3041 + i) for i in range(10))
    similarity = near_duplicates.jaccard(near_duplicates.shingles(base), near_duplicates.shingles(other))
    for threshold, duplicate in ((similarity - 0.01, True), (similarity + 0.01, False)):
        index = near_duplicates.Index(threshold)
        assert not index.find(base, "first")
        assert bool(index.find(other, "second")) == duplicate


def test_bands_propose_what_the_threshold_asks_for():
    assert [near_duplicates.bands_for(t) for t in (0.95, 0.8, 0.5)] == [8, 32, 64]
