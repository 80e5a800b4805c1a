import gzip
import json
import time
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest

from tanuki_jax.config.synthesis import Synth
from tanuki_jax.errors import UserError
from tanuki_jax.synth import methods, rules, seeds
from tanuki_jax.synth.draw import draw, permute

LISTS = {"personas": "builtin:personas_ja", "tasks": "builtin:tasks_ja"}


def load(names, limit=0, key="0 x", makers=None, weak=()):
    return seeds.load(tuple(names), names, limit, key, makers or seeds.Makers(0, 50), weak)


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), "utf-8"
    )
    return str(path)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 16, 17, 100, 1023])
def test_a_permutation_has_every_number_once(total):
    assert sorted(permute(i, total, "key") for i in range(total)) == list(range(total))


def test_the_order_is_random_and_depends_on_the_key_alone():
    first = list(draw(200, 1000, "a"))
    assert first == list(draw(200, 1000, "a")) and len(set(first)) == 200
    assert first != list(draw(200, 1000, "b")) and first != sorted(first)
    assert 350 < sum(first) / 200 < 650
    assert sorted(draw(50, 20, "a")) == list(range(20))


def test_billions_of_combinations_are_drawn_from_in_no_time():
    began = time.process_time()
    assert len(set(draw(1000, 6_000_000 * 1000, "key"))) == 1000
    assert time.process_time() - began < 2


def test_items_are_different_combinations_and_the_same_every_time():
    loaded = load(LISTS, 300)
    items = list(loaded.items())
    assert loaded.combinations == 1200 and loaded.count == len(items) == 300
    assert len({item["id"] for item in items}) == len({(item["persona"], item["task"]) for item in items}) == 300
    assert items == list(load(LISTS, 300).items()) != list(load(LISTS, 300, key="1 x").items())
    assert items[:20] == list(load(LISTS, 20).items()), "fewer items are the first of more"
    assert len({item["persona"] for item in items}) == 40 and len({item["task"] for item in items}) == 30


def test_all_combinations_are_read_one_after_the_other():
    items = load(LISTS).items()
    assert [item["task"] for item in islice(items, 31)].count("単位の換算や概算を頼む") == 1
    assert 1 + 30 + sum(1 for _ in items) == 1200


@pytest.mark.parametrize("name", seeds.LISTS)
def test_our_lists_have_no_row_twice_and_are_in_their_language(name):
    kind, lang = seeds.LISTS[name]
    items = list(load({kind: f"builtin:{name}"}).items())
    texts = [item[seeds.FIELDS[kind]] for item in items]
    assert len(set(texts)) == len(texts) >= 30
    assert sum(any("\u3041" <= c <= "\u9fff" for c in text) for text in texts) == (len(texts) if lang == "ja" else 0)
    if kind == "topics":
        assert Counter(item["category"] for item in items).keys() == {"maths", "coding", "reasoning", "everyday"}


def test_rule_made_prompts_are_different_answerable_and_never_held_out():
    items = list(load({"prompts": "rules:prompts"}).items())
    assert len({str(item["messages"]) for item in items}) == 50
    assert all(item["messages"][-1]["role"] == "user" and item["meta"]["answer"] for item in items)
    held_out = {row["messages"][0]["content"] for row in rules.held_out_prompts(500, 0)}
    assert not held_out & {item["messages"][0]["content"] for item in items}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt", ".parquet"])
def test_a_users_list_may_have_any_format(tmp_path, suffix):
    path, texts = tmp_path / f"personas{suffix}", ["ある農家", "a pilot"]
    lines = "".join(json.dumps({"persona": text, "age": 30}, ensure_ascii=False) + "\n" for text in texts).encode()
    if suffix == ".txt":
        path.write_text("ある農家\n\na pilot\n", "utf-8")
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"persona": texts, "age": [30, 40]}), path)
    else:
        path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    assert [item["persona"] for item in load({"personas": str(path)}).items()] == texts


def test_broken_rows_are_left_out_counted_and_the_first_is_named(tmp_path, caplog):
    rows = [{"persona": "ある農家"}, "{broken", {"name": "x"}, {"persona": ""}, {"persona": 3}, {"persona": "a pilot"}]
    loaded = load({"personas": write(tmp_path / "p.jsonl", rows)})
    assert [item["persona"] for item in loaded.items()] == ["ある農家", "a pilot"] and loaded.invalid == 4
    assert "p.jsonl:2" in caplog.text and "4 rows" in caplog.text
    with pytest.raises(
        UserError, match=r"no row that can be read.*q\.jsonl:1 has no text in 'persona' or 'text' \(fields: name"
    ):
        load({"personas": write(tmp_path / "q.jsonl", [{"name": "x"}])})


def test_prompts_of_any_layout_end_with_the_user(tmp_path):
    user, reply = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
    rows = [
        {"messages": [user, reply]},
        {"prompt": "1+1?"},
        {"prompt": [user], "chosen": [reply], "rejected": [{**reply, "content": "3"}], "meta": {"family": "sum"}},
        {"text": "1+1?"},
        {"instruction": "1+1?", "output": "2"},
        {"messages": [reply]},
        {"tokens": [1]},
    ]
    loaded = load({"prompts": write(tmp_path / "p.jsonl", rows)})
    assert [item["messages"] for item in loaded.items()] == [[user]] * 5 and loaded.invalid == 2
    assert [seeds.category_of(item) for item in loaded.items()] == ["", "", "sum", "", ""]


def test_rows_of_other_made_data_are_seeds(tmp_path):
    rows = tmp_path / "rows.jsonl"
    write(rows, [{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}])
    [item] = load({"prompts": "synth:first"}, makers=seeds.Makers(rows={"first": rows})).items()
    assert item["messages"] == [{"role": "user", "content": "a?"}]
    with pytest.raises(UserError, match="synth:second.*not made yet; known here: first"):
        load({"prompts": "synth:second"}, makers=seeds.Makers(rows={"first": rows}))


def test_weak_categories_alone_are_drawn():
    loaded = load({"topics": "builtin:topics_en"}, 10, weak=("coding", "unknown"))
    assert loaded.combinations == 17 and {item["category"] for item in loaded.items()} == {"coding"}
    with pytest.raises(UserError, match="no seed is of the weakest categories.*coding, everyday, maths, reasoning"):
        load({"topics": "builtin:topics_en"}, weak=("unknown",))
    with pytest.raises(UserError, match="give each row a `category`"):
        load(LISTS, weak=("coding",))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"personas": "builtin:nobody"}, "there is builtin:personas_ja, builtin:personas_en"),
        ({"personas": "builtin:tasks_ja"}, "no list 'builtin:tasks_ja'"),
        ({"documents": "builtin:books"}, "none of this kind"),
        ({"prompts": "rules:pairs"}, "the only one that rules make is prompts = 'rules:prompts'"),
        ({"personas": "nowhere/*.jsonl"}, "^synth: seeds.personas: no such file"),
        ({"personas": ""}, "is empty; name files"),
        ({}, "set items"),
    ],
)
def test_a_list_that_is_not_there_is_an_error(names, message):
    with pytest.raises(UserError, match=message):
        load(names)


def test_lists_that_no_stage_makes_are_looked_at_before_all_begins(tmp_path):
    for kind, name, message in (
        ("personas", "builtin:nobody", "there is builtin:personas_ja"),
        ("prompts", "rules:pairs", "the only one"),
        ("documents", "nowhere/*.jsonl", "no such file"),
        ("personas", write(tmp_path / "q.jsonl", [{"name": "x"}]), "no row that can be read.*q.jsonl:1"),
    ):
        with pytest.raises(UserError, match=message):
            seeds.check(kind, name)
    seeds.check("prompts", "rules:prompts")
    seeds.check("personas", write(tmp_path / "p.jsonl", ["{", {"persona": "a pilot"}]))


def test_templates_and_lists_of_an_entry_are_looked_at_before_all_begins(tmp_path):
    def check(**options):
        entry = Synth(**{"method": "rewrite", "seeds": {"documents": "synth:other"}, **options})
        methods.check(SimpleNamespace(synth={"rows": entry}), "rows")

    check(styles=("summary",))
    for options, message in (
        (dict(styles=("poem",)), "synth.rows.styles: there is no template for 'poem'"),
        (dict(templates=str(tmp_path / "t.toml")), "t.toml cannot be read"),
        (dict(seeds={"documents": "nowhere.jsonl"}), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            check(**options)


def test_of_weak_families_rules_make_as_many_prompts_as_of_all():
    items = list(load({"prompts": "rules:prompts"}, weak=("sum", "counting", "maths")).items())
    assert len(items) == 50 and {seeds.category_of(item) for item in items} == {"sum", "counting"}
    with pytest.raises(UserError, match="no seed is of the weakest categories .maths."):
        load({"prompts": "rules:prompts"}, weak=("maths",))


def test_licences_of_all_seeds_of_an_item_are_kept(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"persona": "a pilot", "license": "cc-by-4.0"}])
    item = next(load({"personas": path, "tasks": "builtin:tasks_en"}).items())
    assert item["license"] == "apache-2.0, cc-by-4.0"
