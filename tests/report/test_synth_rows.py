"""The report and the data card of a run show what made rows came to, in the words of the report that their making wrote."""

import dataclasses
import json

import pytest

from tanuki_jax import config
from tanuki_jax.errors import UserError
from tanuki_jax.files import read_json, write_json
from tanuki_jax.recipe.make_rows import make_rows
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.report.data_card import write_data_card
from tanuki_jax.report.html import write_report
from tanuki_jax.train.loop import StageSummary
from tests.synth import fake_server

ENTRY = {"kind": "synth", **dataclasses.asdict(StageSummary(seconds=1.0)), "scores": {}}


def test_the_page_shows_counts_of_made_pairs(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n}の次の数は何ですか。"}) + "\n" for n in range(6)), encoding="utf-8")
    answers = iter(range(10**6))

    def answer(body):
        return "[[A]]" if "[[A]]" in str(body["messages"]) else f"{next(answers)}です。"

    with fake_server.serve(answer) as (url, _):
        c = config.recipe(name="試験")
        c.endpoints.far = config.endpoint(url, model="fake", license="mit", concurrency=1)
        c.synth.pairs = config.synth("preferences", seeds=dict(prompts=str(prompts)), generator="far", judge="far")
        recipe = config.resolve(c)
        rows = Workdir(tmp_path).rows_file("pairs")
        with pytest.raises(UserError, match="not one row is left: first_position 6"):  # the judge prefers the first place
            make_rows(recipe, "pairs", Workdir(tmp_path))
    report = read_json(rows.with_name("report.json"))
    entry = {"name": "samples", **ENTRY, "synth": report}
    facts = {"files": "synth:pairs", "kind": "pair", "rows": 6, "tokens": 60, "rejected": 0, "dropped": report["dropped"]}
    facts |= {
        "licenses": {"mit": 6},
        "samples": [{"prompt": [{"role": "user", "content": "*a*\nb"}], "chosen": [], "rejected": []}],
    }
    write_json(
        tmp_path / "stages/samples/done.json", {"entry": entry, "samples": [], "questions": [], "data": {"pairs": facts}}
    )
    summary = {"stages": [entry], "config": {}, "versions": {"device": "1 x cpu"}}
    page = write_report(recipe, summary, tmp_path).read_text(encoding="utf-8")
    assert "Rows that the model made" in page and "first_position" in page and f">{report['requests']['answers']}<" in page
    card = write_data_card(dataclasses.replace(recipe, stages={"samples": config.Stage()}), tmp_path).read_text(
        encoding="utf-8"
    )
    assert "mit 6" in card and "first_position 6" in card and r"\*a\* b" in card
