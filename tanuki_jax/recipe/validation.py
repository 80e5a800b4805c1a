"""Loss of each source on the text that is held out of pretraining."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax

from tanuki_jax import config, model, multihost
from tanuki_jax.data import loader
from tanuki_jax.data.layouts import Example, HeldOutRows
from tanuki_jax.data.tokenizer import Tokenizer, byte_of
from tanuki_jax.train.contract import Params
from tanuki_jax.train.next_token import next_token


def make_validation(
    cfg: config.ModelConfig, held_out: Mapping[str, HeldOutRows], tokenizer: Tokenizer, mesh: jax.sharding.Mesh, batch_size: int
) -> Callable[[Params], dict[str, float]]:
    """params -> `validation/SOURCE/loss` (nats per token) and `validation/SOURCE/bits_per_byte` of every source.

    Bits per byte compare models with different tokenizers: the bits of all tokens over the UTF-8 bytes that they spell.
    Special tokens count among the bits, since they must be predicted, and have no bytes.
    """
    loss_fn = next_token(model.dropless(cfg), config.Loss(router_aux_loss=0.0))
    score = jax.jit(lambda params, batch: loss_fn(params, batch, {}, None)[2]["loss"])
    sizes = {name: sum(_bytes(rows[i], tokenizer) for i in range(len(rows))) for name, rows in held_out.items()}

    def validate(params: Params) -> dict[str, float]:
        result: dict[str, float] = {}
        for name, rows in held_out.items():
            total = weight = 0.0
            for start in range(0, len(rows), batch_size):
                batch_rows = [rows[min(r, len(rows) - 1)] for r in range(start, start + batch_size)]
                for row in batch_rows[len(rows) - start :]:  # the last batch is filled up with rows that count nothing
                    row["loss_weights"][:] = 0
                batch = loader.on_devices(loader.stack(batch_rows), mesh, batch_size)
                part = multihost.to_host(score(params, batch))
                total, weight = total + float(part[0]), weight + float(part[1])
            result[f"validation/{name}/loss"] = round(total / max(weight, 1.0), 5)
            result[f"validation/{name}/bits_per_byte"] = round(total / math.log(2) / max(sizes[name], 1), 5)
        return result

    return validate


def _bytes(row: Example, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the tokens that a row is scored on."""
    special = set(tokenizer.special.values())
    ids = [i for i in row["targets"][row["loss_weights"] > 0].tolist() if i not in special]
    spelt = [i for i in ids if byte_of(tokenizer.piece(i)) is not None]  # a row may hold a part of their character only
    return len(spelt) + len(tokenizer.decode([i for i in ids if byte_of(tokenizer.piece(i)) is None]).encode())
