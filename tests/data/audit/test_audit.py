"""Samples, labels and shares."""

import json
import re
import shutil
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tanuki_jax.config.synthesis import Endpoint
from tanuki_jax.data.audit import audit, categories, classify, label_by_judge, open_audit, page, shares, write_page
from tanuki_jax.errors import UserError
from tests.synth.fake_server import serve_judge


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps({"text": f"page {i} </script>"}) + "\n" for i in range(200)))
    return str(path)


def open_here(corpus, tmp_path, size=10, seed=0, listed=categories.DEFAULT):
    return open_audit(corpus, tmp_path / "audit", size, seed, listed, quiet=True)


def test_wilson_intervals():
    for count, total, low, high in ((5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)):
        assert shares.wilson(count, total) == pytest.approx((low, high), abs=5e-5)
    assert shares.wilson(0, 0) == (0.0, 1.0)


def test_the_papers_audit():
    """1,500 pages, 72 % of them advertising."""
    labels = ["advertising"] * 1080 + ["content"] * 420
    first, second, third = shares.shares(labels, ["content", "advertising", "spam"])
    assert (first["category"], first["count"], first["share"]) == ("advertising", 1080, 0.72)
    assert (first["low"], first["high"]) == pytest.approx((0.6968, 0.7421), abs=2e-4)
    assert second["category"] == "content" and third["high"] == pytest.approx(0.00255, abs=1e-4)
    assert "72.0%" in shares.table([first, second, third], 1500)


def test_a_sample_is_uniform_and_a_function_of_the_seed(corpus):
    first, rows = audit.draw_sample(corpus, 10, 1, audit.sources.PLAIN)
    assert rows == 200 and first == audit.draw_sample(corpus, 10, 1, audit.sources.PLAIN)[0]
    assert first != audit.draw_sample(corpus, 10, 2, audit.sources.PLAIN)[0]
    counts = [0] * 4
    for seed in range(60):
        for row in audit.draw_sample(corpus, 10, seed, audit.sources.PLAIN)[0]:
            counts[int(row.text.split()[1]) // 50] += 1
    assert all(110 < count < 190 for count in counts), counts  # 150 expected, with a standard deviation of 10
    everything, _ = audit.draw_sample(corpus, 500, 0, audit.sources.PLAIN)
    assert len({row.where for row in everything}) == 200


def test_labels_are_on_the_disk_and_a_torn_line_is_left_out(corpus, tmp_path):
    opened = open_here(corpus, tmp_path)
    opened.add_label(3, "spam")
    opened.add_label(3, "adult")
    path = tmp_path / "audit/labels.jsonl"
    path.write_bytes(path.read_bytes() + b'{"number": 4, "categ')
    again = open_here(corpus, tmp_path)
    assert again.labels() == {3: "adult"}
    again.add_label(5, "content")
    assert again.labels() == {3: "adult", 5: "content"}
    result = again.finish()
    assert (result["rows"], result["sample"], result["labelled"]) == (200, 10, 2)
    assert json.loads((tmp_path / "audit/result.json").read_text()) == result
    with pytest.raises(UserError, match="no row 10"):
        again.add_label(10, "content")


def test_another_audit_is_refused(corpus, tmp_path):
    open_here(corpus, tmp_path)
    with pytest.raises(UserError, match="seed differs"):
        open_here(corpus, tmp_path, seed=1)
    with Path(corpus).open("a") as f:
        f.write('{"text": "new"}\n')
    with pytest.raises(UserError, match="files have changed"):
        open_here(corpus, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").write_text("")
    with pytest.raises(UserError, match="holds no audit"):
        open_audit(corpus, tmp_path / "other", 1, 0, categories.DEFAULT)


@pytest.mark.parametrize("last", ["audit.json", "sample.jsonl"])
def test_the_same_command_goes_on_after_a_kill_at_any_write(corpus, tmp_path, monkeypatch, last):
    """A process that ends while it writes one of the files leaves those before it, and a part of that one."""
    replace = Path.replace

    def end(self, target):
        if target.name == last:
            shutil.copy(self, tmp_path / "left")
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", end)
        open_here(corpus, tmp_path)
    shutil.copy(tmp_path / "left", tmp_path / f"audit/.{last}.0123abcd.tmp")
    assert (
        open_here(corpus, tmp_path).sample == open_audit(corpus, tmp_path / "b", 10, 0, categories.DEFAULT, quiet=True).sample
    )


def test_a_list_of_categories(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("# ours\nnews: reports of the day: 報道\nads\n", encoding="utf-8")
    assert categories.read_categories(path) == (("news", "reports of the day", "報道"), ("ads", "ads", "ads"))
    path.write_text("news\nnews\n")
    with pytest.raises(UserError, match=r"c.txt:2: 'news' is there twice"):
        categories.read_categories(path)
    path.write_text("news\n")
    with pytest.raises(UserError, match="must have 2 to"):
        categories.read_categories(path)


@pytest.mark.parametrize(
    ("answer", "category"),
    [
        ("2", "advertising"),
        ("2. advertising", "advertising"),
        ("Advertising.", "advertising"),
        ("1 or 2", ""),
        ("99", ""),
        ("?", ""),
    ],
)
def test_an_answer_names_one_category(answer, category):
    assert classify.parse(answer, categories.DEFAULT) == category


def test_a_judge_labels_what_no_person_has(corpus, tmp_path):
    opened = open_here(corpus, tmp_path)
    opened.add_label(0, "adult")
    with serve_judge(lambda prompt: ("?" if opened.sample[1].text in prompt else "2", {})) as (url, prompts):
        label_by_judge(opened, Endpoint(base_url=url), quiet=True)
        label_by_judge(opened, Endpoint(base_url=url), quiet=True)
        assert len(prompts) == 10
    assert opened.labels() == {0: "adult", **{i: "advertising" for i in range(2, 10)}}
    assert opened.finish()["labelled"] == 9


def test_the_page_works_alone_and_asks_for_nothing_outside(corpus, tmp_path):
    write_page(open_here(corpus, tmp_path))
    html = (tmp_path / "audit/page.html").read_text(encoding="utf-8")
    assert html.count("</script>") == 2  # the text's own is escaped
    assert "http://" not in html.replace('"http:"', "") and "https://" not in html
    start = html.index('type="application/json">') + len('type="application/json">')
    data = json.loads(html[start : html.index("</script>", start)])
    assert len(data["rows"]) == 10 and data["rows"][0]["text"].endswith("</script>")


def test_the_page_knows_which_labels_a_judge_has_set(corpus, tmp_path):
    """A download writes them as the judge's again."""
    opened = open_here(corpus, tmp_path)
    for number, by in ((1, "judge"), (2, "judge"), (2, "hand"), (3, "hand")):
        opened.add_label(number, "spam", by)
    html = page.render(opened)
    data = json.loads(html.split('type="application/json">')[1].split("</script>")[0])
    assert data["labels"] == {"1": "spam", "2": "spam", "3": "spam"} and data["judges"] == {"1": "judge"}
    assert "judges.get(number)" in html


def test_the_pages_texts_are_there_in_both_languages(corpus, tmp_path):
    html = page.render(open_here(corpus, tmp_path))
    japanese, english = re.search(r"const WORDS = \{\n  ja: \{(.*?) \},\n  en: \{(.*?) \},\n\};", html, re.DOTALL).groups()
    names = re.findall(r"(\w+): \"", japanese)
    assert names == re.findall(r"(\w+): \"", english) and len(names) == len(set(names))
    assert set(re.findall(r"words\.(\w+)", html)) | {"closable", "failed", "ended", "storage"} <= set(names)
    assert re.search(r"if \(event\.repeat && [^}]*return;\n  }", html)  # a key that is held down labels one row
    assert 'href="data:' not in html or "img-src data:" in page.POLICY


def test_the_served_page_writes_labels_and_refuses_strangers(corpus, tmp_path):
    opened = open_here(corpus, tmp_path)
    client = TestClient(page.make_app(opened, "KEY"), base_url="http://127.0.0.1:80")
    shown = client.get("/KEY/")
    assert (
        shown.status_code == 200 and "page 1" in shown.text and "default-src 'none'" in shown.headers["content-security-policy"]
    )
    label = {"number": 2, "category": "spam"}
    assert client.post("/KEY/label", json=label).status_code == 200
    assert opened.labels() == {2: "spam"}
    for path, body, headers, status in (
        ("/label", label, {}, 404),  # without the key
        ("/KEY/label", label, {"Origin": "http://elsewhere.example"}, 403),
        ("/KEY/label", label, {"Host": "elsewhere.example"}, 400),
        ("/KEY/label", label, {"Content-Type": "text/plain"}, 400),
        ("/KEY/label", {"number": 99, "category": "spam"}, {}, 400),
        ("/KEY/label", {"number": 1, "category": "x" * 20_000}, {}, 400),
        ("/KEY/label", [1], {}, 400),
    ):
        assert client.post(path, json=body, headers=headers).status_code == status, (path, headers)
    assert client.get("/KEY/", headers={"Host": "elsewhere.example"}).status_code == 400
    assert client.get("/KEY/../audit.json").status_code == 404
    assert opened.labels() == {2: "spam"}


def test_serving_ends_when_every_row_has_a_label(corpus, tmp_path, capsys):
    opened = open_here(corpus, tmp_path, size=2)
    opened.add_label(0, "content")
    thread = threading.Thread(target=page.serve, args=(opened,), daemon=True)
    thread.start()
    while "(Ctrl-C ends" not in (shown := capsys.readouterr().err):
        assert thread.is_alive()
        time.sleep(0.01)
    address = shown.split()[4]
    label = json.dumps({"number": 1, "category": "spam"}).encode()
    headers = {"Content-Type": "application/json", "Origin": "/".join(address.split("/")[:3])}
    assert urllib.request.urlopen(urllib.request.Request(f"{address}label", label, headers), timeout=10).status == 200
    thread.join(10)
    assert not thread.is_alive() and opened.labels() == {0: "content", 1: "spam"}
    page.serve(opened)  # ends at once
