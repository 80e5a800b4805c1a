"""The lm-evaluation-harness on a checkpoint of ours and on its export; needs the extras `harness` and, to compare, `parity`."""

from types import SimpleNamespace

import numpy as np
import pytest

from tanuki_jax import checkpoint
from tanuki_jax.cli.main import main
from tanuki_jax.errors import UserError
from tests import tiny_recipe
from tests.data import byte_level
from tests.data.test_templates import CHATML, INST

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
    assert main(["export", f"--checkpoint={tiny_recipe.trained(base) / 'stages/sft'}", f"--output={output}"]) == 0
    return HFLM(
        str(output), device="cpu", dtype="float32", trust_remote_code=True, max_length=checkpoint.max_seq_len(meta(base))
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


# --- models of others -------------------------------------------------------------------------------------------------------

OTHERS = {
    "ChatML": dict(template=CHATML.replace("CONTENT", "m.content"), eos="<|im_end|>", bos=None),
    "BOS before every text": dict(template=INST.replace("END", "eos_token"), scheme="first", post=True),
    "BOS as the config says": dict(template=INST.replace("END", "eos_token"), add_bos_token=True),
}


@pytest.fixture(scope="module", params=OTHERS)
def foreign(request, tmp_path_factory):
    """Our harness on an imported model with its own tokenizer and template, and hf on the published files."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    from tanuki_jax.evaluate.harness import Harness

    directory, output = (tmp_path_factory.mktemp("foreign") / name for name in ("hf", "ours"))
    made = byte_level.make(directory, **OTHERS[request.param])
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    settings = transformers.LlamaConfig(
        vocab_size=512,
        initializer_range=0.3,
        bos_token_id=made.bos,
        eos_token_id=made.eos,
        max_position_embeddings=128,
        **shape,
    )
    transformers.LlamaForCausalLM(settings).save_pretrained(directory)
    assert main(["import", f"--hf={directory}", f"--output={output}"]) == 0
    return Harness(output), HFLM(str(directory), device="cpu", dtype="float32")


def test_of_another_model_too_likelihoods_and_greedy_answers_are_those_of_hf(foreign):
    ours, theirs = foreign
    asked = requests(*((c, t) for c in ("", "Hi there", "Paris. ", "<s>Rome") for t in (" Paris", " Rome.\n", "狸")))
    mine, hf = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in mine], [a for a, _ in hf], rtol=1e-4, atol=1e-3)
    options = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = requests(("Hi there", dict(options)), ("Paris", dict(options)))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


def test_of_another_model_too_conversations_are_those_of_hf(foreign):
    ours, theirs = foreign
    for history in ([{"role": "user", "content": "Hi there"}], [{"role": "user", "content": " 狸\n"}]):
        text = ours.apply_chat_template(history)
        assert text == theirs.apply_chat_template(history) and ours.tok_encode(text) == theirs.tok_encode(text)
        begun = [*history, {"role": "assistant", "content": "The answer is"}]
        going_on = ours.apply_chat_template(begun, add_generation_prompt=False)
        assert going_on == theirs.apply_chat_template(begun, add_generation_prompt=False)
        asked = requests((text, " Paris"), (going_on, " Rome"))
        mine, hf = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
        np.testing.assert_allclose([a for a, _ in mine], [a for a, _ in hf], rtol=1e-4, atol=1e-3)


def test_a_continuation_of_no_token_is_an_error_that_names_it(ours, monkeypatch):
    monkeypatch.setattr(ours, "_encode_pair", lambda context, continuation: ([5, 6], []))
    with pytest.raises(UserError, match="'Answer'.*nothing is left to score"):
        ours.loglikelihood(requests(("Answer", "s")), disable_tqdm=True)
