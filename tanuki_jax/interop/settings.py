"""What an export writes beside the weights: config.json, generation_config.json and the tokenizer's files.

What an import brought with it goes out again, whatever the model was trained on since; what training changed is ours.
"""

from __future__ import annotations

import re
from pathlib import Path

from tanuki_jax import checkpoint, files
from tanuki_jax.checkpoint import LazyCheckpoint
from tanuki_jax.data.chat import stop_ids
from tanuki_jax.data.tokenizer import Tokenizer, copy_tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.interop import layout
from tanuki_jax.interop.config_json import Settings, read_settings
from tanuki_jax.interop.vocabulary import source_vocab_size

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "tanuki": "TanukiForCausalLM",
}
CODE = {"AutoConfig": "modeling_tanuki.TanukiConfig", "AutoModelForCausalLM": "modeling_tanuki.TanukiForCausalLM"}
# Of a published config.json: what does not hold for the export, and what a model of another class than the published one keeps.
DROPPED_KEYS = ("auto_map", "_name_or_path", "transformers_version", "rope_scaling", "quantization_config")
KEPT_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "use_cache",
    "pretraining_tp",
)
# Sampling as old config.jsons have it, which transformers takes where there is no generation_config.json.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "max_length")
# A template's marks around what the assistant says, which transformers knows and plain Jinja2 does not.
GENERATION_BLOCK = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}(.*?)\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", re.DOTALL)


def kind_published(opened: LazyCheckpoint, kind: str) -> str:
    """The class under which a model goes out: a Mistral that came in without a window is one again."""
    return "mistral" if kind == "llama" and _published(opened).get("model_type") == "mistral" else kind


def _published(opened: LazyCheckpoint) -> Settings:
    """The config.json that an imported model came with, or nothing."""
    return opened.meta.get("published", {}).get("config", {})


def settings_of(opened: LazyCheckpoint, kind: str) -> tuple[Settings, Settings]:
    """config.json and generation_config.json."""
    cfg, published = opened.cfg, _published(opened)
    same = published.get("model_type") == kind
    inherited = {k: v for k, v in published.items() if k not in DROPPED_KEYS and (same or k in KEPT_KEYS)}
    longest = checkpoint.max_seq_len(opened.meta)
    settings: Settings = inherited | {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": layout.axis_sizes(cfg)["F"],
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "max_position_embeddings": longest,
        "tie_word_embeddings": False,
        "torch_dtype": cfg.param_dtype,
        "dtype": cfg.param_dtype,
    }
    if kind == "llama":
        settings |= {"attention_bias": False, "mlp_bias": False}
    else:
        window = inherited.get("sliding_window")  # one as long as the longest row changes nothing
        settings["sliding_window"] = window if isinstance(window, int) and window >= longest else None
    if cfg.n_experts:
        settings |= {"num_local_experts": cfg.n_experts, "num_experts_per_tok": cfg.top_k}
    if kind == "tanuki":
        settings |= {"gate_scale": cfg.gate_scale, "auto_map": CODE}
    tokenizer = _tokenizer(opened.tokenizer_directory)
    settings |= _special_ids(inherited, tokenizer, cfg.vocab_size)
    return settings, _generation(opened, settings, tokenizer)


def _generation(opened: LazyCheckpoint, settings: Settings, tokenizer: Tokenizer | None) -> Settings:
    """generation_config.json as it came, with all that ends an answer; where none came, made from the special tokens."""
    stops = [token for token in (_stops(tokenizer) if tokenizer else ()) if token < opened.cfg.vocab_size]
    inherited = _inherited_generation(opened)
    special: Settings = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in settings}
    sampling = {name: value for name, value in _published(opened).items() if name in SAMPLING and value is not None}
    generation = inherited or {"do_sample": False, **sampling, **special}
    ends = _with_ids(generation.get("eos_token_id", special.get("eos_token_id")), stops)
    if ends is not None:
        generation = generation | {"eos_token_id": ends}
    unchanged = generation == inherited  # what is changed was not made from the model's own config any more
    return {name: value for name, value in generation.items() if unchanged or name != "_from_model_config"}


def _stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer; as far as it is known without the template, where that cannot be rendered."""
    try:
        return stop_ids(tokenizer)
    except UserError:
        return (tokenizer.eos, *tokenizer.generation_eos)


def _inherited_generation(opened: LazyCheckpoint) -> Settings:
    """The generation_config.json that came with the model or, since then, with its tokenizer."""
    of_model = opened.meta.get("published", {}).get("generation", {})
    file = opened.tokenizer_directory / "generation_config.json"
    of_tokenizer = read_settings(file) if file.is_file() else {}
    return of_model | of_tokenizer


def _tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a directory, if there is one that can be used; an error where it is damaged."""
    if not source_vocab_size(directory):
        return None
    try:
        return Tokenizer(directory)
    except UserError:  # of another project, and without a token that ends a text: only its files are used
        file = directory / "tokenizer_config.json"
        if file.is_file():
            files.read_json(file)
        return None


def _special_ids(inherited: Settings, tokenizer: Tokenizer | None, rows: int) -> Settings:
    """Ids of special tokens: the inherited ones, else the tokenizer's; all that end a text together."""
    ids = {name: inherited.get(f"{name}_token_id") for name in ("bos", "pad")}
    stops: list[int] = []
    if tokenizer:
        defaults = {"bos": tokenizer.bos, "pad": tokenizer.pad}
        ids = {name: defaults[name] if value is None else value for name, value in ids.items()}
        stops = [token for token in (tokenizer.eos,) if token < rows]
    ids = {name: value for name, value in ids.items() if not isinstance(value, int) or value < rows}
    ids["eos"] = _with_ids(inherited.get("eos_token_id"), stops)
    return {f"{name}_token_id": value for name, value in ids.items() if value is not None}


def _with_ids(ids: object, more: list[int]) -> object:
    """One id or a list of them, and others behind."""
    before = ids if isinstance(ids, list) else [] if ids is None else [ids]
    after = [*before, *(token for token in more if token not in before)]
    return ids if after == before else after[0] if len(after) == 1 else after


# --- the tokenizer --------------------------------------------------------------------------------------------------


def export_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's files, but for what other engines would misread:

    - `split_special_tokens`, with which transformers spells out the template's own special tokens, is left out;
    - `{% generation %}`, which only transformers knows, becomes a block that changes nothing;
    - the tokenizer.model of a Unigram is left out: llama.cpp's converter takes every such file for a BPE's.
    """
    unigram = is_unigram(source / "tokenizer.json")
    copy_tokenizer(source, target)
    config = target / "tokenizer_config.json"
    if config.is_file():
        settings = files.read_json(config)
        if isinstance(settings, dict):
            plain = {name: value for name, value in settings.items() if name != "split_special_tokens" or not value}
            if "chat_template" in plain:
                plain["chat_template"] = without_marks(plain["chat_template"])
            if plain != settings:
                files.write_json(config, plain)
    for file in target.rglob("*.jinja") if target.is_dir() else ():
        text = file.read_text(encoding="utf-8")
        plain_text = _without_marks(text)
        if plain_text != text:
            file.write_text(plain_text, encoding="utf-8")
    if unigram:
        (target / "tokenizer.model").unlink(missing_ok=True)


def without_marks(template: object) -> object:
    """A chat template, or named ones in a list or a dictionary, that plain Jinja2 renders as transformers renders it."""
    if isinstance(template, list):
        return [without_marks(item) for item in template]
    if isinstance(template, dict):
        return {name: without_marks(item) for name, item in template.items()}
    return _without_marks(template) if isinstance(template, str) else template


def _without_marks(template: str) -> str:
    return GENERATION_BLOCK.sub(_plain_block, template)


def _plain_block(match: re.Match[str]) -> str:
    """A block with the same white space; one that sets variables has a scope of its own, as the marked one had."""
    before, after, body, before_end, after_end = match.groups()
    begin, end = ("with", "endwith") if re.search(r"\{%[-+]?\s*set\b", body) else ("if true", "endif")
    return f"{{%{before} {begin} {after}%}}{body}{{%{before_end} {end} {after_end}%}}"


def is_unigram(file: Path) -> bool:
    """Whether a tokenizer.json is a Unigram's."""
    model = files.read_json(file).get("model") if file.is_file() else None
    return isinstance(model, dict) and (model.get("type") == "Unigram" or isinstance(model.get("vocab"), list))
