"""One small server for all tests of this folder."""

from typing import NamedTuple

import openai
import pytest

from tanuki_jax import model, serve
from tanuki_jax.checkpoint.restore import Loaded
from tanuki_jax.cli.chat import text_pieces
from tanuki_jax.data.chat import stop_ids
from tanuki_jax.model import Sampling
from tests.tiny import random_params, small

CFG = small(vocab_size=512, init_std=0.3)  # whose answers differ from one prompt to the next
LENGTH, SLOTS, NAME = 64, 4, "狸"


class Running(NamedTuple):
    url: str  # ends with /v1
    client: openai.OpenAI
    tokenizer: object
    params: object

    def address(self, path):
        return self.url.removesuffix("/v1") + path

    def generate(self, prompt, n, temperature=0.0, top_p=1.0, seed=0):
        """The same without the server: ids, without the one that ended them."""
        sampling = Sampling(n, temperature, top_p, stop_ids(self.tokenizer))
        return model.generate(CFG, self.params, [prompt], sampling, seed)[0]

    def text(self, prompt, ids):
        """The text of new ids, in which bytes that spell no character spoil no other."""
        return "".join(text_pieces(self.tokenizer, prompt, ids))


@pytest.fixture(scope="session")
def loaded(tokenizer, tmp_path_factory):
    stage = tmp_path_factory.mktemp("served") / "stages" / "tiny"
    stage.mkdir(parents=True)
    (stage / "tokenizer").symlink_to(tokenizer.directory)
    return Loaded(CFG, random_params(CFG), {"longest": LENGTH}, stage)


@pytest.fixture(scope="session")
def running(loaded, tokenizer):
    with serve.background(loaded, serve.Options(slots=SLOTS, queue=8, model_name=NAME, max_body=50_000)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        yield Running(url, client, tokenizer, loaded.params)
