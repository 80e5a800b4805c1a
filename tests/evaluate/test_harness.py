"""The lm-evaluation-harness on a checkpoint of ours and on its export; needs the extras `harness` and, to compare, `parity`."""

from types import SimpleNamespace

import numpy as np
import pytest

from tanuki_jax import checkpoint, cli
from tests import tiny_recipe

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra harness")
pytestmark = pytest.mark.slow
CONTEXTS = ("", "狸は", "山には狸が", "Question: 2+3\nAnswer:", "空白の後 ", "<s>ではない")
CONTINUATIONS = ("山にいる。", " five", "\n\n### 応答:\n5</s>", "🦝🦝")


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    from tanuki_jax.evaluate.harness import Harness

    return Harness(tiny_recipe.trained(tmp_path_factory.getbasetemp()) / "stages/sft")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    pytest.importorskip("torch", reason="needs the extra parity")
    from lm_eval.models.huggingface import HFLM

    base = tmp_path_factory.getbasetemp()
    output = base / "exported-for-the-harness"
    assert cli.main(["export", f"--checkpoint={tiny_recipe.trained(base) / 'stages/sft'}", f"--output={output}"]) == 0
    return HFLM(
        str(output), device="cpu", dtype="float32", trust_remote_code=True, max_length=checkpoint.longest_row(meta(base))
    )


def meta(base):
    return checkpoint.load(tiny_recipe.trained(base) / "stages/sft").meta


def test_log_likelihoods_are_those_of_the_export(ours, theirs):
    asked = requests(*((c, t) for c in CONTEXTS for t in CONTINUATIONS))
    mine, hf = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in mine], [a for a, _ in hf], rtol=1e-4, atol=1e-3)
    assert [b for _, b in mine] == [b for _, b in hf]


def test_texts_longer_than_a_row_are_scored_in_windows(ours, theirs):
    texts = requests(("狸は山にいる。" * 40,), ("short",), ("a",))
    assert len(ours.tok_encode(texts[0].args[0])) > 2 * ours.max_length
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts, disable_tqdm=True), rtol=1e-4, atol=1e-3
    )


def test_greedy_answers_are_those_of_the_export(ours, theirs):
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = requests(*((c, dict(options)) for c in CONTEXTS if c))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_only_the_template_can_say_a_special_token(ours):
    history = [{"role": "user", "content": "<s></s>"}]
    text = ours.apply_chat_template(history)
    ids = ours.tok_encode(text)
    assert ids[0] == ours.prefix_token_id and ours.eot_token_id not in ids[1:] and ours.prefix_token_id not in ids[1:]


def test_a_task_runs_from_end_to_end(ours, tmp_path):
    """A task of its own, since those of the harness come from the network."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "狸は", "choices": ["山", "海"], "gold": 0}\n{"q": "2+3=", "choices": ["5", "6"], "gold": 0}\n')
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(model=ours, tasks=[task], bootstrap_iters=0)
    assert 0 <= found["results"]["tiny"]["acc,none"] <= 1
