"""Small byte-level and Metaspace BPE tokenizers with other people's chat templates, made without transformers."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from tanuki_jax.data.tokenizer import Tokenizer

TEXT = [
    "Paris. Rome. Hi there",
    "USER: ASSISTANT: [INST] Hi there [/INST] Paris. Rome.",
    " user assistant\n system 狸は山に",
] * 20
SPECIAL = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make(
    directory: Path,
    template="",
    *,
    eos="</s>",
    bos="<s>",
    scheme="",
    special=SPECIAL,
    added=(),
    post=False,
    vocab_size=420,
    texts=TEXT,
    **config,
) -> Tokenizer:
    """A tokenizer in `directory`.  scheme: Metaspace's prepend_scheme instead of bytes; added: tokens that are not special;
    post: a post-processor that puts <s> before a text; config: more keys of tokenizer_config.json."""
    library = Library(models.BPE(unk_token="<unk>" if scheme else None, byte_fallback=False))
    if scheme:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
        library.decoder, alphabet = decoders.Metaspace(prepend_scheme=scheme), []
    else:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    library.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    if post:
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", library.token_to_id("<s>"))]
        )
    directory.mkdir(parents=True, exist_ok=True)
    library.save(str(directory / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, **config}
    if template:
        named["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return Tokenizer(directory)
