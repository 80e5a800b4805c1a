import time

import pytest

from tanuki_jax.synth import cleaning


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  1+1は?\n", "1+1は?"),
        ("質問: 1+1は?", "1+1は?"),
        ("**質問：** 1+1は?", "1+1は?"),
        ("質問1：\n1+1は?", "1+1は?"),
        ("「1+1は?」", "1+1は?"),
        ("Q: 「1+1は?」", "1+1は?"),
        ('"What is it?"', "What is it?"),
        ('"A" and "B": which?', '"A" and "B": which?'),
        ("「雲」と「空」", "「雲」と「空」"),
        ("Question: What is it?\n\nAnswer: A cloud.", "What is it?"),
        ("1+1は?\n回答：2です。", "1+1は?"),
        ("次の関数は正しい?\n```\ndef f(): ...\n```", "次の関数は正しい?\n```\ndef f(): ...\n```"),
        ("Question time: what comes next?", "Question time: what comes next?"),
        ("【質問】\n1+1は?\n\n【解答】\n2", "1+1は?"),
        ("Which is it?\nA: Tokyo\nB: Osaka", "Which is it?\nA: Tokyo\nB: Osaka"),
        ("質問:", ""),
    ],
)
def test_questions_lose_what_is_no_question(raw, clean):
    assert cleaning.question(raw) == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("回答: 2です。", "2です。"),
        ("Answer:\n2", "2"),
        ("「2」です。", "「2」です。"),
        ("A: 2", "2"),
        ("A list: 1, 2", "A list: 1, 2"),
    ],
)
def test_answers_lose_their_label_alone(raw, clean):
    assert cleaning.answer(raw) == clean


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("申し訳ありませんが、お答えできません。", True),
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I cannot do this.", True),
        ("As an AI language model, I have no opinion.", True),
        ("I cannot assist with that request.", True),
        ("その質問にはお答えできません。", True),
        ("誠に申し訳ございませんが、そのご依頼には対応いたしかねます。", True),
        ("恐れ入りますが、個人情報についてはお答えできません。", True),
        ("I apologize, but I'm not able to provide that.", True),
        ("I'm sorry to hear that. Here are five tips.", False),
        ("I am very sorry.", False),
        ("I'm sorry, but I cannot attend the meeting tomorrow.", False),
        ("I can't help but admire it.", False),
        ("申し訳ありません。", False),
        ("すみませんが、駅への行き方は、まっすぐ行って右です。", False),
        ("申し訳ありませんが、明日の会議には出席できません。", False),
        ("謝罪のメールでは「申し訳ありません」と書きます。", False),
        ("I can see two ways.", False),
        ("Sorry is a short word.", False),
        ("As an AI engineer you need maths.", False),
    ],
)
def test_refusals(text, refused):
    assert cleaning.is_refusal(text) == refused


@pytest.mark.parametrize(
    ("text", "language", "fits"),
    [
        ("今日は良い天気です。", "ja", True),
        ("東京", "ja", True),
        ("42", "ja", True),
        ("42", "en", True),
        ("The weather is fine today.", "ja", False),
        ("The weather is fine today.", "en", True),
        ("今日は良い天気です。", "en", False),
        ("今天天气很好，我们去公园散步吧。", "ja", False),
        ("오늘은 날씨가 좋습니다.", "ja", False),
        ("次のとおりです。\n```python\nfor i in range(10):\n    print(i)\n```", "ja", True),
        ("Pythonのlist comprehensionはリストを短く書く方法です。", "ja", True),
        ("Die Straße ist naß und grau.", "en", True),
        ("Погода сегодня хорошая.", "en", False),
        ("It is 「あ・い・う・え」.", "en", True),
        ("It is f・a.", "en", True),
        ("「あ・い」です。", "en", False),
        ("それは「The weather is fine today, they say」です。", "ja", True),
    ],
)
def test_languages_by_their_letters(text, language, fits):
    assert cleaning.in_language(text, language) == fits


def test_no_answer_takes_the_square_of_its_length():
    began = time.process_time()
    for piece in ("「", "「あ", '"', "“", "`", "```", "質問:", "回答 ", "申し訳ありません", "I'm sorry ", "【", "* "):
        text = piece * (50_000 // len(piece))
        cleaning.question(text), cleaning.answer(text), cleaning.is_refusal(text), cleaning.in_language(text, "ja")
    assert time.process_time() - began < 3
