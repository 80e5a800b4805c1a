"""Tanuki's mixture for transformers: Mixtral, but for a gate whose logits are normalised over the experts.

This file is copied beside exported weights and loaded with `trust_remote_code=True`; nothing else imports it.
"""

import torch
from transformers import MixtralConfig, MixtralForCausalLM


class TanukiConfig(MixtralConfig):
    """Mixtral's settings, and the scale (lambda) of the normalised gate."""

    model_type = "tanuki"

    def __init__(self, gate_scale: float = 1.0, **settings: object) -> None:
        super().__init__(**settings)
        self.gate_scale = gate_scale


def normalized_gate(router: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router logits as z-scores over the experts, unbiased deviation, in float32; softmax over the top-k."""
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = torch.nn.functional.linear(hidden_states.float(), router.weight.float())
    centred = logits - logits.mean(dim=-1, keepdim=True)
    scores = router.gate_scale * centred / (logits.std(dim=-1, keepdim=True) + 1e-5)
    top, experts = torch.topk(scores, router.top_k, dim=-1)
    return scores, torch.softmax(top, dim=-1), experts


class TanukiForCausalLM(MixtralForCausalLM):
    """Mixtral with the normalised gate in every layer."""

    config_class = TanukiConfig

    def __init__(self, config: TanukiConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            router = layer.mlp.gate
            router.gate_scale = config.gate_scale
            router.forward = normalized_gate.__get__(router)
