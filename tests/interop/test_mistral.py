"""A Mistral without a window, by transformers and by us, in and out; needs the extra `parity`."""

import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint
from tests.interop.published import assert_same_bits, config_json, export, import_, read_directory
from tests.tiny import apply

pytestmark = pytest.mark.slow

IDS = np.arange(40).reshape(2, 20) * 7 % 89
SHAPE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)


@pytest.mark.parametrize("window", [None, 64])
def test_transformers_and_we_compute_the_same_before_and_after(window, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    def logits(home):
        read = transformers.AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, attn_implementation="eager").eval()
        assert type(read).__name__ == "MistralForCausalLM"
        with torch.no_grad():
            return read(torch.tensor(IDS)).logits.numpy()

    torch.manual_seed(0)
    home = tmp_path / "theirs"
    transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=window)).save_pretrained(home)
    loaded = checkpoint.load(import_(home, tmp_path / "ours"))
    tokens = jnp.asarray(IDS)
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}
    ours = np.asarray(apply(loaded.cfg, loaded.params, batch).hidden @ loaded.params["head"])
    np.testing.assert_allclose(ours, logits(home), atol=1e-4)
    back = export(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(read_directory(back), read_directory(home))
    assert config_json(back)["sliding_window"] == window
    np.testing.assert_array_equal(logits(back), logits(home))
