"""What lies beside the weights of a published model: config.json, generation_config.json and the tokenizer's files.

What an import brought with it goes out again, whatever the model was trained on since; what training changed is ours.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tanuki_jax import checkpoint, files
from tanuki_jax.checkpoint import LazyCheckpoint
from tanuki_jax.data.chat import stop_ids
from tanuki_jax.data.tokenizer import Tokenizer, copy_tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.interop.vocabulary import source_vocab_size

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "tanuki": "TanukiForCausalLM",
}
CODE = {"AutoConfig": "modeling_tanuki.TanukiConfig", "AutoModelForCausalLM": "modeling_tanuki.TanukiForCausalLM"}
# Of a published config.json: what is not true of the export, and what a model of another class than the published one keeps.
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
# A template's marks of what the assistant says, which transformers knows and plain Jinja2 does not.
GENERATION_BLOCK = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}(.*?)\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", re.DOTALL)


def kind_published(opened: LazyCheckpoint, kind: str) -> str:
    """The class under which a model goes out: a Mistral that came in without a window is one again."""
    return "mistral" if kind == "llama" and _published(opened).get("model_type") == "mistral" else kind


def _published(opened: LazyCheckpoint) -> dict[str, Any]:
    """The config.json that an imported model came with, or nothing."""
    found: dict[str, Any] = opened.meta.get("published", {}).get("config", {})
    return found


def settings_of(opened: LazyCheckpoint, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json."""
    cfg, published = opened.cfg, _published(opened)
    same = published.get("model_type") == kind
    kept = {k: v for k, v in published.items() if k not in DROPPED_KEYS and (same or k in KEPT_KEYS)}
    longest = checkpoint.max_seq_len(opened.meta)
    settings: dict[str, Any] = kept | {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.expert_d_ff or cfg.d_ff if cfg.n_experts else cfg.d_ff,
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
        window = kept.get("sliding_window")  # one as long as the longest row changes nothing
        settings["sliding_window"] = window if window and window >= longest else None
    if cfg.n_experts:
        settings |= {"num_local_experts": cfg.n_experts, "num_experts_per_tok": cfg.top_k}
    if kind == "tanuki":
        settings |= {"gate_scale": cfg.gate_scale, "auto_map": CODE}
    tokenizer = _tokenizer(opened.tokenizer_directory)
    settings |= _special(kept, tokenizer, (tokenizer.eos,) if tokenizer else (), cfg.vocab_size)
    return settings, _generation(opened, settings, tokenizer)


def _generation(opened: LazyCheckpoint, settings: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json: as it came, with all that ends an answer; where none came, of the special tokens."""
    stops = [token for token in (_stops(tokenizer) if tokenizer else ()) if token < opened.cfg.vocab_size]
    told = _sampling(opened)
    special: dict[str, Any] = {
        name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in settings
    }
    old = {name: value for name, value in _published(opened).items() if name in SAMPLING and value is not None}
    made = told or {"do_sample": False, **old, **special}
    ends = _with_ids(made.get("eos_token_id", special.get("eos_token_id")), stops)
    if ends is not None:
        made = made | {"eos_token_id": ends}
    return {name: value for name, value in made.items() if made == told or name != "_from_model_config"}  # else made anew


def _stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends an answer; as far as it is known without the template, where that cannot be rendered."""
    try:
        return stop_ids(tokenizer)
    except UserError:
        return (tokenizer.eos, *tokenizer.generation_eos)


def _sampling(opened: LazyCheckpoint) -> dict[str, Any]:
    """The generation_config.json that came with the model or, since then, with its tokenizer."""
    published = opened.meta.get("published", {})
    found = dict(published.get("generation") or {})
    file = opened.tokenizer_directory / "generation_config.json"
    beside = files.read_json(file) if file.is_file() else {}
    if not isinstance(beside, dict):
        raise UserError(f"{file} is not a dictionary of settings")
    return found | beside


def _tokenizer(home: Path) -> Tokenizer | None:
    """The tokenizer of a directory, where it is one that can be used; an error where it is damaged."""
    if not source_vocab_size(home):
        return None
    try:
        return Tokenizer(home)
    except UserError:  # of others, and without a token that ends a text: its files are all that there is
        files.read_json(home / "tokenizer_config.json") if (home / "tokenizer_config.json").is_file() else None
        return None


def _special(told: dict[str, Any], tokenizer: Tokenizer | None, stops: tuple[int, ...], rows: int) -> dict[str, Any]:
    """Ids of special tokens: as they were told, else the tokenizer's; all that end a text together."""
    found = {name: told.get(f"{name}_token_id") for name in ("bos", "pad")}
    if tokenizer:
        own = {"bos": tokenizer.bos, "pad": tokenizer.pad}
        found = {name: own[name] if value is None else value for name, value in found.items()}
    found = {name: value for name, value in found.items() if value is None or value < rows}
    found["eos"] = _with_ids(told.get("eos_token_id"), [token for token in stops if token < rows])
    return {f"{name}_token_id": value for name, value in found.items() if value is not None}


def _with_ids(told: Any, more: list[int]) -> Any:
    """One id or a list of them, and others behind."""
    have = told if isinstance(told, list) else [] if told is None else [told]
    both = [*have, *(token for token in more if token not in have)]
    return told if both == have else both[0] if len(both) == 1 else both


# --- the tokenizer --------------------------------------------------------------------------------------------------


def export_tokenizer(source: Path, target: Path) -> None:
    """A tokenizer's files as they are, but for what other engines would read otherwise than it was meant.

    - `split_special_tokens`, with which transformers spells out the template's own special tokens, is left out;
    - `{% generation %}`, which only transformers knows, becomes a block that changes nothing;
    - the tokenizer.model of a Unigram is left out: llama.cpp's converter takes every such file for a BPE's.
    """
    unigram = is_unigram(source / "tokenizer.json")
    copy_tokenizer(source, target)
    config = target / "tokenizer_config.json"
    if config.is_file():
        told = files.read_json(config)
        if isinstance(told, dict):
            plain = {name: value for name, value in told.items() if name != "split_special_tokens" or not value}
            if "chat_template" in plain:
                plain["chat_template"] = without_marks(plain["chat_template"])
            if plain != told:
                files.write_json(config, plain)
    for file in target.rglob("*.jinja") if target.is_dir() else ():
        text = file.read_text(encoding="utf-8")
        if (plain_text := without_marks(text)) != text:
            file.write_text(plain_text, encoding="utf-8")
    if unigram:
        (target / "tokenizer.model").unlink(missing_ok=True)


def without_marks(template: Any) -> Any:
    """A chat template, or named ones in a list or a dictionary, that plain Jinja2 renders as transformers renders it."""
    if isinstance(template, list):
        return [without_marks(one) for one in template]
    if isinstance(template, dict):
        return {name: without_marks(one) for name, one in template.items()}
    return GENERATION_BLOCK.sub(_plain_block, template) if isinstance(template, str) else template


def _plain_block(match: re.Match[str]) -> str:
    """A block with the same white space; one that sets variables has a scope of its own, as the marked one had."""
    before, after, body, before_end, after_end = match.groups()
    begin, end = ("with", "endwith") if re.search(r"\{%[-+]?\s*set\b", body) else ("if true", "endif")
    return f"{{%{before} {begin} {after}%}}{body}{{%{before_end} {end} {after_end}%}}"


def is_unigram(file: Path) -> bool:
    """Whether a tokenizer.json is a Unigram's."""
    model = files.read_json(file).get("model") if file.is_file() else None
    return isinstance(model, dict) and (model.get("type") == "Unigram" or isinstance(model.get("vocab"), list))
