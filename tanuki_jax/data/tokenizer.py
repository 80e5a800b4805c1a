"""The run-time tokenizer: tokenizer.json, read so that no text can produce a special token.

A directory is read as transformers reads it: BOS by the tokenizer's own post-processor, prefix spaces, chat templates.
"""

from __future__ import annotations

import bisect
import functools
import json
import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers

from tanuki_jax import files
from tanuki_jax.errors import UserError

Span: TypeAlias = tuple[int, int]  # characters [start, stop)
JsonObject: TypeAlias = dict[str, Any]

NEWLINE_CUT = {"type": "Split", "pattern": {"Regex": "\n"}, "behavior": "Isolated", "invert": False}
PART_CHARACTERS = 1 << 15  # characters of a text that are encoded together, where it is cut at newlines
MAX_PART_CHARACTERS = 1 << 20  # the same where no newline cuts it; such a cut may change tokens, not the decoded text
# The tokenizer's files in a directory that may also hold weights, and generation_config.json with the publisher's stop ids.
FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", "additional_chat_templates", "generation_config.json"),
)
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
STAND_INS = range(0xF0000, 0x10F000, 0x1000)  # private-use characters that stand for special tokens, a block at a time


class Tokenizer:
    """Text to ids and back; decode(encode(x)) == x for every string that UTF-8 can hold."""

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (directory / name).is_file():
                raise UserError(
                    f"tokenizer: {directory} has no {name}; a model needs its own tokenizer, and for a new model "
                    "`tanuki tokenizer train` makes one"
                )
        self.directory = directory
        self._config = _read_config(directory)
        self._json = _as_transformers(files.read_json(directory / "tokenizer.json"), self._config)
        self._tokenizer = self._load(self._json)
        self._tokenizer.encode_special_tokens = True  # their spelling in text is text
        # Where a newline is always a token, the ids of a text are the ids of its lines, concatenated.
        self._cuts_at_newlines = self._json.get("pre_tokenizer") == NEWLINE_CUT
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {a.content: i for i, a in added.items() if a.special}
        self.added = {a.content: i for i, a in added.items()}
        self.special_ids, self.added_ids = frozenset(self.special.values()), frozenset(self.added.values())
        self.named = _named_tokens(self._config)
        _check_tokens(directory, self._config, self._tokenizer)
        self.bos_token, eos_token = self.named.get("bos_token", ""), self.named.get("eos_token", "")
        if eos_token not in self.special:
            raise UserError(f"tokenizer: {directory} has no eos_token among its special tokens; every text must end with one")
        self.eos_token, self.eos = eos_token, self.special[eos_token]
        self.bos, self.pad = self.special.get(self.bos_token), self.special.get(self.named.get("pad_token", ""))
        self.chat_templates = _chat_templates(directory, self._config)
        self.chat_template = self.chat_templates.get("default", "")
        self.generation_eos = _generation_eos(directory, frozenset(added))
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        texts = [self.chat_template] if self.chat_templates.keys() <= {"default"} else [sorted(self.chat_templates.items())]
        self.fingerprint = files.fingerprint(directory / "tokenizer.json", *texts)

    def _load(self, data: JsonObject) -> tokenizers.Tokenizer:
        try:
            loaded = tokenizers.Tokenizer.from_str(json.dumps(data))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"tokenizer: {self.directory / 'tokenizer.json'} cannot be read: {error}") from error
        loaded.no_truncation()
        loaded.no_padding()
        return loaded

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; nothing is added."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and for each the character of `text` at which it starts."""
        loaded, moved = self._text
        encoding = loaded.encode(_encodable(text), add_special_tokens=False)
        ids = [moved.get(token, token) for token in encoding.ids] if moved else encoding.ids
        return ids, [start for start, _ in _spans(encoding)]

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids as transformers' tokenizer(text) gives them: spelt special tokens become special tokens, and BOS or EOS is added
        where the post-processor of tokenizer.json does so (transformers 5 then ignores add_bos_token)."""
        ids: list[int] = self._published.encode(_encodable(text), add_special_tokens=add_special_tokens).ids
        return ids

    def encode_rendered(
        self, text: str, quoted: Sequence[Span] = (), controls: frozenset[int] = frozenset()
    ) -> tuple[list[int], list[Span]]:
        """Ids of a rendered chat, as transformers gives them, and the characters of each.

        A special token, or one of `controls`, that touches any of the `quoted` spans (ascending) is encoded as plain text.
        """
        ids, spans = self._encode_chat(text)
        placed = self._placed_controls(text, ids, spans, controls)
        written = [(span, token) for span, token in placed if not _touches(span, quoted)]
        if len(written) == len(placed):
            return ids, spans
        return self._encode_quoted(text, written, controls)

    def quoted_controls(self, text: str, quoted: Sequence[Span], controls: frozenset[int]) -> list[Span]:
        """Where a text spells special tokens, or `controls`, that touch any of the `quoted` spans."""
        return [span for span, _ in self._placed_controls(text, *self._encode_chat(text), controls) if _touches(span, quoted)]

    def _encode_chat(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._chat.encode(_encodable(text), add_special_tokens=False)
        return encoding.ids, _spans(encoding)

    def _placed_controls(
        self, text: str, ids: Sequence[int], spans: Sequence[Span], controls: frozenset[int]
    ) -> list[tuple[Span, int]]:
        """Special tokens, and `controls`, with their characters; without <unk> for characters that the model cannot spell."""
        unknown, candidates = self.special.get(_unknown(self._json["model"]) or ""), self.special_ids | controls
        placed = [(span, token) for token, span in zip(ids, spans, strict=True) if token in candidates]
        return [(span, token) for span, token in placed if token != unknown or text[slice(*span)].strip() == self.piece(token)]

    def _encode_quoted(
        self, text: str, written: Sequence[tuple[Span, int]], controls: frozenset[int]
    ) -> tuple[list[int], list[Span]]:
        """Ids and characters where quoted text spells special tokens: only those in `written` become tokens.

        A character that no text holds stands in for each of them.
        """
        block = next((b for b in STAND_INS if not any(b <= ord(c) < b + STAND_INS.step for c in text)), None)
        if block is None:
            raise UserError("text has characters of every block of the private-use planes; remove them")
        loaded, stand_ins, originals = self._with_stand_ins(block, controls)
        pieces: list[str] = []
        positions: list[int] = []  # in `text`, of each character that is encoded
        at = 0
        for (start, stop), token in written:
            pieces += [text[at:start], stand_ins[token]]
            positions += range(at, start + 1)
            at = stop
        positions += range(at, len(text) + 1)
        encoding = loaded.encode(_encodable("".join([*pieces, text[at:]])), add_special_tokens=False)
        spans = [(positions[start], positions[stop]) for start, stop in _spans(encoding)]
        return [originals.get(token, token) for token in encoding.ids], spans

    @functools.cached_property
    def _chat(self) -> tokenizers.Tokenizer:
        """As transformers loads it, without the post-processor, which could only add tokens or trim offsets."""
        return self._load({**self._json, "post_processor": None})

    @functools.cached_property
    def _published(self) -> tokenizers.Tokenizer:
        """As transformers loads it, with the post-processor that adds BOS or EOS."""
        return self._load(self._json)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a tokenizer lives as long as its process
    def _with_stand_ins(
        self, block: int, controls: frozenset[int]
    ) -> tuple[tokenizers.Tokenizer, dict[int, str], dict[int, int]]:
        """A tokenizer for which the special tokens and `controls` are text, the character of `block` that stands for each, and
        the right id for each id that this tokenizer changes."""
        names = {name for name, token in self.added.items() if name in self.special or token in controls}
        loaded, originals = self._without(frozenset(names))
        stand_ins = {self.added[name]: chr(block + number) for number, name in enumerate(sorted(names))}
        loaded.add_tokens([tokenizers.AddedToken(char, special=False, normalized=False) for char in stand_ins.values()])
        return loaded, stand_ins, originals | {loaded.token_to_id(char) or 0: token for token, char in stand_ins.items()}

    def _without(self, names: frozenset[str]) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer without these tokens, among the added ones and in its model; and new id -> id where they differ."""
        model = self._json["model"]
        vocab = model.get("vocab")
        hidden = names - {_unknown(model)}  # <unk> stays: it stands for what the model cannot spell
        if isinstance(vocab, list):  # Unigram: a piece that no text can hold takes its place
            vocab = [[f"\U0010ffff{i}" if piece in hidden else piece, *score] for i, (piece, *score) in enumerate(vocab)]
        elif model.get("type") != "BPE":  # BPE makes pieces by merges alone
            vocab = {f"\U0010ffff{i}" if piece in hidden else piece: i for piece, i in vocab.items()}
        added = [a for a in self._json["added_tokens"] if a["content"] not in names]
        data = {**self._json, "model": {**model, "vocab": vocab}, "post_processor": None, "added_tokens": added}
        loaded = self._load(data)
        moved = {loaded.token_to_id(a["content"]) or 0: self.added[a["content"]] for a in added}
        return loaded, {new: old for new, old in moved.items() if new != old}

    @functools.cached_property
    def _text(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The tokenizer of plain text, in which no special token can be spelt, and new id -> id where they differ.

        The library's own switch is not enough where the model holds special tokens as pieces (converted SentencePiece models).
        """
        names = frozenset(self.special) - {_unknown(self._json["model"])}
        spelt = ((self.special[name], self._tokenizer.encode(name, add_special_tokens=False).ids) for name in names)
        if any(token in ids for token, ids in spelt):
            return self._without(names)
        return self._tokenizer, {}

    def encode_batch(self, texts: Sequence[str]) -> list[array]:
        """Ids of many texts, uint32, encoded on all cores; long texts are cut so that several cores share one."""
        parts: list[str] = []
        counts = []
        for text in texts:
            cut = self._parts(_encodable(text))
            counts.append(len(cut))
            parts += cut
        loaded, moved = self._text
        encoded = iter(loaded.encode_batch_fast(parts, add_special_tokens=False))
        result = []
        for count in counts:
            ids = array("I")
            for _ in range(count):
                part = next(encoded).ids
                ids.extend([moved.get(token, token) for token in part] if moved else part)
            result.append(ids)
        return result

    def _parts(self, text: str) -> list[str]:
        """A text in parts, cut before newlines where that changes no token, and at MAX_PART_CHARACTERS characters."""
        size = PART_CHARACTERS if self._cuts_at_newlines else MAX_PART_CHARACTERS
        parts, start = [], 0
        while len(text) - start > size:
            end = text.find("\n", start + size, start + MAX_PART_CHARACTERS) if self._cuts_at_newlines else -1
            end = end if end > start else min(start + MAX_PART_CHARACTERS, len(text))
            parts.append(text[start:end])
            start = end
        return [*parts, text[start:]]

    def piece(self, token: int) -> str:
        """How a token is written in the vocabulary."""
        return self._tokenizer.id_to_token(token) or ""

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to a prompt: with the space that some decoders strip where a text begins."""
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are spelt out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's files into a new directory, all or none; does nothing where there is no tokenizer.json."""
    if (source / "tokenizer.json").is_file() and not target.is_dir():
        with files.atomic_path(target) as temporary:
            temporary.mkdir()
            for file in (file for pattern in FILES for file in source.glob(pattern)):
                if file.is_dir():
                    shutil.copytree(file, temporary / file.name)
                else:
                    shutil.copy(file, temporary)


def _read_config(directory: Path) -> JsonObject:
    """tokenizer_config.json over special_tokens_map.json, where there is one."""
    config = files.read_json(directory / "tokenizer_config.json")
    if not isinstance(config, dict):
        raise UserError(f"tokenizer: {directory / 'tokenizer_config.json'} is not a dictionary of settings")
    path = directory / "special_tokens_map.json"
    special = files.read_json(path) if path.is_file() else {}
    settings = {name: value for name, value in config.items() if value is not None}
    return {**(special if isinstance(special, dict) else {}), **settings}


def _check_tokens(directory: Path, config: JsonObject, loaded: tokenizers.Tokenizer) -> None:
    """Refuses a token that tokenizer.json does not have: transformers would add it with a new id."""
    path = directory / "added_tokens.json"
    added = files.read_json(path) if path.is_file() else {}
    decoder, extra = config.get("added_tokens_decoder"), config.get("extra_special_tokens")
    listed: list[object] = [*(added if isinstance(added, dict) else ()), *(config.get("additional_special_tokens") or ())]
    listed += decoder.values() if isinstance(decoder, dict) else ()
    listed += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    for text in filter(None, map(_spelling, listed)):
        if loaded.token_to_id(text) is None:
            raise UserError(
                f"tokenizer: {directory} names the token {text!r}, which tokenizer.json does not have; load it in transformers "
                "and save it again with save_pretrained"
            )


def _unknown(model: JsonObject) -> str | None:
    """The piece that stands for what a model cannot spell, <unk>."""
    vocab, number = model.get("vocab"), model.get("unk_id")
    return vocab[number][0] if isinstance(vocab, list) and isinstance(number, int) else model.get("unk_token")


def _named_tokens(config: JsonObject) -> dict[str, str]:
    """The special tokens that have names, as transformers passes them to a chat template: bos_token, eos_token, ..."""
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    spellings = {name: _spelling(value) for name, value in named.items() if name in NAMED_TOKENS or name.endswith("_token")}
    return {name: text for name, text in spellings.items() if text}


def _spelling(token: object) -> str:
    """The text of a special token of tokenizer_config.json, which is text or a dictionary with `content`; else empty."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _generation_eos(directory: Path, added: frozenset[int]) -> tuple[int, ...]:
    """eos_token_id of the publisher's generation_config.json, one or several; only added tokens count."""
    path = directory / "generation_config.json"
    config = files.read_json(path) if path.is_file() else {}
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    return tuple(token for token in (value if isinstance(value, list) else [value]) if token in added)


def _chat_templates(directory: Path, config: JsonObject) -> dict[str, str]:
    """Chat templates by name, where transformers looks for them: files first, then tokenizer_config.json."""
    named = {path.stem: _text(path) for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        named["default"] = _text(directory / "chat_template.jinja")
    inline = config.get("chat_template")
    if named or not inline:
        return named
    if isinstance(inline, str):
        return {"default": inline}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in inline}
    except (TypeError, KeyError) as error:
        raise UserError(
            f"tokenizer: chat_template of {directory / 'tokenizer_config.json'} is neither text nor a list of "
            '{"name", "template"}'
        ) from error


def _as_transformers(data: object, config: JsonObject) -> JsonObject:
    """tokenizer.json as the class that transformers chooses for it reads it.

    LlamaTokenizer takes only vocabulary and merges from the file and builds the rest itself (transformers 5,
    tokenization_llama.py), unless the file is byte-level.  Tokens that have names (eos_token, ...) are always special.
    """
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise UserError("tokenizer: tokenizer.json is not what the tokenizers library writes; fetch it again")
    names = set(_named_tokens(config).values())
    added = [{**a, "special": a.get("special", False) or a["content"] in names} for a in data.get("added_tokens") or ()]
    data = {**data, "added_tokens": added}
    llama = str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
    if not llama or data["model"].get("type") != "BPE" or "ByteLevel" in json.dumps([data.get("pre_tokenizer")]):
        return data
    prefix = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    decoders: list[JsonObject] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    model = {**data["model"], "unk_token": None, "fuse_unk": True, "byte_fallback": True, "dropout": None}
    decoder = {"type": "Sequence", "decoders": decoders}
    return {**data, "model": model, "normalizer": None, "pre_tokenizer": metaspace, "decoder": decoder}


def _spans(encoding: tokenizers.Encoding) -> list[Span]:
    """The characters of each token."""
    spans: list[Span] = []
    run = -1
    for piece, (start, stop) in zip(encoding.tokens, encoding.offsets, strict=True):
        byte = byte_of(piece)
        if byte is None:
            spans.append((start, stop))
            run = -1
            continue
        # The library gives every byte of a run of unknown characters the start of the run; count its characters.
        begins = byte & 0xC0 != 0x80  # the first byte of a character
        first = spans[-1][0] + begins if start == run else start
        spans.append((first, first + 1))
        run = start
    return spans


def _touches(span: Span, others: Sequence[Span]) -> bool:
    at = bisect.bisect_right(others, span[0], key=lambda other: other[1])
    return at < len(others) and others[at][0] < span[1]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def byte_of(piece: str) -> int | None:
    """The byte that a piece such as <0x41> spells; None for any other piece."""
    return int(piece[3:5], 16) if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else None


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"text has a lone surrogate at character {error.start}; it is not valid Unicode text") from error
    return text
