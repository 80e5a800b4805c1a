"""transformers' AutoTokenizer reads the tokenizers that are written here as they are meant; needs the extra `parity`."""

import json
import shutil

import pytest

from tanuki_jax.data.chat import encode_chat
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.interop.settings import export_tokenizer, without_marks
from tests.conftest import TEXTS

pytestmark = pytest.mark.slow

STRINGS = [
    *dict.fromkeys(TEXTS),
    *(
        "",
        " ",
        "  two  spaces ",
        "\n",
        "a\n\nb\n",
        "\r\n",
        "\t",
        "3.14159",
        "１２３",
        "naïve café",
        "🦝🦝",
        "\u2581",
        "\x00",
        "\ufeff",
    ),
    *("< s >", "<0x41>", "#include <stdio.h>", "don't", "が\u3099", "葛󠄀"),
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "はい"}, {"role": "user", "content": "3"}],
    [{"role": "system", "content": " You. "}, {"role": "user", "content": "\na "}, {"role": "assistant", "content": " 狸\n"}],
    [{"role": "user", "content": "🦝"}, {"role": "assistant", "content": "### 応答:\n"}],
]


@pytest.fixture(scope="module", params=["trained", "exported", "an older one, exported"])
def directory(request, tokenizer, tmp_path_factory):
    if request.param == "trained":
        return tokenizer.directory
    source = tokenizer.directory
    if "older" in request.param:
        source = shutil.copytree(source, tmp_path_factory.mktemp("older") / "tokenizer")
        told = json.loads((source / "tokenizer_config.json").read_text()) | {"split_special_tokens": True}
        told["chat_template"] = "{% generation %}" + without_marks(told["chat_template"]) + "{% endgeneration %}"
        (source / "tokenizer_config.json").write_text(json.dumps(told))
    target = tmp_path_factory.mktemp("exported") / "tokenizer"
    export_tokenizer(source, target)
    return target


def test_texts_and_conversations_have_the_ids_that_were_trained(directory):
    transformers = pytest.importorskip("transformers")
    ours, theirs = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in STRINGS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            found = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert found == encode_chat(ours, messages, prompt)[0]
