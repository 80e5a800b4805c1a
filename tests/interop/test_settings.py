"""What lies beside the weights: config.json, generation_config.json and the tokenizer's files, in and out again."""

import json
import shutil

import jinja2
import jinja2.ext
import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from tanuki_jax import checkpoint
from tanuki_jax.cli.main import main
from tanuki_jax.data import chat
from tanuki_jax.interop.settings import is_unigram, without_marks
from tests.interop.llama import write
from tests.interop.published import assert_same_bits, config_json, export, fails, import_, made, read_directory, save

SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
V = 300  # rows; the tokenizer below has some 270 pieces


def bytes_tokenizer(home, template=CHATML, **settings):
    """A byte-level BPE as Llama 3, Qwen and SmolLM have it, in a directory."""
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["Paris Rome"] * 9, trainers.BpeTrainer(vocab_size=270, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    home.mkdir(parents=True, exist_ok=True)
    made.save(str(home / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>", **settings}
    if template:
        told["chat_template"] = template
    (home / "tokenizer_config.json").write_text(json.dumps(told))
    return home


def generation_json(home):
    return json.loads((home / "generation_config.json").read_text())


def given(home, kind="llama", generation=None, tokenizer=True, **settings):
    """A published directory of one layer, with a tokenizer and a generation_config.json."""
    cfg, theirs, _, extra = made(kind, n_layers=1, vocab_size=V)
    write(home, cfg, theirs, 0, **{**extra, **settings})
    if tokenizer:
        bytes_tokenizer(home)
    if generation is not None:
        (home / "generation_config.json").write_text(json.dumps(generation))
    return home


# --- what was imported ----------------------------------------------------------------------------------------------

FURTHER = dict(
    max_position_embeddings=8192,
    bos_token_id=1,
    eos_token_id=[5, 3],
    pad_token_id=2,
    initializer_range=0.041,
    attention_dropout=0.1,
    use_cache=False,
    pretraining_tp=1,
    something_of_theirs={"kept": True},
)
SAMPLING = dict(eos_token_id=[5, 3], bos_token_id=1, do_sample=True, temperature=0.6, top_p=0.9, transformers_version="4.40.0")


def test_config_and_sampling_come_back_as_they_were(tmp_path):
    home = given(tmp_path / "given", generation=SAMPLING, **FURTHER)
    back = export(import_(home, tmp_path / "ours"), tmp_path / "back")
    before, after = config_json(home), config_json(back)
    free = {"torch_dtype", "rope_scaling"}
    assert {k: after.get(k) for k in before.keys() - free} == {k: v for k, v in before.items() if k not in free}
    assert after["rope_parameters"] == {"rope_type": "default", "rope_theta": before["rope_theta"]}
    assert generation_json(back) == SAMPLING
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (home / name).read_bytes()


# generation_config.json (None: there is none), keys of config.json, and the generation_config.json that must come out.
STOPS = {
    "one id, and the tokenizer's": (dict(eos_token_id=3), {}, dict(eos_token_id=[3, 5])),
    "the tokenizer's alone": (None, {}, dict(do_sample=False, bos_token_id=1, eos_token_id=5)),
    "of config.json": (None, dict(eos_token_id=[3, 5]), dict(do_sample=False, bos_token_id=1, eos_token_id=[3, 5])),
    "made from config.json": (
        {"_from_model_config": True, "eos_token_id": 3},
        {},
        dict(eos_token_id=[3, 5]),
    ),
    "sampling in config.json": (
        None,
        dict(do_sample=True, temperature=0.5),
        dict(do_sample=True, temperature=0.5, bos_token_id=1, eos_token_id=5),
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_all_that_ends_an_answer_is_told_together(case, tmp_path):
    generation, settings, expected = STOPS[case]
    home = given(tmp_path / "given", generation=generation, **settings)
    back = export(import_(home, tmp_path / "ours"), tmp_path / "back")
    assert generation_json(back) == expected


def test_settings_of_a_model_without_a_tokenizer_come_back_too(tmp_path):
    home = given(tmp_path / "given", generation=SAMPLING, tokenizer=False, **FURTHER)
    back = export(import_(home, tmp_path / "ours"), tmp_path / "back")
    assert generation_json(back) == SAMPLING and config_json(back)["eos_token_id"] == [5, 3]


def test_padding_that_has_no_row_is_not_told(tmp_path):
    """torch has no embedding whose padding lies beyond it."""
    cfg, _, mine, _ = made("llama", n_layers=1, vocab_size=4)
    home = save(tmp_path / "ours", cfg, mine)
    bytes_tokenizer(home / "tokenizer", pad_token="<|endoftext|>")
    back = export(home, tmp_path / "back")
    assert config_json(back)["pad_token_id"] == 3
    told = json.loads((home / "tokenizer/tokenizer_config.json").read_text()) | {"pad_token": "<|im_start|>"}
    (home / "tokenizer/tokenizer_config.json").write_text(json.dumps(told))
    back = export(home, tmp_path / "other")
    assert not {"pad_token_id", "eos_token_id"} & config_json(back).keys()


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_generation_config_is_one_message(text, tmp_path, capsys):
    home = given(tmp_path / "given")
    (home / "generation_config.json").write_text(text)
    words = [str(home / "generation_config.json")]
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'ours'}", words=words)


def test_the_longest_row_is_never_below_the_imported(tmp_path):
    cfg, _, mine, _ = made("llama", n_layers=1)
    recipe = {
        "stages": {
            "sft": {"kind": "sft", "init_from": "", "seq_len": 64},
            "dpo": {"kind": "dpo", "init_from": "sft", "seq_len": 96},
        }
    }
    for imported, longest in ((8192, 8192), (80, 96), (None, 96)):
        meta = {"stage": "dpo", "recipe": recipe, "longest": imported}
        assert checkpoint.max_seq_len(meta) == longest
        assert checkpoint.inherited_meta(meta) == {"longest": longest}
    assert checkpoint.max_seq_len({}) == 2048


# --- Mistral --------------------------------------------------------------------------------------------------------

MISTRAL = dict(architectures=["MistralForCausalLM"], model_type="mistral", attention_bias=..., mlp_bias=...)


@pytest.mark.parametrize("window", [dict(sliding_window=None), dict(sliding_window=4096, max_position_embeddings=4096)])
def test_a_mistral_without_a_window_is_a_llama_and_goes_out_as_it_came(window, tmp_path):
    home = given(tmp_path / "given", **MISTRAL, **window)
    ours = import_(home, tmp_path / "ours")
    assert checkpoint.load(ours).cfg.n_experts == 0
    back = export(ours, tmp_path / "back")
    assert_same_bits(read_directory(back), read_directory(home))
    keys = ("model_type", "architectures", "sliding_window", "rope_theta", "num_key_value_heads", "head_dim")
    assert {k: config_json(back)[k] for k in keys} == {k: config_json(home)[k] for k in keys}


def test_mistrals_own_defaults(tmp_path):
    """transformers: 8 heads of keys, and a window of 4096 where config.json is silent."""
    home = given(tmp_path / "given", **MISTRAL, sliding_window=None, num_key_value_heads=2, max_position_embeddings=...)
    assert config_json(export(import_(home, tmp_path / "ours"), tmp_path / "back"))["max_position_embeddings"] == 131_072


WINDOWS = {
    "Mistral 7B 0.1": (MISTRAL, dict(sliding_window=4096, max_position_embeddings=32768), "4096"),
    "silent": (MISTRAL, dict(max_position_embeddings=32768), "4096"),
    "of a Llama": ({}, dict(sliding_window=8192, max_position_embeddings=4096), "8192"),
    "text": (MISTRAL, dict(sliding_window="all"), "'all'"),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_is_refused(case, tmp_path, capsys):
    keys, settings, word = WINDOWS[case]
    home = given(tmp_path / "given", **keys, **settings)
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'ours'}", words=["sliding_window", word])


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma", "qwen2", "phi3", "bert", None, ["llama"]])
def test_another_architecture_is_refused_by_its_type_before_all_else(kind, tmp_path, capsys):
    """GPT-2's config.json and weights have none of Llama's names."""
    home = tmp_path / "given"
    home.mkdir()
    (home / "config.json").write_text(json.dumps({"model_type": kind, "n_embd": 768, "activation_function": "gelu_new"}))
    words = ["model_type", repr(kind), "llama", "mixtral"]
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'ours'}", words=words)


@pytest.mark.parametrize("key", ["partial_rotary_factor", "rope_parameters"])
def test_positions_of_a_part_of_a_head_are_refused(key, tmp_path, capsys):
    value = (
        0.5 if key == "partial_rotary_factor" else {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}
    )
    home = given(tmp_path / "given", **{key: value})
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'ours'}", words=[key, "0.5"])


# --- the tokenizer's files ------------------------------------------------------------------------------------------


def test_the_tokenizers_that_are_trained_here_let_their_template_write_special_tokens(tokenizer):
    """`split_special_tokens` would make transformers spell out the <s> and </s> of the template."""
    told = json.loads((tokenizer.directory / "tokenizer_config.json").read_text())
    assert not told.get("split_special_tokens") and told["chat_template"] == chat.TEMPLATE


def ours_with(tmp_path, tokenizer, **settings):
    """A checkpoint with a tokenizer of ours, as one of an older version was written."""
    cfg, _, mine, _ = made("llama", n_layers=1, vocab_size=512)
    home = save(tmp_path / "ours", cfg, mine)
    shutil.copytree(tokenizer.directory, home / "tokenizer")
    told = json.loads((home / "tokenizer/tokenizer_config.json").read_text()) | settings
    (home / "tokenizer/tokenizer_config.json").write_text(json.dumps(told))
    return home, told


def test_what_other_engines_would_misread_is_mended_on_the_way_out(tmp_path, tokenizer):
    marked = "{%- generation -%} {{ messages }}\n{%+ endgeneration %}"
    named = [{"name": "default", "template": marked}, {"name": "tool_use", "template": "{{ tools }}"}]
    home, told = ours_with(tmp_path, tokenizer, split_special_tokens=True, chat_template=named)
    (home / "tokenizer/chat_template.jinja").write_text(marked)
    back = export(home, tmp_path / "back")
    plain = "{%- if true -%} {{ messages }}\n{%+ endif %}"
    expected = {**told, "chat_template": [{"name": "default", "template": plain}, named[1]]}
    del expected["split_special_tokens"]
    assert json.loads((back / "tokenizer_config.json").read_text()) == expected
    assert (back / "chat_template.jinja").read_text() == plain
    assert (back / "tokenizer.json").read_bytes() == (tokenizer.directory / "tokenizer.json").read_bytes()
    assert json.loads((home / "tokenizer/tokenizer_config.json").read_text()) == told  # a source stays as it is


def test_a_unigrams_sentencepiece_model_stays_behind_for_llama_cpp_takes_it_for_a_bpe(tmp_path, tokenizer):
    home, _ = ours_with(tmp_path, tokenizer)
    assert (home / "tokenizer/tokenizer.model").is_file() and is_unigram(home / "tokenizer/tokenizer.json")
    assert not (export(home, tmp_path / "back") / "tokenizer.model").exists()


def test_a_bpes_sentencepiece_model_and_all_other_files_go_out(tmp_path):
    home = given(tmp_path / "given")
    (home / "additional_chat_templates").mkdir()
    names = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "additional_chat_templates/tool_use.jinja")
    for name in names:
        (home / name).write_bytes(b"{}")
    back = export(import_(home, tmp_path / "ours"), tmp_path / "back")
    assert [(back / name).read_bytes() for name in names] == [b"{}"] * len(names) and not is_unigram(back / "tokenizer.json")


class Marks(jinja2.ext.Extension):
    """`{% generation %}` as transformers reads it: a block with a scope of its own, whose text is what it holds."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller):
        return caller()


def rendered(template, extensions=()):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[*extensions, "jinja2.ext.loopcontrols"])
    return environment.from_string(template).render(messages=[{"role": "a", "content": " x "}, {"role": "b", "content": "y"}])


EACH = "{% for m in messages %}", "{% endfor %}"
TEMPLATES = {
    "plain": "A: {% generation %}{{ m.content }}{% endgeneration %}\n",
    "white space cut": "\n  A:  {%- generation -%}\n {{ m.content }} \n {%- endgeneration -%}  \n.",
    "white space kept": "\n  {%+ generation %}\n{{ m.content }}\n  {%+ endgeneration +%}\n",
    "lines of their own": "\n  {% generation %}\n{{ m.content }}\n  {% endgeneration %}\n",
    "a variable inside": "{% set n = 1 %}{%generation%}{% set n = 2 %}{{ n }}{%endgeneration%}{{ n }}",
    "two in one": "{% generation %}{{ m.role }}{% endgeneration %}:{% generation %}{{ loop.index }}{% endgeneration %}",
    "none": "{{ m.content }} generation ",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_without_its_marks_says_the_same_in_plain_jinja(case):
    template = TEMPLATES[case].join(EACH)
    plain = without_marks(template)
    assert rendered(plain) == rendered(template, [Marks]) != ""
    assert (plain == template) == (case == "none")


# --- what an import tells -------------------------------------------------------------------------------------------


def told(capsys, home, output, *flags):
    """Both streams of an import that must succeed."""
    capsys.readouterr()
    assert main(["import", f"--hf={home}", f"--output={output}", *flags]) == 0
    found = capsys.readouterr()
    return found.out, [line for line in found.err.splitlines() if line.startswith("import: ")]


def test_ids_beyond_the_rows_are_refused_until_there_are_rows(tmp_path, capsys):
    cfg, theirs, _, extra = made("llama", n_layers=1, vocab_size=64)
    home = bytes_tokenizer(write(tmp_path / "given", cfg, theirs, 0, **extra))
    pieces = Library.from_file(str(home / "tokenizer.json")).get_vocab_size()
    arguments = ["import", f"--hf={home}", f"--output={tmp_path / 'ours'}"]
    fails(capsys, tmp_path, *arguments, words=[str(home), f"{pieces} pieces", "64 rows", "--vocab_size=384"])
    out, notes = told(capsys, home, tmp_path / "ours", "--vocab_size=384")
    assert "padded from 64 to 384" in out and not notes
    loaded = checkpoint.load(tmp_path / "ours")
    assert loaded.params["embed"]["table"].shape == (384, cfg.d_model)


NOTES = {
    "a lone tokenizer.model": ({"tokenizer.model": b"anything"}, ["tokenizer.model", "save_pretrained", "import again"]),
    "GPT-2's files": ({"vocab.json": b"{}", "merges.txt": b""}, ["vocab.json", "save_pretrained"]),
    "none": ({}, ["has no tokenizer", "tokenizer.json"]),
}


@pytest.mark.parametrize("case", NOTES)
def test_a_tokenizer_that_is_lost_is_told(case, tmp_path, capsys):
    files, words = NOTES[case]
    home = given(tmp_path / "given", tokenizer=False)
    for name, data in files.items():
        (home / name).write_bytes(data)
    out, [note] = told(capsys, home, tmp_path / "ours")
    assert all(word in note for word in words), note
    assert "c.tokenizer.path" in out


def test_a_tokenizer_without_a_template_or_an_end_is_told(tmp_path, capsys):
    home = given(tmp_path / "given", tokenizer=False)
    bytes_tokenizer(home, template=None)
    assert ["chat template" in note for note in told(capsys, home, tmp_path / "one")[1]] == [True]
    bytes_tokenizer(home, eos_token=None)
    assert ["eos_token" in note for note in told(capsys, home, tmp_path / "two")[1]] == [True]
    assert export(tmp_path / "two", tmp_path / "back").is_dir()  # the weights are all that there is to lose
    (home / "tokenizer.json").write_text("{")
    fails(capsys, tmp_path, "import", f"--hf={home}", f"--output={tmp_path / 'three'}", words=["tokenizer.json", "read"])


def test_the_lines_that_an_import_prints_are_a_config(tmp_path, capsys):
    from tanuki_jax import config

    out, notes = told(capsys, given(tmp_path / "given", rope_theta=5e5), tmp_path / "ours")
    first, about, *lines = out.splitlines()
    assert first.endswith(", exact") and "rope_theta 500000.0" in about and not notes
    c = config.recipe()
    exec("\n".join(lines), {"c": c, "config": config})
    made_of = config.resolve(c)
    assert (made_of.model.rope_theta, made_of.model.vocab_size) == (5e5, V)
    assert made_of.tokenizer.path == str(tmp_path / "ours/tokenizer")


# --- casts ----------------------------------------------------------------------------------------------------------


def typed(home, change):
    """A published directory whose arrays have the dtypes that `change` gives them."""
    cfg, theirs, _, extra = made("llama", n_layers=2)
    return write(home, cfg, {name: change(name, array) for name, array in theirs.items()}, **extra), theirs


MIXED = {
    "float16": lambda name, w: w.astype(np.float16),
    "norms in float32": lambda name, w: w if "norm" in name else w.astype(np.float16),
    "float32 in bfloat16": lambda name, w: w.astype("bfloat16") if "mlp" in name else w,
}


@pytest.mark.parametrize("to", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", MIXED)
def test_weights_of_other_or_several_dtypes_are_cast_on_request(case, to, tmp_path, capsys):
    home, theirs = typed(tmp_path / "given", MIXED[case])
    arguments = ["import", f"--hf={home}", f"--output={tmp_path / 'ours'}"]
    fails(capsys, tmp_path, *arguments, words=["--param_dtype=float32", "bfloat16"])
    out, _ = told(capsys, home, tmp_path / "ours", f"--param_dtype={to}")
    first = out.splitlines()[0]
    assert "cast from" in first and ("no longer exact" in first) == (to == "bfloat16")
    if to == "bfloat16" and case != "float32 in bfloat16":
        assert "3 bits of mantissa" in first
    found = read_directory(export(tmp_path / "ours", tmp_path / "back"))
    given = {name: MIXED[case](name, w) for name, w in theirs.items()}
    # Norms are float32 in any model, and go out so where bfloat16 would round them.
    assert_same_bits(found, {name: w.astype("float32" if "norm" in name else to) for name, w in given.items()})


def test_a_cast_that_is_none_is_exact_and_one_that_overflows_is_refused(tmp_path, capsys):
    home, theirs = typed(tmp_path / "given", lambda name, w: w)
    assert ", exact\n" in told(capsys, home, tmp_path / "ours", "--param_dtype=float32")[0]
    large = lambda name, w: np.where(np.arange(w.size).reshape(w.shape) == 3, np.float32(3.4e38), w)  # noqa: E731
    home, _ = typed(tmp_path / "large", lambda name, w: large(name, w) if "layers.1.mlp.up" in name else w)
    arguments = ["import", f"--hf={home}", f"--output={tmp_path / 'other'}", "--param_dtype=bfloat16"]
    assert main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in ("tanuki: ", "layers.1.mlp.up_proj", "3.4e+38", "bfloat16"))
    assert not (tmp_path / "other").exists()


def test_adapters_are_not_cast(tmp_path, capsys):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/adapter_config.json").write_text("{}")
    arguments = ["import", f"--hf={tmp_path / 'adapters'}", f"--base={tmp_path}", f"--output={tmp_path / 'ours'}"]
    fails(capsys, tmp_path, *arguments, "--param_dtype=float32", words=["--param_dtype", "adapters", "float32"])
