"""From a SentencePiece model to tokenizer.json and the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
from pathlib import Path

CONTROL_SCORE = -1.0e6  # of pieces that text must not produce: control symbols and the spellings of bytes


def export(model: Path, output: Path, chat_template: str = "") -> int:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json; returns the number of pieces.

    SentencePiece writes a space as U+2581, so text that contains U+2581 does not survive it.  tokenizer.json holds real
    spaces instead and is lossless.  Text is cut at newlines, which are pieces of their own.
    """
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab, controls = [], []
    for i in range(sp.get_piece_size()):
        piece = sp.id_to_piece(i)
        special = sp.is_control(i) or sp.is_unknown(i)
        if special:
            controls.append(piece)
        if special or sp.is_byte(i):
            vocab.append((piece, CONTROL_SCORE))
        else:
            vocab.append((piece.replace("\u2581", " "), sp.get_score(i)))
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=sp.unk_id(), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in controls])
    output.mkdir(parents=True, exist_ok=True)
    (output / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    named_ids = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id(), "pad_token": sp.pad_id()}
    special_tokens = {name: sp.id_to_piece(i) for name, i in named_ids.items()}
    _write_json(output / "special_tokens_map.json", special_tokens)
    _write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special_tokens,
            "additional_special_tokens": [c for c in controls if c not in special_tokens.values()],
            **({"chat_template": chat_template} if chat_template else {}),
            "clean_up_tokenization_spaces": False,
        },
    )
    return len(vocab)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
