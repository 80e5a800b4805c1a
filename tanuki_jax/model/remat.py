"""What a block saves for its backward pass, by the value of `compute.remat`; what is not saved is computed again.

The names are those that `checkpoint_name` gives: "q", "k", "v" and "attention" (ops/attention.py), "norm" (model/layers.py),
"gate" and "up" (MLP, ops/expert_ffn.py), "middle" (the residual stream between attention and FFN).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax

from tanuki_jax import ops

Policy: TypeAlias = Callable[..., bool]
ATTENTION, FFN = ("q", "k", "v", "attention", "norm"), ("gate", "up")


def _save(*names: str) -> Policy:
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(policies.save_only_these_names(*names), ops.residuals)


POLICIES: dict[str, Policy] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _save(*ATTENTION),
    "ffn": _save(*FFN, "attention", "norm"),
    "dots": _save(*ATTENTION, *FFN, "middle"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[*ATTENTION, "middle"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
