"""A sample classified by a judge."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tanuki_jax import files
from tanuki_jax.config.synthesis import Endpoint
from tanuki_jax.data.audit.audit import Audit
from tanuki_jax.data.audit.categories import Category
from tanuki_jax.endpoint import runner
from tanuki_jax.endpoint.client import Client
from tanuki_jax.endpoint.job import Ask, Drop, Job
from tanuki_jax.errors import UserError

VERSION = "1"  # of the prompt
ROLE = "judge"
MAX_CHARACTERS = 3000  # of a row that the judge sees
PROMPT = """Which category does the text below belong to? Choose the one that most of it belongs to.

{categories}

<text>
{text}
</text>

Answer with the number of the category alone."""


def parse(answer: str, categories: Sequence[Category]) -> str:
    """The category that an answer names, by its number or its name; empty where it names none, or several."""
    numbers = {int(number) for number in re.findall(r"(?<![\d.])\d{1,2}(?![\d.]\d)", answer)}
    names = {category.name for category in categories if re.search(rf"\b{re.escape(category.name)}\b", answer, re.IGNORECASE)}
    named = {categories[n - 1].name for n in numbers if 1 <= n <= len(categories)} or names
    return named.pop() if len(named) == 1 else ""


async def classify(item: Mapping[str, Any], ask: Ask, categories: Sequence[Category]) -> Sequence[Mapping[str, Any]]:
    """A chain: from a sampled row to its category."""
    lines = "\n".join(f"{i}. {category.name}: {category.english}" for i, category in enumerate(categories, 1))
    prompt = PROMPT.format(categories=lines, text=item["text"][:MAX_CHARACTERS])
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 16}
    answer = await ask(
        Job([{"role": "user", "content": prompt}], step="classify", role=ROLE, template=VERSION, sampling=sampling)
    )
    category = parse(answer.text, categories)
    if not category:
        raise Drop("no_verdict", {"number": item["number"], "answer": answer.text[:200]})
    return [{"number": item["number"], "category": category, "by": answer.model or "judge"}]


def label_by_judge(audit: Audit, endpoint: Endpoint, quiet: bool = False) -> None:
    """Has every row without a label classified; labels by hand stay.

    Raises:
      UserError: the endpoint does not work, or rows have failed; the same call asks for theirs alone.
    """
    directory = audit.directory / "judge"
    items = [(str(row.number), row._asdict()) for row in audit.sample]
    (directory / runner.DONE).unlink(missing_ok=True)
    chain = functools.partial(classify, categories=audit.categories)
    summary = runner.run(
        items, chain, {ROLE: Client(endpoint)}, directory, recipe=f"audit {VERSION}", label="audit", quiet=quiet
    )  # fmt: skip
    if not summary.complete:
        raise UserError(f"audit: {sum(summary.failed.values())} rows have failed; run the same command again")
    labels = audit.labels()
    for row in files.read_jsonl(directory / "rows.jsonl"):
        if row["number"] not in labels:
            audit.add_label(row["number"], row["category"], row["by"])
