"""The small world of the rule-made data: a lexicon, people and their facts, calendar, units, manners.  Each entry is (Japanese, English)."""

LEXICON = [
    ("犬", "dog"), ("猫", "cat"), ("鳥", "bird"), ("魚", "fish"), ("馬", "horse"), ("牛", "cow"), ("羊", "sheep"), ("熊", "bear"),
    ("山", "mountain"), ("川", "river"), ("海", "sea"), ("空", "sky"), ("雨", "rain"), ("雪", "snow"), ("風", "wind"), ("雲", "cloud"),
    ("花", "flower"), ("木", "tree"), ("森", "forest"), ("石", "stone"), ("火", "fire"), ("水", "water"), ("月", "moon"), ("星", "star"),
    ("朝", "morning"), ("夜", "night"), ("春", "spring"), ("夏", "summer"), ("秋", "autumn"), ("冬", "winter"), ("道", "road"), ("橋", "bridge"),
]  # fmt: skip

PEOPLE = [
    ("さくら", "Sakura"), ("はると", "Haruto"), ("ゆい", "Yui"), ("そうた", "Sota"), ("めい", "Mei"), ("れん", "Ren"),
    ("あおい", "Aoi"), ("みなと", "Minato"), ("ひな", "Hina"), ("かいと", "Kaito"), ("りん", "Rin"), ("ゆうと", "Yuto"),
]  # fmt: skip

TOWNS = [
    ("札幌", "Sapporo"), ("仙台", "Sendai"), ("横浜", "Yokohama"), ("金沢", "Kanazawa"),
    ("京都", "Kyoto"), ("神戸", "Kobe"), ("広島", "Hiroshima"), ("那覇", "Naha"),
]  # fmt: skip
JOBS = [
    ("医者", "a doctor"), ("教師", "a teacher"), ("画家", "a painter"), ("農家", "a farmer"),
    ("大工", "a carpenter"), ("記者", "a reporter"), ("漁師", "a fisher"), ("料理人", "a cook"),
]  # fmt: skip
FOODS = [
    ("寿司", "sushi"), ("うどん", "udon"), ("カレー", "curry"), ("天ぷら", "tempura"),
    ("餃子", "gyoza"), ("豆腐", "tofu"), ("そば", "soba"), ("おにぎり", "rice balls"),
]  # fmt: skip
PETS = [
    ("犬", "a dog"), ("猫", "a cat"), ("うさぎ", "a rabbit"), ("亀", "a turtle"),
    ("金魚", "a goldfish"), ("小鳥", "a small bird"), ("ハムスター", "a hamster"), ("馬", "a horse"),
]  # fmt: skip
ATTRIBUTES = {"town": TOWNS, "job": JOBS, "food": FOODS, "pet": PETS}


def fact(person: int, attribute: str) -> int:
    """Index of what is true of a person: the world is fixed, no seed changes it."""
    stride = {"town": 3, "job": 5, "food": 7, "pet": 1}[attribute]
    shift = {"town": 0, "job": 2, "food": 5, "pet": 4}[attribute]
    return (person * stride + shift + person // 8) % 8


WEEKDAYS = [
    ("月曜日", "Monday"), ("火曜日", "Tuesday"), ("水曜日", "Wednesday"), ("木曜日", "Thursday"),
    ("金曜日", "Friday"), ("土曜日", "Saturday"), ("日曜日", "Sunday"),
]  # fmt: skip
MONTHS = [
    (f"{n}月", name)
    for n, name in enumerate(
        [
            "January",
            "February",
            "March",
            "April",
            "May",
            "June",
            "July",
            "August",
            "September",
            "October",
            "November",
            "December",
        ],
        1,
    )
]

# (Japanese unit, English unit, Japanese small unit, English small unit, factor as the digits appended)
UNITS = [
    ("キロメートル", "kilometers", "メートル", "meters", "000"),
    ("キログラム", "kilograms", "グラム", "grams", "000"),
    ("リットル", "liters", "ミリリットル", "milliliters", "000"),
    ("メートル", "meters", "センチメートル", "centimeters", "00"),
    ("センチメートル", "centimeters", "ミリメートル", "millimeters", "0"),
    ("トン", "tons", "キログラム", "kilograms", "000"),
]

# situation (Japanese, English), what one says (Japanese, English)
MANNERS = [
    (("朝、人に会ったとき", "you meet someone in the morning"), ("おはようございます。", "Good morning.")),
    (("昼、人に会ったとき", "you meet someone in the daytime"), ("こんにちは。", "Hello.")),
    (("夜、人に会ったとき", "you meet someone in the evening"), ("こんばんは。", "Good evening.")),
    (("寝る前", "you go to bed"), ("おやすみなさい。", "Good night.")),
    (("人に助けてもらったとき", "someone has helped you"), ("ありがとうございます。", "Thank you very much.")),
    (("人に迷惑をかけたとき", "you have caused trouble"), ("申し訳ありません。", "I am very sorry.")),
    (("食事を始めるとき", "you start a meal"), ("いただきます。", "Let's eat.")),
    (("食事を終えたとき", "you have finished a meal"), ("ごちそうさまでした。", "Thank you for the meal.")),
    (("家を出るとき", "you leave home"), ("行ってきます。", "I am leaving now.")),
    (("家に帰ったとき", "you come home"), ("ただいま。", "I am home.")),
    (("初めて人に会ったとき", "you meet someone for the first time"), ("はじめまして。", "Nice to meet you.")),
    (("人と別れるとき", "you part from someone"), ("さようなら。", "Goodbye.")),
    (("部屋に入るとき", "you enter a room"), ("失礼します。", "Excuse me.")),
    (("友達が誕生日のとき", "it is a friend's birthday"), ("お誕生日おめでとうございます。", "Happy birthday.")),
]

# plain and polite Japanese; plain and polite English
POLITE = [
    ("食べる", "食べます"), ("飲む", "飲みます"), ("行く", "行きます"), ("来る", "来ます"), ("見る", "見ます"), ("聞く", "聞きます"),
    ("読む", "読みます"), ("書く", "書きます"), ("話す", "話します"), ("待つ", "待ちます"), ("買う", "買います"), ("売る", "売ります"),
    ("歩く", "歩きます"), ("走る", "走ります"), ("泳ぐ", "泳ぎます"), ("遊ぶ", "遊びます"), ("休む", "休みます"), ("働く", "働きます"),
    ("作る", "作ります"), ("使う", "使います"), ("教える", "教えます"), ("覚える", "覚えます"), ("起きる", "起きます"), ("寝る", "寝ます"),
]  # fmt: skip
POLITE_ENGLISH = [
    ("Open the door.", "Could you open the door, please?"), ("Close the window.", "Could you close the window, please?"),
    ("Wait here.", "Could you wait here, please?"), ("Call me.", "Could you call me, please?"),
    ("Help me.", "Could you help me, please?"), ("Read this.", "Could you read this, please?"),
    ("Write it down.", "Could you write it down, please?"), ("Come with me.", "Could you come with me, please?"),
    ("Show me the map.", "Could you show me the map, please?"), ("Speak slowly.", "Could you speak slowly, please?"),
    ("Sit down.", "Could you sit down, please?"), ("Turn off the light.", "Could you turn off the light, please?"),
]  # fmt: skip

SYLLABLES = list("あいうえおか")
LETTERS = list("abcdef")
