"""What pages of a corpus may be: the default list, and a user's."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tanuki_jax.errors import UserError

MAX_CATEGORIES = 30


class Category(NamedTuple):
    """A category: its name in results, and what it means, in English and Japanese."""

    name: str
    english: str
    japanese: str


DEFAULT = (
    Category(
        "content",
        "text that somebody wrote to be read: articles, stories, explanations, discussions",
        "読むために書かれた文章(記事、物語、解説、議論)",
    ),
    Category("advertising", "selling: products, shops, services, affiliate pages", "広告、商品や店の紹介、アフィリエイト"),
    Category(
        "boilerplate",
        "menus, lists of links, notices, log-in pages, error pages",
        "メニュー、リンク集、定型の告知、ログイン画面、エラー",
    ),
    Category("adult", "sexual content", "性的な内容"),
    Category("spam", "search-engine spam, fraud, keyword lists", "検索対策の羅列、詐欺、迷惑な投稿"),
    Category(
        "machine_text",
        "machine-made text: bad translations, generated filler, logs",
        "機械翻訳の崩れ、自動生成の文章、記録の羅列",
    ),
    Category("personal", "personal information of private persons", "私人の個人情報"),
    Category("other", "none of these, or not to be told", "どれでもない、判断できない"),
)


def read_categories(path: Path | None) -> tuple[Category, ...]:
    """The categories of a file, a line `name: what it means` each; without a file the default ones.

    A third part after another colon is the meaning in Japanese.  Empty lines and those that begin with # are left out.
    """
    if path is None:
        return DEFAULT
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--categories: {path} cannot be read as text ({error})") from error
    result: dict[str, Category] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, english, japanese = (part.strip() for part in [*line.split(":", 2), "", ""][:3])
        if not name or name in result:
            raise UserError(f"--categories: {path}:{number}: {'the name is empty' if not name else f'{name!r} is there twice'}")
        result[name] = Category(name, english or name, japanese or english or name)
    if not 2 <= len(result) <= MAX_CATEGORIES:
        raise UserError(f"--categories: {path} has {len(result)} categories; it must have 2 to {MAX_CATEGORIES}, one a line")
    return tuple(result.values())
